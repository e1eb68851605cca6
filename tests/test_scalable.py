"""Scalable codecs: two layers in one file, the first enough for the detector."""

import functools
import io
import json
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from small import SCALABLE, images, initial, normal, small_codec

from icm_jax import cli
from icm_jax.codecs import CODECS, bitstream, codec, model_file, scalable_codec
from icm_jax.codecs.scalable import detector_of
from icm_jax.coding import archive, container
from icm_jax.errors import IcmError
from icm_jax.measure import detect
from icm_jax.nets.detector import Detector, Layer, Part, reach
from icm_jax.nets.yolo import yolov3, yolov3_tiny
from icm_jax.tasks import build_task
from icm_jax.tasks.detection import anchors, detections

DETECTOR: dict[str, Any] = dict(classes=["cat", "dog"], anchor_scale=0.1, overlap=0.5, limit=5)


@pytest.fixture(scope="module", params=["disentangled", "split", "residual"])
def frozen(request):
    return small_codec(request.param)


@pytest.fixture(scope="module")
def disentangled(tmp_path_factory):
    """(frozen codec, its file, an .icm file of a picture)."""
    own, folder = small_codec("disentangled"), tmp_path_factory.mktemp("scalable")
    model_file.save(folder / "codec.icmc", own, detector=DETECTOR)
    (folder / "whole.icm").write_bytes(own.compress(images(40, 70, 3)))
    return own, folder


def test_layers_decode_to_what_test_mode_gives(frozen):
    batch = images(2, 33, 64, 3)
    streams = bitstream.encode(frozen, batch)
    result = codec.forward(frozen.codec, frozen.on_device, {"image": batch}, (33, 64))
    shapes = {"image": (2, 33, 64, 3), "feature": (2, 8, 8, 8)}
    for output, shape in shapes.items():
        decoded = bitstream.decode(frozen, streams, output)
        assert decoded.shape == shape
        np.testing.assert_allclose(decoded, result.outputs[output], rtol=1e-3, atol=1e-2)
    first = [container.prefix(data, 1) for data in streams]
    np.testing.assert_array_equal(
        bitstream.decode(frozen, first, "feature", layers=1),
        bitstream.decode(frozen, streams, "feature"),
    )
    with pytest.raises(IcmError, match="the first 1 is whole"):
        bitstream.decode(frozen, first, "image")
    with pytest.raises(IcmError, match="later layer"):
        bitstream.decode(frozen, streams, "image", layers=1)


def test_bytes_of_each_layer_are_near_their_estimate(frozen):
    batch = images(2, 64, 96, 3)
    estimated = bitstream.estimate(frozen, batch)
    for row, data in enumerate(bitstream.encode(frozen, batch)):
        for number, layer in enumerate(container.unpack(data).layers):
            own = [s.name for s in frozen.codec.segments if s.layer == number]
            bits = sum(float(estimated[name][row]) for name in own)
            assert abs(sum(map(len, layer.strings)) - bits / 8) <= 0.01 * bits / 8 + 32


def test_damage_in_one_layer_leaves_the_other(disentangled):
    """An altered enhancement leaves the base; an altered base is an error, no wrong picture."""
    own, folder = disentangled
    whole = (folder / "whole.icm").read_bytes()
    border = len(container.prefix(whole, 1))
    expected = bitstream.decode(own, [whole], "feature")
    for at in range(border, len(whole), 7):
        altered = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
        with pytest.raises(IcmError):
            bitstream.decode(own, [altered], "image")
        given = bitstream.decode(own, [altered], "feature", layers=1)
        np.testing.assert_array_equal(given, expected)
    for at in range(0, border, 3):
        altered = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
        for output, layers in (("feature", 1), ("image", None)):
            with pytest.raises(IcmError):
                bitstream.decode(own, [altered], output, layers=layers)


def test_a_loaded_model_reads_the_same(disentangled):
    own, folder = disentangled
    loaded = model_file.load(folder / "codec.icmc", {"scalable": scalable_codec})
    whole = (folder / "whole.icm").read_bytes()
    np.testing.assert_array_equal(loaded.decompress(whole), own.decompress(whole))
    assert archive.describe(folder / "codec.icmc")["detector"] == DETECTOR


@pytest.mark.parametrize(
    "change", [dict(kind="sum"), dict(base=0), dict(hypers=3), dict(backbone="vgg")]
)
def test_codecs_that_cannot_be_are_refused(change):
    fields = dict(kind="split", width=4, base=2, enhancement=2, hypers=2)
    with pytest.raises(IcmError, match="no scalable codec"):
        scalable_codec(**(fields | change), detector=yolov3(2, 0.1, 0.1))


