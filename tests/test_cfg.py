"""Darknet's .cfg files: published networks, a forward pass in NumPy, and files that cannot be."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from icm_jax import cli
from icm_jax.data import open_source, pipeline
from icm_jax.errors import IcmError
from icm_jax.measure import average_precision, detect
from icm_jax.nets import cfg, yolo
from icm_jax.nets.detector import Part
from icm_jax.tasks import boxes
from icm_jax.tasks.boxes import Detections
from icm_jax.tasks.detection import anchors, detections
from icm_jax.weights import darknet

NET = "[net]\n# a comment\nbatch=64\nwidth=416\nheight=416\nchannels=3\nsaturation = 1.5\n"
BIG = "10,13,  16,30,  33,23,  30,61,  62,45,  59,119,  116,90,  156,198,  373,326"
TINY = "10,14,  23,27,  37,58,  81,82,  135,169,  344,319"


def conv(filters, size=1, stride=1, activation="leaky", normalised=1):
    norm = "batch_normalize=1\n" * normalised
    return (
        f"\n[convolutional]\n{norm}filters={filters}\nsize={size}\nstride={stride}\npad=1\n"
        f"activation={activation}\n"
    )


def layer(name, **options):
    return f"\n[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in options.items())


def head(mask, anchors, classes=80, **more):
    count = len(anchors.split(",")) // 2
    options = dict(mask=mask, anchors=anchors, classes=classes, num=count, jitter=0.3, **more)
    linear = conv(len(mask.split(",")) * (5 + classes), 1, 1, "linear", 0)
    return linear + layer("yolo", **options)


def backbone():
    text = NET + conv(32, 3)
    for filters, blocks in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        text += conv(filters, 3, 2)
        for _ in range(blocks):
            text += conv(filters // 2) + conv(filters, 3)
            text += layer("shortcut", **{"from": -3}, activation="linear")
    return text


def pyramid(text, first):
    for filters, mask, early in ((512, "6,7,8", 0), (256, "3,4,5", 61), (128, "0,1,2", 36)):
        if early:
            text += layer("route", layers=-4) + conv(filters) + layer("upsample", stride=2)
            text += layer("route", layers=f"-1, {early}") + conv(filters) + conv(2 * filters, 3)
        else:
            text += first
        text += 2 * (conv(filters) + conv(2 * filters, 3)) + head(mask, BIG)
    return text


def yolov3():
    return pyramid(backbone(), conv(512) + conv(1024, 3))


def yolov3_spp():
    pooled = "".join(
        layer("maxpool", stride=1, size=size) + layer("route", layers=back)
        for size, back in ((5, "-2"), (9, "-4"), (13, "-1,-3,-5,-6"))
    )
    text = backbone() + conv(512) + conv(1024, 3) + conv(512) + pooled
    return pyramid(text, "")  # two pairs of convolutions follow, not three


def yolov3_tiny(mask="0,1,2"):
    text, pool = NET + conv(16, 3), layer("maxpool", size=2, stride=2)
    for filters in (32, 64, 128, 256, 512):
        text += pool + conv(filters, 3)
    text += layer("maxpool", size=2, stride=1) + conv(1024, 3) + conv(256) + conv(512, 3)
    text += head("3,4,5", TINY) + layer("route", layers=-4) + conv(128)
    text += layer("upsample", stride=2) + layer("route", layers="-1, 8") + conv(256, 3)
    return text + head(mask, TINY)


def yolov4_tiny():
    text = NET + conv(32, 3, 2) + conv(64, 3, 2)
    for filters in (64, 128, 256):
        text += conv(filters, 3) + layer("route", layers=-1, groups=2, group_id=1)
        text += 2 * conv(filters // 2, 3) + layer("route", layers="-1,-2") + conv(filters)
        text += layer("route", layers="-6,-1") + layer("maxpool", size=2, stride=2)
    more = dict(scale_x_y=1.05, iou_loss="ciou", nms_kind="greedynms", beta_nms=0.6)
    text += conv(512, 3) + conv(256) + conv(512, 3) + head("3,4,5", TINY, **more)
    text += layer("route", layers=-4) + conv(128) + layer("upsample", stride=2)
    text += layer("route", layers="-1, 23") + conv(256, 3)
    return text + head("1,2,3", TINY, **more)


def drawn(detector, side=64):
    part, image = Part(detector), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: part.init(jax.random.key(0), x, False), image)
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(shapes)
    values = [rng.uniform(0.1, 1, leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, values)


def test_published_networks_are_those_that_are_built_in():
    assert cfg.parse(yolov3(), "yolov3.cfg") == (yolo.yolov3(80), (416, 416))
    found = cfg.parse(yolov3_tiny(), "yolov3-tiny.cfg").detector
    built = yolo.yolov3_tiny(80)
    # The file's masks are not those that the published weights were trained with.
    assert found.table == built.table and found.masks == ((3, 4, 5), (0, 1, 2))
    assert cfg.parse(yolov3_tiny("1,2,3"), "yolov3-tiny.cfg").detector == built
    assert "81 × 82 (mask 1,2,3)" in str(built) and "37 × 58 (mask 0,1,2)" in str(found)


@pytest.mark.parametrize(
    "text, layers, size, cut",
    [
        (yolov3, 107, 248_007_048, (13, 256, 8)),
        (yolov3_spp, 114, 252_209_544, (13, 256, 8)),
        (yolov3_tiny, 24, 35_434_956, (7, 128, 8)),
        (yolov4_tiny, 38, 24_251_276, (11, 128, 8)),
    ],
)
def test_weights_have_the_size_of_the_published_files(text, layers, size, cut):
    found = cfg.parse(text(), "x.cfg").detector
    part, image = Part(found), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: part.init(jax.random.key(0), x, False), image)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert (len(found.table), 20 + 4 * count) == (layers, size)
    assert (found.split, *found.feature) == cut


def test_a_network_may_be_cut_elsewhere():
    for split, feature in ((7, (128, 8)), (9, (256, 16))):
        assert yolo.yolov3_tiny(80, split).feature == feature
        assert cfg.parse(yolov3_tiny(), "x", split).detector.feature == feature
    with pytest.raises(IcmError, match=r"also needs the output of layer 8"):
        yolo.yolov3_tiny(80, 10)


SMALL = (
    NET
    + conv(6, 3)
    + layer("maxpool", size=2, stride=2)
    + conv(8, 3, 1, "mish")
    + layer("route", layers=-1, groups=2, group_id=1)
    + conv(4)
    + layer("shortcut", **{"from": 3}, activation="linear")
    + layer("maxpool", size=3, stride=1)
    + layer("maxpool", size=2, stride=1)
    + conv(6, 3, 2)
    + head("1,2", "4,4, 6,9, 12,7", 2, scale_x_y=1.2)
    + layer("route", layers=-3)
    + layer("upsample", stride=2)
    + layer("route", layers="-1, 3")
    + head("0", "4,4, 6,9, 12,7", 2)
)


def convolved(x, params, stats, stride, activation):
    """[C, H, W], loops over the kernel, zeros outside."""
    kernel = params["kernel"].transpose(3, 2, 0, 1)
    reach = kernel.shape[2] // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach)))
    height, width = x.shape[1:]
    y = sum(
        np.einsum("oc,chw->ohw", kernel[:, :, i, j], padded[:, i : i + height, j : j + width])
        for i in range(kernel.shape[2])
        for j in range(kernel.shape[3])
    )[:, ::stride, ::stride]
    column = lambda v: v[:, None, None]  # noqa: E731
    if stats is None:
        return y + column(params["bias"])
    # Darknet's normalize_cpu: 1e-5 is added to the variance.
    y = (y - column(stats["mean"])) / np.sqrt(column(stats["var"]) + 1e-5)
    y = y * column(params["scale"]) + column(params["bias"])
    if activation == "mish":
        return y * np.tanh(np.log1p(np.exp(y)))
    return np.where(y > 0, y, 0.1 * y)


def pooled(x, size):
    """Stride 1: out to the right and below -inf, and on the other sides too from size 3 on."""
    lead = (size - 1) // 2
    edges = ((0, 0), (lead, size - 1 - lead), (lead, size - 1 - lead))
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, edges, constant_values=-np.inf), (size, size), (1, 2)
    )
    return windows.max((-1, -2))


def test_a_small_network_by_another_forward_pass(tmp_path):
    found = cfg.parse(SMALL, "small.cfg").detector
    assert (found.classes, found.strides, found.scales) == (2, (4, 2), (1.2, 1.0))
    assert found.anchors == (((6, 9), (12, 7)), ((4, 4),)) and found.masks == ((1, 2), (0,))
    path = tmp_path / "small.weights"
    darknet.write(path, drawn(found))
    variables = darknet.read(path, drawn(found))
    image = np.random.default_rng(1).random((1, 8, 16, 3)).astype(np.float32)
    given = Part(found).apply(variables, image, False)

    def step(x, number, stride=1, activation="leaky"):
        params = dict(variables["params"][f"layer{number}"])
        stats = variables["batch_stats"].get(f"norm{number}")
        params |= variables["params"].get(f"norm{number}", {})
        return convolved(x, params, stats, stride, activation)

    x = step(image[0].transpose(2, 0, 1).astype(np.float64), 0)
    x = x.reshape(6, 4, 2, 8, 2).max((2, 4))
    group = step(x, 2, activation="mish")[4:]
    x = pooled(pooled(step(group, 4) + group, 3), 2)
    coarse = step(x, 8, stride=2)
    fine = np.concatenate([coarse.repeat(2, 1).repeat(2, 2), group])
    for raw, expected, count in ((given[0], step(coarse, 9), 2), (given[1], step(fine, 14), 1)):
        expected = expected.transpose(1, 2, 0).reshape(*raw.shape[1:3], count, 7)
        np.testing.assert_allclose(raw[0], expected, rtol=1e-4, atol=1e-4)


def test_centres_may_leave_their_cells():
    """Darknet's yolo_layer: x * scale_x_y - 0.5 * (scale_x_y - 1)."""
    raw = np.random.default_rng(0).normal(size=(1, 2, 3, 1, 7)).astype(np.float32)
    sizes = jnp.array([[0.2, 0.3]], jnp.float32)
    placed = np.asarray(boxes.place(jnp.asarray(raw), sizes, 1.1))[0, 1, 2, 0]
    centre = (placed[:2] + placed[2:]) / 2
    y, x = (1 / (1 + np.exp(-raw[0, 1, 2, 0, 1::-1]))) * 1.1 - 0.05
    np.testing.assert_allclose(centre, [(1 + y) / 2, (2 + x) / 3], rtol=1e-5)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[maxpool]", "[avgpool]", r"line 17: there is no layer \[avgpool\] here; .* maxpool"),
        ("activation=leaky", "activation=swish", "line 15: there is no activation 'swish'"),
        ("pad=1", "pad=0", "line 9: a convolution of size 3 with 0 pixels of padding"),
        ("size=3", "size=2", "line 9: a convolution of size 2"),
        ("filters=7", "filters=6", "1 anchors and 2 classes take 7 filters, .* has 6"),
        ("filters=14", "filters=16", "line 69: 2 anchors and 2 classes take 14 filters"),
        ("mask = 1,2", "mask = 1,3", "mask 1,3 does not go with 3 anchors"),
        ("12,7", "12", "does not go with 3 anchors .num. of 5 numbers"),
        ("layers = -3", "layers = -30", r"layer 11 \(route\) .* only those before it"),
        ("group_id = 1", "group_id = 2", "takes group 2 of 2"),
        ("groups = 2", "groups = 3", "groups begin at 0 and divide the channels"),
        ("filters=6", "filters=six", r"line 11: \[convolutional\] needs filters = whole numbers"),
        ("stride=2\n", "stride=2\ngroups=2\n", "groups=2 would give other results; here it is 1"),
        ("stride=2\n", "stride=2\ntwist=2\n", "has no option 'twist' that is known"),
        ("scale_x_y = 1.2", "new_coords = 1", "new_coords=1 would give other results"),
        ("from = 3", "from = 0", "adds .* it takes one layer of the same shape"),
        ("channels=3", "channels=1", "line 6: images have 3 channels"),
        ("[net]", "[maxpool]", r"line 1: the first section must be \[net\]"),
        ("[yolo]", "[region]", r"no layer \[region\]"),
        ("batch=64", "batch 64", r"line 3: expected \[section\] or option=value, not 'batch64'"),
        ("[yolo]", "[yolo", r"a section is \[name\]"),
    ],
)
def test_what_cannot_be_names_its_line(old, new, message):
    assert old in SMALL
    with pytest.raises(IcmError, match=f"^x.cfg, .*{message}"):
        cfg.parse(SMALL.replace(old, new), "x.cfg")


