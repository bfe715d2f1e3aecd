"""From a model, or a quantized program of it, to a quantized checkpoint."""
