"""Darknet's .cfg files as detectors (Redmon 2013 to 2018; Bochkovskiy et al. 2020, YOLOv4).

    [convolutional]         a section is a layer; the first one, [net], is none
    batch_normalize = 1     an option; spaces mean nothing, # and ; begin a comment
    filters = 32            of an option that stands twice the first one counts, as in Darknet

What concerns training alone is passed over. All else that is not as here would give other results:
it is an error that names the line.
"""

from collections.abc import Callable
from typing import NamedTuple

from icm_jax.errors import IcmError
from icm_jax.nets.detector import ACTIVATIONS, Detector, Layer, Shape, cut, shapes


class Cfg(NamedTuple):
    """A file: its detector, and (height, width) of the images that it was written for."""

    detector: Detector
    size: tuple[int, int]


class Section(NamedTuple):
    """name: without brackets. line: its number. options: {name: (value, number of its line)}."""

    name: str
    line: int
    options: dict[str, tuple[str, int]]


def parse(text: str, name: str, split: int = 0) -> Cfg:
    """The network of a .cfg file.

    Args:
      text: what the file holds. name: of the file, for errors.
      split: see `Detector`; 0: see `icm_jax.nets.detector.cut`.

    Raises: IcmError, with the line, for a section or an option that is not known, a value that is
      none, a layer that cannot be where it is, or outputs that do not fit their anchors and
      classes.
    """
    first, *layers = _sections(text, name)
    table: list[Layer] = []
    outputs: list[_Output] = []
    try:
        if first.name not in ("net", "network"):
            raise _at(first.line, f"the first section must be [net], not [{first.name}]")
        if _number(first, "channels", 3) != 3:
            raise _at(first.options["channels"][1], "images have 3 channels here")
        size = _number(first, "height", 0), _number(first, "width", 0)
        for section in layers:
            table.append(_layer(section, len(table)))
            try:
                shape = shapes(tuple(table))[-1]
            except IcmError as error:
                raise _at(section.line, str(error)) from error
            if table[-1].kind == "detect":
                outputs.append(_output(section, shape))
        if not outputs:
            raise _at(first.line, "the network has no [yolo]")
    except IcmError as error:
        raise IcmError(f"{name}, {error}") from error
    anchors, masks, strides, classes = zip(*outputs, strict=True)
    if len(set(classes)) > 1:
        raise IcmError(f"{name}: its outputs are for {sorted(set(classes))} classes; all need one")
    try:
        return Cfg(Detector(table, anchors, strides, split or cut(tuple(table)), masks), size)
    except IcmError as error:
        raise IcmError(f"{name}: {error}") from error


class _Output(NamedTuple):
    anchors: tuple[tuple[float, float], ...]
    mask: tuple[int, ...]
    stride: int
    classes: int


def _sections(text: str, name: str) -> list[Section]:
    found: list[Section] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = "".join(raw.partition("#")[0].partition(";")[0].split())
        if line.startswith("["):
            if not line.endswith("]"):
                raise IcmError(f"{name}, line {number}: a section is [name], not {line!r}")
            found.append(Section(line[1:-1], number, {}))
        elif line:
            option, equals, value = line.partition("=")
            if not found or not equals or not option:
                raise IcmError(
                    f"{name}, line {number}: expected [section] or option=value, not {line[:60]!r}"
                )
            found[-1].options.setdefault(option, (value, number))
    if not found:
        raise IcmError(f"{name} is no Darknet .cfg: it has no [section]")
    return found


def _layer(section: Section, number: int) -> Layer:
    """The section as layer `number`."""
    kind = _SHORT.get(section.name, section.name)
    if kind not in _LAYERS:
        raise _at(
            section.line,
            f"there is no layer [{section.name}] here; there are {', '.join(_LAYERS)}",
        )
    read, options = _LAYERS[kind]
    for option, (value, line) in section.options.items():
        if option in _TRAINING:
            continue
        if option not in options:
            raise _at(line, f"[{section.name}] has no option {option!r} that is known here")
        allowed = options[option].split()
        if allowed and value not in allowed:
            raise _at(
                line,
                f"[{section.name}] with {option}={value} would give other results; here it is "
                f"{' or '.join(allowed)}",
            )
    return read(section, number)


def _convolutional(section: Section, number: int) -> Layer:
    del number
    size = _number(section, "size", 1)
    padding = size // 2 if _number(section, "pad", 0) else _number(section, "padding", 0)
    if size % 2 == 0 or padding != size // 2:
        raise _at(
            section.line,
            f"a convolution of size {size} with {padding} pixels of padding cannot be had; sizes "
            "are odd, and with pad=1 the sides stay as they are",
        )
    activation = section.options.get("activation", ("logistic", section.line))
    if activation[0] not in ACTIVATIONS:
        raise _at(
            activation[1],
            f"there is no activation {activation[0]!r} here; there are {', '.join(ACTIVATIONS)}",
        )
    return Layer(
        "conv",
        _number(section, "filters", 1),
        size,
        _number(section, "stride", 1),
        activation=activation[0],
        normalised=bool(_number(section, "batch_normalize", 0)),
    )


