"""YOLOv3 (Redmon and Farhadi 2018): Darknet-53, three detection scales; cut in two at any layer.

    image -> front (layers 0 ... split - 1) -> f -> tail (the rest) -> raw [H/32], [H/16], [H/8]

Layers are numbered as in the public yolov3.cfg, shortcuts and routes included, so that 107 layers
and the order of a .weights file follow from one table (`layers`). The default split, after the
third convolution with stride 2, gives f of 256 channels at H/8: after 13 layers of the full network
(Özyılkan et al. 2023; Choi and Bajić 2022).
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from icm_jax import ops
from icm_jax.errors import IcmError
from icm_jax.nets.layers import end_of_block
from icm_jax.nets.resnet import BatchNorm, Conv

ANCHORS = (
    ((116, 90), (156, 198), (373, 326)),
    ((30, 61), (62, 45), (59, 119)),
    ((10, 13), (16, 30), (33, 23)),
)
"""(width, height) in pixels of the three anchors of each scale, coarsest first, for 416 × 416."""
STRIDES = (32, 16, 8)
_BLOCKS, _CHANNELS = (1, 2, 8, 8, 4), (64, 128, 256, 512, 1024)


class Layer(NamedTuple):
    """One line of the network.

    kind: conv (k×k, BatchNorm, leaky ReLU), linear (1×1 with bias), shortcut (adds the output of
    layer `inputs[0]`), upsample (×2), route (concatenates `inputs`) or detect (an output).
    """

    kind: str
    features: int = 0
    kernel: int = 1
    stride: int = 1
    inputs: tuple[int, ...] = ()


@functools.cache
def layers(classes: int, width: float = 1.0, depth: float = 1.0) -> tuple[Layer, ...]:
    """The table of the network.

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

    table: list[Layer] = [Layer("conv", wide(32), 3)]
    ends = []  # the last layer of each scale of the backbone
    for channels, blocks in zip(_CHANNELS, _BLOCKS, strict=True):
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
            table.append(Layer("upsample"))
            table.append(Layer("route", inputs=(len(table) - 1, ends[-1 - scale])))
        for _ in range(3):
            table.append(Layer("conv", wide(channels)))
            table.append(Layer("conv", wide(2 * channels), 3))
        table.append(Layer("linear", len(ANCHORS[scale]) * (5 + classes)))
        table.append(Layer("detect"))
    return tuple(table)


def default_split(table: tuple[Layer, ...]) -> int:
    """How many layers go up to the third convolution with stride 2, it included: 13 of 107."""
    return [i for i, layer in enumerate(table) if layer.stride == 2][2] + 1


def check_split(table: tuple[Layer, ...], split: int) -> None:
    """Raises IcmError if what comes after `split` layers needs more than the last one's output."""
    if not 0 < split < len(table):
        raise IcmError(f"a detector of {len(table)} layers is cut after 1 to {len(table) - 1}")
    for number in range(split, len(table)):
        early = [i for i in table[number].inputs if i < split - 1]
        if early:
            raise IcmError(
                f"the detector cannot be cut after {split} layers: layer {number} "
                f"({table[number].kind}) also needs the output of layer {early[0]}; "
                f"after {default_split(table)} it can"
            )
    if any(layer.kind == "detect" for layer in table[:split]):
        raise IcmError(f"after {split} layers the detector has given outputs; cut it earlier")


class Part(ops.Module):
    """Layers begin ... end - 1; the parameters of layer i are `layer{i}`.

    Attributes:
      table: of the whole network. dtype: of computation; parameters are float32.
    """

    table: tuple[Layer, ...]
    begin: int
    end: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, raw: bool = False):
        """The output of layer begin - 1 -> that of layer end - 1, or all outputs of "detect".

        Args:
          x: float [N, H, W, C]; an image on 0...1 if begin is 0.
          raw: x is the output of layer begin - 1 (a "conv") before its BatchNorm and leaky ReLU,
            which are then done here with that layer's parameters.

        Returns: dtype [N, h, w, C'], or if the part ends with the network a tuple of three
        float32 [N, h, w, 3, 5 + K], coarsest first.
        """
        done = {self.begin - 1: self._activated(self.begin - 1, x, train) if raw else x}
        x, found = done[self.begin - 1], []
        for number in range(self.begin, self.end):
            layer = self.table[number]
            if layer.kind == "conv":
                x = Conv(
                    layer.features,
                    layer.kernel,
                    layer.stride,
                    dtype=self.dtype,
                    name=f"layer{number}",
                )(x)
                x = self._activated(number, x, train)
            elif layer.kind == "linear":
                x = nn.Conv(layer.features, (1, 1), dtype=self.dtype, name=f"layer{number}")(x)
            elif layer.kind == "shortcut":
                x = end_of_block(x + done[layer.inputs[0]])
            elif layer.kind == "upsample":
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            elif layer.kind == "route":
                x = jnp.concatenate([done[i] for i in layer.inputs], axis=-1)
            else:
                n, h, w, c = x.shape
                anchors = len(ANCHORS[0])
                found.append(x.astype(jnp.float32).reshape(n, h, w, anchors, c // anchors))
            done[number] = x
        return tuple(found) if self.end == len(self.table) else x

    def _activated(self, number, x, train):
        x = BatchNorm(dtype=self.dtype, name=f"norm{number}")(x, train)
        return nn.leaky_relu(x, 0.1)
