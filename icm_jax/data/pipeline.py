"""Batches as a pure function of (seed, step): nothing to save, nothing to skip on resuming.

Row r of step t is position t·B + r of an endless list of shuffled epochs, whatever the number of
processes; process p reads its own rows alone. Host work is decoding and fitting to the canvas;
every random view is made on the device. Examples are loaded by threads, which is enough: the JPEG
library and Pillow's resizing both let other threads run.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
import simplejpeg
from PIL import Image

from icm_jax.data import BATCH_FIELDS, geometry, images, jpeg
from icm_jax.data.outlines import canvas_masks
from icm_jax.data.sources import Objects, Source
from icm_jax.errors import IcmError
from icm_jax.files import cores

WHOLE = (1.0, 1.0)
_NO_CROP = "data.crop goes neither with boxes nor with features or coefficients of files"
_CODED = 'give data.coefficients a quality instead of "file"'
"""The crop that is none."""


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """What a batch is; `batches` and `in_order` tell what is in it.

    Attributes:
      batch_size: B, rows of the global batch; `processes` must divide it.
      canvas: (height, width) of the images.
      boxes: above 0, images are letterboxed and come with their objects, at most so many, the
        largest.
      letterbox: where they then lie in the canvas, one of `geometry.LETTERBOXES`.
      outlines: above 0, the objects come with masks as well, at every so many pixels of the canvas.
      coefficients: give images as the DCT coefficients of JPEG 4:2:0, for canvases that are
        multiples of 16: a quality as "95", at which the image on its canvas is written and read
        again; or "file", those of the file itself, whose middle is cut out at a multiple of 16.
      crop: other than (1, 1), the canvas of a training image shows a random window of so much of
        the area, mirrored or not (`geometry.random_view`): augmentation before an image is written
        at a quality. Boxes and a file's own coefficients have none.
      whole: images are not cut: each is as large as to just cover the canvas, and its mask has the
        pixels of its own file. Images of other sizes do not stack, so batches are of one. Not with
        boxes, coefficients or crop.
      masks: whether to give the masks of a source that has them; without, they are not decoded.
      process, processes: whose rows, B / processes of each, are made here.
      threads: decoding threads; None: as many as there are cores.

    Raises: IcmError for values that no batch can have.
    """

    batch_size: int
    canvas: tuple[int, int]
    boxes: int = 0
    letterbox: str = "corner"
    outlines: int = 0
    coefficients: str = ""
    crop: tuple[float, float] = WHOLE
    whole: bool = False
    masks: bool = True
    process: int = 0
    processes: int = 1
    threads: int | None = None

    def __post_init__(self):
        if self.batch_size < 1 or self.batch_size % self.processes:
            raise IcmError(
                f"{self.processes} processes do not divide the batch size {self.batch_size}"
            )
        if self.letterbox not in geometry.LETTERBOXES:
            raise IcmError(
                f"data.letterbox is {' or '.join(geometry.LETTERBOXES)}, not {self.letterbox!r}"
            )
        if self.outlines and (not self.boxes or any(n % self.outlines for n in self.canvas)):
            raise IcmError(
                f"outlines at every {self.outlines} pixels need boxes, and multiples of that as "
                f"sides of the canvas, not {self.canvas}"
            )
        given = self.coefficients
        if given not in ("", "file") and not (given.isdecimal() and 1 <= int(given) <= 100):
            raise IcmError(f'data.coefficients is "file" or a quality from 1 to 100, not {given!r}')
        if given and (self.canvas[0] % 16 or self.canvas[1] % 16):
            raise IcmError(f"coefficients need a canvas of multiples of 16, not {self.canvas}")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise IcmError(f"data.crop is a least and a largest share of the area, not {self.crop}")
        if self.crop != WHOLE and (self.boxes or given == "file"):
            raise IcmError(_NO_CROP)

    @property
    def rows(self) -> range:
        """Places in the global batch of this process's rows."""
        count = self.batch_size // self.processes
        return range(self.process * count, (self.process + 1) * count)


