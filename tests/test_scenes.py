"""Scenes: what is listed is visible, files are those of the drawing code, sizes are checked."""

import multiprocessing

import numpy as np
import pytest
import simplejpeg
from ml_collections import ConfigDict

from icm_jax.data import open_source, scenes
from icm_jax.errors import IcmError

TINY = dict(size=32, train=8, validation=4)


def test_scenes_are_a_function_of_their_config(tmp_path):
    def opened(folder, split="train", **fields):
        path = str(tmp_path / folder)
        return open_source(ConfigDict(dict(TINY, name="scenes", path=path, **fields)), split)

    first, again, other = opened("a", seed=3), opened("b", seed=3), opened("b", seed=4)
    assert (first.length, len(first.classes)) == (8, 12)
    assert opened("a", "validation", seed=3).length == 4
    images = [source.load(5)["image"] for source in (first, again, other)]
    assert images[0] == images[1] != images[2]
    assert simplejpeg.is_jpeg(images[0])


@pytest.mark.parametrize("index", range(5))
def test_masks_boxes_and_label_of_a_scene_agree(index):
    scene = scenes.draw(0, "train", index, 96)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in scene["boxes"]]
    assert scene["image"].shape == (96, 96, 3) and scene["image"].dtype == np.uint8
    label, box = scene["labels"][0], np.rint(scene["boxes"][0] * 96).astype(int)
    inside = scene["mask"][box[0] : box[2], box[1] : box[3]] == label + 1
    assert areas[0] > 0.02
    # The main object lies on top: it touches every side of its box.
    assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
    assert scene["image"].std() > 10


def test_listed_objects_are_visible_and_largest_first():
    hidden = 0
    for index in range(120):
        scene = scenes.draw(0, "train", index, 64)
        sides = scene["boxes"][:, 2:] - scene["boxes"][:, :2]
        assert np.all(np.diff(sides.prod(axis=1)) < 0.02)
        boxes = np.rint(scene["boxes"] * 64).astype(int)
        for box, label in zip(boxes, scene["labels"], strict=True):
            part = scene["mask"][box[0] : box[2], box[1] : box[3]]
            hidden += (part == label + 1).mean() < 0.05
    assert hidden == 0


def test_the_main_object_is_never_dropped():
    for index in range(60):
        scene = scenes.draw(1, "validation", index, 48)
        ids, counts = np.unique(scene["mask"][scene["mask"] > 0], return_counts=True)
        assert scene["labels"][0] + 1 == ids[np.argmax(counts)]


def test_another_way_of_drawing_gets_other_files(tmp_path, monkeypatch):
    before = scenes.prepared(tmp_path, **TINY)
    assert scenes.prepared(tmp_path, **TINY).data_path == before.data_path
    drawn = scenes.draw

    def darker(*args):
        scene = drawn(*args)
        return {**scene, "image": scene["image"] // 2}

    monkeypatch.setattr(scenes, "draw", darker)
    after = scenes.prepared(tmp_path, **TINY)
    assert after.data_path != before.data_path
    means = [
        np.mean([b.as_data_source(split="train")[i]["image"].mean() for i in range(8)])
        for b in (before, after)
    ]
    assert means[1] < 0.6 * means[0]


def prepare(path):
    return len(scenes.prepared(path, **TINY).as_data_source(split="train"))


def test_processes_may_generate_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(prepare, [str(tmp_path)] * 4, chunksize=1) == [8] * 4


def test_a_half_written_folder_is_not_taken_for_whole(tmp_path):
    whole = scenes.prepared(tmp_path / "whole", **TINY)
    relative = whole.data_path.relative_to(tmp_path / "whole")
    half = tmp_path / "half" / relative.parent / f"incomplete.AAAAAA_{relative.name}"
    half.mkdir(parents=True)
    (half / "scenes-train.array_record-00000-of-00001").write_bytes(b"half")
    again = scenes.prepared(tmp_path / "half", **TINY)
    assert len(again.as_data_source(split="train")) == 8


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(size=8), r"data\.size is 8; it must be a whole number of at least 32"),
        (dict(size=64.5), r"data\.size"),
        (dict(train=0), r"data\.train"),
        (dict(validation=-1), r"data\.validation"),
        (dict(seed=-1), r"data\.seed"),
    ],
)
def test_impossible_sizes(tmp_path, sizes, message):
    with pytest.raises(IcmError, match=message):
        scenes.prepared(tmp_path, **{**TINY, **sizes})


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(IcmError, match=r"cannot write scenes below .*file.*ICM_JAX_CACHE"):
        scenes.prepared(tmp_path / "file", **TINY)
