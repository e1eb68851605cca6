"""Objects, their boxes and, if asked for, their masks, on a residual network's layers.

    image or feature -> trunk -> c3, c4, c5 -> pyramid -> FCOS -> boxes
                                                 RoIAlign of these -> masks

The trunk is that of classification and segmentation, on pixels or on what a codec gives; heads are
those of `icm_jax.nets.pyramid`, which says why these. With masks this is Mask R-CNN's second branch
(He et al. 2017) on the boxes of a one-stage detector, as Lee and Park 2020 have it. All shapes are
static: an image has a fixed number of boxes, of which a mask says which count.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from icm_jax.errors import IcmError
from icm_jax.nets.pyramid import MASK_SIDE, BoxHead, MaskHead, Pyramid
from icm_jax.tasks import fcos, regions, views
from icm_jax.tasks.boxes import Detections
from icm_jax.tasks.task import FROZEN, TRAIN, Aux, Task, Trunk, build_trunk, merge

PARTS = ("pyramid", "box_head", "mask_head")
"""Names of the heads' parameters; the last one's are there if masks are asked for."""
PROPOSED = {"overlap": 0.6, "least": 0.05}
"""Of the boxes on which masks are learned, see `boxes.suppress` (Tian et al. 2020)."""


def object_detection(config: ConfigDict) -> Task:
    """The task.

    Fields: the trunk's (`build_trunk`); classes; channels and convolutions (of the heads: 256 and
    4 as published); range_scale (of the sizes that levels are for, which are published for images
    of 800 pixels); masks (whether to learn masks, too); mask_boxes (boxes of an image on which they
    are learned); least, overlap, limit (of `boxes.suppress`); protocol (of boxes); crop (least and
    largest share of an image that a training view shows); size (side of the images, or height and
    width).

    Batches hold "image" uint8 [N, H, W, 3] or "feature", "boxes" float32 [N, B, 4], "box_labels"
    int32 [N, B], "box_valid" and "box_ignored" bool [N, B], and for masks "box_masks" bool
    [N, B, h, w] and "box_outlined" bool [N, B]; features are learned from as they are, without
    views. `predict` gives what `boxes.Detections` has and of masks also "masks", float32
    [N, limit, 28, 28], probabilities in the box.
    """
    net, size = _build(config), views.sides(config.size)
    find = functools.partial(_found, scale=config.range_scale, size=size)

    def loss(variables, batch, key, step):
        del step
        keys = jax.random.split(key)
        images, truth = _seen(batch, config, keys[0])
        levels, stats = net.levels(variables, images, batch.get("feature"), True)
        found = net.apply(variables, "box_head", levels)
        at = fcos.places([f.centre.shape[1:3] for f in found], config.range_scale)
        truth["boxes"] = truth["boxes"] * jnp.array([[[*size, *size]]], jnp.float32)
        shown = (truth[name] for name in ("boxes", "labels", "valid", "ignored"))
        wanted = fcos.targets(*shown, at=at)
        metrics = fcos.losses(*fcos.together(found), wanted, at)
        if config.masks:
            proposals = find(jax.lax.stop_gradient(found), limit=config.mask_boxes, **PROPOSED)
            of_masks = functools.partial(net.apply, variables, "mask_head")
            metrics["mask"] = _mask_loss(of_masks, levels, proposals, truth, keys[1], config)
        return sum(metrics.values()), Aux(metrics, {"batch_stats": stats})

    def predict(variables, batch):
        levels, _ = net.levels(variables, batch.get("image"), batch.get("feature"), False)
        options = {name: config[name] for name in ("limit", "overlap", "least")}
        given = find(net.apply(variables, "box_head", levels), **options)
        if not config.masks:
            return given._asdict()
        of_masks = functools.partial(net.apply, variables, "mask_head")
        return given._asdict() | {"masks": _masks(of_masks, levels, given, config)}

    def groups(name):
        return TRAIN if name in PARTS or name in net.trunk.parts else FROZEN

    init = functools.partial(_initial, net, config)
    return Task(init, loss, predict, groups, net.trunk.codec, reads=net.trunk.reads)


class _Net(NamedTuple):
    """The trunk, and by the names of their parameters the modules that stand on it."""

    trunk: Trunk
    modules: dict[str, Any]

    def apply(self, variables, name: str, x) -> Any:
        """What a module makes of x."""
        return self.modules[name].apply({"params": variables["params"][name]}, x)

    def levels(self, variables, images, feature, train: bool) -> tuple[list[jax.Array], Any]:
        """P3 to P7, and the trunk's new statistics."""
        layers, stats = self.trunk.features(variables, images, feature, train)
        return self.apply(variables, "pyramid", layers), stats


def _build(config: ConfigDict) -> _Net:
    shared = dict(channels=config.channels, dtype=jnp.dtype(config.dtype))
    modules: dict[str, Any] = {"pyramid": Pyramid(**shared)}
    shared |= dict(classes=config.classes, convolutions=config.convolutions)
    modules["box_head"] = BoxHead(**shared)
    if config.masks:
        modules["mask_head"] = MaskHead(**shared)
    return _Net(build_trunk(config), modules)


