"""Scores a finished run on validation splits, with bytes that were really written.

Each point of `run.evaluate` gives a record, by the scorer of its kind in `SCORERS`:

    stream       every image -> bytes of the frozen codec -> decoded feature or image -> prediction
    pixels       the images as they are -> prediction
    noise        every image plus Gaussian noise of so many levels, then as stream or, where there
                 is no codec, as pixels; its curve is "noise"
    jpeg, ...    every image -> file of that format and quality -> decoded pixels -> prediction, or
                 of runs that need no labels, against the original; formats that are not installed
                 are left out and named
    icm          the same, with files of the model in the package, or of the point's
    picture      every image -> bytes of the frozen codec -> decoded image against the original
    detect       the detector of the run `run.detector` on what the codec gives: on the decoded
                 feature, read from the first layer of the file alone, or on the decoded image
                 (of the detector's data, if the point names no other); with an effort, of files
                 that are refined for that detector (`icm_jax.measure.aimed`)
    speed        batches of so many images from files to predictions: `throughput.measure`

Pictures are compared at their full size or, where the run has a `side`, as the middle of that size,
which networks see. Networks see the middle of an image on its canvas, but segmentation, which sees
and codes it whole, as large as to just cover the canvas; its label maps are compared at the size
that the data set has them (`icm_jax.measure.segments`).

A record is a flat dict, kept in records.json of the run's folder: the fields of `run.labels` (the
curve of "picture", "detect" and "speed" is "image", "detect" and "speed"), run, seed, asked (the
point), fingerprint (of the codec file, where there is one; of "icm" its own), kind ("stream" for
all that went through a codec's bytes, or as the point's), quality, images, bpp (measured), top1 /
top5, miou and pixel_accuracy, by the task's protocol map50 / map, voc2007 or voc2010
(`icm_jax.measure.precision`), of masks of objects also mask_map50 / mask_map
(`icm_jax.measure.instances`), or psnr, ssim_db and ms_ssim_db (means over images, of a similarity s
as -10 log10(1 - s)); of these and of bpp also "draws" (see `icm_jax.measure.draws`); where classes
are averaged, "by_class": {name: IoU or precision}, of objects "by_size": {"small", "medium",
"large": map}, of masks of them "mask_by_class" and "mask_by_size"; of pixels with boxes bpp_source,
that of the files they are read from; of files also bpp_without_tables (of JPEG less its tables, of
"icm" less its header); of streams also bpp_header, bpp_<segment>, unless they are refined
bpp_estimated and worst_gap_bytes (the most by which an image's bytes exceed its estimate + 1 %),
encode_ms and decode_ms (median of an image, networks included); of "speed" what
`throughput.measure` gives.
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import tqdm

from icm_jax.codecs.bitstream import FrozenCodec
from icm_jax.data import geometry, pipeline
from icm_jax.engine import checkpoint, sharding
from icm_jax.engine.codes import open_source
from icm_jax.engine.frozen import check_same, load_codec, with_file
from icm_jax.engine.run import RECORDS, Point, Run, load_run, read_records
from icm_jax.engine.train import complete
from icm_jax.errors import IcmError
from icm_jax.files import cores, sealed, write_json
from icm_jax.measure import (
    Score,
    aimed,
    average_precision,
    classical,
    coded,
    draws,
    segments,
    throughput,
)
from icm_jax.measure.distortion import distortion
from icm_jax.measure.instances import own_truth
from icm_jax.measure.noise import with_noise
from icm_jax.measure.points import check_quality, left, no_codec, tally, written_here
from icm_jax.tasks import build_task, views
from icm_jax.tasks.task import Task

SCORED_AT_ONCE = 128
"""Rows of a batch at most; a run's own may be as large as many devices can take together."""


class Asked(NamedTuple):
    """What a scorer is given: a point, and the run that it belongs to.

    Attributes:
      base: the work directory. data: fields of the data set that is scored, the point's or the
        run's; source: its validation split.
      config: of the task, with the numbers of classes. variables: of the trained task.
      frozen: the run's codec file, or None.
    """

    point: Point
    run: Run
    base: str | os.PathLike
    data: Mapping[str, Any]
    source: Any
    config: ml_collections.ConfigDict
    task: Task
    variables: Mapping[str, Any]
    frozen: FrozenCodec | None

    def __str__(self) -> str:
        return f"{self.run.name} {self.point}"

    def codec(self) -> FrozenCodec:
        """The codec file. Raises: IcmError if the run has none."""
        if self.frozen is None:
            raise no_codec(self.run, self.point)
        return self.frozen


