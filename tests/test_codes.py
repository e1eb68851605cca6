"""Data sets as codes: what is written, by how many processes, after what, and read back."""

import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from small import UNOPTIMISED, small_codec

from icm_jax.codecs import model_file
from icm_jax.data import data_fields, label_keys, pipeline, shards
from icm_jax.data import open_source as open_coded
from icm_jax.data.images import read_image
from icm_jax.data.pipeline import BatchSpec
from icm_jax.engine import codes
from icm_jax.errors import IcmError

ROOT = pathlib.Path(__file__).parents[1]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """(a codec of three levels of quality, its file)."""
    path = tmp_path_factory.mktemp("codec") / "small.icmc"
    model_file.save(path, small_codec("mean_scale_hyperprior"))
    return small_codec("mean_scale_hyperprior"), path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Data fields of a folder with two classes and images of four sizes, one of them grey."""
    root = tmp_path_factory.mktemp("data")
    for number in range(12):
        shape = ((24, 32, 3), (40, 20, 3), (17, 33), (32, 32, 3))[number % 4]
        path = root / "train" / ("cat", "dog")[number // 6] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, shape).astype(np.uint8)).save(path)
    shutil.copytree(root / "train" / "cat", root / "val" / "cat")
    return dict(name="folder", path=str(root))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def coded(folder, data, codec, split="train", **options):
    return codes.write(data, split, folder, codec=codec[1], **options)


def read(folder, split="train"):
    return codes.open_source(dict(name="codes", path=str(folder)), split)


def test_a_folder_of_images_comes_back(tmp_path, codec, photographs):
    facts = coded(tmp_path, photographs, codec, quality=70, count=5)
    original, back = open_coded(photographs, "train"), read(tmp_path)
    assert (back.length, back.classes) == (12, ("cat", "dog"))
    size = pixels = 0
    for number in range(12):
        before, after = original.load(number), back.load(number)
        image = read_image(before["image"], "")
        assert after["image"] == codec[0].compress(image, 70)
        decoded = codec[0].decompress(after["image"])
        decoded = decoded if decoded.ndim == 3 else np.stack([decoded] * 3, -1)
        np.testing.assert_array_equal(back.read(after["image"], "", (0, 0)), decoded)
        assert after["label"] == before["label"] and before["name"].endswith("/" + after["name"])
        size, pixels = size + len(after["image"]), pixels + image.shape[0] * image.shape[1]
    about = json.loads((tmp_path / "codes.json").read_text())
    assert facts == about["splits"]["train"]
    assert facts == dict(
        images=12, shards=5, bytes=size, pixels=pixels, bits_per_pixel=8 * size / pixels
    )
    assert about["codec"] == codec[0].fingerprint.hex() and about["quality"] == 70
    assert len(list(tmp_path.glob("train-0000?-of-00005.array_record"))) == 5


def test_a_training_batch_is_made_of_codes(tmp_path, codec, photographs):
    coded(tmp_path, photographs, codec)
    fields = dict(name="codes", path=str(tmp_path), canvas=32)
    assert label_keys(data_fields(fields)) == ("label",)
    source, spec = codes.open_source(fields, "train"), BatchSpec(4, (32, 32))
    batch = next(pipeline.batches(source, spec, seed=0, stop=1))
    assert batch["image"].shape == (4, 32, 32, 3) and batch["valid"].all()
    (whole,) = pipeline.in_order(source, BatchSpec(12, (32, 32)))
    assert whole["label"].tolist() == [0] * 6 + [1] * 6
    np.testing.assert_array_equal(whole["image"][3], codec[0].decompress(source.load(3)["image"]))


def test_tfds_reads_the_folder_by_itself(tmp_path, codec, photographs):
    for split in ("validation", "train"):
        coded(tmp_path, photographs, codec, split)
    builder = tfds.builder_from_directory(str(tmp_path))
    assert {name: s.num_examples for name, s in builder.info.splits.items()} == dict(
        train=12, validation=6
    )
    example = builder.as_data_source("train")[11]
    assert codec[0].decompress(example["image"]).shape == (32, 32, 3)
    assert builder.info.features["label"].int2str(example["label"]) == "dog"
    assert example["name"] == b"train/dog/11.png"


def test_masks_and_boxes_come_back(tmp_path, codec):
    data = dict(name="scenes", path=str(tmp_path / "data"), size=32, train=6, validation=1)
    coded(tmp_path / "codes", data, codec)
    original, back = open_coded(data, "train"), read(tmp_path / "codes")
    assert (back.classes, back.mask_classes) == (original.classes, original.mask_classes)
    for number in range(6):
        before, after = original.load(number), back.load(number)
        assert (after["mask"], after["label"]) == (before["mask"], before["label"])
        for one, other in zip(before["objects"], after["objects"], strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
    batch = next(pipeline.in_order(back, BatchSpec(6, (32, 32))))
    assert set(batch) == {"image", "number", "valid", "label", "mask"}


def test_labels_that_are_none_and_outlines_come_back(tmp_path, codec):
    root = tmp_path / "coco"
    (root / "images").mkdir(parents=True)
    boxes = {1: [[1, 2, 30, 20], [4, 4, 8, 8], [3, 0, 9, 9]], 2: []}
    runs = dict(size=[32, 32], counts=[5, 20, 999])
    outlines = [[[1, 2, 31, 2, 31, 22]], runs, None]
    for name in boxes:
        Image.new("RGB", (32, 32)).save(root / f"images/{name}.png")
    images = [dict(id=n, file_name=f"{n}.png", width=32, height=32) for n in boxes]
    objects = [dict(image_id=n, category_id=5, bbox=b) for n, own in boxes.items() for b in own]
    for annotation, segmentation in zip(objects, outlines, strict=True):
        annotation["segmentation"] = segmentation
    content = dict(images=images, annotations=objects, categories=[dict(id=5, name="five")])
    (root / "train.json").write_text(json.dumps(content))
    config = dict(name="coco_json", path=str(root))
    coded(tmp_path / "codes", config, codec)
    first, second = map(read(tmp_path / "codes").load, range(2))
    assert (first["label"], second["label"]) == (0, None)
    np.testing.assert_allclose(first["objects"].boxes[0], [2 / 32, 1 / 32, 22 / 32, 31 / 32])
    given = open_coded(config, "train").load(0)["outlines"]()
    polygon, mask, none = first["outlines"]()
    np.testing.assert_array_equal(polygon.polygons, given[0].polygons)
    np.testing.assert_array_equal(mask.runs, given[1].runs)
    assert none is None and mask.size == (32, 32) and second["outlines"]() == ()
    assert second["objects"].boxes.shape == (0, 4) and second["name"] == "images/2.png"


def test_ids_of_masks_keep_their_meaning(tmp_path, codec):
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / "data" / kind).mkdir(parents=True)
        Image.new(mode, (32, 32), 7 if mode == "L" else "red").save(tmp_path / f"data/{kind}/a.png")
    (tmp_path / "data/classes.txt").write_text("road\ncar\n")
    (tmp_path / "data/train.txt").write_text("a\n")
    data = dict(name="mask_folder", path=str(tmp_path / "data"), mask_ids=((7, 1), (-1, 255)))
    coded(tmp_path / "codes", data, codec)
    coded(tmp_path / "codes", ml_collections.ConfigDict(data), codec)
    batch = next(pipeline.in_order(read(tmp_path / "codes"), BatchSpec(1, (32, 32))))
    assert (batch["mask"] == 1).all()


def in_processes(count, workdir, data, codec):
    """What the command prints that codes the data in so many processes, the first one's first."""
    fields = [f"--config.data.{name}={value}" for name, value in data.items()]
    fields += ["--mode=code", "--split=train", "--shards=5", f"--codec={codec[1]}"]
    config = ROOT / "configs" / "hyperprior.py"
    command = [sys.executable, "-m", "icm_jax.main", f"--config={config}", *fields]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    numbers = [
        [f"--coordinator={address}", f"--processes={count}", f"--process={n}"] for n in range(count)
    ]
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT), XLA_FLAGS=UNOPTIMISED)
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    workers = [
        subprocess.Popen([*command, f"--workdir={workdir}", *own], **options)
        for own in (numbers if count > 1 else [[]])
    ]
    printed = [worker.communicate(timeout=400)[0] for worker in workers]
    assert not any(worker.returncode for worker in workers), printed
    return printed


