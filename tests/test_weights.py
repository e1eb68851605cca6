"""Weights of PyTorch's ResNets: torchvision's own values, names, prefixes, heads, bad files."""

import functools
import io
import json
import operator
import pathlib
import re
import struct
import sys
import zipfile

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_config_edges
import test_main
from golden import write_resnets
from golden.write_resnets import drawn, probes
from ml_collections import ConfigDict

from icm_jax import ops
from icm_jax.engine import checkpoint
from icm_jax.errors import IcmError
from icm_jax.nets import resnet
from icm_jax.tasks import build_task
from icm_jax.weights import start_from
from icm_jax.weights.tensors import tensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
KINDS = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}


def written(path, arrays, kinds=KINDS):
    """A .safetensors file of these arrays."""
    header, data = {}, []
    names = {np.dtype(kind): name for name, kind in kinds.items()}
    for name, array in arrays.items():
        begin = sum(map(len, data))
        data.append(array.tobytes())
        offsets = [begin, begin + len(data[-1])]
        header[name] = dict(dtype=names[array.dtype], shape=array.shape, data_offsets=offsets)
    text = json.dumps(header).encode()
    path.write_bytes(b"".join([struct.pack("<Q", len(text)), text, *data]))
    return path


def published(variant, width=64, classes=1000):
    """{name: shape} of torchvision's ResNet, as its source has it."""
    block, depths = resnet.STAGES[variant]
    norm = ("weight", "bias", "running_mean", "running_var")
    shapes, before = {"conv1.weight": (width, 3, 7, 7)}, width

    def normalised(name, channels):
        shapes.update({f"{name}.{leaf}": (channels,) for leaf in norm})
        shapes[f"{name}.num_batches_tracked"] = ()

    normalised("bn1", width)
    for layer, depth in enumerate(depths):
        inner = width * 2**layer
        out = inner * resnet.EXPANSION[block]
        kernels = [(inner, 1), (inner, 3), (out, 1)] if block == "bottleneck" else [(inner, 3)] * 2
        for number in range(depth):
            name, x = f"layer{layer + 1}.{number}", before
            for i, (features, kernel) in enumerate(kernels, 1):
                shapes[f"{name}.conv{i}.weight"] = (features, x, kernel, kernel)
                normalised(f"{name}.bn{i}", features)
                x = features
            if number == 0 and (layer or before != out):
                shapes[f"{name}.downsample.0.weight"] = (out, before, 1, 1)
                normalised(f"{name}.downsample.1", out)
            before = out
    return shapes | {"fc.weight": (classes, before), "fc.bias": (classes,)}


def state(variant, prefix="", **more):
    shapes = published(variant, **more)
    return {
        prefix + name: drawn(name, shape) if shape else np.zeros((), np.int64)
        for name, shape in shapes.items()
    }


@functools.cache
def task_shapes(variant, width=64, classes=1000):
    """Shapes of the variables of a classifier on pixels."""
    fields = dict(name="classification", mode="finetune", frontend="pixels", variant=variant)
    fields |= dict(width=width, classes=classes, size=32, crop=(1, 1), dtype="float32")
    task = build_task(ConfigDict(fields))
    batch = {"image": jnp.zeros((1, 32, 32, 3), jnp.uint8)}
    return jax.eval_shape(task.init, jax.random.key(0), batch)


def zeros(shapes):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


@pytest.mark.parametrize("variant", ["18", "50"])
def test_every_layer_is_as_torchvision_computes_it(tmp_path, variant, capsys):
    golden = {
        name.partition("/")[2]: value
        for name, value in np.load(GOLDEN / "resnets.npz").items()
        if name.startswith(f"resnet{variant}/")
    }
    path = written(tmp_path / "some.safetensors", state(variant))
    variables = start_from(zeros(task_shapes(variant)), "resnet", path)
    count = sum("num_batches" not in name for name in published(variant))
    assert capsys.readouterr().err == f"{path}: {count} arrays taken\n"
    head, tail = resnet.Head(variant), resnet.Tail(variant)
    kept = lambda module, _: isinstance(module, resnet.Block) or module.name == "stem_bn"  # noqa: E731

    @jax.jit
    def run(variables, image):
        own = [{c: variables[c][k] for c in ("params", "batch_stats")} for k in ("head", "tail")]
        more = dict(train=False, capture_intermediates=kept, mutable=["intermediates"])
        f, first = head.apply(own[0], ops.normalise(image), **more)
        outputs, rest = tail.apply(own[1], f, **more)
        weights = variables["params"]["classifier"]
        fc = resnet.global_pool(outputs[-1]) @ weights["kernel"] + weights["bias"][None]
        return first["intermediates"] | rest["intermediates"], fc

    inner, fc = run(variables, write_resnets.image())
    given = {"fc": fc}
    for place, (value, *_) in flax.traverse_util.flatten_dict(inner).items():
        name = ".".join(place[:-1]).replace("block", "").replace("stem_bn", "bn1")
        given[name] = value
    given["maxpool"] = resnet.max_pool(jnp.maximum(given["bn1"], 0))
    assert given.keys() == golden.keys()
    for name, expected in golden.items():
        scale = expected[-1] ** 0.5
        np.testing.assert_allclose(
            probes(np.asarray(given[name])), expected, 1e-4, 1e-4 * scale, err_msg=name
        )


