"""ResNet-50 on the DCT coefficients of JPEG files (Gueguen et al. 2018; docs/papers.md 2.3).

    Y [N, H/8, W/8, 64], Cb and Cr [N, H/16, W/16, 64] -> blocks of each -> concatenation
        -> blocks -> [N, H/32, W/32, 2048]

Blocks are bottlenecks of 1×1, k×k, 1×1. Where "receptive-field-aware" (rfa) ones come first, k is
1, 2, 3: the receptive field then grows as on pixels, although the input has a stride of 8 already.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

from icm_jax import ops
from icm_jax.errors import IcmError
from icm_jax.nets.resnet import BatchNorm, Block, Conv


class Bottleneck(NamedTuple):
    """k of the middle convolution, channels of the first two, of the last, stride."""

    kernel: int
    middle: int
    out: int
    stride: int = 1


class Wiring(NamedTuple):
    """One row of the paper's table.

    merge: how planes become one tensor before `rest`: "upsample" Cb and Cr to Y's size (nearest),
    "deconvolve" them (transposed 2×2), "downsample" Y (3×3, stride 2), or "late", after blocks of
    their own, `luma` and `chroma`.
    """

    merge: str
    rest: tuple[Bottleneck, ...]
    luma: tuple[Bottleneck, ...] = ()
    chroma: tuple[Bottleneck, ...] = ()


def _layer(depth: int, middle: int, out: int, stride: int) -> tuple[Bottleneck, ...]:
    return (Bottleneck(3, middle, out, stride), *(Bottleneck(3, middle, out),) * (depth - 1))


def _aware(out: int) -> tuple[Bottleneck, ...]:
    return tuple(Bottleneck(kernel, 256, out) for kernel in (1, 2, 3))


_CONV3, _CONV4, _CONV5 = _layer(4, 128, 512, 1), _layer(6, 256, 1024, 2), _layer(3, 512, 2048, 2)
_LATE = (*(Bottleneck(3, 256, 1024),) * 5, *_CONV5)
_HALVED, _CHROMA = Bottleneck(3, 128, 512, 2), (Bottleneck(1, 128, 512),)
WIRINGS = {
    "upsampling": Wiring("upsample", (*_CONV3, *_CONV4, *_CONV5)),
    "upsampling_rfa": Wiring("upsample", (*_aware(1024), *_CONV3, *_CONV4, *_CONV5)),
    "deconvolution_rfa": Wiring("deconvolve", (*_aware(1024), *_CONV3, *_CONV4, *_CONV5)),
    "downsampling": Wiring("downsample", (*_layer(6, 256, 1024, 1), *_CONV5)),
    "late_concat": Wiring("late", _LATE, (*_CONV3, _HALVED), _CHROMA),
    "late_concat_rfa": Wiring("late", _LATE, (*_aware(1024), *_CONV3, _HALVED), _CHROMA),
    "late_concat_rfa_thinner": Wiring(
        "late",
        _LATE,
        (*_aware(384), *_layer(4, 128, 384, 1), Bottleneck(3, 128, 768, 2)),
        (Bottleneck(1, 128, 256),),
    ),
}
"""Filters of "downsampling" and "late_concat" were not found: docs/papers.md 2.3 derives them."""


def wiring(name: str) -> Wiring:
    """The row of WIRINGS. Raises: IcmError if there is none."""
    if name not in WIRINGS:
        raise IcmError(f"no wiring {name!r}; choose one of {', '.join(WIRINGS)}")
    return WIRINGS[name]


class CoefficientTrunk(ops.Module):
    """Coefficients of the three planes to the last feature of ResNet-50.

    Attributes:
      name_of_wiring: key of WIRINGS. width: factor of all channels, 1 in the paper. dtype: of
      computation; parameters and statistics are float32.
    """

    name_of_wiring: str
    width: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, luma, blue, red, train: bool) -> jax.Array:
        """De-quantised coefficients, float [N, h, w, 64], twice [N, ceil(h/2), ceil(w/2), 64] ->
        dtype [N, ceil(h/4), ceil(w/4), 2048 · width]."""
        row = wiring(self.name_of_wiring)
        if row.merge == "late":
            luma = BatchNorm(dtype=self.dtype, name="luma_bn")(luma, train)
            chroma = jnp.concatenate([blue, red], axis=-1)
            chroma = BatchNorm(dtype=self.dtype, name="chroma_bn")(chroma, train)
            luma = self._blocks(luma, row.luma, "luma", train)
            chroma = self._blocks(chroma, row.chroma, "chroma", train)
            x = jnp.concatenate([luma, chroma], axis=-1)
        else:
            if row.merge == "downsample":
                luma = Conv(luma.shape[-1], 3, 2, dtype=self.dtype, name="down")(luma)
            elif row.merge == "deconvolve":
                blue, red = (self._deconvolved(p, n, luma) for p, n in ((blue, "b"), (red, "r")))
            else:
                blue, red = (_doubled(plane, luma) for plane in (blue, red))
            planes = [plane.astype(jnp.float32) for plane in (luma, blue, red)]
            x = jnp.concatenate(planes, axis=-1)
            x = BatchNorm(dtype=self.dtype, name="bn")(x, train)
        return self._blocks(x, row.rest, "rest", train)

    def _blocks(self, x, blocks, name, train):
        for number, (kernel, middle, out, stride) in enumerate(blocks):
            x = Block(
                "bottleneck",
                max(1, round(middle * self.width)),
                stride=stride,
                stride_in_1x1=True,
                dtype=self.dtype,
                kernel=kernel,
                out=max(1, round(out * self.width)),
                name=f"{name}{number}",
            )(x, train)
        return x

    def _deconvolved(self, plane, name, like):
        """A transposed convolution, 2×2 with stride 2: no two windows overlap."""
        up = Conv(4 * plane.shape[-1], 1, dtype=self.dtype, name=f"up_{name}")(plane)
        return ops.crop_to(ops.depth_to_space(up), *like.shape[1:3])


def _doubled(plane: jax.Array, like: jax.Array) -> jax.Array:
    """Nearest neighbour to the sides of `like`."""
    doubled = jnp.repeat(jnp.repeat(plane, 2, axis=1), 2, axis=2)
    return doubled[:, : like.shape[1], : like.shape[2]]


class BlockTransform(ops.Module):
    """8×8 convolution with stride 8, one plane of samples to 64 coefficients a block.

    Attributes:
      basis: "dct" begins as JPEG's own transform, "random" as He et al. initialise. frozen: no
      gradient reaches the filters.
    """

    basis: str = "dct"
    frozen: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float [N, H, W], samples minus 128, sides multiples of 8 -> dtype [N, H/8, W/8, 64].

        Raises: IcmError for an unknown basis.
        """
        if self.basis not in ("dct", "random"):
            raise IcmError(f"unknown basis {self.basis!r}; choose dct or random")
        random = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        init = (lambda *_: jnp.asarray(dct_filters())) if self.basis == "dct" else random
        kernel = self.param("kernel", init, (64, 64)).astype(self.dtype)
        kernel = jax.lax.stop_gradient(kernel) if self.frozen else kernel
        n, h, w = x.shape
        blocks = x.astype(self.dtype).reshape(n, h // 8, 8, w // 8, 8).transpose(0, 1, 3, 2, 4)
        return jnp.matmul(blocks.reshape(n, h // 8, w // 8, 64), kernel)


def dct_filters() -> np.ndarray:
    """float32 [64, 64]: samples of a block by rows -> its coefficients by rows (T.81, A.3.3)."""
    basis = scipy.fft.dctn(np.eye(64).reshape(64, 8, 8), axes=(1, 2), norm="ortho")
    return np.asarray(basis).reshape(64, 64).astype(np.float32)
