"""Stage 3: Q/DQ and the operators around them are moved to where back ends fuse them."""
