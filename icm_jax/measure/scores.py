"""Task scores as sums over examples: any batching gives the same result.

Those of boxes are in `icm_jax.measure.precision`.
"""

import abc
from collections.abc import Sequence
from typing import Self

import numpy as np

from icm_jax.errors import IcmError
from icm_jax.measure import draws

IGNORE = 255


class Score(abc.ABC):
    """Adds up batches. `update` takes predictions and the batch they belong to, both NumPy; `add`
    takes over what another of its kind has added up.

    Attributes:
      examples: how many were added.
    """

    examples: int = 0

    @abc.abstractmethod
    def update(self, predicted: dict, batch: dict) -> None:
        """Adds the rows of a batch that are valid (bool [N])."""

    @abc.abstractmethod
    def add(self, other: Self) -> None:
        """Adds all that was added to the other, which goes on as it is."""

    @abc.abstractmethod
    def result(self) -> dict[str, float]:
        """The scores over everything added."""

    def by_class(self) -> dict[str, float]:
        """The first score of `result` by class, without those that show nothing; of scores that are
        not means over classes none."""
        return {}

    def parts(self) -> dict[str, dict[str, float]]:
        """Scores of parts of what was added, by the names that records have them under."""
        return {"by_class": self.by_class()}

    @abc.abstractmethod
    def resampled(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Scores over the examples of each draw, float64 [draws], NaN where they show nothing that
        counts.

        Args: counts: whole numbers [draws, examples], see `icm_jax.measure.draws`.
        """


class Accuracy(Score):
    """top1 and top5 of "logits" [N, K] against "label" [N]; ties count against the model.

    >>> score = Accuracy()
    >>> score.update({"logits": [[2, 1], [3, 3]]}, {"label": [0, 1], "valid": [True, True]})
    >>> score.result()
    {'top1': 0.5, 'top5': 1.0, 'examples': 2}
    """

    def __init__(self):
        self._right: list[np.ndarray] = []  # bool [n, 2], at 1 and at 5

    def update(self, predicted, batch):
        logits = np.asarray(predicted["logits"], np.float32)[batch["valid"]]
        labels = np.asarray(batch["label"])[batch["valid"]]
        right = logits[np.arange(len(labels)), labels][:, None]
        rank = (logits >= right).sum(axis=1)  # 1 for the best
        whole = np.isfinite(logits).all(axis=1)  # comparisons with NaN would flatter the rank
        self._right.append(np.stack([whole & (rank <= 1), whole & (rank <= 5)], axis=1))
        self.examples += len(labels)

    def add(self, other):
        self._right += other._right
        self.examples += other.examples

    def result(self):
        first, fifth = self._all().sum(axis=0) / max(self.examples, 1)
        return {"top1": float(first), "top5": float(fifth), "examples": self.examples}

    def resampled(self, counts):
        first, fifth = self._all().astype(float).T
        return {"top1": draws.means(first, counts), "top5": draws.means(fifth, counts)}

    def _all(self) -> np.ndarray:
        return np.concatenate([np.zeros((0, 2), bool), *self._right])


class MeanIoU(Score):
    """Mean intersection over union of "segments" [N, H, W] against "mask", 255 ignored; each class
    counts over all pixels of all images (Everingham et al. 2015, section 4.2).

    Classes that appear neither in predictions nor in masks do not count.

    Args: classes: their names.

    Raises: IcmError (`update`) for an id outside 0 ... classes - 1.
    """

    def __init__(self, classes: Sequence[str]):
        self._classes = tuple(classes)
        # Of each image int64 [3, classes]: pixels that are right, in the mask, predicted.
        self._pixels: list[np.ndarray] = []

    def update(self, predicted, batch):
        count = len(self._classes)
        for row in np.flatnonzero(batch["valid"]):
            mask = np.asarray(batch["mask"][row])
            known = mask != IGNORE
            mask, found = mask[known], np.asarray(predicted["segments"][row])[known]
            for name, ids in (("mask", mask), ("prediction", found)):
                if ids.size and not 0 <= ids.min() <= ids.max() < count:
                    raise IcmError(
                        f"a {name} has class ids {ids.min()} to {ids.max()}; expected 0 to "
                        f"{count - 1} (or {IGNORE} in masks, which is ignored): check the classes"
                    )
            several = mask[mask == found], mask, found
            self._pixels.append(np.stack([np.bincount(ids, minlength=count) for ids in several]))
            self.examples += 1

    def add(self, other):
        self._pixels += other._pixels
        self.examples += other.examples

    def result(self):
        iou = [*self.by_class().values()]
        right, there, _ = self._sums().sum(axis=1)
        return {
            "miou": float(np.mean(iou)) if iou else 0.0,
            "pixel_accuracy": float(right / max(there, 1)),
            "examples": self.examples,
        }

    def by_class(self):
        named = zip(self._classes, _overlap(self._sums()), strict=True)
        return {name: float(value) for name, value in named if not np.isnan(value)}

    def _sums(self) -> np.ndarray:
        nothing = np.zeros((3, len(self._classes)), np.int64)
        return np.stack([nothing, *self._pixels]).sum(axis=0)

    def resampled(self, counts):
        pixels = np.array(self._pixels, float).reshape(self.examples, -1)
        found = np.empty((2, len(counts)))
        with np.errstate(invalid="ignore"):
            for place, row in enumerate(counts):  # a draw at a time: there may be many images
                drawn = (row.astype(float) @ pixels).reshape(3, -1)
                iou = _overlap(drawn)
                seen = ~np.isnan(iou)
                found[:, place] = iou[seen].sum() / seen.sum(), drawn[0].sum() / drawn[1].sum()
        return dict(zip(("miou", "pixel_accuracy"), found, strict=True))


def _overlap(pixels: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, NaN without a pixel: of whole numbers [3, classes]."""
    union = pixels[1] + pixels[2] - pixels[0]
    with np.errstate(invalid="ignore"):
        return pixels[0] / union
