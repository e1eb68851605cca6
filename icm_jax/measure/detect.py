"""From an .icm file to boxes, and boxes drawn on its picture; what `icm detect` does, from Python.

    frozen = icm_jax.load("codec.icmc")
    find = detect.finder(frozen, archive.describe("codec.icmc").get("detector"))
    boxes = find(data)["boxes"]
    picture = detect.drawn(detect.picture(frozen, data), boxes)

A codec file holds its detector whole: table, weights and the names of its classes.
"""

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from icm_jax.codecs import bitstream, programs, tiles
from icm_jax.codecs.bitstream import FrozenCodec
from icm_jax.codecs.scalable import DETECTOR, detector_of
from icm_jax.coding import container
from icm_jax.errors import IcmError
from icm_jax.nets.detector import Part
from icm_jax.tasks.detection import anchors, detections
from icm_jax.tasks.task import apply


def finder(
    frozen: FrozenCodec, facts: Mapping[str, Any] | None, least: float = 0.4
) -> Callable[[bytes], dict]:
    """A function from the bytes of a file, of which it reads the first layer alone, to
    {"width", "height", "boxes"}: per box, best first, its class's "name", "class" (number), "score"
    and "bbox" (left, top, width, height in pixels, as in COCO).

    Args:
      facts: what `archive.describe` says of the codec's "detector": "classes" (names),
        "anchor_scale", "overlap", "limit".
      least: least score of a box.

    Raises: IcmError if the codec has no detector; the function, if the file is none of the codec's.
    """
    if not facts:
        raise IcmError(
            "this model has no detector; train one with configs/scalable.py and give its "
            "codec.icmc with --model"
        )
    detector, stride = detector_of(frozen.codec), detector_of(frozen.codec).feature.stride
    static = (frozen.codec, *(facts[key] for key in ("anchor_scale", "limit", "overlap")), least)
    variables = {
        name: {DETECTOR: tree[DETECTOR]}
        for name, tree in frozen.on_device.items()
        if DETECTOR in tree
    }

    def find(data: bytes) -> dict:
        feature = bitstream.decode(frozen, [data], "feature", layers=1)
        height, width = container.unpack(data, 1).header.shape
        part = tiles.in_one_window(feature, stride, detector.grid)
        found = jax.device_get(programs.run(_found, static, variables, part))
        sides = np.array(part.arrays["whole"].shape[1:3]) * stride
        boxes = []
        for row in np.flatnonzero(found.valid[0]):
            box = found.boxes[0, row] * np.tile(sides, 2)
            top, left, bottom, right = np.clip(box, 0, [height, width, height, width]).tolist()
            number = int(found.labels[0, row])
            boxes.append(
                {
                    "name": facts["classes"][number],
                    "class": number,
                    "score": round(float(found.scores[0, row]), 4),
                    "bbox": [round(v, 2) for v in (left, top, right - left, bottom - top)],
                }
            )
        return {"width": width, "height": height, "boxes": boxes}

    return find


def _found(codec, scale, limit, overlap, least, variables, part):
    """Boxes of a feature in a window, as fractions of the window's sides."""
    detector = detector_of(codec)
    tail = Part(detector, detector.split)
    with tiles.within(part, "whole"):
        outputs, _ = apply(tail, variables, DETECTOR, part.arrays["whole"], False)
        shapes = anchors(detector, [raw.shape[1:3] for raw in outputs], scale)
        return detections(outputs, shapes, detector.scales, limit, overlap, least)


def coco_results(image_id: str, boxes: Iterable[Mapping[str, Any]]) -> list[dict]:
    """What `finder` finds as rows of a COCO results file."""
    return [
        {
            "image_id": image_id,
            "category_id": box["class"],
            "bbox": box["bbox"],
            "score": box["score"],
        }
        for box in boxes
    ]


def picture(frozen: FrozenCodec, data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] or [H, W]: what a file decodes to, or grey if it ends after its first layer.

    Raises: IcmError if there is more, but damaged.
    """
    if container.receive(io.BytesIO(data), 1) == data:
        return np.full((*container.unpack(data, 1).header.shape, 3), 128, np.uint8)
    return frozen.decompress(data)


def drawn(picture: np.ndarray, boxes: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """uint8 [H, W, 3]: a picture, uint8 [H, W, 3] or [H, W], with what `finder` finds."""
    image = Image.fromarray(picture).convert("RGB")
    draw = ImageDraw.Draw(image)
    for box in boxes:
        left, top, width, height = box["bbox"]
        colour = f"hsl({137 * box['class'] % 360}, 90%, 55%)"  # far apart for neighbours
        draw.rectangle((left, top, left + width, top + height), outline=colour, width=2)
        draw.text((left + 3, top + 1), f"{box['name']} {box['score']:.2f}", fill=colour)
    return np.asarray(image)
