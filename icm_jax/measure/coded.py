"""Images through real bytes, of the frozen codec, of a classical format or of another model's
files, and what they cost."""

import functools
import time

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
) -> tuple[np.ndarray, list[dict]]:
    """(what the decoder gives, sizes in bytes and times of each image), by way of real bytes.

    Args:
      layers: cut files off after so many before they are decoded and measured.
      same: there are more images, all of one size, so a program for it is worth compiling; if not,
        they are coded in windows, see `icm_jax.codecs.tiles`.

    Raises: IcmError if decoding does not give back the encoder's latents.
    """
    whole = tiles.one_window((images.shape[1], images.shape[2]), 64)
    windows = () if same else (*tiles.SIZES, whole)
    began = time.perf_counter()
    streams = bitstream.encode(frozen, images, quality=quality, windows=windows)
    encoded = time.perf_counter()
    if layers:
        streams = [container.prefix(data, layers) for data in streams]
    features = bitstream.decode(frozen, streams, output, layers=layers, windows=windows)
    decoded = time.perf_counter()
    estimated = bitstream.estimate(frozen, images, quality=quality, windows=windows)
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
