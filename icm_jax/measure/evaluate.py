"""Scores a finished run on the validation split, with bytes that were really written.

Each point of `run.evaluate` gives a record. Kinds of points:

    stream       every image -> bytes of the frozen codec -> decoded feature or image -> prediction
    pixels       the images as they are -> prediction
    jpeg, ...    every image -> file of that format and quality -> decoded pixels -> prediction, or
                 of runs that train a codec of images, against the original; formats that are not
                 installed are left out and named
    picture      every image -> bytes of the frozen codec -> decoded image against the original
    detect       the detector of the run `run.detector` on what the codec gives: on the decoded
                 feature, read from the first layer of the file alone, or on the decoded image
    speed        batches of so many images from files to predictions, timed; see
                 `throughput.measure`

Pictures are compared at their full size or, where the run has a `side`, as the middle of that size,
which networks see.

A record is a flat dict, kept in records.json of the run's folder: the fields of `run.labels` (the
curve of "picture", "detect" and "speed" is "image", "detect" and "speed"), run, seed, asked (the
point), fingerprint (of the codec file, where there is one), kind
("stream" for all that went through a codec's bytes, or as the point's), quality,
images, bpp (measured), top1 / top5, miou, map50 / map, or psnr, ssim_db and ms_ssim_db (means over
images, of a similarity s as -10 log10(1 - s)); of JPEG and WebP also bpp_without_tables; of streams
also bpp_estimated, bpp_header, bpp_<segment>, worst_gap_bytes (the most by which an image's bytes
exceed its estimate + 1 %), encode_ms and decode_ms (median of an image, networks included); of
"speed" what `throughput.measure` gives.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import tqdm

from icm_jax import ops
from icm_jax.codecs import bitstream, walk
from icm_jax.coding import container
from icm_jax.data import geometry, open_source, pipeline
from icm_jax.data.images import read_rgb
from icm_jax.engine import checkpoint, sharding
from icm_jax.engine.frozen import check_same, load_codec
from icm_jax.engine.run import Point, Run, load_run
from icm_jax.engine.train import complete
from icm_jax.errors import IcmError
from icm_jax.measure import (
    Accuracy,
    AveragePrecision,
    MeanIoU,
    Score,
    classical,
    metrics,
    throughput,
)
from icm_jax.measure.metrics import bpp
from icm_jax.tasks import build_task, views


def evaluate(run: Run, base: str | os.PathLike) -> list[dict]:
    """Records of a finished run; computed once, then read from its folder. Points that
    `run.evaluate` has gained since are added to them.

    Every process scores the whole split, the first one writes: reading a checkpoint is collective,
    the rest needs no word between processes.
    """
    folder = pathlib.Path(base) / run.name
    kept = folder / "records.json"
    records = json.loads(kept.read_text()) if sharding.as_first(kept.is_file()) else []
    there = [Point(**record["asked"]) for record in records]
    asked = [point for point in run.evaluate if point not in there and written_here(run, point)]
    if not asked:
        return records
    source = open_source(run.data, "validation")
    config = complete(run.task, source)
    task = build_task(config)
    variables = checkpoint.load_variables(folder)
    frozen = load_codec(run, base)
    if frozen is not None:
        check_same(variables, frozen, run)
    of_images = task.codec is not None and "image" in task.codec.outputs and not run.needs
    for point in asked:
        labels = dataclasses.asdict(run.labels) if run.labels else {}
        record = labels | {"run": run.name, "seed": run.seed}
        record |= {"asked": dataclasses.asdict(point), "quality": point.quality}
        record |= {"kind": "stream" if point.kind in STREAMED else point.kind}
        record |= {"fingerprint": frozen.fingerprint.hex()} if frozen is not None else {}
        if point.kind == "detect":
            record |= {"curve": "detect"} | score_detection(frozen, run, base)
        elif point.kind == "speed":
            record |= {"curve": "speed"}
            record |= speed(task, variables, frozen, point, source, run, config)
        elif point.kind == "picture" or of_images:
            record |= {"curve": "image"} | score_images(frozen, point, source, run)
        else:
            record |= score(task, variables, frozen, point, source, run, config)
        records.append(record)
    if jax.process_index() == 0:
        checkpoint.write_json(kept, records)
    return records


STREAMED = ("stream", "picture", "detect")
"""Points that need a codec's bytes."""


def written_here(run: Run, point: Point) -> bool:
    """Whether a point can be scored on this machine; names it if its format is not installed."""
    there = point.kind not in classical.FORMATS or classical.available(point.kind)
    if not there:
        print(f"{run.name}: {point} is left out, nothing here writes it", file=sys.stderr)
    return there


