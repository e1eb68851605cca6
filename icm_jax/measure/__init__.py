"""Scores of predictions: sums and counts over batches, then scalars."""

from icm_jax.measure.scores import Accuracy, AveragePrecision, MeanIoU, Score

__all__ = ["Accuracy", "AveragePrecision", "MeanIoU", "Score"]
