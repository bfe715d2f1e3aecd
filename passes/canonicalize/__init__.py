"""Quantized graphs of other tools become the IR: one pass for each tool's operators."""