def batch_spec(data: Mapping, batch_size: int, **changes) -> BatchSpec:
    """The batches that a run's data fields ask for.

    Args:
      data: canvas, a number or (height, width), and where they are not the defaults boxes,
        letterbox, outlines, coefficients and crop; None is not given, other fields are left alone.
      changes: fields of `BatchSpec` in place of those.
    """
    fields = {name: data[name] for name in BATCH_FIELDS[1:] if data.get(name) is not None}
    fields |= {"canvas": geometry.sides(data["canvas"])} | changes
    fields["crop"] = tuple(fields.get("crop", WHOLE))
    return BatchSpec(batch_size, **fields)


def image_spec(data: Mapping, batch_size: int) -> BatchSpec:
    """Batches of images alone, on the canvas of a run's data fields."""
    return BatchSpec(batch_size, geometry.sides(data["canvas"]), masks=False)


def batches(
    source: Source,
    spec: BatchSpec,
    *,
    seed: int,
    start: int = 0,
    stop: int,
    features: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Training batches of steps start ... stop - 1, this process's rows.

    Args:
      source: where examples come from.
      seed: of the order of examples; every epoch has its own permutation.
      features: [source.length, ...], given in place of the images as "feature".

    Yields: {"image": uint8 [b, *canvas, 3] or "feature", "valid": bool [b], "label": int32 [b] and
      "mask": uint8 [b, *canvas] where the source has them}, b = B / processes. Rows whose
      example has no label (COCO images without an object) are not "valid".
      With `boxes`, {"image" or "feature", "valid", "extent": int32 [b, 4], top, left, height and
      width of the picture in its canvas, "boxes": float32 [b, boxes, 4] as fractions of the canvas,
      "box_labels": int32 [b, boxes], "box_valid" and "box_ignored": bool [b, boxes]}; no two of
      these are both set.
      With `outlines`, n, also "box_masks": bool [b, boxes, height / n, width / n], whether an
      object is at the middle of n × n pixels of the canvas, and "box_outlined": bool [b, boxes],
      whether it has an outline; without one its mask is empty.
      With `coefficients`, in place of "image": "luma" int16 [b, height / 8, width / 8, 64],
      "chroma" int16 [b, height / 16, width / 16, 128], Cb and Cr, both quantised, and "steps"
      int32 [b, 192], what to multiply the 64 + 128 of a place with; masks are left out.

    Raises: IcmError if the source is empty or has no objects where they are asked for, an image
      cannot be read or has not the coefficients asked for, or a crop is asked for where none is
      made: of decoded features or masks.
    """
    _check(source)
    if spec.crop != WHOLE and features is not None:
        raise IcmError(_NO_CROP)
    if seed < 0:
        raise IcmError(f"the seed must not be negative, not {seed}")

    @functools.lru_cache(maxsize=4)
    def permutation(epoch):
        return np.random.default_rng([seed, epoch]).permutation(source.length)

    def load(position):
        number = int(permutation(position // source.length)[position % source.length])
        feature = None if features is None else features[number]
        if spec.boxes:
            return _boxed_example(source, number, spec, feature)
        rng = None if spec.crop == WHOLE else np.random.default_rng([seed, 1, position])
        return _example(source, number, spec, feature, rng)

    return _parallel(load, spec, start, stop)


def layout(keys: tuple[str, ...], spec: BatchSpec) -> dict[str, tuple[tuple[int, ...], type]]:
    """{name: (shape, dtype)} of a global batch of `batches`, of a data set whose examples have
    these `keys`; nothing is read."""
    (height, width), rows = spec.canvas, (spec.batch_size,)
    image = {"valid": (rows, np.bool_), "image": ((*rows, height, width, 3), np.uint8)}
    if spec.boxes:
        flags = ((*rows, spec.boxes), np.bool_)
        found = image | {
            "extent": ((*rows, 4), np.int32),
            "boxes": ((*rows, spec.boxes, 4), np.float32),
            "box_labels": ((*rows, spec.boxes), np.int32),
            "box_valid": flags,
            "box_ignored": flags,
        }
        if spec.outlines:
            grid = height // spec.outlines, width // spec.outlines
            found |= {"box_masks": ((*flags[0], *grid), np.bool_), "box_outlined": flags}
        return found
    found = dict(image)
    if spec.coefficients:
        del found["image"]
        found["luma"] = (*rows, height // 8, width // 8, 64), np.int16
        found["chroma"] = (*rows, height // 16, width // 16, 128), np.int16
        found["steps"] = (*rows, 192), np.int32
    if "label" in keys:
        found["label"] = rows, np.int32
    if spec.masks and "mask" in keys and not spec.coefficients:
        found["mask"] = (*rows, height, width), np.uint8
    return found


def evaluation_batches(
    source: Source, spec: BatchSpec, *, limit: int | None = None, which: slice = slice(None)
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of `in_order`; within each the "valid" rows come first."""
    for batch in in_order(source, spec, limit=limit, which=which):
        order = np.argsort(~batch["valid"], kind="stable")
        yield {key: value[order] for key, value in batch.items()}


def in_order(
    source: Source, spec: BatchSpec, *, limit: int | None = None, which: slice = slice(None)
) -> Iterator[dict[str, np.ndarray]]:
    """Every example (or the first `limit`) once, whole and in order; the last batch is padded with
    rows that are not "valid". Of these batches it gives those that `which` selects. Beside what
    `batches` gives, "number" int64 [B] is the example's in the source.

    Every process gets as many batches with the same keys, though all rows of its last may be
    padding.
    """
    _check(source)
    length = source.length if limit is None else min(limit, source.length)

    def whole(number):
        made = _boxed_example if spec.boxes else _example
        return made(source, number, spec) | {"number": np.int64(number)}

    def load(position):
        if position < length:
            return whole(position)
        example = whole(0)  # its keys; the content is blanked
        blanks = {"mask": images.IGNORE}
        return {key: np.full_like(value, blanks.get(key, 0)) for key, value in example.items()}

    numbers = range(-(-length // spec.batch_size))[which]

    def selected(position):
        number, row = divmod(position, spec.batch_size)
        return load(numbers[number] * spec.batch_size + row)

    return _parallel(selected, spec, 0, len(numbers))


def _check(source: Source) -> None:
    if source.length < 1:
        raise IcmError(f"{source.name} has no examples")


def _parallel(load, spec: BatchSpec, start: int, stop: int):
    """Batches of the examples at positions step·B + row, loaded ahead in threads, in order.

    What is ahead is counted in examples, not batches: memory does not grow with cores times B.
    """
    if stop <= start:
        return iter(())
    rows, threads = spec.rows, spec.threads or cores()
    count = len(rows)
    ahead = 2 * max(count, threads)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    positions = grain.MapDataset.range(start * count, stop * count).map(
        lambda n: n // count * spec.batch_size + rows[n % count]
    )
    examples = positions.map(load).to_iter_dataset(options)
    return iter(examples.batch(count, drop_remainder=True, batch_fn=_stack))


def _stack(examples) -> dict[str, np.ndarray]:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _example(
    source: Source,
    number: int,
    spec: BatchSpec,
    feature: np.ndarray | None = None,
    rng: np.random.Generator | None = None,
) -> dict[str, np.ndarray]:
    """One row of a batch; with `rng`, a random window."""
    loaded, canvas = source.load(number), spec.canvas
    masked = spec.masks and "mask" in loaded and not spec.coefficients
    example: dict[str, Any] = {"valid": np.bool_(True)}
    if spec.coefficients == "file":
        example |= read_planes(loaded["image"], loaded["name"], canvas)
    elif feature is not None:
        example["feature"] = feature
    else:
        share = math.sqrt(spec.crop[0] if rng else 1.0)
        least = math.ceil(canvas[0] / share), math.ceil(canvas[1] / share)
        image = source.read(loaded["image"], loaded["name"], least)
        if rng is None:
            view = (geometry.cover if spec.whole else geometry.fit)(image, canvas)
        elif masked:
            raise IcmError(f"{source.name} has masks, which data.crop does not crop; leave it out")
        else:
            view = geometry.random_view(image, canvas, spec.crop, rng)
        if spec.coefficients:
            example |= read_planes(write_jpeg(view, int(spec.coefficients)), loaded["name"], canvas)
        else:
            example["image"] = view
    if "label" in loaded:
        known = loaded["label"] is not None
        example |= {"label": np.int32(loaded["label"] if known else 0), "valid": np.bool_(known)}
    if masked:
        classes = len(source.mask_classes)
        mask = images.read_mask(loaded["mask"], loaded["name"], classes, source.mask_ids)
        if feature is None:
            geometry.check_aspect(image, mask, loaded["name"])
        if not spec.whole:
            mask = geometry.fit(mask, canvas, Image.Resampling.NEAREST)
        example["mask"] = mask
    return example


def write_jpeg(image: np.ndarray, quality: int) -> bytes:
    """uint8 [H, W, 3] as a JPEG file with 4:2:0 sampling."""
    image = np.ascontiguousarray(image)
    return simplejpeg.encode_jpeg(image, quality=quality, colorsubsampling="420")


def read_planes(data: bytes, name: str, canvas: tuple[int, int]) -> dict[str, np.ndarray]:
    """{"luma", "chroma", "steps"} of one JPEG file, as in `batches`; `name` is for errors.

    Raises: IcmError if it is smaller than the canvas, no 4:2:0 and no grey image, damaged, or
      stored in another orientation than it is shown.
    """
    read = jpeg.read_coefficients(data, name)
    if images.orientation(data) != 1:
        raise IcmError(
            f"{name} is shown turned (EXIF orientation {images.orientation(data)}), which its own "
            f"coefficients are not; {_CODED}"
        )
    grey = len(read.planes) == 1
    if not grey and (read.sampling != ((2, 2), (1, 1), (1, 1)) or read.adobe == 0):
        raise IcmError(f"{name} is no YCbCr image with 4:2:0 sampling; {_CODED}")
    if min(read.height - canvas[0], read.width - canvas[1]) < 0:
        raise IcmError(
            f"{name} has {read.height} × {read.width} pixels, fewer than the canvas "
            f"{canvas[0]} × {canvas[1]}; {_CODED}"
        )
    top, left = (read.height - canvas[0]) // 32 * 16, (read.width - canvas[1]) // 32 * 16
    read = read.cropped(top, left, *canvas)
    chroma = read.planes[1:]
    if grey:
        chroma = (np.zeros((canvas[0] // 16, canvas[1] // 16, 64), np.int16),) * 2
    return {
        "luma": read.planes[0],
        "chroma": np.concatenate(chroma, axis=-1),
        "steps": np.concatenate(read.tables * 3 if grey else read.tables),
    }


def largest_first(objects: Objects, rows: int) -> np.ndarray:
    """Numbers of the objects of an image that a batch with so many `rows` has, in its order."""
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    return np.argsort(-sides.prod(axis=1), kind="stable")[:rows]


def _boxed_example(
    source: Source, number: int, spec: BatchSpec, feature: np.ndarray | None = None
) -> dict:
    """One row of a batch with boxes."""
    loaded, canvas, rows = source.load(number), spec.canvas, spec.boxes
    if "objects" not in loaded:
        raise IcmError(f"{source.name} has no boxes, which data.boxes asks for; set it to 0")
    image = source.read(loaded["image"], loaded["name"], (max(canvas), max(canvas)))
    image, extent = geometry.letterbox(image, canvas, spec.letterbox)
    objects = loaded["objects"]
    order = largest_first(objects, rows)
    shift, scale = np.array(extent, np.float32).reshape(2, 2) / np.array(canvas, np.float32)
    ignored = objects.ignored[order]

    def padded(values):
        return np.pad(values, [(0, rows - len(order))] + [(0, 0)] * (values.ndim - 1))

    example = {
        "valid": np.bool_(True),
        **({"image": image} if feature is None else {"feature": feature}),
        "extent": np.array(extent, np.int32),
        "boxes": padded(objects.boxes[order] * np.tile(scale, 2) + np.tile(shift, 2)),
        "box_labels": padded(objects.labels[order]),
        "box_valid": padded(~ignored),
        "box_ignored": padded(ignored),
    }
    if not spec.outlines:
        return example
    if "outlines" not in loaded:
        raise IcmError(f"{source.name} has no outlines of objects, which masks are made of")
    own = loaded["outlines"]()
    masks = canvas_masks([own[i] for i in order], canvas, extent, spec.outlines)
    return example | {name: padded(values) for name, values in masks.items()}
