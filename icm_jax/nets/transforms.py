"""Analysis and synthesis transforms of features.

    information filter (Feng et al. 2022, stage 1)    f [H/4] -> y [H/32] -> f [H/4]
    feature codec (stage 2)                           f [H/4] -> y [H/16] -> f [H/4]
    images (Ballé et al. 2018, figure 4)              x [H] -> y [H/16] -> x [H]
    images (Cheng et al. 2020, without attention)     x [H] -> y [H/16] -> x [H]
    base layer (Özyılkan et al. 2023, table 1)        f, x [H/8] -> y_b [H/16] -> f [H/8]
    latent-space transform (Choi and Bajić 2022)      y_b [H/16] -> f [H/8]
    prediction (Yan et al. 2021)                      f [H/8] -> x [H]
    hyper-analysis (Ballé et al. 2018)                y -> z [/4]

Layer lists follow docs/papers.md 5.2 and 6.3; synthesis goes by sub-pixel convolution. Sizes that
do not divide are rounded up on the way down and cropped by the caller on the way up.
"""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.nets.layers import (
    GDN,
    Down,
    ResidualBlock,
    TransposedUp,
    Up,
    around,
    end_of_block,
    haar_cascade,
    orthogonal_window,
)


class Analysis(ops.Module):
    """1×1 to the first width, then per width: residual blocks and a strided convolution.

    Attributes:
      channels: C, channels of the latent. widths: inner width before each halving; three for the
      information filter, two for the feature codec. kernel: of the strided convolutions. blocks:
      residual blocks before each.
    """

    channels: int
    widths: tuple[int, ...]
    kernel: int = 3
    blocks: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, f: jax.Array) -> jax.Array:
        """float [N, h, w, F] -> float32 [N, h/2^k, w/2^k, C] for k widths."""
        x = nn.Conv(self.widths[0], (1, 1), dtype=self.dtype)(f)
        for width, following in itertools.pairwise((*self.widths, self.channels)):
            for _ in range(self.blocks):
                x = ResidualBlock(width, self.dtype)(x)
            init = orthogonal_window(2)
            x = Down(following, self.kernel, dtype=self.dtype, kernel_init=init)(x)
        return x.astype(jnp.float32)


class Synthesis(ops.Module):
    """The mirror of `Analysis` of the same widths; linear at the end, `features` channels."""

    features: int
    widths: tuple[int, ...]
    blocks: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """float [N, h, w, C] -> float32 [N, h·2^k, w·2^k, features] for k widths."""
        x = y.astype(self.dtype)
        for width in reversed(self.widths):
            x = Up(width, self.dtype)(x)
            for _ in range(self.blocks):
                x = ResidualBlock(width, self.dtype)(x)
        return nn.Conv(self.features, (1, 1), dtype=self.dtype)(x).astype(jnp.float32)