def evaluate(run: Run, base: str | os.PathLike) -> list[dict]:
    """Records of a finished run; computed once, then read from its folder. Points that
    `run.evaluate` has gained since are added to them.

    Each process scores its share of the batches, of so many rows however many processes there are,
    so records do not depend on that; the first one writes.

    Raises: IcmError as `check_points` does, or for a codec file that is not this run's.
    """
    check_points(run)
    folder = pathlib.Path(base) / run.name
    kept, labels = folder / RECORDS, dataclasses.asdict(run.labels) if run.labels else {}
    looks = {name: value for name, value in labels.items() if name != "curve"}
    try:
        read = read_records(folder) if sharding.as_first(kept.is_file()) else []
        records = [record | looks for record in read]
        points = [point for point in left(run, records) if written_here(point)]
    except (IcmError, KeyError, TypeError) as error:
        if jax.process_index() == 0:
            print(f"{run.name} is scored anew: {kept} is damaged ({error})", file=sys.stderr)
        read, records = [], []
        points = [point for point in run.evaluate if written_here(point)]
    if not points:
        if records != read and jax.process_index() == 0:
            write_json(kept, [sealed(record) for record in records])
        return records
    source = open_source(run.data, "validation")
    config = complete(run, source)
    task = build_task(config)
    variables = checkpoint.load_variables(folder)
    frozen = load_codec(run, base)
    if frozen is not None:
        check_same(variables, frozen, run)
        variables = with_file(variables, frozen)
    for point in points:
        data, scored = run.data, source
        if point.data is not None:
            data, scored = point.data, open_source(point.data, "validation")
        record = labels | {"run": run.name, "seed": run.seed, "asked": dataclasses.asdict(point)}
        record |= {"kind": point.kind, "quality": point.quality}
        record |= {"fingerprint": frozen.fingerprint.hex()} if frozen is not None else {}
        asked = Asked(point, run, base, data, scored, config, task, variables, frozen)
        records.append(record | SCORERS[point.kind](asked))
        if jax.process_index() == 0:  # at once: a point may take an hour
            write_json(kept, [sealed(record) for record in records])
    return records


def check_points(run: Run) -> None:
    """Raises IcmError if a point of the run has a kind that no scorer knows, or a quality that its
    format does not have."""
    for point in run.evaluate:
        if point.kind not in SCORERS:
            raise IcmError(
                f"{run.name} is to be scored by {str(point)!r}, which is none of "
                f"{', '.join(SCORERS)}"
            )
        check_quality(run, point)


def predictions(asked: Asked, through: Callable[[Asked, dict, int], tuple[dict, list]]) -> dict:
    """Rate and accuracy of what the task predicts over the validation split.

    Args:
      through: (asked, batch, count of valid rows) -> (the task's inputs, sizes of each image).
    """
    protocol = asked.config.get("protocol", "coco")
    empty = tally(asked.run, asked.point, asked.source, protocol)
    predict = jax.jit(asked.task.predict)
    on_device = jax.device_put(asked.variables, jax.local_devices()[0])

    def score(batch: dict, part: Score) -> list[dict]:
        inputs, sizes = through(asked, batch, int(batch["valid"].sum()))
        if _whole(asked):
            shapes = batch["image"].shape[1:3], batch["mask"].shape[1:]
            found = segments.segmented(asked.task.predict, on_device, inputs, *shapes)
            part.update({"segments": found}, batch)
        else:
            needs = asked.run.needs
            own = own_truth(asked.source, batch, "outlines" in needs) if "objects" in needs else {}
            part.update(jax.device_get(predict(on_device, inputs)), batch | own)
        return sizes

    whole = _whole(asked)
    rows = 1 if whole else min(asked.run.batch_size, SCORED_AT_ONCE)
    spec = pipeline.batch_spec(asked.data, rows, masks=whole, whole=whole, outlines=0)
    return over_batches(str(asked), asked.source, spec, empty, score)


