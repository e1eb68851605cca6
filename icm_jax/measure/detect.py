"""From a file to boxes, and boxes drawn on its picture; what `icm detect` does, from Python.

    frozen = icm_jax.load("codec.icmc")
    find = detect.finder(frozen, archive.describe("codec.icmc").get("detector"))
    boxes = find(data)["boxes"]
    picture = detect.drawn(detect.picture(frozen, data), boxes)

A codec file holds its detector whole: table, weights and the names of its classes.
"""

import io
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np
from PIL import Image, ImageDraw

from icm_jax import ops
from icm_jax.codecs import bitstream, programs, tiles
from icm_jax.codecs.bitstream import FrozenCodec
from icm_jax.codecs.scalable import DETECTOR, LATENT, detector_of
from icm_jax.coding import container
from icm_jax.data.images import read_rgb, write_image
from icm_jax.errors import IcmError
from icm_jax.files import read, write_whole
from icm_jax.nets.convolution import compiler_options
from icm_jax.nets.detector import Part
from icm_jax.tasks.detection import anchors, detections, scaled
from icm_jax.tasks.task import apply


def finder(
    frozen: FrozenCodec, facts: Mapping[str, Any] | None, least: float = 0.4
) -> Callable[..., dict]:
    """A function from the bytes of a file (and its name, for errors) to
    {"width", "height", "boxes"}: per box, best first, its class's "name", "class" (number), "score"
    and "bbox" (left, top, width, height in pixels, as in COCO). Of an .icm file it reads the first
    layer alone; of an ordinary picture the whole detector runs on the pixels, as before coding.

    Args:
      facts: what `archive.describe` says of the codec's "detector": "classes" (names),
        "anchor_scale", "overlap", "limit".
      least: least score of a box.

    Raises: IcmError if the codec has no detector; the function, if the file is neither one of
      the codec's nor a picture.
    """
    if not facts:
        raise IcmError(
            "this model has no detector; train one with configs/scalable.py and give its "
            "codec.icmc with --model, or for ordinary pictures Darknet's NAME.weights"
        )
    detector = detector_of(frozen.codec)
    grid = math.lcm(detector.grid, LATENT)
    static = (frozen.codec, *(facts[key] for key in ("anchor_scale", "limit", "overlap")), least)
    variables = {
        name: {DETECTOR: tree[DETECTOR]}
        for name, tree in frozen.on_device.items()
        if DETECTOR in tree
    }

    def find(data: bytes, name: str = "the picture") -> dict:
        if data[: len(container.MAGIC)] == container.MAGIC:
            given = bitstream.decode(frozen, [data], "feature", layers=1)
            height, width = container.unpack(data, 1).header.shape
            begin, pixels = detector.split, detector.feature.stride
        else:
            image = read_rgb(data, name)
            given, (height, width) = ops.pad_to(image[None], grid), image.shape[:2]
            begin, pixels = 0, 1
        part = tiles.in_one_window(given, pixels, detector.grid)
        # Nothing is coded by what it computes, so it is compiled as it runs quickest.
        given = (*static, begin), variables, part
        found = jax.device_get(programs.run(_found, *given, options=compiler_options))
        sides = pixels * part.arrays["whole"].shape[1], pixels * part.arrays["whole"].shape[2]
        return described(found, facts["classes"], sides, (0, 0, height, width), (height, width))

    return find


def _found(codec, scale, limit, overlap, least, begin, variables, part):
    """Boxes of a feature in a window, or of a picture if `begin` is 0, as fractions of the window's
    sides."""
    detector, given = detector_of(codec), part.arrays["whole"]
    with tiles.within(part, "whole"):
        given = given if begin else scaled(given)
        outputs, _ = apply(Part(detector, begin), variables, DETECTOR, given, False)
        shapes = anchors(detector, [raw.shape[1:3] for raw in outputs], scale)
        return detections(outputs, shapes, detector.scales, limit, overlap, least)


