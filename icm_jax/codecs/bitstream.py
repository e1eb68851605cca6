"""Trained codecs to bytes and back.

`freeze` turns the priors of a codec into integer tables, and the networks that choose among them
into integer ones, and gives a `FrozenCodec`, which alone can `encode` and `decode`. From decoded
symbols to table rows everything is integer arithmetic, so a stream decodes to the encoder's latents
on every machine; a seal over the latents proves it.
"""

import dataclasses
import functools
import hashlib
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np

from icm_jax.codecs import ahead, programs, refine, tiles, walk
from icm_jax.codecs.codec import Codec, as_float16, frozen_priors
from icm_jax.codecs.strings import Reader, Writer
from icm_jax.coding import container
from icm_jax.coding.tables import Tables
from icm_jax.errors import IcmError

DEFAULT_QUALITY = 50.0
MAX_PIXELS = 1 << 28
"""A header can claim any size in a few bytes; larger images are refused before memory is taken."""


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenCodec:
    """A codec with final weights and integer tables: the only thing that can write streams.

    Attributes:
      codec: its priors are the exact ones, see `frozen_priors`.
      variables: what they and the transforms need, on the host.
      tables: by segment.
    """

    codec: Codec
    variables: Any
    tables: Mapping[str, Tables]

    def __post_init__(self):
        object.__setattr__(self, "codec", frozen_priors(self.codec))

    def __repr__(self) -> str:
        return f"FrozenCodec({self.codec.config}, fingerprint {self.fingerprint.hex()})"

    def __reduce__(self):
        from icm_jax.codecs import model_file

        if not self.codec.config:
            raise IcmError(
                "a codec that no builder made cannot be pickled; see codecs.codec.builder"
            )
        return model_file.rebuilt, (self.codec.config, self.variables, dict(self.tables))

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """4 bytes that depend on every weight, every table and the configuration."""
        digest = hashlib.sha256(json.dumps(self.codec.config).encode())
        for path, value in sorted(flax.traverse_util.flatten_dict(self.variables, sep="/").items()):
            digest.update(path.encode() + str(value.dtype).encode() + value.tobytes())
        for segment in self.codec.segments:
            digest.update(self.tables[segment.name].digest)
        return digest.digest()[:4]

    @functools.cached_property
    def on_device(self):
        """The variables as arrays of the default device."""
        programs.require_home()
        return jax.device_put(self.variables, jax.local_devices()[0])

    def compress(
        self,
        image: Any,
        quality: float | None = None,
        effort: int = 0,
        aim: refine.Aim | None = None,
    ) -> bytes:
        """The .icm file of an image, uint8 [H, W, 3] or [H, W], or Pillow's of any mode but those
        that `data.images.pixels` refuses.

        Args: quality: 50 if a codec with qualities is given none. Others: of `encode`, as errors.
        """
        if hasattr(image, "getbands"):  # Pillow's; it is imported where it is used
            from icm_jax.data.images import pixels

            image = pixels(image)
        image = np.asarray(image)
        shaped = image.ndim == 2 or image.shape[2:] == (3,)
        if image.dtype != np.uint8 or not shaped or not image.size:
            raise IcmError(
                f"an image is uint8 [H, W, 3] or [H, W], not {image.dtype} {list(image.shape)}"
            )
        if quality is None and self.codec.qualities:
            quality = DEFAULT_QUALITY
        self._begin(image.shape[:2], quality_steps(self.codec, quality), back="")
        return encode(self, image[None], quality=quality, effort=effort, aim=aim)[0]

    def decompress(self, data: bytes, layers: int | None = None) -> np.ndarray:
        """The image of an .icm file that this codec wrote: uint8 [H, W, 3] or, if grey, [H, W].

        Args: layers: read the first so many only; a file may be cut off after them.

        Raises: IcmError if the file is damaged, from another model, or holds no image.
        """
        _require_output(self.codec, "image")
        header = container.unpack(data, layers).header
        if header.fingerprint == self.fingerprint:
            back = "grey" if header.grey else "colour"
            self._begin(header.shape, header.quality, back=back)
        decoded = decode_latents(self, data, layers=layers)
        colour = not header.grey
        image = _synthesised(self, decoded, "image", layers, tiles.SIZES, pixels=colour)[0]
        return image if colour else np.rint(image.mean(axis=-1).clip(0, 255)).astype(np.uint8)

    def _begin(self, shape: tuple[int, int], steps: int | None, *, back: str) -> None:
        condition = _condition(steps)
        ahead.begin(self.codec, self.on_device, self.tables, shape, condition, back=back)


