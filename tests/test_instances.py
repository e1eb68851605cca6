"""Masks of objects in their own images: pasting and average precision by hand, and a run of it."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image, ImageDraw
from strangers import objects as stranger

from icm_jax.data import open_source, outlines, pipeline
from icm_jax.data.fields import FieldError
from icm_jax.data.images import header
from icm_jax.data.labels import Frame
from icm_jax.engine.train import train
from icm_jax.errors import IcmError
from icm_jax.measure import draws, evaluate, ready
from icm_jax.measure.instances import InstancePrecision, MaskPrecision, encoded, own_truth, paste
from icm_jax.measure.precision import CocoPrecision
from icm_jax.report import curves, objects, tables

HEIGHT, WIDTH = 120, 180
SHAPES = (  # of two images, (class, corners x, y)
    ((1, (10, 10, 90, 20, 40, 100)), (2, (100, 30, 170, 30, 170, 110, 100, 110))),
    ((1, (20, 15, 60, 15, 60, 55)),),
)


def test_pasting_by_hand():
    """A mask whose left half is the object, in a box twice as large and in a corner."""
    mask = np.array([[1.0, 0.0], [1.0, 0.0]])
    expected = np.zeros((4, 6), bool)
    expected[:, :2] = True
    np.testing.assert_array_equal(paste(mask, (0, 0, 4, 4), 4, 6), expected)
    beyond = np.zeros((4, 6), bool)
    beyond[2:, 4:] = True
    np.testing.assert_array_equal(paste(mask, (2, 4, 6, 8), 4, 6), beyond)
    assert not paste(mask, (-9, -9, -2, -2), 4, 6).any()
    assert not paste(mask, (1, 1, 1, 1), 4, 6).any()  # and no warning
    # Between two elements, halfway: the last pixel that is still as much of the one.
    line = paste(np.array([[1.0, 0.0]]), (0, 0, 1, 20), 1, 20)
    assert line[0].tolist() == [True] * 10 + [False] * 10


def test_a_mask_of_an_element_for_each_pixel_stays_as_it_is():
    rng = np.random.default_rng(0)
    mask = rng.random((9, 7)) < 0.5
    whole = np.zeros((20, 30), bool)
    whole[4:13, 11:18] = mask
    np.testing.assert_array_equal(paste(mask.astype(float), (4, 11, 13, 18), 20, 30), whole)


def opened(root, shapes=SHAPES, size=(WIDTH, HEIGHT), **kept):
    """COCO's files of images in which objects have the colour of their class; a split for both."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, shown in enumerate(shapes, 1):
        image = Image.new("RGB", size, (100, 110, 120))
        for label, corners in shown:
            ImageDraw.Draw(image).polygon(
                corners, fill=(250, 30, 30) if label == 1 else (20, 20, 240)
            )
            low, high = np.reshape(corners, (-1, 2)).min(0), np.reshape(corners, (-1, 2)).max(0)
            box = [*low.tolist(), *(high - low).tolist()]
            annotations.append(dict(image_id=number, category_id=label, bbox=box))
            annotations[-1] |= dict(id=len(annotations), segmentation=[list(corners)]) | kept
        image.save(root / f"images/{number}.png")
        images.append(dict(id=number, file_name=f"{number}.png", width=size[0], height=size[1]))
    classes = [dict(id=1, name="red"), dict(id=2, name="blue")]
    content = dict(images=images, annotations=annotations, categories=classes)
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(content))
    fields = dict(name="coco_json", path=str(root))
    return fields, open_source(ConfigDict(fields), "validation")


def predicted_truth(source, batch):
    """What a network would say that sees everything: masks of an element for each pixel."""
    rows, count = batch["boxes"].shape[:2]
    masks = np.zeros((rows, count), object)
    for row in range(rows):
        loaded = source.load(int(batch["number"][row]))
        found, there = loaded["outlines"](), loaded["objects"]
        for place, number in enumerate(pipeline.largest_first(there, count)):
            sides = there.boxes[number] * [HEIGHT, WIDTH, HEIGHT, WIDTH]
            top, left, bottom, right = np.rint(sides).astype(int)
            whole = outlines.mask_of(found[number], HEIGHT, WIDTH)
            masks[row, place] = whole[top:bottom, left:right].astype(float)
    valid = batch["box_valid"]
    scores = np.where(valid, 0.9, 0.0)
    found = dict(boxes=batch["boxes"], labels=batch["box_labels"], scores=scores)
    return found | dict(valid=valid, masks=masks)


