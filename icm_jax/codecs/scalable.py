"""Scalable codecs: the first layer of a file serves a detector, both layers give the picture.

    disentangled (Özyılkan et al. 2023, docs/papers.md 3):
        f, x at its scale -> base analysis -> y_b -> base synthesis -> f_hat
        x -> analysis -> y_e;  y_e, y_b -> synthesis -> x_hat
    split (Choi and Bajić 2022, docs/papers.md 4):
        x -> analysis -> y_b, y_e -> synthesis -> x_hat;  y_b -> latent-space transform -> f_hat
    residual (Yan et al. 2021, SSSIC):
        f -> base analysis -> y_b -> base synthesis -> f_hat -> prediction -> x'
        x - x' -> analysis -> y_e -> synthesis -> + x' -> x_hat

f is what the front of a frozen detector makes of x; its tail takes f_hat. All kinds stand on the
scale hyperprior of Ballé et al. 2018 without a context model, as the paper's own comparison does:
one per latent, or one for both, which then belongs to the first layer. The picture's transforms
are those of Ballé et al. 2018 or, as in the original of Choi and Bajić, of Cheng et al. 2020, but
without its context model: symbols that wait for one another cannot be decoded in parallel.
Parameters lie under `scalable`, the detector's under `detector`.
"""

import math

import jax
import jax.numpy as jnp

from icm_jax import entropy, ops
from icm_jax.codecs import priors
from icm_jax.codecs.codec import Codec, Outputs, Segment, builder, method_of
from icm_jax.codecs.hyperprior import Gain
from icm_jax.codecs.tiles import Back, Tiling
from icm_jax.errors import IcmError
from icm_jax.nets.detector import Detector, Part, Shape, reach
from icm_jax.nets.entropy_parameters import HYPER_SYNTHESIS, HyperSynthesis, hyper_synthesis_weights
from icm_jax.nets.transforms import (
    BaseAnalysis,
    BaseSynthesis,
    HyperAnalysis,
    ImageAnalysis,
    ImageSynthesis,
    LatentTransform,
    Prediction,
    ResidualAnalysis,
    ResidualSynthesis,
)
from icm_jax.nets.yolo import yolov3

PART, DETECTOR = "scalable", "detector"
KINDS = ("disentangled", "split", "residual")
BACKBONES = ("balle2018", "cheng2020")
FINEST = 256
"""Grid of a detector, to multiples of which the sides of images are padded."""
LATENT = 16
"""Of the sides of y_b and y_e, which are at 1/16, to the image's."""
_PICTURE = {
    "balle2018": (2 + 4 + 8 + 16, 16 + 8 + 4 + 2),
    "cheng2020": (7 + 14 + 28 + 8, 16 + 56 + 28 + 14 + 4 + 2),
}
"""How far analysis and synthesis of the picture look, in pixels."""


