"""Detectors: the published table, the cut, tables that cannot be, Darknet's weight files."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from icm_jax.errors import IcmError
from icm_jax.nets import detector, resnet, yolo
from icm_jax.nets.detector import Detector, Layer, Part
from icm_jax.tasks.detection import anchors, detections
from icm_jax.weights import READERS, darknet, start_from

SMALL = yolo.yolov3(3, width=1 / 16, depth=0.25)
FULL = yolo.yolov3(80)


def initial(given):
    image = jnp.asarray(np.random.default_rng(0).random((2, 64, 96, 3)), jnp.float32)
    whole = Part(given)
    variables = jax.jit(whole.init, static_argnums=2)(jax.random.key(0), image, False)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.uniform(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)
    ]
    return image, whole, jax.tree.unflatten(tree, moved)


def shapes(given):
    """Of all variables."""
    part, image = Part(given), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(lambda x: part.init(jax.random.key(0), x, False), image)


def test_layers_are_numbered_as_in_the_public_configuration():
    table = FULL.table
    assert len(table) == 107 and (FULL.split, FULL.feature) == (13, (256, 8))
    assert (FULL.classes, FULL.grid, FULL.strides) == (80, 32, (32, 16, 8))
    at = lambda kind: [i for i, layer in enumerate(table) if layer.kind == kind]  # noqa: E731
    linear = [i for i, layer in enumerate(table) if not layer.normalised]
    assert linear == [81, 93, 105] and at("detect") == [82, 94, 106]
    assert at("upsample") == [85, 97]
    routes = {i: table[i].inputs for i in at("route")}
    assert routes == {83: (79,), 86: (85, 61), 95: (91,), 98: (97, 36)}
    shortcuts = at("shortcut")
    assert len(shortcuts) == 23 and all(table[i].inputs == (i - 3,) for i in shortcuts)
    assert table[12][:4] == ("conv", 256, 3, 2) and table[81].features == 255
    part = Part(FULL)
    image = jax.ShapeDtypeStruct((1, 416, 416, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: part.init(jax.random.key(0), x, False), image)
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    assert weights == 62_001_757  # of yolov3.weights: 248,007,048 bytes with a header of 20
    outputs = jax.eval_shape(lambda v, x: part.apply(v, x, False), variables, image)
    assert [o.shape for o in outputs] == [(1, s, s, 3, 85) for s in (13, 26, 52)]


def test_both_parts_make_the_whole():
    image, whole, variables = initial(SMALL)
    split = SMALL.split
    expected = whole.apply(variables, image, False)
    f = Part(SMALL, end=split).apply(variables, image, False)
    assert f.shape == (2, 8, 12, 16)
    tail = Part(SMALL, split)
    for one, other in zip(tail.apply(variables, f, False), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    # The same from before the last BatchNorm of the front.
    before = Part(SMALL, end=split - 1).apply(variables, image, False)
    last = SMALL.table[split - 1]
    kernel = {"params": variables["params"][f"layer{split - 1}"]}
    plain = resnet.Conv(last.features, last.kernel, last.stride).apply(kernel, before)
    for one, other in zip(tail.apply(variables, plain, False, raw=True), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "split, message",
    [
        (0, "1 to 106"),
        (107, "1 to 106"),
        (14, "layer 15 .shortcut. also needs .* layer 12"),
        (41, "layer 98 .route. also needs the output of layer 36"),
        (84, "needs the output of layer 61"),
    ],
)
def test_a_cut_that_loses_something_is_refused(split, message):
    with pytest.raises(IcmError, match=message):
        Detector(FULL.table, FULL.anchors, FULL.strides, split)
    for split in (13, 37):
        detector.check_split(FULL.table, split)


def test_a_table_needs_classes():
    with pytest.raises(IcmError, match="at least one class"):
        yolo.yolov3(0)
    for config, message in (
        (dict(name="yolov9"), "unknown detector .*choose one of yolov3"),
        (dict(name="yolov3", size=3), "unexpected keyword argument 'size'"),
    ):
        with pytest.raises(IcmError, match=message):
            yolo.build_detector(config, 2)


PLAIN = (
    Layer("conv", 4, 3),
    Layer("maxpool", kernel=2, stride=2),
    Layer("conv", 4, 3, 2),
    Layer("conv", 14, activation="linear", normalised=False),
    Layer("detect"),
    Layer("route", inputs=(2,)),
    Layer("upsample", stride=2),
    Layer("route", inputs=(6, 1)),
    Layer("conv", 21, activation="linear", normalised=False),
    Layer("detect"),
)
"""Two outputs of two classes: two anchors at 1/4, three at 1/2."""
ANCHORS = ((8, 8), (4, 8)), ((1, 1), (2, 1), (1, 2))


def made(table=PLAIN, anchors=ANCHORS, strides=(4, 2), split=1):
    return Detector(table, anchors, strides, split)


def changed(number, **fields):
    return made((*PLAIN[:number], PLAIN[number]._replace(**fields), *PLAIN[number + 1 :]))


def test_a_detector_is_data():
    assert (made().classes, made().grid, made().feature) == (2, 4, (4, 1))
    for given in (made(), FULL):
        again = Detector(*json.loads(json.dumps(given)))
        assert again == given and hash(again) == hash(given)
        assert again.table[0].kind == "conv"
    outputs = jax.eval_shape(
        lambda x: Part(made()).init_with_output(jax.random.key(0), x, False)[0],
        jax.ShapeDtypeStruct((1, 8, 12, 3), jnp.float32),
    )
    assert [o.shape for o in outputs] == [(1, 2, 3, 2, 7), (1, 4, 6, 3, 7)]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: changed(1, kind="avgpool"), r"layer 1 \(avgpool\) .* unknown kind; .*maxpool"),
        (lambda: changed(0, features=0), "layer 0 .conv. .* has 0 features"),
        (lambda: changed(0, activation="swish"), "activation 'swish'"),
        (lambda: changed(2, stride=3), "stride 3 and"),
        (lambda: changed(1, stride=0), "stride 0; both are 1 to 16"),
        (lambda: changed(5, inputs=(5,)), r"layer 5 \(route\) .* takes layers \(5,\); only"),
        (lambda: changed(7, inputs=(5, 1)), "of the same stride"),
        (lambda: changed(7, kind="shortcut"), "one layer of the same shape"),
        (lambda: changed(6, stride=3), "makes 3 rows of one where only 4 are"),
        (lambda: made(PLAIN[:4]), "has 0 outputs"),
        (lambda: made(PLAIN[:5]), "has 1 outputs, with anchors for 2 and strides for 2"),
        (lambda: made(anchors=ANCHORS[:1]), "has 2 outputs, with anchors for 1"),
        (lambda: made(strides=(4,)), "strides for 1"),
        (lambda: made(strides=(4, 4)), r"are \(4, 2\), not \(4, 4\)"),
        (lambda: made(anchors=(ANCHORS[1], ANCHORS[1])), "14 channels are no output for 3 anchors"),
        (lambda: made(anchors=(ANCHORS[0], ((1, 1),))), r"for \[2, 16\] classes; all need one"),
        (lambda: made(anchors=(ANCHORS[0], ((1, 0),) * 3)), "above 0"),
        (lambda: made(split=3), "layer 7 .route. also needs the output of layer 1"),
    ],
)
def test_a_table_that_cannot_be_is_refused(make, message):
    with pytest.raises(IcmError, match=message):
        make()


@pytest.mark.parametrize("kernel, stride", [(2, 2), (2, 1), (3, 1), (5, 1), (3, 2), (13, 1)])
def test_max_pooling_is_darknet_s(kernel, stride):
    """Against its forward_maxpool_layer in plain loops; all is negative: padding must not win."""
    x = -np.random.default_rng(0).random((2, 6, 9, 3)).astype(np.float32) - 1
    table = Layer("maxpool", kernel=kernel, stride=stride), *PLAIN[3:5]
    given = Part(made(table, ANCHORS[:1], (stride,)), end=1).apply({}, x, False)
    padding, (height, width) = kernel - 1, x.shape[1:3]
    rows, columns = ((side + padding - kernel) // stride + 1 for side in (height, width))
    assert given.shape == (2, rows, columns, 3)
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride - padding // 2, j * stride - padding // 2
            window = x[:, max(top, 0) : top + kernel, max(left, 0) : left + kernel]
            np.testing.assert_array_equal(given[:, i, j], window.max((1, 2)))


def numbered(count):
    """float32 [count], all different."""
    return (np.arange(count, dtype=np.uint32) + 0x3F800000).view(np.float32)


def test_a_file_of_the_full_size(tmp_path):
    values = numbered(62_001_757)
    header = np.array([0, 2, 0, 32013312, 0], "<i4").tobytes()
    path = tmp_path / "yolov3.weights"
    path.write_bytes(header + values.tobytes())
    assert path.stat().st_size == 248_007_048
    variables = darknet.read(path, shapes(FULL))
    params, stats = variables["params"], variables["batch_stats"]
    # By hand, as the format says: bias, scale, mean, variance, kernel [out, in, row, column].
    np.testing.assert_array_equal(params["norm0"]["bias"], values[:32])
    np.testing.assert_array_equal(params["norm0"]["scale"], values[32:64])
    np.testing.assert_array_equal(stats["norm0"]["mean"], values[64:96])
    np.testing.assert_array_equal(stats["norm0"]["var"], values[96:128])
    assert params["layer0"]["kernel"][2, 1, 0, 5] == values[128 + ((5 * 3 + 0) * 3 + 2) * 3 + 1]
    second = 128 + 864
    np.testing.assert_array_equal(params["norm1"]["bias"], values[second : second + 64])
    last = len(values) - 256 * 255
    np.testing.assert_array_equal(params["layer105"]["bias"], values[last - 255 : last])
    np.testing.assert_array_equal(
        params["layer105"]["kernel"][0, 0], values[last:].reshape(255, 256).T
    )
    again = tmp_path / "again.weights"
    darknet.write(again, variables, seen=32013312)
    assert again.read_bytes() == path.read_bytes()
    for file in (path, again):  # half a gigabyte
        file.unlink()


def test_files_that_do_not_fit_are_refused(tmp_path):
    _, _, variables = initial(SMALL)
    path = tmp_path / "small.weights"
    darknet.write(path, variables)
    data = path.read_bytes()
    back = darknet.read(path, variables)
    assert jax.tree.structure(back) == jax.tree.structure(jax.tree.map(np.asarray, dict(variables)))
    jax.tree.map(np.testing.assert_array_equal, back, dict(variables))
    for altered, message in (
        (data[:-4], "is truncated"),
        (data + bytes(4), "longer"),
        (data[:7], "no version number"),
        (b"\x89PNG\r\n\x1a\n" + data, "no version number"),
    ):
        path.write_bytes(altered)
        with pytest.raises(IcmError, match=message):
            darknet.read(path, variables)
    path.write_bytes(data)
    with pytest.raises(IcmError, match="number of classes"):
        darknet.read(path, shapes(yolo.yolov3(4, width=1 / 16, depth=0.25)))
    with pytest.raises(IcmError, match=r"cannot read the weights .*absent"):
        darknet.read(tmp_path / "absent", variables)


def test_readers_give_what_a_task_has(tmp_path, monkeypatch, capsys):
    _, _, variables = initial(SMALL)
    path = tmp_path / "small.weights"
    darknet.write(path, variables)
    task = {name: {"detector": jax.tree.map(jnp.zeros_like, t)} for name, t in variables.items()}
    task["constants"] = {"lambda": jnp.float32(3)}
    given = start_from(task, "darknet", path)
    assert given["constants"] == task["constants"]
    for name in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, given[name]["detector"], variables[name])
    assert capsys.readouterr().err == ""
    data = path.read_bytes()
    path.write_bytes(data[: 20 + 4 * (4 * 2 + 3 * 2 * 9)])  # the first layer alone, 2 channels
    given = start_from(task, "darknet", path)
    np.testing.assert_array_equal(
        given["params"]["detector"]["layer0"]["kernel"], variables["params"]["layer0"]["kernel"]
    )
    assert "lacks batch_stats/detector/norm1/mean and " in capsys.readouterr().err
    path.write_bytes(data)
    with pytest.raises(IcmError, match="are those of detectors; this task has head"):
        start_from({"params": {"head": {"kernel": jnp.zeros(2)}}}, "darknet", path)
    with pytest.raises(IcmError, match="no reader of weights 'onnx'; choose one of darknet"):
        start_from(task, "onnx", path)
    monkeypatch.setitem(READERS, "odd", lambda path, shapes: {"params": {"tail": np.zeros(1)}})
    with pytest.raises(IcmError, match="has weights params/tail, which this task's networks"):
        start_from(task, "odd", path)


def test_a_backbone_alone_is_read(tmp_path):
    """darknet53.conv.74: what detectors start from; its header may be the old, shorter one."""
    count = 40_620_640  # weights of Darknet-53 without its classifier
    values = numbered(count)
    path = tmp_path / "darknet53.conv.74"
    path.write_bytes(np.array([0, 1, 0, 7], "<i4").tobytes() + values.tobytes())
    params = darknet.read(path, shapes(FULL))["params"]
    assert "layer73" in params and "layer75" not in params
    np.testing.assert_array_equal(
        params["layer73"]["kernel"].transpose(3, 2, 0, 1).ravel()[-5:], values[-5:]
    )


TINY = yolo.yolov3_tiny(80)
DATA = pathlib.Path(__file__).resolve().parents[2] / "shared/data"


@pytest.mark.skipif(not (DATA / "darknet/yolov3-tiny.weights").is_file(), reason="not there")
def test_published_weights_find_what_is_in_a_photograph():
    variables = darknet.read(DATA / "darknet/yolov3-tiny.weights", shapes(TINY))
    with Image.open(DATA / "detect/images/000000002006.jpg") as file:  # a bus, two people
        image = ImageOps.pad(file.convert("RGB"), (416, 416), color=(127, 127, 127))
    outputs = jax.jit(Part(TINY).apply, static_argnums=2)(
        variables, np.asarray(image, np.float32)[None] / 255, False
    )
    sizes = anchors(TINY, [raw.shape[1:3] for raw in outputs], 1.0)
    found = detections(outputs, sizes, TINY.scales, 20, 0.45, 0.4)
    names = (DATA / "darknet/coco.names").read_text().splitlines()
    labels = np.asarray(found.labels)[found.valid]
    assert {names[label] for label in labels} == {"person", "bus"}
    (bus,) = np.asarray(found.boxes)[found.valid][labels == names.index("bus")]
    np.testing.assert_allclose(bus, [0.18, 0.0, 0.73, 0.9], atol=0.1)  # looked up in the picture
