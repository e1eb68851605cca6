"""Networks on DCT coefficients, against the NumPy network of test_resnet and JPEG's own numbers."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_resnet import block, norm

from icm_jax import ops
from icm_jax.data import jpeg, pipeline
from icm_jax.errors import IcmError
from icm_jax.nets import dct
from icm_jax.tasks import build_task, views

RNG = np.random.default_rng(0)
PLANES = [RNG.normal(0, 30, (2, *size, 64)).astype(np.float32) for size in ((7, 8), (4, 4), (4, 4))]


def filled(shapes):
    """Variables of these shapes, none of them 0 or 1 by chance."""

    def leaf(path, shape):
        values = RNG.normal(0, 1, shape.shape) / max(1, np.prod(shape.shape[:-1])) ** 0.5
        positive = path[-1].key in ("scale", "var")
        return jnp.asarray(np.abs(values) + 0.5 if positive else values, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def by_hand(name, variables, luma, blue, red):
    """Plain NumPy, from the paper's wiring."""
    params, stats = (jax.device_get(variables[key]) for key in ("params", "batch_stats"))
    row = dct.WIRINGS[name]

    def chain(x, blocks, part):
        for i, own in enumerate(blocks):
            key = f"{part}{i}"
            x = block(x, params[key], stats[key], False, own.stride, 1, True)
        return x

    if row.merge == "late":
        chroma = np.concatenate([blue, red], -1)
        luma = norm(luma, params["luma_bn"], stats["luma_bn"], False)
        chroma = norm(chroma, params["chroma_bn"], stats["chroma_bn"], False)
        parts = chain(luma, row.luma, "luma"), chain(chroma, row.chroma, "chroma")
        return chain(np.concatenate(parts, -1), row.rest, "rest")
    if row.merge == "deconvolve":
        planes = []
        for plane, key in ((blue, "up_b"), (red, "up_r")):
            taps = np.asarray(params[key]["kernel"])[0, 0].reshape(64, 2, 2, 64)
            up = np.zeros((len(plane), 2 * plane.shape[1], 2 * plane.shape[2], 64))
            for i in range(2):
                for j in range(2):
                    up[:, i::2, j::2] = plane @ taps[:, i, j]
            planes.append(up[:, :7, :8])
        blue, red = planes
    else:
        blue, red = (np.kron(p, np.ones((1, 2, 2, 1)))[:, :7, :8] for p in (blue, red))
    x = norm(np.concatenate([luma, blue, red], -1), params["bn"], stats["bn"], False)
    return chain(x, row.rest, "rest")