def test_files_that_are_no_networks():
    for text, message in (
        ("", "is no Darknet .cfg"),
        ("\x89PNG\n", r"line 1: expected \[section\]"),
        (NET, "has no .yolo."),
        (NET + conv(4), "has no .yolo."),
        (SMALL.replace("classes = 2", "classes = 1", 1).replace("=14", "=12"), r"\[1, 2\] classes"),
    ):
        with pytest.raises(IcmError, match=f"x.cfg.*{message}"):
            cfg.parse(text, "x.cfg")


def test_a_config_may_name_a_file(tmp_path):
    path = tmp_path / "mine.cfg"
    path.write_text(SMALL)
    config = {"name": str(path)}
    kept = yolo.whole(config)
    assert kept["name"] == "cfg" and yolo.whole(kept) == kept
    path.unlink()  # a run has the text
    assert yolo.build_detector(kept, 2) == cfg.parse(SMALL, "x").detector
    assert yolo.outline(kept).startswith(f"{path}, 16 layers, outputs at 1/4 with anchors 6 × 9")
    with pytest.raises(IcmError, match=r"mine.cfg is for 2 classes, the data have 80"):
        yolo.build_detector(kept, 80)
    with pytest.raises(IcmError, match=r"cannot read .*mine.cfg"):
        yolo.build_detector(config, 2)


