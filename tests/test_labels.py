"""COCO's JSON as annotation tools export it: each fault has its rule and costs nothing else."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from icm_jax.data import open_source, pipeline
from icm_jax.data.pipeline import BatchSpec
from icm_jax.errors import IcmError

SIZE = 20, 10  # width, height


def picture(path, size=SIZE, orientation=1, box=None):
    """A dark image, with a bright part at (left, top, right, bottom) of the pixels as stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image, exif = Image.new("RGB", size, (20,) * 3), Image.Exif()
    if box is not None:
        image.paste((230,) * 3, box)
    if orientation > 1:
        exif[0x0112] = orientation
    image.save(path, quality=100, exif=exif)


def entry(number, name=None, size=SIZE):
    sides = {} if size is None else dict(width=size[0], height=size[1])
    return dict(id=number, file_name=name or f"{number}.png", **sides)


def annotation(bbox=(2, 1, 4, 5), image=1, category=7, **more):
    given = dict(id=5, image_id=image, category_id=category, **more)
    return given if bbox is None else dict(given, bbox=list(bbox))


GOOD = annotation()
KINDS = [dict(id=7, name="seven"), dict(id=9, name="nine")]


def coco(root, annotations=(), images=None, categories=KINDS, **fields):
    """The source of a train.json; images are made unless there are some."""
    content = dict(images=[entry(1), entry(2)] if images is None else images)
    content |= dict(annotations=list(annotations), categories=categories)
    if not (root / "images").is_dir():
        for number in (1, 2):
            picture(root / f"images/{number}.png")
    (root / "train.json").write_text(json.dumps(content))
    return open_source(ConfigDict(dict(fields, name="coco_json", path=str(root))), "train")


def boxes(source, index=0):
    """In pixels, [x, y, width, height]."""
    found = source.load(index)["objects"].boxes * np.array([*SIZE[::-1], *SIZE[::-1]])
    return [[round(float(x), 3) for x in (b[1], b[0], b[3] - b[1], b[2] - b[0])] for b in found]


def rle(mask):
    """COCO's own uncompressed run lengths, counted one pixel after the other."""
    counts, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = not value
        counts[-1] += 1
    return dict(size=list(mask.shape), counts=counts)