def _initial(net: _Net, config: ConfigDict, key: jax.Array, batch: Mapping[str, Any]) -> dict:
    """Variables; one image is enough, as for `Trunk.init`."""
    keys = jax.random.split(key, 4)
    images = views.centre(batch["image"][:1], config.size)
    variables = net.trunk.init(keys[0], images)
    layers, _ = net.trunk.features(variables, images, None, False)
    levels, drawn = net.modules["pyramid"].init_with_output(keys[1], layers)
    merge(variables, "pyramid", drawn)
    merge(variables, "box_head", net.modules["box_head"].init(keys[2], levels))
    if config.masks:
        region = jnp.zeros((1, regions.SIDE, regions.SIDE, config.channels), levels[0].dtype)
        merge(variables, "mask_head", net.modules["mask_head"].init(keys[3], region))
    return variables


def _found(found, *, scale, size, limit, overlap, least) -> Detections:
    at = fcos.places([f.centre.shape[1:3] for f in found], scale)
    return fcos.detections(found, at, size, limit, overlap, least)


def _seen(batch: Mapping[str, Any], config, key) -> tuple[jax.Array | None, dict[str, Any]]:
    """A view of the images, None of features, and of what is in it: {"boxes", "labels", "valid",
    "ignored" and of masks "masks", "outlined"}.

    Raises: IcmError if the batch lacks what is learned from.
    """
    for name, field in (("boxes", "boxes"), *([("box_masks", "outlines")] * config.masks)):
        if name not in batch:
            raise IcmError(
                f"objects are learned from {field}, and the batches of this data set have none; "
                f"data.{field} asks for them"
            )
    truth = {"boxes": batch["boxes"], "labels": batch["box_labels"]}
    shown, masks = batch["box_valid"] | batch["box_ignored"], batch.get("box_masks")
    images = None
    if "feature" not in batch:
        images, truth["boxes"], shown, masks = views.boxed(
            batch["image"], truth["boxes"], shown, masks, crop=tuple(config.crop), key=key
        )
    truth |= {"valid": shown & batch["box_valid"], "ignored": shown & batch["box_ignored"]}
    if config.masks:
        truth |= {"masks": masks, "outlined": truth["valid"] & batch["box_outlined"]}
    return images, truth


def _mask_loss(of_masks, levels: Sequence, proposals: Detections, truth, key, config) -> jax.Array:
    """Binary cross-entropy of the masks of each box's own class (He et al. 2017, section 3), mean
    over pixels, boxes and images; `truth` has boxes in pixels."""
    size = jnp.array([[*views.sides(config.size)] * 2], jnp.float32)
    step = views.sides(config.size)[0] / truth["masks"].shape[2]

    def one(levels, given, there, key, boxes, outlined, masks, labels):
        chosen, rows, counts = regions.examples(
            given * size, there, boxes, outlined, config.mask_boxes, key
        )
        level = regions.level_of(chosen, config.range_scale)
        wanted = regions.mask_targets(masks, step, chosen, rows, MASK_SIDE)
        return regions.roi_align(levels, chosen, level), wanted, labels[rows], counts

    keys = jax.random.split(key, len(truth["labels"]))
    given = (truth[name] for name in ("boxes", "outlined", "masks", "labels"))
    x, wanted, labels, counts = jax.vmap(one)(
        tuple(levels[:3]), proposals.boxes, proposals.valid, keys, *given
    )
    x, wanted, labels, counts = (v.reshape(-1, *v.shape[2:]) for v in (x, wanted, labels, counts))
    logits = _of_class(of_masks(x), labels)
    cross = optax.sigmoid_binary_cross_entropy(logits, wanted).mean(axis=(1, 2))
    counts = counts.astype(jnp.float32)
    return (cross * counts).sum() / jnp.maximum(counts.sum(), 1.0)


def _masks(of_masks, levels: Sequence, found: Detections, config) -> jax.Array:
    """Probabilities float32 [N, D, 28, 28]; an image at a time, for boxes are many."""
    size = jnp.array([[*views.sides(config.size)] * 2], jnp.float32)

    def one(given):
        levels, boxes, labels = given
        boxes = boxes * size
        x = regions.roi_align(levels, boxes, regions.level_of(boxes, config.range_scale))
        return jax.nn.sigmoid(_of_class(of_masks(x), labels))

    return jax.lax.map(one, (tuple(levels[:3]), found.boxes, found.labels))


def _of_class(masks: jax.Array, labels: jax.Array) -> jax.Array:
    """[M, s, s, K] -> [M, s, s], those of the class that each one has, int32 [M]."""
    return jnp.take_along_axis(masks, labels.reshape(-1, 1, 1, 1), axis=3)[..., 0]
