"""The two priors of learned codecs, as segments.

factorised     a density per channel, the same everywhere (Ballé et al. 2017, 2018); `centred` with
               its median
conditional    a Gaussian per element, its scale, and mean, from latents decoded before (Ballé
               et al. 2018, Minnen et al. 2018)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import entropy, ops
from icm_jax.codecs import needs
from icm_jax.codecs.codec import Prior, Segment, pass_masks, seen
from icm_jax.coding import tables
from icm_jax.nets import integer
from icm_jax.nets.entropy_parameters import MEAN_STEPS, TOP_INDEX, approximate

SCALE_STEPS = 1 << 12
"""Per unit of a scale, in integers; the table's least, 0.11, is of 450."""
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


def centred(
    name: str, shape: Shape, bits: Callable, path: tuple[str, ...], median: tuple[str, ...]
) -> Segment:
    """As `factorised`, but rounded from a learned median of each channel (Ballé et al. 2018, as
    released); a frozen codec has it in whole sixteenths, what decoded latents are multiples of.

    Args: median: below "params", where the medians, float32 [C], lie.
    """

    def prior(variables, decoded, of_shape):
        return placed(variables, _at(variables["params"], median), of_shape)

    def exact(variables, decoded, of_shape):
        sixteenths = variables["integer"][name]["median"]["sixteenths"]
        return placed(variables, sixteenths.astype(jnp.float32) / MEAN_STEPS, of_shape)

    def placed(variables, middle, of_shape):
        mean = jnp.broadcast_to(middle.reshape(1, 1, 1, -1), of_shape)
        return Prior(lambda latent: bits(variables, latent), channel_index(of_shape), mean)

    def freeze(variables, sample):
        del sample
        sixteenths = np.rint(np.asarray(_at(variables["params"], median)) * MEAN_STEPS)
        made = entropy.factorised_tables(_at(variables["params"], path), sixteenths / MEAN_STEPS)
        return made, {"median": {"sixteenths": sixteenths.astype(np.int32)}}

    channels = shape(1, 1)[2]
    return Segment(
        name,
        shape,
        prior,
        freeze,
        exact,
        reach=integer.Reach((), 0),
        rows=channels,
        integers=lambda *_: {("median", "sixteenths"): ((channels,), "int32")},
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

    @property
    def reach(self) -> integer.Reach:
        found = integer.reach(self.nodes)
        return found._replace(factors=tuple((self.renamed.get(n, n), f) for n, f in found.factors))


def conditional(
    name: str,
    shape: Shape,
    network: Network,
    *,
    mean: bool = False,
    scales: bool = False,
    most: float | None = None,
    layer: int = 0,
    passes: Callable[[tuple[int, ...]], np.ndarray] | None = None,
) -> Segment:
    """A segment of Gaussians that `network` tells from what is decoded.

    Args:
      mean: the network gives means as well.
      scales: it gives scales, not their indexes. most: of `entropy.gaussian_bits`.
      passes: of `Segment`. The network's inputs may then hold `name` itself, with the elements of
        earlier passes, and "known".
    """

    def prior(variables, decoded, of_shape):
        real = ops.crop_to(network.real(variables, network.inputs(decoded)), *of_shape[1:3])
        index, centre = _split(real, of_shape[-1], mean)
        index = entropy.index_of(index) if scales else index
        bits = lambda y: entropy.gaussian_bits(y, index, centre, most)  # noqa: E731
        return Prior(bits, entropy.table_index(index), centre)

    def exact(variables, decoded, of_shape):
        arrays = variables["integer"][name]
        bounds = network.inputs(decoded["bounds"]) if "bounds" in decoded else None
        whole = integer.run(network.nodes, arrays, network.inputs(decoded), bounds)
        index, centre = _split(ops.crop_to(whole, *of_shape[1:3]), of_shape[-1], mean)
        index = _rows(arrays["scales"]["between"], index) if scales else index
        centre = None if centre is None else centre.astype(jnp.float32) / MEAN_STEPS
        return Prior(lambda y: entropy.gaussian_bits(y, index, centre, most), index, centre)

    def freeze(variables, sample):
        weights = network.weights(_at(variables["params"], network.path))
        samples = network.inputs(sample_of_passes(segment, sample))
        arrays = integer.quantise(network.nodes, weights, samples, ranges)
        return tables.gaussian_tables(), arrays | ({"scales": scale_steps()} if scales else {})

    def thaw(arrays, channels):
        of_inputs = network.inputs(dict(channels) | {"known": count})
        last = np.array([one.step for one in ranges])
        assert network.params
        return network.params(approximate(network.nodes, arrays, of_inputs, last))

    def integers(shapes, channels):
        inputs = network.inputs(dict(channels) | {"known": count})
        own = {("scales", "between"): ((TOP_INDEX,), "int32")} if scales else {}
        return own | needs.of_network(network.nodes, shapes, inputs, len(ranges))

    count = shape(1, 1)[2]
    ranges = _ranges(count, mean, scales)
    reach = network.reach
    segment = Segment(name, shape, prior, freeze, exact, layer, network.path, passes, reach)
    return segment._replace(
        rows=len(tables.SCALES), integers=integers, thaw=thaw if network.params else None
    )


def _ranges(channels: int, mean: bool, scales: bool) -> list[integer.Range]:
    """Of the outputs of the network of a `conditional`."""
    whole = integer.Range(0, TOP_INDEX, 1.0)
    scale = integer.Range(0, round(tables.SCALES[-1] * SCALE_STEPS), 1 / SCALE_STEPS)
    of_mean = integer.Range(-(1 << 15), 1 << 15, 1 / MEAN_STEPS)
    return [scale if scales else whole] * channels + [of_mean] * (channels * mean)


def scale_steps() -> dict[str, np.ndarray]:
    """Of scales in whole 1/4096: where the next of the table is nearer, by their logarithms."""
    between = np.sqrt(tables.SCALES[:-1] * tables.SCALES[1:])
    return {"between": np.ceil(between * SCALE_STEPS).astype(np.int32)}


def _rows(between: jax.Array, scales: jax.Array) -> jax.Array:
    """The table rows, int32, of scales in whole steps."""
    return jnp.searchsorted(between, scales, side="right").astype(jnp.int32)


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
