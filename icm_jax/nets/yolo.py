"""The detectors that configs name.

YOLOv3 (Redmon and Farhadi 2018): Darknet-53, three outputs; layers are numbered as in the public
yolov3.cfg, so that 107 layers and the order of a .weights file follow from one table.
"""

import functools
import inspect

from icm_jax.errors import IcmError
from icm_jax.nets.detector import Detector, Layer

ANCHORS = (
    ((116, 90), (156, 198), (373, 326)),
    ((30, 61), (62, 45), (59, 119)),
    ((10, 13), (16, 30), (33, 23)),
)
"""Of YOLOv3 per output, coarsest first, for images of 416 × 416 pixels."""
_BLOCKS, _CHANNELS = (1, 2, 8, 8, 4), (64, 128, 256, 512, 1024)


@functools.cache
def yolov3(classes: int, width: float = 1.0, depth: float = 1.0) -> Detector:
    """YOLOv3, cut after its third convolution with stride 2: after 13 layers of the full network,
    with 256 channels at 1/8 (Özyılkan et al. 2023; Choi and Bajić 2022).

    Args:
      classes: K; each anchor has 5 + K outputs.
      width: factor of all channel counts. depth: factor of the residual blocks per scale, at least
        one each.

    Raises: IcmError if K or a factor is not positive.
    """
    if classes < 1 or width <= 0 or depth <= 0:
        raise IcmError(
            f"no detector of {classes} classes, width {width:g}, depth {depth:g}: give at least "
            "one class and positive factors"
        )

    def wide(channels):
        return max(1, round(channels * width))

    table, halvings = [Layer("conv", wide(32), 3)], []
    ends = []  # the last layer of each scale of the backbone
    for channels, blocks in zip(_CHANNELS, _BLOCKS, strict=True):
        halvings.append(len(table))
        table.append(Layer("conv", wide(channels), 3, 2))
        for _ in range(max(1, round(blocks * depth))):
            table.append(Layer("conv", wide(channels // 2)))
            table.append(Layer("conv", wide(channels), 3))
            table.append(Layer("shortcut", inputs=(len(table) - 3,)))
        ends.append(len(table) - 1)
    for scale, channels in enumerate((512, 256, 128)):
        if scale:
            table.append(Layer("route", inputs=(len(table) - 4,)))  # before the last 3×3
            table.append(Layer("conv", wide(channels)))
            table.append(Layer("upsample", stride=2))
            table.append(Layer("route", inputs=(len(table) - 1, ends[-1 - scale])))
        for _ in range(3):
            table.append(Layer("conv", wide(channels)))
            table.append(Layer("conv", wide(2 * channels), 3))
        outputs = len(ANCHORS[scale]) * (5 + classes)
        table.append(Layer("conv", outputs, activation="linear", normalised=False))
        table.append(Layer("detect"))
    return Detector(tuple(table), ANCHORS, (32, 16, 8), split=halvings[2] + 1)


DETECTORS = {"yolov3": yolov3}
"""Name -> builder; it takes the number of classes and what a config says besides."""


def build_detector(config, classes: int) -> Detector:
    """The detector of a config's field `detector`: its name, and the builder's further arguments.

    Raises: IcmError for an unknown name or arguments that the builder does not take.
    """
    fields = {key: config[key] for key in config if key != "name"}
    if config["name"] not in DETECTORS:
        raise IcmError(f"unknown detector {config['name']!r}; choose one of {', '.join(DETECTORS)}")
    build = DETECTORS[config["name"]]
    try:
        inspect.signature(build).bind(classes, **fields)
    except TypeError as error:
        raise IcmError(f"no detector {config['name']} of {fields}: {error}") from error
    return build(classes, **fields)
