"""Scenes, sources and batches: determinism, completeness, real folders, bad input."""

import io
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import simplejpeg
from ml_collections import ConfigDict
from PIL import Image

from icm_jax.data import open_source, pipeline, scenes
from icm_jax.data.sources import Source
from icm_jax.errors import IcmError

TINY = dict(name="scenes", size=32, train=12, validation=6, seed=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("scenes"))
    return [open_source(ConfigDict(dict(TINY, path=path)), split) for split in scenes.SPLITS]


def test_scenes_are_a_function_of_their_config(tiny, tmp_path):
    again = open_source(ConfigDict(dict(TINY, path=str(tmp_path))), "train")
    other = open_source(ConfigDict(dict(TINY, path=str(tmp_path), seed=4)), "train")
    assert (tiny[0].length, tiny[1].length, len(tiny[0].classes)) == (12, 6, 12)
    images = [source.load(5)["image"] for source in (tiny[0], again, other)]
    assert images[0] == images[1] != images[2]
    assert simplejpeg.is_jpeg(images[0])


@pytest.mark.parametrize("index", range(5))
def test_masks_boxes_and_label_of_a_scene_agree(index):
    scene = scenes.draw(0, "train", index, 96)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in scene["boxes"]]
    assert scene["image"].shape == (96, 96, 3) and scene["image"].dtype == np.uint8
    label, box = scene["labels"][0], np.rint(scene["boxes"][0] * 96).astype(int)
    rows, columns = np.nonzero(scene["mask"] == label + 1)
    assert areas[0] > 0.02
    same = (scene["labels"] == label).sum()
    if same == 1:  # the main object lies on top, so its whole box shows in the mask
        assert (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1) == tuple(box)
    assert scene["image"].std() > 10


def numbered(length):
    """A source whose images say their own number."""

    def load(index):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (index, index, index)).save(file, "PNG")
        return {"image": file.getvalue(), "label": index, "name": str(index)}

    return Source("numbered", length, tuple("abc"), load)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    length=st.integers(1, 9),
    rows=st.sampled_from([2, 4, 8]),
    processes=st.sampled_from([1, 2]),
    seed=st.integers(0, 5),
    start=st.integers(0, 4),
)
def test_batches_depend_on_seed_and_step_alone(length, rows, processes, seed, start):
    def labels(first, process=0, among=1):
        steps = pipeline.batches(
            numbered(length),
            batch_size=rows,
            seed=seed,
            canvas=(4, 4),
            start=first,
            stop=6,
            process=process,
            processes=among,
            threads=2,
        )
        return [batch["label"] for batch in steps]

    whole = np.concatenate(labels(0))
    resumed = labels(start)
    assert len(resumed) == 6 - start
    np.testing.assert_array_equal(np.concatenate(resumed), whole[start * rows :])
    parts = [labels(0, p, processes) for p in range(processes)]
    joined = np.concatenate([np.concatenate(step) for step in zip(*parts, strict=True)])
    np.testing.assert_array_equal(joined, whole)
    for epoch in range(len(whole) // length):
        part = whole[epoch * length : (epoch + 1) * length]
        assert sorted(part) == list(range(length))


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_every_example_once(processes):
    seen = []
    for process in range(processes):
        for batch in pipeline.evaluation_batches(
            numbered(7), batch_size=4, canvas=(4, 4), process=process, processes=processes
        ):
            assert len(batch["valid"]) == 4 // processes
            seen += list(batch["label"][batch["valid"]])
            np.testing.assert_array_equal(
                batch["image"][:, 0, 0, 0] * batch["valid"], batch["label"] * batch["valid"]
            )
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize(
    "config, classes, keys",
    [
        (dict(name="folder", path="classify"), 25, {"label"}),
        (dict(name="coco_json", path="detect"), 80, {"label"}),
        (dict(name="coco_json", path="detect_raccoon"), 1, {"label"}),
        (dict(name="mask_folder", path="segment"), 11, {"mask"}),
        (dict(name="mask_folder", path="segment_coco", images="../detect/images"), 27, {"mask"}),
    ],
)
def test_real_folders(real_data, config, classes, keys):
    config = ConfigDict(dict(config, path=str(real_data / config["path"])))
    for split in ("train", "validation"):
        source = open_source(config, split)
        assert len(source.classes or source.mask_classes) == classes
        batch = next(pipeline.evaluation_batches(source, batch_size=8, canvas=(64, 64)))
        assert set(batch) == {"image", "valid"} | keys
        assert 20 < batch["image"].mean() < 235 and batch["image"].std() > 20
        if "mask" in batch:
            known = batch["mask"][batch["mask"] != 255]
            assert known.max() < classes and len(np.unique(known)) > 2


def write_images(root, names, size=(10, 8)):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if number == 0 else "RGB", size, 40 * number).save(path)


def test_folder_layouts(tmp_path):
    split = tmp_path / "split"
    write_images(split, ["train/cat/1.png", "train/dog/2.jpg", "val/dog/3.png"])
    sources = [
        open_source(ConfigDict(dict(name="folder", path=str(split))), s) for s in scenes.SPLITS
    ]
    assert [s.length for s in sources] == [2, 1] and sources[1].load(0)["label"] == 1
    plain = tmp_path / "plain"
    write_images(plain, [f"{c}/{i}.png" for c in "ab" for i in range(30)])
    sources = [
        open_source(ConfigDict(dict(name="folder", path=str(plain))), s) for s in scenes.SPLITS
    ]
    names = [{s.load(i)["name"] for i in range(s.length)} for s in sources]
    assert len(names[0] | names[1]) == 60 and not names[0] & names[1] and len(names[1]) > 3


def first_batch(config, split="train"):
    source = open_source(ConfigDict(config), split)
    return next(pipeline.evaluation_batches(source, batch_size=2, canvas=(8, 8)))


def test_bad_data_gets_one_clear_error(tmp_path):
    with pytest.raises(IcmError, match="unknown data set 'nope'"):
        first_batch(dict(name="nope"))
    with pytest.raises(IcmError, match=r"data\.path is empty"):
        first_batch(dict(name="folder", path=""))
    with pytest.raises(IcmError, match="no folder"):
        first_batch(dict(name="folder", path=str(tmp_path / "absent")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(IcmError, match="no images"):
        first_batch(dict(name="folder", path=str(tmp_path / "empty")))
    write_images(tmp_path / "bad", ["train/a/1.jpg"])
    whole = (tmp_path / "bad/train/a/1.jpg").read_bytes()
    for content in (whole[: len(whole) // 2], b"no image"):
        (tmp_path / "bad/train/a/1.jpg").write_bytes(content)
        with pytest.raises(IcmError, match=r"1\.jpg.*repair or remove"):
            first_batch(dict(name="folder", path=str(tmp_path / "bad")))
    (tmp_path / "bad/train.json").write_text(json.dumps({"images": []}))
    with pytest.raises(IcmError, match="not COCO JSON"):
        first_batch(dict(name="coco_json", path=str(tmp_path / "bad")))


@pytest.mark.parametrize("name", ["imagenet2012", "coco/2014", "coco/2017", "voc/2012"])
def test_absent_tfds_data_says_what_to_prepare(name, tmp_path):
    with pytest.raises(IcmError, match=r"not prepared.*download_and_prepare"):
        open_source(ConfigDict(dict(name=name, path=str(tmp_path))), "train")
