"""Stage 5: constant parts of the graph become constants."""