def pooled(halvings):
    """A detector cut where the feature is at 1/2^halvings, after a pooling."""
    half = Layer("maxpool", kernel=2, stride=2)
    table = (*(half,) * halvings, Layer("conv", 6, activation="linear", normalised=False))
    return Detector((*table, Layer("detect")), (((9, 9),),), (2**halvings,), halvings)


@pytest.mark.parametrize("kind", ["disentangled", "split", "residual"])
@pytest.mark.parametrize("halvings", [1, 2, 4])
def test_a_feature_may_have_any_scale(kind, halvings):
    """Latents keep theirs; images are padded to the latents' grid or to the detector's."""
    built = scalable_codec(kind, 4, 2, 3, 2, pooled(halvings))
    image = jax.ShapeDtypeStruct((2, 20, 40, 3), np.uint8)
    variables = jax.eval_shape(built.init, jax.random.key(0), image)
    given = jax.eval_shape(
        lambda v, x: codec.forward(built, v, {"image": x}, (20, 40)), variables, image
    )
    shape = (2, 32 >> halvings, 48 >> halvings, 3)
    assert given.outputs["feature"].shape == shape and given.outputs["image"].shape == image.shape
    for name, channels in (("y_b", 2), ("y_e", 3)):
        assert given.latents[name].shape == (2, 2, 3, channels)


@pytest.mark.parametrize("halvings", [0, 5])
def test_a_feature_too_fine_or_coarse_is_refused(halvings):
    table = Layer("conv", 3), *pooled(max(halvings, 1)).table[max(1 - halvings, 0) :]
    detector = Detector(table, (((9, 9),),), (2**halvings,), halvings + 1)
    with pytest.raises(IcmError, match=f"at 1/{2**halvings} of the image"):
        scalable_codec("split", 4, 2, 2, 2, detector)


