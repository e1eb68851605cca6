"""A codec is a list of segments, walked three ways: noise, rounding, range coder.

A segment is one latent. Its prior depends on the segments before it:

    prior(variables, decoded, shape) -> Prior(bits, index)

`forward` adds noise (training) or rounds (test); `freeze` turns the priors into integer tables and
gives a `FrozenCodec`, which alone can `encode` and `decode`. Encoder and decoder compute table
indexes with one and the same compiled function of one image, and every stream carries a CRC of the
integer latents: on a machine whose floating point differs, decoding ends in an error, never in a
wrong array.
"""

import dataclasses
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.coding import container, range_coder
from icm_jax.coding.tables import Tables
from icm_jax.errors import IcmError


class Prior(NamedTuple):
    """What a segment's prior says of a latent of known shape.

    Attributes:
      bits: latent float [N, h, w, C] -> bits of each element, float32 of the same shape.
      index: int32 [N, h, w, C], the table row of each element.
    """

    bits: Callable[[jax.Array], jax.Array]
    index: jax.Array


class Segment(NamedTuple):
    """One latent.

    Attributes:
      name: its key in the dictionaries of latents.
      shape: (height, width) of the image -> (h, w, C) of the latent.
      prior: (variables, decoded, shape [N, h, w, C]) -> Prior.
      freeze: host variables -> Tables.
    """

    name: str
    shape: Callable[[int, int], tuple[int, int, int]]
    prior: Callable[[Any, Mapping[str, jax.Array], tuple[int, ...]], Prior]
    freeze: Callable[[Any], Tables]


class Codec(NamedTuple):
    """A codec: what an image becomes, in which order it is written, what can be read back.

    Attributes:
      config: (name in CODECS, its keyword arguments as sorted items); what a saved codec stores.
      parts: top-level names of the parameters that the codec needs.
      init: (key, image uint8 [N, H, W, 3]) -> variables.
      analyse: (variables, {"image": uint8 [N, H, W, 3]} or {"feature": f}) -> {segment: latent}.
      segments: in the order of the stream.
      outputs: name -> (variables, decoded, (height, width)) -> array.
    """

    config: tuple
    parts: tuple[str, ...]
    init: Callable
    analyse: Callable
    segments: tuple[Segment, ...]
    outputs: Mapping[str, Callable]


class Forward(NamedTuple):
    """Result of `forward`: outputs by name, bits per image by segment (float32 [N]), latents."""

    outputs: dict[str, jax.Array]
    bits: dict[str, jax.Array]
    latents: dict[str, jax.Array]


def forward(
    codec: Codec,
    variables,
    inputs: Mapping[str, jax.Array],
    shape: tuple[int, int],
    *,
    straight_through: bool = False,
    key: jax.Array | None = None,
) -> Forward:
    """Codes without bytes: with noise if there is a key, else exactly what decoding gives.

    Args:
      inputs: what `codec.analyse` takes.
      shape: (height, width) of the images in pixels.
      straight_through: with a key, let the outputs see rounded latents, the priors noisy ones.
    """
    latents = codec.analyse(variables, inputs)
    noisy, decoded, bits = {}, {}, {}
    for number, segment in enumerate(codec.segments):
        latent = latents[segment.name]
        prior = segment.prior(variables, decoded, latent.shape)
        own = None if key is None else jax.random.fold_in(key, number)
        noisy[segment.name] = ops.quantise(latent, key=own)
        decoded[segment.name] = ops.quantise(latent, key=None if straight_through else own)
        bits[segment.name] = prior.bits(noisy[segment.name]).sum(axis=(1, 2, 3))
    outputs = {name: output(variables, decoded, shape) for name, output in codec.outputs.items()}
    return Forward(outputs, bits, decoded)


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenCodec:
    """A codec with final weights and integer tables: the only thing that can write streams."""

    codec: Codec
    variables: Any
    tables: Mapping[str, Tables]

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """4 bytes that depend on every weight, every table and the configuration."""
        digest = hashlib.sha256(json.dumps(self.codec.config).encode())
        for path, value in sorted(_flatten(self.variables).items()):
            digest.update(path.encode() + str(value.dtype).encode() + value.tobytes())
        for segment in self.codec.segments:
            digest.update(self.tables[segment.name].digest)
        return digest.digest()[:4]

    @functools.cached_property
    def on_device(self):
        """The variables as arrays of the default device."""
        return jax.device_put(self.variables, jax.devices()[0])


