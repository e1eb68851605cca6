"""The compressive autoencoder of Theis et al. 2017, as Torfason et al. 2018 used it.

    x -> CodeAnalysis -> y [H/8] -> nearest of L centres -> q -> CodeSynthesis -> x_hat

Layers follow papers.md 1.1: convolutions see their input mirrored at the edges, the decoder goes up
by sub-pixel convolution. Images are normalised by the constants of Mentzer et al. 2018.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from icm_jax.nets.integer import depth_to_space
from icm_jax.nets.layers import down_by_two, end_of_block

MEAN = (121.854, 113.589, 100.637)
VARIANCE = (4746.38, 4454.14, 4812.23)
"""Of RGB on 0...255."""
_SOFTNESS = 1.0  # σ of the soft assignment


class MirrorConv(nn.Module):
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
        pads = [(size // 2 - (self.stride == 2), size // 2)] * 2
        shape = [side // self.stride for side in x.shape[1:3]]
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="reflect")
        if self.stride == 2:  # its own zero padding makes one output more in front, one behind
            y = down_by_two(x, kernel)[:, 1 : shape[0] + 1, 1 : shape[1] + 1]
        else:
            numbers = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=numbers)
        return y + bias.astype(self.dtype).reshape(1, 1, 1, -1)


class MirrorBlock(nn.Module):
    """x + conv(leaky(conv(x))), 3×3; begins as the identity."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        y = nn.leaky_relu(MirrorConv(channels, 3, dtype=self.dtype, name="conv1")(x))
        zeros = nn.initializers.zeros
        return end_of_block(x + MirrorConv(channels, 3, 1, self.dtype, zeros, name="conv2")(y))


class CodeAnalysis(nn.Module):
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
        for number, width in enumerate((max(1, self.width // 2), self.width)):
            x = nn.leaky_relu(MirrorConv(width, 5, 2, self.dtype, name=f"down{number}")(x))
        for number in range(self.blocks):
            x = MirrorBlock(self.dtype, name=f"block{number}")(x)
        return MirrorConv(self.channels, 5, 2, self.dtype, name="last")(x).astype(jnp.float32)


class CodeSynthesis(nn.Module):
    """A quantised code to x_hat, not clipped; attributes as of `CodeAnalysis`."""

    width: int = 128
    blocks: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, q: jax.Array) -> jax.Array:
        """float [N, h, w, C] -> float32 [N, 8h, 8w, 3] on about 0...255."""
        x = depth_to_space(MirrorConv(4 * self.width, 3, dtype=self.dtype, name="up0")(q))
        for number in range(self.blocks):
            x = MirrorBlock(self.dtype, name=f"block{number}")(x)
        half = 4 * max(1, self.width // 2)
        x = depth_to_space(MirrorConv(half, 3, dtype=self.dtype, name="up1")(x))
        x = MirrorConv(12, 3, dtype=self.dtype, name="last")(nn.leaky_relu(x))
        x = depth_to_space(x).astype(jnp.float32)
        mean, variance = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (MEAN, VARIANCE))
        return x * jnp.sqrt(variance) + mean


class Quantised(NamedTuple):
    """q: float32 [N, h, w, C], values of the nearest centres; symbols: int32, their numbers;
    histogram: float32 [C, L], shares of the symbols in each channel. q and the histogram have the
    gradients of a soft assignment (Agustsson et al. 2017)."""

    q: jax.Array
    symbols: jax.Array
    histogram: jax.Array


class Centres(nn.Module):
    """L scalar centres that all channels share.

    Attributes:
      count: L. learned: else they stay the integers about zero.
    """

    count: int
    learned: bool

    def setup(self):
        start = lambda *_: jnp.arange(self.count, dtype=jnp.float32) - (self.count - 1) / 2  # noqa: E731
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
