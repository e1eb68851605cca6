"""Scores of predictions: sums and counts over batches, then scalars."""

from icm_jax.evaluators.scores import Accuracy, MeanIoU, Score

__all__ = ["Accuracy", "MeanIoU", "Score"]
