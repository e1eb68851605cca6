"""Images, masks and boxes on the host: fitting to the fixed canvas of a batch."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

from icm_jax.data.resize import bilinear
from icm_jax.errors import IcmError

GREY = 128
"""Of the bars beside a letterboxed image."""


def sides(size) -> tuple[int, int]:
    """(height, width) of a size in a config: one number for both, or both.

    >>> sides(96), sides((512, 1024))
    ((96, 96), (512, 1024))

    Raises: IcmError for anything else.
    """
    given = (size,) if isinstance(size, int) else tuple(size)
    whole = all(isinstance(side, int) and side > 0 for side in given)
    if not whole or len(given) not in (1, 2):
        raise IcmError(f"a size is a whole number of pixels or (height, width), not {size!r}")
    return given[0], given[-1]


def check_aspect(image: np.ndarray, mask: np.ndarray, name: str) -> None:
    """Raises IcmError if a mask [h, w] cannot lie over its (perhaps reduced) image [H, W, 3]."""
    (height, width), (h, w) = image.shape[:2], mask.shape
    if abs(h * width - w * height) > 2 * max(h, w):  # a reduced image has rounded sides
        raise IcmError(f"the mask of {name} is {h} x {w}, which does not fit {height} x {width}")


def fit(array: np.ndarray, canvas: tuple[int, int], resample=Image.Resampling.BILINEAR):
    """Scales so that the canvas is just covered, then cuts out its centre.

    Args:
      array: uint8 [H, W, 3], or of masks [H, W]. canvas: (height, width).
      resample: NEAREST for masks.
    Returns: uint8 [*canvas] or [*canvas, 3].
    """
    height, width = array.shape[:2]
    size = _covering((height, width), canvas)
    left, top = (size[0] - canvas[1]) // 2, (size[1] - canvas[0]) // 2
    if size != (width, height) and resample == Image.Resampling.BILINEAR:
        across, down = width / size[0], height / size[1]
        box = left * across, top * down, (left + canvas[1]) * across, (top + canvas[0]) * down
        return bilinear(array, canvas[::-1], box)
    if size != (width, height):
        array = np.asarray(Image.fromarray(array).resize(size, resample))
    return array[top : top + canvas[0], left : left + canvas[1]]


def cover(image: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """What `fit` cuts the canvas out of: the whole image, uint8 [h, w, 3], just as large as to
    cover it."""
    size = _covering(image.shape[:2], canvas)
    return image if size == image.shape[1::-1] else bilinear(image, size)


def _covering(shape, canvas: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of an image of (height, width) that just covers a canvas."""
    scale = max(canvas[0] / shape[0], canvas[1] / shape[1])
    return max(canvas[1], round(shape[1] * scale)), max(canvas[0], round(shape[0] * scale))


def random_view(
    image: np.ndarray, canvas: tuple[int, int], share: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A random window, scaled to the canvas and mirrored or not, as Inception's crops.

    Args:
      image: uint8 [H, W, 3]. canvas: (height, width). share: least and largest part of the area of
        the largest window with the canvas' aspect; the aspect varies by 3/4 to 4/3.
    Returns: uint8 [*canvas, 3].
    """
    height, width = image.shape[:2]
    scale = min(height / canvas[0], width / canvas[1])
    part = np.sqrt(rng.uniform(*share))
    squeeze = np.exp(rng.uniform(-1, 1) * np.log(4 / 3) / 2)
    sides = part * scale * np.array(canvas) * (squeeze, 1 / squeeze)
    sides = np.minimum(sides, (height, width))
    top, left = rng.uniform(size=2) * ((height, width) - sides)
    box = (left, top, left + sides[1], top + sides[0])
    return bilinear(image, canvas[::-1], box)[:, :: -1 if rng.uniform() < 0.5 else 1]


LETTERBOXES = ("corner", "centre")
"""Where an image may lie in its canvas."""


def letterbox(
    image: np.ndarray, canvas: tuple[int, int], place: str = "corner"
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Scales so that the whole image just fits; the rest of the canvas is grey.

    Args:
      image: uint8 [H, W, 3]. canvas: (height, width).
      place: "corner", top left, or "centre", as Darknet has it.
    Returns: uint8 [*canvas, 3] and (top, left, height, width) of the image in it.
    """
    height, width = image.shape[:2]
    scale = min(canvas[0] / height, canvas[1] / width)
    h, w = (
        min(side, max(1, round(length * scale)))
        for side, length in zip(canvas, (height, width), strict=True)
    )
    if (h, w) != (height, width):
        image = bilinear(image, (w, h))
    boxed = np.full((*canvas, 3), GREY, np.uint8)
    top, left = ((canvas[0] - h) // 2, (canvas[1] - w) // 2) if place == "centre" else (0, 0)
    boxed[top : top + h, left : left + w] = image
    return boxed, (top, left, h, w)


def inside(extent: Iterable[int]) -> tuple[slice, slice]:
    """Rows and columns of (top, left, height, width)."""
    top, left, height, width = map(int, extent)
    return slice(top, top + height), slice(left, left + width)
