"""Boxes and masks of objects, by FCOS and Mask R-CNN's branch on a ResNet, of a COCO folder."""

import ml_collections

from icm_jax.engine.run import Labels, Point, make_run


def get_config():
    train = dict(steps=2000, batch_size=8, learning_rate=2e-3, optimiser="adamw", warmup_steps=100)
    train |= dict(log_every=20, save_every=500, clip_norm=5.0, accumulate=1, ema=0.0)
    train |= dict(fsdp=1, remat="none")
    # Objects of an image at most, and at every how many pixels their masks are learned.
    data = dict(name="coco_json", path="", canvas=(192, 256), boxes=20, outlines=4)
    model = dict(variant="18", width=32, size=(192, 256), crop=(0.4, 1.0), dtype="float32")
    model |= dict(frontend="pixels", masks=True, mask_boxes=16)
    model |= dict(channels=64, convolutions=2, range_scale=192 / 800)
    model |= dict(least=0.05, overlap=0.6, limit=50, protocol="coco")
    return ml_collections.ConfigDict(dict(name="objects", data=data, train=train, model=model))


def runs(config):
    masks = config.model.masks
    fields = dict(name="objects", seed=0, task=dict(config.model, name="object_detection"))
    fields |= dict(needs=("objects", "outlines") if masks else ("objects",))
    fields |= dict(labels=Labels("instances" if masks else "detect", "pixels"))
    scored = (Point("pixels"), Point("jpeg", 10), Point("jpeg", 40))
    return [make_run(config, config.train, weight_decay=1e-4, evaluate=scored, **fields)]