def freeze(codec: Codec, variables) -> FrozenCodec:
    """Turns trained variables into an immutable coder: the one step between training and bytes."""
    kept = {
        collection: {part: tree[part] for part in codec.parts if part in tree}
        for collection, tree in variables.items()
        if collection in ("params", "batch_stats")
    }
    kept = jax.tree.map(np.asarray, jax.device_get(kept))
    tables = {segment.name: segment.freeze(kept) for segment in codec.segments}
    return FrozenCodec(codec, kept, tables)


def encode(frozen: FrozenCodec, images: np.ndarray, coder: str = "native") -> list[bytes]:
    """One self-contained byte string per image.

    Args:
      frozen: what `freeze` returned.
      images: uint8 [N, H, W, 3], any H, W >= 1.
      coder: "native" or "tfc".

    Raises:
      IcmError: the codec was not frozen, the images are not uint8 RGB, or a latent is not finite.
    """
    codec = _require_frozen(frozen).codec
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise IcmError(f"images must be uint8 [N, H, W, 3], not {images.dtype} {images.shape}")
    streams = []
    for image in images:
        latents = jax.device_get(_analyse(codec, frozen.on_device, image[None]))
        decoded, strings = {}, []
        for number, segment in enumerate(codec.segments):
            latent = latents[segment.name]
            if not np.isfinite(latent).all() or np.abs(latent).max(initial=0) > 2**29:
                raise IcmError(f"latent {segment.name!r} is not finite or too large to code")
            index = _index(codec, number, latent.shape, frozen.on_device, decoded)
            symbols, rows = latent.astype(np.int32).ravel(), np.asarray(index).ravel()
            strings.append(range_coder.encode(symbols, rows, frozen.tables[segment.name], coder))
            decoded[segment.name] = latent
        shape = (image.shape[0], image.shape[1])
        stream = container.Stream(frozen.fingerprint, _crc(decoded), shape, tuple(strings))
        streams.append(container.pack(stream))
    return streams


def decode_latents(frozen: FrozenCodec, data: bytes, coder: str = "native") -> tuple:
    """(decoded latents {name: float32 [1, h, w, C], whole numbers}, (height, width)) of a stream.

    Raises:
      IcmError: the stream is damaged, from another model, or does not decode to what was encoded.
    """
    codec = _require_frozen(frozen).codec
    stream = container.unpack(data)
    if stream.fingerprint != frozen.fingerprint:
        raise IcmError(
            f"the stream was written by model {stream.fingerprint.hex()}, this is model "
            f"{frozen.fingerprint.hex()}; decode with the model that wrote it"
        )
    if len(stream.strings) != len(codec.segments):
        raise IcmError(f"{len(stream.strings)} segments in the stream, {len(codec.segments)} here")
    decoded = {}
    for number, (segment, string) in enumerate(zip(codec.segments, stream.strings, strict=True)):
        shape = (1, *segment.shape(*stream.shape))
        if np.prod(shape, dtype=np.int64) > 1 << 31:
            raise IcmError(f"the stream claims an image of {stream.shape} pixels; refused")
        index = np.asarray(_index(codec, number, shape, frozen.on_device, decoded)).ravel()
        symbols = range_coder.decode(string, index, frozen.tables[segment.name], coder)
        decoded[segment.name] = symbols.reshape(shape).astype(np.float32)
    if _crc(decoded) != stream.latents_crc:
        raise IcmError(
            "decoding did not give back the encoder's latents: the hyperprior's floating point "
            "differs between the two machines; decode where the stream was written"
        )
    return decoded, stream.shape


