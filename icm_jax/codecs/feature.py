"""Omni-ICM's two codecs of backbone features (Feng et al. 2022; docs/papers.md 5).

    image -> head -> f -> filter: encoder -> y -> decoder -> f'        (stage 1, factorised prior)
    image -> head -> f -> filter -> f' -> analysis -> y, z -> synthesis -> f_hat      (stage 2)

The head is a frozen ResNet front with running BatchNorm statistics. Parameters live under `head`,
`filter` and `feature_codec`.
"""

import functools

import jax
import jax.numpy as jnp

from icm_jax import entropy, ops
from icm_jax.codecs import priors
from icm_jax.codecs.codec import Codec, Outputs, builder, method_of, require_dtype
from icm_jax.codecs.tiles import Back, Tiling
from icm_jax.errors import IcmError
from icm_jax.nets import resnet
from icm_jax.nets.entropy_parameters import (
    HYPER_SYNTHESIS,
    HyperSynthesis,
    hyper_synthesis_params,
    hyper_synthesis_weights,
)
from icm_jax.nets.transforms import Analysis, HyperAnalysis, Synthesis


class InformationFilter(ops.Module):
    """Encoder (÷8), factorised prior and decoder of stage 1."""

    features: int
    channels: int
    widths: tuple[int, int, int]
    dtype: str = "float32"

    def setup(self):
        dtype = jnp.dtype(self.dtype)
        self.encoder = Analysis(self.channels, self.widths, dtype=dtype)
        self.prior = entropy.Factorised()
        self.decoder = Synthesis(self.features, self.widths, dtype=dtype)

    def __call__(self, f):
        y = self.encoder(f)
        return self.prior(y), self.decode(y, f.shape[1:3])

    def decode(self, y, shape):
        return ops.crop_to(self.decoder(y), *shape)


class FeatureCodec(ops.Module):
    """Analysis (÷4), scale hyperprior and synthesis of stage 2."""

    features: int
    channels: int
    widths: tuple[int, int]
    hyper_channels: int

    def setup(self):
        self.analysis = Analysis(self.channels, self.widths, kernel=5)
        self.synthesis = Synthesis(self.features, self.widths)
        self.hyper_analysis = HyperAnalysis(self.hyper_channels)
        self.hyper_synthesis = HyperSynthesis(self.hyper_channels, self.channels)
        self.prior = entropy.Factorised()

    def __call__(self, f):
        y, z = self.encode(f)
        return self.prior(z), self.hyper_synthesis(z), self.decode(y, f.shape[1:3])

    def encode(self, f):
        y = self.analysis(f)
        return y, self.hyper_analysis(y)

    def decode(self, y, shape):
        return ops.crop_to(self.synthesis(y), *shape)


@builder("omni_filter")
def filter_codec(
    variant: str,
    width: int,
    channels: int,
    widths: tuple[int, int, int],
    dtype: str = "float32",
) -> Codec:
    """The information filter as a codec of its own: segment y, output "feature" (f').

    `dtype` is that of the filter's encoder and decoder; y, bits and f' are float32.
    """
    _require_numbers("the filter's", (width, channels, *widths))
    require_dtype(dtype)
    head = resnet.Head(variant, width)
    module = InformationFilter(resnet.feature_channels(variant, width), channels, widths, dtype)

    run = method_of(module, "filter")

    def init(key, image):
        f, variables = _init_head(head, key, image)
        variables["params"]["filter"] = module.init(jax.random.fold_in(key, 1), f)["params"]
        return variables

    return Codec(
        parts=("head", "filter"),
        init=init,
        analyse=lambda variables, inputs: {
            "y": run(variables, _feature(head, variables, inputs), method="encoder")
        },
        segments=(
            priors.factorised(
                "y",
                priors.halvings(5, channels),
                functools.partial(run, method="prior"),
                ("filter", "prior"),
            ),
        ),
        outputs=Outputs(feature=_feature_of(run)),
    )


