"""The detectors that configs name.

YOLOv3 (Redmon and Farhadi 2018): Darknet-53, three outputs; layers are numbered as in the public
yolov3.cfg, so that 107 layers and the order of a .weights file follow from one table.
"""

import functools
import inspect
from collections.abc import Callable

from icm_jax.errors import IcmError
from icm_jax.files import read
from icm_jax.nets import cfg
from icm_jax.nets.detector import Detector, Layer

ANCHORS = (
    ((116, 90), (156, 198), (373, 326)),
    ((30, 61), (62, 45), (59, 119)),
    ((10, 13), (16, 30), (33, 23)),
)
"""Of YOLOv3 per output, coarsest first, for images of 416 × 416 pixels."""
_MOST = 4
_BLOCKS, _CHANNELS = (1, 2, 8, 8, 4), (64, 128, 256, 512, 1024)


@functools.cache
def yolov3(classes: int, width: float = 1.0, depth: float = 1.0, split: int = 0) -> Detector:
    """YOLOv3, cut after its third convolution with stride 2: after 13 layers of the full network,
    with 256 channels at 1/8 (Özyılkan et al. 2023; Choi and Bajić 2022).

    Args:
      classes: K; each anchor has 5 + K outputs.
      width: factor of all channel counts. depth: factor of the residual blocks per scale, at least
        one each. split: another cut than that; see `Detector`.

    Raises: IcmError if K or a factor is not positive.
    """
    if classes < 1 or not 0 < width <= _MOST or not 0 < depth <= _MOST:
        raise IcmError(
            f"no detector of {classes} classes, width {width:g}, depth {depth:g}: give at least "
            f"one class and positive factors, at most {_MOST}"
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
    masks = (6, 7, 8), (3, 4, 5), (0, 1, 2)
    return Detector(tuple(table), ANCHORS, (32, 16, 8), split or halvings[2] + 1, masks)


TINY_ANCHORS = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))
"""Of YOLOv3-tiny, for images of 416 × 416 pixels."""
TINY_MASKS = (3, 4, 5), (1, 2, 3)
"""Which of them each output has."""


@functools.cache
def yolov3_tiny(classes: int, split: int = 0) -> Detector:
    """YOLOv3-tiny: 24 layers, outputs at 1/32 and 1/16, cut after its convolution with 128 channels
    at 1/8, or with split=9 after the one with 256 at 1/16.

    The second output has the anchors 1, 2, 3. Its .cfg says `mask = 0,1,2`, but the published
    weights were trained with these: with 0, 1, 2 boxes are too small, and of 64 photographs of COCO
    mAP@.5 is 29.5 % in place of 44.7 %.

    Args:
      classes: K. split: see `Detector`; 0: 7.

    Raises: IcmError if K is not positive, or for a cut that loses something.
    """
    if classes < 1:
        raise IcmError(f"no detector of {classes} classes: give at least one class")

    def linear(mask):
        features = len(mask) * (5 + classes)
        return Layer("conv", features, activation="linear", normalised=False)

    table = [Layer("conv", 16, 3)]
    for channels in (32, 64, 128, 256, 512):
        table += Layer("maxpool", kernel=2, stride=2), Layer("conv", channels, 3)
    table += Layer("maxpool", kernel=2), Layer("conv", 1024, 3), Layer("conv", 256)
    table += Layer("conv", 512, 3), linear(TINY_MASKS[0]), Layer("detect")
    table += Layer("route", inputs=(13,)), Layer("conv", 128), Layer("upsample", stride=2)
    table += Layer("route", inputs=(19, 8)), Layer("conv", 256, 3)
    table += linear(TINY_MASKS[1]), Layer("detect")
    anchors = [[TINY_ANCHORS[i] for i in mask] for mask in TINY_MASKS]
    return Detector(table, anchors, (32, 16), split or 7, TINY_MASKS)


def from_cfg(classes: int, text: str, path: str = "the .cfg", split: int = 0) -> Detector:
    """The detector of Darknet's .cfg file `path`, which holds `text`; see `icm_jax.nets.cfg`.

    Raises: IcmError as `cfg.parse`, or if it is for another number of classes.
    """
    found = cfg.parse(text, path, split).detector
    if found.classes != classes:
        raise IcmError(
            f"{path} is for {found.classes} classes, the data have {classes}; give data with its "
            "classes, in its order"
        )
    return found


PUBLISHED: dict[str, Callable[..., Detector]] = {"yolov3": yolov3, "yolov3-tiny": yolov3_tiny}
"""Name of a .weights file -> what builds its network of so many classes."""
DETECTORS: dict[str, Callable[..., Detector]] = PUBLISHED | {"cfg": from_cfg}
"""Name -> builder; it takes the number of classes and what a config says besides."""


def whole(config) -> dict:
    """A config's field `detector` as what it names: {"name": "mine.cfg"} with the file's text in
    place of its place, so that a run keeps its network; any other one as it is.

    Raises: IcmError if there is no such file.
    """
    fields = {key: config[key] for key in config}
    if not str(fields["name"]).endswith(".cfg"):
        return fields
    path = fields["name"]
    return fields | {"name": "cfg", "path": path, "text": read(path).decode(errors="replace")}


def outline(config) -> str:
    """A line on the detector of such a field: its name, layers, outputs and anchors.

    Raises: IcmError as `build_detector`.
    """
    fields = whole(config)
    if fields["name"] != "cfg":
        return f"{fields['name']}, {build_detector(fields, 1)}"
    return f"{fields['path']}, {cfg.parse(fields['text'], fields['path']).detector}"


def build_detector(config, classes: int) -> Detector:
    """The detector of a config's field `detector`: its name, and the builder's further arguments.

    Raises: IcmError for an unknown name or arguments that the builder does not take.
    """
    config = whole(config)
    fields = {key: config[key] for key in config if key != "name"}
    if config["name"] not in DETECTORS:
        raise IcmError(f"unknown detector {config['name']!r}; choose one of {', '.join(DETECTORS)}")
    build = DETECTORS[config["name"]]
    try:
        inspect.signature(build).bind(classes, **fields)
    except TypeError as error:
        raise IcmError(f"no detector {config['name']} of {fields}: {error}") from error
    return build(classes, **fields)
