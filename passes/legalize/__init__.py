"""Stage 6: what a back end cannot take is rewritten to what it can."""
