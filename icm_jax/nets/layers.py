"""Layers of learned codecs: GDN, resampling convolutions, residual blocks, projector."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from icm_jax import ops
from icm_jax.errors import IcmError
from icm_jax.nets.convolution import down_by_two, plus_bias, product, up_by_two

BLOCK = "block"
"""The name of what `end_of_block` marks, for `icm_jax.engine.train.REMAT`."""
_PEDESTAL = 2.0**-36
_MOST_PAIRS = 1 << 19  # of an input and an output of a resampling layer


def end_of_block(x: jax.Array) -> jax.Array:
    """x itself, marked as what a backward pass may start its own forward pass from."""
    return checkpoint_name(x, BLOCK)


class GDN(ops.Module):
    """Generalised divisive normalisation (Ballé et al. 2016), or its inverse.

    y_i = x_i / sqrt(β_i + Σ_j γ_ij x_j²); `simplified` is tensorflow-compression's default,
    y_i = x_i / (β_i + Σ_j γ_ij |x_j|). The inverse multiplies. β >= 1e-6 and γ >= 0 are kept by
    storing sqrt(value + 2^-36) under a lower bound with a helpful gradient (docs/papers.md 6.1).
    γ has the layout (in, out).
    """

    inverse: bool = False
    simplified: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [..., C] -> float [..., C]."""
        channels = x.shape[-1]
        beta = self._bounded("beta", jnp.ones((channels,)), 1e-6)
        gamma = self._bounded("gamma", 0.1 * jnp.eye(channels), 0.0)
        pool = jnp.abs(x) if self.simplified else jnp.square(x)
        norm = plus_bias(product(pool, gamma.astype(self.dtype)), beta.astype(self.dtype))
        if self.simplified:
            return end_of_block(x * norm if self.inverse else x / norm)
        return end_of_block(x * (jnp.sqrt(norm) if self.inverse else jax.lax.rsqrt(norm)))

    def _bounded(self, name: str, initial: jax.Array, minimum: float) -> jax.Array:
        stored = self.param(name, lambda _: jnp.sqrt(jnp.maximum(initial + _PEDESTAL, _PEDESTAL)))
        return jnp.square(ops.lower_bound(stored, (minimum + _PEDESTAL) ** 0.5)) - _PEDESTAL


