"""Classification from DCT coefficients, JPEG's own or learned ones (Gueguen et al. 2018).

    JPEG's coefficients, or 8×8 transforms learned on an image in YCbCr 4:2:0
        -> trunk -> mean over space -> classifier

beside ResNets on RGB or YCbCr pixels. All see the same views: crops at multiples of 16 pixels,
mirrored or not, of the same canvas.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from icm_jax import ops
from icm_jax.data.fields import FieldError
from icm_jax.errors import IcmError
from icm_jax.nets import dct, resnet
from icm_jax.tasks import views
from icm_jax.tasks.classification import classifier_task
from icm_jax.tasks.task import TRAIN, Task, apply, merge

PLANES = ("luma", "blue", "red")
INPUTS = ("jpeg", "dct", "dct_kept", "random", "random_kept", "rgb", "ycbcr")


def coefficient_classification(config: ConfigDict) -> Task:
    """The task.

    Fields: input: "jpeg", the file's coefficients; "dct" or "random", where learned transforms
    start, or with "_kept" stay; or pixels, "rgb" or "ycbcr"; network: of `nets.dct.WIRINGS`, or for
    pixels of `nets.resnet.STAGES`; width, factor of all channels; dtype; classes; size (sides of a
    view, a multiple of 16).
    """
    if config.input not in INPUTS:
        raise IcmError(f"unknown input {config.input!r}; choose one of {', '.join(INPUTS)}")
    if any(side % 16 for side in views.sides(config.size)):
        told = f"is {config.size}; views have sides of multiples of 16"
        raise FieldError(("task", "size"), config.size, told)
    dtype = jnp.dtype(config.dtype)
    build = pixel_trunk if config.input in ("rgb", "ycbcr") else coefficient_trunk
    init_trunk, features = build(config, dtype)
    classifier = nn.Dense(config.classes)

    def logits_of(variables, batch, key):
        x, stats = features(variables, batch, key)
        weights = {"params": variables["params"]["classifier"]}
        return classifier.apply(weights, resnet.global_pool(x)), stats

    def init(key, batch):
        del batch  # it holds an image, and some inputs are coefficients
        keys = jax.random.split(key)
        variables, channels = init_trunk(keys[0])
        merge(variables, "classifier", classifier.init(keys[1], jnp.zeros((1, channels))))
        return variables

    return classifier_task(init, logits_of, lambda name: TRAIN)


def pixel_trunk(config: ConfigDict, dtype: jnp.dtype) -> tuple[Callable, Callable]:
    """(key -> (variables, channels), (variables, batch, key) -> (last feature, new statistics))."""
    width = max(1, round(64 * config.width))
    head = resnet.Head(config.network, width, dtype)
    tail = resnet.Tail(config.network, width, 32, True, dtype)

    def init(key):
        keys = jax.random.split(key)
        variables: dict = {}
        shape = (1, *views.sides(config.size), 3)
        f, drawn = head.init_with_output(keys[0], jnp.zeros(shape), train=False)
        merge(variables, "head", drawn)
        outputs, drawn = tail.init_with_output(keys[1], f, train=False)
        merge(variables, "tail", drawn)
        return variables, outputs[-1].shape[-1]

    def features(variables, batch, key):
        images = views.aligned(batch["image"], config.size, key=key)
        if config.input == "rgb":
            x = ops.normalise(images, dtype)
        else:
            x = (ops.ycbcr(images.astype(jnp.float32)) / 64.0).astype(dtype)
        stats = {}
        f, stats["head"] = apply(head, variables, "head", x, key is not None)
        outputs, stats["tail"] = apply(tail, variables, "tail", f, key is not None)
        return outputs[-1], stats

    return init, features


def coefficient_trunk(config: ConfigDict, dtype: jnp.dtype) -> tuple[Callable, Callable]:
    """As `pixel_trunk`."""
    trunk = dct.CoefficientTrunk(config.network, config.width, dtype)
    basis, _, kept = config.input.partition("_")
    transform = dct.BlockTransform(basis, bool(kept), dtype) if basis != "jpeg" else None

    def init(key):
        keys = jax.random.split(key, 4)
        height, width = views.sides(config.size)
        planes = [jnp.zeros((1, height // s, width // s, 64)) for s in (8, 16, 16)]
        variables: dict = {}
        x, drawn = trunk.init_with_output(keys[0], *planes, train=False)
        merge(variables, "trunk", drawn)
        for name, of_plane in zip(PLANES, keys[1:], strict=True):
            if transform is not None:
                merge(variables, name, transform.init(of_plane, jnp.zeros((1, 8, 8))))
        return variables, x.shape[-1]

    def planes_of(variables, batch, key):
        """Float [N, h, w, 64] of Y, Cb and Cr."""
        if transform is None:
            luma, chroma = views.coefficients(batch["luma"], batch["chroma"], config.size, key=key)
            steps = batch["steps"].astype(jnp.float32)[:, None, None]
            luma, chroma = luma.astype(jnp.float32), chroma.astype(jnp.float32)
            chroma = chroma * steps[..., 64:]
            return luma * steps[..., :64], chroma[..., :64], chroma[..., 64:]
        images = views.aligned(batch["image"], config.size, key=key).astype(jnp.float32)
        return tuple(
            transform.apply({"params": variables["params"][name]}, plane)
            for name, plane in zip(PLANES, ops.ycbcr_420(images), strict=True)
        )

    def features(variables, batch, key):
        planes = planes_of(variables, batch, key)
        of_trunk = {name: variables[name]["trunk"] for name in ("params", "batch_stats")}
        if key is None:
            return trunk.apply(of_trunk, *planes, train=False), {"trunk": of_trunk["batch_stats"]}
        x, updated = trunk.apply(of_trunk, *planes, train=True, mutable=["batch_stats"])
        return x, {"trunk": updated["batch_stats"]}

    return init, features
