"""For an NVIDIA GPU: scaled and integer products, attention without quantizers; `pipeline.py` has the order."""
