"""Batches as a pure function of (seed, step): nothing to save, nothing to skip on resuming.

Row r of step t is position t·B + r of an endless list of shuffled epochs, whatever the number of
processes; process p reads its own rows alone. Host work is decoding and fitting to the canvas;
every random view is made on the device. Examples are loaded by threads, which is enough: the JPEG
library and Pillow's resizing both let other threads run.
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
    features: np.ndarray | None = None,
    boxes: int = 0,
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
      features: [source.length, ...], given in place of the images as "feature".
      boxes: above 0, images are letterboxed and come with their objects, at most so many, the
        largest.
      threads: decoding threads; default: all cores.

    Yields: {"image": uint8 [b, *canvas, 3] or "feature", "valid": bool [b], "label": int32 [b] and
      "mask": uint8 [b, *canvas] where the source has them}, b = B / processes. Rows whose
      example has no label (COCO images without an object) are not "valid".
      With `boxes`, {"image", "valid", "extent": int32 [b, 2], height and width of the picture in
      its canvas, "boxes": float32 [b, boxes, 4] as fractions of the canvas, "box_labels": int32
      [b, boxes], "box_valid" and "box_ignored": bool [b, boxes]}; no two of these are both set.

    Raises: IcmError if B does not divide, the source is empty or has no objects where they are
      asked for, or an image cannot be read.
    """
    rows = _own_rows(batch_size, process, processes)
    _check(source)
    if seed < 0:
        raise IcmError(f"the seed must not be negative, not {seed}")

    @functools.lru_cache(maxsize=4)
    def permutation(epoch):
        return np.random.default_rng([seed, epoch]).permutation(source.length)

    def load(position):
        number = int(permutation(position // source.length)[position % source.length])
        if boxes:
            return _boxed_example(source, number, canvas, boxes)
        return _example(source, number, canvas, None if features is None else features[number])

    return _parallel(load, rows, batch_size, start, stop, threads)


def evaluation_batches(source: Source, **options) -> Iterator[dict[str, np.ndarray]]:
    """Batches of `in_order`, which takes the options; within each the "valid" rows come first."""
    for batch in in_order(source, **options):
        order = np.argsort(~batch["valid"], kind="stable")
        yield {key: value[order] for key, value in batch.items()}


def in_order(
    source: Source,
    *,
    batch_size: int,
    canvas: tuple[int, int],
    limit: int | None = None,
    boxes: int = 0,
    process: int = 0,
    processes: int = 1,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order; the last batch is padded with rows that are not "valid".

    Every process gets as many batches with the same keys, though all rows of its last may be
    padding.
    """
    rows = _own_rows(batch_size, process, processes)
    _check(source)
    length = source.length if limit is None else min(limit, source.length)

    def whole(number):
        if boxes:
            return _boxed_example(source, number, canvas, boxes)
        return _example(source, number, canvas)

    def load(position):
        if position < length:
            return whole(position)
        example = whole(0)  # its keys; the content is blanked
        blanks = {"mask": geometry.IGNORE}
        return {key: np.full_like(value, blanks.get(key, 0)) for key, value in example.items()}

    return _parallel(load, rows, batch_size, 0, -(-length // batch_size), threads)


def _check(source: Source) -> None:
    if source.length < 1:
        raise IcmError(f"{source.name} has no examples")


def _own_rows(batch_size: int, process: int, processes: int) -> range:
    if batch_size < 1 or batch_size % processes:
        raise IcmError(f"{processes} processes do not divide the batch size {batch_size}")
    own = batch_size // processes
    return range(process * own, (process + 1) * own)


def _parallel(load, rows: range, batch_size: int, start: int, stop: int, threads: int | None):
    """Batches of the examples at positions step·B + row, loaded ahead in threads, in order.

    What is ahead is counted in examples, not batches: memory does not grow with cores times B.
    """
    if stop <= start:
        return iter(())
    own, threads = len(rows), threads or os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * own, 2 * threads))
    positions = grain.MapDataset.range(start * own, stop * own).map(
        lambda n: n // own * batch_size + rows[n % own]
    )
    examples = positions.map(load).to_iter_dataset(options)
    return iter(examples.batch(own, drop_remainder=True, batch_fn=_stack))


def _stack(examples) -> dict[str, np.ndarray]:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _example(
    source: Source, number: int, canvas: tuple[int, int], feature: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """One row of a batch."""
    loaded = source.load(number)
    example = {"valid": np.bool_(True)}
    if feature is None:
        image = geometry.decode_image(loaded["image"], loaded["name"], max(canvas))
        example["image"] = geometry.fit(image, canvas)
    else:
        example["feature"] = feature
    if "label" in loaded:
        known = loaded["label"] is not None
        example |= {"label": np.int32(loaded["label"] if known else 0), "valid": np.bool_(known)}
    if "mask" in loaded:
        mask = geometry.decode_mask(loaded["mask"], loaded["name"], len(source.mask_classes))
        if feature is None:
            geometry.check_aspect(image, mask, loaded["name"])
        example["mask"] = geometry.fit(mask, canvas, Image.Resampling.NEAREST)
    return example


def _boxed_example(source: Source, number: int, canvas: tuple[int, int], rows: int) -> dict:
    """One row of a batch with boxes."""
    loaded = source.load(number)
    if "objects" not in loaded:
        raise IcmError(f"{source.name} has no boxes; data.boxes asks for them")
    image = geometry.decode_image(loaded["image"], loaded["name"], max(canvas))
    image, extent = geometry.letterbox(image, canvas)
    objects = loaded["objects"]
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    order = np.argsort(-sides.prod(axis=1), kind="stable")[:rows]
    scale = np.float32(extent) / np.float32(canvas)
    ignored = objects.ignored[order]

    def padded(values):
        return np.pad(values, [(0, rows - len(order))] + [(0, 0)] * (values.ndim - 1))

    return {
        "valid": np.bool_(True),
        "image": image,
        "extent": np.int32(extent),
        "boxes": padded(objects.boxes[order] * np.tile(scale, 2)),
        "box_labels": padded(objects.labels[order]),
        "box_valid": padded(~ignored),
        "box_ignored": padded(ignored),
    }
