"""The compressive autoencoder of Theis et al. 2017, as Torfason et al. 2018 used it.

    x -> CodeAnalysis -> y [H/8] -> nearest of L centres -> q -> CodeSynthesis -> x_hat

Layers follow docs/papers.md 1.1: convolutions see their input mirrored at the edges, the decoder
goes up by sub-pixel convolution. Images are normalised by the constants of Mentzer et al. 2018.
Where the paper says nothing, of initial values, both begin as a wavelet packet and its inverse, see
`packet`: from random ones the code holds little but the mean of each 8×8 pixels for hundreds of
steps.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.nets.convolution import down_by_two
from icm_jax.nets.layers import around, end_of_block, haar_cascade

MEAN = (121.854, 113.589, 100.637)
VARIANCE = (4746.38, 4454.14, 4812.23)
"""Of RGB on 0...255."""
_SOFTNESS = 1.0  # σ of the soft assignment
_SLOPE = 0.01  # of leaky ReLUs below zero


def _leaky(x):
    return nn.leaky_relu(x, _SLOPE)


class MirrorConv(ops.Module):
    """k×k convolution of an input that is mirrored at its edges; stride 1 or 2.

    On each side k // 2 more; with stride 2, where sides are even, one less in front.
    """

    features: int
    kernel: int
    stride: int = 1
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.variance_scaling(2.0, "fan_in", "normal")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [N, H, W, C] -> dtype [N, H/stride, W/stride, features]."""
        size, init = self.kernel, self.kernel_init
        kernel = self.param("kernel", init, (size, size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel, x = kernel.astype(self.dtype), x.astype(self.dtype)
        shape = [side // self.stride for side in x.shape[1:3]]
        x = ops.mirrored(x, size // 2 - (self.stride == 2), size // 2)
        if self.stride == 2:  # its own zero padding makes one output more in front, one behind
            y = down_by_two(x, kernel)[:, 1 : shape[0] + 1, 1 : shape[1] + 1]
        else:
            numbers = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=numbers)
        return y + bias.astype(self.dtype).reshape(1, 1, 1, -1)


class MirrorBlock(ops.Module):
    """x + conv(leaky(conv(x))), 3×3; begins as the identity."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        y = _leaky(MirrorConv(channels, 3, dtype=self.dtype, name="conv1")(x))
        zeros = nn.initializers.zeros
        return end_of_block(x + MirrorConv(channels, 3, 1, self.dtype, zeros, name="conv2")(y))


def packet(width: int, channels: int) -> tuple[list, list]:
    """Windows [2, 2, in, out] of the analysis' strided layers, then of the sub-pixel layers that
    undo them, [1, 1, in, 4 · out], in order of use.

    Each band of `haar_cascade` passes a leaky ReLU as itself and as its opposite: their difference
    is the band again. Bands of the code that would deviate by more than 1.5 from the mean, in
    images whose neighbours correlate by 0.95 and colours by 0.9, are scaled down to that, where six
    centres a step apart hold them.

    Args:
      width, channels: as of `CodeAnalysis`.
    """
    bands = max(1, width // 4), max(1, width // 2)
    first, second, last = haar_cascade((*bands, channels))
    first, last = 4.0 * first, last / 4.0  # all orthonormal
    weights = np.eye(192).reshape(192, 8, 8, 3)
    for window in (first, second, last):
        n, side, _, c = weights.shape
        weights = weights.reshape(n, side // 2, 2, side // 2, 2, c)
        weights = np.einsum("nhawbc,abcf->nhwf", weights, window)
    weights = weights.reshape(192, channels)
    near = 0.95 ** np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
    covariance = np.kron(np.kron(near, near), 0.1 * np.eye(3) + 0.9)
    deviation = np.sqrt(np.einsum("kc,kl,lc->c", weights, covariance, weights))
    last = last / np.maximum(1.0, deviation / 1.5)

    def fitted(window, axis, size):
        spare = [(0, 0)] * 4
        spare[axis] = (0, max(0, size - window.shape[axis]))
        return np.pad(window, spare).take(range(size), axis)

    def paired(window, axis, size):
        return fitted(np.concatenate([window, -window], axis), axis, size)

    def differed(window, axis, size):
        return paired(window, axis, size) / (1.0 + _SLOPE)

    def raised(window):
        """[2, 2, out, in] -> [1, 1, in, 4 · out]."""
        return window.transpose(3, 0, 1, 2).reshape(1, 1, window.shape[3], -1)

    energy = np.square(last).sum(axis=(0, 1, 2))  # 1 but for what was scaled down; 0 of surplus
    back = last / np.where(energy > 0, energy, 1.0)
    half = max(1, width // 2)
    down = [
        paired(first, 3, half),
        paired(differed(second, 2, half), 3, width),
        differed(last, 2, width),
    ]
    up = [
        raised(fitted(back, 2, width)),
        raised(fitted(paired(second, 2, half), 3, width)),
        raised(differed(first, 3, half)),
    ]
    return down, up


class CodeAnalysis(ops.Module):
    """x to the code before quantisation.

    Attributes:
      channels: C, of the code. width: N, of the residual blocks (128 in the paper). blocks: of
      them (3). dtype: of computation.
    """

    channels: int
    width: int = 128
    blocks: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [N, H, W, 3] on 0...255, sides multiples of 8 -> float32 [N, H/8, W/8, C]."""
        mean, variance = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (MEAN, VARIANCE))
        x = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance)
        *windows, last = (around(w, front=1) for w in packet(self.width, self.channels)[0])
        for number, width in enumerate((max(1, self.width // 2), self.width)):
            conv = MirrorConv(width, 5, 2, self.dtype, windows[number], name=f"down{number}")
            x = _leaky(conv(x))
        for number in range(self.blocks):
            x = MirrorBlock(self.dtype, name=f"block{number}")(x)
        return MirrorConv(self.channels, 5, 2, self.dtype, last, name="last")(x).astype(jnp.float32)


class CodeSynthesis(ops.Module):
    """A quantised code to x_hat, not clipped; attributes as of `CodeAnalysis`."""

    width: int = 128
    blocks: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, q: jax.Array) -> jax.Array:
        """float [N, h, w, C] -> float32 [N, 8h, 8w, 3] on about 0...255."""
        first, second, last = (around(w) for w in packet(self.width, q.shape[-1])[1])
        x = ops.depth_to_space(MirrorConv(4 * self.width, 3, 1, self.dtype, first, name="up0")(q))
        for number in range(self.blocks):
            x = MirrorBlock(self.dtype, name=f"block{number}")(x)
        half = 4 * max(1, self.width // 2)
        x = ops.depth_to_space(MirrorConv(half, 3, 1, self.dtype, second, name="up1")(x))
        x = MirrorConv(12, 3, 1, self.dtype, last, name="last")(_leaky(x))
        x = ops.depth_to_space(x).astype(jnp.float32)
        mean, variance = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (MEAN, VARIANCE))
        return x * jnp.sqrt(variance) + mean


class Quantised(NamedTuple):
    """q: float32 [N, h, w, C], values of the nearest centres; symbols: int32, their numbers;
    histogram: float32 [C, L], shares of the symbols in each channel. q and the histogram have the
    gradients of a soft assignment (Agustsson et al. 2017)."""

    q: jax.Array
    symbols: jax.Array
    histogram: jax.Array


class Centres(ops.Module):
    """L scalar centres that all channels share.

    Attributes:
      count: L. learned: else they stay the integers about zero.
    """

    count: int
    learned: bool

    def setup(self):
        start = lambda *_: jnp.arange(self.count, dtype=jnp.float32) - self.count // 2  # noqa: E731
        self.values = self.param("values", start, (self.count,))

    def __call__(self, y: jax.Array) -> Quantised:
        """float [N, h, w, C] -> what training sees."""
        values = self.values if self.learned else jax.lax.stop_gradient(self.values)
        distance = jnp.square(y[..., None] - values.reshape(1, 1, 1, 1, -1))
        soft = jax.nn.softmax(-_SOFTNESS * distance, axis=-1)  # [N, h, w, C, L]
        symbols = jnp.argmin(distance, axis=-1).astype(jnp.int32)
        hard = jax.nn.one_hot(symbols, self.count, dtype=jnp.float32)
        assigned = soft + jax.lax.stop_gradient(hard - soft)
        histogram = assigned.mean(axis=(0, 1, 2))
        return Quantised((assigned * values.reshape(1, 1, 1, 1, -1)).sum(-1), symbols, histogram)

    def nearest(self, y: jax.Array) -> jax.Array:
        """Numbers of the nearest centres, float32 like y; NaN where y is not finite."""
        distance = jnp.abs(y[..., None] - self.values.reshape(1, 1, 1, 1, -1))
        return jnp.where(
            jnp.isfinite(y), jnp.argmin(distance, axis=-1).astype(jnp.float32), jnp.nan
        )

    def take(self, symbols: jax.Array) -> jax.Array:
        """Values of centres with these numbers, float32 [N, h, w, C]."""
        return self.values[jnp.clip(symbols.astype(jnp.int32), 0, self.count - 1)]