def freeze(codec: Codec, variables, images: np.ndarray, *, weights: str = "float32") -> FrozenCodec:
    """Turns trained variables into an immutable coder.

    Args:
      variables: of the trained codec, as on a device or the host.
      images: uint8 [N, H, W, 3], some typical ones: the ranges of integer networks are set on them.
      weights: "float16" rounds every weight to half precision first; the file is half as large.

    Raises: IcmError if a prior cannot be tabulated or a network not be converted.
    """
    if weights not in ("float32", "float16"):
        raise IcmError(f"weights are float32 or float16, not {weights!r}")
    if "integer" in variables:
        raise IcmError("these variables are frozen already; freeze what training gave")
    kept = {
        collection: {part: tree[part] for part in codec.parts if part in tree}
        for collection, tree in variables.items()
        if collection in ("params", "batch_stats")
    }
    kept = jax.tree.map(np.asarray, jax.device_get(kept))
    if weights == "float16":
        kept = jax.tree.map(as_float16, kept)
    inputs = {"image": _require_images(images)}
    if codec.qualities:
        inputs["quality"] = np.linspace(0, 1, len(images), dtype=np.float32)
    sample = walk.sample(codec, kept, inputs)
    tables, integer = {}, {}
    for segment in codec.segments:
        tables[segment.name], arrays = segment.freeze(kept, sample)
        if arrays is not None:
            integer[segment.name] = arrays
    leaves = flax.traverse_util.flatten_dict(kept)
    spent = [("params", *segment.spent) for segment in codec.segments if segment.spent]
    ours = {p: leaf for p, leaf in leaves.items() if not any(p[: len(s)] == s for s in spent)}
    kept = flax.traverse_util.unflatten_dict(ours)
    return FrozenCodec(codec, dict(kept, integer=integer) if integer else kept, tables)


def encode(
    frozen: FrozenCodec,
    images: np.ndarray,
    coder: str = "native",
    *,
    quality: float | None = None,
    windows: Sequence[tiles.Size] = tiles.SIZES,
    effort: int = 0,
    aim: refine.Aim | None = None,
) -> list[bytes]:
    """One self-contained byte string per image.

    Args:
      frozen: what `freeze` returned.
      images: uint8 [N, H, W, 3] or, greyscale, [N, H, W]; any H, W >= 1.
      coder: "native" or "tfc".
      quality: 0 to 100, in steps of 1/100; for codecs with qualities, and needed there.
      windows: sizes of windows to choose from, see `tiles`; with none, transforms are of whole
        images, by a program for each size.
      effort: 0 to 3; above 0 latents are refined for the image, or for an `aim`, see `refine`.

    Raises: IcmError if the codec was not frozen, images, quality or effort are not as above, or a
      latent is not finite.
    """
    codec = _require_frozen(frozen).codec
    images = np.asarray(images)
    grey = images.ndim == 3
    images = _require_images(np.repeat(images[..., None], 3, axis=-1) if grey else images)
    _require_sides(images.shape[1:3])
    steps = quality_steps(codec, quality)
    condition, streams = _condition(steps), []
    for image in images:
        latents = walk.analyse(codec, frozen.on_device, image[None], condition, windows)
        if effort:
            given = frozen, image[None], latents, condition, refine.steps_of(effort)
            latents = refine.refined(*given, aim, windows)
        header = container.Header(frozen.fingerprint, image.shape[:2], grey, steps)
        streams.append(_written(frozen, latents, header, condition, coder, windows))
    return streams


def _written(frozen: FrozenCodec, latents, header, condition, coder: str, windows) -> bytes:
    codec, decoded = frozen.codec, dict(condition)
    layers: list[tuple[list[bytes], int]] = []  # strings, and the CRC of the symbols in them
    for number, segment in enumerate(codec.segments):
        latent = latents[segment.name]
        if segment.layer == len(layers):
            layers.append(([], 0))
        strings, crc = layers[-1]
        writer = Writer(segment, latent, crc)
        decoded[segment.name] = walk.in_passes(
            codec, number, frozen.on_device, latent.shape, decoded, writer, windows
        )
        layers[-1] = strings + writer.strings(frozen.tables[segment.name], coder), writer.crc
    return container.pack(header, layers)


class Decoded(NamedTuple):
    """latents: {segment: float32 [1, h, w, C]} and "quality"; the header of the stream."""

    latents: dict[str, np.ndarray]
    header: container.Header


def decode_latents(
    frozen: FrozenCodec, data: bytes, coder: str = "native", *, layers: int | None = None
) -> Decoded:
    """The latents of a stream, up to the first `layers` layers or all. Raises: IcmError if it is
    damaged, from another model, or does not decode to what was encoded."""
    codec = _require_frozen(frozen).codec
    stream = container.unpack(data, layers)
    header = stream.header
    if header.fingerprint != frozen.fingerprint:
        raise IcmError(
            f"the stream was written by model {header.fingerprint.hex()}, this is model "
            f"{frozen.fingerprint.hex()}; decode with the model that wrote it"
        )
    _require_sides(header.shape)
    numbers = [
        [n for n, segment in enumerate(codec.segments) if segment.layer == layer]
        for layer in range(len(stream.layers))
    ]
    shapes = [(1, *segment.shape(*header.shape)) for segment in codec.segments]
    if [len(layer.strings) for layer in stream.layers] != [
        sum(walk.strings_of(codec.segments[n], shapes[n]) for n in own) for own in numbers
    ]:
        raise IcmError("the stream has other layers than this model writes")
    if (header.quality is not None) != codec.qualities:
        raise IcmError("the stream has a quality and the model none, or the other way round")
    decoded = _condition(header.quality)
    for at, (own, layer) in enumerate(zip(numbers, stream.layers, strict=True)):
        crc, strings = 0, iter(layer.strings)
        for number in own:
            segment, shape = codec.segments[number], shapes[number]
            reader = Reader(segment, strings, frozen.tables[segment.name], coder, crc)
            latent = walk.in_passes(codec, number, frozen.on_device, shape, decoded, reader)
            reader.end()
            decoded[segment.name], crc = latent, reader.crc
        if container.seal(stream.head, layer.strings, crc) != layer.seal:
            raise IcmError(
                f"layer {at + 1} did not decode to the latents that were encoded: the stream was "
                "altered, or this machine's integer arithmetic is broken"
            )
    return Decoded(decoded, header)


