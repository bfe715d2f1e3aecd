"""Stage 7: the IR as operators that torch itself runs: scaled products on a GPU, integer ones on a CPU."""
