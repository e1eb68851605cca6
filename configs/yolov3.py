"""The detector: YOLOv3 trained from scratch, scored on pixels and on JPEG and WebP files.

    Command: python -m icm_jax.main --config=configs/yolov3.py
    Takes:   not timed alone: the first run of configs/scalable.py's two hours
    On:      2 CPU cores
    Expect:  78.7 % mAP@.5 on the pixels of `scenes`

    Command: python -m icm_jax.main --config=configs/yolov3.py:photos --config.data.path=FOLDER \\
                 --config.train.steps=1500
    Takes:   55 minutes for 128 photographs of COCO with 71 classes
    On:      a shared CPU core
    Expect:  20.3 % mAP@.5 on these, 1.5 % on 64 others: too few to detect others by

    Command: python -m icm_jax.main --config=configs/yolov3.py:tiny-coco --config.train.steps=0 \\
                 --config.data.path=FOLDER --config.weights.path=yolov3-tiny.weights
    Takes:   3 minutes for 64 photographs of COCO's val2017 on pixels and 11 JPEG and WebP qualities
    On:      2 CPU cores
    Expect:  44.4 % mAP@.5 on the pixels

    Command: python -m icm_jax.main --config=configs/yolov3.py:coco
    Takes:   not run here; with `--config.weights.path=yolov3.weights --config.train.steps=0` it
             scores published weights
    On:      accelerators; `--mode=plan` says which
    Expect:  no number of ours: published schedule

`FOLDER` holds `images/`, `train.json` and `val.json`. Any other network of that family is named by
its file, `--config.model.detector.name=mine.cfg`, with its own weights; `--config.data.canvas`
and `--config.model.size` are then the size that it names.
"""

import ml_collections

from configs import common
from icm_jax.engine.run import Labels, Point, Run, make_run
from icm_jax.measure.points import file_points
from icm_jax.nets.yolo import outline, whole


def demo() -> dict:
    """A quarter of the channels, a third of the depth, 96 × 96 pixels."""
    return dict(
        name="yolov3",
        seeds=(0,),
        data=common.scenes(train=5000, validation=400, boxes=4),  # boxes of an image at most
        model=dict(
            detector=dict(name="yolov3", width=0.25, depth=0.34),
            dtype="float32",
            size=96,
            anchor_scale=96 / 416,  # 1: the published sizes in pixels
            crop=(0.5, 1.0),
            least=0.005,
            overlap=0.45,
            limit=100,
            protocol="coco",  # of average precision; or voc2007, voc2010
        ),
        train=common.loop(
            clip_norm=10.0,
            save_every=500,
            **common.stage(steps=4000, learning_rate=1e-3, warmup_steps=200, weight_decay=1e-4),
        ),
        # A file to start from, and its reader; with train.steps=0 it is taken as it is.
        weights=dict(reader="darknet", path=""),
        files=common.files(jpeg=(5, 10, 15, 25, 50, 80), webp=(0, 10, 25, 50, 80)),
    )


def photos() -> dict:
    """The same network on a folder of photographs at 256 × 256 pixels."""
    config = demo()
    config["data"] = dict(name="coco_json", path="", canvas=256, boxes=60)
    config["model"].update(size=256, anchor_scale=256 / 416, crop=(0.3, 1.0))
    config["train"].update(batch_size=8)
    return config


def coco() -> dict:
    """As published (Redmon and Farhadi 2018, yolov3.cfg): 416 pixels, batch 64, 500,200 steps."""
    config = demo()
    config["data"] = dict(name="coco/2014", path="", canvas=416, boxes=100)
    config["model"].update(size=416, anchor_scale=1.0, crop=(0.3, 1.0))
    config["model"]["detector"].update(width=1.0, depth=1.0)
    config["train"].update(steps=500_200, batch_size=64, optimiser="sgd", weight_decay=5e-4)
    config["train"].update(warmup_steps=1000, save_every=5000)
    return config


def tiny_coco() -> dict:
    """YOLOv3-tiny at 416 pixels as Darknet runs it, for its published weights."""
    config = coco()
    config["data"].update(name="coco_json", letterbox="centre")
    config["model"]["detector"] = dict(name="yolov3-tiny", split=0)  # 0: where its builder cuts
    return config


def tiny() -> dict:
    """A few steps of the demo, for tests."""
    config = demo()
    config["data"] = common.scenes(train=16, validation=4, canvas=64, boxes=4)
    config["model"].update(size=64, anchor_scale=64 / 416)
    config["model"]["detector"].update(width=1 / 16, depth=0.1)
    config["train"].update(common.few(), steps=4, warmup_steps=1)
    config.update(files=common.files(jpeg=(20,), webp=(20,)))
    return config


get_config = common.scales(demo, photos, tiny_coco, coco, tiny)


def runs(config: ml_collections.ConfigDict) -> list[Run]:
    """A detector per seed."""
    return [detector_run(config, seed) for seed in config.seeds]


def notes(config: ml_collections.ConfigDict) -> list[str]:
    """What the detector is: a .cfg and weights may be of two minds about its anchors."""
    return [f"The detector: {outline(config.model.detector)}."]


def detector_run(config, seed: int) -> Run:
    """One detector."""
    return make_run(
        config,
        config.train,
        name=f"seed{seed}/detector",
        seed=seed,
        task=dict(config.model, name="detection", detector=whole(config.model.detector)),
        weight_decay=config.train.weight_decay,
        weights=common.foreign(config.weights),
        needs=("objects",),
        evaluate=(Point("pixels"), *file_points(config.files)),
        labels=Labels("detect", "detector"),
    )