def evaluated(source, canvas=(96, 96), rows=2):
    spec = pipeline.BatchSpec(rows, canvas, boxes=3, letterbox="centre")
    (batch,) = pipeline.in_order(source, spec)
    return batch, batch | own_truth(source, batch, True)


def test_masks_that_are_the_truth_are_perfect(tmp_path):
    """On a smaller canvas, of another shape, in whose middle the image lies."""
    _, source = opened(tmp_path)
    batch, truth = evaluated(source)
    given = predicted_truth(source, batch)
    score = InstancePrecision("coco", source.classes)
    score.update(given, truth)
    perfect = dict(map50=1.0, map=1.0, mask_map50=1.0, mask_map=1.0, examples=2)
    assert score.result() == pytest.approx(perfect)
    assert score.parts()["mask_by_class"] == pytest.approx({"red": 1, "blue": 1})
    # A triangle of 40 × 40 / 2 pixels is small, the others have about 3,450 and 5,600.
    assert score.parts()["mask_by_size"] == pytest.approx({"small": 1, "medium": 1})
    assert score.parts()["by_size"] == pytest.approx({"small": 1, "medium": 1})
    drawn = score.resampled(draws.resamples(2, 20))
    assert {*drawn} == {"map", "map50", "mask_map", "mask_map50"}
    assert all(values == pytest.approx(1) for values in drawn.values())
    # Whole boxes in place of triangles: boxes are as good, masks are not.
    for row in range(2):
        given["masks"][row, 0] = np.ones_like(given["masks"][row, 0])
    worse = InstancePrecision("voc2010", source.classes)
    worse.update(given, truth)
    result = worse.result()
    assert result["voc2010"] == pytest.approx(1) and result["mask_map"] == pytest.approx(0.5)
    assert worse.parts()["mask_by_class"] == pytest.approx({"red": 0, "blue": 1})


def test_what_was_scored_apart_adds_up(tmp_path):
    _, source = opened(tmp_path)
    batch, truth = evaluated(source)
    given = predicted_truth(source, batch)
    given["masks"][0, 0][:, :40] = 0
    whole, joint = (InstancePrecision("coco", source.classes) for _ in range(2))
    whole.update(given, truth)
    for row in range(2):
        part = InstancePrecision("coco", source.classes)
        part.update(*({k: v[row : row + 1] for k, v in side.items()} for side in (given, truth)))
        joint.add(part)
    assert joint.result() == whole.result() and joint.parts() == whole.parts()
    assert 0 < whole.result()["mask_map"] < 1


def test_objects_without_an_outline_are_neither_hits_nor_misses(tmp_path):
    _, source = opened(tmp_path, segmentation=None)
    batch, truth = evaluated(source)
    assert not any(mask for row in truth["own_masks"] for mask in row)
    score = MaskPrecision(source.classes)
    square = np.zeros((HEIGHT, WIDTH), bool)
    square[15:55, 20:60] = True
    truth["own_masks"][1][0] = encoded(square)
    nothing = dict(masks=np.zeros((2, 3, 4, 4)), boxes=batch["boxes"], labels=batch["box_labels"])
    nothing |= dict(scores=np.full((2, 3), 0.9), valid=batch["box_valid"])
    nothing["masks"][:] = 1  # whole boxes, as what is passed over
    score.update(nothing, truth)
    assert score.by_class() == pytest.approx({"red": 1})