@pytest.mark.parametrize("name", ["deconvolution_rfa", "late_concat_rfa_thinner"])
def test_equal_to_the_network_in_numpy(name):
    network = dct.CoefficientTrunk(name, width=1 / 64)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), *PLANES, train=False))
    variables = filled(shapes)
    given = jax.jit(lambda *planes: network.apply(variables, *planes, train=False))(*PLANES)
    expected = by_hand(name, variables, *PLANES)
    assert given.shape == (2, 2, 2, 32)
    np.testing.assert_allclose(given, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("name", list(dct.WIRINGS))
def test_wirings_end_where_resnet_50_does(name):
    """224 pixels: 7 × 7 × 2048, and as many layers as the table says."""
    network = dct.CoefficientTrunk(name)
    planes = [jax.ShapeDtypeStruct((1, side, side, 64), jnp.float32) for side in (28, 14, 14)]
    variables = jax.eval_shape(lambda *p: network.init(jax.random.key(0), *p, train=False), *planes)
    out = jax.eval_shape(lambda v, *p: network.apply(v, *p, train=False), variables, *planes)
    assert out.shape == (1, 7, 7, 2048)
    blocks = sum(isinstance(p, dict) and "conv3" in p for p in variables["params"].values())
    assert blocks == {"upsampling": 13, "downsampling": 9, "late_concat": 14}.get(
        name, {"upsampling_rfa": 16, "deconvolution_rfa": 16}.get(name, 17)
    )


def test_the_dct_of_pixels_is_what_jpeg_stores():
    """An 8×8 convolution with DCT filters gives a file's coefficients, up to rounding."""
    image = RNG.integers(0, 256, (32, 40)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=100)
    stored = jpeg.read_coefficients(file.getvalue()).dequantised()[0]
    network = dct.BlockTransform()
    x = jnp.asarray(image, jnp.float32)[None] - 128
    variables = network.init(jax.random.key(0), x)
    given = network.apply(variables, x)[0]
    assert np.abs(np.asarray(given) - stored).max() <= 1.5
    for frozen in (False, True):
        network = dct.BlockTransform("random", frozen)
        variables = network.init(jax.random.key(0), x)
        gradient = jax.grad(lambda v, n=network: jnp.square(n.apply(v, x)).sum())(variables)
        assert (np.abs(gradient["params"]["kernel"]).max() == 0) == frozen


def test_unknown_wirings_and_bases_are_refused():
    with pytest.raises(IcmError, match="no wiring 'late'"):
        dct.wiring("late")
    with pytest.raises(IcmError, match="unknown basis 'fourier'"):
        dct.BlockTransform("fourier").init(jax.random.key(0), jnp.zeros((1, 8, 8)))


def task_of(**changes):
    fields = dict(name="coefficient_classification", input="jpeg", network="late_concat_rfa")
    fields |= dict(width=1 / 32, dtype="float32", classes=5, size=32)
    return build_task(ConfigDict(fields | changes))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_views_of_coefficients_are_those_of_pixels(seed):
    """Crop and flip, then transform; or transform, then crop and flip: the same."""
    key = None if seed is None else jax.random.key(seed)
    images = jnp.asarray(RNG.uniform(0, 255, (6, 48, 80, 3)), jnp.float32)
    network = dct.BlockTransform()
    variables = network.init(jax.random.key(0), jnp.zeros((1, 8, 8)))

    def transformed(images):
        planes = [network.apply(variables, plane) for plane in ops.ycbcr_420(images)]
        return planes[0], jnp.concatenate(planes[1:], axis=-1)

    given = views.coefficients(*transformed(images), 32, key=key)
    expected = transformed(views.aligned(images, 32, key=key))
    for one, other in zip(given, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)


def test_coefficients_of_files_are_the_dct_of_their_pixels():
    """Logits from files of quality 100 and from pixels through a frozen DCT, one network."""
    small = RNG.uniform(0, 255, (4, 6, 8, 3)).astype(np.uint8)
    images = [Image.fromarray(x).resize((64, 48), Image.Resampling.BICUBIC) for x in small]
    images = np.stack([np.asarray(image) for image in images])
    rows = [pipeline.read_planes(pipeline.write_jpeg(x, 100), "x", (48, 64)) for x in images]
    read = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    tasks = [task_of(), task_of(input="dct_kept")]
    shapes = jax.eval_shape(tasks[1].init, jax.random.key(0), {})
    variables = filled(shapes)
    for plane in ("luma", "blue", "red"):
        variables["params"][plane] = {"kernel": jnp.asarray(dct.dct_filters())}
    logits = [
        jax.jit(task.predict)(variables, batch)["logits"]
        for task, batch in zip(tasks, (read, {"image": images}), strict=True)
    ]
    spread = np.ptp(logits[0], axis=0).max()
    assert spread > 0.05  # the images differ, and the network sees it
    np.testing.assert_allclose(logits[0], logits[1], atol=0.1 * spread)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": "yuv"}, "unknown input 'yuv'"),
        ({"size": 40}, "is 40; views have sides of multiples of 16"),
        ({"network": "late"}, "no wiring 'late'"),
        ({"input": "rgb", "network": "late_concat"}, "no ResNet variant 'late_concat'"),
    ],
)
def test_bad_configs_of_coefficients_are_refused(change, message):
    with pytest.raises(IcmError, match=message):
        jax.eval_shape(task_of(**change).init, jax.random.key(0), {})
