"""A codec is a list of segments, walked three ways: noise, rounding, range coder.

A segment is one latent. Its prior depends on the segments before it:

    prior(variables, decoded, shape) -> Prior(bits, index)

`forward`, here, adds noise (training) or rounds (test). The walk with the range coder is that of
`icm_jax.codecs.bitstream`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.codecs import tiles
from icm_jax.coding.tables import Tables


class Prior(NamedTuple):
    """What a segment's prior says of a latent of known shape.

    Attributes:
      bits: latent float [N, h, w, C] -> bits of each element, float32 of the same shape.
      index: int32 [N, h, w, C], the table row of each element.
      mean: float32 [N, h, w, C] or None: the latent is coded as its rounded distance from it.
    """

    bits: Callable[[jax.Array], jax.Array]
    index: jax.Array
    mean: jax.Array | None = None


class Segment(NamedTuple):
    """One latent.

    Attributes:
      name: its key in the dictionaries of latents.
      shape: (height, width) of the image -> (h, w, C) of the latent.
      prior: (variables, decoded, shape [N, h, w, C]) -> Prior. Once `variables` have the collection
        `integer` with the segment's name, index and mean come from integers alone.
      freeze: (host variables, sample latents {segment: [N, h, w, C]}) -> (Tables, arrays for
        `variables["integer"][name]` or None).
      layer: which layer of the file holds it, from 0 on.
      spent: path below "params" of a network that `freeze` replaces by integers, or ().
    """

    name: str
    shape: Callable[[int, int], tuple[int, int, int]]
    prior: Callable[[Any, Mapping[str, jax.Array], tuple[int, ...]], Prior]
    freeze: Callable[[Any, Mapping[str, np.ndarray]], tuple[Tables, Any]]
    layer: int = 0
    spent: tuple[str, ...] = ()


class Codec(NamedTuple):
    """A codec: what an image becomes, in which order it is written, what can be read back.

    Attributes:
      config: (name in CODECS, its keyword arguments as sorted items); what a saved codec stores.
      parts: top-level names of the parameters that the codec needs.
      init: (key, image uint8 [N, H, W, 3]) -> variables.
      analyse: (variables, inputs) -> {segment: latent}; inputs hold "image" uint8 [N, H, W, 3] or,
        for codecs of features, "feature"; and "quality" where the codec has qualities.
      segments: in the order of the stream, layer by layer.
      outputs: name -> (variables, decoded, (height, width)) -> array; `decoded` has "quality", too.
      qualities: the rate is chosen at encoding: "quality" float32 [N], 0 to 1, is an input.
      tiling: how to code large images in windows, or None.
    """

    config: tuple
    parts: tuple[str, ...]
    init: Callable
    analyse: Callable
    segments: tuple[Segment, ...]
    outputs: Mapping[str, Callable]
    qualities: bool = False
    tiling: tiles.Tiling | None = None


class Outputs(dict):
    """A dict that a codec, which is a static argument of compiled functions, may hold."""

    def __init__(self, **outputs):
        super().__init__(outputs)

    def __hash__(self):
        return id(self)


def channel_index(shape: tuple[int, ...]) -> jax.Array:
    """Table rows of a factorised prior: int32 [N, h, w, C], the channel's number."""
    return jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32).reshape(1, 1, 1, -1), shape)


class Forward(NamedTuple):
    """Result of `forward`.

    Attributes:
      outputs: by name. latents: by segment, noisy or rounded, float [N, h, w, C].
      bits: of an image, by segment, float32 [N]. maps: where they lie, float32 [N, h, w].
    """

    outputs: dict[str, jax.Array]
    bits: dict[str, jax.Array]
    latents: dict[str, jax.Array]
    maps: dict[str, jax.Array]


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
    decoded = {"quality": inputs["quality"]} if codec.qualities else {}
    maps = {}
    for number, segment in enumerate(codec.segments):
        latent = latents[segment.name]
        prior = segment.prior(variables, decoded, latent.shape)
        own = None if key is None else jax.random.fold_in(key, number)
        noisy = ops.quantise(latent, prior.mean, key=own)
        maps[segment.name] = prior.bits(noisy).sum(axis=3)
        rounds = straight_through and key is not None
        decoded[segment.name] = ops.quantise(latent, prior.mean) if rounds else noisy
    outputs = {name: output(variables, decoded, shape) for name, output in codec.outputs.items()}
    bits = {name: values.sum(axis=(1, 2)) for name, values in maps.items()}
    latents = {segment.name: decoded[segment.name] for segment in codec.segments}
    return Forward(outputs, bits, latents, maps)
