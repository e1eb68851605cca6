"""YOLOv3: the published table, the cut, Darknet's weight files."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icm_jax.errors import IcmError
from icm_jax.nets import resnet, yolo
from icm_jax.weights import darknet

SMALL = yolo.layers(3, width=1 / 16, depth=0.25)
FULL = yolo.layers(80)


def initial(table):
    image = jnp.asarray(np.random.default_rng(0).random((2, 64, 96, 3)), jnp.float32)
    whole = yolo.Part(table, 0, len(table))
    variables = jax.jit(whole.init, static_argnums=2)(jax.random.key(0), image, False)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.uniform(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)
    ]
    return image, whole, jax.tree.unflatten(tree, moved)


def test_layers_are_numbered_as_in_the_public_configuration():
    assert len(FULL) == 107 and yolo.default_split(FULL) == 13
    at = lambda kind: [i for i, layer in enumerate(FULL) if layer.kind == kind]  # noqa: E731
    assert at("linear") == [81, 93, 105] and at("detect") == [82, 94, 106]
    assert at("upsample") == [85, 97]
    routes = {i: FULL[i].inputs for i in at("route")}
    assert routes == {83: (79,), 86: (85, 61), 95: (91,), 98: (97, 36)}
    shortcuts = at("shortcut")
    assert len(shortcuts) == 23 and all(FULL[i].inputs == (i - 3,) for i in shortcuts)
    assert FULL[12][:4] == ("conv", 256, 3, 2) and FULL[81].features == 255
    part = yolo.Part(FULL, 0, 107)
    image = jax.ShapeDtypeStruct((1, 416, 416, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: part.init(jax.random.key(0), x, False), image)
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    assert weights == 62_001_757  # of yolov3.weights: 248,007,048 bytes with a header of 20
    outputs = jax.eval_shape(lambda v, x: part.apply(v, x, False), variables, image)
    assert [o.shape for o in outputs] == [(1, s, s, 3, 85) for s in (13, 26, 52)]


def test_both_parts_make_the_whole():
    image, whole, variables = initial(SMALL)
    split = yolo.default_split(SMALL)
    expected = whole.apply(variables, image, False)
    f = yolo.Part(SMALL, 0, split).apply(variables, image, False)
    assert f.shape == (2, 8, 12, 16)
    tail = yolo.Part(SMALL, split, len(SMALL))
    for one, other in zip(tail.apply(variables, f, False), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    # The same from before the last BatchNorm of the front.
    before = yolo.Part(SMALL, 0, split - 1).apply(variables, image, False)
    last = SMALL[split - 1]
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
        yolo.check_split(FULL, split)
    yolo.check_split(FULL, 13)
    yolo.check_split(FULL, 37)


def test_a_table_needs_classes():
    with pytest.raises(IcmError, match="at least one class"):
        yolo.layers(0)


def numbered(count):
    """float32 [count], all different."""
    return (np.arange(count, dtype=np.uint32) + 0x3F800000).view(np.float32)


def test_a_file_of_the_full_size(tmp_path):
    values = numbered(62_001_757)
    header = np.array([0, 2, 0, 32013312, 0], "<i4").tobytes()
    path = tmp_path / "yolov3.weights"
    path.write_bytes(header + values.tobytes())
    assert path.stat().st_size == 248_007_048
    variables = darknet.read(path, FULL)
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
    darknet.write(again, FULL, variables, seen=32013312)
    assert again.read_bytes() == path.read_bytes()
    for file in (path, again):  # half a gigabyte
        file.unlink()


def test_files_that_do_not_fit_are_refused(tmp_path):
    _, _, variables = initial(SMALL)
    path = tmp_path / "small.weights"
    darknet.write(path, SMALL, variables)
    data = path.read_bytes()
    back = darknet.read(path, SMALL)
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
            darknet.read(path, SMALL)
    path.write_bytes(data)
    with pytest.raises(IcmError, match="number of classes"):
        darknet.read(path, yolo.layers(4, width=1 / 16, depth=0.25))
    with pytest.raises(IcmError, match=r"cannot read the weights .*absent"):
        darknet.read(tmp_path / "absent", SMALL)


def test_a_backbone_alone_is_read(tmp_path):
    """darknet53.conv.74: what detectors start from; its header may be the old, shorter one."""
    count = 40_620_640  # weights of Darknet-53 without its classifier
    values = numbered(count)
    path = tmp_path / "darknet53.conv.74"
    path.write_bytes(np.array([0, 1, 0, 7], "<i4").tobytes() + values.tobytes())
    params = darknet.read(path, FULL)["params"]
    assert "layer73" in params and "layer75" not in params
    np.testing.assert_array_equal(
        params["layer73"]["kernel"].transpose(3, 2, 0, 1).ravel()[-5:], values[-5:]
    )
