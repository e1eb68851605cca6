"""An image codec with contexts across space and channels, decoded in a fixed number of passes.

    x -> analysis -> y · gain -> slices y0, y1, ... -> y_hat / gain -> synthesis -> x_hat
                        |             ^
                        +-> z_hat ----+ z, the slices before, and of this one the black squares

ELIC (He et al. 2022) made small: uneven slices of y's channels, each a segment with an integer
network of its own; the first, which have most of the bits, in two passes of a checkerboard (He et
al. 2021, "Checkerboard context model for efficient learned image compression"), whose second pass
sees the first. So there are a few passes, whatever the size of an image. Rates by gain units, as in
`icm_jax.codecs.hyperprior`. Parameters lie under `space_channel`.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from icm_jax import entropy, ops
from icm_jax.codecs import priors
from icm_jax.codecs.codec import Codec, Segment, builder, require_dtype
from icm_jax.codecs.hyperprior import Gain, of_module
from icm_jax.codecs.tiles import Back, Tiling
from icm_jax.errors import IcmError
from icm_jax.nets.bottleneck import (
    BlockAnalysis,
    BlockSynthesis,
    FeatureSynthesis,
    SignedHyperAnalysis,
)
from icm_jax.nets.entropy_parameters import EntropyParameters
from icm_jax.nets.integer import Node

PART = "space_channel"
DEEPEST = 16
"""Blocks at a scale, and slices."""
HYPER_WIDTH = 64
"""Of the middle of the hyper-analysis."""


def checkerboard(shape: tuple[int, ...]) -> np.ndarray:
    """The black squares first, then the white ones, whose neighbours are known by then."""
    rows, columns, _ = np.indices(shape)
    return (rows + columns) % 2


def slice_names(slices: tuple[int, ...], latent: str = "y") -> list[str]:
    """Of the segments: y0, y1, ..."""
    return [f"{latent}{number}" for number in range(len(slices))]


def nodes_of(
    slices: tuple[int, ...],
    checkered: int,
    number: int,
    side: int,
    latent: str = "y",
    beside: tuple[str, ...] = (),
) -> tuple[Node, ...]:
    """The network that gives the scale indexes and means of one slice.

    Args: slices: channels of each. checkered: of them, see `space_channel_codec`. number: of the
      slice. side: channels of what it makes of z. latent, beside: of `SpaceChannelCodec`.
    """
    names, size = slice_names(slices, latent), slices[number]
    nodes = [
        Node("hyper_0", ("z",), "leaky_relu", up=True, features=4 * side),
        Node("hyper_1", ("hyper_0",), "leaky_relu", up=True, features=4 * side),
    ]
    seen = ["hyper_1"]
    if number:
        nodes.append(Node("channels", tuple(names[:number]), "leaky_relu", features=64))
        seen.append("channels")
    if number < checkered:
        nodes.append(Node("space", (names[number],), "leaky_relu", features=48, side=5))
        seen += ["space", "known"]
    if beside:  # last, so that weights without it are the first rows of those with it
        nodes.append(Node("beside", beside, "leaky_relu", features=96))
        seen.append("beside")
    joint = max(96, min(size + 64, 160))
    nodes.append(Node("joint", tuple(seen), "leaky_relu", features=joint, side=1))
    nodes.append(Node("last", ("joint",), features=2 * size, side=1))
    return tuple(nodes)


class SpaceChannelCodec(ops.Module):
    """All networks of a codec; fields are those of `space_channel_codec`, and in layers of a file:

    Attributes:
      latent: what the names of its slices begin with. beside: latents of another layer that its
        priors see. feature: of a detector's feature that is decoded in place of an image, its
        channels and stride.
    """

    widths: tuple[int, int]
    slices: tuple[int, ...]
    checkered: int
    blocks: tuple[int, int, int]
    back_blocks: tuple[int, int, int]
    inner: int
    hyper_channels: int
    side: int
    levels: int
    dtype: str
    latent: str = "y"
    beside: tuple[str, ...] = ()
    feature: tuple[int, int] | None = None

    def setup(self):
        channels = sum(self.slices)
        widths, dtype = (*self.widths, channels), jnp.dtype(self.dtype)
        self.analysis = BlockAnalysis(widths, self.blocks, self.inner, dtype)
        back = widths, self.back_blocks, self.inner, dtype
        self.synthesis = (
            BlockSynthesis(*back) if self.feature is None else FeatureSynthesis(*back, self.feature)
        )
        self.gain = Gain(self.levels, channels)
        self.hyper_analysis = SignedHyperAnalysis(HYPER_WIDTH, self.hyper_channels)
        self.prior = entropy.Factorised()
        self.parameters = [self.parameters_of(number) for number in range(len(self.slices))]

    @property
    def names(self) -> list[str]:
        return slice_names(self.slices, self.latent)

    @nn.nowrap
    def parameters_of(self, number: int) -> EntropyParameters:
        nodes = nodes_of(self.slices, self.checkered, number, self.side, self.latent, self.beside)
        return EntropyParameters(nodes, self.slices[number], mean=True)

    def __call__(self, x, quality):
        latents = self.latents(self.front(x, quality))
        parts = [self.prior_bits(latents["z"])]
        for number, name in enumerate(self.names):
            known = {"known": jnp.ones_like(latents[name])}
            parts.append(self.of_slice(number, latents | known))
        return self.decode(latents, quality), parts

    def front(self, x, quality):
        return self.gain(self.analysis(x), quality)

    def latents(self, y):
        parts = jnp.split(y, np.cumsum(self.slices)[:-1], axis=-1)
        named = dict(zip(self.names, parts, strict=True))
        return {"z": self.hyper_analysis(y)} | named

    def prior_bits(self, latent):
        return self.prior(latent)

    def of_slice(self, number, inputs):
        return self.parameters[number](inputs)

    def decode(self, latents, quality):
        y = jnp.concatenate([latents[name] for name in self.names], axis=-1)
        return self.synthesis(self.gain.undo(y, quality))


@builder("space_channel")
def space_channel_codec(
    widths: tuple[int, int],
    slices: tuple[int, ...],
    checkered: int = 2,
    blocks: tuple[int, int, int] = (5, 3, 3),
    back_blocks: tuple[int, int, int] = (3, 3, 3),
    inner: int = 64,
    hyper_channels: int = 32,
    side: int = 24,
    levels: int = 1,
    dtype: str = "float32",
) -> Codec:
    """The codec; output "image", float32 on 0...255.

    Args:
      widths: channels at 1/4 and 1/8 of the image's sides. slices: of the channels of y, at 1/16,
        in the order of decoding. checkered: how many of them, from the first on, take two passes.
      blocks, back_blocks: bottlenecks at 1/4, 1/8, 1/16 of analysis and of synthesis. inner: width
        of their middle.
      hyper_channels: of z. side: channels of what the integer networks make of z.
      levels: of quality; with more than one the rate is chosen when encoding.
      dtype: of analysis and synthesis.

    Raises: IcmError for other counts of numbers, numbers below 1 or too large, or an unknown dtype.
    """
    module = SpaceChannelCodec(
        widths, slices, checkered, blocks, back_blocks, inner, hyper_channels, side, levels, dtype
    )
    check_fields(module)

    segments, tiling = functools.partial(_segments, module), functools.partial(_tiling, module)
    return of_module(module, PART, segments, tiling)


def check_fields(module: SpaceChannelCodec) -> None:
    """Raises: IcmError for fields that no codec has."""
    widths, slices, blocks, back = module.widths, module.slices, module.blocks, module.back_blocks
    numbers = (*widths, *slices, *blocks, *back, module.inner, module.hyper_channels, module.side)
    counts = len(widths), len(blocks), len(back)
    deepest, checkered = max(*blocks, *back, len(slices)), module.checkered
    fits = min(*numbers, module.levels) >= 1 and deepest <= DEEPEST and checkered <= len(slices)
    if counts != (2, 3, 3) or not slices or not fits:
        raise IcmError(
            f"no codec with widths {widths}, slices {slices}, blocks {blocks} and {back}, inner "
            f"{module.inner}, hyper_channels {module.hyper_channels}, side {module.side}, levels "
            f"{module.levels}, {checkered} checkered: two widths, 1 to {DEEPEST} slices, twice "
            f"three numbers of blocks up to {DEEPEST}, all at least 1, and no more checkered than "
            "there are"
        )
    require_dtype(module.dtype)


def halo_of(blocks: tuple[int, int, int]) -> int:
    """How far bottlenecks at 1/4, 1/8 and 1/16 look together, in elements of y."""
    quarter, eighth, sixteenth = blocks
    return -(-(quarter + 2 * eighth + 4 * sixteenth) // 4)


def _tiling(module: SpaceChannelCodec, front) -> Tiling:
    halo, back_halo = halo_of(module.blocks), halo_of(module.back_blocks)
    names = tuple(module.names)
    back = (Back("image", names, 1, back_halo),)
    return Tiling(names, front, 16, 16, 16 * halo, back, rest=4, rest_halo=4)


def _segments(module: SpaceChannelCodec, run) -> tuple[Segment, ...]:
    def bits(variables, latent):
        return run(variables, latent, method="prior_bits")

    shape = priors.halvings(6, module.hyper_channels)
    return (
        priors.factorised("z", shape, bits, (PART, "prior")),
        *(_slice(run, module, number) for number in range(len(module.slices))),
    )


def _slice(run, module: SpaceChannelCodec, number: int) -> Segment:
    def real(variables, inputs):
        return run(variables, number, inputs, method="of_slice")

    return slice_segment(module, number, real, (PART,))


def slice_segment(
    module: SpaceChannelCodec,
    number: int,
    real: Callable,
    path: tuple[str, ...],
    hyper: str = "z",
    layer: int = 0,
    ahead: priors.Ahead | None = None,
) -> Segment:
    """The segment of one of a module's slices.

    Args:
      real: of `priors.Network`. path: below "params", where the module's parameters lie.
      hyper: name of the hyper-latent. layer: of the file. ahead: of `priors.Network`.
    """
    channels, own = module.slices[number], module.parameters_of(number)
    place = (*path, f"parameters_{number}")
    network = priors.Network(own.nodes, real, own.weights, place, {"z": hyper}, own.params, ahead)
    passes = checkerboard if number < module.checkered else None
    shape = priors.halvings(4, channels)
    return priors.conditional(
        module.names[number], shape, network, mean=True, layer=layer, passes=passes
    )
