"""Networks on DCT coefficients, against the NumPy network of test_resnet and JPEG's own numbers."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_resnet import block, norm

from icm_jax.data import jpeg
from icm_jax.errors import IcmError
from icm_jax.nets import dct

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
