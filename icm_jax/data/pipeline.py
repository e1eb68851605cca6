"""Batches as a pure function of (seed, step): nothing to save, nothing to skip on resuming.

Row r of step t is position t·B + r of an endless list of shuffled epochs, whatever the number of
processes; process p reads its own rows alone. Host work is decoding and fitting to the canvas;
every random view is made on the device.
"""

import functools
import os
from collections.abc import Iterator

import grain
import numpy as np
from PIL import Image

from icm_jax.data import geometry
from icm_jax.data.sources import Source
from icm_jax.errors import IcmError


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    canvas: tuple[int, int],
    start: int = 0,
    stop: int,
    process: int = 0,
    processes: int = 1,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Training batches of steps start ... stop - 1, this process's rows.

    Args:
      source: where examples come from.
      batch_size: B, rows of the global batch; `processes` must divide it.
      seed: of the order of examples; every epoch has its own permutation.
      canvas: (height, width) of the images.
      threads: decoding threads; default: all cores.

    Yields: {"image": uint8 [b, *canvas, 3], "valid": bool [b], "label": int32 [b] and
      "mask": uint8 [b, *canvas] where the source has them}, b = B / processes.

    Raises: IcmError if B does not divide, the source is empty or an image cannot be read.
    """
    rows = _own_rows(batch_size, process, processes)
    if source.length < 1:
        raise IcmError(f"{source.name} has no examples")

    @functools.lru_cache(maxsize=4)
    def permutation(epoch):
        return np.random.default_rng([seed, epoch]).permutation(source.length)

    def load(step):
        positions = (step * batch_size + row for row in rows)
        numbers = [permutation(p // source.length)[p % source.length] for p in positions]
        return _batch(source, numbers, canvas, len(rows))

    return _parallel(load, start, stop, threads)


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    canvas: tuple[int, int],
    limit: int | None = None,
    process: int = 0,
    processes: int = 1,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order; the last batch is padded with rows that are not "valid"."""
    rows = _own_rows(batch_size, process, processes)
    length = source.length if limit is None else min(limit, source.length)

    def load(step):
        positions = (step * batch_size + row for row in rows)
        return _batch(source, [p for p in positions if p < length], canvas, len(rows))

    return _parallel(load, 0, -(-length // batch_size), threads)


def _own_rows(batch_size: int, process: int, processes: int) -> range:
    if batch_size < 1 or batch_size % processes:
        raise IcmError(f"{processes} processes do not divide the batch size {batch_size}")
    own = batch_size // processes
    return range(process * own, (process + 1) * own)


def _parallel(load, start: int, stop: int, threads: int | None):
    threads = threads or os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    if stop <= start:
        return iter(())
    return iter(grain.MapDataset.range(start, stop).map(load).to_iter_dataset(options))


def _batch(source: Source, numbers, canvas: tuple[int, int], size: int) -> dict[str, np.ndarray]:
    batch = {
        "image": np.zeros((size, *canvas, 3), np.uint8),
        "valid": np.arange(size) < len(numbers),
    }
    for row, number in enumerate(numbers):
        example = source.load(int(number))
        image = geometry.decode_image(example["image"], example["name"], max(canvas))
        batch["image"][row] = geometry.fit(image, canvas)
        if "label" in example:
            batch.setdefault("label", np.zeros(size, np.int32))[row] = example["label"]
        if "mask" in example:
            mask = geometry.decode_mask(example["mask"], example["name"])
            masks = batch.setdefault("mask", np.full((size, *canvas), 255, np.uint8))
            masks[row] = geometry.fit(mask, canvas, Image.Resampling.NEAREST)
    return batch
