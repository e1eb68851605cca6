"""Another detector: pooling in place of strides, two outputs of different counts of anchors.

It is cut where its feature is at 1/4 of the image, not at 1/8 as YOLOv3's.
"""

import pathlib

from ml_collections import ConfigDict

from icm_jax.main import load_experiment
from icm_jax.nets.detector import Detector, Layer

HALF = Layer("maxpool", kernel=2, stride=2)


def pooled(classes: int, width: int = 8) -> Detector:
    """Numbers of anchors are 3 at 1/16 and 2 at 1/8."""

    def linear(anchors):
        features = anchors * (5 + classes)
        return Layer("conv", features, activation="linear", normalised=False)

    table = (
        Layer("conv", width, 3),
        HALF,
        Layer("conv", 2 * width, 3),
        HALF,
        Layer("conv", 2 * width, 3),  # the last of the front
        HALF,
        Layer("conv", 4 * width, 3),
        Layer("maxpool", kernel=3),
        HALF,
        Layer("conv", 4 * width, 3),
        linear(3),
        Layer("detect"),
        Layer("route", inputs=(9,)),
        Layer("conv", 2 * width),
        Layer("upsample", stride=2),
        Layer("route", inputs=(14, 7)),
        linear(2),
        Layer("detect"),
    )
    anchors = ((100, 100), (200, 120), (120, 200)), ((40, 40), (70, 70))
    return Detector(table, anchors, strides=(16, 8), split=5)


def runs() -> list:
    """The detector's, then a codec's for it: those of configs/scalable.py, four steps long."""
    config = pathlib.Path(__file__).parents[2] / "configs" / "scalable.py"
    scalable = load_experiment(config)
    fields = scalable.tiny()
    fields["detector"]["model"]["detector"] = dict(name="pooled", width=6)
    return scalable.runs(ConfigDict(fields))