def decode(
    frozen: FrozenCodec,
    streams: Sequence[bytes],
    output: str,
    coder: str = "native",
    *,
    layers: int | None = None,
    windows: Sequence[tiles.Size] = tiles.SIZES,
) -> np.ndarray:
    """The named output of each stream, stacked along the batch axis: float32 [N, ...].

    Args: windows: as of `encode`.

    Raises: IcmError as `decode_latents` does, or for an output that the codec does not have or
      that needs more than the first `layers` layers.
    """
    _require_output(_require_frozen(frozen).codec, output)
    latents = (decode_latents(frozen, data, coder, layers=layers) for data in streams)
    return np.concatenate([_synthesised(frozen, d, output, layers, windows) for d in latents])


def _synthesised(
    frozen: FrozenCodec, given: Decoded, output: str, layers, windows, *, pixels: bool = False
) -> np.ndarray:
    """An output of decoded latents, float32 [1, ...], or pixels, uint8 [1, ...]."""
    shape, variables = given.header.shape, frozen.on_device
    args = frozen.codec, output, shape, variables, given.latents, windows
    try:
        return walk.output(*args, pixels=pixels)
    except KeyError as missing:
        if layers is None:
            raise
        raise IcmError(
            f"{output!r} needs the latent {missing}, which is in a later layer than the "
            f"{layers} asked for; outputs of this codec are {', '.join(frozen.codec.outputs)}"
        ) from missing


def estimate(
    frozen: FrozenCodec,
    images: np.ndarray,
    *,
    quality: float | None = None,
    windows: Sequence[tiles.Size] = (),
) -> dict[str, np.ndarray]:
    """The bits of `bit_maps`, summed: {segment: float32 [N]}."""
    maps = bit_maps(frozen, images, quality=quality, windows=windows)
    return {name: values.sum(axis=(1, 2)) for name, values in maps.items()}


def bit_maps(
    frozen: FrozenCodec,
    images: np.ndarray,
    *,
    quality: float | None = None,
    windows: Sequence[tiles.Size] = (),
) -> dict[str, np.ndarray]:
    """Bits that the float priors' densities say, at the scales and means that are coded with:
    {segment: float32 [N, h, w]}, summed over channels."""
    codec = _require_frozen(frozen).codec
    condition = _condition(quality_steps(codec, quality), len(images))
    inputs = {"image": _require_images(images), **condition}
    return walk.maps(codec, frozen.on_device, inputs, windows)


def _require_frozen(frozen) -> FrozenCodec:
    if not isinstance(frozen, FrozenCodec):
        raise IcmError(
            f"a {type(frozen).__name__} cannot read or write streams; call freeze(codec, "
            "variables) once after training and use what it returns"
        )
    return frozen


def _require_output(codec: Codec, output: str) -> None:
    if output not in codec.outputs:
        raise IcmError(f"no output {output!r}; this codec has {', '.join(codec.outputs)}")


def _require_images(images) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise IcmError(f"images must be uint8 [N, H, W, 3], not {images.dtype} {images.shape}")
    return images


def _require_sides(shape: tuple[int, int]) -> None:
    if math.prod(shape) > MAX_PIXELS:
        raise IcmError(
            f"an image of {shape[0]} × {shape[1]} pixels; at most {MAX_PIXELS} are coded: raise "
            "icm_jax.codecs.bitstream.MAX_PIXELS if it is really so large"
        )


def quality_steps(codec: Codec, quality: float | None) -> int | None:
    """A quality in the steps of the file format; None for a codec of one rate.

    Raises: IcmError for a quality that the codec cannot have.
    """
    if not codec.qualities:
        if quality is not None:
            raise IcmError("this model has one rate; leave the quality out")
        return None
    if not isinstance(quality, numbers.Real) or not 0 <= quality <= 100:
        raise IcmError(f"this model needs a quality, a number from 0 to 100, not {quality!r}")
    return round(quality * container.QUALITY_STEPS)


def _condition(steps: int | None, rows: int = 1) -> dict[str, np.ndarray]:
    """The entry "quality" of inputs and decoded latents; empty for a model of one rate."""
    if steps is None:
        return {}
    return {"quality": np.full(rows, steps / (100 * container.QUALITY_STEPS), np.float32)}
