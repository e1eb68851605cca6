"""Transforms of residual bottlenecks, at 1/4, 1/8 and 1/16 of an image's sides alone.

    x [H] -> blocks of 4×4 pixels -> 1/4 -> 1/8 -> 1/16 = y        y -> 1/8 -> 1/4 -> 4×4 -> x [H]
                                                                   y -> 1/8 -> a detector's feature

The bottlenecks are those of ELIC (He et al. 2022, "ELIC: Efficient learned image compression with
unevenly grouped space-channel contextual adaptive coding", figure 2). What is left out of it is all
that runs at 1/2 and 1/1 of the sides, where CPUs wait for memory: pixels are gathered and given
back in blocks of 4×4, sides are halved and doubled by blocks of 2×2, each by a matrix product, and
only the bottlenecks look beyond their block.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from icm_jax import ops
from icm_jax.nets.layers import Down, ResidualBlock, around, end_of_block, haar_cascade

PIXELS = 4
"""Sides of the blocks of pixels."""
_COLOURS = 3


class Bottleneck(ResidualBlock):
    """x + dense(ReLU(conv3×3(ReLU(dense(x))))), the middle `features` channels wide."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [N, h, w, C] -> the same."""
        y = nn.relu(nn.Dense(self.features, dtype=self.dtype)(x))
        y = nn.relu(nn.Conv(self.features, (3, 3), dtype=self.dtype)(ops.inside(y)))
        zeros = nn.initializers.zeros
        return end_of_block(x + nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=zeros)(y))


class _Stages(ops.Module):
    """Bottlenecks at three sizes.

    Attributes:
      widths: channels at 1/4, 1/8, 1/16. blocks: how many bottlenecks there. inner: their middle.
    """

    widths: tuple[int, int, int]
    blocks: tuple[int, int, int]
    inner: int
    dtype: Any = jnp.float32

    def _bottlenecks(self, x, stage: int):
        for _ in range(self.blocks[stage]):
            x = Bottleneck(self.inner, self.dtype)(x)
        return x

    def _windows(self) -> list[np.ndarray]:
        """A Haar wavelet packet as matrices [k·k·C, F] of blocks of 4×4, 2×2 and 2×2."""
        first, second, *others = haar_cascade((PIXELS * _COLOURS, *self.widths))
        joint = np.einsum("abcf,pqfg->paqbcg", first, second)
        return [window.reshape(-1, window.shape[-1]) for window in (joint, *others)]


class BlockAnalysis(_Stages):
    """Pixels to y."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [N, H, W, 3] on 0...255, sides multiples of 16 -> float32 [N, H/16, W/16, M]."""
        x = (x / 255.0 - 0.5).astype(self.dtype)
        for stage, window in enumerate(self._windows()):
            x = ops.space_to_depth(x, 2 if stage else PIXELS)
            init = _matrix(window, surplus=0.5)
            x = nn.Dense(self.widths[stage], dtype=self.dtype, kernel_init=init)(x)
            x = self._bottlenecks(x, stage)
        return x.astype(jnp.float32)


class BlockSynthesis(_Stages):
    """The mirror of a `BlockAnalysis` with these attributes."""

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """float [N, h, w, M] -> float32 [N, 16h, 16w, 3] on 0...255, not clipped."""
        first, *others = self._windows()
        windows = [16.0 * first, *others[:-1], others[-1] / 16.0]
        x = y.astype(self.dtype)
        for stage in (2, 1, 0):
            x = self._bottlenecks(x, stage)
            back = windows[stage].T
            x = nn.Dense(back.shape[-1], dtype=self.dtype, kernel_init=_matrix(back))(x)
            x = ops.depth_to_space(x, 2 if stage else PIXELS)
        return 255.0 * (x.astype(jnp.float32) + 0.5)


class FeatureSynthesis(_Stages):
    """A detector's feature from y: a `BlockSynthesis` with these attributes up to the scale of the
    feature, so that it can begin as that of a picture codec, and two layers to its channels.

    Attributes:
      feature: its channels, and its stride, 16, 8 or 4.
    """

    feature: tuple[int, int] = (1, 16)

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """float [N, h, w, M] -> float32 [N, 16h/s, 16w/s, F], before any activation."""
        channels, stride = self.feature
        windows = self._windows()
        x = y.astype(self.dtype)
        if y.shape[-1] != self.widths[2]:  # of some channels of y alone
            x = nn.Dense(self.widths[2], dtype=self.dtype, name="lift")(x)
        for stage in (2, 1, 0):
            x = self._bottlenecks(x, stage)
            if PIXELS << stage == stride:
                break
            back = windows[stage].T / (16.0 if stage == 2 else 1.0)
            x = nn.Dense(back.shape[-1], dtype=self.dtype, kernel_init=_matrix(back))(x)
            x = ops.depth_to_space(x, 2)
        straight = nn.Dense(channels, dtype=self.dtype, name="straight")(x)
        x = nn.Conv(channels, (3, 3), dtype=self.dtype, name="around")(ops.inside(x))
        x = nn.leaky_relu(x, 0.1)
        zeros = nn.initializers.zeros
        x = nn.Dense(channels, dtype=self.dtype, kernel_init=zeros, name="last")(x)
        return (straight + x).astype(jnp.float32)


def _matrix(window: np.ndarray, surplus: float = 0.01):
    """`around` for the kernel [C, F] of a dense layer."""
    init = around(window.reshape(1, 1, *window.shape), surplus)
    return lambda key, shape, dtype=jnp.float32: init(key, (1, 1, *shape), dtype)[0, 0]


class SignedHyperAnalysis(ops.Module):
    """y and |y| -> z at a quarter of its sides: a dense layer, then twice ReLU and conv3×3 with
    stride 2. By the signs z can tell means, too."""

    width: int
    channels: int

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """float [N, h, w, C] -> float32 [N, h/4, w/4, channels], sides rounded up."""
        x = nn.Dense(self.width)(jnp.concatenate([y, jnp.abs(y)], axis=-1))
        for features in (self.width, self.channels):
            x = Down(features)(nn.relu(x))
        return x
