"""Paths from files to predictions: what is read, what is counted."""

import jax.numpy as jnp
import numpy as np
import pytest
from small import small_codec

from icm_jax.errors import IcmError
from icm_jax.measure import throughput

IMAGES = np.kron(np.arange(0, 250, 7).reshape(2, 3, 2, 3), np.ones((1, 16, 16, 1))).astype(np.uint8)


def test_paths_read_the_images_and_count_one_of_them():
    weights = {"params": {"w": jnp.ones((3, 5))}}

    def of_pixels(variables, inputs):
        return jnp.matmul(inputs["image"].astype(jnp.float32), variables["params"]["w"])

    def of_planes(variables, inputs):
        return jnp.matmul(inputs["luma"][..., :3].astype(jnp.float32), variables["params"]["w"])

    paths = {
        "pixels": throughput.jpeg_path(of_pixels, weights, IMAGES, 95, False),
        "planes": throughput.jpeg_path(of_planes, weights, IMAGES, 95, True),
    }
    image = paths["pixels"].read(paths["pixels"].files[1])["image"]
    assert np.abs(np.int32(image) - IMAGES[1]).mean() < 16
    planes = paths["planes"].read(paths["planes"].files[1])
    assert planes["luma"].shape == (6, 4, 64) and planes["chroma"].shape == (3, 2, 128)
    found = throughput.measure(paths, rounds=1)
    assert found["pixels"]["multiply_accumulates"] == 48 * 32 * 3 * 5
    assert found["planes"]["multiply_accumulates"] == 6 * 4 * 3 * 5
    held = 60 + 2 * 48 * 32 * (3 + 4 * 5)  # weights, bytes of two images, floats of five channels
    assert held <= found["pixels"]["peak_bytes"] <= held + 2 * 48 * 32 * 4 * 8 + 50_000
    for own in found.values():
        assert own["parameters"] == 15
        rates = [own[key] for key in own if key.endswith("per_second")]
        assert len(rates) == 3 and min(rates) > 0


def test_of_decoder_and_network_the_larger_one_counts():
    frozen = small_codec("autoencoder")
    weights = {"params": {"w": jnp.ones((3, 5))}}
    path = throughput.stream_path(
        lambda v, x: x["image"].mean(axis=(1, 2)) @ v["params"]["w"],
        weights,
        IMAGES,
        frozen,
        "image",
    )
    peak = throughput.measure({"own": path}, rounds=1)["own"]["peak_bytes"]
    assert peak == path.decoder_bytes > 4 * IMAGES.size
    small = path._replace(decoder_bytes=0)
    assert (
        4 * IMAGES.size < throughput.measure({"own": small}, rounds=1)["own"]["peak_bytes"] < peak
    )


def test_a_damaged_file_is_an_error():
    path = throughput.jpeg_path(lambda v, x: x, {"params": {}}, IMAGES, 95, True)
    path.files[1] = path.files[1][:200]
    with pytest.raises(IcmError, match="truncated or damaged"):
        throughput.measure({"own": path})
