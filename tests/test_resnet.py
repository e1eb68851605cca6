"""ResNet and ASPP against a NumPy network written out here, and their gradients."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icm_jax.engine import plan, sharding
from icm_jax.engine.cost import multiply_accumulates
from icm_jax.errors import IcmError
from icm_jax.nets import resnet
from icm_jax.nets.deeplab import ASPP

RNG = np.random.default_rng(0)


def conv(x, kernel, stride=1, dilation=1):
    """Cross-correlation of [N, H, W, C] with zero padding, one output place at a time."""
    size = kernel.shape[0]
    pad = dilation * ((size - 1) // 2), dilation * (size // 2)
    x = np.pad(x, ((0, 0), pad, pad, (0, 0)))
    reach = dilation * (size - 1) + 1
    rows = range(0, x.shape[1] - reach + 1, stride)
    columns = range(0, x.shape[2] - reach + 1, stride)
    out = np.zeros((len(x), len(rows), len(columns), kernel.shape[-1]))
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            window = x[:, r : r + reach : dilation, c : c + reach : dilation]
            out[:, i, j] = np.tensordot(window, kernel, 3)
    return out


def norm(x, params, stats, train):
    mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (stats["mean"], stats["var"])
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def pool(x):
    n, h, w, c = x.shape
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    out = np.empty((n, (h + 1) // 2, (w + 1) // 2, c))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            out[:, i, j] = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
    return out


def block(x, params, stats, train, stride, dilation, stride_in_1x1):
    y, depth = x, sum(name.startswith("conv") for name in params)
    carrier = 1 if depth == 2 or stride_in_1x1 else 2
    for i in range(1, depth + 1):
        kernel = params[f"conv{i}"]["kernel"]
        d = dilation if kernel.shape[0] == 3 else 1
        y = conv(y, kernel, stride if i == carrier else 1, d)
        y = norm(y, params[f"bn{i}"], stats[f"bn{i}"], train)
        y = y if i == depth else np.maximum(y, 0)
    if "shortcut_conv" in params:
        x = conv(x, params["shortcut_conv"]["kernel"], stride)
        x = norm(x, params["shortcut_bn"], stats["shortcut_bn"], train)
    return np.maximum(x + y, 0)


def layer(x, params, stats, train, stride, first=1, dilation=1, stride_in_1x1=False):
    for i in range(len(params)):
        name, s, d = f"block{i}", stride if i == 0 else 1, first if i == 0 else dilation
        x = block(x, params[name], stats[name], train, s, d, stride_in_1x1)
    return x


def head(x, variables, train):
    params, stats = variables["params"], variables["batch_stats"]
    x = conv(x, params["stem"]["kernel"], 2)
    x = pool(np.maximum(norm(x, params["stem_bn"], stats["stem_bn"], train), 0))
    return layer(x, params["layer1"], stats["layer1"], train, 1)


def tail(x, variables, train, output_stride=32, stride_in_1x1=False):
    strides, dilations = {
        32: ((2, 2, 2), (1, 1, 1, 1)),
        16: ((2, 2, 1), (1, 1, 1, 2)),
        8: ((2, 1, 1), (1, 1, 2, 4)),
    }[output_stride]
    outputs = []
    for i in range(3):
        name = f"layer{i + 2}"
        own = variables["params"][name], variables["batch_stats"][name]
        x = layer(x, *own, train, strides[i], dilations[i], dilations[i + 1], stride_in_1x1)
        outputs.append(x)
    return outputs


def scrambled(variables):
    """Random statistics, scales and biases: fresh ones are 0 and 1 and hide mistakes."""
    flat = flax.traverse_util.flatten_dict(variables)
    for path, value in flat.items():
        if path[-1] in ("mean", "bias"):
            flat[path] = RNG.normal(0, 0.3, value.shape).astype(np.float32)
        elif path[-1] in ("var", "scale"):
            flat[path] = RNG.uniform(0.5, 1.5, value.shape).astype(np.float32)
    return flax.traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize("side", [(16, 16), (21, 13)])
@pytest.mark.parametrize("train", [False, True])
def test_head_equals_numpy(side, train):
    module = resnet.Head("18", 3)
    x = RNG.normal(size=(2, *side, 3)).astype(np.float32)
    variables = scrambled(module.init(jax.random.key(0), x, False))
    f, updated = module.apply(variables, x, train, mutable=["batch_stats"])
    assert f.shape == (2, -(-side[0] // 4), -(-side[1] // 4), 3)
    np.testing.assert_allclose(f, head(x, variables, train), rtol=1e-4, atol=1e-4)
    stem = conv(x, np.asarray(variables["params"]["stem"]["kernel"]), 2)
    old, new = variables["batch_stats"]["stem_bn"], updated["batch_stats"]["stem_bn"]
    for name, value in (("mean", stem.mean((0, 1, 2))), ("var", stem.var((0, 1, 2)))):
        expected = 0.9 * old[name] + 0.1 * value if train else old[name]
        np.testing.assert_allclose(new[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "stride", "in_1x1"), [("18", 32, False), ("18", 16, False), ("50", 8, True)]
)
def test_tail_equals_numpy(variant, stride, in_1x1, monkeypatch):
    shallow = resnet.STAGES[variant]._replace(depths=(1, 1, 2, 2))
    monkeypatch.setitem(resnet.STAGES, variant, shallow)
    module = resnet.Tail(variant, 2, stride, in_1x1)
    f = RNG.normal(size=(1, 9, 12, resnet.feature_channels(variant, 2))).astype(np.float32)
    variables = scrambled(jax.jit(module.init, static_argnums=2)(jax.random.key(0), f, False))
    given = jax.jit(module.apply, static_argnums=2)(variables, f, False)
    expected = tail(f, variables, False, stride, in_1x1)
    for a, b in zip(given, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "millions"), [("18", 11.690), ("34", 21.798), ("101", 44.549), ("152", 60.193)]
)
def test_published_numbers_of_parameters(variant, millions):
    """With the dense layer to 1,000 classes, as everyone counts them."""
    f = jax.ShapeDtypeStruct((1, 8, 8, resnet.feature_channels(variant)), jnp.float32)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    trees = [
        jax.eval_shape(lambda x, m=m: m.init(jax.random.key(0), x, False)["params"], x)
        for m, x in ((resnet.Head(variant), x), (resnet.Tail(variant), f))
    ]
    channels = 8 * resnet.feature_channels(variant)
    count = sum(np.prod(p.shape) for p in jax.tree.leaves(trees)) + channels * 1000 + 1000
    assert round(count / 1e6, 3) == pytest.approx(millions, abs=1e-3)


def test_pool_is_the_windowed_maximum_with_its_gradient():
    x = jnp.asarray(RNG.normal(size=(2, 7, 10, 3)), jnp.float32)
    np.testing.assert_array_equal(resnet.max_pool(x), pool(np.asarray(x)).astype(np.float32))
    weight = jnp.asarray(RNG.normal(size=(2, 4, 5, 3)), jnp.float32)

    def windowed(x):
        pads = ((0, 0), (1, 1), (1, 1), (0, 0))
        window = (1, 3, 3, 1), (1, 2, 2, 1)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *window, pads)

    given, expected = (
        jax.grad(lambda x, f=f: (f(x) * weight).sum())(x) for f in (resnet.max_pool, windowed)
    )
    np.testing.assert_allclose(given, expected, atol=1e-6)
    # Of equal ones the first has it all: the upper left corner of a window within the image.
    ties = jax.grad(lambda x: resnet.max_pool(x).sum())(jnp.zeros((1, 4, 4, 1)))
    first = np.arange(4) < 2
    np.testing.assert_array_equal(ties[0, :, :, 0], np.outer(first, first))


def test_at_test_time_the_norm_is_in_the_kernel():
    x = jnp.asarray(RNG.normal(size=(2, 6, 6, 3)), jnp.float32)

    class Apart(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return resnet.BatchNorm(name="norm")(resnet.Conv(5, 3, 2, name="conv")(x), train)

    class Together(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return resnet.BatchNorm(name="norm")(x, train, resnet.Conv(5, 3, 2, name="conv"))

    variables = scrambled(Apart().init(jax.random.key(0), x, False))
    fresh = Together().init(jax.random.key(0), x, False)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, variables)
    for train in (False, True):
        results = []
        for module in (Apart(), Together()):

            def loss(params, module=module, train=train):
                y, updated = module.apply(
                    {**variables, "params": params}, x, train, mutable=["batch_stats"]
                )
                return jnp.sin(y).sum(), (y, updated)

            results.append(jax.grad(loss, has_aux=True)(variables["params"]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *results)


def check_gradient(module, reference, x):
    """Slope of a weighted sum along a random direction, in training mode, against float64 NumPy."""
    variables = scrambled(module.init(jax.random.key(0), x, False))
    shape = module.apply(variables, x, False).shape
    weight = RNG.normal(size=shape).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(both):
        own = {**variables, "params": both["params"]}
        return (module.apply(own, both["x"], True, mutable=["batch_stats"])[0] * weight).sum()

    both = {"params": variables["params"], "x": x}
    slopes = gradient(both)
    way = jax.tree.map(lambda p: RNG.normal(size=p.shape) * (np.abs(p).mean() + 1e-2), both)
    slope = sum(
        (np.asarray(g) * d).sum()
        for g, d in zip(jax.tree.leaves(slopes), jax.tree.leaves(way), strict=True)
    )
    step = 1e-6
    ends = []
    for sign in (1, -1):
        moved = jax.tree.map(lambda p, d, s=sign: np.asarray(p, float) + s * step * d, both, way)
        ends.append(
            (reference(moved["x"], moved["params"], variables["batch_stats"]) * weight).sum()
        )
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-3)


def test_head_gradient_equals_finite_differences():
    """Space-to-depth stem, shifted pool, batch statistics and basic blocks."""
    x = RNG.normal(size=(2, 16, 16, 3)).astype(np.float32)
    reference = lambda x, p, s: head(x, {"params": p, "batch_stats": s}, True)  # noqa: E731
    check_gradient(resnet.Head("18", 2), reference, x)


def test_bottleneck_gradient_equals_finite_differences():
    x = RNG.normal(size=(2, 7, 8, 6)).astype(np.float32)
    reference = lambda x, p, s: block(x, p, s, True, 2, 2, False)  # noqa: E731
    check_gradient(resnet.Block("bottleneck", 3, stride=2, dilation=2), reference, x)


def test_bfloat16_computes_near_float32_and_keeps_float32_state():
    x = jnp.asarray(RNG.normal(size=(4, 16, 16, 3)), jnp.float32)
    exact, fast = resnet.Head("18", 4), resnet.Head("18", 4, jnp.bfloat16)
    variables = fast.init(jax.random.key(0), x, False)
    f, updated = fast.apply(variables, x, True, mutable=["batch_stats"])
    reference, _ = exact.apply(variables, x, True, mutable=["batch_stats"])
    assert f.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves([variables, updated])} == {jnp.dtype("float32")}
    error = np.abs(f.astype(jnp.float32) - reference).mean() / np.abs(reference).mean()
    assert error < 0.02


def test_new_blocks_are_the_identity():
    x = jnp.abs(jnp.asarray(RNG.normal(size=(1, 4, 4, 8)), jnp.float32))
    module = resnet.Block("bottleneck", 2)
    variables = module.init(jax.random.key(0), x, False)
    np.testing.assert_array_equal(module.apply(variables, x, False), x)


def test_aspp_is_the_sum_of_dilated_classifiers():
    c4 = RNG.normal(size=(1, 9, 7, 5)).astype(np.float32)
    module = ASPP(3, rates=(2, 6))
    variables = module.init(jax.random.key(0), c4)
    kernels = {n: p["kernel"] for n, p in variables["params"].items()}
    expected = sum(conv(c4, np.asarray(kernels[f"rate{r}"]), dilation=r) for r in (2, 6))
    np.testing.assert_allclose(module.apply(variables, c4), expected, atol=1e-5)


def test_unknown_variants_and_strides_are_refused():
    with pytest.raises(IcmError, match="no ResNet variant '51'"):
        resnet.feature_channels("51")
    with pytest.raises(IcmError, match="output_stride is 4"):
        resnet.Tail("18", 2, 4).init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)), False)


@pytest.mark.parametrize(
    "variant, channels, macs",
    [("50", 3, 3.858), ("71", 3, 5.387), ("c39", 8, 2.948), ("c51", 32, 3.833), ("c72", 8, 5.350)],
)
def test_multiply_accumulates_are_those_of_the_paper(variant, channels, macs):
    """Torfason et al. 2018, stride in the first 1×1, 1000 classes (docs/papers.md 1.2)."""
    tail, head = resnet.Tail(variant, stride_in_1x1=True), resnet.Head(variant)
    side = 28 if variant[0] == "c" else 224

    def network(x):
        if variant[0] != "c":
            x, _ = head.init_with_output(jax.random.key(0), x, train=False)
        (_, _, c4), _ = tail.init_with_output(jax.random.key(0), x, train=False)
        return resnet.global_pool(c4) @ jnp.zeros((2048, 1000))

    x = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    assert multiply_accumulates(network, x) / 1e9 == pytest.approx(macs, abs=6e-4)


@pytest.mark.parametrize("output_stride, sides", [(32, (6, 3, 2)), (8, (6, 6, 6))])
def test_cresnets_begin_at_an_eighth(output_stride, sides):
    """Dilated ones keep the code's own grid, as DeepLab on it does."""
    tail = resnet.Tail("c39", 2, output_stride)
    code = jax.ShapeDtypeStruct((1, 6, 6, 5), jnp.float32)
    outputs, _ = jax.eval_shape(
        lambda x: tail.init_with_output(jax.random.key(0), x, train=False), code
    )
    assert tuple(x.shape[1] for x in outputs) == sides


