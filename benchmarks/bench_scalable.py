"""Detection from the base layer of a scalable file against detection on a decoded picture.

    python benchmarks/bench_scalable.py --codec FILE.icmc --single FILE.icmc --images FOLDER
    python benchmarks/bench_scalable.py [--side 416] [--classes 80] [--detector 1.0] [--rounds 5]

Three ways from bytes to boxes take turns, image by image and round by round:

    base       base layer -> f_hat -> tail of the detector
    picture    both layers -> x_hat -> whole detector
    single     file of a single-layer hyperprior -> x_hat -> whole detector

With --codec they are scalable codecs of configs/scalable.py as trained, each with its detector, and
photographs, letterboxed as Darknet does it; without, YOLOv3 and codecs with random weights, which
changes the number of bits but no shape. Images are all of one size, so programs are compiled for
it, as evaluation has them.

Prints medians: bytes; milliseconds, in all, to the latents (range decoding and priors), from there
to f_hat or x_hat, and to the boxes; milliseconds of both cores; and, counted on the programs
themselves, multiply-accumulates of their convolutions and matrix products.
"""

import argparse
import functools
import itertools
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import icm_jax
from icm_jax.codecs import bitstream, image_codec, scalable_codec, walk
from icm_jax.codecs.scalable import DETECTOR, detector_of
from icm_jax.coding import archive, container
from icm_jax.data import geometry
from icm_jax.data.images import read_rgb
from icm_jax.data.sources import images_in
from icm_jax.engine.cost import multiply_accumulates
from icm_jax.nets.convolution import compiler_options
from icm_jax.nets.detector import Detector, Part
from icm_jax.nets.yolo import yolov3
from icm_jax.tasks.detection import anchors, detections, scaled

LEAST = 0.4
"""Least score of a box, as `icm detect` has it."""
FACTS = {"anchor_scale": 1.0, "overlap": 0.45, "limit": 100}


class Way(NamedTuple):
    """From files, one for each image, to boxes.

    layers: that are read of a file, or None for all. detector, facts, weights: of the codec that
    has one.
    """

    name: str
    frozen: bitstream.FrozenCodec
    layers: int | None
    files: list[bytes]
    detector: Detector
    facts: dict[str, Any]
    weights: Any

    @property
    def begin(self) -> int:
        """The detector's first layer that runs."""
        return 0 if self.layers is None else self.detector.split