def test_bytes_do_not_depend_on_how_many_processes_code(tmp_path, codec, photographs):
    """Five shards, so shares are uneven."""
    found = {}
    for count in (1, 2, 4):
        printed = in_processes(count, tmp_path / str(count), photographs, codec)
        assert "images: 12, shards: 5" in printed[0] and "images" not in "".join(printed[1:])
        found[count] = contents(tmp_path / str(count) / "codes")
    assert found[1] == found[2] == found[4]
    assert sum(name.endswith(".array_record") for name in found[1]) == 5


def test_what_was_interrupted_goes_on(tmp_path, codec, photographs, monkeypatch):
    coded(tmp_path / "whole", photographs, codec, count=5)
    write_shard, written = shards.write_shard, []

    def interrupted(path, records):
        if len(written) == 2:
            raise KeyboardInterrupt
        write_shard(path, records)
        written.append(path)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            coded(tmp_path / "parts", photographs, codec, count=5)
    before = {path: path.stat().st_mtime_ns for path in written}
    with pytest.raises(IcmError, match=r"no whole codes of the split 'train' \(it has none yet\)"):
        read(tmp_path / "parts")
    coded(tmp_path / "parts", photographs, codec, count=5)
    assert {path: path.stat().st_mtime_ns for path in written} == before and len(before) == 2
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(quality=30), r"quality was 50\.0, is 30"),
        (dict(count=3), r"shards was 12, is 3"),
        (dict(path="elsewhere"), r"data\.path was"),
        (dict(other=True), "codec was"),
    ],
)
def test_codes_of_other_settings_are_refused(tmp_path, codec, photographs, change, message):
    coded(tmp_path / "codes", photographs, codec)
    before = contents(tmp_path / "codes")
    data, path, change = dict(photographs), codec[1], dict(change)
    if change.pop("path", None):
        data["path"] = str(shutil.copytree(data["path"], tmp_path / "elsewhere"))
    if change.pop("other", None):
        path = tmp_path / "other.icmc"
        model_file.save(path, small_codec("space_channel"))
    with pytest.raises(IcmError, match=message + ".*choose another --workdir"):
        codes.write(data, "train", tmp_path / "codes", codec=path, **change)
    assert contents(tmp_path / "codes") == before


