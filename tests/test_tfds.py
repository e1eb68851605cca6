"""Data that TFDS prepared, of the true structure of features; what is not prepared."""

import importlib.util
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from icm_jax.data import open_source, pipeline
from icm_jax.data.pipeline import BatchSpec
from icm_jax.errors import IcmError

F = tfds.features
VOC = F.ClassLabel(names=["aeroplane", "bicycle", "bird"] + [f"other_{i}" for i in range(17)])


def coco_features():
    item = {
        "area": np.int64,
        "bbox": F.BBoxFeature(),
        "id": np.int64,
        "is_crowd": np.bool_,
        "label": F.ClassLabel(num_classes=80),
    }
    return {
        "image": F.Image(encoding_format="jpeg"),
        "image/filename": F.Text(),
        "image/id": np.int64,
        "objects": F.Sequence(item),
    }


def voc_features():
    item = {
        "label": VOC,
        "bbox": F.BBoxFeature(),
        "pose": F.ClassLabel(names=["frontal", "rear", "left", "right", "unspecified"]),
        "is_truncated": np.bool_,
        "is_difficult": np.bool_,
    }
    return {
        "image": F.Image(),
        "image/filename": F.Text(),
        "objects": F.Sequence(item),
        "labels": F.Sequence(VOC),
        "labels_no_difficult": F.Sequence(VOC),
    }


def imagenet_features():
    return {
        "image": F.Image(encoding_format="jpeg"),
        "label": F.ClassLabel(num_classes=1000),
        "file_name": F.Text(),
    }


def box(side, label, crowd=False):
    return dict(bbox=F.BBox(0.1, 0.1, 0.1 + side, 0.1 + side), label=label, is_crowd=crowd)


# Objects of five images each; "expected" is the class of the largest box that is no crowd.
OBJECTS = [
    [box(0.2, 3), box(0.5, 7), box(0.3, 9)],
    [],
    [box(0.4, 11)],
    [box(0.8, 5, crowd=True), box(0.1, 6)],
    [box(0.8, 5, crowd=True)],
]
EXPECTED = {"coco": [7, None, 11, 6, None], "voc": [7, None, 11, 5, 5]}


def picture(index, kind, size=(24, 20)):
    return stored(Image.new("RGB", size, (40 * index,) * 3), kind)


def stored(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return io.BytesIO(file.getvalue())


def example(name, index):
    if name == "imagenet2012":
        return dict(image=picture(index, "JPEG"), label=200 * index, file_name=f"{index}.JPEG")
    if name == "coco":
        objects = [dict(o, area=1, id=n) for n, o in enumerate(OBJECTS[index])]
        return {
            "image": picture(index, "JPEG"),
            "image/filename": f"{index}.jpg",
            "image/id": index,
            "objects": objects,
        }
    if name == "cityscapes":
        return dict(
            image_id=f"a_{index}",
            image_left=picture(index, "PNG", (2048, 1024)),
            segmentation_label=stored(Image.new("L", (2048, 1024), (7, 8, 33, 9, 0)[index])),
        )
    if name == "oxford_iiit_pet":
        mask = np.array([[1, 2, 3]], np.uint8).repeat(4, 0).repeat(4, 1)
        return dict(
            image=picture(index, "PNG", (12, 4)),
            label=index,
            species=0,
            file_name=f"{index}.jpg",
            head_bbox=F.BBox(0.0, 0.0, 1.0, 1.0),
            segmentation_mask=stored(Image.fromarray(mask)),
        )
    keys = ("bbox", "label")
    objects = [
        dict({k: o[k] for k in keys}, pose=4, is_truncated=False, is_difficult=False)
        for o in OBJECTS[index]
    ]
    labels = [o["label"] for o in objects]
    return {
        "image": picture(index, "PNG"),
        "image/filename": f"{index}.jpg",
        "objects": objects,
        "labels": labels,
        "labels_no_difficult": labels,
    }


def streets_features():
    """As of TFDS's builder of Cityscapes."""
    return {
        "image_id": F.Text(),
        "image_left": F.Image(shape=(1024, 2048, 3), encoding_format="png"),
        "segmentation_label": F.Image(shape=(1024, 2048, 1), encoding_format="png"),
    }


def pet_features():
    return {
        "image": F.Image(),
        "label": F.ClassLabel(num_classes=37),
        "species": F.ClassLabel(num_classes=2),
        "file_name": F.Text(),
        "segmentation_mask": F.Image(shape=(None, None, 1)),
        "head_bbox": F.BBoxFeature(),
    }


STRUCTURES = {
    "imagenet2012": (imagenet_features, "5.1.0", None),
    "coco/2014": (coco_features, "1.1.0", "2014"),
    "coco/2017": (coco_features, "1.1.0", "2017"),
    "voc/2012": (voc_features, "5.0.0", "2012"),
}
WITH_MASKS = {
    "cityscapes/semantic_segmentation": (streets_features, "1.0.0", "semantic_segmentation"),
    "oxford_iiit_pet": (pet_features, "4.0.0", None),
}


def make_builder(name, data_dir):
    """A builder with the structure of the data set `name`, and five examples a split."""
    features, version, config = (STRUCTURES | WITH_MASKS)[name]
    title = name.split("/")[0]

    def info(self):
        return self.dataset_info_from_configs(features=F.FeaturesDict(features()))

    def generate(self, _):
        return {
            split: ((i, example(title, i)) for i in range(5)) for split in ("train", "validation")
        }

    members = dict(
        VERSION=tfds.core.Version(version),
        name=title,
        _info=info,
        _split_generators=generate,
        _generate_examples=lambda self: None,
        pkg_dir_path=tfds.core.Path(data_dir),
        __module__=__name__,
    )
    if config:
        members["BUILDER_CONFIGS"] = [tfds.core.BuilderConfig(name=config, version=version)]
    with tfds.core.registered.skip_registration():
        kind = type(title.capitalize(), (tfds.core.GeneratorBasedBuilder,), members)
    return kind(data_dir=data_dir, config=config, file_format="array_record")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tfds"))
    for name in (*STRUCTURES, *WITH_MASKS):
        make_builder(name, path).download_and_prepare(file_format="array_record")
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*STRUCTURES, *WITH_MASKS])
def test_the_structure_is_that_of_the_real_builder(name, tmp_path):
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("the real builders need TensorFlow")
    real = tfds.builder(name, data_dir=str(tmp_path)).info.features
    ours = make_builder(name, str(tmp_path)).info.features

    def shape_of(feature):
        if isinstance(feature, F.FeaturesDict):
            return {key: shape_of(value) for key, value in feature.items()}
        if isinstance(feature, F.Sequence):
            return [shape_of(feature.feature)]
        classes = getattr(feature, "num_classes", None)
        return type(feature).__name__, feature.shape, np.dtype(feature.np_dtype), classes

    assert shape_of(real) == shape_of(ours)