@pytest.mark.parametrize("groups", [0, 1, 2, 4])
def test_groups_of_a_batch_are_normalised_each_by_itself(groups):
    x = RNG.normal(2, 3, (8, 3, 3, 5)).astype(np.float32)
    bn = resnet.BatchNorm(groups=groups)
    variables = bn.init(jax.random.key(0), x[:1], train=False)
    y, updated = bn.apply(variables, x, train=True, mutable=["batch_stats"])
    parts = np.split(x, max(groups, 1))
    ours = dict(scale=np.ones(5), bias=np.zeros(5))
    expected = [norm(part, ours, None, True) for part in parts]
    np.testing.assert_allclose(y, np.concatenate(expected), rtol=1e-4, atol=1e-5)
    for name, before in (("mean", 0), ("var", 1)):
        own = np.mean([getattr(part, name)((0, 1, 2)) for part in parts], axis=0)
        given = updated["batch_stats"][name]
        np.testing.assert_allclose(given, 0.9 * before + 0.1 * own, rtol=1e-4)
    if groups == 4:
        with pytest.raises(IcmError, match="4 groups do not divide a batch of 6"):
            bn.apply(variables, x[:6], train=True, mutable=["batch_stats"])


def test_groups_as_many_as_devices_send_nothing():
    rows = sharding.batch_sharding(sharding.make_mesh())
    x = jax.ShapeDtypeStruct((4, 4, 4, 8), jnp.float32, sharding=rows)

    def sent(groups):
        layer = resnet.Layer("basic", 2, 8, bn_groups=groups)
        variables = layer.init(jax.random.key(0), jnp.zeros((1, 4, 4, 8)), train=False)
        of = lambda x: layer.apply(variables, x, train=True, mutable=["batch_stats"])[0]  # noqa: E731
        gradient = jax.jit(jax.grad(lambda x: jnp.square(of(x)).sum()), out_shardings=rows)
        return plan.sent(gradient.lower(x).compile().as_text(), 2)

    assert sent(0) and not sent(2)
