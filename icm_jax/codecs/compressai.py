"""The image codecs of CompressAI's zoo (Bégaint et al. 2020), layer for layer, for its weights.

    x -> analysis -> y -> round(y - mean) + mean -> y_hat -> synthesis -> x_hat
                     |                     ^
                     +-> hyper-analysis -> z_hat -> hyper-synthesis -> scale (and mean) of y

They differ from those of `icm_jax.codecs.hyperprior` in this: pixels are on 0...1, there are no
gain units, the hyper-synthesis says scales rather than their indexes and has transposed
convolutions, the densities of z are deeper and have medians, and a mean comes with a hyperprior of
signed latents and leaky ReLU. In `SERIAL` ones y's own context tells scales and means as well
(Minnen et al. 2018), and the last has the transforms of Cheng et al. 2020 without attention.
Parameters lie under `compressai`.
"""

import functools
import math

import flax.linen as nn
import jax.numpy as jnp

from icm_jax import entropy, ops
from icm_jax.codecs import causal, priors
from icm_jax.codecs.codec import Codec, Segment, builder, require_dtype
from icm_jax.codecs.hyperprior import of_module
from icm_jax.codecs.tiles import Back, Tiling
from icm_jax.errors import IcmError
from icm_jax.nets import context, integer
from icm_jax.nets.entropy_parameters import (
    ScaleSynthesis,
    scale_synthesis_nodes,
    scale_synthesis_params,
    scale_synthesis_weights,
)
from icm_jax.nets.transforms import (
    DeepHyperAnalysis,
    HyperAnalysis,
    ImageAnalysis,
    ImageSynthesis,
    ResidualAnalysis,
    ResidualSynthesis,
)

PART = "compressai"
SERIAL = ("mbt2018", "cheng2020-anchor")
"""With a context model."""
ARCHITECTURES = ("bmshj2018-factorized", "bmshj2018-hyperprior", "mbt2018-mean", *SERIAL)
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

    @property
    def serial(self) -> bool:
        return self.architecture in SERIAL

    @property
    def residual(self) -> bool:
        return self.architecture == SERIAL[1]

    @nn.nowrap
    def nodes(self) -> tuple[integer.Node, ...]:
        """Of the networks that tell scales and means, of a `serial` codec."""
        hyper = context.subpixel_hyper if self.residual else context.transposed_hyper
        return context.nodes_of(hyper(self.channels), self.channels)

    def setup(self):
        dtype, widths = jnp.dtype(self.dtype), (self.width,) * 3
        if self.residual:
            self.analysis = ResidualAnalysis(self.channels, widths, dtype, middle=0.0)
            self.synthesis = ResidualSynthesis(widths, dtype, middle=0.0, first=False)
        else:
            self.analysis = ImageAnalysis(self.channels, widths, dtype=dtype, middle=0.0)
            self.synthesis = ImageSynthesis(widths, dtype=dtype, middle=0.0)
        self.prior = entropy.Factorised(DENSITY)  # of z, or of y without a hyperprior
        coded = self.width if self.hyper else self.channels
        self.median = self.param("median", lambda _: jnp.zeros((coded,)))
        if self.residual:
            self.hyper_analysis = DeepHyperAnalysis(self.width)
        elif self.hyper:
            self.hyper_analysis = HyperAnalysis(self.width, signed=self.mean or self.serial)
        if self.serial:
            self.parameters = context.ContextNodes(self.nodes(), self.channels)
        elif self.hyper:
            inner = self.width, self.width
            inner = (self.channels, self.channels * 3 // 2) if self.mean else inner
            self.hyper_synthesis = ScaleSynthesis(inner, self.channels, self.mean)

    def __call__(self, x, quality):
        latents = self.latents(self.front(x, quality))
        parts: list = [self.prior(latents["z" if self.hyper else "y"])]
        if self.serial:
            parts.append(self.parameters(latents["z"]))
        elif self.hyper:
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

    Raises: IcmError for an unknown architecture, numbers below 1 or, of cheng2020-anchor, that are
      not equal, or an unknown dtype.
    """
    fits = min(width, channels) >= 1 and (architecture != SERIAL[1] or width == channels)
    if architecture not in ARCHITECTURES or not fits:
        raise IcmError(
            f"no codec {architecture!r} of CompressAI with width {width}, channels {channels}; "
            f"there are {', '.join(ARCHITECTURES)}, the numbers at least 1, and of the last equal"
        )
    require_dtype(dtype)
    module = ZooCodec(architecture, width, channels, dtype)

    def tiling(front):
        # As of `hyperprior.image_codec`, whose layers look as far; residual ones 7 + 14 + 28 + 8
        # pixels, back 3 + 7/4 + 7/8 + 3/8 + ... < 7, and from y to z 1 + 1 + 1 + 2 + 2.
        halo, of_back = (64, 7) if module.residual else (32, 2)
        back = (Back("image", ("y",), 1, of_back),)
        rest = 4 if module.hyper else 1
        return Tiling(("y",), front, 16, 16, halo, back, rest=rest, rest_halo=8)

    return of_module(module, PART, functools.partial(_segments, module), tiling)


def _segments(module: ZooCodec, run) -> tuple[Segment, ...]:
    def bits(variables, latent):
        return ops.upper_bound(run(variables, latent, method="prior"), MOST)

    own = bits, (PART, "prior"), (PART, "median")
    y = priors.halvings(4, module.channels)
    if not module.hyper:
        return (priors.centred("y", y, *own),)
    z = priors.centred("z", priors.halvings(6, module.width), *own)
    if module.serial:
        return z, causal.segment("y", y, module.nodes(), (PART, "parameters"), most=MOST)
    network = priors.Network(
        scale_synthesis_nodes(module.mean),
        lambda variables, inputs: run(variables, inputs["z"], method="hyper_synthesis"),
        scale_synthesis_weights,
        (PART, "hyper_synthesis"),
        params=scale_synthesis_params,
    )
    return z, priors.conditional("y", y, network, mean=module.mean, scales=True, most=MOST)