def described(
    found: Any,
    classes: Sequence[str],
    canvas: tuple[int, int],
    extent: tuple[int, int, int, int],
    shape: tuple[int, int],
) -> dict:
    """What `finder` says of an image.

    Args:
      found: `boxes.Detections` of one image on the host, boxes as fractions of a canvas.
      canvas: its height and width. extent: top, left, height, width of the picture in it.
      shape: height and width of the picture itself.
    """
    corner, scale = np.array(extent[:2]), np.divide(shape, extent[2:])
    boxes = []
    for row in np.flatnonzero(found.valid[0]):
        box = (found.boxes[0, row].astype(float) * np.tile(canvas, 2)).reshape(2, 2)
        (top, left), (bottom, right) = np.clip((box - corner) * scale, 0, shape).tolist()
        number = int(found.labels[0, row])
        if bottom > top and right > left:  # else it lies in what the picture was padded with
            boxes.append(
                {
                    "name": classes[number],
                    "class": number,
                    "score": round(float(found.scores[0, row]), 4),
                    "bbox": [round(v, 2) for v in (left, top, right - left, bottom - top)],
                }
            )
    return {"width": shape[1], "height": shape[0], "boxes": boxes}


def needed(file: BinaryIO) -> bytes:
    """What `finder` needs of a file: the first layer of an .icm file, all of a picture."""
    begun = file.read(len(container.MAGIC))
    return container.receive(file, 1, begun) if begun == container.MAGIC else begun + file.read()


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


def picture(frozen: FrozenCodec | None, data: bytes, name: str = "the picture") -> np.ndarray:
    """uint8 [H, W, 3] or [H, W]: what a file decodes to, or grey if it ends after its first layer;
    an ordinary picture as it is, which needs no codec.

    Raises: IcmError if there is more, but damaged.
    """
    if frozen is None or data[: len(container.MAGIC)] != container.MAGIC:
        return read_rgb(data, name)
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
        text, place = f"{box['name']} {box['score']:.2f}", (left + 3, top + 2)
        draw.rectangle(draw.textbbox(place, text), fill=colour, outline=colour, width=2)
        draw.text(place, text, fill="black")
    return np.asarray(image)


class Written(NamedTuple):
    """What is to be written. stems: of the files, in order; drawings: a file for each, or none;
    coco: the file of COCO results, or none."""

    stems: list[str]
    drawings: list[pathlib.Path] | None
    coco: pathlib.Path | None


def writes(names: Sequence[str], draw: str | None, coco: str | None, force: bool) -> Written:
    """What is written of files of these names ("-": standard input).

    Args: draw: folder for pictures with their boxes. coco: file for COCO results.

    Raises: IcmError for what exists, without `force`, or what two files of one name would share.
    """
    stems = ["stdin" if name == "-" else pathlib.Path(name).stem for name in names]
    drawings = [pathlib.Path(draw) / f"{stem}.png" for stem in stems] if draw else None
    results = pathlib.Path(coco) if coco else None
    outputs = [*(drawings or ()), *([results] if results else ())]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None and outputs:
        raise IcmError(f"two files of one name, {twice}, would share what is written; rename one")
    for path in outputs:
        if path.exists() and not force:
            raise IcmError(f"{path} exists; --force overwrites it")
    return Written(stems, drawings, results)


def each(
    find: Callable[..., dict],
    codec: FrozenCodec | None,
    names: Sequence[str],
    written: Written,
    failed: Callable[[str, Exception], int],
) -> int:
    """Prints what `find` finds in each file as a line of JSON; the command's exit code.

    Args:
      codec: of .icm files that are drawn. failed: (name, error) -> 1, having said so.
    """
    failures, results = 0, []
    for row, name in enumerate(names):
        try:
            data = read(name, None if written.drawings else needed)
            facts = {"file": name, **find(data, name)}
            if written.drawings:
                image = drawn(picture(codec, data, name), facts["boxes"])
                write_whole(written.drawings[row], write_image(image, ".png"))
        except IcmError as error:
            failures += failed(name, error)
            continue
        print(json.dumps(facts), flush=True)
        results += coco_results(written.stems[row], facts["boxes"])
    if written.coco:
        write_whole(written.coco, json.dumps(results).encode())
    return int(failures > 0)
