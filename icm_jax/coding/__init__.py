"""Integers to bytes and back: tables, range coder, stream. NumPy and Numba only."""
