"""Detectors as Darknet describes them (Redmon and Farhadi 2018): a table of layers, cut in two.

    image -> front (layers 0 ... split - 1) -> f -> tail (the rest) -> raw outputs

A table is data: what layers are, which anchors each output has, where the network may be cut. All
of it is checked when a `Detector` is made, so no network with a typing error in it is ever built.
Numbers of layers are those of Darknet's .cfg files, shortcuts and routes included.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from icm_jax import ops
from icm_jax.errors import IcmError
from icm_jax.nets.layers import end_of_block
from icm_jax.nets.resnet import BatchNorm, Conv

MOST_LAYERS, MOST_CHANNELS, MOST_TAPS = 1 << 9, 1 << 14, 1 << 4
"""Of a table; of a layer; of the side of a kernel, or of a stride."""
KINDS = ("conv", "maxpool", "shortcut", "upsample", "route", "detect")
ACTIVATIONS = {
    "leaky": functools.partial(nn.leaky_relu, negative_slope=0.1),
    "linear": lambda x: x,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
}
"""Darknet's name -> function."""


class Layer(NamedTuple):
    """One layer of a table.

    kind: conv (k×k, stride 1 or 2, then BatchNorm or else a bias, then the activation), maxpool
      (k×k), shortcut (adds the output of layer `inputs[0]`), upsample (repeats rows and columns
      `stride` times), route (concatenates `inputs`) or detect (an output).
    groups, group: of route: of each input the channels of one of so many equal groups, from 0 on.
    scale: of detect: how far a centre may leave its cell, 1 for not at all; see `boxes.place`.
    features, normalised, activation: of conv. kernel, stride: of conv and maxpool; both give
      ceil(side / stride) rows, and what lies outside is 0, of maxpool -inf.
    """

    kind: str
    features: int = 0
    kernel: int = 1
    stride: int = 1
    inputs: tuple[int, ...] = ()
    activation: str = "leaky"
    normalised: bool = True
    groups: int = 1
    group: int = 0
    scale: float = 1.0


class Shape(NamedTuple):
    """Of a layer's output: its channels, and how many pixels of the image a step of its grid is."""

    channels: int
    stride: int


class _Fields(NamedTuple):
    table: tuple[Layer, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...]
    strides: tuple[int, ...]
    split: int
    masks: tuple[tuple[int, ...], ...] = ()


class Detector(_Fields):
    """A detector as data; equal ones are equal, and their JSON is of lists that make them again.

    Attributes:
      table: the layers.
      anchors: per output, in the order of the table, (width, height) in pixels of each anchor.
      strides: per output, pixels between the centres of two cells.
      split: how many layers the front has; what comes after them needs nothing earlier.
      masks: per output, which of all anchors of its .cfg those are; () if it comes from none.

    Raises: IcmError, by the constructor, if the table is none or the rest does not belong to it.
    """

    __slots__ = ()

    def __new__(cls, table, anchors, strides, split, masks=()):
        rows = tuple(Layer(*row) for row in table)
        self = super().__new__(
            cls,
            tuple(row._replace(inputs=tuple(row.inputs)) for row in rows),
            tuple(tuple((float(w), float(h)) for w, h in output) for output in anchors),
            tuple(strides),
            split,
            tuple(map(tuple, masks)),
        )
        _check_outputs(self)
        check_split(self.table, split)
        return self

    @property
    def classes(self) -> int:
        """K; each anchor has 5 + K outputs."""
        first = [layer.kind for layer in self.table].index("detect")
        return shapes(self.table)[first].channels // len(self.anchors[0]) - 5

    @property
    def feature(self) -> Shape:
        """Of f."""
        return shapes(self.table)[self.split - 1]

    @property
    def grid(self) -> int:
        """Sides of images are multiples of it, so that no layer's grid is cut."""
        return math.lcm(*(shape.stride for shape in shapes(self.table)))

    @property
    def scales(self) -> tuple[float, ...]:
        """Of each output; see `Layer`."""
        return tuple(layer.scale for layer in self.table if layer.kind == "detect")

    def __str__(self) -> str:
        """A line on its outputs, with their anchors and masks."""
        masks = [f" (mask {','.join(map(str, mask))})" for mask in self.masks]
        outputs = [
            f"1/{stride} with anchors {', '.join(f'{w:g} × {h:g}' for w, h in pairs)}{mask}"
            for stride, pairs, mask in zip(
                self.strides, self.anchors, masks or [""] * len(self.strides), strict=True
            )
        ]
        return f"{len(self.table)} layers, outputs at {'; at '.join(outputs)}"


