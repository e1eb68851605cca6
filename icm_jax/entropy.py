"""Entropy models: the deep factorised prior and the Gaussian conditional.

In training they give the bits of noisy latents (Ballé et al. 2017, 2018); for coding they say, once
the parameters are final, which integer tables stand for them. The bits are -log2 of the density
convolved with U(-1/2, 1/2), that is of a difference of two CDFs, taken in the log domain on the
side where no digits are lost; so there is no floor that would cut the gradient.
"""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.coding import tables
from icm_jax.errors import IcmError

_LN2 = math.log(2.0)


class Factorised(ops.Module):
    """Deep factorised prior (Ballé et al. 2018, appendix 6.1): one learned CDF per channel.

    Attributes:
      filters: widths of the hidden layers of each channel's CDF network.
      init_scale: spread of the initial density.
    """

    filters: tuple[int, ...] = (3, 3)
    init_scale: float = 10.0

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """Bits of each element of y: float [..., C] -> float32 [..., C]."""
        channels = y.shape[-1]
        params = self._params(channels)
        flat = y.astype(jnp.float32).reshape(-1, channels).T[:, None, :]  # [C, 1, M]
        lower, upper = (_cdf_logits(params, flat + shift, jnp) for shift in (-0.5, 0.5))
        bits = -_log_sigmoid_difference(lower, upper) / _LN2
        return bits[:, 0, :].T.reshape(y.shape)

    def _params(self, channels: int) -> dict:
        widths = (1, *self.filters, 1)
        scale = self.init_scale ** (1 / (len(self.filters) + 1))
        params = {}
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            value = math.log(math.expm1(1 / scale / fan_out))
            params[f"matrix_{layer}"] = self.param(
                f"matrix_{layer}", nn.initializers.constant(value), (channels, fan_out, fan_in)
            )
            params[f"bias_{layer}"] = self.param(
                f"bias_{layer}",
                lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -0.5, 0.5),
                (channels, fan_out, 1),
            )
            if layer < len(self.filters):
                params[f"factor_{layer}"] = self.param(
                    f"factor_{layer}", nn.initializers.zeros, (channels, fan_out, 1)
                )
        return params


def _cdf_logits(params, x, xp):
    """Logits of the CDF at x [C, 1, M]; `xp` is jax.numpy, or numpy for float64 when freezing."""
    layers = sum(name.startswith("matrix") for name in params)
    for layer in range(layers):
        matrix = xp.logaddexp(params[f"matrix_{layer}"], xp.zeros_like(params[f"matrix_{layer}"]))
        x = xp.matmul(matrix, x) + params[f"bias_{layer}"]
        if layer < layers - 1:
            x = x + xp.tanh(params[f"factor_{layer}"]) * xp.tanh(x)
    return x


def _log_sigmoid_difference(lower, upper):
    """log(sigmoid(upper) - sigmoid(lower)) for upper > lower, accurate in both tails."""
    # By symmetry to the left tail: sigmoid(u) - sigmoid(l) = sigmoid(-l) - sigmoid(-u).
    right = lower + upper > 0
    small = jnp.where(right, -upper, lower)
    large = jnp.where(right, -lower, upper)
    big, little = jax.nn.log_sigmoid(large), jax.nn.log_sigmoid(small)
    return big + _log1mexp(big - little)


def _log1mexp(x):
    """log(1 - exp(-x)) for x > 0 (Mächler 2012)."""
    x = jnp.maximum(x, 1e-30)
    near = x < _LN2
    # Both branches see arguments at which their gradients are finite.
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(-jnp.where(near, x, _LN2))),
        jnp.log1p(-jnp.exp(-jnp.where(near, _LN2, x))),
    )


def factorised_tables(
    params: dict,
    medians: np.ndarray | float = 0.0,
    precision: int = tables.PRECISION,
    tail_mass: float = tables.TAIL_MASS,
) -> tables.Tables:
    """Freezes a factorised prior: integer tables with a row per channel.

    The tails are found by bisection in float64, so that training needs no auxiliary loss.

    Args:
      medians: [C], from which latents are rounded to whole distances. By default they are rounded
        to whole numbers: then test mode and decoding round alike before and after freezing.

    Raises: IcmError if a parameter is not finite or a channel's support is wider than 2^15.
    """
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    if not all(np.isfinite(value).all() for value in params.values()):
        raise IcmError("the factorised prior has parameters that are not finite; retrain")
    slope = np.logaddexp(params["matrix_0"], 0.0)  # distances are as far from 0 as latents are
    params["bias_0"] = params["bias_0"] + slope * np.reshape(medians, (-1, 1, 1))
    target = math.log(tail_mass / 2) - math.log1p(-tail_mass / 2)
    first = np.floor(_solve(params, target)).astype(np.int64)
    last = np.ceil(_solve(params, -target)).astype(np.int64)
    if (last - first > 1 << 15).any():
        raise IcmError(
            f"channel {int(np.argmax(last - first))} of a factorised prior spans more than 2^15 "
            "integers; lower the learning rate or clip gradients"
        )
    pmfs = []
    for channel in range(len(first)):
        density = {name: value[channel : channel + 1] for name, value in params.items()}
        edges = np.arange(first[channel], last[channel] + 2) - 0.5
        logits = _cdf_logits(density, edges[None, None, :], np)[0, 0]
        below, above = logits[:-1], logits[1:]
        flip = below + above > 0
        below, above = np.where(flip, -above, below), np.where(flip, -below, above)
        pmfs.append(_sigmoid(above) - _sigmoid(below))
    return tables.from_pmfs(pmfs, first.astype(np.int32), precision)