def test_data_that_changed_are_refused(tmp_path, codec, photographs):
    root = shutil.copytree(photographs["path"], tmp_path / "data")
    data = dict(photographs, path=str(root))
    coded(tmp_path / "codes", data, codec)
    (root / "train/cat/00.png").unlink()
    with pytest.raises(IcmError, match="images was 12, is 11"):
        coded(tmp_path / "codes", data, codec)


def test_what_cannot_be_coded_is_named(tmp_path, codec, photographs):
    root = shutil.copytree(photographs["path"], tmp_path / "data")
    data = dict(photographs, path=str(root))
    broken = root / "train/dog/07.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IcmError, match=r"dog/07\.png.*repair or remove it"):
        coded(tmp_path / "codes", data, codec, count=4)
    assert len(list((tmp_path / "codes").glob("*.array_record"))) == 2  # those before it
    broken.write_bytes(whole)
    coded(tmp_path / "codes", data, codec, count=4)
    with pytest.raises(IcmError, match="12 examples of train do not fill 13 shards"):
        coded(tmp_path / "more", data, codec, count=13)
    with pytest.raises(IcmError, match="coded already"):
        coded(tmp_path / "more", dict(name="codes", path=str(tmp_path / "codes")), codec)
    with pytest.raises(IcmError, match=r"has no codes\.json"):
        read(root)