class Times(NamedTuple):
    """Milliseconds: to the latents, to the output, to the boxes; and of all cores."""

    latents: float
    output: float
    boxes: float
    cores: float


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--codec", nargs="+", default=[], help="scalable codecs, .icmc")
    parser.add_argument("--single", nargs="+", default=[], help="codecs of one layer, .icmc")
    parser.add_argument("--images", help="folder of photographs, with --codec")
    parser.add_argument("--count", type=int, default=8, help="of photographs")
    parser.add_argument("--side", type=int, default=416, help="of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    random = parser.add_argument_group("without --codec")
    random.add_argument("--classes", type=int, default=80)
    random.add_argument("--detector", type=float, default=1.0, help="width factor of YOLOv3")
    random.add_argument("--width", type=int, default=128, help="N")
    random.add_argument("--base", type=int, default=128, help="C_b")
    random.add_argument("--enhancement", type=int, default=64, help="C_e")
    given = parser.parse_args()
    if bool(given.codec) != bool(given.images) or (given.single and not given.codec):
        parser.error("--codec and --images go together, and --single with them")
    ways = trained(given) if given.codec else drawn(given)
    count, device = len(ways[0].files), jax.devices()[0].device_kind
    print(f"{given.side} × {given.side} pixels, {count} images, {given.rounds} rounds, {device}")
    for way in ways:
        timed(way, 0)  # compiles
    times: list[list[Times]] = [[] for _ in ways]
    for row in list(range(count)) * given.rounds:
        for way, own in zip(ways, times, strict=True):
            own.append(timed(way, row))
    width = max(len(way.name) for way in ways)
    base = None
    for way, own in zip(ways, times, strict=True):
        row = measured(way, own)
        base = row if way.layers else base
        print(f"  {way.name:{width}}  {printed(row, base)}")


def trained(given) -> list[Way]:
    """Of codec files and photographs."""
    paths = images_in(pathlib.Path(given.images))[: given.count]
    sides = given.side, given.side
    pictures = [read_rgb(path.read_bytes(), path.name) for path in paths]
    images = np.stack([geometry.letterbox(image, sides, "centre")[0] for image in pictures])
    ways = []
    for path in given.codec:
        frozen, facts = icm_jax.load(path), archive.describe(path).get("detector") or FACTS
        ways += of_scalable(f"{named(path)} ", frozen, facts, images)
    for path in given.single:
        ways.append(of_single(f"{named(path)} picture", icm_jax.load(path), ways[0], images))
    return ways


def named(path: str) -> str:
    """Of a codec file, its run's name where it lies in the folder of a run."""
    place = pathlib.Path(path)
    return place.resolve().parent.name if place.name == "codec.icmc" else place.stem


def drawn(given) -> list[Way]:
    """Of random weights and an image without much detail."""
    rng, channels = np.random.default_rng(0), (given.base, given.enhancement)
    small = jnp.asarray(rng.uniform(0, 255, (given.side // 16, given.side // 16, 3)), jnp.float32)
    shape = given.side, given.side, 3
    image = np.asarray(jax.image.resize(small, shape, "cubic").clip(0, 255), np.uint8)[None]
    detector = yolov3(given.classes, given.detector)
    scalable = scalable_codec("disentangled", given.width, *channels, 2, detector)
    single = image_codec("scale_hyperprior", given.width, sum(channels))
    frozen = [bitstream.freeze(c, initial(c, image, rng), image) for c in (scalable, single)]
    ways = of_scalable("", frozen[0], FACTS, image)
    return [*ways, of_single("single", frozen[1], ways[0], image)]


def of_scalable(name: str, frozen, facts, images: np.ndarray) -> list[Way]:
    """Its base and its picture, of images uint8 [N, H, W, 3]."""
    weights = {n: tree[DETECTOR] for n, tree in frozen.on_device.items() if DETECTOR in tree}
    own = detector_of(frozen.codec), facts, weights
    files = bitstream.encode(frozen, images, windows=())
    bases = [container.prefix(data, 1) for data in files]
    return [
        Way(f"{name}base", frozen, 1, bases, *own),
        Way(f"{name}picture", frozen, None, files, *own),
    ]


def of_single(name: str, frozen, like: Way, images: np.ndarray) -> Way:
    """The picture of a codec of one layer, for the detector of another way."""
    files = bitstream.encode(frozen, images, windows=())
    return like._replace(name=name, frozen=frozen, layers=None, files=files)


def timed(way: Way, row: int) -> Times:
    """From the bytes of an image to its boxes, once."""
    cores, at = time.process_time(), [time.perf_counter()]
    decoded = bitstream.decode_latents(way.frozen, way.files[row], layers=way.layers)
    at.append(time.perf_counter())
    output, shape = "feature" if way.layers else "image", decoded.header.shape
    args = way.frozen.codec, output, shape, way.frozen.on_device, decoded.latents, ()
    found = walk.output(*args, pixels=output == "image")
    at.append(time.perf_counter())
    jax.block_until_ready(compiled(boxes_of(way))(way.weights, found))
    at.append(time.perf_counter())
    spent = [1e3 * (end - begin) for begin, end in itertools.pairwise(at)]
    return Times(*spent, 1e3 * (time.process_time() - cores))


def boxes_of(way: Way):
    """(weights, f_hat or picture) -> boxes, as `icm detect` has it."""
    return predictor(way.detector, way.begin, *(way.facts[name] for name in FACTS))


@functools.cache
def predictor(detector: Detector, begin: int, scale: float, overlap: float, limit: int):
    """`boxes_of` a network from layer `begin` on."""

    def predict(weights, given):
        given = given if begin else scaled(given)
        outputs = Part(detector, begin).apply(weights, given, False)
        placed = anchors(detector, [raw.shape[1:3] for raw in outputs], scale)
        return detections(outputs, placed, detector.scales, limit, overlap, LEAST)

    return predict


@functools.cache
def compiled(predict):
    return jax.jit(predict, compiler_options=compiler_options(jax.devices()[0].platform))


class Row(NamedTuple):
    """Medians over images and rounds; of bytes over images."""

    bytes: int
    all: float
    parts: tuple[float, ...]
    cores: float
    macs: int


def measured(way: Way, times: list[Times]) -> Row:
    values = np.array(times)
    *parts, cores = np.median(values, axis=0).tolist()
    whole = float(np.median(values[:, :3].sum(axis=1)))
    size = int(np.median([len(data) for data in way.files]))
    return Row(size, whole, tuple(parts), cores, macs_of(way))


def printed(row: Row, base: Row) -> str:
    latents, output, boxes = row.parts
    return (
        f"{row.bytes:8,} bytes  {row.all:7.1f} ms ({row.all / base.all:.2f} ×; "
        f"{latents:.1f} + {output:.1f} + {boxes:.1f})  {row.cores:7.1f} ms of cores "
        f"({row.cores / base.cores:.2f} ×)  {row.macs / 1e9:6.2f} G multiply-accumulates "
        f"({row.macs / base.macs:.2f} ×)"
    )


def macs_of(way: Way) -> int:
    """Of the hyper-syntheses, the synthesis and what of the detector runs, for one image."""
    frozen, output = way.frozen, "feature" if way.layers else "image"
    decoded, header = bitstream.decode_latents(frozen, way.files[0], layers=way.layers)
    variables, shape = frozen.on_device, header.shape

    def synthesis(variables, decoded):
        return frozen.codec.outputs[output](variables, decoded, shape)

    total = multiply_accumulates(synthesis, variables, decoded)
    for segment in frozen.codec.segments:
        if way.layers is None or segment.layer < way.layers:
            own = (1, *segment.shape(*shape))
            total += multiply_accumulates(
                lambda v, d, s=segment, o=own: s.prior(v, d, o).index, variables, decoded
            )
    given = jax.eval_shape(synthesis, variables, decoded)
    return total + multiply_accumulates(boxes_of(way), way.weights, given)


def initial(codec, image, rng):
    """Initial variables, the detector's drawn here: compiling its own start takes minutes."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(codec.init, key, image)
    if DETECTOR not in shapes["params"]:
        return jax.jit(codec.init)(key, image)

    def leaf_of(path, leaf):
        if path[-1].key == "kernel":
            scale = math.prod(leaf.shape[:3]) ** -0.5
            return rng.normal(0, scale, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    detector = {name: {DETECTOR: tree[DETECTOR]} for name, tree in shapes.items()}
    variables = jax.tree_util.tree_map_with_path(leaf_of, detector)
    own = jax.jit(lambda: codec.init(key, image)["params"]["scalable"])()
    variables["params"]["scalable"] = own
    return variables


if __name__ == "__main__":
    main()
