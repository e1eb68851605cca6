"""Scalable codecs that can begin as a trained picture codec: layers of `space_channel`, all rates.

    conditional:
        x -> base analysis -> y_b -> feature synthesis -> f_hat
        x -> analysis -> y_e -> synthesis -> x_hat;  the prior of y_e sees y_b
    split (Choi and Bajić 2022, docs/papers.md 4):
        x -> analysis -> y_b, y_e -> synthesis -> x_hat;  y_b -> feature synthesis -> f_hat

f is what the front of a frozen detector makes of x; its tail takes f_hat. The picture's networks
are those of `space_channel_codec`, and so are the base's up to the scale of f: they can start from
the weights of such a codec (`icm_jax.weights.icmc`), which has seen more pictures than a detector
has labels. The base is decoded to one of `THROUGH`: to the "feature" itself, which costs least to
compute but has to learn what the front is, or to an "image" of which the front makes the feature,
which is a good one before any training and is then trained to be a better one.

The codecs of `icm_jax.codecs.scalable` have to learn that the enhancement need not repeat what the
base says; here its prior is told, so that it costs what is new in it, and the picture is that of
the codec it began as (successive refinement, Equitz and Cover 1991).

Parameters lie under `layered`, the detector's under `detector`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from icm_jax import entropy, ops
from icm_jax.codecs import priors
from icm_jax.codecs.codec import Codec, Outputs, Segment, builder, method_of
from icm_jax.codecs.scalable import DETECTOR, LATENT, detected, require_detector
from icm_jax.codecs.space_channel import (
    DEEPEST,
    HYPER_WIDTH,
    SpaceChannelCodec,
    check_fields,
    halo_of,
    slice_segment,
)
from icm_jax.codecs.tiles import Back, Tiling
from icm_jax.errors import IcmError
from icm_jax.nets.bottleneck import BlockSynthesis, FeatureSynthesis, SignedHyperAnalysis
from icm_jax.nets.detector import ACTIVATIONS, Detector, Part, reach

PART = "layered"
KINDS = ("conditional", "split")
THROUGH = ("feature", "image")
FINER = 8
"""Rows of `Conditional.factors` per level of quality, between which they are interpolated."""


class Conditional(ops.Module):
    """Two codecs, the first for the machine; y is [y_b | y_e], with their gains.

    Attributes:
      machine, picture: the codecs of base and enhancement. share: of `layered_codec`.
    """

    machine: SpaceChannelCodec
    picture: SpaceChannelCodec
    share: float

    def __call__(self, x, quality):
        return _everything(self, x, quality)

    @property
    def places(self) -> list[tuple[str, SpaceChannelCodec, int, str, str, int]]:
        """Of each slice: its name, its codec and number there, that codec's name, the hyper-latent,
        the layer."""
        both = (self.machine, "machine", "z_b", 0), (self.picture, "picture", "z_e", 1)
        return [
            (name, codec, number, own, z, layer)
            for codec, own, z, layer in both
            for number, name in enumerate(codec.names)
        ]

    def front(self, x, quality):
        both = self.machine.front(x, self._of_base(quality)), self.picture.front(x, quality)
        return jnp.concatenate(both, axis=-1)

    def latents(self, y):
        at = sum(self.machine.slices)
        machine, picture = self.machine.latents(y[..., :at]), self.picture.latents(y[..., at:])
        return {"z_b": machine.pop("z"), **machine, "z_e": picture.pop("z"), **picture}

    def prior_bits(self, z, name):
        return (self.machine if name == "z_b" else self.picture).prior_bits(z)

    def of_slice(self, own, number, inputs):
        return getattr(self, own).of_slice(number, inputs)

    def feature_hat(self, latents, quality):
        return self.machine.decode(latents, self._of_base(quality))

    def image(self, latents, quality):
        return self.picture.decode(latents, quality)

    def factors(self, number):
        """Of a latent of the base, to be one of the enhancement, in the slice of that number:
        float32 [rows, C]."""
        at = jnp.linspace(0.0, 1.0, self.rows) if self.rows > 1 else None
        whole = self.picture.gain.at(at) / self.machine.gain.inverse(self._of_base(at))
        ends = [sum(self.picture.slices[:n]) for n in (number, number + 1)]
        return whole[:, 0, 0, ends[0] : ends[1]]

    @property
    def rows(self) -> int:
        return 1 + FINER * (self.picture.levels - 1)

    def _of_base(self, quality):
        return None if quality is None else self.share * quality


class Split(ops.Module):
    """One codec whose first slices are the base.

    Attributes:
      picture: the codec. first: how many of its slices are the base. synthesis: of f, or of an
        image. hypers: 1 for all of y, in the base, or 2, one for each layer's part.
    """

    picture: SpaceChannelCodec
    first: int
    synthesis: FeatureSynthesis | BlockSynthesis
    hypers: int

    def setup(self):
        if self.hypers == 2:
            self.hyper_analysis = SignedHyperAnalysis(HYPER_WIDTH, self.picture.hyper_channels)
            self.prior = entropy.Factorised()

    def __call__(self, x, quality):
        return _everything(self, x, quality)

    @property
    def places(self) -> list[tuple[str, SpaceChannelCodec, int, str, str, int]]:
        """As of `Conditional`."""
        z = ("z", "z") if self.hypers == 1 else ("z_b", "z_e")
        layers = [int(number >= self.first) for number in range(len(self.picture.slices))]
        return [
            (name, self.picture, number, "picture", z[layer], layer)
            for number, (name, layer) in enumerate(zip(self.picture.names, layers, strict=True))
        ]

    @property
    def channels(self) -> int:
        """Of the base."""
        return sum(self.picture.slices[: self.first])

    def front(self, x, quality):
        return self.picture.front(x, quality)

    def latents(self, y):
        if self.hypers == 1:
            return self.picture.latents(y)
        # Each hyper-analysis sees its own channels in their places, so that both can start alike.
        of_base = jnp.arange(y.shape[-1]) < self.channels
        z_b = self.picture.hyper_analysis(jnp.where(of_base, y, 0.0))
        z_e = self.hyper_analysis(jnp.where(of_base, 0.0, y))
        slices = self.picture.latents(y)
        return {"z_b": z_b, "z_e": z_e} | {name: slices[name] for name in self.picture.names}

    def prior_bits(self, z, name):
        return self.prior(z) if name == "z_e" else self.picture.prior_bits(z)

    def of_slice(self, own, number, inputs):
        return getattr(self, own).of_slice(number, inputs)

    def feature_hat(self, latents, quality):
        y = jnp.concatenate([latents[name] for name in self.picture.names[: self.first]], axis=-1)
        rest = jnp.zeros((*y.shape[:-1], sum(self.picture.slices) - self.channels), y.dtype)
        y = self.picture.gain.undo(jnp.concatenate([y, rest], axis=-1), quality)
        whole = isinstance(self.synthesis, BlockSynthesis)  # that of the picture, the rest unknown
        return self.synthesis(y if whole else y[..., : self.channels])

    def image(self, latents, quality):
        return self.picture.decode(latents, quality)


def _everything(module, x, quality):
    """Both outputs and all bits, for the parameters that they need."""
    latents = module.latents(module.front(x, quality))
    bits = [module.prior_bits(value, name) for name, value in latents.items() if name[0] == "z"]
    for name, _, number, own, z, _ in module.places:
        known = {"z": latents[z], "known": jnp.ones_like(latents[name])}
        bits.append(module.of_slice(own, number, latents | known))
    return module.feature_hat(latents, quality), module.image(latents, quality), bits


@builder("layered")
def layered_codec(
    kind: str,
    widths: tuple[int, int],
    base: tuple[int, ...],
    enhancement: tuple[int, ...],
    hypers: int,
    detector: Detector,
    checkered: int = 1,
    blocks: tuple[int, int, int] = (2, 4, 4),
    base_blocks: tuple[int, int, int] = (2, 4, 4),
    inner: int = 64,
    hyper_channels: int = 32,
    side: int = 24,
    levels: int = 1,
    share: float = 0.5,
    through: str = "feature",
    dtype: str = "float32",
    ahead: bool = False,
) -> Codec:
    """The codec of a kind in `KINDS`; layers 0 (base) and 1 (enhancement).

    Outputs: "feature", float32 [N, h/s, w/s, F] from the base alone, h and w the sides padded to
    the detector's grid, s the stride of its feature; "image", float32 [N, H, W, 3] on 0...255.

    Args:
      widths, checkered, inner, hyper_channels, side, levels, dtype: of `space_channel_codec`.
      base, enhancement: channels of their slices, in the order of decoding; in "split" they follow
        one another, as those of one picture codec.
      hypers: hyperpriors, 2 (one per layer) or, in "split" alone, 1 (for both, in the base).
      detector: whose feature the base is for; or its fields as JSON gives them back.
      blocks: bottlenecks at 1/4, 1/8, 1/16 of analyses and of the picture's synthesis.
      base_blocks: of the base's synthesis; those finer than the feature are not there.
      share: in "conditional", the part of the quality's scale that the base goes over.
      through: what the base's synthesis gives, one of `THROUGH`.
      ahead: in "conditional" of the same slices twice, the means of the enhancement begin at what
        the base says.

    Raises: IcmError for an unknown kind or `through`, numbers that are not as above, or a detector
    whose feature is at another scale than 1/4 to 1/16, or with "image" 1/2 to 1/16.
    """
    detector = Detector(*detector)
    _require(kind, hypers, base, enhancement, ahead)
    _require_numbers(share, base_blocks, through)
    require_detector(detector, (2, 4, 8, 16) if through == "image" else (4, 8, 16))
    networks = inner, hyper_channels, side, levels, dtype
    plain = SpaceChannelCodec(widths, base + enhancement, checkered, blocks, blocks, *networks)
    feature = None if through == "image" else detector.feature
    if kind == "conditional":
        first = plain.clone(slices=base, back_blocks=base_blocks, latent="b", feature=feature)
        second = plain.clone(slices=enhancement, beside=tuple(first.names))
        module, codecs = Conditional(first, second, share), (first, second)
    else:
        back = (*widths, sum(plain.slices)), base_blocks, inner, jnp.dtype(dtype)
        own = BlockSynthesis(*back) if feature is None else FeatureSynthesis(*back, feature)
        module, codecs = Split(plain, len(base), own, hypers), (plain,)
    for codec in codecs:
        check_fields(codec)
    halos = halo_of(blocks), halo_of(base_blocks) + 1
    return _built(module, detector, levels, halos, hyper_channels, through, ahead)


def base_quality(codec: Codec, quality: float) -> float:
    """That of a codec's first layer, where the codec's own is `quality`, 0 to 100."""
    name, items = codec.config
    fields = dict(items)
    own = name == "layered" and fields["kind"] == "conditional"
    return quality * fields["share"] if own else quality


def _built(module, detector: Detector, levels, halos, hyper: int, through: str, ahead) -> Codec:
    """Args: halos: of the picture's transforms, and of the base's synthesis, elements of y."""
    run = method_of(module, PART)
    grid = math.lcm(detector.grid, LATENT)
    shown = Part(detector, end=detector.split)
    last = detector.table[detector.split - 1]
    activation = ACTIVATIONS[last.activation if last.kind == "conv" else "linear"]

    def front(variables, inputs):
        x = ops.pad_to(inputs["image"], grid).astype(jnp.float32)
        return run(variables, x, inputs.get("quality"), method="front")

    def analyse(variables, inputs):
        y = inputs["latent"] if "latent" in inputs else front(variables, inputs)
        return run(variables, y, method="latents")

    def feature_of(variables, decoded, shape):
        f = run(variables, decoded, decoded.get("quality"), method="feature_hat")
        return detected(variables, shown, f / 255.0) if through == "image" else activation(f)

    def image_of(variables, decoded, shape):
        return ops.crop_to(run(variables, decoded, decoded.get("quality"), method="image"), *shape)

    names = [name for name, *_ in module.places]
    base = tuple(name for name, *_, layer in module.places if layer == 0)
    own = tuple(names) if isinstance(module, Split) else tuple(n for n in names if n not in base)
    far = -(-reach(detector.table, detector.split) // LATENT) if through == "image" else 0
    back = Back("feature", base, detector.feature.stride, halos[1] + far)
    back = back, Back("image", own, 1, halos[0])
    halo = LATENT * halos[0]
    return Codec(
        parts=(PART, DETECTOR),
        init=lambda key, image: _initial(module, detector, levels, grid, key),
        analyse=analyse,
        segments=_segments(module, run, grid, hyper, ahead),
        outputs=Outputs(feature=feature_of, image=image_of),
        qualities=levels > 1,
        tiling=Tiling(tuple(names), front, LATENT, grid, halo, back, rest=4, rest_halo=4),
    )


def _initial(module, detector: Detector, levels: int, grid: int, key) -> dict:
    """Variables of the detector and of the codec."""
    keys = jax.random.split(key)
    x = jnp.zeros((1, 2 * grid, 2 * grid, 3))
    whole = Part(detector).init(keys[0], x, train=False)
    variables = {name: {DETECTOR: tree} for name, tree in whole.items()}
    quality = None if levels == 1 else jnp.zeros((1,))
    variables["params"][PART] = module.init(keys[1], x, quality)["params"]
    return variables


def _segments(module, run, grid: int, hyper: int, ahead: bool) -> tuple[Segment, ...]:
    """Each hyper-latent, then the slices that are told by it."""
    segments, there = [], []

    def side(pixels):
        return grid // LATENT * -(-pixels // grid)

    def shape_of(channels, halvings):
        return lambda h, w: (ops.halved(side(h), halvings), ops.halved(side(w), halvings), channels)

    for _, codec, number, own, z, layer in module.places:
        if z not in there:
            there.append(z)
            of_z = (
                (PART, "prior")
                if z == "z_e" and isinstance(module, Split)
                else (PART, own, "prior")
            )
            bits = functools.partial(_bits, run, z)
            segments.append(priors.factorised(z, shape_of(hyper, 2), bits, of_z, layer))
        real, known = functools.partial(_real, run, own, number), None
        if ahead and layer:
            factors = functools.partial(_factors, run, number)
            known = priors.Ahead(module.machine.names[number], module.rows, factors)
        segment = slice_segment(codec, number, real, (PART, own), z, layer, known)
        segments.append(segment._replace(shape=shape_of(codec.slices[number], 0)))
    return tuple(segments)


def _bits(run, name, variables, z):
    return run(variables, z, name, method="prior_bits")


def _factors(run, number, variables):
    return run(variables, number, method="factors")


def _real(run, own, number, variables, inputs):
    return run(variables, own, number, inputs, method="of_slice")


def _require(kind, hypers: int, base, enhancement, ahead: bool) -> None:
    if ahead and (kind != "conditional" or base != enhancement):
        raise IcmError(f"no {kind!r} codec with slices {base} and {enhancement} knows them ahead")
    fits = hypers in ((2,) if kind == "conditional" else (1, 2))
    if kind not in KINDS or not fits or not base or not enhancement:
        raise IcmError(
            f"no layered codec {kind!r} with slices {base} and {enhancement}, {hypers} hyperpriors"
            f"; kinds are {', '.join(KINDS)}, each layer has a slice, hyperpriors are 2, of "
            '"split" 1 or 2'
        )


def _require_numbers(share: float, base_blocks, through: str) -> None:
    if not 0.0 < share <= 1.0 or max(base_blocks) > DEEPEST or through not in THROUGH:
        raise IcmError(
            f"no layered codec with share {share}, base_blocks {base_blocks}, through {through!r}: "
            f"the first above 0 and up to 1, blocks up to {DEEPEST}, then {' or '.join(THROUGH)}"
        )
