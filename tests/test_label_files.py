"""Other people's layouts: PASCAL VOC's boxes, YOLO's text in every form it is exported, streets."""

import json
import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from icm_jax.data import open_source, pipeline
from icm_jax.data.pipeline import BatchSpec
from icm_jax.errors import IcmError

WIDTH, HEIGHT = 20, 10


def opened(name, path, split="train", **fields):
    return open_source(ConfigDict(dict(fields, name=name, path=str(path))), split)


def image(path, size=(WIDTH, HEIGHT), orientation=1, mode="RGB", value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation > 1:
        exif[0x0112] = orientation
    Image.new(mode, size, value).save(path, exif=exif)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def boxes(source, index=0):
    """In pixels, [left, top, right, bottom]."""
    found = source.load(index)["objects"].boxes * np.array([HEIGHT, WIDTH, HEIGHT, WIDTH])
    return [[round(float(side), 3) for side in (b[1], b[0], b[3], b[2])] for b in found]


def xml(objects, size=(WIDTH, HEIGHT)):
    sides = (
        "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    )
    return f"<annotation><filename>x</filename>{sides}{''.join(objects)}</annotation>"


def thing(ends=(3, 2, 6, 6), name="dog", **more):
    inner = "".join(
        f"<{key}>{end}</{key}>"
        for key, end in zip(("xmin", "ymin", "xmax", "ymax"), ends, strict=True)
    )
    flags = "".join(f"<{key}>{value}</{key}>" for key, value in more.items())
    return f"<object><name>{name}</name>{flags}<bndbox>{inner}</bndbox></object>"


def voc(root, **files):
    """A folder of VOC's; a.xml and so on, all in train but those whose names begin with v."""
    lists = dict(train="", val="")
    for stem, content in files.items():
        image(root / f"JPEGImages/{stem}.jpg")
        text(root / f"Annotations/{stem}.xml", content)
        lists["val" if stem[0] == "v" else "train"] += f"{stem}\n"
    for name, content in lists.items():
        text(root / f"ImageSets/Main/{name}.txt", content)
    return root


def test_the_folder_of_pascal_voc(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    dog = thing(difficult=0).replace("</object>", f"{part}</object>")
    train = xml([dog, thing((1, 1, 20, 10), "person", difficult=1, truncated=1)])
    root = voc(tmp_path, a=train, b=xml([]), v1=xml([thing(name="cat")]))
    source, validation = (opened("voc_boxes", root, split) for split in ("train", "validation"))
    assert (source.length, validation.length, len(source.classes)) == (2, 1, 20)
    assert boxes(source) == [[2, 1, 6, 6], [0, 0, 20, 10]] and boxes(source, 1) == []
    loaded = source.load(0)
    assert loaded["objects"].ignored.tolist() == [False, True]  # difficult
    assert [source.classes[i] for i in loaded["objects"].labels] == ["dog", "person"]
    assert source.classes[loaded["label"]] == "dog" and source.load(1)["label"] is None
    assert validation.classes == source.classes
    text(root / "ImageSets/Main/trainval.txt", "a  1\nb -1\nv1  1\n")  # a class's list
    both = opened("voc_boxes", root, list="trainval", validation_list="val")
    assert both.length == 3


VOC_FAULTS = {
    "size missing": (xml([thing()], None), [[2, 1, 6, 6]], "not given, read from the files"),
    "size 0": (xml([thing()], (0, 0)), [[2, 1, 6, 6]], "not given, read from the files"),
    "size swapped": (xml([thing()], (10, 20)), [[2, 1, 6, 6]], "another shape than the sizes"),
    "overhang": (
        xml([thing((11, 3, 25, 6))]),
        [[10, 2, 20, 6]],
        "clipped: 1, first object 0 (dog)",
    ),
    "outside": (xml([thing((31, 3, 35, 6))]), [], "of which nothing lies in their image"),
    "corners swapped": (xml([thing((6, 6, 3, 2))]), [[2, 1, 6, 6]], None),
    "from 0": (xml([thing((0, 0, 6, 6))]), [[0, 0, 6, 6]], "clipped"),
    "fractions": (xml([thing((3.5, 2, "6.0", 6))]), [[2.5, 1, 6, 6]], None),
    "NaN": (xml([thing(("nan", 2, 6, 6))]), [], "without a box"),
    "no number": (xml([thing(("", 2, 6, 6))]), [], "without a box"),
    "no box": (xml(["<object><name>dog</name></object>"]), [], "without a box"),
    "no name": (xml([thing(name="")]), [], "classes that are not listed"),
    "twice": (xml([thing(), thing()]), [[2, 1, 6, 6]], "listed twice"),
    "no XML": ("<annotation><obj", None, "whose XML file is none, left out: 1"),
    "empty": ("", None, "whose XML file is none, left out: 1"),
}


@pytest.mark.parametrize("fault", VOC_FAULTS)
def test_a_broken_xml_file_costs_nothing_else(tmp_path, capsys, fault):
    content, expected, line = VOC_FAULTS[fault]
    source = opened("voc_boxes", voc(tmp_path, a=xml([thing(name="cat")]), b=content))
    found = [boxes(source, index) for index in range(source.length)]
    assert found == [[[2, 1, 6, 6]]] + ([] if expected is None else [expected])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (line is not None) and all(line in x for x in said)


def test_classes_lists_and_files_of_ones_own_in_vocs_form(tmp_path, capsys):
    root = voc(
        tmp_path, a=xml([thing(name="wolf")]), b=xml([thing()]), v1=xml([thing(name="bear")])
    )
    assert opened("voc_boxes", root).classes == ("bear", "dog", "wolf")
    text(root / "classes.txt", "dog\nwolf\n")
    validation = pytest.raises(
        IcmError, match="none of its 1 objects can be used: objects of class"
    )
    with validation:
        opened("voc_boxes", root, "validation")
    (root / "JPEGImages/a.jpg").unlink()
    (root / "Annotations/b.xml").unlink()
    text(root / "ImageSets/Main/train.txt", "a\nb\nv1\n")
    with pytest.raises(IcmError, match="none of its"):
        opened("voc_boxes", root)
    text(root / "classes.txt", "dog\nbear\n")
    assert opened("voc_boxes", root).length == 1
    said = capsys.readouterr().err
    assert "without an XML file, left out: 1, first" in said and "not there, left out" in said
    with pytest.raises(IcmError, match=r"cannot read .*trainval\.txt"):
        opened("voc_boxes", root, list="trainval")
    with pytest.raises(IcmError, match=r"Annotations has no XML files; data\.path is"):
        opened("voc_boxes", root / "JPEGImages")


def test_without_lists_every_fifth_image_is_kept_for_validation(tmp_path):
    for number in range(40):
        image(tmp_path / f"JPEGImages/{number}.png")
        text(tmp_path / f"Annotations/{number}.xml", xml([thing()]))
    train, validation = (opened("voc_boxes", tmp_path, s) for s in ("train", "validation"))
    assert train.length + validation.length == 40 and 2 < validation.length < 16


def test_a_turned_file_with_vocs_sizes_as_stored(tmp_path, capsys):
    root = voc(tmp_path, a=xml([thing()]))
    image(root / "JPEGImages/a.jpg", orientation=6)
    source = opened("voc_boxes", root)
    # x from 2 to 6 of 20 goes down, y from 1 to 6 of 10 goes to the left
    np.testing.assert_allclose(source.load(0)["objects"].boxes, [[0.1, 0.4, 0.3, 0.9]], rtol=1e-6)
    assert "turned with them: 1" in capsys.readouterr().err


LINE = "1 0.2 0.35 0.2 0.5"  # 2, 1 to 6, 6
FILES = {"images/train/a.jpg": "labels/train/a.txt", "images/val/b.jpg": "labels/val/b.txt"}
FOLDERS = {"train/images/a.jpg": "train/labels/a.txt", "valid/images/b.jpg": "valid/labels/b.txt"}
DARKNET = {"obj/a.jpg": "obj/a.txt", "obj/b.jpg": "obj/b.txt"}
CLASSES = {"classes.txt": "cat\ndog\n"}
AWAY = {"train.txt": "/content/x/images/train/a.jpg", "val.txt": "C:\\x\\images\\val\\b.jpg"}
LISTS = {"t.txt": "./images/train/a.jpg", "v.txt": "images/val/b.jpg"}
OWN = {"obj.names": "cat\ndog\n", "train.txt": "obj/a.jpg\n", "val.txt": "./obj/b.jpg\n"}


def yaml(train, validation, names="[cat, dog]"):
    start = "path: ../elsewhere\nnc: 2\n"
    return {"data.yaml": f"{start}train: {train}\nval: {validation}\nnames: {names}\n"}


LAYOUTS = {
    "Ultralytics": (FILES, yaml("images/train", "images/val")),
    "names by number": (FILES, yaml("images/train", "images/val", "{0: cat, 1: dog}")),
    "classes.txt": (FILES, CLASSES),
    "labelImg": (FILES, {"labels/classes.txt": "cat\ndog\n"}),
    "Roboflow": (FOLDERS, yaml("../train/images", "../valid/images")),
    "by folder": (FOLDERS, CLASSES),
    "Darknet": (DARKNET, OWN),
    "paths of another machine": (FILES, CLASSES | AWAY),
    "lists": (FILES, LISTS | yaml("t.txt", "[v.txt]")),
}


def layout(root, name):
    pairs, more = LAYOUTS[name]
    for path, content in more.items():
        text(root / path, content)
    for path, label in pairs.items():
        image(root / path)
        text(root / label, LINE)
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_yolo(tmp_path, capsys, name):
    root = layout(tmp_path / "root", name)
    for split, stem in (("train", "a"), ("validation", "b")):
        source = opened("yolo_txt", root, split)
        assert source.length == 1 and pathlib.Path(source.load(0)["name"]).stem == stem
        assert boxes(source) == [[2, 1, 6, 6]] and source.classes == ("cat", "dog")
        assert source.load(0)["label"] == 1 and source.load(0)["outlines"]() == (None,)
    assert capsys.readouterr().err == ""


def yolo(root, *lines, names="cat\ndog\n", **files):
    text(root / "classes.txt", names)
    for stem, content in dict(files, a="\n".join(lines)).items():
        image(root / f"images/train/{stem}.jpg")
        if content is not None:
            text(root / f"labels/train/{stem}.txt", content)
    return opened("yolo_txt", root)


def test_a_flat_folder_of_yolo_keeps_every_fifth_for_validation(tmp_path):
    text(tmp_path / "classes.txt", "cat\ndog\n")
    for number in range(40):
        image(tmp_path / f"images/{number}.png")
        text(tmp_path / f"labels/{number}.txt", LINE)
    train, validation = (opened("yolo_txt", tmp_path, s) for s in ("train", "validation"))
    assert train.length + validation.length == 40 and 2 < validation.length < 16


TRIANGLE = "0 0.1 0.3 0.6 0.3 0.6 0.8"
YOLO_FAULTS = {
    "a class too many": ("2 0.2 0.35 0.2 0.5", [], "of classes that have no name, left out"),
    "below 0": ("-1 0.2 0.35 0.2 0.5", [], "of classes that have no name, left out"),
    "a class in words": ("dog 0.2 0.35 0.2 0.5", [], "that are no object"),
    "half a class": ("0.5 0.2 0.35 0.2 0.5", [], "that are no object"),
    "too few": ("1 0.2 0.35 0.2", [], "that are no object"),
    "even": ("1 0.2 0.35 0.2 0.5 0.5 0.5 0.5", [], "that are no object"),
    "NaN": ("1 nan 0.35 0.2 0.5", [], "that are no object"),
    "words": ("1 a 0.35 0.2 0.5", [], "that are no object"),
    "no area": ("1 0.2 0.35 0 0.5", [], "without a box that has an area"),
    "in pixels": ("1 4 3.5 4 5", [], "of which nothing lies in their image"),
    "overhang": ("1 0.0 0.35 0.6 0.5", [[0, 1, 6, 6]], "clipped: 1, first line 2 of"),
    "rounded": ("1 0.149999 0.3 0.300002 0.60001", [[0, 0, 6, 6]], None),
    "a confidence": ("1 0.2 0.35 0.2 0.5 0.9", [[2, 1, 6, 6]], "a sixth number"),
    "whole class as float": ("1.0 0.2 0.35 0.2 0.5", [[2, 1, 6, 6]], None),
    "an outline": (TRIANGLE, [[2, 3, 12, 8]], None),
    "an outline beyond": ("0 -0.5 0.3 0.6 0.3 0.6 0.8", [[0, 3, 12, 8]], "clipped"),
    "twice": (f"{LINE}\n{LINE}", [[2, 1, 6, 6]], "taken once: 1, first line 3 of"),
    "bytes": ("\x00\x93\x00", [], "that are no object"),
}


@pytest.mark.parametrize("fault", YOLO_FAULTS)
def test_a_broken_line_costs_nothing_else(tmp_path, capsys, fault):
    line, expected, said = YOLO_FAULTS[fault]
    source = yolo(tmp_path, "0 0.5 0.5 0.2 0.4", line, "", "1 0.5 0.5 0.5 0.5")
    assert boxes(source) == [[8, 3, 12, 7], *expected, [5, 2.5, 15, 7.5]]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (said is not None) and all(said in x for x in lines)


def test_outlines_of_yolo_are_masks(tmp_path):
    """Objects keep their own, though lines between them are left out."""
    source = yolo(tmp_path, LINE, "9 0 0 1 1", TRIANGLE, "0 0.5 0.2 1.0 0.2 1.0 0.6 0.5 0.6")
    batch = next(pipeline.in_order(source, BatchSpec(1, (20, 20), boxes=3, outlines=1)))
    assert batch["box_outlined"].tolist() == [[True, True, False]]
    expected = np.zeros((20, 20), bool)
    expected[3:8, 2:12] = [[column - 2 >= 2 * row for column in range(2, 12)] for row in range(5)]
    triangle, square, _ = batch["box_masks"][0]
    assert (triangle != expected).sum() <= 5  # pixels that the slope cuts
    assert square[2:6, 10:20].all() and square.sum() == 40


def test_images_without_labels_show_nothing(tmp_path, capsys):
    source = yolo(tmp_path, LINE, b=None, c="")
    assert source.length == 3 and [len(boxes(source, n)) for n in range(3)] == [1, 0, 0]
    (line,) = capsys.readouterr().err.splitlines()
    assert "without a text file, taken to show no object: 1, first" in line and "b.jpg" in line
    with pytest.raises(
        IcmError, match=r"has images for training alone; add .*images/val or val\.txt"
    ):
        opened("yolo_txt", tmp_path, "validation")
    text(tmp_path / "val.txt", "images/train/a.jpg\nimages/train/z.jpg\n")
    assert opened("yolo_txt", tmp_path, "validation").length == 1
    assert "that are listed but not there" in capsys.readouterr().err


def test_folders_that_are_not_yolos(tmp_path):
    with pytest.raises(IcmError, match=r"no file with names of classes: data\.yaml"):
        opened("yolo_txt", tmp_path)
    text(tmp_path / "classes.txt", "cat\n")
    with pytest.raises(IcmError, match="no images for train"):
        opened("yolo_txt", tmp_path)
    image(tmp_path / "images/train/a.jpg")
    with pytest.raises(IcmError, match=r"none of the 1 images .* has labels; .*labels/train/a.txt"):
        opened("yolo_txt", tmp_path)
    text(tmp_path / "labels/train/a.txt", "5 0.5 0.5 1 1")
    with pytest.raises(IcmError, match="none of its 1 objects can be used: objects of classes"):
        opened("yolo_txt", tmp_path)
    text(tmp_path / "data.yaml", "names: [a, {")
    with pytest.raises(IcmError, match=r"data\.yaml is no YAML"):
        opened("yolo_txt", tmp_path)
    text(tmp_path / "other.yaml", "nc: 3")
    with pytest.raises(IcmError, match=r"other\.yaml has no list `names`"):
        opened("yolo_txt", tmp_path, names="other.yaml")


def test_names_are_text_whatever_yaml_makes_of_them(tmp_path):
    text(tmp_path / "data.yaml", "names: [no, 0, 1e3, null]\nkpt_shape: [2, 3]\n")
    image(tmp_path / "images/train/a.jpg")
    text(tmp_path / "labels/train/a.txt", f"{LINE} 0.1 0.2 2 0.3 0.4 2")  # with keypoints
    source = opened("yolo_txt", tmp_path)
    assert source.classes == ("no", "0", "1e3", "null") and boxes(source) == [[2, 1, 6, 6]]
    assert source.load(0)["outlines"]() == (None,)
    text(tmp_path / "some.names", "x\ny\n")
    assert opened("yolo_txt", tmp_path, names="some.names").classes == ("x", "y")


def converted(real, root, name):
    """A COCO folder as VOC's and YOLO's, by the arithmetic of their formats."""
    for short in ("train", "val"):
        content = json.loads((real / name / f"{short}.json").read_text())
        kinds = sorted(content["categories"], key=lambda c: c["id"])
        number = {c["id"]: n for n, c in enumerate(kinds)}
        text(root / "classes.txt", "\n".join(c["name"] for c in kinds))
        stems = []
        for one in content["images"]:
            path = pathlib.Path(one["file_name"])
            objects, lines = [], []
            for given in content["annotations"]:
                if given["image_id"] == one["id"]:
                    (x, y, w, h), kind = given["bbox"], number[given["category_id"]]
                    objects.append(thing((x + 1, y + 1, x + w, y + h), kinds[kind]["name"]))
                    sides = one["width"], one["height"]
                    shares = (
                        (x + w / 2) / sides[0],
                        (y + h / 2) / sides[1],
                        w / sides[0],
                        h / sides[1],
                    )
                    lines.append(f"{kind} {' '.join(f'{share:.6f}' for share in shares)}")
            for folder in (root / "JPEGImages", root / "images" / short):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / path.name).symlink_to(real / name / "images" / path)
            text(root / f"Annotations/{path.stem}.xml", xml(objects, (one["width"], one["height"])))
            text(root / f"labels/{short}/{path.stem}.txt", "\n".join(lines))
            stems.append(path.stem)
        text(root / f"ImageSets/Main/{short}.txt", "\n".join(stems))


@pytest.mark.parametrize("name", ["detect", "detect_raccoon"])
def test_real_images_have_the_same_objects_in_every_format(tmp_path, real_data, name, capsys):
    converted(real_data, tmp_path, name)
    for split in ("train", "validation"):
        coco = opened("coco_json", real_data / name, split)
        by_name = {pathlib.Path(coco.load(i)["name"]).stem: i for i in range(coco.length)}
        for kind, tolerance in (("voc_boxes", 1e-6), ("yolo_txt", 2e-6)):
            source = opened(kind, tmp_path, split)
            assert source.length == coco.length and source.classes == coco.classes
            for index in range(source.length):
                loaded = source.load(index)
                given = coco.load(by_name[pathlib.Path(loaded["name"]).stem])
                assert loaded["image"] == given["image"] and loaded["label"] == given["label"]
                ours, theirs = loaded["objects"], given["objects"]
                np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=tolerance)
                np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert capsys.readouterr().err == ""


def test_the_folder_of_cityscapes(tmp_path):
    for split, city, number in (("train", "aachen", 0), ("train", "bochum", 1), ("val", "ulm", 2)):
        stem = f"{split}/{city}/{city}_00000{number}_000019"
        image(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png")
        mask = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 35
        (tmp_path / f"gtFine/{stem}").parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f"gtFine/{stem}_gtFine_labelIds.png")
        image(tmp_path / f"gtFine/{stem}_gtFine_color.png")
        image(tmp_path / f"gtFine/{stem}_gtFine_instanceIds.png", mode="I;16")
    train, validation = (opened("cityscapes", tmp_path, s) for s in ("train", "validation"))
    assert (train.length, validation.length, len(train.mask_classes)) == (2, 1, 19)
    (batch,) = pipeline.in_order(validation, BatchSpec(1, (HEIGHT, WIDTH)))
    found = dict(zip(mask.ravel().tolist(), batch["mask"].ravel().tolist(), strict=True))
    named = {train.mask_classes[k]: i for i, k in found.items() if k != 255}
    assert named["road"] == 7 and named["person"] == 24 and named["bicycle"] == 33
    assert [k for k in sorted(found) if found[k] == 255] == [
        *range(7), 9, 10, 14, 15, 16, 18, 29, 30, 34
    ]  # fmt: skip
    with pytest.raises(IcmError, match=r"gtCoarse.* has no mask 'aachen_000000_000019' \(2 of 2"):
        opened("cityscapes", tmp_path, masks="gtCoarse")
    with pytest.raises(
        IcmError, match=r"has no \*_leftImg8bit\.png; data\.path is the folder above"
    ):
        opened("cityscapes", tmp_path / "leftImg8bit")
