"""A published detector on ordinary pictures: Darknet's weights, as `icm detect` runs them.

find = darknet.finder("yolov3-tiny.weights")
boxes = find(pathlib.Path("street.jpg").read_bytes())["boxes"]
"""

import functools
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from icm_jax.coding import container
from icm_jax.data import geometry
from icm_jax.data.images import read_rgb
from icm_jax.errors import IcmError
from icm_jax.files import read
from icm_jax.measure.detect import described
from icm_jax.nets import cfg, yolo
from icm_jax.nets.convolution import compiler_options
from icm_jax.nets.detector import Detector, Part
from icm_jax.tasks.detection import anchors, detections, scaled
from icm_jax.weights import darknet

SIDE = 416
"""Of the images that the built-in networks were trained for."""
LIMIT, OVERLAP = 100, 0.45
"""Boxes of an image at most, and the overlap above which the lesser one of a class goes."""
COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,"
    "banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
"""The 80 classes of COCO, in the order of its category ids."""


def finder(
    weights: str | os.PathLike, network: str = "", names: str = "", least: float = 0.4
) -> Callable[..., dict]:
    """A function from the bytes of a picture (and its name, for errors) to what
    `icm_jax.measure.detect.finder` gives. As in Darknet the picture is fitted into the middle of
    the network's own size.

    Args:
      weights: a .weights file.
      network: its .cfg; "": the detector that is built in under the name of the weights, or else
        the .cfg beside them.
      names: a file with the name of a class in each line; "": those of COCO, or for another number
        of classes "class 0" and so on.
      least: least score of a box.

    Raises: IcmError if a file is missing, or does not go with the others.
    """
    detector, size, variables = published(weights, network)
    classes, part = _classes(names, detector.classes), Part(detector)
    platform = jax.tree.leaves(variables)[0].device.platform

    @functools.partial(jax.jit, compiler_options=compiler_options(platform))
    def predict(variables, image):
        outputs = part.apply(variables, scaled(image), False)
        placed = anchors(detector, [raw.shape[1:3] for raw in outputs], 1.0)
        return detections(outputs, placed, detector.scales, LIMIT, OVERLAP, least)

    def find(data: bytes, name: str = "the picture") -> dict:
        if data[: len(container.MAGIC)] == container.MAGIC:
            raise IcmError(f"{name} was coded for a codec; give its codec.icmc with --model")
        picture = read_rgb(data, name)
        boxed, extent = geometry.letterbox(picture, size, "centre")
        found = jax.device_get(predict(variables, boxed[None]))
        return described(found, classes, size, extent, picture.shape[:2])

    return find


def published(
    weights: str | os.PathLike, network: str = ""
) -> tuple[Detector, tuple[int, int], dict]:
    """A detector, (height, width) of its images and its variables on the device; arguments and
    errors are those of `finder`."""
    detector, size = _network(pathlib.Path(weights), network)
    image = jax.ShapeDtypeStruct((1, detector.grid, detector.grid, 3), jnp.float32)
    init = lambda x: Part(detector).init(jax.random.key(0), x, False)  # noqa: E731
    shapes = jax.eval_shape(init, image)
    return detector, size, jax.device_put(darknet.read(weights, shapes, whole=True))


def _network(weights: pathlib.Path, network: str) -> tuple[Detector, tuple[int, int]]:
    """The detector, and (height, width) of its images."""
    if not network and weights.stem in yolo.PUBLISHED:
        return yolo.PUBLISHED[weights.stem](len(COCO)), (SIDE, SIDE)
    path = network or str(weights.with_suffix(".cfg"))
    if not network and not pathlib.Path(path).is_file():
        raise IcmError(
            f"there is no {path} beside {weights}; put the network's file there, or name it (icm "
            "detect --cfg)"
        )
    detector, size = cfg.parse(read(path).decode(errors="replace"), path)
    if min(size) < 1 or any(side % detector.grid for side in size):
        raise IcmError(
            f"{path}: height and width of [net] are {size[0]} and {size[1]}; both are multiples of "
            f"{detector.grid}, from {detector.grid} on"
        )
    return detector, size


def _classes(names: str, count: int) -> list[str]:
    if not names:
        return list(COCO) if count == len(COCO) else [f"class {number}" for number in range(count)]
    found = [line.strip() for line in read(names).decode(errors="replace").splitlines()]
    found = [line for line in found if line]
    if len(found) != count:
        raise IcmError(f"{names} has {len(found)} names; the network has {count} classes")
    return found
