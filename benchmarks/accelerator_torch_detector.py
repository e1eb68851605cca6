"""YOLOv3's training step in PyTorch, for bench_accelerator.py; the table of layers is ours.

It is given less to do than ours: images are not augmented, and which anchor is to give what is made
before, so nothing overlaps an object without being responsible for it.
"""

import torch
from accelerator_cases import OBJECTS, Case, Sizes
from accelerator_torch import (
    DEVICE,
    compiled,
    half,
    on_device,
    parameters_of,
    torch_images,
    update,
)
from torch import nn
from torch.nn import functional

from icm_jax.nets.detector import shapes
from icm_jax.nets.yolo import ANCHORS, yolov3

CLASSES = 80


class Network(nn.Module):
    """Layers of a table: images [N, 3, H, W] on 0...1 -> raw outputs [N, h, w, A, 5 + K]."""

    def __init__(self, table):
        super().__init__()
        self.table, self.layers, channels = table, nn.ModuleDict(), 3
        for number, (layer, shape) in enumerate(zip(table, shapes(table), strict=True)):
            if layer.kind == "conv":
                pad = (layer.kernel - 1) // 2
                sizes = channels, layer.features, layer.kernel, layer.stride, pad
                parts: list = [nn.Conv2d(*sizes, bias=not layer.normalised)]
                if layer.normalised:
                    parts += [nn.BatchNorm2d(layer.features), nn.LeakyReLU(0.1, inplace=True)]
                self.layers[str(number)] = nn.Sequential(*parts)
            channels = shape.channels

    def forward(self, x):
        done, found = [], []
        for number, layer in enumerate(self.table):
            if layer.kind == "conv":
                x = self.layers[str(number)](x)
            elif layer.kind == "shortcut":
                x = x + done[layer.inputs[0]]
            elif layer.kind == "upsample":
                x = functional.interpolate(x, scale_factor=layer.stride)
            elif layer.kind == "route":
                x = torch.cat([done[i] for i in layer.inputs], 1)
            else:
                raw = x.float().movedim(1, 3)
                found.append(raw.reshape(*raw.shape[:3], len(ANCHORS[0]), -1))
            done.append(x)
        return found


def torch_detector(sizes: Sizes, options) -> Case:
    batch = options.detection_batch
    images = torch_images(batch, sizes.scene, sizes.scene)
    model = on_device(Network(yolov3(CLASSES, *sizes.detector).table))
    parameters = list(model.parameters())
    optimiser = torch.optim.SGD(parameters, 1e-3, momentum=0.9, weight_decay=5e-4, fused=True)
    wanted = []
    for stride in (32, 16, 8):
        grid = (batch, sizes.scene // stride, sizes.scene // stride, len(ANCHORS[0]))
        there = (torch.rand(grid, device=DEVICE) < OBJECTS / 3 / grid[1] ** 2 / grid[3]).float()
        classes = torch.randint(CLASSES, grid, device=DEVICE)
        offsets = torch.rand(*grid, 4, device=DEVICE)
        wanted.append((there, offsets, functional.one_hot(classes, CLASSES).float()))
    cross = functional.binary_cross_entropy_with_logits

    def loss_of(images):
        with half():
            outputs = model((images.float() / 255).contiguous(memory_format=torch.channels_last))
        loss = 0.0
        for raw, (there, offsets, classes) in zip(outputs, wanted, strict=True):
            place = cross(raw[..., :2], offsets[..., :2], reduction="none").sum(-1)
            place = place + 0.5 * (raw[..., 2:4] - offsets[..., 2:]).square().sum(-1)
            kind = cross(raw[..., 5:], classes, reduction="none").sum(-1)
            asked = cross(raw[..., 4], there, reduction="sum")
            loss = loss + (asked + (there * (place + kind)).sum()) / batch
        return loss

    forward = compiled(loss_of, options)

    def call():
        loss = forward(images)
        update(loss, parameters, optimiser)
        return loss.detach()

    return Case("yolov3, bfloat16", parameters_of(model), batch, call)
