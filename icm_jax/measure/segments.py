"""Label maps of whole images, at the size that their data set has them.

A network sees the image whole, in one window padded to a size that many images share
(`icm_jax.codecs.tiles.one_window`), beyond whose border it has the zeros that padding gives it on
the image itself. So a few programs serve all sizes, with the results of a program for each. There
are no sliding windows: dilated networks look hundreds of pixels far, and an image of 1024 × 2048
pixels takes less memory than a batch of training.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.codecs import tiles
from icm_jax.codecs.tiles import Part
from icm_jax.tasks.segmentation import at_pixels

_GRID = 32
"""Pixels per element of the coarsest logits."""


def segmented(
    predict: Callable,
    variables,
    inputs: Mapping[str, np.ndarray],
    sides: tuple[int, int],
    shape: tuple[int, int],
) -> np.ndarray:
    """The class of each pixel of an image's label map: uint8 [1, *shape].

    Args:
      predict: of a segmentation task. variables: on the device.
      inputs: what it takes, {"image" or "feature": [1, h, w, C]} of the whole image.
      sides: of the image that was coded, in pixels. shape: (height, width) of the label map.
    """
    ((name, array),) = inputs.items()
    part = tiles.in_one_window(array, _scale(array, sides), _GRID, ())
    rows, columns = (
        (np.arange(padded, dtype=np.float32) + 0.5) * (side / length)
        for padded, side, length in zip(tiles.one_window(shape), sides, shape, strict=True)
    )
    given = variables, part, np.array(sides, np.float32), rows, columns
    found = _segments(predict, name, _scale(array, sides), *given)
    return np.asarray(found)[None, : shape[0], : shape[1]]


def _scale(array: np.ndarray, sides: tuple[int, int]) -> int:
    """Pixels per element of an image or a feature, a power of two."""
    halvings = range(max(sides).bit_length() + 1)
    fits = lambda n: tuple(ops.halved(side, n) for side in sides) == array.shape[1:3]  # noqa: E731
    return 1 << next(filter(fits, halvings))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _segments(predict, name: str, pixels: int, variables, part: Part, sides, rows, columns):
    array = part.arrays["whole"]
    with tiles.within(part, "whole"):
        logits = predict(variables, {name: jnp.asarray(array)})["logits"][0]
    stride = pixels * array.shape[1] / logits.shape[0]
    return at_pixels(logits, sides, stride, rows, columns)
