"""For a CPU: integer products and oneDNN; `pipeline.py` has the order."""