@pytest.mark.parametrize("split, channels, stride", [(7, 128, 8), (9, 256, 16)])
@pytest.mark.parametrize("kind", ["disentangled", "split", "residual"])
def test_a_published_detector_is_cut_where_it_is_asked(kind, split, channels, stride):
    """After YOLOv3-tiny's layer 6 or 8; the base latents are at 1/16 for both."""
    built = scalable_codec(kind, 4, 3, 2, 2, yolov3_tiny(80, split))

    def coded(image):
        variables = built.init(jax.random.key(0), image)
        latents = built.analyse(variables, {"image": image})
        feature = built.outputs["feature"](variables, latents, (60, 90))
        tail = Part(yolov3_tiny(80, split), split)
        parts = {name: t["detector"] for name, t in variables.items() if "detector" in t}
        return latents["y_b"], feature, tail.apply(parts, feature, False)

    y, f, outputs = jax.eval_shape(coded, jax.ShapeDtypeStruct((1, 60, 90, 3), jnp.uint8))
    assert y.shape == (1, 4, 6, 3) and f.shape == (1, 64 // stride, 96 // stride, channels)
    assert [o.shape for o in outputs] == [(1, 2, 3, 3, 85), (1, 4, 6, 3, 85)]


def test_files_of_before_detectors_were_data_are_read(disentangled, tmp_path):
    """They named YOLOv3's factors. The fingerprint is over what they say, so streams fit."""
    own, _ = disentangled
    fields = dict(own.codec.config[1])
    fields = {key: fields[key] for key in ("kind", "width", "base", "enhancement", "hypers")}
    fields |= dict(classes=2, detector_width=1 / 32, detector_depth=0.1, backbone="balle2018")
    before = own.codec._replace(config=("scalable", tuple(fields.items())))
    old = bitstream.FrozenCodec(before, own.variables, own.tables)
    assert old.fingerprint != own.fingerprint
    model_file.save(tmp_path / "old.icmc", old, detector=DETECTOR)
    loaded = model_file.load(tmp_path / "old.icmc", CODECS)
    assert loaded.fingerprint == old.fingerprint
    picture = images(40, 70, 3)
    data = old.compress(picture)
    np.testing.assert_array_equal(loaded.decompress(data), own.decompress(own.compress(picture)))
    facts = archive.describe(tmp_path / "old.icmc")["detector"]
    found, expected = (detect.finder(c, facts, 0.05) for c in (loaded, own))
    assert found(data)["boxes"] == expected(own.compress(picture))["boxes"] != []


@pytest.mark.parametrize("size", [(70, 40), (270, 400)])
def test_detection_in_a_window_finds_what_the_feature_holds(disentangled, size):
    """No box from beyond the border, and those within as the detector's tail gives them."""
    own, _ = disentangled
    table = detector_of(own.codec)
    data = own.compress(images(*size, 3))
    feature = bitstream.decode(own, [data], "feature", layers=1)
    tail = Part(table, table.split)
    part = {name: tree["detector"] for name, tree in own.on_device.items() if "detector" in tree}
    outputs = jax.jit(lambda part, x: tail.apply(part, x, train=False))(part, feature)
    shapes = anchors(table, [raw.shape[1:3] for raw in outputs], DETECTOR["anchor_scale"])
    expected = detections(
        outputs, shapes, table.scales, DETECTOR["limit"], DETECTOR["overlap"], 0.0
    )
    found = detect.finder(own, DETECTOR, 0.0)(data)["boxes"]
    assert len(found) == expected.valid.sum() == DETECTOR["limit"]
    scores = [box["score"] for box in found]
    np.testing.assert_allclose(scores, expected.scores[0], atol=2e-4)
    top, left = (np.asarray(expected.boxes[0, :, n]) * 8 * feature.shape[1 + n] for n in (0, 1))
    places = np.array([box["bbox"][:2] for box in found])
    wanted = np.stack([left.clip(0, size[1]), top.clip(0, size[0])], axis=1)
    np.testing.assert_allclose(places, wanted, atol=0.02)


def test_how_far_a_detector_looks():
    """By its gradients, at a pooling, a shortcut, and what is doubled and joined."""
    conv = functools.partial(Layer, "conv", activation="linear", normalised=False)
    table = (
        conv(2, kernel=3),
        conv(2, kernel=3, stride=2),
        conv(2, kernel=3),
        Layer("shortcut", inputs=(1,)),
        Layer("maxpool", kernel=3, stride=2),
        conv(2, kernel=5),
        Layer("upsample", stride=2),
        Layer("route", inputs=(6, 3)),
        conv(6),
        Layer("detect"),
    )
    built = Detector(table, (((9, 9),),), (2,), 8)
    for end, far in ((1, 1), (2, 2), (4, 4), (5, 6), (6, 14), (7, 16), (8, 16)):
        part = Part(built, end=end)
        x = jnp.abs(normal(1, 64, 64, 3))
        variables = jax.tree.map(lambda a: jnp.abs(a) + 0.1, part.init(jax.random.key(0), x, False))
        stride = 64 // part.apply(variables, x, False).shape[1]
        at = 32 // stride

        def middle(x, part=part, variables=variables, at=at):
            return part.apply(variables, x, False)[0, at, at].sum()

        rows = np.flatnonzero(np.abs(jax.grad(middle)(x)).sum(axis=(0, 2, 3)))
        seen = max(32 - rows.min(), rows.max() - 32 - stride + 1)
        assert reach(table, end) == far and far - 2 * stride < seen <= far


def run_detect(capsys, *arguments):
    code = cli.main(["detect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_detection_reads_the_first_layer_alone(disentangled, tmp_path, capsys, monkeypatch):
    _, folder = disentangled
    whole = (folder / "whole.icm").read_bytes()
    (tmp_path / "cut.icm").write_bytes(container.prefix(whole, 1))
    options = "-m", folder / "codec.icmc", "--least", 0.05
    files = folder / "whole.icm", tmp_path / "cut.icm"
    code, found, errors = run_detect(
        capsys, *files, *options, "--draw", tmp_path / "out", "--coco", tmp_path / "boxes.json"
    )
    assert (code, errors) == (0, "")
    assert found[0]["boxes"] and found[0]["boxes"] == found[1]["boxes"]
    for box in found[0]["boxes"]:
        assert box["name"] == DETECTOR["classes"][box["class"]] and 0.05 <= box["score"] <= 1
        left, top, width, height = box["bbox"]
        assert 0 <= left <= left + width <= 70.02 and 0 <= top <= top + height <= 40.02
    rows = json.loads((tmp_path / "boxes.json").read_text())
    assert [row["image_id"] for row in rows] == ["whole"] * (len(rows) // 2) + ["cut"] * (
        len(rows) // 2
    )
    for name, grey in (("whole", False), ("cut", True)):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            pixels = np.asarray(picture)
        assert pixels.shape == (40, 70, 3)
        assert ((pixels == 128).all(-1).mean() > 0.1) == grey
    pipe = io.BytesIO(whole)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=pipe))
    _, piped, _ = run_detect(capsys, "-", *options)
    assert piped[0]["boxes"] == found[0]["boxes"]
    assert pipe.tell() == len(container.prefix(whole, 1))  # the rest may still be on its way
    (tmp_path / "bad.icm").write_bytes(whole[:20])
    code, found, errors = run_detect(capsys, tmp_path / "bad.icm", files[0], *options)
    assert code == 1 and len(found) == 1 and "bad.icm" in errors
    (tmp_path / "half.icm").write_bytes(whole[:-9])  # a damaged picture is not drawn as grey
    code, _, errors = run_detect(capsys, tmp_path / "half.icm", *options, "--draw", tmp_path / "no")
    assert code == 1 and "layer 2 of 2 is truncated" in errors
    code, found, errors = run_detect(capsys, files[0])
    assert code == 2 and "has no detector; train one" in errors


def test_ordinary_pictures_are_for_the_whole_detector(disentangled, tmp_path, capsys):
    own, folder = disentangled
    picture = images(1, 40, 70, 3)[0]
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    code, (found,), errors = run_detect(
        capsys, path, "-m", folder / "codec.icmc", "--least", 0.0, "--draw", tmp_path / "out"
    )
    assert (code, errors, found["width"], found["height"]) == (0, "", 70, 40)
    given = detector_of(own.codec)
    padded = np.pad(picture, ((0, 24), (0, 26), (0, 0)), mode="edge")[None] / np.float32(255)
    trees = {name: tree["detector"] for name, tree in own.variables.items() if "detector" in tree}
    outputs = Part(given).apply(trees, jnp.float32(padded), False)
    shapes = anchors(given, [raw.shape[1:3] for raw in outputs], 0.1)
    expected = detections(outputs, shapes, given.scales, 5, 0.5, 0.0)
    scores = [box["score"] for box in found["boxes"]]
    np.testing.assert_allclose(scores, np.asarray(expected.scores)[0, : len(scores)], atol=1e-4)
    top, left, bottom, right = np.clip(
        np.asarray(expected.boxes)[0, 0] * [64, 96, 64, 96], 0, [40, 70, 40, 70]
    )
    box = [left, top, right - left, bottom - top]
    np.testing.assert_allclose(found["boxes"][0]["bbox"], box, atol=0.02)
    with Image.open(tmp_path / "out" / "picture.png") as drawing:
        assert drawing.size == (70, 40)
    code, found, errors = run_detect(capsys, folder / "codec.icmc", "-m", folder / "codec.icmc")
    assert (code, found) == (1, []) and "cannot read the image" in errors


def test_a_file_without_its_enhancement_gives_no_picture(disentangled, tmp_path, capsys):
    _, folder = disentangled
    path = tmp_path / "cut.icm"
    path.write_bytes(container.prefix((folder / "whole.icm").read_bytes(), 1))
    code = cli.main(["decompress", str(path), "-m", str(folder / "codec.icmc")])
    errors = capsys.readouterr().err
    assert code == 1 and "layer 2 of 2 is truncated" in errors
    assert list(tmp_path.iterdir()) == [path]


def test_training_moves_the_codec_and_not_the_detector():
    config = dict(
        name="scalable_compression",
        codec=dict(name="scalable", kind="disentangled", width=6, base=5, enhancement=4, hypers=2),
        classes=2,
        detector=dict(name="yolov3", width=1 / 32, depth=0.1),
        lambdas=(0.01,),
        feature_weight=100.0,
        output_weight=7.0,
        size=32,
        straight_through=False,
    )
    task = build_task(ConfigDict(config))
    batch = {"image": images(2, 40, 40, 3)}
    variables = initial(SCALABLE["disentangled"](), batch["image"])
    params = variables["params"]
    assert {name: task.groups(name) for name in params} == {
        "scalable": "train",
        "detector": "frozen",
    }

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(own):
        given = dict(variables, params=dict(params, scalable=own), constants=dict(task.constants))
        return task.loss(given, batch, jax.random.key(0), jnp.int32(0))

    (total, aux), gradients = loss(params["scalable"])
    m = aux.metrics
    distortion = m["mse"] + 100 * m["distortion_f"] + 7 * m["divergence"]
    expected = m["bpp_base"] + m["bpp_enhancement"] + 0.01 * distortion
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    silent = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if not np.abs(leaf).any()
    ]
    assert not silent