SMALL = dict(width=2, classes=7)


def leaf(variables, name):
    """Of the arrays in our names."""
    return functools.reduce(operator.getitem, name.split("/"), variables)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "a.b-c.encoder."])
def test_prefixes_are_found_and_heads_taken_where_they_fit(tmp_path, capsys, prefix):
    own = state("18", prefix, **SMALL) | {"other.weight": np.ones(3, np.float32)}
    path = written(tmp_path / "some.pth", own)  # what it is, its bytes say
    count = sum("num_batches" not in name for name in own) - 1
    given = start_from(zeros(task_shapes("18", **SMALL)), "resnet", path)
    fc = own[prefix + "fc.weight"]
    np.testing.assert_array_equal(leaf(given, "params/classifier/kernel"), fc.T)
    stem = own[prefix + "conv1.weight"]
    np.testing.assert_array_equal(leaf(given, "params/head/stem/kernel")[2, 3], stem[:, :, 2, 3].T)
    var = own[prefix + "layer4.1.bn2.running_var"]
    np.testing.assert_array_equal(leaf(given, "batch_stats/tail/layer4/block1/bn2/var"), var)
    under = f"under {prefix} " if prefix else ""
    told = f"{path}: {count} arrays {under}taken; left there: other"
    assert capsys.readouterr().err.startswith(told)
    given = start_from(zeros(task_shapes("18", width=2, classes=8)), "resnet", path)
    assert not leaf(given, "params/classifier/kernel").any()
    told = f"{path}: {count - 2} arrays {under}taken; left there: "
    err = capsys.readouterr().err
    assert err.startswith(told) and f"{prefix}fc (2)" in err


def test_of_mocos_networks_the_trained_one_is_taken_with_its_projector(tmp_path, capsys):
    """The classifier is not, though fc of MoCo v1 has the shape of one."""
    shapes = task_shapes("18", **SMALL)
    dense = {"Dense_0": (16, 16), "Dense_1": (16, 7)}
    projector = {
        name: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1:])}
        for name, shape in dense.items()
    }
    task = zeros(shapes | {"params": shapes["params"] | {"projector": projector}})
    query = state("18", "module.encoder_q.", **SMALL)
    both = query | {name.replace("_q.", "_k."): np.ones_like(x) for name, x in query.items()}
    both["module.queue_ptr"] = np.zeros(1, np.int64)
    path = written(tmp_path / "v1.safetensors", both)
    given = start_from(task, "resnet", path)
    err = capsys.readouterr().err
    assert (
        "left there: module.encoder_k (102), module.encoder_q.fc (2), module.queue_ptr (1)" in err
    )
    assert not leaf(given, "params/classifier/kernel").any()
    bias = query["module.encoder_q.layer3.0.bn1.bias"]
    np.testing.assert_array_equal(leaf(given, "params/tail/layer3/block0/bn1/bias"), bias)
    for name in ("weight", "bias"):
        del both[f"module.encoder_q.fc.{name}"]
    for number, (before, after) in zip((0, 2), dense.values(), strict=True):
        for name, shape in (("weight", (after, before)), ("bias", (after,))):
            name = f"module.encoder_q.fc.{number}.{name}"
            both[name] = drawn(name, shape)
    given = start_from(task, "resnet", written(tmp_path / "v2.safetensors", both))
    assert "encoder_q" not in capsys.readouterr().err.partition("left there")[2]
    expected = both["module.encoder_q.fc.2.weight"].T
    np.testing.assert_array_equal(leaf(given, "params/projector/Dense_1/kernel"), expected)


def test_parts_that_are_kept_stay_as_they_are(tmp_path, capsys):
    """As those of a codec, on whose files a tail of another's weights is trained."""
    path = written(tmp_path / "some.safetensors", state("18", **SMALL))
    task = zeros(task_shapes("18", **SMALL))
    given = start_from(task, "resnet", path, kept=("head", "classifier"))
    assert not any(x.any() for x in jax.tree.leaves(given["params"]["head"]))
    assert leaf(given, "params/tail/layer2/block0/conv1/kernel").any()
    assert "left there: bn1 (4), conv1 (1), fc (2), layer1 (20)" in capsys.readouterr().err
    with pytest.raises(IcmError, match="for the head and the tail of a ResNet; this task has clas"):
        start_from(task, "resnet", path, kept=("head", "tail"))


