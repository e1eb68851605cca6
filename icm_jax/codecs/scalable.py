"""Scalable codecs: the first layer of a file serves a detector, both layers give the picture.

    disentangled (Özyılkan et al. 2023, docs/papers.md 3):
        f, x at 1/8 -> base analysis -> y_b -> base synthesis -> f_hat
        x -> analysis -> y_e;  y_e, y_b -> synthesis -> x_hat
    split (Choi and Bajić 2022, docs/papers.md 4):
        x -> analysis -> y_b, y_e -> synthesis -> x_hat;  y_b -> latent-space transform -> f_hat
    residual (Yan et al. 2021, SSSIC):
        f -> base analysis -> y_b -> base synthesis -> f_hat -> prediction -> x'
        x - x' -> analysis -> y_e -> synthesis -> + x' -> x_hat

f is what the front of a frozen YOLOv3 makes of x; its tail takes f_hat. All kinds stand on the
scale hyperprior of Ballé et al. 2018 without a context model, as the paper's own comparison does:
one per latent, or one for both, which then belongs to the first layer. The picture's transforms
are those of Ballé et al. 2018 or, as in the original of Choi and Bajić, of Cheng et al. 2020, but
without its context model: symbols that wait for one another cannot be decoded in parallel.
Parameters lie under `scalable`, the detector's under `detector`.
"""

import jax
import jax.numpy as jnp

from icm_jax import entropy, ops
from icm_jax.codecs import priors
from icm_jax.codecs.codec import Codec, Outputs, Segment, builder, method_of
from icm_jax.codecs.hyperprior import Gain
from icm_jax.errors import IcmError
from icm_jax.nets.detector import Part
from icm_jax.nets.transforms import (
    HYPER_SYNTHESIS,
    BaseAnalysis,
    BaseSynthesis,
    HyperAnalysis,
    HyperSynthesis,
    ImageAnalysis,
    ImageSynthesis,
    LatentTransform,
    Prediction,
    ResidualAnalysis,
    ResidualSynthesis,
    hyper_synthesis_weights,
)
from icm_jax.nets.yolo import yolov3

PART, DETECTOR = "scalable", "detector"
KINDS = ("disentangled", "split", "residual")
BACKBONES = ("balle2018", "cheng2020")
GRID = 32
"""Sides of images are padded to multiples of it: the detector's coarsest grid."""


class Scalable(ops.Module):
    """All networks of a scalable codec but the detector.

    Attributes:
      kind: one of KINDS. widths: of the picture's transforms at 1/2, 1/4 and 1/8, and of all other
        networks. channels: C_b, C_e. features: of f. hypers: 1 or 2.
      backbone: one of BACKBONES.
    """

    kind: str
    widths: tuple[int, ...]
    channels: tuple[int, int]
    features: int
    hypers: int
    backbone: str

    def setup(self):
        base, enhancement = self.channels
        split, widths, width = self.kind == "split", self.widths[:3], self.widths[3]
        coded = sum(self.channels) if split else enhancement
        if self.backbone == "cheng2020":
            self.analysis = ResidualAnalysis(coded, widths)
            self.synthesis = ResidualSynthesis(widths)
        else:
            self.analysis = ImageAnalysis(coded, widths)
            self.synthesis = ImageSynthesis(widths, extra=base * (self.kind == "disentangled"))
        if split:
            self.base_synthesis = LatentTransform(self.features, width)
        else:
            self.base_analysis = BaseAnalysis(base, width)
            self.base_synthesis = BaseSynthesis(self.features, width)
        if self.kind == "residual":
            self.prediction = Prediction(width)
        self.gains = [Gain(1, channels) for channels in self.channels]
        self.priors = [entropy.Factorised() for _ in range(self.hypers)]
        self.hyper_analyses = [HyperAnalysis(width) for _ in range(self.hypers)]
        own = self.channels if self.hypers == 2 else (sum(self.channels),)
        self.hyper_syntheses = [HyperSynthesis(width, channels) for channels in own]

    def __call__(self, x, f):
        latents = self.latents(x, f)
        for number in range(self.hypers):
            z = latents["z" if self.hypers == 1 else ("z_b", "z_e")[number]]
            self.prior_bits(z, number)
            self.index(z, number)
        return self.feature(latents["y_b"]), self.image(latents["y_b"], latents["y_e"])

    def latents(self, x, f):
        """x float32 [N, H, W, 3], f [N, H/8, W/8, F] -> latents that are not rounded."""
        if self.kind == "split":
            y = self.analysis(x)
            base, enhancement = y[..., : self.channels[0]], y[..., self.channels[0] :]
        elif self.kind == "disentangled":
            small = jax.image.resize(x, (*f.shape[:3], 3), "cubic") / 255.0 - 0.5
            base = self.base_analysis(jnp.concatenate([f, small], axis=-1))
            enhancement = self.analysis(x)
        else:
            base = self.base_analysis(f)
            coded = ops.quantise(self.gains[0](base, None))
            enhancement = self.analysis(x - self.prediction(self.feature(coded)) + 127.5)
        y = {"y_b": self.gains[0](base, None), "y_e": self.gains[1](enhancement, None)}
        if self.hypers == 1:
            both = jnp.concatenate([y["y_b"], y["y_e"]], axis=-1)
            return {"z": self.hyper_analyses[0](both), **y}
        z = [hyper(own) for hyper, own in zip(self.hyper_analyses, y.values(), strict=True)]
        return {"z_b": z[0], "z_e": z[1], **y}

    def prior_bits(self, z, number):
        return self.priors[number](z)

    def index(self, z, number):
        return self.hyper_syntheses[number](z)

    def feature(self, y_b):
        """f_hat; of "split" before the detector's own normalisation and activation."""
        return self.base_synthesis(self.gains[0].undo(y_b, None))

    def image(self, y_b, y_e):
        y = self.gains[1].undo(y_e, None)
        if self.kind == "split":
            return self.synthesis(jnp.concatenate([self.gains[0].undo(y_b, None), y], axis=-1))
        if self.kind == "disentangled":
            return self.synthesis(jnp.concatenate([y, self.gains[0].undo(y_b, None)], axis=-1))
        return self.synthesis(y) - 127.5 + self.prediction(self.feature(y_b))


