"""Bootstrap over images (Efron 1979): what a score or a rate would have been on other images.

A draw takes as many images as a set has, with replacement. The draws of a set depend on its size
alone, so differences of two codecs on it are of the same images, draw by draw, and what images
share falls out. Records keep what each draw gave, from which a report takes its intervals.
"""

import base64

import numpy as np

DRAWS = 500
LEVEL = 0.95
"""The share of the draws that lies within an interval."""


def resamples(images: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each draw takes each image: uint16 [draws, images]."""
    rng, share = np.random.default_rng(seed), np.full(images, 1 / images)
    return np.array([rng.multinomial(images, share) for _ in range(draws)], np.uint16)


def means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean over the images of each draw, float64 [draws], of values float [images]; those of
    images that have none, NaN, are left out."""
    known = ~np.isnan(values)
    kept = np.where(known, values, 0)
    with np.errstate(invalid="ignore"):  # a draw at a time: there may be 50,000 images
        return np.array([(row @ kept) / (row @ known.astype(float)) for row in counts])


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """(low, high), between which `level` of the draws lie, by their percentiles.

    Args:
      values: of a statistic, float [draws]; NaN where a draw has none.

    Returns: both NaN where more than one draw in twenty has none.

    >>> counts = resamples(100, draws=1000)
    >>> low, high = interval(means(np.arange(100.0), counts))
    >>> bool(43 < low < 45 and 54 < high < 56)  # 49.5 ± 1.96 · 28.9 / 10
    True
    """
    found = values[~np.isnan(values)]
    if len(found) < 0.95 * len(values) or not len(found):
        return float("nan"), float("nan")
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def packed(drawn: dict[str, np.ndarray]) -> dict[str, str]:
    """{name: float [draws]} as a record holds it: the base64 of little-endian float32."""
    return {
        name: base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()
        for name, values in drawn.items()
    }


def of(record: dict, name: str) -> np.ndarray | None:
    """What each draw gave of a record's number, float64 [draws]; None where it keeps none."""
    kept = record.get("draws", {}).get(name)
    return None if kept is None else np.frombuffer(base64.b64decode(kept), "<f4").astype(float)
