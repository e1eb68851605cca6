"""Images of any size in windows of a few fixed sizes: the same results as in one piece.

Every program is compiled for one shape, and photographs have thousands. So what networks compute of
an image they compute in windows of one of `SIZES`, whichever wastes least on it. A window is cut
with a halo as wide as the network looks, and only what lies inside of the halo is kept. Where a
window looks past the border of the image there are zeros, as padding has them on the whole image,
in every layer (`ops.inside`). So there are no seams to hide, a file does not tell in which windows
it was written, and memory is bounded.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from icm_jax import ops

Size = tuple[int, int]
SIZES: tuple[Size, ...] = (
    (64, 64),
    (128, 128),
    (256, 256),
    (512, 640),
    (640, 512),
    (512, 768),
    (768, 512),
    (1024, 1024),
)
"""Heights and widths of windows in pixels, multiples of what hyper-latents stand for."""
_EACH = 1 << 13  # pixels whose time a window costs whatever its size
_WORTH = 5
"""Times as long as in one window may an image take in several, which need less memory."""


def squares(sizes: Sequence[Size]) -> list[Size]:
    """The squares around some sizes: fewer, for what takes less time to compute than to compile.

    >>> squares(SIZES)
    [(64, 64), (128, 128), (256, 256), (640, 640), (768, 768), (1024, 1024)]
    """
    return [(side, side) for side in sorted({max(size) for size in sizes})]


class Back(NamedTuple):
    """How an output is computed in windows.

    Attributes:
      output: its name. segments: names of the latents that it needs, all on the grid of y.
      step: pixels per element of it. halo: how far it looks, in elements of y.
    """

    output: str
    segments: tuple[str, ...]
    step: int
    halo: int


class Tiling(NamedTuple):
    """What a codec has to tell for its transforms to be run in windows.

    Their convolutions take what `ops.inside` gives.

    Attributes:
      segments: names of latents; side by side they are y.
      front: (variables, inputs) -> y float [N, H/factor, W/factor, C]: the part of `analyse` that
        looks no further than `halo` pixels; `analyse` then takes {"latent": y} for the rest.
      factor: pixels per element of y. grid: sides are padded to multiples of it, in pixels; 1:
        they stay, and those of y are rounded up.
      halo: in pixels, a multiple of factor. back: the way back, for each output.
      rest: elements of y, a side, per element of the latents that the rest of `analyse` gives, 1 if
        there are none but y. rest_halo: in elements of y, a multiple of it.
    """

    segments: tuple[str, ...]
    front: Callable[[Any, dict], Any]
    factor: int
    grid: int
    halo: int
    back: tuple[Back, ...]
    rest: int = 1
    rest_halo: int = 0


class Part(NamedTuple):
    """A window of some arrays: a cut of each, [N, h, w, C], and what of it is not beyond the
    border, int32 [N, 4] as in `ops.within`."""

    arrays: dict[str, Any]
    bounds: dict[str, Any]


def spans(length: int, size: int, halo: int) -> Iterator[tuple[int, int, int]]:
    """(start of a window, begin and end of what is kept of it) along one side."""
    begin = 0
    while begin < length:
        start = max(0, begin - halo)
        end = length if start + size >= length else start + size - halo
        yield start, begin, end
        begin = end


def best_size(sides: Size, halo: int, unit: int = 1, sizes: Sequence[Size] = SIZES) -> Size:
    """Of `sizes`, multiples of `unit`, the one in which an image of `sides` takes least time;
    `one_window` where the halo is too wide for them, or for all but a rest of each."""

    def cost(size: Size) -> int:
        counts = [sum(1 for _ in spans(*one, halo)) for one in zip(sides, size, strict=True)]
        return counts[0] * counts[1] * (size[0] * size[1] + _EACH)

    fitting = [
        size
        for size in sizes
        if not any(side % unit for side in size)
        and all(side > 2 * halo or side >= length for side, length in zip(size, sides, strict=True))
    ]
    one = one_window(sides, unit)
    best = min(fitting, key=cost, default=one)
    several = best[0] < sides[0] or best[1] < sides[1]
    return one if several and cost(best) > _WORTH * cost(one) else best


def one_window(sides: Size, unit: int = 1) -> Size:
    """A window for all of an image: each side the next of four between powers of two, and a
    multiple of `unit`.

    >>> one_window((1000, 1300), 32)
    (1024, 1536)
    """
    steps = [1 << max(0, (int(side) - 1).bit_length() - 3) for side in sides]
    height, width = (-(-n // step) * step for n, step in zip(sides, steps, strict=True))
    return height + -height % unit, width + -width % unit


def in_windows(
    run: Callable[[Part], Any],
    given: Mapping[str, tuple[np.ndarray, int]],
    sides: Size,
    step: int,
    halo: int,
    sizes: Sequence[Size] = SIZES,
    together: int = 1,
) -> Any:
    """What `run` gives of whole arrays, computed in windows.

    Args:
      run: a `Part` of N windows -> arrays [N, h, w, C] or a tree of such, all on one grid.
      given: by name, an array [1, h, w, C] and the pixels that an element of it stands for.
      sides: of the image in pixels, multiples of the least of these.
      step: pixels per element of the result.
      halo: how far `run` looks, in pixels; a multiple of `step` and of those of `given`.
      sizes: to choose from, in pixels.
      together: N, where there are several windows; the last ones are joined by empty ones.

    Returns: the same tree with arrays [1, ...] of the image's whole sides, rounded up.
    """
    unit = max(step, *(pixels for _, pixels in given.values()))
    size = best_size(sides, halo, unit, sizes)
    places = list(itertools.product(*(spans(*o, halo) for o in zip(sides, size, strict=True))))
    count = 1 if len(places) == 1 else together
    whole: list[np.ndarray] = []
    form: Any = None
    for number in range(0, len(places), count):
        group = places[number : number + count]
        corners = [(rows[0], columns[0]) for rows, columns in group]
        corners += [(-(-sides[0] // unit) * unit, 0)] * (count - len(group))  # beyond the border
        found, form = jax.tree.flatten(run(_part(given, corners, size)))
        found = [np.asarray(array) for array in found]
        if not whole:
            whole = [np.empty((1, *_up(sides, step), a.shape[-1]), a.dtype) for a in found]
        for row, place in enumerate(group):
            kept = [(slice(a // step, -(-b // step)), a - at, b - at) for at, a, b in place]
            inner = [slice(a // step, -(-b // step)) for _, a, b in kept]
            for result, array in zip(whole, found, strict=True):
                result[0, kept[0][0], kept[1][0]] = array[row, inner[0], inner[1]]
    return jax.tree.unflatten(form, whole)


def in_one_window(array: np.ndarray, pixels: int, unit: int, sizes: Sequence[Size] = SIZES) -> Part:
    """An array [1, h, w, C], whose elements stand for so many pixels, as "whole" in a window of
    one of `sizes`, multiples of `unit`, or of `one_window`."""
    sides = pixels * array.shape[1], pixels * array.shape[2]
    size = best_size(sides, max(*sides, *map(max, SIZES)), unit, sizes)
    return _part({"whole": (array, pixels)}, [(0, 0)], size)


def _part(given, corners: list[Size], size: Size) -> Part:
    """Windows of `size` pixels at some corners."""
    cuts = {
        name: [_cut(array, pixels, corner, size) for corner in corners]
        for name, (array, pixels) in given.items()
    }
    arrays, bounds = (
        {name: np.concatenate([cut[at] for cut in of]) for name, of in cuts.items()}
        for at in (0, 1)
    )
    return Part(arrays, bounds)


def _up(sides: Size, step: int) -> Size:
    return -(-sides[0] // step), -(-sides[1] // step)


def _cut(array: np.ndarray, pixels: int, at: Size, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """A window of `size` pixels at `at`, zeros beyond the array's end; and its bounds."""
    (top, left), (height, width) = ([n // pixels for n in pair] for pair in (at, size))
    found = array[:, top : top + height, left : left + width]
    bounds = np.array([[0, found.shape[1], 0, found.shape[2]]], np.int32)
    missing = height - found.shape[1], width - found.shape[2]
    if any(missing):
        found = np.pad(found, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
    return found, bounds


def within(part: Part, name: str):
    """The context in which `ops.inside` knows the window of an array of `part`."""
    return ops.within(part.arrays[name].shape[1:3], part.bounds[name])
