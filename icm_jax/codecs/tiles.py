"""Large images in windows: the same latents and pixels as in one piece, in bounded memory.

A window is cut with a halo as wide as the transform looks, and only what lies inside of the halo is
kept. At the border of the image a window has no halo: there the transform pads as it would have
done on the whole image. So there are no seams to hide, and a file does not tell whether it was
written in windows. All windows of a large image have one size, hence one compiled program.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from icm_jax import ops

WINDOW = 1024  # pixels a side; larger images are cut


class Tiling(NamedTuple):
    """What a codec has to tell for its transforms to be run in windows.

    Attributes:
      segment: name of the latent y, which "image" needs alone.
      front: (variables, inputs) -> y float [N, H/factor, W/factor, C]: the part of `analyse` that
        looks no further than `halo` pixels; `analyse` then takes {"latent": y} for the rest.
      factor: pixels per element of y; sides are padded to multiples of it.
      halo: in pixels, a multiple of factor. back_halo: of the way back, in elements of y.
    """

    segment: str
    front: Callable[[Any, dict], Any]
    factor: int
    halo: int
    back_halo: int


def spans(length: int, size: int, halo: int) -> Iterator[tuple[int, int, int]]:
    """(start of a window, begin and end of what is kept of it) along one side."""
    begin = 0
    while begin < length:
        start = max(0, min(begin - halo, length - size))
        end = length if start + size >= length else start + size - halo
        yield start, begin, end
        begin = end


def needed(height: int, width: int, window: int = WINDOW) -> bool:
    """Whether an image is larger than a window."""
    return max(height, width) > window


def analyse(tiling: Tiling, run: Callable, image: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """y of a uint8 image [1, H, W, 3]; `run` computes `tiling.front` of a window of it."""
    image = ops.pad_to(image, tiling.factor)
    return _in_windows(run, image, window, tiling.halo, 1, tiling.factor)


def synthesise(tiling: Tiling, run: Callable, y: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Pixels [1, 16h, 16w, 3] of y [1, h, w, C]; `run` computes them of a window of y."""
    size = window // tiling.factor
    return _in_windows(run, y, size, tiling.back_halo, tiling.factor, 1)


def _in_windows(run, given: np.ndarray, window: int, halo: int, up: int, down: int) -> np.ndarray:
    """Cuts the sides of `given`, runs, and puts the kept parts together; sides scale by up/down."""
    sizes = [min(window, side) for side in given.shape[1:3]]
    result = np.empty(0)
    for top, first, last in spans(given.shape[1], sizes[0], halo):
        for left, begin, end in spans(given.shape[2], sizes[1], halo):
            part = np.asarray(run(given[:, top : top + sizes[0], left : left + sizes[1]]))
            if not result.size:
                sides = [side * up // down for side in given.shape[1:3]]
                result = np.empty((1, *sides, part.shape[-1]), part.dtype)
            rows, columns = (
                slice((a - origin) * up // down, (b - origin) * up // down)
                for a, b, origin in ((first, last, top), (begin, end, left))
            )
            result[
                :, first * up // down : last * up // down, begin * up // down : end * up // down
            ] = part[:, rows, columns]
    return result