@pytest.mark.parametrize("damage", ["cut", "other model"])
def test_a_damaged_shard_is_named(tmp_path, codec, photographs, damage):
    coded(tmp_path, photographs, codec, count=3)
    path = tmp_path / "train-00001-of-00003.array_record"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
        message = "no whole record file"
    else:
        features = shards.features_of(("label",), ("cat", "dog"))
        stranger = small_codec("space_channel").compress(np.zeros((32, 32, 3), np.uint8))
        example = dict(image=stranger, label=0, name="x")
        shards.write_shard(path, [shards.record(features, example)] * 4)
        message = "x is of model"
    with pytest.raises(IcmError, match=rf"train-00001-of-00003.*{message}.*remove the file"):
        coded(tmp_path, photographs, codec, count=3)


@pytest.mark.parametrize(
    "name, content, mode, message",
    [
        ("codes.json", b"", "read", "codes.json: it is empty; put back a copy, or remove the file"),
        ("codes.json", b'{"codec": "', "code", "codes.json: it is not whole (Unterminated string"),
        ("codes.json", b"\xff\xff", "code", "codes.json: it is not text; put back a copy"),
        ("codes.json", b"[]", "read", "codes.json: it holds no JSON object; put back a copy"),
        ("codes.json", b"{}", "code", "codes.json is damaged: it lacks what a folder of codes has"),
        ("codec.icmc", b"PK", "read", "--mode=code with the same settings writes it anew"),
        ("dataset_info.json", b"", "read", "--mode=code with the same settings writes it anew"),
        ("features.json", None, "read", "--mode=code with the same settings writes it anew"),
        ("train-00001-of-00003.array_record", None, "read", "open() failed: No such file"),
        (
            "train-00001-of-00003.array_record",
            b"",
            "read",
            "no whole record file (ArrayRecord file",
        ),
        ("train-00001-of-00003.array_record", b"", "code", "remove the file, the same command"),
        ("codec.icmc", b"PK", "code", ""),
        ("dataset_info.json", b"", "code", ""),
        ("features.json", b"{}", "code", ""),
        ("train-00001-of-00003.array_record", None, "code", ""),
    ],
)
def test_a_damaged_folder_of_codes_says_so_or_is_mended(
    tmp_path, codec, photographs, whole_codes, name, content, mode, message
):
    folder = shutil.copytree(whole_codes, tmp_path / "codes")
    before = contents(folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)

    def use():
        if mode == "code":
            coded(folder, photographs, codec, count=3)
        source = read(folder)
        for number in range(source.length):
            source.load(number)

    if message:
        with pytest.raises(IcmError) as raised:
            use()
        (line,) = str(raised.value).splitlines()
        assert message in line and name in line
    else:
        use()
        assert contents(folder) == before


@pytest.fixture(scope="module")
def whole_codes(tmp_path_factory, codec, photographs):
    folder = tmp_path_factory.mktemp("codes")
    coded(folder, photographs, codec, count=3)
    return folder


def test_a_full_disk_leaves_no_half_shard(tmp_path, codec, photographs):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    coded(tmp_path, photographs, codec, count=2)
    path = tmp_path / "train-00001-of-00002.array_record"
    kept = path.read_bytes()
    path.unlink()
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(IcmError, match=r"cannot write .*train-00001.* File too large"):
            coded(tmp_path, photographs, codec, count=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    assert not path.exists() and not list(tmp_path.glob("*.tmp"))
    coded(tmp_path, photographs, codec, count=2)
    assert path.read_bytes() == kept