@builder("omni_feature")
def feature_codec(
    variant: str,
    width: int,
    filter_channels: int,
    filter_widths: tuple[int, int, int],
    channels: int,
    widths: tuple[int, int],
    hyper_channels: int,
) -> Codec:
    """Codec of the filtered feature f': segments z and y, output "feature" (f_hat).

    `analyse` also takes {"feature": f'} or {"latent": y}, where they have been computed already.
    """
    _require_numbers("the codec's", (width, channels, *widths, hyper_channels))
    inner = filter_codec(variant, width, filter_channels, filter_widths)
    features = resnet.feature_channels(variant, width)
    module = FeatureCodec(features, channels, widths, hyper_channels)

    run = method_of(module, "feature_codec")

    def front(variables, inputs):
        return run(variables, filtered(inner, variables, inputs), method="analysis")

    def analyse(variables, inputs):
        y = inputs["latent"] if "latent" in inputs else front(variables, inputs)
        return {"z": run(variables, y, method="hyper_analysis"), "y": y}

    def init(key, image):
        variables = inner.init(key, image)
        f = jnp.zeros((1, ops.halved(image.shape[1], 2), ops.halved(image.shape[2], 2), features))
        own = module.init(jax.random.fold_in(key, 2), f)["params"]
        variables["params"]["feature_codec"] = own
        return variables

    network = priors.Network(
        HYPER_SYNTHESIS,
        lambda variables, inputs: run(variables, inputs["z"], method="hyper_synthesis"),
        lambda params: hyper_synthesis_weights(params, channels),
        ("feature_codec", "hyper_synthesis"),
        params=lambda weights: hyper_synthesis_params(weights, channels),
    )
    bits = functools.partial(run, method="prior")
    path = ("feature_codec", "prior")
    z = priors.factorised("z", priors.halvings(6, hyper_channels), bits, path)
    y = priors.conditional("y", priors.halvings(4, channels), network)
    parts = ("head", "filter", "feature_codec")
    outputs = Outputs(feature=_feature_of(run))
    return Codec(parts, init, analyse, (z, y), outputs, tiling=_tiling(front, variant))


def _tiling(front, variant: str) -> Tiling:
    """Each 3×3 convolution looks as far as an element of what it takes, each 5×5 one twice as far:
    those of the head, of the filter there and back, and of the analysis; then the synthesis."""
    block, depths = resnet.stages(variant)
    head = 3 + 2 + 4 * depths[0] * {"basic": 2, "bottleneck": 1}[block]
    there, again = 3 * (4 + 8 + 16), 32 + 3 * 16 + 3 * 8 + 2 * 4
    halo = head + there + again + 4 * (4 + 8)
    back = (Back("feature", ("y",), 4, -(-(16 + 3 * 8 + 2 * 4) // 16)),)
    return Tiling(("y",), front, 16, 1, halo + -halo % 16, back, rest=4, rest_halo=8)


def _feature_of(run):
    """The output "feature": y decoded to the size that a head gives of the image."""

    def feature_of(variables, decoded, shape):
        sides = ops.halved(shape[0], 2), ops.halved(shape[1], 2)
        with ops.ending_with(decoded["y"]):
            return run(variables, decoded["y"], sides, method="decode")

    return feature_of


def filtered(inner: Codec, variables, inputs) -> jax.Array:
    """f' of {"image"} through head and filter in rounding mode, or {"feature"} as it is."""
    if "feature" in inputs:
        return inputs["feature"]
    shape = inputs["image"].shape[1:3]
    latents = jax.tree.map(ops.quantise, inner.analyse(variables, inputs))
    return inner.outputs["feature"](variables, latents, shape)


def _require_numbers(whose, numbers):
    if min(numbers) < 1:
        raise IcmError(f"{whose} widths and channels are at least 1, not {numbers}")


def _feature(head, variables, inputs):
    if "feature" in inputs:
        return inputs["feature"]
    own = {name: tree["head"] for name, tree in variables.items() if "head" in tree}
    return head.apply(own, ops.normalise(inputs["image"]), train=False)


def _init_head(head, key, image):
    f, own = head.init_with_output(key, ops.normalise(image[:1]), train=False)
    return f, {name: {"head": tree} for name, tree in own.items()}
