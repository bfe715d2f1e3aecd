"""Stage 2: where quantizers can sit, and putting Q/DQ there."""