def _maxpool(section: Section, number: int) -> Layer:
    del number
    stride = _number(section, "stride", 1)
    size = _number(section, "size", stride)
    if _number(section, "padding", size - 1) != size - 1:
        raise _at(section.options["padding"][1], f"padding of this [maxpool] is {size - 1} here")
    return Layer("maxpool", kernel=size, stride=stride)


def _route(section: Section, number: int) -> Layer:
    groups = _number(section, "groups", 1), _number(section, "group_id", 0)
    return Layer(
        "route", inputs=_before(section, "layers", number), groups=groups[0], group=groups[1]
    )


def _shortcut(section: Section, number: int) -> Layer:
    return Layer("shortcut", inputs=_before(section, "from", number))


def _upsample(section: Section, number: int) -> Layer:
    del number
    return Layer("upsample", stride=_number(section, "stride", 2))


def _yolo(section: Section, number: int) -> Layer:
    del number
    return Layer("detect", scale=_numbers(section, "scale_x_y", float, "1")[0])


def _output(section: Section, shape: Shape) -> _Output:
    """Anchors and classes of a [yolo] whose input has this shape."""
    sides = _numbers(section, "anchors", float)
    pairs = list(zip(sides[::2], sides[1::2], strict=False))
    count = _number(section, "num", len(pairs))
    mask = _numbers(section, "mask", int, ",".join(map(str, range(count))))
    line = section.options.get("mask", ("", section.line))[1]
    if len(sides) % 2 or len(pairs) < count or not all(0 <= i < count for i in mask):
        raise _at(
            line,
            f"mask {','.join(map(str, mask))} does not go with {count} anchors (num) of "
            f"{len(sides)} numbers; each anchor has two, the mask counts them from 0 on",
        )
    classes = _number(section, "classes", 20)
    if classes < 1 or shape.channels != len(mask) * (5 + classes):
        raise _at(
            section.line,
            f"{len(mask)} anchors and {classes} classes take {len(mask) * (5 + classes)} filters, "
            f"5 + classes for each anchor; the layer before has {shape.channels}",
        )
    return _Output(tuple(pairs[i] for i in mask), mask, shape.stride, classes)


def _before(section: Section, option: str, number: int) -> tuple[int, ...]:
    """Numbers of layers; negative ones count back from this one."""
    return tuple(i + number if i < 0 else i for i in _numbers(section, option, int))


def _number(section: Section, option: str, default: int) -> int:
    return _numbers(section, option, int, str(default))[0]


def _numbers(section: Section, option: str, kind: Callable, default: str = "") -> tuple:
    value, line = section.options.get(option, (default, section.line))
    try:
        return tuple(kind(item) for item in value.rstrip(",").split(","))
    except ValueError as error:
        what = "numbers" if kind is float else "whole numbers"
        raise _at(line, f"[{section.name}] needs {option} = {what}, not {value!r}") from error


def _at(line: int, text: str) -> IcmError:
    return IcmError(f"line {line}: {text}")


_SHORT = {"conv": "convolutional", "max": "maxpool"}
_LAYERS: dict[str, tuple[Callable[[Section, int], Layer], dict[str, str]]] = {
    "convolutional": (
        _convolutional,
        dict(filters="", size="", stride="", pad="", padding="", batch_normalize="", activation="")
        | dict(groups="1", dilation="1", binary="0", xnor="0", flipped="0", antialiasing="0"),
    ),
    "maxpool": (
        _maxpool,
        dict(size="", stride="", padding="", maxpool_depth="0", antialiasing="0"),
    ),
    "route": (_route, dict(layers="", groups="", group_id="")),
    "shortcut": (_shortcut, {"from": "", "activation": "linear", "weights_type": "none"}),
    "upsample": (_upsample, dict(stride="", scale="1 1.0")),
    "yolo": (
        _yolo,
        dict(mask="", anchors="", classes="", num="", scale_x_y="")
        | dict(new_coords="0", nms_kind="default greedynms"),
    ),
}
"""Section -> (what reads it, {option: the values that it may have, "" for any})."""
_TRAINING = frozenset(
    (
        "learning_rate burnin_update clip train_only_bn stopbackward dontsave onlyforward jitter "
        "ignore_thresh truth_thresh iou_thresh random resize max max_delta iou_loss iou_normalizer "
        "obj_normalizer cls_normalizer delta_normalizer label_smooth_eps focal_loss beta_nms "
        "objectness_smooth counters_per_class"
    ).split()
)
