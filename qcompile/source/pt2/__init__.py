"""Saved programs (`.pt2`) of strangers: what is no plain data is found before torch opens the file."""
