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

import functools

import jax
import jax.numpy as jnp

from icm_jax import entropy, ops
from icm_jax.codecs.codec import Codec, Outputs, Prior, Segment, channel_index
from icm_jax.codecs.hyperprior import Gain
from icm_jax.coding import tables
from icm_jax.errors import IcmError
from icm_jax.nets import yolo
from icm_jax.nets.transforms import (
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
    integer_hyper_synthesis,
    run_hyper_synthesis,
)

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
    widths: tuple[int, int, int, int]
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


@functools.cache
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
      classes, detector_width, detector_depth: of `yolo.layers`.
      backbone: whose picture transforms, one of `BACKBONES`.

    Raises: IcmError for an unknown kind or backbone or numbers that are not as above.
    """
    if backbone not in BACKBONES:
        raise IcmError(
            f"no scalable codec with backbone {backbone!r}; there are {', '.join(BACKBONES)}"
        )
    widths = width if isinstance(width, tuple) else (width,) * 4
    counts = (*widths, base, enhancement)
    if kind not in KINDS or len(widths) != 4 or min(counts) < 1 or hypers not in (1, 2):
        raise IcmError(
            f"no scalable codec {kind!r} with width {width}, channels {base} and {enhancement}, "
            f"{hypers} hyperpriors; kinds are {', '.join(KINDS)}, width is one number or four, the "
            "numbers at least 1, hyperpriors 1 or 2"
        )
    table = yolo.layers(classes, detector_width, detector_depth)
    split = yolo.default_split(table)
    front, end = yolo.Part(table, 0, split), yolo.Part(table, split, split)
    features = table[split - 1].features
    module = Scalable(kind, widths, (base, enhancement), features, hypers, backbone)

    def run(variables, *args, method):
        return module.apply({"params": variables["params"][PART]}, *args, method=method)

    def detector(variables, part, x, **options):
        own = {name: tree[DETECTOR] for name, tree in variables.items() if DETECTOR in tree}
        return part.apply(own, x, train=False, **options)

    def analyse(variables, inputs):
        x = padded(inputs["image"])
        f = inputs["feature"] if "feature" in inputs else detector(variables, front, x / 255.0)
        return run(variables, x, f, method="latents")

    def factorised(number):
        def prior(variables, decoded, shape):
            bits = functools.partial(run, variables, method="prior_bits")
            return Prior(lambda z: bits(z, number), channel_index(shape))

        def freeze(variables, _):
            return entropy.factorised_tables(variables["params"][PART][f"priors_{number}"]), None

        return prior, freeze

    def conditional(name, z, number, begin, channels):
        network = f"hyper_syntheses_{number}"

        def prior(variables, decoded, shape):
            if "integer" in variables:
                rows = run_hyper_synthesis(variables["integer"][name], decoded[z])
                rows = ops.crop_to(rows, *shape[1:3])
                return Prior(lambda y: entropy.gaussian_bits(y, rows), rows)
            index = ops.crop_to(run(variables, decoded[z], number, method="index"), *shape[1:3])
            index = index[..., begin : begin + channels]
            return Prior(lambda y: entropy.gaussian_bits(y, index), entropy.table_index(index))

        def freeze(variables, sample):
            params = dict(variables["params"][PART][network])
            own = {k: v[..., begin : begin + channels] for k, v in params["Conv_0"].items()}
            stack = integer_hyper_synthesis(params | {"Conv_0": own}, sample[z])
            return tables.gaussian_tables(), stack

        return prior, freeze, (PART, network)

    def latent(name, channels, layer, prior, freeze, spent=()):
        def shape(h, w):
            return 2 * -(-h // GRID), 2 * -(-w // GRID), channels

        def hyper_shape(h, w):
            return -(-h // (2 * GRID)), -(-w // (2 * GRID)), channels

        return Segment(name, hyper_shape if name[0] == "z" else shape, prior, freeze, layer, spent)

    if hypers == 2:
        segments = (
            latent("z_b", widths[-1], 0, *factorised(0)),
            latent("y_b", base, 0, *conditional("y_b", "z_b", 0, 0, base)),
            latent("z_e", widths[-1], 1, *factorised(1)),
            latent("y_e", enhancement, 1, *conditional("y_e", "z_e", 1, 0, enhancement)),
        )
    else:
        segments = (
            latent("z", widths[-1], 0, *factorised(0)),
            latent("y_b", base, 0, *conditional("y_b", "z", 0, 0, base)),
            latent("y_e", enhancement, 1, *conditional("y_e", "z", 0, base, enhancement)),
        )

    def feature_of(variables, decoded, shape):
        f = run(variables, decoded["y_b"], method="feature")
        return detector(variables, end, f, raw=True) if kind == "split" else f

    def image_of(variables, decoded, shape):
        x = run(variables, decoded["y_b"], decoded["y_e"], method="image")
        return ops.crop_to(x, *shape)

    def init(key, image):
        keys = jax.random.split(key)
        x = jnp.zeros((1, 64, 64, 3))
        whole = yolo.Part(table, 0, len(table)).init(keys[0], x, train=False)
        variables = {name: {DETECTOR: tree} for name, tree in whole.items()}
        own = module.init(keys[1], x, jnp.zeros((1, 8, 8, features)))["params"]
        variables["params"][PART] = own
        return variables

    return Codec(
        config=(
            "scalable",
            (
                ("kind", kind),
                ("width", width),
                ("base", base),
                ("enhancement", enhancement),
                ("hypers", hypers),
                ("classes", classes),
                ("detector_width", detector_width),
                ("detector_depth", detector_depth),
                ("backbone", backbone),
            ),
        ),
        parts=(PART, DETECTOR),
        init=init,
        analyse=analyse,
        segments=segments,
        outputs=Outputs(feature=feature_of, image=image_of),
    )


def padded(image: jax.Array) -> jax.Array:
    """uint8 or float [N, H, W, 3] -> float32, last row and column repeated up to `GRID`."""
    return ops.pad_to(image, GRID).astype(jnp.float32)
