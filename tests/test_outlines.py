"""Outlines of objects as masks: against pycocotools, an independent count, and in batches."""

import json
import warnings

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from pycocotools import mask as tool

from icm_jax.data import open_source, outlines, pipeline
from icm_jax.data.labels import Frame
from icm_jax.data.pipeline import BatchSpec
from icm_jax.errors import IcmError

RNG = np.random.default_rng(3)
HEIGHT, WIDTH = 40, 60
FRAME = Frame(HEIGHT, WIDTH)


def blobs(count):
    """bool [HEIGHT, WIDTH], with runs of every length, at the corners too."""
    for number in range(count):
        if number < 2:
            yield np.full((HEIGHT, WIDTH), bool(number))
        else:
            rough = RNG.normal(size=(HEIGHT // 4, WIDTH // 4)) > RNG.uniform(-1, 1)
            yield np.kron(rough, np.ones((4, 4), bool)) ^ (RNG.uniform(size=(HEIGHT, WIDTH)) > 0.98)


def decoded(encoded):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tool.decode(encoded).astype(bool)


def test_run_lengths_are_those_of_pycocotools():
    for mask in blobs(20):
        encoded = tool.encode(np.asfortranarray(mask.astype(np.uint8)))
        compressed = dict(size=encoded["size"], counts=encoded["counts"].decode())
        outline = outlines.outline_of(compressed, FRAME)
        np.testing.assert_array_equal(outlines.mask_of(outline, HEIGHT, WIDTH), mask)
        plain = outlines.outline_of(dict(compressed, counts=outline.runs.tolist()), FRAME)
        np.testing.assert_array_equal(plain.runs, outline.runs)
        half = outlines.mask_of(outline, HEIGHT // 2, WIDTH // 2)
        np.testing.assert_array_equal(half, mask[1::2, 1::2])
        if mask.any():
            x, y, width, height = tool.toBbox(encoded)
            box = np.array([y / HEIGHT, x / WIDTH, (y + height) / HEIGHT, (x + width) / WIDTH])
            np.testing.assert_allclose(outlines.box_of(compressed, FRAME), box)
        else:
            assert outlines.box_of(compressed, FRAME) is None


def test_polygons_are_filled_as_pycocotools_does():
    for corners in (3, 4, 9):
        given = [RNG.uniform(-5, 45, 2 * corners).tolist() for _ in range(2)]
        outline = outlines.outline_of(given, FRAME)
        for scale in (1, 2):
            sides = scale * HEIGHT, scale * WIDTH
            larger = [[scale * end for end in polygon] for polygon in given]
            expected = decoded(tool.merge(tool.frPyObjects(larger, *sides)))
            # corners are kept as float32, which may move an edge by a pixel here and there
            assert (outlines.mask_of(outline, *sides) != expected).mean() < 2e-3
    square = outlines.outline_of([[10, 5, 30, 5, 30, 25, 10, 25]], FRAME)
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[5:25, 10:30] = True
    np.testing.assert_array_equal(outlines.mask_of(square, HEIGHT, WIDTH), expected)


@pytest.mark.parametrize(
    "given",
    [
        None,
        [],
        [[]],
        {},
        "text",
        [[1, 1, 5, 5]],
        [[1, 1, 5, 5, 9]],
        [[1, 1, float("nan"), 5, 9, 9]],  # by itself this takes all of pycocotools' memory
        dict(size=[4, 4], counts=[3, 4]),  # of the rest pycocotools gives what memory held
        dict(size=[4, 4], counts=[3, 4, 10]),
        dict(size=[4, 4], counts=[20, -4]),
        dict(size=[4, 4], counts=""),
        dict(size=[4, 4], counts="\x07"),
        dict(size=[4, 4], counts="P"),
        dict(size=[4], counts=[16]),
        dict(size=None, counts=[16]),
        dict(counts=[16]),
        dict(size=[10**6, 10**6], counts=[10**12]),
    ],
)
def test_what_is_no_outline_is_none(given):
    assert outlines.outline_of(given, FRAME) is None and outlines.box_of(given, FRAME) is None


def test_far_corners_take_no_memory():
    outline = outlines.outline_of([[1e9, -1e9, 1e9, 1e9, -1e9, 1e9, -1e9, -1e9]], FRAME)
    assert outlines.mask_of(outline, HEIGHT, WIDTH).all()


def test_damaged_records_are_named():
    kept = outlines.written((None, outlines.Outline(runs=np.array([1, 2], np.uint32), size=(1, 3))))
    assert outlines.read_outlines(kept)[0] is None
    with pytest.raises(IcmError, match="outlines of a record are damaged"):
        outlines.read_outlines(kept[:-3])


def opened(root, annotations):
    """Of two images of 60 × 40 pixels."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    images = []
    for number in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / f"images/{number}.png")
        images.append(dict(id=number, file_name=f"{number}.png", width=WIDTH, height=HEIGHT))
    content = dict(images=images, annotations=annotations, categories=[dict(id=1, name="one")])
    (root / "train.json").write_text(json.dumps(content))
    return open_source(ConfigDict(dict(name="coco_json", path=str(root))), "train")


@pytest.mark.parametrize("place", ["corner", "centre"])
@pytest.mark.parametrize("step", [1, 4])
def test_masks_lie_where_their_boxes_do(tmp_path, place, step):
    """Rows are the largest boxes; what a batch has is what its layout says."""
    small, large = [6, 4, 12, 20], [20, 8, 36, 24]
    given = []
    for x, y, width, height in (small, large):
        corners = [x, y, x + width, y, x + width, y + height, x, y + height]
        given.append(dict(image_id=1, category_id=1, bbox=[x, y, width, height]))
        given[-1]["segmentation"] = [corners]
    del given[0]["segmentation"]
    source = opened(tmp_path, given)
    spec = BatchSpec(2, (120, 120), boxes=3, letterbox=place, outlines=step)
    (batch,) = pipeline.in_order(source, spec)
    for name, (shape, dtype) in pipeline.layout(("objects",), spec).items():
        assert batch[name].shape == shape and batch[name].dtype == dtype
    assert batch["box_outlined"].tolist() == [[True, False, False], [False] * 3]
    expected = np.zeros((120, 120), bool)
    top, left, bottom, right = np.rint(batch["boxes"][0, 0] * 120).astype(int)
    assert (bottom - top, right - left) == (48, 72)
    expected[top:bottom, left:right] = True
    np.testing.assert_array_equal(
        batch["box_masks"][0, 0], expected[step // 2 :: step, step // 2 :: step]
    )
    assert batch["box_masks"].sum() == batch["box_masks"][0, 0].sum()


def test_the_file_is_read_again_for_outlines_alone(tmp_path, monkeypatch):
    """Once, and not at all by those who want boxes."""
    source = opened(tmp_path, [dict(image_id=1, category_id=1, bbox=[1, 1, 5, 5])])
    (tmp_path / "train.json").rename(tmp_path / "away.json")
    list(pipeline.in_order(source, BatchSpec(2, (40, 40), boxes=1)))
    with pytest.raises(IcmError, match=r"cannot read .*train\.json"):
        source.load(0)["outlines"]()
    (tmp_path / "away.json").rename(tmp_path / "train.json")
    assert source.load(0)["outlines"]() == (None,)
    (tmp_path / "train.json").unlink()
    assert source.load(1)["outlines"]() == ()


def test_outlines_need_boxes_and_a_source_that_has_them(tmp_path):
    with pytest.raises(IcmError, match="outlines at every 4 pixels need boxes"):
        BatchSpec(2, (40, 40), outlines=4)
    with pytest.raises(IcmError, match=r"multiples of that as sides of the canvas, not \(40, 42\)"):
        BatchSpec(2, (40, 42), boxes=1, outlines=4)
    fields = dict(path=str(tmp_path), size=32, train=2, validation=2)
    scenes = open_source(ConfigDict(dict(fields, name="scenes")), "train")
    with pytest.raises(IcmError, match="has no outlines of objects"):
        next(pipeline.batches(scenes, BatchSpec(2, (32, 32), boxes=1, outlines=4), seed=0, stop=1))