class Scalable(ops.Module):
    """All networks of a scalable codec but the detector.

    Attributes:
      kind: one of KINDS. widths: of the picture's transforms at 1/2, 1/4 and 1/8, and of all other
        networks. channels: C_b, C_e. feature: of f, its channels and stride. hypers: 1 or 2.
      backbone: one of BACKBONES.
    """

    kind: str
    widths: tuple[int, ...]
    channels: tuple[int, int]
    feature: Shape
    hypers: int
    backbone: str

    def setup(self):
        base, enhancement = self.channels
        features, stride = self.feature
        times = (LATENT // stride).bit_length() - 1
        split, widths, width = self.kind == "split", self.widths[:3], self.widths[3]
        coded = sum(self.channels) if split else enhancement
        if self.backbone == "cheng2020":
            self.analysis = ResidualAnalysis(coded, widths)
            self.synthesis = ResidualSynthesis(widths)
        else:
            self.analysis = ImageAnalysis(coded, widths)
            self.synthesis = ImageSynthesis(widths, extra=base * (self.kind == "disentangled"))
        if split:
            self.base_synthesis = LatentTransform(features, width, times)
        else:
            self.base_analysis = BaseAnalysis(base, width, times)
            self.base_synthesis = BaseSynthesis(features, width, times)
        if self.kind == "residual":
            self.prediction = Prediction(width, stride.bit_length() - 1)
        self.gains = [Gain(1, channels) for channels in self.channels]
        self.priors = [entropy.Factorised() for _ in range(self.hypers)]
        self.hyper_analyses = [HyperAnalysis(width) for _ in range(self.hypers)]
        own = self.channels if self.hypers == 2 else (sum(self.channels),)
        self.hyper_syntheses = [HyperSynthesis(width, channels) for channels in own]

    def __call__(self, x, f):
        latents = self.latents(self.front(x, f))
        for number in range(self.hypers):
            z = latents["z" if self.hypers == 1 else ("z_b", "z_e")[number]]
            self.prior_bits(z, number)
            self.index(z, number)
        return self.feature_hat(latents["y_b"]), self.image(latents["y_b"], latents["y_e"])

    def front(self, x, f):
        """x float32 [N, H, W, 3], f [N, h, w, F] -> y_b and y_e side by side, not rounded."""
        if self.kind == "split":
            y = self.analysis(x)
            base, enhancement = y[..., : self.channels[0]], y[..., self.channels[0] :]
        elif self.kind == "disentangled":
            small = ops.reduced(x, *f.shape[1:3]) / 255.0 - 0.5
            base = self.base_analysis(jnp.concatenate([f, small], axis=-1))
            enhancement = self.analysis(x)
        else:
            base = self.base_analysis(f)
            coded = ops.quantise(self.gains[0](base, None))
            enhancement = self.analysis(x - self.prediction(self.feature_hat(coded)) + 127.5)
        latents = self.gains[0](base, None), self.gains[1](enhancement, None)
        return jnp.concatenate(latents, axis=-1)

    def latents(self, both):
        """What `front` gives -> latents by name."""
        y = {"y_b": both[..., : self.channels[0]], "y_e": both[..., self.channels[0] :]}
        if self.hypers == 1:
            return {"z": self.hyper_analyses[0](both), **y}
        z = [hyper(own) for hyper, own in zip(self.hyper_analyses, y.values(), strict=True)]
        return {"z_b": z[0], "z_e": z[1], **y}

    def prior_bits(self, z, number):
        return self.priors[number](z)

    def index(self, z, number):
        return self.hyper_syntheses[number](z)

    def feature_hat(self, y_b):
        """f_hat; of "split" before the detector's own normalisation and activation."""
        return self.base_synthesis(self.gains[0].undo(y_b, None))

    def image(self, y_b, y_e):
        y = self.gains[1].undo(y_e, None)
        if self.kind == "split":
            return self.synthesis(jnp.concatenate([self.gains[0].undo(y_b, None), y], axis=-1))
        if self.kind == "disentangled":
            return self.synthesis(jnp.concatenate([y, self.gains[0].undo(y_b, None)], axis=-1))
        return self.synthesis(y) - 127.5 + self.prediction(self.feature_hat(y_b))


@builder("scalable")
def scalable_codec(
    kind: str,
    width: int | tuple[int, int, int, int],
    base: int,
    enhancement: int,
    hypers: int,
    detector: Detector,
    backbone: str = "balle2018",
) -> Codec:
    """The codec of a kind in `KINDS`; layers 0 (base) and 1 (enhancement).

    Outputs: "feature", float32 [N, h/s, w/s, F] from the base alone, h and w the sides padded to
    the detector's grid, s the stride of its feature; "image", float32 [N, H, W, 3] on 0...255, from
    both.

    Args:
      width: N, of all inner layers; or four numbers: of the picture's transforms at 1/2, 1/4 and
        1/8 of its sides, and of all other networks.
      base, enhancement: C_b, C_e, channels of the latents.
      hypers: hyperpriors, 2 (one per latent) or 1 (for both, in the base layer).
      detector: whose feature the base is for; or its fields as JSON gives them back.
      backbone: whose picture transforms, one of `BACKBONES`.

    Raises: IcmError for an unknown kind or backbone, numbers that are not as above, or a detector
    whose feature is at another scale than 1/2 to 1/16.
    """
    widths = width if isinstance(width, tuple) else (width,) * 4
    detector = Detector(*detector)
    _require(kind, widths, (base, enhancement), hypers, backbone, detector)
    front, split = Part(detector, end=detector.split), detector.split
    end = Part(detector, split, split)  # what follows a convolution, alone
    raw = kind == "split" and detector.table[split - 1].kind == "conv"
    module = Scalable(kind, widths, (base, enhancement), detector.feature, hypers, backbone)
    run = method_of(module, PART)
    grid = math.lcm(detector.grid, LATENT)

    def both(variables, inputs):
        x = ops.pad_to(inputs["image"], grid).astype(jnp.float32)
        f = inputs["feature"] if "feature" in inputs else detected(variables, front, x / 255.0)
        return run(variables, x, f, method="front")

    def analyse(variables, inputs):
        y = inputs["latent"] if "latent" in inputs else both(variables, inputs)
        return run(variables, y, method="latents")

    def feature_of(variables, decoded, shape):
        f = run(variables, decoded["y_b"], method="feature_hat")
        return detected(variables, end, f, raw=True) if raw else f

    def image_of(variables, decoded, shape):
        return ops.crop_to(run(variables, decoded["y_b"], decoded["y_e"], method="image"), *shape)

    return Codec(
        parts=(PART, DETECTOR),
        init=lambda key, image: _initial(module, detector, grid, key),
        analyse=analyse,
        segments=_segments(run, hypers, widths[-1], (base, enhancement), grid),
        outputs=Outputs(feature=feature_of, image=image_of),
        tiling=_tiling(module, reach(detector.table, detector.split), grid, both),
    )


def detected(variables, part: Part, x, **options):
    """What a part of the detector makes of x, in evaluation; see `Part`."""
    given = {name: tree[DETECTOR] for name, tree in variables.items() if DETECTOR in tree}
    return part.apply(given, x, train=False, **options)


def _tiling(module: Scalable, front: int, grid: int, run) -> Tiling:
    """Each convolution looks half a kernel far, in elements of what it takes, and a transposed one
    of 5 taps one element.

    Args: front: how far that of the detector looks, in pixels.
    """
    stride, (analysis, synthesis) = module.feature.stride, _PICTURE[module.backbone]
    times = (LATENT // stride).bit_length() - 1
    base = 2 * sum(stride << max(0, n + times - 3) for n in range(3))
    if module.kind == "split":
        ups = [LATENT >> min(n, times) for n in range(5)]
        feature = 2 * sum(ups[:4]) + sum(ups[:times]) + ups[4]
        halo, image = analysis, synthesis
    else:
        ups = [LATENT >> max(0, n + times - 3) for n in range(3)]
        feature = sum(up if n >= 3 - times else 2 * up for n, up in enumerate(ups))
        halo = max(analysis, base + max(front, 2 * stride))  # two elements: bicubic interpolation
        image = synthesis
    if module.kind == "residual":
        image = max(synthesis, feature + 6 * (stride - 1))
        halo = analysis + LATENT + feature + 6 * (stride - 1) + base + front
    up = lambda pixels: -(-pixels // LATENT)  # noqa: E731
    names = ("y_b", "y_e")
    back = (Back("feature", names[:1], stride, up(feature)), Back("image", names, 1, up(image)))
    return Tiling(names, run, LATENT, grid, LATENT * up(halo), back, rest=4, rest_halo=8)


def _initial(module: Scalable, detector: Detector, grid: int, key) -> dict:
    """Variables of the detector and of the codec."""
    keys = jax.random.split(key)
    x = jnp.zeros((1, 2 * grid, 2 * grid, 3))
    whole = Part(detector).init(keys[0], x, train=False)
    variables = {name: {DETECTOR: tree} for name, tree in whole.items()}
    side = 2 * grid // detector.feature.stride
    f = jnp.zeros((1, side, side, detector.feature.channels))
    variables["params"][PART] = module.init(keys[1], x, f)["params"]
    return variables


def detector_of(codec: Codec) -> Detector:
    """The detector that a scalable codec was built for. Raises IcmError for another codec."""
    name, items = codec.config
    if name not in ("scalable", "layered"):
        raise IcmError(f"a codec of kind {name!r} has no detector; scalable and layered ones do")
    return Detector(*upgraded(dict(items))["detector"])


def upgraded(fields: dict) -> dict:
    """Arguments of `scalable_codec` as files from before detectors were data hold them: classes and
    two factors of YOLOv3."""
    if "detector" in fields:
        return fields
    old = ("classes", "detector_width", "detector_depth")
    kept = {key: value for key, value in fields.items() if key not in old}
    return kept | {"detector": yolov3(*(fields[key] for key in old))}


def _require(kind, widths, channels, hypers, backbone, detector) -> None:
    if backbone not in BACKBONES:
        raise IcmError(
            f"no scalable codec with backbone {backbone!r}; there are {', '.join(BACKBONES)}"
        )
    counts = (*widths, *channels)
    if kind not in KINDS or len(widths) != 4 or min(counts) < 1 or hypers not in (1, 2):
        raise IcmError(
            f"no scalable codec {kind!r} with width {widths}, channels {channels}, {hypers} "
            f"hyperpriors; kinds are {', '.join(KINDS)}, width is one number or four, the numbers "
            "at least 1, hyperpriors 1 or 2"
        )
    require_detector(detector, (2, 4, 8, 16))


def require_detector(detector: Detector, strides: tuple[int, ...]) -> None:
    """Raises: IcmError if its grid is too coarse, or its feature at none of these strides."""
    if detector.grid > FINEST:
        raise IcmError(f"sides of images would be multiples of {detector.grid}; {FINEST} at most")
    if detector.feature.stride not in strides:
        *most, last = (f"1/{stride}" for stride in strides)
        raise IcmError(
            f"the feature of the detector is at 1/{detector.feature.stride} of the image's sides; "
            f"this codec takes {', '.join(most)} or {last}"
        )


def _segments(run, hypers: int, width: int, channels, grid: int) -> tuple[Segment, ...]:
    """z, y of the base, then of the enhancement; with one hyperprior for both, in the base."""
    base, enhancement = channels

    def side(pixels):
        return grid // LATENT * -(-pixels // grid)

    def hyper(name, number, layer):
        return priors.factorised(
            name,
            lambda h, w: (ops.halved(side(h), 2), ops.halved(side(w), 2), width),
            lambda variables, z: run(variables, z, number, method="prior_bits"),
            (PART, f"priors_{number}"),
            layer,
        )

    def latent(name, z, number, channels, begin, layer):
        chosen = slice(begin, begin + channels)

        def weights(params):
            last = {key: value[..., chosen] for key, value in params["Conv_0"].items()}
            return hyper_synthesis_weights(dict(params) | {"Conv_0": last}, channels)

        def index(variables, inputs):
            return run(variables, inputs["z"], number, method="index")[..., chosen]

        path = (PART, f"hyper_syntheses_{number}")
        return priors.conditional(
            name,
            lambda h, w: (side(h), side(w), channels),
            priors.Network(HYPER_SYNTHESIS, index, weights, path, {"z": z}),
            layer=layer,
        )

    if hypers == 1:
        return (
            hyper("z", 0, 0),
            latent("y_b", "z", 0, base, 0, 0),
            latent("y_e", "z", 0, enhancement, base, 1),
        )
    return (
        hyper("z_b", 0, 0),
        latent("y_b", "z_b", 0, base, 0, 0),
        hyper("z_e", 1, 1),
        latent("y_e", "z_e", 1, enhancement, 0, 1),
    )