@functools.cache
def shapes(table: tuple[Layer, ...], channels: int = 3) -> tuple[Shape, ...]:
    """Of each layer's output, for images of so many channels.

    Raises: IcmError that names the layer which is of an unknown kind or cannot be where it is.
    """
    if len(table) > MOST_LAYERS:
        raise IcmError(f"a detector of {len(table)} layers; at most {MOST_LAYERS}")
    found: list[Shape] = []
    for number, layer in enumerate(table):
        try:
            if not all(0 <= i < number for i in layer.inputs):
                raise IcmError(f"takes layers {layer.inputs}; only those before it are there")
            before = found[-1] if found else Shape(channels, 1)
            found.append(_shape(layer, before, [found[i] for i in layer.inputs]))
            if max(found[-1]) > MOST_CHANNELS:
                raise IcmError(f"would have {found[-1]}; numbers go up to {MOST_CHANNELS}")
        except IcmError as error:
            raise IcmError(f"layer {number} ({layer.kind}) of the detector {error}") from error
    return tuple(found)


def _shape(layer: Layer, before: Shape, inputs: list[Shape]) -> Shape:
    if layer.kind not in KINDS:
        raise IcmError(f"is of an unknown kind; there are {', '.join(KINDS)}")
    numbers = layer.kernel, layer.stride, layer.features
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise IcmError(f"has other numbers than whole ones: {numbers}"[:200])
    if not (1 <= layer.kernel <= MOST_TAPS and 1 <= layer.stride <= MOST_TAPS):
        raise IcmError(
            f"has kernel {layer.kernel} and stride {layer.stride}; both are 1 to {MOST_TAPS}"
        )
    if layer.kind == "conv":
        if layer.features < 1 or layer.stride > 2 or layer.activation not in ACTIVATIONS:
            raise IcmError(
                f"has {layer.features} features, stride {layer.stride} and activation "
                f"{layer.activation!r}; there are features from 1 on, strides 1 and 2, activations "
                f"{', '.join(ACTIVATIONS)}"
            )
        return Shape(layer.features, before.stride * layer.stride)
    if layer.kind == "maxpool":
        return Shape(before.channels, before.stride * layer.stride)
    if layer.kind == "upsample":
        if before.stride % layer.stride:
            raise IcmError(f"makes {layer.stride} rows of one where only {before.stride} are one")
        return Shape(before.channels, before.stride // layer.stride)
    if layer.kind == "shortcut" and (len(inputs) != 1 or inputs[0] != before):
        raise IcmError(f"adds {inputs} to {before}; it takes one layer of the same shape")
    if layer.kind == "route":
        if len({shape.stride for shape in inputs}) != 1:
            raise IcmError(f"joins {inputs}; it takes one layer or more of the same stride")
        if any(shape.channels % max(1, layer.groups) for shape in inputs) or (
            not 0 <= layer.group < layer.groups
        ):
            raise IcmError(
                f"takes group {layer.group} of {layer.groups} of {inputs}; groups begin at 0 and "
                "divide the channels"
            )
        return Shape(sum(shape.channels // layer.groups for shape in inputs), inputs[0].stride)
    return before


def reach(table: tuple[Layer, ...], end: int) -> int:
    """How many pixels beyond its own an element of the output of layer end - 1 looks, at most."""
    found, far = shapes(table), [0]
    for number, layer in enumerate(table[:end]):
        before, stride = far[-1], found[number - 1].stride if number else 1
        if layer.kind in ("conv", "maxpool"):
            far.append(before + layer.kernel // 2 * stride)
        elif layer.kind == "upsample":
            far.append(before + stride - stride // layer.stride)
        else:
            inputs = [far[i + 1] for i in layer.inputs]
            far.append(max(inputs if layer.kind == "route" else [before, *inputs]))
    return far[-1]


def _check_outputs(detector: Detector) -> None:
    """Raises IcmError unless anchors and strides are those of the table's outputs."""
    table = detector.table
    found = [s for layer, s in zip(table, shapes(table), strict=True) if layer.kind == "detect"]
    if not found or not len(found) == len(detector.anchors) == len(detector.strides):
        raise IcmError(
            f"the detector's table has {len(found)} outputs, with anchors for "
            f"{len(detector.anchors)} and strides for {len(detector.strides)}; give each both"
        )
    strides = tuple(shape.stride for shape in found)
    if strides != detector.strides:
        raise IcmError(f"strides of the table are {strides}, not {detector.strides}")
    classes = set()
    for shape, anchors in zip(found, detector.anchors, strict=True):
        if not anchors or min(min(pair) for pair in anchors) <= 0:
            raise IcmError(f"anchors are pairs of a width and a height above 0, not {anchors}")
        outputs, rest = divmod(shape.channels, len(anchors))
        if rest or outputs < 6:
            raise IcmError(
                f"{shape.channels} channels are no output for {len(anchors)} anchors: each takes 5 "
                "and the number of classes, at least 1"
            )
        classes.add(outputs - 5)
    if len(classes) > 1:
        raise IcmError(f"outputs of the detector are for {sorted(classes)} classes; all need one")


def cut(table: tuple[Layer, ...], stride: int = 8) -> int:
    """Where to cut a table for which nothing is said: after the first convolution at 1/8 of the
    image that may be the last of the front, as Özyılkan et al. 2023 cut YOLOv3; else as late as can
    be. Raises: IcmError as `shapes`."""
    possible = []
    for split, (layer, shape) in enumerate(zip(table, shapes(table), strict=True), 1):
        try:
            check_split(table, split)
        except IcmError:
            continue
        possible.append(split)
        if layer.kind == "conv" and shape.stride == stride:
            return split
    return max(possible, default=1)


def check_split(table: tuple[Layer, ...], split: int) -> None:
    """Raises IcmError if what comes after `split` layers needs more than the last one's output."""
    if not 0 < split < len(table):
        raise IcmError(f"a detector of {len(table)} layers is cut after 1 to {len(table) - 1}")
    for number in range(split, len(table)):
        early = [i for i in table[number].inputs if i < split - 1]
        if early:
            raise IcmError(
                f"the detector cannot be cut after {split} layers: layer {number} "
                f"({table[number].kind}) also needs the output of layer {early[0]}"
            )
    if any(layer.kind == "detect" for layer in table[:split]):
        raise IcmError(f"after {split} layers the detector has given outputs; cut it earlier")


class Part(ops.Module):
    """Layers begin ... end - 1 of a detector, all if not said; those of layer i are `layer{i}`
    and `norm{i}`.

    Attributes:
      dtype: of computation; parameters are float32.
    """

    detector: Detector
    begin: int = 0
    end: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, raw: bool = False):
        """The output of layer begin - 1 -> that of layer end - 1, or all outputs.

        Args:
          x: float [N, H, W, C]; an image on 0...1 if begin is 0.
          raw: x is the output of layer begin - 1, a conv, before its BatchNorm and activation,
            which are then done here with that layer's parameters.

        Returns: dtype [N, h, w, C'], or if the part ends with the network a tuple of
        float32 [N, h, w, A, 5 + K], one per output in the order of the table.
        """
        table, anchors = self.detector.table, self.detector.anchors
        end = len(table) if self.end is None else self.end
        x = self._activated(self.begin - 1, x, train) if raw else x
        done, found = {self.begin - 1: x}, []
        for number in range(self.begin, end):
            layer = table[number]
            if layer.kind == "conv":
                x = self._activated(number, self._convolved(number, x), train)
            elif layer.kind == "maxpool":
                pad = ((layer.kernel - 1) // 2, layer.kernel // 2)
                window, strides = (layer.kernel,) * 2, (layer.stride,) * 2
                pads: Any = (pad, pad)  # which Flax takes and types as a word alone
                x = nn.max_pool(ops.inside(x, -jnp.inf), window, strides, pads)
            elif layer.kind == "shortcut":
                x = end_of_block(x + done[layer.inputs[0]])
            elif layer.kind == "upsample":
                x = jnp.repeat(jnp.repeat(x, layer.stride, axis=1), layer.stride, axis=2)
            elif layer.kind == "route":
                parts = [jnp.split(done[i], layer.groups, -1)[layer.group] for i in layer.inputs]
                x = jnp.concatenate(parts, axis=-1)
            elif layer.kind == "detect":
                split = len(anchors[len(found)]), 5 + self.detector.classes
                found.append(x.astype(jnp.float32).reshape(*x.shape[:3], *split))
            else:
                raise IcmError(f"layers of kind {layer.kind!r} cannot be run")
            done[number] = x
        return tuple(found) if end == len(table) else x

    def _convolved(self, number, x):
        layer, options = self.detector.table[number], dict(dtype=self.dtype, name=f"layer{number}")
        x = ops.inside(x) if layer.kernel > 1 else x
        if layer.normalised:
            return Conv(layer.features, layer.kernel, layer.stride, **options)(x)
        pad = ((layer.kernel - 1) // 2, layer.kernel // 2)
        square = (layer.kernel,) * 2
        return nn.Conv(layer.features, square, layer.stride, (pad, pad), **options)(x)

    def _activated(self, number, x, train):
        layer = self.detector.table[number]
        if layer.normalised:
            x = BatchNorm(dtype=self.dtype, name=f"norm{number}")(x, train)
        return ACTIVATIONS[layer.activation](x)
