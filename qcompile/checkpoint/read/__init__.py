"""From a quantized checkpoint to modules that run on its codes."""
