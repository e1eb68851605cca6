"""The image codecs of CompressAI's zoo (Bégaint et al. 2020), layer for layer, for its weights.

    x -> analysis -> y -> round(y - mean) + mean -> y_hat -> synthesis -> x_hat
                     |                     ^
                     +-> hyper-analysis -> z_hat -> hyper-synthesis -> scale (and mean) of y

They differ from those of `icm_jax.codecs.hyperprior` in this: pixels are on 0...1, there are no
gain units, the hyper-synthesis says scales rather than their indexes and has transposed
convolutions, the densities of z are deeper and have medians, and a mean comes with a hyperprior of
signed latents and leaky ReLU. Parameters lie under `compressai`.
"""

import functools
import math

import jax.numpy as jnp

from icm_jax import entropy, ops
from icm_jax.codecs import priors
from icm_jax.codecs.codec import Codec, Segment, builder, require_dtype
from icm_jax.codecs.hyperprior import of_module
from icm_jax.codecs.tiles import Back, Tiling
from icm_jax.errors import IcmError
from icm_jax.nets.entropy_parameters import (
    ScaleSynthesis,
    scale_synthesis_nodes,
    scale_synthesis_params,
    scale_synthesis_weights,
)
from icm_jax.nets.transforms import HyperAnalysis, ImageAnalysis, ImageSynthesis

PART = "compressai"
ARCHITECTURES = ("bmshj2018-factorized", "bmshj2018-hyperprior", "mbt2018-mean")
DENSITY = (3, 3, 3, 3)
"""Widths of the hidden layers of each channel's density."""
MOST = -math.log2(1e-9)
"""Bits of an element: CompressAI lets no likelihood be less."""


class ZooCodec(ops.Module):
    """All networks of a codec; attributes as of `compressai_codec`."""

    architecture: str
    width: int
    channels: int
    dtype: str
    levels: int = 1

    @property
    def hyper(self) -> bool:
        return self.architecture != ARCHITECTURES[0]

    @property
    def mean(self) -> bool:
        return self.architecture == ARCHITECTURES[2]

    def setup(self):
        dtype, widths = jnp.dtype(self.dtype), (self.width,) * 3
        self.analysis = ImageAnalysis(self.channels, widths, dtype=dtype, middle=0.0)
        self.synthesis = ImageSynthesis(widths, dtype=dtype, middle=0.0)
        self.prior = entropy.Factorised(DENSITY)  # of z, or of y without a hyperprior
        coded = self.width if self.hyper else self.channels
        self.median = self.param("median", lambda _: jnp.zeros((coded,)))
        if self.hyper:
            inner = self.width, self.width
            inner = (self.channels, self.channels * 3 // 2) if self.mean else inner
            self.hyper_analysis = HyperAnalysis(self.width, signed=self.mean)
            self.hyper_synthesis = ScaleSynthesis(inner, self.channels, self.mean)

    def __call__(self, x, quality):
        latents = self.latents(self.front(x, quality))
        parts = [self.prior(latents["z" if self.hyper else "y"])]
        if self.hyper:
            parts.append(self.hyper_synthesis(latents["z"]))
        return self.decode(latents, quality), parts

    def front(self, x, quality):
        del quality
        return self.analysis(x)

    def latents(self, y):
        return {"z": self.hyper_analysis(y), "y": y} if self.hyper else {"y": y}

    def decode(self, latents, quality):
        del quality
        return self.synthesis(latents["y"])


@builder("compressai")
def compressai_codec(architecture: str, width: int, channels: int, dtype: str = "float32") -> Codec:
    """The codec of a name in `ARCHITECTURES`; output "image", float32 on 0...255. It has one rate.

    Its latents and pictures are those of CompressAI where the sides of an image are multiples of
    64; where not, CompressAI leaves padding to the user, and here the last row and column go on.

    Args:
      width: N, of inner layers and z. channels: M, of y. dtype: of analysis and synthesis.

    Raises: IcmError for an unknown architecture, numbers below 1, or an unknown dtype.
    """
    if architecture not in ARCHITECTURES or min(width, channels) < 1:
        raise IcmError(
            f"no codec {architecture!r} of CompressAI with width {width}, channels {channels}; "
            f"there are {', '.join(ARCHITECTURES)}, the numbers at least 1"
        )
    require_dtype(dtype)
    module = ZooCodec(architecture, width, channels, dtype)

    def tiling(front):
        # As of `hyperprior.image_codec`, whose layers look as far.
        back = (Back("image", ("y",), 1, halo=2),)
        rest = 4 if module.hyper else 1
        return Tiling(("y",), front, 16, 16, halo=32, back=back, rest=rest, rest_halo=8)

    return of_module(module, PART, functools.partial(_segments, module), tiling)


def _segments(module: ZooCodec, run) -> tuple[Segment, ...]:
    def bits(variables, latent):
        return ops.upper_bound(run(variables, latent, method="prior"), MOST)

    own = bits, (PART, "prior"), (PART, "median")
    y = priors.halvings(4, module.channels)
    if not module.hyper:
        return (priors.centred("y", y, *own),)
    network = priors.Network(
        scale_synthesis_nodes(module.mean),
        lambda variables, inputs: run(variables, inputs["z"], method="hyper_synthesis"),
        scale_synthesis_weights,
        (PART, "hyper_synthesis"),
        params=scale_synthesis_params,
    )
    return (
        priors.centred("z", priors.halvings(6, module.width), *own),
        priors.conditional("y", y, network, mean=module.mean, scales=True, most=MOST),
    )
