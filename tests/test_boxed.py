"""The model in the package: it serves from installation on, and its files decode anywhere.

In tests/golden FINGERPRINT.icm was written once for each model, by write_scene.py, from scene.png;
FINGERPRINT.npz holds the latents, and the pixels that came back. Every environment that runs this
test decodes it anew. scene.icm and scene.npz are those of the first model.
"""

import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import icm_jax
from icm_jax import cli
from icm_jax.codecs import bitstream
from icm_jax.coding import archive, container
from icm_jax.measure import classical, metrics

GOLDEN = pathlib.Path(__file__).parent / "golden"
IN_ANOTHER_PROCESS = """
import pathlib, sys
import numpy as np
import icm_jax
from icm_jax import cli
from icm_jax.codecs import bitstream
codec = icm_jax.load(sys.argv[1])
data = pathlib.Path(sys.argv[2]).read_bytes()
np.savez(sys.argv[3], **bitstream.decode_latents(codec, data).latents)
"""


@pytest.fixture(scope="module")
def codec():
    return icm_jax.load()


@pytest.fixture(scope="module")
def scene():
    return np.asarray(Image.open(GOLDEN / "scene.png").convert("RGB"))


@pytest.fixture(params=["scene", "8e8b4956"])
def written(request):
    """(path of a file of a model in the package, of the model, what it decodes to)."""
    path = GOLDEN / f"{request.param}.icm"
    model = archive.packaged(container.unpack(path.read_bytes()).header)
    return path, model, dict(np.load(path.with_suffix(".npz")))


def test_a_file_of_another_environment_decodes(written):
    path, model, expected = written
    codec, data = icm_jax.load(model), path.read_bytes()
    latents = bitstream.decode_latents(codec, data).latents
    for name in expected.keys() - {"image"}:
        np.testing.assert_array_equal(latents[name], expected[name])
    image = codec.decompress(data).astype(int)
    assert np.abs(image - expected["image"]).max() <= 1


def test_fast_arithmetic_changes_no_latent(tmp_path, written):
    """The float networks may round as they like; what the coder needs is integers."""
    path, model, expected = written
    flags = "--xla_cpu_enable_fast_math=true --xla_cpu_fast_math_honor_nans=false"
    environment = dict(os.environ, XLA_FLAGS=flags, JAX_DEFAULT_MATMUL_PRECISION="bfloat16")
    arguments = [model, path, tmp_path / "latents.npz"]
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, *map(str, arguments)]
    subprocess.run(command, check=True, env=environment)
    given = np.load(tmp_path / "latents.npz")
    for name in expected.keys() - {"image"}:
        np.testing.assert_array_equal(given[name], expected[name])


def test_quality_is_a_scale_and_it_beats_jpeg(codec, scene):
    sizes, scores = [], []
    for quality in (0, 33.3, 66.6, 100):
        data = codec.compress(scene, quality)
        sizes.append(len(data))
        scores.append(metrics.psnr(scene, codec.decompress(data)))
    assert sizes == sorted(sizes) and scores == sorted(scores)
    assert sizes[-1] > 4 * sizes[0] and scores[-1] > scores[0] + 5
    files = (classical.encode(scene, "jpeg", quality) for quality in range(1, 96))
    jpeg = next(f for f in files if metrics.psnr(scene, classical.decode(f)) >= scores[1])
    assert len(jpeg) - classical.table_bytes(jpeg) > sizes[1]


@pytest.mark.parametrize("shape", [(1, 1), (3, 17, 3), (130, 70, 3), (64, 64)])
def test_any_size(codec, shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    back = codec.decompress(codec.compress(image, 100))
    assert back.shape == shape and back.dtype == np.uint8


def test_its_file_is_small_and_says_where_it_comes_from(codec):
    assert archive.BOXED.stat().st_size <= 4 << 20
    about = archive.describe(archive.BOXED)
    assert about["licence"] and "configs/hyperprior.py:photo" in about["description"]
    card = archive.BOXED.with_suffix(".md").read_text()
    assert codec.fingerprint.hex() in card
    assert hashlib.sha256(archive.BOXED.read_bytes()).hexdigest() in card


def test_a_file_of_an_earlier_model_is_decoded_by_that_model(tmp_path):
    """By the command, which takes the fingerprint from the file; the library is told the model."""
    data = (GOLDEN / "scene.icm").read_bytes()
    written = tmp_path / "scene.icm"
    written.write_bytes(data)
    assert cli.main(["decompress", str(written)]) == cli.main(["verify", str(written)]) == 0
    given = np.asarray(Image.open(tmp_path / "scene.png")).astype(int)
    assert np.abs(given - np.load(GOLDEN / "scene.npz")["image"]).max() <= 1
    assert archive.packaged(container.Header(b"none", (1, 1))) == archive.BOXED
