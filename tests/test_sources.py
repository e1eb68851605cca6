"""Sources: folders of images, lists, masks and boxes, and those that are not as they should be."""

import json
import os

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from icm_jax.data import DATASETS, data_fields, open_source, pipeline
from icm_jax.data.pipeline import BatchSpec
from icm_jax.errors import IcmError


def save(path, mode="RGB", value=100, size=(10, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value,) * 3).save(path)


def opened(name, path, split="train", **fields):
    return open_source(ConfigDict(dict(fields, name=name, path=str(path))), split)


@pytest.mark.parametrize(
    "config, classes, keys",
    [
        (dict(name="folder", path="classify"), 25, {"label"}),
        (dict(name="photos", path="photos"), 0, set()),
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
        batch = next(pipeline.evaluation_batches(source, BatchSpec(8, (64, 64))))
        assert set(batch) == {"image", "number", "valid"} | keys
        assert 20 < batch["image"].mean() < 235 and batch["image"].std() > 20
        if "mask" in batch:
            known = batch["mask"][batch["mask"] != 255]
            assert known.max() < classes and len(np.unique(known)) > 2


def test_folder_layouts(tmp_path):
    lists = tmp_path / "split"
    for name in ("train/cat/1.png", "train/dog/2.jpg", "val/dog/3.png"):
        save(lists / name)
    sources = [opened("folder", lists, split) for split in ("train", "validation")]
    assert [s.length for s in sources] == [2, 1] and sources[1].load(0)["label"] == 1
    plain = tmp_path / "plain"
    for number in range(60):
        save(plain / "ab"[number % 2] / f"{number}.png")
    sources = [opened("folder", plain, split) for split in ("train", "validation")]
    names = [{s.load(i)["name"] for i in range(s.length)} for s in sources]
    assert len(names[0] | names[1]) == 60 and not names[0] & names[1] and len(names[1]) > 3


def test_photos_need_no_classes(tmp_path):
    for number in range(60):
        save(tmp_path / ("deep/er" if number % 2 else "") / f"{number}.png")
    save(tmp_path / ".hidden" / "no.png")
    sources = [opened("photos", tmp_path, split) for split in ("train", "validation")]
    names = [{s.load(i)["name"] for i in range(s.length)} for s in sources]
    assert len(names[0] | names[1]) == 60 and not names[0] & names[1] and len(names[1]) > 3
    assert sources[0].classes == () and "label" not in sources[0].load(0)
    (tmp_path / "train.txt").write_text("2.png\ndeep/er/1.png\n")
    assert opened("photos", tmp_path).length == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(IcmError, match="no images for train"):
        opened("photos", tmp_path / "empty")


def first_batch(config, split="train"):
    source = open_source(ConfigDict(config), split)
    return next(pipeline.evaluation_batches(source, BatchSpec(2, (8, 8))))


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
    save(tmp_path / "bad/train/a/1.jpg")
    whole = (tmp_path / "bad/train/a/1.jpg").read_bytes()
    for content in (whole[: len(whole) // 2], b"no image"):
        (tmp_path / "bad/train/a/1.jpg").write_bytes(content)
        with pytest.raises(IcmError, match=r"1\.jpg.*repair or remove"):
            first_batch(dict(name="folder", path=str(tmp_path / "bad")))
    (tmp_path / "bad/train.json").write_text(json.dumps({"images": []}))
    with pytest.raises(IcmError, match="not COCO JSON"):
        first_batch(dict(name="coco_json", path=str(tmp_path / "bad")))


def test_folders_with_a_part_missing(tmp_path):
    save(tmp_path / "a/train/cat/1.png")
    save(tmp_path / "b/val/cat/1.png")
    with pytest.raises(IcmError, match="no folder val/"):
        opened("folder", tmp_path / "a", "validation")
    with pytest.raises(IcmError, match="no folder train/"):
        opened("folder", tmp_path / "b", "validation")
    with pytest.raises(IcmError, match=r"data\.path is empty"):
        open_source(ConfigDict(dict(name="folder")), "train")


def test_hidden_folders_are_no_classes(tmp_path):
    save(tmp_path / "cat/1.png")
    save(tmp_path / ".ipynb_checkpoints/1.png")
    for index in range(9):
        save(tmp_path / f"dog/{index}.png")
    source = opened("folder", tmp_path)
    names = [source.load(i)["name"] for i in range(source.length)]
    assert source.classes == ("cat", "dog") and not any(".ipynb" in name for name in names)


def test_lists_are_text(tmp_path):
    save(tmp_path / "cat/1.png")
    (tmp_path / "train.txt").write_bytes("\ufeffcat/1.png\n".encode())
    assert opened("folder", tmp_path).load(0)["label"] == 0
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(IcmError, match=r"train\.txt is not UTF-8"):
        opened("folder", tmp_path)


def write_coco(root, annotations):
    save(root / "images/1.png")
    content = dict(
        images=[dict(id=1, file_name="1.png", width=10, height=8)],
        annotations=annotations,
        categories=[dict(id=7, name="seven"), dict(id=9, name="nine")],
    )
    (root / "train.json").write_text(json.dumps(content))
    return opened("coco_json", root)


def test_coco_label_is_the_largest_box_but_no_crowd(tmp_path):
    def boxed(side, category, **more):
        return dict(image_id=1, category_id=category, bbox=[0, 0, side, side], **more)

    crowd = boxed(9, 7, iscrowd=1)
    assert write_coco(tmp_path, [boxed(3, 7), boxed(5, 9), crowd]).load(0)["label"] == 1
    assert write_coco(tmp_path, [crowd]).load(0)["label"] is None


def test_coco_boxes_are_corners_as_fractions(tmp_path):
    annotations = [
        dict(image_id=1, category_id=9, bbox=[1, 2, 5, 4], iscrowd=0),
        dict(image_id=1, category_id=7, bbox=[0, 0, 10, 8], iscrowd=1),
        dict(image_id=1, category_id=7, bbox=[3, 3, 0, 4]),  # no area
    ]
    objects = write_coco(tmp_path, annotations).load(0)["objects"]
    np.testing.assert_allclose(objects.boxes, [[0.25, 0.1, 0.75, 0.6], [0, 0, 1, 1]], rtol=1e-6)
    assert objects.labels.tolist() == [1, 0] and objects.ignored.tolist() == [False, True]


def test_every_box_of_the_real_sets_is_read(real_data):
    for name, split, images, boxes in (
        ("detect", "train", 128, 929),
        ("detect", "validation", 64, 475),
        ("detect_raccoon", "train", 116, 127),
        ("detect_raccoon", "validation", 29, 31),
    ):
        source = opened("coco_json", real_data / name, split)
        found = [source.load(i)["objects"].boxes for i in range(source.length)]
        assert (len(found), sum(map(len, found))) == (images, boxes)
        found = np.concatenate(found)
        assert (found > -0.01).all() and (found < 1.01).all()


def test_a_missing_coco_file_is_named_once(tmp_path):
    write_coco(tmp_path, [])
    with pytest.raises(IcmError, match=r"^cannot read .*val\.json"):
        opened("coco_json", tmp_path, "validation")


@pytest.mark.parametrize(
    "mask, message",
    [
        (dict(value=9), "class id 9; its data set names 2"),
        (dict(value=1, size=(30, 8)), "8 x 30, which does not fit 8 x 10"),
        (dict(value=1, mode="I;16"), "one 8-bit channel"),
        (dict(value=255), None),
        (dict(value=1, size=(20, 16)), None),
    ],
)
def test_masks_fit_their_image_and_classes(tmp_path, mask, message):
    save(tmp_path / "images/1.png")
    save(tmp_path / "masks/1.png", **{"mode": "L", **mask})
    (tmp_path / "train.txt").write_text("1\n")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    batches = pipeline.evaluation_batches(opened("mask_folder", tmp_path), BatchSpec(1, (8, 8)))
    if message is None:
        assert np.all(next(batches)["mask"] == mask["value"])
    else:
        with pytest.raises(IcmError, match=message):
            next(batches)


def test_the_folder_of_pascal_voc(tmp_path):
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, stems in (("train", "a\n"), ("trainaug", "a\nb\n"), ("val", "b\n")):
        (lists / f"{name}.txt").write_text(stems)
    for number, stem in enumerate("ab"):
        save(tmp_path / "JPEGImages" / f"{stem}.jpg")
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            mask = Image.fromarray(np.full((8, 8), 19 + number, np.uint8))
            mask.putpalette([5] * 768)  # ids are places in a palette
            (tmp_path / folder).mkdir(exist_ok=True)
            mask.save(tmp_path / folder / f"{stem}.png")
    config = ConfigDict(dict(name="voc_masks", path=str(tmp_path)))
    train, validation = (open_source(config, split) for split in ("train", "validation"))
    assert (train.length, validation.length, len(train.mask_classes)) == (1, 1, 21)
    assert train.mask_classes[20] == "tvmonitor"
    (batch,) = pipeline.in_order(validation, BatchSpec(1, (8, 8)))
    assert np.all(batch["mask"] == 20)
    more = ConfigDict(dict(config, list="trainaug", masks="SegmentationClassAug"))
    assert open_source(more, "train").length == 2
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(IcmError, match="no image 'b'"):
        open_source(config, "validation")


def streets(root):
    """Two splits by folder, images and masks in folders of cities, with the city's file names."""
    for split, city, number in (("train", "a", 1), ("train", "b", 2), ("val", "b", 3)):
        stem = f"{split}/{city}/{city}_{number}"
        save(root / f"leftImg8bit/{stem}_leftImg8bit.png", size=(32, 16))
        save(root / f"gtFine/{stem}_gtFine_labelIds.png", mode="L", value=7 + number, size=(32, 16))
        save(root / f"gtFine/{stem}_gtFine_color.png", size=(32, 16))
    (root / "classes.txt").write_text("road\nsidewalk\n")
    return dict(
        images="leftImg8bit/{split}",
        masks="gtFine/{split}",
        image_suffix="_leftImg8bit",
        mask_suffix="_gtFine_labelIds",
        mask_ids=((8, 0), (9, 1), (-1, 255)),
    )


def test_images_and_masks_are_found_by_a_rule_of_names(tmp_path):
    fields = streets(tmp_path)
    train = opened("mask_folder", tmp_path, **fields)
    validation = opened("mask_folder", tmp_path, "validation", **fields)
    assert (train.length, validation.length) == (2, 1)
    batches = list(pipeline.in_order(train, BatchSpec(2, (8, 16))))
    assert [np.unique(mask).tolist() for mask in batches[0]["mask"]] == [[0], [1]]
    (batch,) = pipeline.in_order(validation, BatchSpec(1, (8, 16)))
    assert (batch["mask"] == 255).all()  # id 10 is one of the others
    strict = opened("mask_folder", tmp_path, "validation", **fields | dict(mask_ids=((8, 0),)))
    with pytest.raises(IcmError, match=r"class id 10.*data\.mask_ids lists 1"):
        next(pipeline.in_order(strict, BatchSpec(1, (8, 16))))
    (tmp_path / "val.txt").write_text("b_3\nb_4\n")
    with pytest.raises(IcmError, match=r"no image 'b_4' \(1 of 2 are missing\); data.images and"):
        opened("mask_folder", tmp_path, "validation", **fields)
    for ids, message in ((((8, 2),), "names the class 2; classes.txt has 2"), ((8, 0), "pairs")):
        with pytest.raises(IcmError, match=message):
            opened("mask_folder", tmp_path, **fields | dict(mask_ids=ids))
    (tmp_path / "gtFine/train/b/b_2_gtFine_labelIds.png").unlink()
    with pytest.raises(IcmError, match="no mask 'b_2'"):
        opened("mask_folder", tmp_path, **fields)
    save(tmp_path / "leftImg8bit/train/b/a_1_leftImg8bit.png")
    with pytest.raises(IcmError, match="have the same name 'a_1'"):
        opened("mask_folder", tmp_path, **fields)


def test_a_field_of_another_set_is_refused_by_name(tmp_path):
    save(tmp_path / "cat/1.png")
    with pytest.raises(IcmError, match=r"set folder has no field data\.train; it has path, and of"):
        opened("folder", tmp_path, train=5)
    with pytest.raises(IcmError, match=r"no field data\.mask_id; it has path, images, masks"):
        opened("mask_folder", tmp_path, mask_id=())
    for name, known in DATASETS.items():
        assert data_fields(dict(name=name, canvas=8, train=5, list="x", boxes=None)) == {
            "name": name,
            "canvas": 8,
            **{f: v for f, v in dict(train=5, list="x").items() if f in known.fields},
        }


def test_photos_of_several_folders_are_one_set(tmp_path):
    """Each by its own list or hash; the one that is missing is said."""
    for number in range(20):
        save(tmp_path / "ab"[number % 2] / f"{number}.png")
    (tmp_path / "b" / "train.txt").write_text("1.png\n3.png\n")
    (tmp_path / "b" / "val.txt").write_text("5.png\n")
    both = os.pathsep.join(str(tmp_path / folder) for folder in "ab")
    found = {}
    for split in ("train", "validation"):
        sources = [opened("photos", path, split) for path in (both, tmp_path / "a", tmp_path / "b")]
        whole, *parts = ([s.load(n)["name"] for n in range(s.length)] for s in sources)
        assert whole == parts[0] + parts[1]
        found[split] = set(whole)
    assert len(found["train"] | found["validation"]) == 13
    assert not found["train"] & found["validation"]
    with pytest.raises(IcmError, match="nowhere"):
        opened("photos", both + os.pathsep + "nowhere")


def test_photos_that_are_only_scored_on(tmp_path):
    for number in range(7):
        save(tmp_path / f"{number}.png")
    for split in ("train", "validation"):
        assert opened("photos", tmp_path, split, whole=True).length == 7


def test_vimeo_90k_as_it_is_unpacked(tmp_path):
    """Seven frames of each listed sequence, three of triplets, or those that are asked for."""
    names = {"sep_trainlist.txt": ("00001/0001", "00001/0002"), "sep_testlist.txt": ("00002/0266",)}
    for number, name in enumerate(sum(names.values(), ())):
        for frame in range(1, 8):
            save(tmp_path / "sequences" / name / f"im{frame}.png", value=20 * number + frame)
    with pytest.raises(IcmError, match=r"neither sep_trainlist\.txt nor tri_trainlist\.txt"):
        opened("vimeo90k", tmp_path)
    for name, listed in names.items():
        (tmp_path / name).write_text("\n".join(listed) + "\n\n")  # theirs end so
    train, validation = (opened("vimeo90k", tmp_path, split) for split in ("train", "validation"))
    assert (train.length, validation.length, train.classes) == (14, 7, ())
    assert train.load(9)["name"].endswith("00001/0002/im3.png")
    batch = next(pipeline.batches(validation, BatchSpec(7, (8, 8)), seed=0, stop=1))
    assert sorted(batch["image"][:, 0, 0, 0]) == [40 + frame for frame in range(1, 8)]
    middle = opened("vimeo90k", tmp_path, frames=(4,))
    assert [middle.load(i)["name"][-18:] for i in range(2)] == [
        "00001/0001/im4.png",
        "00001/0002/im4.png",
    ]
    with pytest.raises(IcmError, match="frames are numbers from 1 to 7"):
        opened("vimeo90k", tmp_path, frames=(8,))
    for name in names:
        (tmp_path / name).rename(tmp_path / name.replace("sep", "tri"))
    assert opened("vimeo90k", tmp_path).length == 6


def test_coco_json_of_other_names(tmp_path):
    save(tmp_path / "images" / "1.png")
    content = dict(images=[dict(id=1, file_name="1.png", width=10, height=8)], annotations=[])
    content |= dict(categories=[dict(id=3, name="cat")])
    (tmp_path / "instances_train2017.json").write_text(json.dumps(content))
    both, one = "instances_{split}2017.json", "instances_train2017.json"
    for annotations, split in ((both, "train"), (one, "train"), (one, "validation")):
        assert opened("coco_json", tmp_path, split, annotations=annotations).length == 1
    with pytest.raises(IcmError, match=r"instances_val2017\.json"):
        opened("coco_json", tmp_path, "validation", annotations=both)


def test_a_field_of_the_embedded_data_means_nothing_to_other_sets():
    """An experiment's data have those of `scenes`, though a command names another set: counts would
    be taken for lists."""
    for name, known in DATASETS.items():
        shared = set(known.fields) & set(DATASETS["scenes"].fields)
        assert shared <= {"path"} or name == "scenes"
