"""A latent with a context model in raster order: its segment, and the walk through its waves.

    z -> hyper-synthesis -+-> scale and mean of each element of y (Minnen et al. 2018)
    y decoded so far -----+

Parts of a `Causal` prior are computed by the same nodes, once for all positions what comes from z,
and wave by wave the rest: see `icm_jax.nets.context`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from icm_jax import entropy, ops
from icm_jax.codecs import priors, programs
from icm_jax.codecs.codec import Causal, Prior, Segment
from icm_jax.nets import context, integer
from icm_jax.nets.entropy_parameters import MEAN_STEPS

_SHORTEST = 8
"""Positions in the program of a wave, which images of many sizes then share."""


class _Split(NamedTuple):
    """The nodes of `nets.context.nodes_of`, cut where what is known around a position comes in.

    Attributes: as of `segment`. front, back: the nodes. channels: of the latent.
    """

    name: str
    front: tuple[integer.Node, ...]
    back: tuple[integer.Node, ...]
    path: tuple[str, ...]
    channels: int
    most: float | None

    def whole(self, variables, inputs, nodes=None):
        nodes = nodes or self.front + self.back
        params = variables["params"]
        for name in self.path:
            params = params[name]
        return integer.run_float(nodes, context.weights(params), inputs)[nodes[-1].name]

    def once(self, variables, decoded, shape):
        found = self.whole(variables, {"z": decoded["z"]}, self.front)
        return ops.crop_to(found, *shape[1:3])

    def each(self, variables, once, seen):
        inputs = {self.front[-1].name: once, "around": seen}
        found = self.whole(variables, inputs, self.back)
        index, mean = entropy.index_of(found[..., : self.channels]), found[..., self.channels :]
        bits = lambda y: entropy.gaussian_bits(y, index, mean, self.most)  # noqa: E731
        return Prior(bits, entropy.table_index(index), mean)

    def once_exact(self, variables, decoded, shape):
        bounds = {"z": decoded["bounds"]["z"]} if "bounds" in decoded else None
        arrays = variables["integer"][self.name]
        found = integer.run(self.front, arrays, {"z": decoded["z"]}, bounds)
        return ops.crop_to(found, *shape[1:3]).astype(jnp.int8)

    def each_exact(self, variables, once, seen):
        arrays = variables["integer"][self.name]
        # Without the arrays of the front, whose last result is an input in whole numbers here.
        own = {name: of for name, of in arrays.items() if name != self.front[-1].name}
        found = integer.run(self.back, own, {self.front[-1].name: once, "around": seen})
        index = priors.rows_of(arrays["scales"]["between"], found[..., : self.channels])
        mean = found[..., self.channels :].astype(jnp.float32) / MEAN_STEPS
        return Prior(lambda y: entropy.gaussian_bits(y, index, mean, self.most), index, mean)


def segment(
    name: str,
    shape: priors.Shape,
    nodes: tuple[integer.Node, ...],
    path: tuple[str, ...],
    *,
    most: float | None = None,
    layer: int = 0,
) -> Segment:
    """A segment of Gaussians by what is decoded around each position, their scales and means given
    by nodes as `nets.context.nodes_of` has them.

    Args: path: below "params", of a `nets.context.ContextNodes`. most: of `entropy.gaussian_bits`.
    """
    at, channels = [node.name for node in nodes].index("context"), shape(1, 1)[2]
    split = _Split(name, nodes[:at], nodes[at:], path, channels, most)
    network = priors.Network(nodes, split.whole, context.weights, path, params=context.params)
    base = priors.conditional(name, shape, network, mean=True, scales=True, most=most, layer=layer)
    integers, thaw = base.integers, base.thaw
    assert integers and thaw

    def freeze(variables, sample):
        return base.freeze(variables, {**sample, "around": context.around(sample[name])})

    count = {"around": context.SEEN * channels}
    return base._replace(
        prior=Causal(name, split.once, split.each),
        exact=Causal(name, split.once_exact, split.each_exact),
        freeze=freeze,
        integers=lambda shapes, of_latents: integers(shapes, {**of_latents, **count}),
        thaw=lambda arrays, of_latents: thaw(arrays, {**of_latents, **count}),
        reach=integer.reach(split.front),  # farther than the context
    )


def walked(
    codec, number: int, variables, shape: tuple[int, ...], once: np.ndarray, symbols_of: Callable
) -> np.ndarray:
    """A latent as decoding gives it, float32 of `shape`, wave by wave, all padded to one length.

    Args:
      codec, number, symbols_of: of `walk.in_passes`. once: of the segment's prior, on the host.
      variables: on the device, no more than the prior needs.
    """
    count, height, width, channels = shape
    length = 1 << (max(_SHORTEST, context.longest(height, width)) - 1).bit_length()
    options = programs.quick if variables.keys() == {"integer"} else None
    wide = context.padded(np.zeros(shape, np.float32))
    values = wide[:, context.BEFORE :, context.BESIDE : context.BESIDE + width]
    for turn in range(context.waves(height, width)):
        rows, columns = context.wave(turn, height, width)
        unused = (0, 0), (0, length - len(rows)), (0, 0), (0, 0)
        given = once[:, rows, columns][:, :, None], context.seen_from(wide, rows, columns)
        inputs = tuple(np.pad(part, unused) for part in given)
        told = programs.run(_of_wave, (codec, number), variables, inputs, options=options)
        index, mean = (np.asarray(part)[:, : len(rows)].ravel() for part in told)
        symbols = symbols_of((slice(None), rows, columns), index, mean)
        found = symbols.astype(np.float32) + mean
        values[:, rows, columns] = found.reshape(count, len(rows), channels)
    return np.ascontiguousarray(values)


def _of_wave(codec, number, variables, inputs):
    prior = codec.segments[number].prior.each(variables, *inputs)
    return prior.index, prior.mean