@builder("scalable")
def scalable_codec(
    kind: str,
    width: int | tuple[int, int, int, int],
    base: int,
    enhancement: int,
    hypers: int,
    classes: int,
    detector_width: float,
    detector_depth: float,
    backbone: str = "balle2018",
) -> Codec:
    """The codec of a kind in `KINDS`; layers 0 (base) and 1 (enhancement).

    Outputs: "feature", float32 [N, h/8, w/8, F] from the base alone, h and w the sides padded to
    multiples of 32; "image", float32 [N, H, W, 3] on 0...255, from both.

    Args:
      width: N, of all inner layers; or four numbers: of the picture's transforms at 1/2, 1/4 and
        1/8 of its sides, and of all other networks.
      base, enhancement: C_b, C_e, channels of the latents.
      hypers: hyperpriors, 2 (one per latent) or 1 (for both, in the base layer).
      classes, detector_width, detector_depth: of `yolov3`.
      backbone: whose picture transforms, one of `BACKBONES`.

    Raises: IcmError for an unknown kind or backbone or numbers that are not as above.
    """
    widths = width if isinstance(width, tuple) else (width,) * 4
    _require(kind, widths, (base, enhancement), hypers, backbone)
    found = yolov3(classes, detector_width, detector_depth)
    front, end = Part(found, 0, found.split), Part(found, found.split, found.split)
    features = found.feature.channels
    module = Scalable(kind, widths, (base, enhancement), features, hypers, backbone)
    run = method_of(module, PART)

    def detector(variables, part, x, **options):
        own = {name: tree[DETECTOR] for name, tree in variables.items() if DETECTOR in tree}
        return part.apply(own, x, train=False, **options)

    def analyse(variables, inputs):
        x = ops.pad_to(inputs["image"], GRID).astype(jnp.float32)
        f = inputs["feature"] if "feature" in inputs else detector(variables, front, x / 255.0)
        return run(variables, x, f, method="latents")

    def feature_of(variables, decoded, shape):
        f = run(variables, decoded["y_b"], method="feature")
        return detector(variables, end, f, raw=True) if kind == "split" else f

    def image_of(variables, decoded, shape):
        x = run(variables, decoded["y_b"], decoded["y_e"], method="image")
        return ops.crop_to(x, *shape)

    def init(key, image):
        keys = jax.random.split(key)
        x = jnp.zeros((1, 64, 64, 3))
        whole = Part(found).init(keys[0], x, train=False)
        variables = {name: {DETECTOR: tree} for name, tree in whole.items()}
        own = module.init(keys[1], x, jnp.zeros((1, 8, 8, features)))["params"]
        variables["params"][PART] = own
        return variables

    return Codec(
        parts=(PART, DETECTOR),
        init=init,
        analyse=analyse,
        segments=_segments(run, hypers, widths[-1], base, enhancement),
        outputs=Outputs(feature=feature_of, image=image_of),
    )


def _require(kind, widths, channels, hypers, backbone) -> None:
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


def _segments(run, hypers: int, side: int, base: int, enhancement: int) -> tuple[Segment, ...]:
    """z, y of the base, then of the enhancement; with one hyperprior for both, in the base."""

    def hyper(name, number, layer):
        return priors.factorised(
            name,
            lambda h, w: (-(-h // (2 * GRID)), -(-w // (2 * GRID)), side),
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
            lambda h, w: (2 * -(-h // GRID), 2 * -(-w // GRID), channels),
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