def over_batches(
    title: str,
    source: Any,
    spec: pipeline.BatchSpec,
    tally: Callable[[], Score],
    score: Callable[[dict, Score], list[dict]],
) -> dict:
    """Scores and sizes over a split, each process at its share of the batches.

    Args:
      tally: () -> an empty score.
      score: (batch, tally) -> sizes of its images; what is predicted of them goes into the tally.
    """
    numbers = sharding.share(-(-source.length // spec.batch_size))
    which = slice(numbers.start, numbers.stop, numbers.step)
    batches = pipeline.evaluation_batches(source, spec, which=which)
    hidden = jax.process_index() > 0
    bar = tqdm.tqdm(batches, title, len(numbers), unit="batch", disable=hidden)
    mine = {}
    for number, batch in zip(numbers, bar, strict=True):
        part = tally()
        mine[number] = score(batch, part), part
    whole, sizes = tally(), []
    for found, part in sharding.gathered(mine):  # in the order of the split, as COCO's ties ask
        sizes += found
        whole.add(part)
    counts = draws.resamples(whole.examples)
    drawn = whole.resampled(counts) | coded.drawn_rates(sizes, counts)
    found = {**whole.result(), "images": source.length, **coded.of_sizes(sizes)}
    found |= {name: part for name, part in whole.parts().items() if part}
    return found | {"draws": draws.packed(drawn)}


def unchanged(asked: Asked, batch: dict, count: int) -> tuple[dict, list]:
    """The images as they are, or a JPEG's coefficients, whose views the task cuts; of letterboxed
    images also the bytes of the files that they are read from."""
    sizes = [
        {"pixels": int(extent[2:].prod()), "bpp_source": len(asked.source.load(number)["image"])}
        for extent, number in zip(batch.get("extent", ()), batch["number"][:count], strict=False)
    ]
    if "luma" in batch:
        return {key: batch[key] for key in ("luma", "chroma", "steps")}, sizes
    return {"image": _middle(asked, batch)}, sizes


def streamed(asked: Asked, batch: dict, count: int) -> tuple[dict, list]:
    """What the frozen codec's decoder gives of the bytes of each valid image."""
    images, output = _middle(asked, batch), asked.task.reads
    codec, same = asked.codec(), not _whole(asked)
    given, sizes = coded.through_stream(codec, images[:count], output, same=same)
    given = given.clip(0, 255) if output == "image" else given
    return {output: _padded(given, len(images))}, coded.of_pictures(sizes, batch)


def noisy(asked: Asked) -> dict:
    """What is predicted from images that are disturbed before they are coded."""
    through, deviation = unchanged if asked.frozen is None else streamed, asked.point.quality

    def disturbed(asked: Asked, batch: dict, count: int) -> tuple[dict, list]:
        image = with_noise(batch["image"], batch["number"], deviation or 0.0)
        return through(asked, batch | {"image": image}, count)

    return {"curve": "noise", **predictions(asked, disturbed)}


def filed(asked: Asked, batch: dict, count: int) -> tuple[dict, list]:
    """Images after JPEG or WebP.

    Of letterboxed images, whose pictures have the batch's "extent" (top, left, height, width), the
    picture alone is coded.
    """
    images = _middle(asked, batch)
    given, extents = images.copy(), batch.get("extent")

    def code(row: int) -> dict:
        extent = (0, 0, *images.shape[1:3]) if extents is None else extents[row]
        at = (row, *geometry.inside(extent))
        image, aim = np.ascontiguousarray(images[at]), None
        if asked.point.kind == coded.AIMED:
            seen = asked.config, asked.variables, image, images.shape[1:3], extent
            aim = aimed.of_task(*seen, asked.point.quality or 0.0)
        given[at], size = coded.through_file(image, asked.point, aim)
        return size

    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        return {"image": given}, list(pool.map(code, range(count)))


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])


def _middle(asked: Asked, batch: dict) -> np.ndarray:
    """The images of a batch as the task sees them."""
    if _whole(asked):
        return batch["image"]
    return np.asarray(views.centre(batch["image"], asked.config.size))


def _whole(asked: Asked) -> bool:
    """Whether the task segments: images are seen whole then, one by one."""
    return "mask" in asked.run.needs


