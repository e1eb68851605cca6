"""Image codecs: factorised prior, scale hyperprior, mean-and-scale hyperprior.

    x -> analysis -> y · gain -> round -> y_hat / gain -> synthesis -> x_hat
                     |                     ^
                     +-> hyper-analysis -> z_hat -> hyper-synthesis -> scale index (and mean) of y

Ballé et al. 2017 (factorised), Ballé et al. 2018 (scale hyperprior), Minnen et al. 2018 without its
context model (mean and scale). One model serves a range of rates by gain units (Cui et al. 2021,
"Asymmetric gained deep image compression with continuous rate adaptation"): per quality level a
vector that multiplies y's channels and one that divides them again, interpolated between levels.
Parameters lie under `image_codec`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from icm_jax import entropy, ops
from icm_jax.codecs import priors
from icm_jax.codecs.codec import Codec, Outputs, Segment, builder, method_of, require_dtype
from icm_jax.codecs.tiles import Back, Tiling
from icm_jax.errors import IcmError
from icm_jax.nets.entropy_parameters import (
    HYPER_SYNTHESIS,
    HyperSynthesis,
    hyper_synthesis_params,
    hyper_synthesis_weights,
)
from icm_jax.nets.transforms import HyperAnalysis, ImageAnalysis, ImageSynthesis

PART = "image_codec"
KINDS = ("factorised", "scale_hyperprior", "mean_scale_hyperprior")
_FIRST_GAIN, _GAIN_SPREAD = 6.0, 10.0


class Gain(ops.Module):
    """Two vectors per quality level: the gain of y's channels, and what takes it back.

    Attributes:
      levels: of quality, at equal distances from 0 to 1; between two, logarithms are interpolated.
      channels: of y.
    """

    levels: int
    channels: int

    def setup(self):
        shape = (self.levels, self.channels)
        self.log_gain = self.param("log_gain", self._initial, shape)
        self.log_inverse = self.param("log_inverse", self._initial, shape)

    def _initial(self, key, shape):
        at = jnp.linspace(-0.5, 0.5, shape[0]) if shape[0] > 1 else jnp.zeros((1,))
        rows = math.log(_FIRST_GAIN) + math.log(_GAIN_SPREAD) * at
        return jnp.broadcast_to(rows[:, None], shape)

    def __call__(self, y, quality):
        """y float [N, h, w, C] with its gain; quality float32 [N] or None for a single level."""
        return y * self.at(quality)

    def undo(self, y, quality):
        return y / self.inverse(quality)

    def at(self, quality):
        """The gain, float32 [N, 1, 1, C]."""
        return self._at(self.log_gain, quality)

    def inverse(self, quality):
        return self._at(self.log_inverse, quality)

    def _at(self, rows, quality):
        if quality is None:
            return jnp.exp(rows[:1]).reshape(1, 1, 1, -1)
        place = jnp.clip(quality, 0.0, 1.0) * (self.levels - 1)
        distance = jnp.abs(place[:, None] - jnp.arange(self.levels, dtype=jnp.float32)[None, :])
        weights = jnp.maximum(1.0 - distance, 0.0)  # [N, levels], two of them not zero
        return jnp.exp(jnp.matmul(weights, rows, precision="highest"))[:, None, None, :]


class ImageCodec(ops.Module):
    """All networks of a codec; `hyper` and `mean` choose the kind."""

    widths: tuple[int, int, int, int]
    channels: int
    levels: int
    hyper: bool
    mean: bool
    last: int
    dtype: str

    def setup(self):
        dtype = jnp.dtype(self.dtype)
        *inner, side = self.widths
        self.analysis = ImageAnalysis(self.channels, tuple(inner), self.last, dtype)
        self.synthesis = ImageSynthesis(tuple(inner), self.last, dtype)
        self.gain = Gain(self.levels, self.channels)
        self.prior = entropy.Factorised()  # of z, or of y without a hyperprior
        if self.hyper:
            self.hyper_analysis = HyperAnalysis(side)
            self.hyper_synthesis = HyperSynthesis(side, self.channels, self.mean)

    def __call__(self, x, quality):
        latents = self.latents(self.front(x, quality))
        parts = [self.prior(latents["z" if self.hyper else "y"])]
        if self.hyper:
            parts.append(self.hyper_synthesis(latents["z"]))
        return self.decode(latents, quality), parts

    def front(self, x, quality):
        return self.gain(self.analysis(x), quality)

    def latents(self, y):
        return {"z": self.hyper_analysis(y), "y": y} if self.hyper else {"y": y}

    def decode(self, latents, quality):
        return self.synthesis(self.gain.undo(latents["y"], quality))


@builder("image")
def image_codec(
    kind: str,
    width: int | tuple[int, int, int, int],
    channels: int,
    levels: int = 1,
    dtype: str = "float32",
    last: int = 5,
) -> Codec:
    """The codec of a kind in `KINDS`; output "image", float32 on 0...255.

    Args:
      width: N, of inner layers; or four numbers: of those at 1/2, 1/4 and 1/8 of the image's
        sides, and of the hyperprior. channels: M, of the latent y.
      levels: of quality; with more than one the rate is chosen when encoding.
      dtype: of analysis and synthesis.
      last: side of the kernels between 1/8 and 1/16 of the image's sides, the largest of all.

    Raises: IcmError for an unknown kind, numbers below 1, an unknown dtype, or
      kernels that are not 3 or 5.
    """
    widths = width if isinstance(width, tuple) else (width,) * 4
    if kind not in KINDS or len(widths) != 4 or min(*widths, channels, levels) < 1:
        raise IcmError(
            f"no image codec {kind!r} with width {width}, channels {channels}, levels {levels}; "
            f"kinds are {', '.join(KINDS)}, width is one number or four, the numbers at least 1"
        )
    if last not in (3, 5):
        raise IcmError(f"the kernels of an image codec's last layer have sides 3 or 5, not {last}")
    require_dtype(dtype)
    hyper, mean = kind != "factorised", kind == "mean_scale_hyperprior"
    module = ImageCodec(widths, channels, levels, hyper, mean, last, dtype)

    def segments(run):
        return _segments(run, widths[-1], channels, hyper, mean)

    def tiling(front):
        # Four layers with windows of 5 look 2 + 4 + 8 + 16 pixels far, and back 1 + 1/2 + ... < 2;
        # from y to z it is 1 + 2 + 4.
        rest = 4 if hyper else 1
        back = (Back("image", ("y",), 1, halo=2),)
        return Tiling(("y",), front, 16, 16, halo=32, back=back, rest=rest, rest_halo=8)

    return of_module(module, PART, segments, tiling)


def of_module(
    module: Any,
    part: str,
    segments: Callable[[Callable], tuple[Segment, ...]],
    tiling: Callable[[Callable], Tiling],
) -> Codec:
    """The image codec of a module with a `Gain`, output "image".

    Args:
      module: with the field levels, and methods front: (float32 [N, H, W, 3], its sides multiples
        of 16, quality) -> y with its gain; latents: y -> latents by name; decode: (latents by name,
        quality) -> the image.
      part: top-level name of its parameters.
      segments: (variables, ..., method=name) of `method_of` -> the codec's segments.
      tiling: (variables, inputs) -> y, that of `Tiling` -> the codec's tiling.
    """
    run = method_of(module, part)

    def front(variables, inputs):
        x = ops.pad_to(inputs["image"], 16).astype(jnp.float32)
        return run(variables, x, inputs.get("quality"), method="front")

    def analyse(variables, inputs):
        y = inputs["latent"] if "latent" in inputs else front(variables, inputs)
        return run(variables, y, method="latents")

    def image_of(variables, decoded, shape):
        image = run(variables, decoded, decoded.get("quality"), method="decode")
        return ops.crop_to(image, *shape)

    def init(key, image):
        quality = None if module.levels == 1 else jnp.zeros((1,))
        return {"params": {part: module.init(key, jnp.zeros((1, 64, 64, 3)), quality)["params"]}}

    return Codec(
        parts=(part,),
        init=init,
        analyse=analyse,
        segments=segments(run),
        outputs=Outputs(image=image_of),
        qualities=module.levels > 1,
        tiling=tiling(front),
    )


def _segments(run, side: int, channels: int, hyper: bool, mean: bool) -> tuple[Segment, ...]:
    bits = functools.partial(run, method="prior")
    if not hyper:
        return (priors.factorised("y", priors.halvings(4, channels), bits, (PART, "prior")),)
    network = priors.Network(
        HYPER_SYNTHESIS,
        lambda variables, inputs: run(variables, inputs["z"], method="hyper_synthesis"),
        lambda params: hyper_synthesis_weights(params, channels),
        (PART, "hyper_synthesis"),
        params=lambda weights: hyper_synthesis_params(weights, channels),
    )
    return (
        priors.factorised("z", priors.halvings(6, side), bits, (PART, "prior")),
        priors.conditional("y", priors.halvings(4, channels), network, mean=mean),
    )
