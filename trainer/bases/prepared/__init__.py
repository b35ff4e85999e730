"""Bases whose rounding is decided before training, matrix by matrix, together with where the adapter starts."""
