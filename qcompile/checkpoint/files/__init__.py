"""Safetensors and directories: tensors that are read when they are needed, files that are complete or not there."""
