"""Quantized models on one GPU, against bf16, torchao and the chip: `python -m benchmarks.gpu`."""
