"""Regions of interest of fixed number and size (He et al. 2017): RoIAlign, which boxes masks are
learned on, and what they should be.

Bilinear interpolation on a regular grid is a product with a small matrix for each axis, and so is
the mean over samples: there is no gather, and shapes do not depend on where boxes lie. The products
cost an eighth of the masks' head where pictures are 800 × 1333.

Lengths are pixels of the image, boxes (ymin, xmin, ymax, xmax).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from icm_jax.nets.pyramid import STRIDES
from icm_jax.tasks.boxes import area, iou

SIDE = 14
"""Of what `MaskHead` takes of a box."""
SAMPLES = 2
"""Points by each axis, in each bin, whose mean is taken."""
ALIKE = 0.5
"""Least overlap of a box with the object whose mask is learned on it."""
_USUAL, _FIRST, _LAST = 224.0, 3, 5


def level_of(boxes: jax.Array, scale: float = 1.0) -> jax.Array:
    """Which of P3, P4, P5 a box is seen in, 0, 1 or 2: ⌊4 + log2(sqrt(area) / 224)⌋, kept in
    3 ... 5 (Lin et al. 2017a, equation 1). float32 [M, 4] -> int32 [M].

    Args: scale: of the 224 pixels.
    """
    side = jnp.sqrt(jnp.maximum(area(boxes), 1e-6))
    number = jnp.floor(4.0 + jnp.log2(side / (_USUAL * scale)) + 1e-6)
    return jnp.clip(number, _FIRST, _LAST).astype(jnp.int32) - _FIRST


def weights(start: jax.Array, extent: jax.Array, side: int, length: int) -> jax.Array:
    """By how much each of `length` elements counts in each of `side` bins of an interval.

    As RoIAlign has it: a bin is the mean of `SAMPLES` points between which and the two elements
    beside them is interpolated; before the first and behind the last element is what these are, and
    farther than one element beyond them nothing.

    Args: start, extent: float32 [M], in elements, whose middles are at 0.5, 1.5 and so on.
    Returns: float32 [M, side, length].
    """
    steps = (jnp.arange(side * SAMPLES, dtype=jnp.float32) + 0.5) / (side * SAMPLES)
    at = start[:, None] + extent[:, None] * steps[None] - 0.5
    there = (at >= -1.0) & (at <= length)
    at = jnp.clip(at, 0.0, length - 1.0)
    elements = jnp.arange(length, dtype=jnp.float32).reshape(1, 1, -1)
    distance = jnp.abs(at[..., None] - elements)
    each = jnp.where(there[..., None], jnp.maximum(1.0 - distance, 0.0), 0.0)
    return each.reshape(len(start), side, SAMPLES, length).mean(axis=2)


def _both(boxes: jax.Array, stride: float, side: int, shape: Sequence[int]):
    """`weights` of rows and of columns of a grid of this shape."""
    corners = boxes / stride
    extents = corners[:, 2:] - corners[:, :2]
    return (weights(corners[:, i], extents[:, i], side, shape[i]) for i in (0, 1))


def roi_align(
    levels: Sequence[jax.Array], boxes: jax.Array, level: jax.Array, side: int = SIDE
) -> jax.Array:
    """RoIAlign (He et al. 2017, section 3; the half pixel that its first code was off by is put
    right): float [h, w, C] of P3, P4, P5 and float32 [M, 4] -> float [M, side, side, C].

    Args: level: int32 [M], in which of the levels each box is seen.
    """
    parts = []
    for number, (values, stride) in enumerate(zip(levels, STRIDES, strict=False)):
        rows, columns = _both(boxes, stride, side, values.shape)
        rows = jnp.where((level == number)[:, None, None], rows, 0.0)
        rows, columns = rows.astype(values.dtype), columns.astype(values.dtype)
        parts.append(jnp.einsum("mph,hwc,mqw->mpqc", rows, values, columns))
    return functools.reduce(jnp.add, parts)


def examples(
    proposals: jax.Array,
    proposed: jax.Array,
    truth: jax.Array,
    outlined: jax.Array,
    count: int,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The boxes of an image on which masks are learned: random ones of the objects' own and of the
    proposals that overlap one by half (He et al. 2017, section 3.1).

    Args:
      proposals: float32 [R, 4]; proposed: bool [R], which of them count.
      truth: float32 [B, 4]; outlined: bool [B], which are objects whose masks are known.
      count: M, how many.
    Returns: boxes float32 [M, 4]; whose mask it is, int32 [M]; and bool [M], which of them count.
    """
    given = jnp.concatenate([truth, proposals])
    usable = jnp.concatenate([outlined, proposed])
    overlap = jnp.where(outlined[None], iou(given, truth), 0.0)
    good = usable & (overlap.max(axis=1) >= ALIKE)
    order = jax.random.uniform(key, good.shape) + good.astype(jnp.float32)
    _, chosen = jax.lax.top_k(order, min(count, len(given)))
    return given[chosen], jnp.argmax(overlap[chosen], axis=1).astype(jnp.int32), good[chosen]


def mask_targets(
    masks: jax.Array, step: float, boxes: jax.Array, rows: jax.Array, side: int
) -> jax.Array:
    """What masks of boxes should be: float32 [M, side, side], 1 where at least half of a bin is the
    object.

    Args:
      masks: bool [B, h, w], objects at every `step` pixels. boxes: float32 [M, 4].
      rows: int32 [M], which mask each box is of.
    """
    down, across = _both(boxes, step, side, masks.shape[1:])
    own = masks[rows].astype(jnp.float32)
    return (jnp.einsum("mph,mhw,mqw->mpq", down, own, across) >= 0.5).astype(jnp.float32)