MASK = np.zeros(SIZE[::-1], bool)
MASK[3:8, 2:12] = True
TRIANGLE = [[2, 3, 12, 3, 12, 8]]
AROUND = [2, 3, 10, 5]
NAN = float("nan")
LEFT_OUT = None
FAULTS = {
    "no box but polygons": (annotation(None, segmentation=TRIANGLE), AROUND, "around their outl"),
    "an empty box": (annotation([], segmentation=TRIANGLE), AROUND, "around their outline"),
    "a box without an area": (annotation([3, 3, 0, 4], segmentation=TRIANGLE), AROUND, "around"),
    "run lengths": (annotation([0, 0, 0, 0], segmentation=rle(MASK)), AROUND, "around"),
    "one flat polygon": (annotation(None, segmentation=TRIANGLE[0]), AROUND, "around"),
    "null": (dict(annotation(None, segmentation=TRIANGLE), bbox=None), AROUND, "around"),
    "nothing": (annotation(None), LEFT_OUT, "without a box that has an area, left out"),
    "nothing either": (annotation([], segmentation=[]), LEFT_OUT, "without a box that has"),
    "two points": (annotation(None, segmentation=[[1, 1, 5, 5]]), LEFT_OUT, "without a box"),
    "a line": (annotation(None, segmentation=[[1, 1, 5, 1, 9, 1]]), LEFT_OUT, "without a box"),
    "three numbers": (annotation([1, 2, 3]), LEFT_OUT, "without a box"),
    "NaN": (annotation([NAN, 2, 3, 4]), LEFT_OUT, "without a box"),
    "NaN in a polygon": (
        annotation(None, segmentation=[[1, 1, NAN, 5, 9, 9]]),
        LEFT_OUT,
        "without",
    ),
    "infinity": (annotation([1, 2, float("inf"), 4]), LEFT_OUT, "without a box"),
    "words": (annotation(["a", 2, 3, 4]), LEFT_OUT, "without a box"),
    "numbers as text": (annotation(["3", "1.5", "4", 5]), [3, 1.5, 4, 5], "written as text"),
    "another corner": (annotation([7, 8, -4, -5]), [3, 3, 4, 5], "sides below 0, taken as drawn"),
    "overhang": (annotation([15, -3, 10, 8]), [15, 0, 5, 5], "overhang their image, clipped"),
    "outside": (annotation([30, 2, 4, 4]), LEFT_OUT, "of which nothing lies in their image"),
    "an unlisted image": (annotation(image=99), LEFT_OUT, "of images that are not listed"),
    "no image": (dict(id=5, category_id=7, bbox=[1, 2, 3, 4]), LEFT_OUT, "that are not listed"),
    "no dictionary": ("text", LEFT_OUT, "of images that are not listed"),
    "an unknown category": (annotation(category=8), LEFT_OUT, "of categories that are not decl"),
    "no category": (dict(image_id=1, bbox=[1, 2, 3, 4]), LEFT_OUT, "categories that are not decl"),
    "the same again": (dict(GOOD, id=6), LEFT_OUT, "listed twice"),
    "ids as text": (annotation([3, 3, 4, 5], image="1", category="7"), [3, 3, 4, 5], None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_annotation_costs_nothing_else(tmp_path, capsys, fault):
    broken, expected, line = FAULTS[fault]
    for count in (1, 3):
        root = tmp_path / str(count)
        other = annotation([1, 1, 9, 9], image=2, category=9)
        source = coco(root, [GOOD, *[broken] * count, other])
        # what is broken in the same way is the same object
        assert boxes(source) == [[2, 1, 4, 5]] + ([] if expected is None else [expected])
        assert boxes(source, 1) == [[1, 1, 9, 9]] and source.load(1)["label"] == 1
        said = [x for x in capsys.readouterr().err.splitlines() if "listed twice" not in x or not x]
        if line is None or "twice" in line:
            assert said == []
            continue
        assert len(said) == 1 and said[0].startswith(f"{root}/train.json: ") and line in said[0]
        assert f": {count}, first annotation 1" in said[0]
        coco(root, [GOOD, *[broken] * count, other])
        assert capsys.readouterr().err == ""  # once in a process


def test_objects_listed_twice_are_one(tmp_path, capsys):
    assert boxes(coco(tmp_path, [GOOD, dict(GOOD, id=6), annotation(category=9)])) == [
        [2, 1, 4, 5],
        [2, 1, 4, 5],  # of another class
    ]
    assert "taken once: 1, first annotation 1 (id 6, image 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not COCO JSON, nor any: Expecting"),
        ("\x93", "not COCO JSON, nor any"),
        ("[]", "not COCO JSON: it has no list of images"),
        ('{"images": [], "categories": []}', "it has no list of annotations"),
        ('{"images": [], "categories": [], "annotations": []}', "no image of use"),
    ],
)
def test_what_is_not_coco_is_refused(tmp_path, content, message):
    (tmp_path / "train.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(IcmError, match=message):
        open_source(ConfigDict(dict(name="coco_json", path=str(tmp_path))), "train")


def test_labels_of_which_nothing_is_left_are_refused(tmp_path):
    with pytest.raises(
        IcmError, match=r"none of its 2 objects can be used: annotations of cat.*: 2"
    ):
        coco(tmp_path, [annotation(category=8), annotation(category=10)])


def test_flags_of_crowds(tmp_path):
    given = [
        annotation([n, 1, 3, 3], iscrowd=flag) for n, flag in enumerate((0, 1, "0", "1", True))
    ]
    given += [annotation([9, 1, 3, 3]), annotation([10, 1, 3, 3], ignore=1)]
    ignored = coco(tmp_path, given).load(0)["objects"].ignored
    assert ignored.tolist() == [False, True, False, True, True, False, True]


IMAGES = {
    "sizes missing": ([entry(1, size=None), entry(2)], 2, "not given, read from the files: 1"),
    "sizes of 0": ([entry(1, size=(0, 0)), entry(2)], 2, "not given, read from the files: 1"),
    "sizes NaN": ([entry(1, size=(NAN, 10)), entry(2)], 2, "read from the files: 1"),
    "sizes null": ([entry(1, size=(None, 10)), entry(2)], 2, "read from the files: 1"),
    "sizes as text": ([entry(1, size=("20", "10")), entry(2)], 2, None),
    "sizes swapped": ([entry(1, size=(10, 20)), entry(2)], 2, "another shape than the sizes"),
    "not there": ([entry(1), entry(2), entry(3)], 2, "not there, left out with their objects: 1"),
    "no name of a file": ([entry(1), entry(2), entry(3, "\0")], 2, "left out with their objects"),
    "no file name": ([entry(1), entry(2), dict(id=3)], 2, "without an id or a file name"),
    "no id": ([entry(1), entry(2), dict(file_name="1.png")], 2, "without an id or a file name"),
    "no dictionary": ([entry(1), entry(2), 3], 2, "without an id or a file name"),
    "listed again": ([entry(1), entry(2), entry(1)], 2, "listed several times, taken once"),
    "other id": ([entry(1), entry(2), entry(8, "1.png")], 2, "listed several times"),
    "two files": ([entry(1), entry(2), entry(3, "3.png"), entry(3, "4.png")], 2, "different files"),
    "whole path": ([entry(1, "C:\\export\\1.png"), entry(2, "/home/me/images/2.png")], 2, None),
    "an address": (
        [dict(entry(1, "x"), file_name=None, coco_url="http://x/1.png"), entry(2)],
        2,
        None,
    ),
}


@pytest.mark.parametrize("fault", IMAGES)
def test_images_that_are_listed_wrongly(tmp_path, capsys, fault):
    images, count, line = IMAGES[fault]
    source = coco(tmp_path, [GOOD, annotation(image=2), annotation(image=3)], images)
    assert source.length == count and boxes(source)[0] == [2, 1, 4, 5]
    said = capsys.readouterr().err.splitlines()
    own = [x for x in said if "of images that are not listed" not in x]  # of image 3
    assert len(own) == (line is not None) and all(line in x for x in own)


def test_objects_of_an_image_of_several_ids_come_together(tmp_path):
    images = [entry(1), entry(8, "1.png"), entry(2)]
    source = coco(tmp_path, [GOOD, annotation([9, 1, 3, 3], image=8)], images)
    assert boxes(source) == [[2, 1, 4, 5], [9, 1, 3, 3]] and boxes(source, 1) == []


def test_an_image_that_is_none_is_named_when_it_is_read(tmp_path, capsys):
    for number in (1, 2):
        picture(tmp_path / f"images/{number}.png")
    (tmp_path / "images/2.png").write_bytes(b"none")
    source = coco(tmp_path, [GOOD, annotation(image=2)])
    assert source.length == 2 and capsys.readouterr().err == ""
    with pytest.raises(IcmError, match=r"2\.png.*repair or remove it"):
        list(pipeline.in_order(source, BatchSpec(2, (8, 8))))
    assert coco(tmp_path, [GOOD], [entry(1), entry(2, size=None)]).length == 1
    assert "files cannot be read, left out: 1, first" in capsys.readouterr().err


def test_categories_declared_wrongly(tmp_path, capsys):
    kinds = [dict(id=10, name="ten"), dict(id=9, name="nine"), dict(id="7", name="seven")]
    kinds += [dict(id=11, name="seven"), dict(id=9, name="no"), dict(id=12), dict(name="x")]
    given = [annotation([n, 1, 3, 3], category=c) for n, c in enumerate((7, 9, 10, 11, 12))]
    source = coco(tmp_path, given, categories=kinds)
    assert source.classes == ("seven", "nine", "ten", "12")
    assert source.load(0)["objects"].labels.tolist() == [0, 1, 2, 0, 3]
    assert "declared several times, by id or name, the first taken: 3" in capsys.readouterr().err


def test_boxes_as_fractions_of_the_sides(tmp_path, capsys):
    given = [annotation([0.1, 0.1, 0.2, 0.5], segmentation=[[0.1, 0.1, 0.3, 0.1, 0.3, 0.6]])]
    source = coco(tmp_path, given)
    assert boxes(source) == [[2, 1, 4, 5]]
    (outline,) = source.load(0)["outlines"]()
    np.testing.assert_allclose(outline.polygons[0], [[0.1, 0.1], [0.1, 0.3], [0.6, 0.3]])
    assert "fractions of their image's sides" in capsys.readouterr().err
    assert boxes(coco(tmp_path, [*given, GOOD]))[1] == [2, 1, 4, 5]  # tiny, if one is not


def test_folders_of_coco_itself(tmp_path):
    picture(tmp_path / "train2017/000001.jpg")
    (tmp_path / "annotations").mkdir()
    content = dict(images=[entry(1, "000001.jpg")], annotations=[GOOD], categories=KINDS)
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(content))
    fields = dict(annotations="annotations/instances_{split}2017.json", images="{split}2017")
    config = ConfigDict(dict(fields, name="coco_json", path=str(tmp_path)))
    assert boxes(open_source(config, "train")) == [[2, 1, 4, 5]]
    (tmp_path / "train").mkdir()  # beside its images, as some exports have it
    (tmp_path / "train/_annotations.coco.json").write_text(json.dumps(content))
    picture(tmp_path / "train/000001.jpg")
    config.update(annotations="{split}/_annotations.coco.json", images="")
    assert open_source(config, "train").load(0)["name"].endswith("train/000001.jpg")


