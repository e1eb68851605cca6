"""Heads for objects on a residual network's layers: a feature pyramid, boxes, masks.

    (c3, c4, c5) -> Pyramid -> P3 ... P7 [H/8 ... H/128] -> BoxHead -> class, distances, centre-ness
                                    P3 ... P5 -> RoIAlign -> MaskHead -> masks of 28 × 28

The pyramid is that of Lin et al. 2017a, with P6 and P7 from P5 as FCOS has them; the boxes' head
is FCOS's (Tian et al. 2019, figure 2), the masks' is Mask R-CNN's (He et al. 2017, figure 4, right)
with group normalisation (Wu and He 2018). Papers count residual layers from 2, so that their c3, c4
and c5 are what `resnet.Tail` calls c2, c3 and c4.

FCOS and not RetinaNet: of equal cost and no less precise, it has no anchors, whose sizes and
aspects would have to be set anew for each data set and each size of image; and neither these nor
the overlap of each anchor with each object are computed. Not Faster R-CNN: its second stage is a
batch of proposals whose shapes depend on what the first one finds.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from icm_jax import ops

STRIDES = (8, 16, 32, 64, 128)
"""Pixels per step of the grids of P3 to P7."""
MASK_SIDE = 28
"""Of the masks that `MaskHead` gives."""
PRIOR = 0.01
"""Probability that a place has before training for each class (Lin et al. 2017b, section 3.3)."""
_GROUPS = 32  # Wu and He 2018


class Found(NamedTuple):
    """What `BoxHead` says of each place of one level, float32.

    classes: [N, h, w, K], logits. distances: [N, h, w, 4], above 0, from the place to the top,
    left, bottom and right of its box, in steps of the grid. centre: [N, h, w], logits.
    """

    classes: jax.Array
    distances: jax.Array
    centre: jax.Array


class Pyramid(ops.Module):
    """Feature pyramid: lateral 1×1, from coarse to fine added to what is above, 3×3."""

    channels: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, layers: Sequence[jax.Array]) -> list[jax.Array]:
        """float [N, h, w, C] at H/8, H/16, H/32 -> dtype P3, P4, P5, P6, P7 [N, ., ., channels]."""

        def conv(name, kernel, stride=1):
            return nn.Conv(
                self.channels,
                (kernel, kernel),
                (stride, stride),
                padding=[(kernel // 2, kernel // 2)] * 2,
                kernel_init=nn.initializers.lecun_uniform(),
                dtype=self.dtype,
                name=name,
            )

        summed, found = None, []
        for number, layer in reversed([*enumerate(layers, 3)]):
            lateral = conv(f"lateral{number}", 1)(layer)
            if summed is not None:
                lateral = lateral + _twice(summed, lateral.shape[1], lateral.shape[2])
            summed = lateral
            found.insert(0, conv(f"p{number}", 3)(summed))
        found.append(conv("p6", 3, 2)(found[-1]))
        found.append(conv("p7", 3, 2)(nn.relu(found[-1])))
        return found


def _twice(x: jax.Array, height: int, width: int) -> jax.Array:
    """x [N, h, w, C] with every row and column doubled, cut to [N, height, width, C]."""
    n, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c))
    return ops.crop_to(x.reshape(n, 2 * h, 2 * w, c), height, width)


class BoxHead(ops.Module):
    """FCOS's head, which all levels share but for a factor of the distances.

    Two towers of 3×3 convolutions with group normalisation and ReLU, for classes and for boxes;
    centre-ness is told by the latter (Tian et al. 2020). Distances are exp(s·x) steps of the grid,
    s of each level.

    Attributes: classes: K. convolutions: of a tower.
    """

    classes: int
    channels: int = 256
    convolutions: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, levels: Sequence[jax.Array]) -> list[Found]:
        """float [N, h, w, C] each -> what is found at each level."""
        towers = [self._tower(kind) for kind in ("class", "box")]
        prior = nn.initializers.constant(-math.log((1 - PRIOR) / PRIOR))
        classify = _small(self.classes, self.dtype, "classes", prior)
        measure = _small(4, self.dtype, "distances")
        centre = _small(1, self.dtype, "centre")
        factors = self.param("factors", nn.initializers.ones, (len(levels),))
        found = []
        for factor, level in zip(factors, levels, strict=True):
            by_class, by_box = (_through(tower, level) for tower in towers)
            # exp is bounded: an untrained or damaged network gives no infinite box.
            logs = jnp.minimum(factor * measure(by_box).astype(jnp.float32), 10.0)
            logits = classify(by_class).astype(jnp.float32)
            found.append(Found(logits, jnp.exp(logs), centre(by_box).astype(jnp.float32)[..., 0]))
        return found

    def _tower(self, kind: str) -> list[tuple[nn.Module, nn.Module]]:
        return [
            (
                _small(self.channels, self.dtype, f"{kind}{number}"),
                _norm(self.channels, self.dtype, f"{kind}{number}_norm"),
            )
            for number in range(self.convolutions)
        ]


class MaskHead(ops.Module):
    """Mask R-CNN's head on a pyramid: 3×3 convolutions, a transposed one, a mask for each class.

    Attributes: classes: K. convolutions: before the resolution is doubled.
    """

    classes: int
    channels: int = 256
    convolutions: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [M, s, s, C] of as many boxes -> float32 logits [M, 2s, 2s, K]."""
        he = nn.initializers.he_normal()
        for number in range(self.convolutions):
            conv = nn.Conv(self.channels, (3, 3), kernel_init=he, dtype=self.dtype)
            x = nn.relu(_norm(self.channels, self.dtype, f"norm{number}")(conv(x)))
        # Of a kernel as large as its stride, a transposed convolution is a product for each pixel.
        x = nn.Dense(4 * self.channels, kernel_init=he, dtype=self.dtype, name="double")(x)
        x = nn.relu(ops.depth_to_space(x))
        init = nn.initializers.normal(0.001)
        last = nn.Dense(self.classes, kernel_init=init, dtype=self.dtype, name="masks")
        return last(x).astype(jnp.float32)


def _through(tower, x: jax.Array) -> jax.Array:
    for conv, norm in tower:
        x = nn.relu(norm(conv(x)))
    return x


def _small(features: int, dtype, name: str, bias=nn.initializers.zeros) -> nn.Conv:
    """3×3, as small at first as the towers of RetinaNet and FCOS (deviation 0.01)."""
    init = nn.initializers.normal(0.01)
    return nn.Conv(features, (3, 3), kernel_init=init, bias_init=bias, dtype=dtype, name=name)


def _norm(channels: int, dtype, name: str) -> nn.GroupNorm:
    """Of 32 groups or, where that does not divide the channels, as many as do both."""
    return nn.GroupNorm(math.gcd(_GROUPS, channels), epsilon=1e-5, dtype=dtype, name=name)