def run_detect(capsys, *arguments):
    code = cli.main(["detect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_the_command_takes_weights_and_pictures(tmp_path, capsys):
    text = SMALL.replace("width=416", "width=32").replace("height=416", "height=64")
    found = cfg.parse(text, "small.cfg")
    variables = drawn(found.detector)
    darknet.write(tmp_path / "small.weights", variables)
    (tmp_path / "small.cfg").write_text(text)
    (tmp_path / "names").write_text("cat\n\nsea lion\n")
    picture = np.random.default_rng(2).integers(0, 256, (20, 10, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    options = "-m", tmp_path / "small.weights", "--least", 0.0
    code, (given,), errors = run_detect(capsys, tmp_path / "picture.png", *options)
    assert (code, errors, given["width"], given["height"]) == (0, "", 10, 20)
    assert len(given["boxes"]) > 1
    for left, top, width, height in (box["bbox"] for box in given["boxes"]):
        assert 0 <= left <= left + width <= 10.01 and 0 <= top <= top + height <= 20.01
    assert {box["name"] for box in given["boxes"]} <= {"class 0", "class 1"}
    _, (named,), _ = run_detect(
        capsys, tmp_path / "picture.png", *options, "--names", tmp_path / "names"
    )
    assert {box["name"] for box in named["boxes"]} <= {"cat", "sea lion"}
    assert [box["bbox"] for box in named["boxes"]] == [box["bbox"] for box in given["boxes"]]
    for more, message in (
        (("--names", tmp_path / "small.cfg"), "names; the network has 2 classes"),
        (("--cfg", tmp_path / "absent.cfg"), "cannot read .*absent.cfg"),
        (("--cfg", tmp_path / "names"), "names, line 1: expected .section."),
    ):
        code, _, errors = run_detect(capsys, tmp_path / "picture.png", *options, *more)
        assert code == 2 and re.search(message, errors)
    data = (tmp_path / "small.weights").read_bytes()
    (tmp_path / "small.weights").write_bytes(data[: 20 + 4 * (4 * 6 + 6 * 3 * 9)])  # one layer
    code, _, errors = run_detect(capsys, tmp_path / "picture.png", *options)
    assert code == 2 and "the file is truncated" in errors
    (tmp_path / "small.weights").write_bytes(data)
    (tmp_path / "small.cfg").write_text(SMALL.replace("width=416", "width=30"))
    code, _, errors = run_detect(capsys, tmp_path / "picture.png", *options)
    assert code == 2 and "are 416 and 30; both are multiples of 4, from 4 on" in errors
    (tmp_path / "small.cfg").unlink()
    code, _, errors = run_detect(capsys, tmp_path / "picture.png", *options)
    assert code == 2 and "or name it (icm detect --cfg)" in errors


def test_boxes_come_back_to_the_picture():
    """A picture of 20 × 10 in the middle of 64 × 32: 64 × 32 of it, or with bars beside it."""
    boxes = np.array([[[0.25, 0.25, 0.5, 0.75], [0, 0, 1, 0.2]]], np.float32)
    rows = Detections(boxes, np.ones((1, 2)), np.zeros((1, 2), int), np.ones((1, 2), bool))
    extent = 0, 16, 64, 32
    found = detect.described(rows, ["it"], (64, 64), extent, (20, 10))
    # x: 16...48 of 64, so all 10 columns; the other box lies in the bar and is none.
    assert [box["bbox"] for box in found["boxes"]] == [[0.0, 5.0, 10.0, 5.0]]


def test_published_weights_name_what_is_in_a_photograph(real_data, capsys):
    file = real_data / "darknet/yolov3-tiny.weights"
    if not file.is_file():
        pytest.skip(f"no {file}")
    photograph = real_data / "detect/images/000000002006.jpg"  # a bus, a person beside it
    code, (found,), _ = run_detect(capsys, photograph, "-m", file)
    assert code == 0 and (found["width"], found["height"]) == (640, 480)
    boxes = {box["name"]: box["bbox"] for box in found["boxes"]}
    np.testing.assert_allclose(boxes["bus"], [0, 70, 580, 360], atol=15)
    np.testing.assert_allclose(boxes["person"], [15, 250, 30, 113], atol=15)


def test_published_weights_on_photographs_of_coco(real_data):
    """An independent forward pass scored 44.7 and 23.3 %; with the masks of the .cfg 29.5, 15.8."""
    built = yolo.yolov3_tiny(80)
    file = real_data / "darknet/yolov3-tiny.weights"
    if not file.is_file():
        pytest.skip(f"no {file}")
    variables = darknet.read(file, drawn(built))
    source = open_source({"name": "coco_json", "path": real_data / "detect"}, "validation")
    tally = average_precision("coco", [*map(str, range(80))])
    spec = pipeline.BatchSpec(16, (416, 416), boxes=100, letterbox="centre")

    @jax.jit
    def predict(variables, image):
        outputs = Part(built).apply(variables, image.astype(jnp.float32) / 255, False)
        sizes = anchors(built, [raw.shape[1:3] for raw in outputs], 1.0)
        return detections(outputs, sizes, built.scales, 100, 0.45, 0.005)._asdict()

    for batch in pipeline.in_order(source, spec):
        tally.update(jax.device_get(predict(variables, batch["image"])), batch)
    found = tally.result()
    assert found["map50"] == pytest.approx(0.447, abs=0.01)
    assert found["map"] == pytest.approx(0.233, abs=0.01)
