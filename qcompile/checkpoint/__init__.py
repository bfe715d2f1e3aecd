"""Hugging Face checkpoints of quantized models: written (`save`), and read (`qcompile.frontends.checkpoint`)."""
