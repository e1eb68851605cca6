"""Task scores as sums over examples: any batching gives the same result."""

import abc

import numpy as np

from icm_jax.errors import IcmError

IGNORE = 255


class Score(abc.ABC):
    """Adds up batches. `update` takes predictions and the batch they belong to, both NumPy."""

    @abc.abstractmethod
    def update(self, predicted: dict, batch: dict) -> None:
        """Adds the rows of a batch that are valid (bool [N])."""

    @abc.abstractmethod
    def result(self) -> dict[str, float]:
        """The scores over everything added."""


class Accuracy(Score):
    """top1 and top5 of "logits" [N, K] against "label" [N]; ties count against the model."""

    def __init__(self):
        self._sums = np.zeros(3, np.int64)  # right at 1, right at 5, examples

    def update(self, predicted, batch):
        logits = np.asarray(predicted["logits"], np.float32)[batch["valid"]]
        labels = np.asarray(batch["label"])[batch["valid"]]
        own = logits[np.arange(len(labels)), labels][:, None]
        rank = (logits >= own).sum(axis=1)  # 1 for the best
        whole = np.isfinite(logits).all(axis=1)  # comparisons with NaN would flatter the rank
        self._sums += [(whole & (rank <= 1)).sum(), (whole & (rank <= 5)).sum(), len(labels)]

    def result(self):
        first, fifth, count = self._sums
        return {
            "top1": float(first / max(count, 1)),
            "top5": float(fifth / max(count, 1)),
            "examples": int(count),
        }


class MeanIoU(Score):
    """Mean intersection over union of "segments" [N, H, W] against "mask", 255 ignored.

    Classes that appear neither in predictions nor in masks do not count.

    Raises: IcmError (`update`) for an id outside 0 ... classes - 1.
    """

    def __init__(self, classes: int):
        self._confusion = np.zeros((classes, classes), np.int64)  # [true, predicted]
        self._examples = 0

    def update(self, predicted, batch):
        classes = len(self._confusion)
        segments = np.asarray(predicted["segments"])[batch["valid"]]
        masks = np.asarray(batch["mask"])[batch["valid"]].astype(np.int64)
        known = masks != IGNORE
        for name, ids in (("mask", masks[known]), ("prediction", segments[known])):
            if ids.size and not 0 <= ids.min() <= ids.max() < classes:
                raise IcmError(
                    f"a {name} has class ids {ids.min()} to {ids.max()}; expected 0 to "
                    f"{classes - 1} (or {IGNORE} in masks, which is ignored): check the classes"
                )
        pairs = masks[known] * classes + segments[known]
        self._confusion += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        self._examples += len(masks)

    def result(self):
        confusion, examples = self._confusion, self._examples
        hits = np.diag(confusion)
        union = confusion.sum(axis=0) + confusion.sum(axis=1) - hits
        iou = hits[union > 0] / union[union > 0]
        accuracy = hits.sum() / max(confusion.sum(), 1)
        return {
            "miou": float(iou.mean()) if len(iou) else 0.0,
            "pixel_accuracy": float(accuracy),
            "examples": int(examples),
        }
