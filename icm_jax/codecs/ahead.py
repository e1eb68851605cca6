"""Compiling ahead: what an image needs later, while it is waited for what it needs first."""

import concurrent.futures
import functools
from collections.abc import Callable, Mapping

import numpy as np

from icm_jax.codecs import programs, tiles, walk
from icm_jax.codecs.codec import Codec, seen
from icm_jax.coding import range_coder
from icm_jax.coding.tables import Tables
from icm_jax.files import cores

_begun: set = set()


def begin(
    codec: Codec,
    variables,
    tables: Mapping[str, Tables],
    shape: tiles.Size,
    condition: Mapping[str, np.ndarray],
    *,
    back: str,
) -> None:
    """Starts compiling what images of `shape` need, once for each size of windows: to be coded, all
    but the analysis, which they need first, and to come `back`, all.

    Args:
      tables: by segment. condition: "quality", where the codec has qualities.
      back: "colour" or "grey" picture; "" is the way there.
    """
    tiling = codec.tiling
    if tiling is None:
        return
    sides = shape[0] + -shape[0] % tiling.grid, shape[1] + -shape[1] % tiling.grid
    size = tiles.best_size(sides, tiling.halo, tiling.factor)
    if (codec, size, back) in _begun:
        return
    _begun.add((codec, size, back))
    shapes = {segment.name: (1, *segment.shape(*size)) for segment in codec.segments}
    given = {name: np.zeros(of, np.float32) for name, of in shapes.items()} | dict(condition)

    def prior(number: int) -> None:
        segment = codec.segments[number]
        known = np.zeros(shapes[segment.name][1:], bool)
        decoded = seen(segment, given, given[segment.name], known)
        walk.prior(codec, number, shapes[segment.name], variables, decoded)

    def rest() -> None:
        y = np.concatenate([given[name] for name in tiling.segments], axis=-1)
        walk.rest_of(codec, variables, y, condition)

    def coder() -> None:
        nothing = np.zeros(0, np.int32)
        range_coder.encode(nothing, nothing, next(iter(tables.values())))

    def picture() -> None:
        walk.output(codec, "image", size, variables, given, pixels=back == "colour")

    priors = [functools.partial(prior, number) for number in range(len(shapes))]
    for task in [*priors, picture] if back else [coder, rest, *priors]:
        _pool().submit(_only_made, task)


def _only_made(task: Callable[[], None]) -> None:
    with programs.only_made():
        task()


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(cores(), 4))