def test_sizes_are_those_of_the_images_themselves():
    """Boxes of 30, 90 and 100 pixels on a canvas of half the size; the medium one is missed."""
    sides = np.array([30, 90, 100])
    batch = dict(valid=np.ones(3, bool), image=np.zeros((3, 60, 60, 3)))
    batch |= dict(extent=np.tile([0, 0, 60, 60], (3, 1)), own_sides=np.full((3, 2), 120))
    batch |= dict(box_valid=np.ones((3, 1), bool), box_ignored=np.zeros((3, 1), bool))
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)[:, None] / 120
    batch |= dict(boxes=boxes, box_labels=np.zeros((3, 1), int))
    found = dict(boxes=boxes.copy(), labels=batch["box_labels"], scores=np.full((3, 1), 0.5))
    found["boxes"][1] *= 0.5
    score = CocoPrecision(["one"])
    score.update(found | dict(valid=batch["box_valid"]), batch)
    assert score.by_size() == pytest.approx({"small": 1, "medium": 0, "large": 1})
    # COCO takes the area of an object's mask where it is known.
    score = CocoPrecision(["one"])
    score.update(found | dict(valid=batch["box_valid"]), batch | dict(areas=np.full((3, 1), 5.0)))
    assert {*score.by_size()} == {"small"}


def test_features_come_with_the_objects_of_their_images(tmp_path):
    _, source = opened(tmp_path)
    spec = pipeline.BatchSpec(2, (HEIGHT, WIDTH), boxes=3, outlines=4)
    features = np.arange(2, dtype=np.float32).reshape(2, 1, 1, 1)
    (whole,) = pipeline.in_order(source, spec)
    (batch,) = pipeline.batches(source, spec, seed=1, stop=1, features=features)
    assert "image" not in batch and sorted(batch["feature"].ravel()) == [0, 1]
    for name in ("boxes", "box_masks"):
        order = batch["feature"].ravel().astype(int)
        np.testing.assert_array_equal(batch[name], whole[name][order])


def test_headers_are_read_from_bytes_too(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(path, exif=exif)
    assert header(path.read_bytes()) == header(path) and header(path).upright == (60, 40)
    assert header(b"no image") is None
    assert Frame(*header(path)[:2]).height == 40


def instance_run(data, steps=30, **changes):
    """The stranger's, but a network of a few channels, which sees two images again and again."""
    config = stranger.get_config()
    config.train.update(steps=steps, batch_size=2, learning_rate=6e-3, warmup_steps=2, log_every=5)
    config.data.update(data, canvas=(64, 96), boxes=3)
    config.model.update(variant="10", width=8, size=(64, 96), crop=(1.0, 1.0), channels=16)
    config.model.update(convolutions=1, range_scale=1 / 8, mask_boxes=4, limit=8)
    config.model.update(changes)
    (run,) = stranger.runs(config)
    return run


def test_a_small_network_learns_two_images(tmp_path):
    """By the loop, scored from its folder."""
    data, _ = opened(tmp_path / "data")
    run = instance_run(data)
    with jax.numpy_dtype_promotion("standard"):
        train(run, tmp_path)
    lines = (tmp_path / "objects" / "metrics.jsonl").read_text().splitlines()
    losses = [found["loss"] for found in map(json.loads, lines) if "loss" in found]
    assert losses[-1] < 0.6 * losses[0], losses
    record, *_ = evaluate.evaluate(run, tmp_path)
    assert {"map", "map50", "mask_map", "mask_map50"} <= {*record}
    assert {*record["draws"]} >= {"mask_map", "map50"} and record["curve"] == "instances"
    assert {"by_class", "by_size", "mask_by_class", "mask_by_size"} <= {*record}
    found = {m.key: m for m in curves.MEASURES if m.curve == "instances"}
    assert {*found} == {"map", "map50", "mask_map", "mask_map50"}
    rows = [row[0] for row in tables.class_table([record], found["mask_map"])[1:]]
    assert rows == [name for name in ("small", "medium") if name in record["mask_by_size"]]
    assert {row[0] for row in tables.class_table([record], found["map50"])[1:]} == {"red", "blue"}
    objects.objects([run], tmp_path, "")
    assert (tmp_path / "instances.png").read_bytes()[:4] == b"\x89PNG"


def test_runs_say_what_masks_need(tmp_path):
    data, _ = opened(tmp_path)
    run = instance_run(data)
    with run.data.unlocked():
        run.data.outlines = 0
    with pytest.raises(FieldError, match="at every how many pixels"):
        ready.check_ready([run], tmp_path)
    bare = instance_run(opened(tmp_path / "bare", segmentation=None)[0])
    with pytest.raises(IcmError, match="has the outline of none in its first 2 images"):
        ready.check_ready([bare], tmp_path)
    with pytest.raises(FieldError, match="a detector sees whole images"):
        instance_run(data, size=(32, 32))
