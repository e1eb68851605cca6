"""Scores of predictions: sums and counts over batches, then scalars."""

from icm_jax.measure.precision import average_precision
from icm_jax.measure.scores import Accuracy, MeanIoU, Score

__all__ = ["Accuracy", "MeanIoU", "Score", "average_precision"]