class ImageAnalysis(ops.Module):
    """Four convolutions with stride 2, 5×5, GDN between them (Ballé et al. 2018).

    They begin as a wavelet packet, see `haar_cascade`.

    Attributes:
      channels: M, of the latent. widths: of the three layers before it. last: side of the last
      convolution's kernel, 3 or 5. middle: what is taken from pixels on 0...1.
    """

    channels: int
    widths: tuple[int, ...]
    last: int = 5
    dtype: Any = jnp.float32
    middle: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [N, H, W, 3] on 0...255, sides multiples of 16 -> float32 [N, H/16, W/16, M]."""
        x = (x / 255.0 - self.middle).astype(self.dtype)
        *windows, last = haar_cascade((*self.widths, self.channels))
        for width, window in zip(self.widths, windows, strict=True):
            init = around(window, surplus=0.5)
            x = Down(width, 5, dtype=self.dtype, kernel_init=init)(x)
            x = GDN(dtype=self.dtype)(x)
        x = Down(self.channels, self.last, dtype=self.dtype, kernel_init=around(last))(x)
        return x.astype(jnp.float32)


class ImageSynthesis(ops.Module):
    """The mirror of an `ImageAnalysis` with these attributes, with inverse GDN.

    Attributes:
      extra: how many channels at the end of y are not the analysis' own; they begin with weights
        near zero.
    """

    widths: tuple[int, ...]
    last: int = 5
    dtype: Any = jnp.float32
    extra: int = 0
    middle: float = 0.5

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """float [N, h, w, M] -> float32 [N, 16h, 16w, 3] on 0...255, not clipped."""
        x = y.astype(self.dtype)
        own = y.shape[-1] - self.extra
        windows = [w.swapaxes(2, 3) for w in haar_cascade((*self.widths, own))]
        windows[-1] = np.pad(windows[-1], ((0, 0), (0, 0), (0, self.extra), (0, 0)))
        windows[0], windows[-1] = 16.0 * windows[0], windows[-1] / 16.0
        sides = (self.last, 5, 5)
        for width, side, window in zip(self.widths[::-1], sides, windows[:0:-1], strict=True):
            x = TransposedUp(width, side, self.dtype, around(window))(x)
            x = GDN(inverse=True, dtype=self.dtype)(x)
        x = TransposedUp(3, 5, self.dtype, around(windows[0]))(x).astype(jnp.float32)
        return 255.0 * (x + self.middle)


class _Residual(ops.Module):
    """Resample, leaky ReLU, conv3×3, then the (inverse) GDN or leaky ReLU; the input is added.

    Where the shape changes, the input goes through a layer of its own (Cheng et al. 2020, figure
    5). With neither `down` nor `up` the first layer is a plain conv3×3.
    """

    features: int
    down: bool = False
    up: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features, dtype = self.features, self.dtype
        if self.up:
            y, x = Up(features, dtype)(x), Up(features, dtype)(x)
        elif self.down:
            y, x = Down(features, dtype=dtype)(x), Down(features, 1, dtype=dtype)(x)
        else:
            y = nn.Conv(features, (3, 3), dtype=dtype)(ops.inside(x))
        y = nn.Conv(features, (3, 3), dtype=dtype)(ops.inside(nn.leaky_relu(y)))
        resampled = self.up or self.down
        y = GDN(inverse=self.up, dtype=dtype)(y) if resampled else nn.leaky_relu(y)
        return end_of_block(x + y)


class ResidualAnalysis(ops.Module):
    """The analysis of Cheng et al. 2020, which Choi and Bajić 2022 build on (docs/papers.md 4).

    Attributes:
      channels: M, of the latent. widths: at 1/2, 1/4 and 1/8 of the sides. middle: what is taken
      from pixels on 0...1.
    """

    channels: int
    widths: tuple[int, ...]
    dtype: Any = jnp.float32
    middle: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [N, H, W, 3] on 0...255, sides multiples of 16 -> float32 [N, H/16, W/16, M]."""
        x = (x / 255.0 - self.middle).astype(self.dtype)
        for width in self.widths:
            plain, down = (_Residual(width, down=d, dtype=self.dtype) for d in (False, True))
            x = plain(down(x))
        return Down(self.channels, dtype=self.dtype)(x).astype(jnp.float32)


class ResidualSynthesis(ops.Module):
    """The mirror of a `ResidualAnalysis` with these widths: sub-pixel convolutions, inverse GDN.

    Attributes: first: begin with a convolution to the last width; else y has as many channels.
    """

    widths: tuple[int, ...]
    dtype: Any = jnp.float32
    middle: float = 0.5
    first: bool = True

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """float [N, h, w, M] -> float32 [N, 16h, 16w, 3] on 0...255, not clipped."""
        dtype, x = self.dtype, y.astype(self.dtype)
        if self.first:
            x = nn.Conv(self.widths[-1], (3, 3), dtype=dtype)(ops.inside(x))
        for width in self.widths[::-1]:
            up = _Residual(width, up=True, dtype=dtype)
            x = up(_Residual(x.shape[-1], dtype=dtype)(x))
        x = Up(3, dtype)(_Residual(self.widths[0], dtype=dtype)(x)).astype(jnp.float32)
        return 255.0 * (x + self.middle)