class Down(ops.Module):
    """k×k convolution with stride 2 and padding k // 2; odd sides are padded."""

    features: int
    kernel: int = 3
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [N, H, W, C] -> float [N, ceil(H/2), ceil(W/2), features]."""
        size, channels = self.kernel, x.shape[-1]
        shape = (size, size, channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        y = down_by_two(ops.inside(x).astype(self.dtype), kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
            y = plus_bias(y, bias)
        return y


def orthogonal_window(size: int):
    """Initialiser of a k×k kernel: orthogonal over its central `size`×`size` taps, 0 around them.

    A resampling convolution then begins as a rotation of the pixels that it merges, and a chain of
    them as a transform that loses no more than its narrowest width forces it to.
    """

    def init(key, shape, dtype=jnp.float32):
        height, width, fan_in, fan_out = shape
        inner = nn.initializers.orthogonal()(key, (size * size * fan_in, fan_out), dtype)
        at = [slice(side // 2, side // 2 + size) for side in (height, width)]
        kernel = jnp.zeros(shape, dtype)
        return kernel.at[at[0], at[1]].set(inner.reshape(size, size, fan_in, fan_out))

    return init


def haar_cascade(widths: tuple[int, ...]) -> list[np.ndarray]:
    """Windows [2, 2, C, F] of successive halvings of RGB: a Haar wavelet packet, cut to `widths`.

    Of the four bands of every channel those stay that have the most energy in natural images, by a
    rule of thumb: nearly all of a smooth channel's energy is in its mean, while the bands of a
    channel that holds detail are alike. Where there is room for more than all bands, the windows of
    the surplus are zero. The transpose of each window, [2, 2, F, C], goes back. A quarter of the
    orthonormal scale between first and last window keeps GDN with its first parameters near 1.

    Raises: IcmError if a window would have more than 2^19 pairs of channels.
    """
    bands = 0.5 * np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    smooth_share, detail_share = (3.7, 0.13, 0.13, 0.04), (1.0, 1.0, 1.0, 1.0)
    colours = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]])
    mix = colours / np.linalg.norm(colours, axis=1, keepdims=True)  # in the first layer
    channels = [(1.0, True), (0.05, True), (0.02, True)]  # (energy, is smooth)
    windows = []
    for width in widths:
        found = []
        for number, (energy, smooth) in enumerate(channels):
            shares = smooth_share if smooth else detail_share
            for band, share in enumerate(shares):
                found.append((energy * share, smooth and band == 0, number, band))
        found = sorted(found, key=lambda item: -item[0])[:width]
        if len(channels) * width > _MOST_PAIRS:
            raise IcmError(
                f"a transform from {len(channels)} to {width} channels; their product is at most "
                f"{_MOST_PAIRS}"
            )
        window = np.zeros((2, 2, len(channels), width), np.float32)
        for place, (_, _, number, band) in enumerate(found):
            if windows:
                window[:, :, number, place] = bands[band].reshape(2, 2)
            else:
                window[..., place] = bands[band].reshape(2, 2, 1) * mix[number]
        windows.append(window)
        channels = [(energy, smooth) for energy, smooth, _, _ in found]
        channels += [(0.0, False)] * (width - len(found))
    windows[0], windows[-1] = 0.25 * windows[0], 4.0 * windows[-1]
    return windows


def around(window: np.ndarray, surplus: float = 0.01, front: int = 0):
    """Initialiser of a k×k kernel: a window at k // 2, small noise around and over it.

    Args:
      surplus: level of the noise, as a share of LeCun's, for outputs whose window is zero.
      front: by how many places the window stands before k // 2.
    """

    def init(key, shape, dtype=jnp.float32):
        empty = ~np.abs(window).any(axis=(0, 1, 2))
        share = np.where(empty, surplus, 0.01) / math.sqrt(math.prod(shape[:3]))
        begin = [side // 2 - front for side in shape[:2]]
        at = [slice(b, b + length) for b, length in zip(begin, window.shape[:2], strict=True)]
        noise = jax.random.normal(key, shape, dtype) * share.reshape(1, 1, 1, -1)
        return noise.at[at[0], at[1]].add(window).astype(dtype)

    return init


class Up(ops.Module):
    """Sub-pixel convolution: 3×3 to 4·features channels, then depth to space (Shi et al. 2016)."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [N, H, W, C] -> float [N, 2H, 2W, features]."""
        init = orthogonal_window(1)
        conv = nn.Conv(4 * self.features, (3, 3), dtype=self.dtype, kernel_init=init)
        x = conv(ops.inside(x))
        return ops.depth_to_space(x)


class TransposedUp(ops.Module):
    """Transposed convolution with stride 2, computed as convolutions with stride 1.

    out[o] = Σ_i x[i] · kernel[o - 2i + k // 2]: the layer of Ballé et al. 2018, which doubles the
    sides. Same result as the transposed form; on XLA's CPU backend the kernel gradient of that form
    is two orders of magnitude slower. The parameter is the plain kernel [k, k, C, features].

    Attributes:
      kernel: k, 3 or 5.
    """

    features: int
    kernel: int = 5
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [N, H, W, C] -> float [N, 2H, 2W, features]."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return up_by_two(ops.inside(x).astype(self.dtype), kernel, bias)


class ResidualBlock(ops.Module):
    """x + conv3×3(ReLU(conv3×3(ReLU(x)))); no normalisation, as codecs have it.

    The last convolution begins at zero and the block as the identity (Zhang et al. 2019, Fixup).
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Conv(self.features, (3, 3), dtype=self.dtype)(ops.inside(nn.relu(x)))
        last = nn.Conv(self.features, (3, 3), dtype=self.dtype, kernel_init=nn.initializers.zeros)
        y = last(ops.inside(nn.relu(y)))
        return end_of_block(x + y)


class Projector(ops.Module):
    """MLP with one hidden layer: W2 ReLU(W1 x) (Feng et al. 2022, stage 1)."""

    hidden: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [N, C] -> float [N, features]."""
        x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype)(x))
        return nn.Dense(self.features, dtype=self.dtype)(x)