def decode(
    frozen: FrozenCodec, streams: Sequence[bytes], output: str, coder: str = "native"
) -> np.ndarray:
    """The named output of each stream, stacked along the batch axis: float32 [N, ...].

    Raises: IcmError as `decode_latents` does, or for an output that the codec does not have.
    """
    if output not in _require_frozen(frozen).codec.outputs:
        raise IcmError(f"no output {output!r}; this codec has {', '.join(frozen.codec.outputs)}")
    results = []
    for data in streams:
        decoded, shape = decode_latents(frozen, data, coder)
        results.append(np.asarray(_output(frozen.codec, output, shape, frozen.on_device, decoded)))
    return np.concatenate(results)


def estimate(frozen: FrozenCodec, images: np.ndarray) -> dict[str, np.ndarray]:
    """Bits per image and segment that the float model expects: {segment: float32 [N]}."""
    codec = _require_frozen(frozen).codec
    return jax.device_get(_bits(codec, frozen.on_device, np.asarray(images)))


def save(path: str | os.PathLike, frozen: FrozenCodec) -> None:
    """Writes weights, integer tables and configuration to one file, whole or not at all."""
    arrays = {f"variables/{key}": value for key, value in _flatten(frozen.variables).items()}
    for name, tables in frozen.tables.items():
        arrays[f"tables/{name}/cdf"], arrays[f"tables/{name}/offsets"] = tables.cdf, tables.offsets
    arrays["config"] = np.frombuffer(json.dumps(frozen.codec.config).encode(), np.uint8)
    arrays["fingerprint"] = np.frombuffer(frozen.fingerprint, np.uint8)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load(path: str | os.PathLike, builders: Mapping[str, Callable]) -> FrozenCodec:
    """Reads what `save` wrote; `builders` is `icm_jax.codecs.CODECS`.

    Raises: IcmError if the file is missing, damaged or not a codec. Nothing in it is executed.
    """
    try:
        with open(path, "rb") as stored, np.load(stored, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        name, items = json.loads(arrays["config"].tobytes())
        codec = builders[name](**{key: _tupled(value) for key, value in items})
        variables = flax.traverse_util.unflatten_dict(
            {
                tuple(key.split("/")[1:]): value
                for key, value in arrays.items()
                if key.startswith("variables/")
            }
        )
        tables = {
            segment.name: Tables(
                arrays[f"tables/{segment.name}/cdf"], arrays[f"tables/{segment.name}/offsets"]
            )
            for segment in codec.segments
        }
        frozen = FrozenCodec(codec, variables, tables)
        expected = arrays["fingerprint"].tobytes()
    except Exception as error:  # the errors of zipfile, zlib, JSON and NumPy have no common base
        raise IcmError(f"{path} is not a readable codec file: {error}") from error
    if frozen.fingerprint != expected:
        raise IcmError(f"{path} is damaged: its content does not match its fingerprint")
    return frozen


def _require_frozen(frozen) -> FrozenCodec:
    if not isinstance(frozen, FrozenCodec):
        raise IcmError(
            f"a {type(frozen).__name__} cannot read or write streams; call freeze(codec, "
            "variables) once after training and use what it returns"
        )
    return frozen


def _crc(decoded: Mapping[str, np.ndarray]) -> int:
    crc = 0
    for latent in decoded.values():
        crc = zlib.crc32(latent.astype("<i4").tobytes(), crc)
    return crc


def _tupled(value):
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value


def _flatten(variables) -> dict[str, np.ndarray]:
    return flax.traverse_util.flatten_dict(variables, sep="/")


@functools.partial(jax.jit, static_argnums=0)
def _analyse(codec, variables, image):
    return jax.tree.map(jnp.round, codec.analyse(variables, {"image": image}))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _index(codec, number, shape, variables, decoded):
    return codec.segments[number].prior(variables, decoded, shape).index


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _output(codec, name, shape, variables, decoded):
    return codec.outputs[name](variables, decoded, shape)


@functools.partial(jax.jit, static_argnums=0)
def _bits(codec, variables, image):
    return forward(codec, variables, {"image": image}, image.shape[1:3]).bits
