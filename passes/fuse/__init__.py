"""Stage 4: Q/DQ and the operators around them become one node."""
