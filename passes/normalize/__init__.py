"""Stage 1: one form for each thing that models write in many ways."""