def change(**arrays):
    """A network with other arrays, or without those that are None."""

    def of(own):
        own = own | {name.replace("__", "."): x for name, x in arrays.items()}
        return {name: x for name, x in own.items() if x is not None}

    return of


NETWORKS = {
    "deeper": (
        lambda own: state("34", **SMALL),
        "is a ResNet of variant 34, width 2 (basic blocks "
        "3-4-6-3 in layers 1-2-3-4); this task has variant 18, width 2 (basic",
    ),
    "wider": (lambda own: state("18", width=3, classes=7), "is a ResNet of variant 18, width 3"),
    "bottleneck": (lambda own: state("50", **SMALL), "is a ResNet of variant 50, width 2 (bottle"),
    "lacking": (
        change(layer4__1__bn2__running_var=None, layer2__0__conv2__weight=None),
        "lacks layer2.0.conv2.weight and 1 more, which this task's ResNet has",
    ),
    "grouped": (
        change(layer3__0__conv2__weight=np.zeros((8, 4, 3, 3), np.float32)),
        "has layer3.0.conv2.weight of shape (8, 4, 3, 3); this task's ResNet has (8, 8, 3",
    ),
    "counted": (
        change(conv1__weight=np.zeros((2, 3, 7, 7), np.int64)),
        "holds conv1.weight as I64; expected F64, F32, F16, BF16",
    ),
    "infinite": (
        change(bn1__bias=np.array([0, np.inf], np.float32)),
        "is damaged: bn1.bias has values that cannot be",
    ),
    "negative": (
        change(bn1__running_var=np.array([-1, 1], np.float32)),
        "is damaged: bn1.running_var has values that cannot be",
    ),
    "foreign": (
        lambda own: {"features.0.weight": np.zeros(1, np.float32)},
        "has features.0.weight, and no layer1.0.conv1.weight: it is no ResNet under torch",
    ),
    "empty": (lambda own: {}, "has no arrays, and no layer1.0.conv1.weight"),
    "several": (
        lambda own: own | state("18", "ema.", **SMALL),
        "holds 2 ResNets: '', 'ema.'",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_another_network_is_one_error(tmp_path, name):
    alter, message = NETWORKS[name]
    path = written(tmp_path / "some.safetensors", alter(state("18", **SMALL)))
    with pytest.raises(IcmError, match=re.escape(message)):
        start_from(zeros(task_shapes("18", **SMALL)), "resnet", path)


def header(text, length=None, data=b""):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(1,), data_offsets=(0, 4), **more):
    return {"a": dict(dtype=dtype, shape=shape, data_offsets=data_offsets, **more)}


def zipped(size):
    """A zip file that is smaller than what it holds."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", bytes(size))
    return buffer.getvalue()


FILES = {
    "nothing": (b"", "is neither a .safetensors file nor one of PyTorch's; it begins with b''"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1",
        "is neither a .safetensors file nor",
    ),
    "long": (header({}, 2**62), "is truncated or no .safetensors file: its header would have 4,61"),
    "json": (header(b"{]"), "is damaged: its header is not that of a .safetensors file"),
    "deep": (header(b'{"a":' * 100_000), "is damaged: its header"),
    "digits": (header(b'{"a":' + b"9" * 5000 + b"}"), "is damaged: its header"),
    "list": (header({"a": []}), "is damaged: its header"),
    "field": (header(entry(more=1), data=bytes(4)), "is damaged: its header"),
    "kind": (header(entry(dtype=[]), data=bytes(4)), "is damaged: its header"),
    "sides": (header(entry(shape=(-1, -1)), data=bytes(4)), "is damaged: its header"),
    "huge": (header(entry(shape=[2**62] * 9), data=bytes(4)), "is damaged: its header"),
    "name": (header(entry(shape=("1",)), data=bytes(4)), "is damaged: its header"),
    "backwards": (header(entry(data_offsets=(4, 0)), data=bytes(4)), "is damaged: its header"),
    "short": (header(entry(), data=bytes(3)), "is truncated: 73 bytes by its header, here 72"),
    "longer": (header(entry(), data=bytes(5)), "is longer than its header says: 73 bytes by its"),
    "beyond": (header(entry("U8", (8,), (2**60, 2**60 + 8))), "is truncated: 1,152,921,504,606,8"),
    "zip": (b"PK\x03\x04nothing more", "is truncated or damaged: File is not a zip file"),
    "bomb": (zipped(10**6), "is no file that PyTorch writes: it swells to 1,000,000 bytes"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_one_error(tmp_path, name):
    data, message = FILES[name]
    path = tmp_path / "some.safetensors"
    path.write_bytes(data)
    with pytest.raises(IcmError, match=re.escape(f"{path} {message}")) as caught:
        tensors(path)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_every_cut_of_a_file_is_an_error(tmp_path):
    whole, path = (GOLDEN / "small.safetensors").read_bytes(), tmp_path / "cut.safetensors"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(IcmError, match=r"cut\.safetensors is (truncated|neither)"):
            tensors(path)


def test_files_of_the_formats_own_library_are_read():
    found = tensors(GOLDEN / "small.safetensors")
    some = np.arange(-3, 3, dtype=np.float32).reshape(2, 3) / 4
    expected = {
        "half": some,
        "brain": some,
        "whole.float": some[:, :1],
        "nothing": np.zeros((0, 4)),
    }
    for name, array in expected.items():
        given = found[name].read()
        assert given.dtype == np.float32 and found[name].shape == array.shape
        np.testing.assert_array_equal(given, array)
    assert found.keys() - expected.keys() == {"count"} and found["count"].shape == ()


def test_without_pytorch_its_files_are_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "some.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"x")
    for data in (path.read_bytes(), b"\x80\x02"):
        path.write_bytes(data)
        with pytest.raises(IcmError, match="not installed: pip install torch; or convert it, whe"):
            tensors(path)


@pytest.mark.parametrize("zip_file", [True, False])
def test_checkpoints_of_pytorch_are_read_and_run_nothing(tmp_path, capsys, zip_file):
    torch, path = pytest.importorskip("torch"), tmp_path / "some.pth.tar"
    own = state("18", "module.encoder_q.", **SMALL)
    tree = {name: torch.from_numpy(x) for name, x in own.items()}
    whole = {"epoch": 3, "state_dict": tree, "optimizer": {"state": {0: {"x": torch.zeros(2)}}}}
    torch.save(whole, path, _use_new_zipfile_serialization=zip_file)
    given = start_from(zeros(task_shapes("18", **SMALL)), "resnet", path)
    told = "100 arrays under state_dict.module.encoder_q. taken; left there: optimizer (1)"
    assert told in capsys.readouterr().err
    kernel = own["module.encoder_q.layer4.1.conv2.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(leaf(given, "params/tail/layer4/block1/conv2/kernel"), kernel)
    torch.save({"state_dict": Code()}, path, _use_new_zipfile_serialization=zip_file)
    with pytest.raises(IcmError, match="holds more than weights, or is damaged"):
        tensors(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(IcmError, match=r"damaged|cannot be read by PyTorch"):
        tensors(path)


class Code:
    """What a pickle could run."""

    def __reduce__(self):
        return pytest.fail, ("code of a file was run",)


STAGE_1 = """
from configs.omni_icm import get_config, runs as all_runs

def runs(config):
    return [run for run in all_runs(config) if run.name.endswith("omni/stage1")]
"""
ALONE = ("--config.stage0.steps=0", "--config.pretrain.steps=0", "--config.stage1.steps=0")


def test_stage_1_starts_from_a_file_by_the_command(tmp_path):
    (tmp_path / "stage1.py").write_text(STAGE_1)
    own = state("10", "module.encoder_q.", width=8)
    path = written(tmp_path / "moco.safetensors", own)
    flags = *ALONE, f"--config.weights.path={path}"
    done = test_main.main(tmp_path / "runs", *flags, name=str(tmp_path / "stage1"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{path}: 60 arrays under module.encoder_q. taken; left there: module.enc" in done.stderr
    given = checkpoint.load_variables(tmp_path / "runs/seed0/omni/stage1")
    for part, name in (("head", "layer1.0.conv1"), ("tail", "layer4.0.conv2")):
        kernel = own[f"module.encoder_q.{name}.weight"].transpose(2, 3, 1, 0)
        place = name.replace(".0.", "/block0/")
        np.testing.assert_array_equal(leaf(given, f"params/{part}/{place}/kernel"), kernel)


def test_a_file_of_another_network_is_found_before_the_first_step(tmp_path, capsys):
    (tmp_path / "stage1.py").write_text(STAGE_1)
    path = written(tmp_path / "moco.safetensors", state("18", **SMALL))
    flags = *ALONE, f"--config.weights.path={path}", f"--workdir={tmp_path}"
    line = test_config_edges.command(capsys, f"{tmp_path}/stage1.py:tiny", *flags)
    assert line.startswith(f"{path} is a ResNet of variant 18, width 2 (basic blocks 2-2-2-2 in ")