def score(task, variables, frozen, point: Point, source, run, config) -> dict:
    """Rate and accuracy of one point over the validation split."""
    predict = jax.jit(task.predict)
    tallies: dict[str, Callable[[], Score]] = {"mask": lambda: MeanIoU(config.mask_classes)}
    tallies["objects"] = lambda: AveragePrecision(config.classes)
    tally = next((make() for key, make in tallies.items() if key in run.needs), None) or Accuracy()
    side, output = config.size, output_for(config)
    on_device = jax.device_put(variables, jax.local_devices()[0])
    sizes, parts = [], []
    spec = pipeline.batch_spec(run.data, run.batch_size, masks="mask" in run.needs)
    batches = pipeline.evaluation_batches(source, spec)
    total = -(-source.length // run.batch_size)
    for batch in tqdm.tqdm(batches, total=total, desc=f"{run.name} {point}", unit="batch"):
        count = int(batch["valid"].sum())
        if "luma" in batch:  # views are cut in the task
            inputs = {key: batch[key] for key in ("luma", "chroma", "steps")}
            tally.update(jax.device_get(predict(on_device, inputs)), batch)
            continue
        images = np.asarray(views.centre(batch["image"], side))
        if "mask" in batch:
            batch["mask"] = np.asarray(views.centre(batch["mask"], side))
        if point.kind == "stream":
            given, own = through_stream(frozen, images[:count], output)
            given = given.clip(0, 255) if output == "image" else given
            parts += own
            inputs = {output: _padded(given, len(images))}
        elif point.kind == "pixels":
            inputs = {"image": images}
        else:
            images, own = through_files(images, point, batch.get("extent"), count)
            sizes += own
            inputs = {"image": images}
        tally.update(jax.device_get(predict(on_device, inputs)), batch)
    record = {**tally.result(), "images": source.length}
    if parts:
        record |= _of_parts(parts)
    elif sizes:
        record |= _of_files(sizes)
    return record


def output_for(config) -> str:
    """Which output of its codec a recognition task reads."""
    return "image" if config.get("frontend") == "decoded" else "feature"


def speed(task, variables, frozen, point: Point, source, run, config) -> dict:
    """What `throughput.measure` says of one batch of validation images."""
    count = int(point.quality or 1)
    batch = next(pipeline.in_order(source, pipeline.image_spec(run.data, count)))
    images = np.asarray(views.centre(batch["image"], config.size))
    if frozen is not None:
        path = throughput.stream_path(task.predict, variables, images, frozen, output_for(config))
    else:
        own = run.data.get("coefficients", "")
        quality = int(own) if own.isdecimal() else run.data.get("quality", 95)
        path = throughput.jpeg_path(task.predict, variables, images, quality, bool(own))
    return {**throughput.measure({"own": path})["own"], "images": count}


def through_files(images: np.ndarray, point: Point, extents, count: int):
    """(`images` after JPEG or WebP, (bpp, bpp without tables) of each of the first `count`).

    Of letterboxed images, whose pictures have the `extents` (height, width), the picture alone is
    coded.
    """
    given = images.copy()

    def code(row: int) -> tuple[float, float]:
        height, width = images.shape[1:3] if extents is None else extents[row]
        picture = np.ascontiguousarray(images[row, :height, :width])
        file = classical.encode(picture, point.kind, point.quality)
        given[row, :height, :width] = classical.decode(file)
        return _file_sizes(file, point.kind, height, width)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return given, list(pool.map(code, range(count)))


def _file_sizes(file: bytes, method: str, height: int, width: int) -> tuple[float, float]:
    bare = len(file) - (classical.table_bytes(file) if method == "jpeg" else 0)
    return bpp(len(file), height, width), bpp(bare, height, width)


def _of_files(sizes: list[tuple[float, float]]) -> dict:
    whole, bare = np.mean(sizes, axis=0)
    return {"bpp": float(whole), "bpp_without_tables": float(bare)}


def score_detection(frozen, run, base) -> dict:
    """Rate and average precision of the detector `run.detector` behind a codec.

    Images are letterboxed and coded with their bars; bits are divided by the picture's own pixels.
    """
    folder = pathlib.Path(base) / run.detector
    own = load_run(folder)
    source = open_source(own.data, "validation")
    config = complete(own.task, source)
    predict = jax.jit(build_task(config).predict)
    variables = jax.device_put(checkpoint.load_variables(folder), jax.local_devices()[0])
    output = "feature" if "feature" in frozen.codec.outputs else "image"
    tally, parts = AveragePrecision(config.classes), []
    spec = pipeline.batch_spec(own.data, run.batch_size)
    total = -(-source.length // run.batch_size)
    batches = pipeline.evaluation_batches(source, spec)
    for batch in tqdm.tqdm(batches, total=total, desc=f"{run.name} detect", unit="batch"):
        count = int(batch["valid"].sum())
        layers = 1 if output == "feature" else None
        given, sizes = through_stream(frozen, batch["image"][:count], output, layers=layers)
        for part, extent in zip(sizes, batch["extent"], strict=False):
            part["pixels"] = int(extent.prod())
        parts += sizes
        given = given if output == "feature" else given.clip(0, 255)
        inputs = {output: _padded(given, len(batch["image"]))}
        tally.update(jax.device_get(predict(variables, inputs)), batch)
    return {**tally.result(), "images": source.length, **_of_parts(parts)}


def _of_parts(parts: list[dict]) -> dict:
    """Means of sizes in bits per pixel, medians of times, over images."""
    pixels = np.array([part["pixels"] for part in parts], np.float64)
    record = {}
    for name in parts[0]:
        values = np.array([part[name] for part in parts])
        if name.startswith("bpp"):
            record[name] = float((8 * values / pixels).mean())
        elif name.endswith("_ms"):
            record[name] = float(np.median(values))
    gaps = [part["bpp"] - 1.01 * part["bpp_estimated"] for part in parts]
    return record | {"worst_gap_bytes": max(gaps)}


def score_images(frozen, point: Point, source, run) -> dict:
    """Rate and distortion of one point over the validation split.

    Images have their full size; with `run.side`, they are fitted to the canvas and their middle is
    cut out, as for a network, so one compiled program serves all. SSIM and MS-SSIM are left out
    where an image is too small for them.
    """
    streamed = point.kind == "picture"
    side, canvas = run.side, geometry.sides(run.data.canvas)

    def code(number: int) -> tuple:
        """(sizes, {metric: value or None}) of an image."""
        loaded = source.load(number)
        image = read_rgb(loaded["image"], loaded["name"])
        if side:
            image = np.asarray(views.centre(geometry.fit(image, canvas)[None], side))[0]
        if streamed:
            given, (size,) = through_stream(frozen, image[None], "image", point.quality)
            given = np.rint(given[0].clip(0, 255)).astype(np.uint8)
        else:
            file = classical.encode(image, point.kind, point.quality)
            given, size = classical.decode(file), _file_sizes(file, point.kind, *image.shape[:2])
        scores = {"psnr": metrics.psnr(image, given)}
        for name, similarity, least in (
            ("ssim_db", metrics.ssim, ops.SSIM_WINDOW),
            ("ms_ssim_db", metrics.ms_ssim, metrics.SMALLEST),
        ):
            if min(image.shape[:2]) >= least:
                scores[name] = metrics.decibels(similarity(image, given))
        return size, scores

    # Coding times are measured: one stream at a time.
    workers = 1 if streamed else os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = pool.map(code, range(source.length))
        told = tqdm.tqdm(results, f"{run.name} {point}", source.length, unit="image")
        sizes, scores = map(list, zip(*told, strict=True))
    record: dict = {"images": source.length}
    for key in ("psnr", "ssim_db", "ms_ssim_db"):
        values = [own[key] for own in scores if key in own]
        record |= {key: float(np.mean(values))} if values else {}
    return record | (_of_parts(sizes) if streamed else _of_files(sizes))


def through_stream(
    frozen,
    images: np.ndarray,
    output: str = "feature",
    quality: float | None = None,
    layers: int | None = None,
) -> tuple[np.ndarray, list[dict]]:
    """(what the decoder gives, sizes in bytes and times of each image), by way of real bytes.

    With `layers`, files are cut off after so many before they are decoded and measured.

    Raises: IcmError if decoding does not give back the encoder's latents.
    """
    began = time.perf_counter()
    streams = bitstream.encode(frozen, images, quality=quality)
    encoded = time.perf_counter()
    if layers:
        streams = [container.prefix(data, layers) for data in streams]
    features = bitstream.decode(frozen, streams, output, layers=layers)
    decoded = time.perf_counter()
    estimated = bitstream.estimate(frozen, images, quality=quality)
    segments = [s for s in frozen.codec.segments if layers is None or s.layer < layers]
    sizes = []
    for row, data in enumerate(streams):
        found = container.unpack(data, layers).layers
        strings = [string for layer in found for string in layer.strings]
        bits = sum(float(estimated[segment.name][row]) for segment in segments)
        part = {
            "pixels": images[row, ..., 0].size,
            "bpp": len(data),
            "bpp_estimated": bits / 8,
            "bpp_header": container.overhead(data, layers),
            "encode_ms": 1e3 * (encoded - began) / len(streams),
            "decode_ms": 1e3 * (decoded - encoded) / len(streams),
        }
        left = iter(strings)
        for segment in segments:
            count = walk.strings_of(segment, (1, *segment.shape(*images.shape[1:3])))
            part[f"bpp_{segment.name}"] = sum(len(next(left)) for _ in range(count))
        sizes.append(part)
    if not np.isfinite(features).all():
        raise IcmError("decoded features are not finite; the codec's training has failed")
    return features, sizes


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])
