"""Flax modules, each one paper figure; no losses, no data."""
