"""Codec files, .icmc, as what training starts from: of the same codec, or of one that is within it.

Networks of a frozen codec's priors are integers; the floats that they stand for come back but for
rounding. A weight is taken for every one of the run's whose path ends as its own does below the
codec's part, as `machine/analysis/Dense_0/kernel` does for `analysis/Dense_0/kernel`, and that has
its shape. Kernels may have more inputs than the file's: theirs begin as zeros, and so the network
as what it was.
"""

import os
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from icm_jax.codecs import CODECS, model_file
from icm_jax.codecs.refine import floats


def codec(path: str | os.PathLike, shapes: Mapping[str, Any]) -> dict:
    """A reader (see `icm_jax.weights`); an empty path is the model in the package.

    Raises: IcmError as `model_file.load`.
    """
    frozen = model_file.load(path or None, CODECS)
    kept: dict = flax.traverse_util.flatten_dict(floats(frozen))
    endings = {place[2:]: value for place, value in kept.items()}
    given: dict = {}
    asked: dict = flax.traverse_util.flatten_dict(dict(shapes))
    for place, leaf in asked.items():
        if place in kept:
            found = kept[place]
        else:
            tails = (place[start:] for start in range(2, len(place)))
            found = next((endings[tail] for tail in tails if tail in endings), None)
        value = None if found is None else _grown(found, leaf.shape)
        if value is not None:
            given[place] = value
    return flax.traverse_util.unflatten_dict(given)


def _grown(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """`value` in a larger shape, if its inputs, the last axis but one, alone are more there."""
    if value.shape == shape:
        return value
    if value.ndim != len(shape) or value.ndim < 2 or value.shape[-2] > shape[-2]:
        return None
    if (*value.shape[:-2], value.shape[-1]) != (*shape[:-2], shape[-1]):
        return None
    grown = np.zeros(shape, value.dtype)
    grown[..., : value.shape[-2], :] = value
    return grown
