"""Stage 7: the IR as operators that torch itself runs; for both kinds of device here, for one in `cuda/` and `cpu/`."""