PART = 4, 2, 14, 6  # left, top, right, bottom of a bright part of the pixels as stored


def upright_part(orientation):
    """Where a viewer shows it, [x, y, width, height], and the sides of what it shows."""
    image = Image.new("L", SIZE)
    image.paste(255, PART)
    exif = image.getexif()
    exif[0x0112] = orientation
    from PIL import ImageOps

    shown = ImageOps.exif_transpose(image)
    left, top, right, bottom = shown.getbbox()
    return [left, top, right - left, bottom - top], shown.size


def bright(source, index):
    """The bright part of an image as the pipeline reads it: (ymin, xmin, ymax, xmax), fractions."""
    loaded = source.load(index)
    pixels = source.read(loaded["image"], "x", (0, 0))[..., 0] > 127
    rows, columns = np.nonzero(pixels)
    ends = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
    return ends / np.tile(pixels.shape, 2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("scale", [1, 3])
def test_objects_follow_an_image_that_exif_turns(tmp_path, capsys, orientation, stored, scale):
    """Boxes and outlines lie on the bright part, whether the JSON has the pixels as stored or what
    a viewer shows, at whatever scale. Where the sizes do not tell, other turned images do."""
    picture(tmp_path / "images/1.jpg", orientation=orientation, box=PART)
    picture(tmp_path / "images/2.jpg", orientation=6, box=PART)
    images, given = [], []
    for number, turn in ((1, orientation), (2, 6)):
        x, y, width, height = PART[0], PART[1], PART[2] - PART[0], PART[3] - PART[1]
        size = SIZE
        if not stored:
            (x, y, width, height), size = upright_part(turn)
        polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
        segmentation = [[scale * end for end in polygon]]
        if scale == 1:  # run lengths of the same
            mask = np.zeros(size[::-1], bool)
            mask[y : y + height, x : x + width] = True
            segmentation = rle(mask) if number == 1 else segmentation
        bbox = [scale * side for side in (x, y, width, height)]
        images.append(entry(number, f"{number}.jpg", [scale * side for side in size]))
        given.append(annotation(bbox, image=number, segmentation=segmentation))
    source = coco(tmp_path, given, images)
    for index in range(2):
        loaded = source.load(index)
        np.testing.assert_allclose(loaded["objects"].boxes[0], bright(source, index), atol=1e-6)
    turned = sum(turn > 1 for turn in (orientation, 6)) if stored else 0
    said = capsys.readouterr().err
    assert (f"turned with them: {turned}, first" in said) if turned else said == ""
    spec = BatchSpec(2, (20, 20), boxes=1, outlines=1)
    (batch,) = pipeline.in_order(source, spec)
    for row in range(2):
        shown = batch["image"][row, ..., 0] > 180
        np.testing.assert_array_equal(batch["box_masks"][row, 0], shown)


def test_sizes_of_turned_files_that_are_not_given(tmp_path):
    """Without any sizes the upright image's; with others that are as stored, so are these."""
    for number in (1, 2):
        picture(tmp_path / f"images/{number}.jpg", orientation=8, box=PART)
    (x, y, width, height), size = upright_part(8)
    left, top, right, bottom = PART
    for first, bbox in (
        (size, [x, y, width, height]),
        (SIZE, [left, top, right - left, bottom - top]),
    ):
        images = [entry(1, "1.jpg", first), entry(2, "2.jpg", None)]
        source = coco(tmp_path, [annotation(bbox), annotation(bbox, image=2)], images)
        for index in range(2):
            found = source.load(index)["objects"].boxes[0]
            np.testing.assert_allclose(found, bright(source, index), atol=1e-6)


JUNK = (None, "", "x", "1", "nan", "\0", -1, 0, 2.5, 1e30, 10**40, NAN, True, [], {}, [1], [[]])


def nodes(tree, place=()):
    """Places of all that a JSON value holds."""
    for key in (
        tree if isinstance(tree, dict) else range(len(tree) if isinstance(tree, list) else 0)
    ):
        yield (*place, key)
        yield from nodes(tree[key], (*place, key))


def test_junk_anywhere_gives_an_error_or_boxes_inside(tmp_path):
    picture(tmp_path / "images/1.png")
    picture(tmp_path / "images/2.jpg", orientation=6)
    given = [annotation(segmentation=TRIANGLE), annotation(None, image=2, segmentation=rle(MASK))]
    images = [entry(1), entry(2, "2.jpg")]
    whole = json.dumps(dict(images=images, annotations=given, categories=KINDS))
    opened, rng = 0, np.random.default_rng(0)
    for _ in range(300):
        content = json.loads(whole)
        for _ in range(rng.integers(1, 3)):
            *above, last = list(nodes(content))[rng.integers(len(list(nodes(content))))]
            tree = content
            for key in above:
                tree = tree[key]
            tree[last] = json.loads(json.dumps(JUNK[rng.integers(len(JUNK))]))
        (tmp_path / "train.json").write_text(json.dumps(content))
        try:
            source = open_source(ConfigDict(dict(name="coco_json", path=str(tmp_path))), "train")
        except IcmError:
            continue
        opened += 1
        for index in range(source.length):
            loaded = source.load(index)
            found = loaded["objects"].boxes
            assert (found >= 0).all() and (found <= 1).all() and (found[:, :2] < found[:, 2:]).all()
            assert len(loaded["outlines"]()) == len(found)
    assert 200 < opened < 300
