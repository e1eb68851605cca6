"""DeepLab v2's head (Chen et al. 2017): parallel dilated classifiers over a dilated trunk.

    c4 [H/8] -> 3×3 at each rate -> sum -> logits [H/8]

Torfason et al. 2018 use the same with rates 6, 12, 18 and 24 (docs/papers.md 1.3).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from icm_jax import ops


class ASPP(ops.Module):
    """Atrous spatial pyramid pooling.

    Attributes:
      classes: channels of the logits.
      channels: width of a 1×1 convolution with ReLU before the pyramid; 0, as in DeepLab v2, has
        none. It makes the 3×3 convolutions cheap for wide trunks.
      rates: dilation of each branch, in cells of the input.
    """

    classes: int
    channels: int = 0
    rates: tuple[int, ...] = (6, 12, 18, 24)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, c4: jax.Array) -> jax.Array:
        """float [N, h, w, C] -> float32 [N, h, w, classes]."""
        if self.channels:
            c4 = nn.relu(nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="reduce")(c4))
        c4 = ops.inside(c4)
        # The branches add up, so each starts as small as DeepLab's (deviation 0.01).
        logits = [
            nn.Conv(
                self.classes,
                (3, 3),
                kernel_dilation=rate,
                kernel_init=nn.initializers.normal(0.01),
                dtype=self.dtype,
                name=f"rate{rate}",
            )(c4)
            for rate in self.rates
        ]
        return functools.reduce(jnp.add, (branch.astype(jnp.float32) for branch in logits))
