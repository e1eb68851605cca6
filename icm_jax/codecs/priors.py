"""The two priors of learned codecs, as segments.

factorised     a density per channel, the same everywhere (Ballé et al. 2017, 2018); `centred` with
               its median
conditional    a Gaussian per element, its scale, and mean, from latents decoded before (Ballé
               et al. 2018, Minnen et al. 2018)
"""

import math
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


FACTOR_STEPS = 1 << 10
"""Per unit of a factor of `Ahead`, in integers."""
_PARTS = 100
"""Between two rows of its factors."""
_FARTHEST = 1 << 14
"""Sixteenths of a latent, and steps of a factor, so that their product stays below 2^31."""


class Ahead(NamedTuple):
    """What another latent of the same shape says of the means: itself, times a factor.

    Attributes:
      latent: its name. rows: of factors, for qualities at equal distances from 0 to 1, or one.
      factors: variables in floats -> float32 [rows, C].
    """

    latent: str
    rows: int
    factors: Callable[[Any], jax.Array]

    def means(self, variables, decoded):
        """float32 [N, h, w, C]."""
        factors = self.factors(variables)
        row, above, part = self._place(decoded)
        both = factors[row] + part[:, None] / _PARTS * (factors[above] - factors[row])
        return decoded[self.latent] * both[:, None, None, :]

    def exact(self, factors, decoded):
        """The same from integers, int32: of sixteenths. factors: of `whole`."""
        row, above, part = self._place(decoded)
        between = factors[row] * (_PARTS - part[:, None]) + factors[above] * part[:, None]
        factor = (between + _PARTS // 2) // _PARTS
        sixteenths = jnp.round(decoded[self.latent] * MEAN_STEPS).astype(jnp.int32)
        product = jnp.clip(sixteenths, -_FARTHEST, _FARTHEST) * factor[:, None, None, :]
        return (product + FACTOR_STEPS // 2) >> round(math.log2(FACTOR_STEPS))

    def whole(self, variables) -> np.ndarray:
        """Factors as integers, int32 [rows, C]."""
        steps = np.rint(np.asarray(self.factors(variables), np.float64) * FACTOR_STEPS)
        return np.clip(steps, 0, _FARTHEST).astype(np.int32)

    def _place(self, decoded):
        """Of the quality: the row below it, that above, and how far it is between, of _PARTS; each
        int32 [N]. Qualities are in steps of 1/10000, so integers come of it on every machine."""
        if self.rows == 1:
            row = jnp.zeros(1, jnp.int32)
            return row, row, row
        steps = jnp.round(decoded["quality"] * 10_000).astype(jnp.int32) * (self.rows - 1)
        row = jnp.minimum(steps // 10_000, self.rows - 2)
        return row, row + 1, (steps - 10_000 * row) * _PARTS // 10_000


class Network(NamedTuple):
    """What gives each element's scale index, and mean, in floats and for integers.

    Attributes:
      nodes: for `integer`; its inputs are called as in `decoded`, or as `renamed` says.
      real: (variables, inputs by name) -> float32 [N, h', w', C or 2C]: indexes, then means.
      weights: the network's parameters -> {node: integer.Weights}.
      path: below "params", where its parameters lie; a frozen codec does without them.
      renamed: name in `nodes` -> name in `decoded`, where they differ.
      params: the way back from `weights`, so that a frozen codec can go on learning.
      ahead: a latent to whose share in the means those of the network are added.
    """

    nodes: Sequence[integer.Node]
    real: Callable
    weights: Callable[[Any], Mapping[str, integer.Weights]]
    path: tuple[str, ...]
    renamed: Mapping[str, str] = {}
    params: Callable[[Mapping[str, integer.Weights]], Mapping[str, Any]] | None = None
    ahead: Ahead | None = None

    def inputs(self, decoded) -> dict:
        names = integer.input_names(self.nodes)
        return {name: decoded[self.renamed.get(name, name)] for name in names}

    @property
    def reach(self) -> integer.Reach:
        found = integer.reach(self.nodes)
        return found._replace(factors=tuple((self.renamed.get(n, n), f) for n, f in found.factors))

    def quantised(self, variables, sample, ranges: Sequence[integer.Range]) -> dict[str, Any]:
        """Its integers; sample: latents as it sees them."""
        weights = self.weights(_at(variables["params"], self.path))
        arrays = integer.quantise(self.nodes, weights, self.inputs(sample), ranges)
        if self.ahead is not None:
            arrays["ahead"] = {"factors": self.ahead.whole(variables)}
        return arrays

    def thawed(self, arrays, channels: Mapping[str, int], ranges: Sequence[integer.Range]):
        """Its parameters again."""
        assert self.params
        last = np.array([one.step for one in ranges])
        return self.params(approximate(self.nodes, arrays, self.inputs(channels), last))

    def needs(self, shapes, channels: Mapping[str, int], outputs: int) -> dict:
        """Forms of its integers, see `Segment`."""
        own = needs.of_network(self.nodes, shapes, self.inputs(channels), outputs)
        if self.ahead is not None:
            count = channels[self.ahead.latent]
            own["ahead", "factors"] = ((self.ahead.rows, count), "int32")
        return own


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
        real = network.real(variables, network.inputs(decoded))
        index, centre = _split(ops.crop_to(real, *of_shape[1:3]), count, mean)
        index = entropy.index_of(index) if scales else index
        centre = centre + network.ahead.means(variables, decoded) if network.ahead else centre
        bits = lambda y: entropy.gaussian_bits(y, index, centre, most)  # noqa: E731
        return Prior(bits, entropy.table_index(index), centre)

    def exact(variables, decoded, of_shape):
        arrays = variables["integer"][name]
        bounds = network.inputs(decoded["bounds"]) if "bounds" in decoded else None
        whole = integer.run(network.nodes, arrays, network.inputs(decoded), bounds)
        index, centre = _split(ops.crop_to(whole, *of_shape[1:3]), count, mean)
        index = rows_of(arrays["scales"]["between"], index) if scales else index
        if network.ahead is not None:
            centre = centre + network.ahead.exact(arrays["ahead"]["factors"], decoded)
        centre = None if centre is None else centre.astype(jnp.float32) / MEAN_STEPS
        return Prior(lambda y: entropy.gaussian_bits(y, index, centre, most), index, centre)

    def freeze(variables, sample):
        arrays = network.quantised(variables, sample_of_passes(segment, sample), ranges)
        return tables.gaussian_tables(), arrays | ({"scales": scale_steps()} if scales else {})

    def thaw(arrays, channels):
        return network.thawed(arrays, dict(channels) | {"known": count}, ranges)

    def integers(shapes, channels):
        own = {("scales", "between"): ((TOP_INDEX,), "int32")} if scales else {}
        return own | network.needs(shapes, dict(channels) | {"known": count}, len(ranges))

    count = shape(1, 1)[2]
    ranges = _ranges(count, mean, scales)
    segment = Segment(name, shape, prior, freeze, exact, layer, network.path, passes)
    return segment._replace(
        reach=network.reach,
        rows=len(tables.SCALES),
        integers=integers,
        thaw=thaw if network.params else None,
        asks=bool(network.ahead),
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


def rows_of(between: jax.Array, scales: jax.Array) -> jax.Array:
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