@pytest.mark.parametrize("name, classes", list(zip(STRUCTURES, (1000, 80, 80, 20), strict=True)))
def test_prepared_tfds_data(prepared, name, classes):
    source = open_source(ConfigDict(dict(name=name, path=prepared)), "validation")
    assert (source.length, len(source.classes)) == (5, classes)
    seen = {}
    for batch in pipeline.evaluation_batches(source, BatchSpec(3, (16, 16))):
        assert np.all(np.diff(batch["valid"].astype(int)) <= 0)  # valid rows come first
        for row in np.flatnonzero(batch["valid"]):
            seen[round(batch["image"][row].mean() / 40)] = int(batch["label"][row])
    labels = [200 * i for i in range(5)]
    if name != "imagenet2012":
        labels = EXPECTED[name.split("/")[0]]
    assert seen == {i: label for i, label in enumerate(labels) if label is not None}
    rows = next(pipeline.batches(source, BatchSpec(5, (16, 16)), seed=0, stop=1))
    assert rows["valid"].sum() == len(seen)


@pytest.mark.parametrize("name", STRUCTURES)
def test_unprepared_data_names_the_whole_command(name, tmp_path):
    with pytest.raises(IcmError) as raised:
        open_source(ConfigDict(dict(name=name, path=str(tmp_path))), "train")
    command = (
        f"tfds.builder({name!r}, data_dir={str(tmp_path)!r})"
        ".download_and_prepare(file_format='array_record')"
    )
    assert command in str(raised.value) and "TensorFlow" in str(raised.value)
    assert ("ILSVRC2012_img_val.tar" in str(raised.value)) == (name == "imagenet2012")


def test_a_split_that_does_not_exist(prepared):
    with pytest.raises(IcmError, match="no split 'test'; choose one of train, validation"):
        open_source(ConfigDict(dict(name="voc/2012", path=prepared)), "test")


@pytest.mark.parametrize("name", ["coco/2014", "voc/2012"])
def test_tfds_boxes(prepared, name):
    source = open_source(ConfigDict(dict(name=name, path=prepared)), "validation")
    found = [source.load(i)["objects"] for i in range(5)]  # TFDS shuffles when it writes
    found = {tuple(objects.labels.tolist()): objects for objects in found}
    assert set(found) == {(3, 7, 9), (), (11,), (5, 6), (5,)}
    np.testing.assert_allclose(found[3, 7, 9].boxes[1], [0.1, 0.1, 0.6, 0.6], rtol=1e-6)
    assert not found[3, 7, 9].ignored.any() and found[()].boxes.shape == (0, 4)
    assert found[5, 6].ignored.tolist() == [name == "coco/2014", False]


def test_cityscapes_of_tfds(prepared):
    config = ConfigDict(dict(name="cityscapes/semantic_segmentation", path=prepared))
    source = open_source(config, "validation")
    assert (source.length, source.mask_classes[18]) == (5, "bicycle")
    (batch,) = pipeline.in_order(source, BatchSpec(5, (8, 16)))
    rows = zip(batch["image"], batch["mask"], strict=True)
    found = {row.mean().round(): np.unique(mask).tolist() for row, mask in rows}
    assert found == {0: [0], 40: [1], 80: [18], 120: [255], 160: [255]}


def test_masks_of_any_tfds_data_set(prepared):
    fields = dict(name="tfds_masks", path=prepared, builder="oxford_iiit_pet")
    fields |= dict(mask_classes=("pet", "background"), mask_ids=((1, 0), (2, 1), (3, 255)))
    source = open_source(ConfigDict(fields), "train")
    assert (source.length, source.mask_classes) == (5, ("pet", "background"))
    batch = next(pipeline.in_order(source, BatchSpec(2, (4, 12))))
    np.testing.assert_array_equal(batch["mask"][0, 0], np.repeat([0, 1, 255], 4))
    assert open_source(ConfigDict(fields | dict(train_split="validation")), "train").length == 5
    for changes, message in (
        (dict(builder=""), r"data\.builder is empty"),
        (dict(builder="ade20k"), "ade20k is not prepared as array_record"),
        (dict(validation_split="test"), "has no split 'test'; it has train, validation"),
        (dict(mask="trimap"), "data.mask is 'trimap'; oxford_iiit_pet has the images image, segm"),
        (dict(mask_classes=()), r"data\.mask_classes is empty, and oxford_iiit_pet does not name"),
        (dict(mask_ids=((1, 2),)), r"names the class 2; data\.mask_classes has 2"),
    ):
        with pytest.raises(IcmError, match=message):
            open_source(ConfigDict(fields | changes), "validation")