def speed(asked: Asked) -> dict:
    """What `throughput.measure` says of one batch of validation images, on the first process."""
    run, task = asked.run, asked.task
    count = int(asked.point.quality or 1)
    batch = next(pipeline.in_order(asked.source, pipeline.image_spec(asked.data, count)))
    images = _middle(asked, batch)
    if asked.frozen is not None:
        path = throughput.stream_path(
            task.predict, asked.variables, images, asked.frozen, task.reads
        )
    else:
        form = asked.data.get("coefficients", "")
        quality = int(form) if form.isdecimal() else asked.data.get("quality", 95)
        path = throughput.jpeg_path(task.predict, asked.variables, images, quality, bool(form))
    mine = {number: throughput.measure({run.name: path})[run.name] for number in sharding.share(1)}
    (measured,) = sharding.gathered(mine)
    return {**measured, "curve": "speed", "images": count}


def detections(asked: Asked) -> dict:
    """Rate and average precision of the detector `run.detector` behind a codec.

    Images are letterboxed and coded with their bars; bits are divided by the picture's own pixels.
    """
    run, frozen = asked.run, asked.codec()
    folder = pathlib.Path(asked.base) / run.detector
    trained = load_run(folder)
    data, source = trained.data, open_source(trained.data, "validation")
    config = complete(trained, source)
    if asked.point.data is not None:
        data, source = asked.data, asked.source
    predict = jax.jit(build_task(config).predict)
    variables = jax.device_put(checkpoint.load_variables(folder), jax.local_devices()[0])
    output = "feature" if "feature" in frozen.codec.outputs else "image"
    layers = 1 if output == "feature" else None

    def score(batch: dict, tally: Score) -> list[dict]:
        count = int(batch["valid"].sum())
        images, quality = batch["image"][:count], asked.point.quality
        how: dict[str, Any] = dict(effort=asked.point.effort)
        if asked.point.effort:
            how["aims"] = aimed.of_streams(config, variables, frozen.codec, images, quality)
        given, sizes = coded.through_stream(frozen, images, output, quality, layers, **how)
        given = given if output == "feature" else given.clip(0, 255)
        inputs = {output: _padded(given, len(batch["image"]))}
        truth = batch | own_truth(source, batch, masks=False)
        tally.update(jax.device_get(predict(variables, inputs)), truth)
        return coded.of_pictures(sizes, batch)

    spec = pipeline.batch_spec(data, min(run.batch_size, SCORED_AT_ONCE))
    tally = functools.partial(average_precision, config.get("protocol", "coco"), source.classes)
    found = over_batches(str(asked), source, spec, tally, score)
    return {"kind": "stream", "curve": "detect", **found}


def pictures(asked: Asked) -> dict:
    """Rate and distortion of the frozen codec; see `icm_jax.measure.distortion`."""
    codec = asked.codec()

    def through(image: np.ndarray) -> tuple[np.ndarray, dict]:
        quality, same = asked.point.quality, bool(asked.run.side)
        given, (size,) = coded.through_stream(codec, image[None], "image", quality, same=same)
        return np.rint(given[0].clip(0, 255)).astype(np.uint8), size

    # Coding times are measured: one stream at a time.
    return {"kind": "stream", **_distortion(asked, through, workers=1)}


def files(asked: Asked) -> dict:
    """Rate of a format or of a learned rival, and what is predicted from its files or, where the
    run needs no labels, their distortion."""
    about, through = coded.written_by(asked.point), lambda x: coded.through_file(x, asked.point)
    needs = asked.run.needs
    return about | (predictions(asked, filed) if needs else _distortion(asked, through, cores()))


def _distortion(asked: Asked, through: Callable, workers: int) -> dict:
    seen = dict(side=asked.run.side, canvas=asked.data.get("canvas", 0))
    found = distortion(asked.source, through, title=str(asked), workers=workers, **seen)
    return {"curve": "image", **found}


SCORERS: dict[str, Callable[[Asked], dict]] = {
    "stream": lambda asked: predictions(asked, streamed),
    "pixels": lambda asked: predictions(asked, unchanged),
    "noise": noisy,
    "picture": pictures,
    "detect": detections,
    "speed": speed,
    **dict.fromkeys((*classical.FORMATS, *coded.MODELS), files),
}
"""Kind of a point -> what scores it: its fields of the record, which go before the run's labels."""
