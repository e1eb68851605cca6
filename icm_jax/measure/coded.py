"""Images through real bytes, of the frozen codec, of a classical format or of another model's
files, and what they cost."""

import functools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from icm_jax.codecs import CODECS, bitstream, model_file, tiles, walk
from icm_jax.codecs.bitstream import FrozenCodec
from icm_jax.codecs.refine import Aim
from icm_jax.coding import container
from icm_jax.engine.run import Point
from icm_jax.errors import IcmError
from icm_jax.measure import classical, draws

LEARNED = "icm"
"""Kind of files that a codec of images wrote, which is not the run's: a learned rival."""
AIMED = "aimed"
"""The same, written for the run's own detector; see `icm_jax.measure.aimed`."""
MODELS = LEARNED, AIMED
EFFORT = 2
"""Of files of kind `AIMED`."""


def through_stream(
    frozen: FrozenCodec,
    images: np.ndarray,
    output: str = "feature",
    quality: float | None = None,
    layers: int | None = None,
    *,
    same: bool = True,
    effort: int = 0,
    aims: Sequence[Aim] = (),
) -> tuple[np.ndarray, list[dict]]:
    """(what the decoder gives, sizes in bytes and times of each image), by way of real bytes.

    Args:
      layers: cut files off after so many before they are decoded and measured.
      same: there are more images, all of one size, so a program for it is worth compiling; if not,
        they are coded in windows, see `icm_jax.codecs.tiles`.
      effort, aims: with an effort above 0 files are refined, each for its aim; then no bits are
        estimated, for that is of unrefined ones.

    Raises: IcmError if decoding does not give back the encoder's latents.
    """
    whole = tiles.one_window((images.shape[1], images.shape[2]), 64)
    windows = () if same else (*tiles.SIZES, whole)
    began = time.perf_counter()
    how: dict[str, Any] = dict(quality=quality, windows=windows)
    if effort:
        refined = [
            bitstream.encode(frozen, image[None], effort=effort, aim=aim, **how)
            for image, aim in zip(images, aims, strict=True)
        ]
        streams = [data for (data,) in refined]
    else:
        streams = bitstream.encode(frozen, images, **how)
    encoded = time.perf_counter()
    if layers:
        streams = [container.prefix(data, layers) for data in streams]
    features = bitstream.decode(frozen, streams, output, layers=layers, windows=windows)
    decoded = time.perf_counter()
    if not np.isfinite(features).all():
        raise IcmError("decoded features are not finite; the codec's training has failed")
    estimated = {} if effort else bitstream.estimate(frozen, images, **how)
    times = [1e3 * spent / len(streams) for spent in (encoded - began, decoded - encoded)]
    sizes = []
    for row, data in enumerate(streams):
        bits = {name: float(values[row]) for name, values in estimated.items()}
        size = _of_stream(frozen, data, images.shape[1:3], layers, bits)
        sizes.append(size | dict(zip(("encode_ms", "decode_ms"), times, strict=True)))
    return features, sizes


def _of_stream(frozen: FrozenCodec, data: bytes, shape, layers, estimated: dict) -> dict:
    """Sizes in bytes of a file; shape: of its image. estimated: bits of each segment, or {}."""
    segments = [s for s in frozen.codec.segments if layers is None or s.layer < layers]
    found = container.unpack(data, layers).layers
    strings = iter([string for layer in found for string in layer.strings])
    part = {"pixels": shape[0] * shape[1], "bpp": len(data)}
    if estimated:
        part["bpp_estimated"] = sum(estimated[segment.name] for segment in segments) / 8
    part["bpp_header"] = container.overhead(data, layers)
    for segment in segments:
        count = walk.strings_of(segment, (1, *segment.shape(*shape)))
        part[f"bpp_{segment.name}"] = sum(len(next(strings)) for _ in range(count))
    return part


def of_pictures(sizes: list[dict], batch: dict) -> list[dict]:
    """Sizes of the images of a batch with the pixels of letterboxed pictures alone as "pixels"."""
    extents = batch.get("extent", ())
    if not len(extents):
        return sizes
    return [
        size | {"pixels": int(extent[2:].prod())}
        for size, extent in zip(sizes, extents, strict=False)
    ]


def through_file(
    image: np.ndarray, point: Point, aim: Aim | None = None
) -> tuple[np.ndarray, dict]:
    """(uint8 [h, w, 3] after a file of the point's format and quality, its sizes in bytes).

    Args: aim: of kind `AIMED`.

    Raises: IcmError as `rival` does.
    """
    if point.kind in MODELS:
        codec, effort = rival(point.model), EFFORT if point.kind == AIMED else 0
        (file,) = bitstream.encode(
            codec, image[None], quality=point.quality, effort=effort, aim=aim
        )
        bare = len(file) - container.overhead(file)
        sizes = {"pixels": image[..., 0].size, "bpp": len(file), "bpp_without_tables": bare}
        return np.asarray(codec.decompress(file)), sizes
    file = classical.encode(image, point.kind, point.quality)
    bare = len(file) - (classical.table_bytes(file) if point.kind == "jpeg" else 0)
    sizes = {"pixels": image[..., 0].size, "bpp": len(file), "bpp_without_tables": bare}
    return classical.decode(file), sizes


@functools.cache
def rival(path: str) -> FrozenCodec:
    """The codec of images in a model's file; "": that of the package.

    Raises: IcmError if there is none, or it gives no images.
    """
    codec = model_file.load(path or None, CODECS)
    if "image" not in codec.codec.outputs:
        raise IcmError(f"{path} gives no images, and so is no codec to compare pictures with")
    return codec


def written_by(point: Point) -> dict[str, str]:
    """{"fingerprint"} of the model that writes a learned rival's files; {} of other formats."""
    learned = point.kind in MODELS
    return {"fingerprint": rival(point.model).fingerprint.hex()} if learned else {}


def drawn_rates(sizes: list[dict], counts: np.ndarray) -> dict[str, np.ndarray]:
    """{rate: its mean over the images of each draw, float64 [draws]}; counts: `draws.resamples`."""
    pixels = np.array([size["pixels"] for size in sizes], np.float64)
    return {
        name: draws.means(8 * np.array([size[name] for size in sizes]) / pixels, counts)
        for name in ("bpp", "bpp_source")
        if sizes and name in sizes[0]
    }


def of_sizes(sizes: list[dict]) -> dict:
    """Means of sizes in bits per pixel, medians of times, over images."""
    if not sizes:
        return {}
    pixels = np.array([size["pixels"] for size in sizes], np.float64)
    record = {}
    for name in sizes[0]:
        values = np.array([size[name] for size in sizes])
        if name.startswith("bpp"):
            record[name] = float((8 * values / pixels).mean())
        elif name.endswith("_ms"):
            record[name] = float(np.median(values))
    if "bpp_estimated" in record:
        gaps = [size["bpp"] - 1.01 * size["bpp_estimated"] for size in sizes]
        record["worst_gap_bytes"] = max(gaps)
    return record
