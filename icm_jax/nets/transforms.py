"""Analysis and synthesis transforms of features.

    information filter (Feng et al. 2022, stage 1)    f [H/4] -> y [H/32] -> f [H/4]
    feature codec (stage 2)                           f [H/4] -> y [H/16] -> f [H/4]
    hyperprior of y (Ballé et al. 2018)               y -> z [/4] -> scale index of y

Layer lists follow papers.md 5.2 and 6.3; synthesis goes by sub-pixel convolution. Sizes that do not
divide are rounded up on the way down and cropped by the caller on the way up.
"""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from icm_jax.nets.layers import Down, ResidualBlock, Up, orthogonal_window


class Analysis(nn.Module):
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


class Synthesis(nn.Module):
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


class HyperAnalysis(nn.Module):
    """|y| -> z at a quarter of its sides: conv3×3, ReLU, conv5×5/2, ReLU, conv5×5/2."""

    channels: int

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(self.channels, (3, 3))(jnp.abs(y)))
        x = nn.relu(Down(self.channels, 5)(x))
        return Down(self.channels, 5)(x)


class HyperSynthesis(nn.Module):
    """ẑ -> real-valued scale index of each element of y (64 scales, 0.11 to 256)."""

    channels: int
    latent_channels: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = nn.relu(Up(self.channels)(z))
        x = nn.relu(Up(self.channels)(x))
        # Index 18 is a scale of about one: a new codec starts neither starved nor flooded.
        return nn.Conv(self.latent_channels, (3, 3), bias_init=nn.initializers.constant(18.0))(x)
