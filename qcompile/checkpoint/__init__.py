"""Quantized Hugging Face checkpoints: `formats` spells them, `write` and `read` go from and to models."""