def _sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


def _solve(params: dict, logit: float) -> np.ndarray:
    """float64 [C]: where each channel's CDF logit, which increases, equals `logit`."""
    channels = len(params["bias_0"])
    low, high = np.full(channels, -1.0), np.full(channels, 1.0)
    at = lambda x: _cdf_logits(params, x[:, None, None], np)[:, 0, 0]  # noqa: E731
    for _ in range(40):
        low, high = (
            np.where(at(low) > logit, 2 * low, low),
            np.where(at(high) < logit, 2 * high, high),
        )
    for _ in range(100):
        middle = (low + high) / 2
        above = at(middle) > logit
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2


def gaussian_bits(
    y: jax.Array, index: jax.Array, mean: jax.Array | None = None, most: float | None = None
) -> jax.Array:
    """Bits of each element of y under N(mean, scale²) * U(-1/2, 1/2), float32 like y.

    Args:
      y: float [...], noisy or quantised latents.
      index: float [...], the scale's place in the table of 64 scales, as the hyper-synthesis gives
        it; a real number in training, whole where a decoder has to agree.
      mean: float [...] or None for zero (Ballé 2018; Minnen 2018 with a mean).
      most: what the Gaussian may ask, in place of the price below.

    Far outside the price goes with the logarithm of the distance, as the coder's does, whose
    tables end there and escape (`_FAR`, `_FAR_BITS`). The square of the distance, which a Gaussian
    asks, would let a few badly predicted elements drown all others' gradients.
    """
    centred = y.astype(jnp.float32) if mean is None else (y - mean).astype(jnp.float32)
    scale = scale_of(index)
    distance = jnp.abs(centred)
    if most is not None:
        return ops.upper_bound(_gaussian_bits(distance, scale), most)
    edge = 0.5 + _FAR * scale
    near = _gaussian_bits(jnp.minimum(distance, edge), scale)
    return near + _FAR_BITS / _LN2 * jnp.log(jnp.maximum(distance / edge, 1.0))


_FAR = 5.0  # scales; the tables' tail mass of 2^-16 lies beyond 4.3
_FAR_BITS = 6.0  # per doubling of the distance; an escape costs 2, but 2 pulls too weakly


def _gaussian_bits(distance, scale):
    logs = (jax.scipy.special.log_ndtr((s - distance) / scale) for s in (0.5, -0.5))
    log_upper, log_lower = logs
    return -(log_upper + _log1mexp(log_upper - log_lower)) / _LN2


def scale_of(index: jax.Array) -> jax.Array:
    """The scale at a real-valued place of the 64-entry table, within it (docs/papers.md 6.2).

    >>> [round(float(scale), 2) for scale in scale_of(jnp.array([0.0, 63.0]))]
    [0.11, 256.0]
    """
    top = len(tables.SCALES) - 1
    index = ops.upper_bound(ops.lower_bound(index.astype(jnp.float32), 0.0), float(top))
    low, high = math.log(tables.SCALES[0]), math.log(tables.SCALES[-1])
    return jnp.exp(low + index * ((high - low) / top))


def index_of(scale: jax.Array) -> jax.Array:
    """The real-valued place of a scale in the 64-entry table, from 0 on: what `scale_of` takes.

    >>> [round(float(index), 2) for index in index_of(jnp.array([0.0, 0.11, 256.0]))]
    [0.0, 0.0, 63.0]
    """
    low, high = math.log(tables.SCALES[0]), math.log(tables.SCALES[-1])
    bounded = ops.lower_bound(scale.astype(jnp.float32), float(tables.SCALES[0]))
    return (jnp.log(bounded) - low) * ((len(tables.SCALES) - 1) / (high - low))


def table_index(index: jax.Array) -> jax.Array:
    """int32 table row for a real-valued scale index: the nearest, kept inside the table.

    tensorflow-compression truncates; given whole indexes, it codes the same bytes. Truncation
    always picks the narrower scale, which on some images costs 5 % more bits than expected.

    >>> table_index(jnp.array([-3.0, 0.6, 99.0])).tolist()
    [0, 1, 63]
    """
    index = jnp.clip(index.astype(jnp.float32), 0.0, len(tables.SCALES) - 1.0)
    return jnp.round(index).astype(jnp.int32)
