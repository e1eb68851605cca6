"""The two priors of learned codecs, as segments.

factorised     a density per channel, the same everywhere (Ballé et al. 2017, 2018)
conditional    a Gaussian per element, its scale, and mean, from latents decoded before (Ballé
               et al. 2018, Minnen et al. 2018)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from icm_jax import entropy, ops
from icm_jax.codecs import needs
from icm_jax.codecs.codec import Prior, Segment, pass_masks, seen
from icm_jax.coding import tables
from icm_jax.nets import integer
from icm_jax.nets.entropy_parameters import MEAN_STEPS, TOP_INDEX

Shape = Callable[[int, int], tuple[int, int, int]]


def halvings(times: int, channels: int) -> Shape:
    """The shape of a latent at 1/2^times of the image's sides, rounded up at each halving."""
    return lambda height, width: (ops.halved(height, times), ops.halved(width, times), channels)


def channel_index(shape: tuple[int, ...]) -> np.ndarray:
    """Table rows of a prior per channel: int32 [N, h, w, C], the channel's number."""
    return np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)


def per_channel(
    name: str, shape: Shape, bits: Callable, make: Callable[[Any], tables.Tables], layer: int = 0
) -> Segment:
    """A segment whose elements are coded by a table row per channel.

    Args:
      bits: (variables, latent) -> bits of each element. make: host variables -> tables.
    """

    def prior(variables, decoded, of_shape):
        del decoded
        return Prior(lambda latent: bits(variables, latent), channel_index(of_shape))

    return Segment(
        name,
        shape,
        prior,
        lambda variables, _: (make(variables), None),
        layer=layer,
        reach=integer.Reach((), 0),
        rows=shape(1, 1)[2],
    )


def factorised(
    name: str, shape: Shape, bits: Callable, path: tuple[str, ...], layer: int = 0
) -> Segment:
    """A segment with a learned density per channel.

    Args:
      bits: (variables, latent) -> bits of each element, by an `entropy.Factorised`.
      path: below "params", where its parameters lie.
    """
    return per_channel(
        name, shape, bits, lambda v: entropy.factorised_tables(_at(v["params"], path)), layer
    )


class Network(NamedTuple):
    """What gives each element's scale index, and mean, in floats and for integers.

    Attributes:
      nodes: for `integer`; its inputs are called as in `decoded`, or as `renamed` says.
      real: (variables, inputs by name) -> float32 [N, h', w', C or 2C]: indexes, then means.
      weights: the network's parameters -> {node: integer.Weights}.
      path: below "params", where its parameters lie; a frozen codec does without them.
      renamed: name in `nodes` -> name in `decoded`, where they differ.
      params: the way back from `weights`, so that a frozen codec can go on learning.
    """

    nodes: Sequence[integer.Node]
    real: Callable
    weights: Callable[[Any], Mapping[str, integer.Weights]]
    path: tuple[str, ...]
    renamed: Mapping[str, str] = {}
    params: Callable[[Mapping[str, integer.Weights]], Mapping[str, Any]] | None = None

    def inputs(self, decoded) -> dict:
        names = integer.input_names(self.nodes)
        return {name: decoded[self.renamed.get(name, name)] for name in names}


def conditional(
    name: str,
    shape: Shape,
    network: Network,
    *,
    mean: bool = False,
    layer: int = 0,
    passes: Callable[[tuple[int, ...]], np.ndarray] | None = None,
) -> Segment:
    """A segment of Gaussians that `network` tells from what is decoded.

    Args:
      mean: the network gives means as well.
      passes: of `Segment`. The network's inputs may then hold `name` itself, with the elements of
        earlier passes, and "known".
    """

    def prior(variables, decoded, of_shape):
        real = ops.crop_to(network.real(variables, network.inputs(decoded)), *of_shape[1:3])
        index, centre = _split(real, of_shape[-1], mean)
        bits = lambda y: entropy.gaussian_bits(y, index, centre)  # noqa: E731
        return Prior(bits, entropy.table_index(index), centre)

    def exact(variables, decoded, of_shape):
        arrays = variables["integer"][name]
        bounds = network.inputs(decoded["bounds"]) if "bounds" in decoded else None
        whole = integer.run(network.nodes, arrays, network.inputs(decoded), bounds)
        index, centre = _split(ops.crop_to(whole, *of_shape[1:3]), of_shape[-1], mean)
        centre = None if centre is None else centre.astype(jnp.float32) / MEAN_STEPS
        return Prior(lambda y: entropy.gaussian_bits(y, index, centre), index, centre)

    def freeze(variables, sample):
        weights = network.weights(_at(variables["params"], network.path))
        samples = network.inputs(sample_of_passes(segment, sample))
        count = len(weights[network.nodes[-1].name].bias) // (1 + mean)
        ranges = [integer.Range(0, TOP_INDEX, 1.0)] * count
        ranges += [integer.Range(-(1 << 15), 1 << 15, 1 / MEAN_STEPS)] * (count * mean)
        arrays = integer.quantise(network.nodes, weights, samples, ranges)
        return tables.gaussian_tables(), arrays

    def thaw(arrays, channels):
        count = shape(1, 1)[2]
        of_inputs = network.inputs(dict(channels) | {"known": count})
        last = np.repeat([1.0, 1 / MEAN_STEPS], [count, count * mean])
        assert network.params
        return network.params(integer.approximate(network.nodes, arrays, of_inputs, last))

    def integers(shapes, channels):
        inputs = network.inputs(dict(channels) | {"known": shape(1, 1)[2]})
        return needs.of_network(network.nodes, shapes, inputs, shape(1, 1)[2] * (1 + mean))

    reach = integer.reach(network.nodes)
    factors = tuple((network.renamed.get(name, name), factor) for name, factor in reach.factors)
    reach = reach._replace(factors=factors)
    segment = Segment(name, shape, prior, freeze, exact, layer, network.path, passes, reach)
    return segment._replace(
        rows=len(tables.SCALES), integers=integers, thaw=thaw if network.params else None
    )


def sample_of_passes(segment: Segment, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whole latents as the segment's prior sees them in all of its passes, one batch after the
    other."""
    if segment.passes is None:
        return dict(sample)
    latent, batches = sample[segment.name], []
    known = np.zeros(latent.shape[1:], bool)
    for mask in pass_masks(segment, latent.shape):
        batches.append(seen(segment, sample, latent * known[None], known))
        known = known | mask
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _split(values, channels: int, mean: bool):
    """(indexes, means or None) of a network's outputs."""
    return values[..., :channels], values[..., channels:] if mean else None


def _at(tree, path: tuple[str, ...]):
    for name in path:
        tree = tree[name]
    return tree
