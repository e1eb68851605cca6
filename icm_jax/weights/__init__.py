"""Readers of weights that other programs trained."""
