"""A codec's parts as compiled programs, and the walk through a latent's passes on the host.

Encoder and decoder both take `in_passes`, and so see the same numbers at the same places.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np

from icm_jax.codecs.codec import Codec, Segment, forward, pass_masks, seen


def in_passes(
    codec: Codec,
    number: int,
    variables,
    shape: tuple[int, ...],
    decoded: Mapping[str, np.ndarray],
    symbols_of: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """A latent as decoding gives it, float32 of `shape`: what encoder and decoder both walk.

    Args:
      codec: with exact priors. number: of the segment. variables: on the device.
      decoded: the latents before, and "quality".
      symbols_of: (places of a pass in the latent, their table rows int32 [n], their means float32
        [n]) -> the integers int32 [n], in the order row, column, channel.
    """
    segment = codec.segments[number]
    values = np.zeros(shape, np.float32)
    known = np.zeros(shape[1:], bool)
    for mask in pass_masks(segment, shape):
        given = seen(segment, decoded, values, known)
        index, mean = jax.device_get(_prior(codec, number, shape, variables, given))
        chosen = mask[None]
        mean = np.broadcast_to(np.float32(0) if mean is None else mean, shape)[chosen]
        # Encoder and decoder add the same two numbers, so that both go on from the same latents.
        symbols = symbols_of(chosen, index[chosen], mean)
        values[chosen] = symbols.astype(np.float32) + mean
        known |= mask
    return values


def strings_of(segment: Segment, shape: tuple[int, ...]) -> int:
    """How many strings a segment of `shape` [N, h, w, C] takes in its layer: one per pass."""
    return 1 if segment.passes is None else len(pass_masks(segment, shape))


@functools.partial(jax.jit, static_argnums=0)
def analyse(codec, variables, inputs):
    return codec.analyse(variables, inputs)


@functools.partial(jax.jit, static_argnums=0)
def front(codec, variables, inputs):
    return codec.tiling.front(variables, inputs)


@functools.partial(jax.jit, static_argnums=0)
def sample(codec, variables, inputs):
    """Latents as they will be decoded: rounded around their means, where they have any."""
    return forward(codec, variables, inputs, inputs["image"].shape[1:3]).latents


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prior(codec, number, shape, variables, decoded):
    prior = codec.segments[number].prior(variables, decoded, shape)
    return prior.index, prior.mean


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def output(codec, name, shape, variables, decoded):
    return codec.outputs[name](variables, decoded, shape)


@functools.partial(jax.jit, static_argnums=0)
def maps(codec, variables, inputs):
    return forward(codec, variables, inputs, inputs["image"].shape[1:3]).maps