class BaseAnalysis(ops.Module):
    """Three 5×5 convolutions, the last with stride 2, GDN between them (table 1, base encoder).

    Attributes:
      channels: C_b. width: N. halvings: how many convolutions at the end have stride 2; 1 in the
        paper, whose features are at 1/8.
    """

    channels: int
    width: int
    halvings: int = 1

    @nn.compact
    def __call__(self, f: jax.Array) -> jax.Array:
        """float32 [N, h, w, F] -> float32 [N, h / 2^halvings, w / 2^halvings, C_b]."""
        for number, features in enumerate((self.width, self.width, self.channels)):
            f = GDN()(f) if number else f
            halves = number >= 3 - self.halvings
            f = Down(features, 5)(f) if halves else nn.Conv(features, (5, 5))(ops.inside(f))
        return f


class BaseSynthesis(ops.Module):
    """As `BaseAnalysis`, with doublings and inverse GDN (table 1, base decoder); F `features`."""

    features: int
    width: int
    doublings: int = 1

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """float32 [N, h, w, C_b] -> float32 [N, h · 2^doublings, w · 2^doublings, F]."""
        for number, features in enumerate((self.width, self.width, self.features)):
            y = GDN(inverse=True)(y) if number else y
            doubles = number >= 3 - self.doublings
            conv = TransposedUp(features, 5) if doubles else nn.Conv(features, (5, 5))
            y = conv(ops.inside(y))
        return y


class LatentTransform(ops.Module):
    """The latent-space transform of Choi and Bajić 2022 (docs/papers.md 4): residual blocks, the
    second of them after a doubling of the sides (each further doubling after one more), then 3×3
    to the features."""

    features: int
    width: int
    doublings: int = 1

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """float32 [N, h, w, C_b] -> float32 [N, h · 2^doublings, w · 2^doublings, F]."""
        y = nn.Conv(self.width, (1, 1))(y)
        for number in range(4):
            y = ResidualBlock(self.width)(y)
            y = Up(self.width)(y) if number < self.doublings else y
        return nn.Conv(self.features, (3, 3))(ops.inside(y))


class Prediction(ops.Module):
    """A picture from decoded features: `doublings` of the sides with a residual block each."""

    width: int
    doublings: int = 3

    @nn.compact
    def __call__(self, f: jax.Array) -> jax.Array:
        """float32 [N, H / 2^doublings, W / 2^doublings, F] -> float32 [N, H, W, 3] on 0...255, not
        clipped."""
        x = nn.Conv(self.width, (1, 1))(f)
        for features in (*(self.width,) * (self.doublings - 1), 3):
            x = Up(features)(ResidualBlock(self.width)(x))
        return 255.0 * (x + 0.5)


class HyperAnalysis(ops.Module):
    """|y| -> z at a quarter of its sides: conv3×3, ReLU, conv5×5/2, ReLU, conv5×5/2; where y is
    `signed`, y itself and leaky ReLU (Minnen et al. 2018)."""

    channels: int
    signed: bool = False

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        activation = nn.leaky_relu if self.signed else nn.relu
        y = y if self.signed else jnp.abs(y)
        x = activation(nn.Conv(self.channels, (3, 3))(ops.inside(y)))
        x = activation(Down(self.channels, 5)(x))
        return Down(self.channels, 5)(x)


class DeepHyperAnalysis(ops.Module):
    """y -> z at a quarter of its sides: five 3×3 convolutions, leaky ReLU between them, the third
    and the fifth with stride 2 (the hyperprior of Cheng et al. 2020 in CompressAI)."""

    channels: int

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        for number, halves in enumerate((False, False, True, False, True)):
            y = nn.leaky_relu(y) if number else y
            conv = Down(self.channels) if halves else nn.Conv(self.channels, (3, 3))
            y = conv(ops.inside(y))
        return y
