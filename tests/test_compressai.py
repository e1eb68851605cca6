"""CompressAI's weights: its own outputs, names of all releases, bad files, files that are exact."""

import functools
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from PIL import Image
from small import RNG, images
from test_cli import icm
from test_codecs import disturbed
from zoo import exported, saved

import icm_jax
from icm_jax.codecs import bitstream, compressai_codec, priors
from icm_jax.codecs.codec import forward
from icm_jax.codecs.compressai import ARCHITECTURES, SERIAL
from icm_jax.coding import tables
from icm_jax.data.images import read_image
from icm_jax.errors import IcmError
from icm_jax.nets import context, entropy_parameters, integer
from icm_jax.weights import compressai, convert

GOLDEN = pathlib.Path(__file__).parent / "golden" / "compressai"
HYPER = ARCHITECTURES[1:]
PLAIN = ARCHITECTURES[:3]
"""Without a context model; tests/test_context.py has more of the others."""


@functools.cache
def golden(name):
    """(state dict, what CompressAI computed with it: float32 [h, w, C] by name)."""
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    state = {n.removeprefix("state/"): x for n, x in arrays.items() if n.startswith("state/")}
    return state, {n: x for n, x in arrays.items() if not n.startswith("state/")}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_those_of_compressai(tmp_path, name):
    state, expected = golden(name)
    found = compressai.read(saved(tmp_path / "weights.safetensors", state))
    channels = 8 if name == "cheng2020-anchor" else 12
    assert (found.architecture, found.width, found.channels) == (name, 8, channels)

    def computed(variables, image):
        latents = found.codec.analyse(variables, {"image": image})
        return latents, forward(found.codec, variables, {"image": image}, image.shape[1:3])

    image = expected["image"][None]
    latents, result = jax.device_get(jax.jit(computed)(found.variables, image))
    picture = result.outputs["image"][:, ::3] / 255
    pairs = [(latents["y"], "g_a"), (picture if name in PLAIN else picture.clip(0, 1), "x_hat")]
    pairs += [(latents["z"], "h_a")] if name in HYPER else []
    pairs += [(result.latents["y"], "y_hat")] if name in SERIAL else []
    for given, key in pairs:
        np.testing.assert_allclose(given[0], expected[key], atol=1e-4 * np.abs(expected[key]).max())
    for latent, bits in result.bits.items():
        wanted = -np.log2(expected[f"likelihoods/{latent}"]).sum(axis=-1)
        np.testing.assert_allclose(result.maps[latent][0], wanted, rtol=1e-3)
        np.testing.assert_allclose(bits[0], wanted.sum(), rtol=1e-4)
    if name in SERIAL:
        weights = context.weights(found.variables["params"]["compressai"]["parameters"])
        inputs = {"z": result.latents["z"], "around": context.around(result.latents["y"])}
        nodes = found.codec.segments[1].prior.each.__self__
        said = integer.run_float(nodes.front + nodes.back, weights, inputs)
        for node, key in ((nodes.front[-1], "h_s"), (nodes.back[-1], "entropy_parameters")):
            wanted = expected[key]
            np.testing.assert_allclose(said[node.name][0], wanted, atol=1e-4 * wanted.max())
    elif name in HYPER:  # as the integers' network has the layers, in floats
        params = found.variables["params"]["compressai"]["hyper_synthesis"]
        weights = entropy_parameters.scale_synthesis_weights(params)
        nodes = entropy_parameters.scale_synthesis_nodes(name == "mbt2018-mean")
        said = integer.run_float(nodes, weights, {"z": result.latents["z"]})["layer_2"][0]
        said = said if name == "mbt2018-mean" else np.maximum(said, 0)  # a ReLU, there
        np.testing.assert_allclose(said, expected["h_s"], atol=1e-4 * expected["h_s"].max())
        back = entropy_parameters.scale_synthesis_params(weights)
        jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("name", PLAIN)
def test_weights_of_this_library_come_back_under_their_names(tmp_path, name):
    codec = compressai_codec(name, 4, 6)
    shapes = jax.eval_shape(lambda: codec.init(jax.random.key(0), np.zeros((1, 64, 64, 3))))
    variables = jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), shapes)
    state = exported(variables)
    assert set(state) <= set(golden(name)[0])
    found = compressai.read(saved(tmp_path / "weights.safetensors", state), name)
    jax.tree.map(np.testing.assert_array_equal, found.variables, variables)
    assert found.codec is codec  # so that bits and bytes are the same


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", *SERIAL])
def test_names_of_older_releases_and_of_training_checkpoints(tmp_path, name):
    state, _ = golden(name)
    expected = compressai.read(saved(tmp_path / "weights.safetensors", state))
    short = dict(matrices="_matrix", biases="_bias", factors="_factor")

    def older(name):
        return re.sub(r"(matrices|biases|factors)\.(\d)", lambda m: short[m[1]] + m[2], name)

    masked = state.get("context_prediction.mask")
    if masked is not None:  # what it hides may be anything, as before the first forward pass
        weight = np.where(masked, state["context_prediction.weight"], np.float16(1))
        state = {**state, "context_prediction.weight": weight}
    for prefix in ("state_dict.", "module.", "state_dict.module.")[masked is not None :]:
        more = {f"{prefix}{older(name)}": value for name, value in state.items()}
        more["optimizer.state.0.exp_avg"] = np.zeros(3, np.float32)
        found = compressai.read(saved(tmp_path / "weights.safetensors", more))
        jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)


def changed(name="mbt2018-mean", without="", **more):
    state = {key: value for key, value in golden(name)[0].items() if key != without}
    return state | {key.replace("__", "."): value for key, value in more.items()}


ZEROS = np.zeros((24, 12, 5, 5), np.float32)


@pytest.mark.parametrize(
    "state, message",
    [
        (lambda: changed(context_prediction__weight=ZEROS), "is mbt2018 by .* not mbt2018-mean"),
        (
            lambda: changed(SERIAL[0], context_prediction__weight=ZEROS[..., 1:]),
            r"\[24, 12, 5, 4\]",
        ),
        (lambda: changed(SERIAL[0], h_s__4__weight=ZEROS[:12]), r"ends in \[12\] channels for 12"),
        (lambda: changed(SERIAL[1], "g_s.3.igdn.beta"), "lacks g_s.3.igdn.beta, which cheng2020-a"),
        (lambda: changed(SERIAL[1], g_a__3__conv_a__0=ZEROS), "attention .* imported: bmshj2018"),
        (lambda: changed(without="g_s.2.bias"), "lacks g_s.2.bias, which mbt2018-mean has"),
        (lambda: changed(h_a__6__weight=ZEROS), "holds h_a.6.weight, which mbt2018-mean has not"),
        (lambda: changed(h_s__4__weight=ZEROS[:7]), r"ends in \[7\] channels for 12 of y"),
        (lambda: changed(h_s__4__bias=ZEROS[:, 0, 0, 0] * np.nan), "in h_s.4.bias .* not finite"),
        (lambda: changed(g_a__1__beta=ZEROS[:, 0, 0, 0]), r"of shape \[24\], expected \[8\]"),
        (lambda: changed(a__entropy_bottleneck__quantiles=ZEROS), "several codecs, under , a."),
        (lambda: {"fc.weight": ZEROS}, "holds no codec of CompressAI: none of its 1 arrays"),
        (lambda: changed(without="g_a.0.weight"), "lacks g_a.0.weight or g_a.6.weight"),
        (lambda: changed(ARCHITECTURES[0]), "is bmshj2018-factorized by its names .* not mbt2018"),
    ],
)
def test_other_files_are_named_errors(tmp_path, state, message):
    with pytest.raises(IcmError, match=message):
        path = saved(tmp_path / "weights.safetensors", state())
        compressai.read(path, None if "context_prediction.bias" in state() else "mbt2018-mean")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """(folder with pictures and weights, path of the imported mbt2018-mean)."""
    folder = tmp_path_factory.mktemp("import")
    (folder / "pictures").mkdir()
    for name, image in (("a", golden("mbt2018-mean")[1]["image"]), ("b", images(150, 128, 3))):
        Image.fromarray(image).save(folder / "pictures" / f"{name}.png")
    for name in ("mbt2018-mean", "bmshj2018-factorized"):
        saved(folder / f"{name}.safetensors", golden(name)[0])
    content = convert.codec_file(folder / "mbt2018-mean.safetensors", None, folder / "pictures")
    (folder / "codec.icmc").write_bytes(content)
    return folder, folder / "codec.icmc"


def test_the_command_imports_and_the_others_take_its_file(imported, tmp_path, capsys):
    folder, path = imported
    weights, pictures, out = (
        folder / "bmshj2018-factorized.safetensors",
        folder / "pictures",
        tmp_path / "codec.icmc",
    )
    code, _, errors = icm("import", weights, "-o", out, "--calibrate", pictures, capsys=capsys)
    assert code == 0 and "N = 8, M = 12" in errors and "2 pictures, 128 × 128 of the" in errors
    frozen = icm_jax.load(out)
    assert frozen.fingerprint.hex() in errors
    code, _, errors = icm("import", weights, "-o", out, capsys=capsys)
    assert code == 1 and "exists; --force overwrites it" in errors
    before = out.read_bytes()
    code, _, _ = icm("import", weights, "-o", out, "-f", capsys=capsys)  # needs no pictures
    assert code == 0 and icm_jax.load(out).fingerprint == frozen.fingerprint
    assert out.read_bytes() != before  # its description has no cost
    code, _, errors = icm("import", folder / "mbt2018-mean.safetensors", "-f", capsys=capsys)
    assert code == 1 and "give --calibrate FOLDER" in errors
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:-9])
    code, _, errors = icm("import", tmp_path / "cut.safetensors", capsys=capsys)
    assert code == 1 and "truncated" in errors and not (tmp_path / "cut.icmc").exists()
    code, text, _ = icm("info", "--json", path, capsys=capsys)
    assert code == 0 and "imported from mbt2018-mean" in json.loads(text)["description"]
    picture = pictures / "b.png"
    coded, back = tmp_path / "b.icm", tmp_path / "b.png"
    for step in (["compress", picture], ["verify", coded], ["decompress", coded]):
        more = [] if step[0] == "verify" else ["-o", coded if step[0] == "compress" else back]
        assert icm(*step, "-m", path, *more, capsys=capsys)[0] == 0
    assert read_image(back.read_bytes(), "b").shape == (150, 128, 3)


def test_files_are_exact_and_cost_what_the_floats_say(imported):
    frozen, picture = icm_jax.load(imported[1]), golden("mbt2018-mean")[1]["image"][None]
    stream = bitstream.encode(frozen, picture)[0]
    latents = bitstream.decode_latents(frozen, stream).latents
    other = disturbed(frozen)  # medians, densities and transforms
    with jax.default_matmul_precision("bfloat16"):
        given = bitstream.decode_latents(other, stream).latents
    for name, latent in latents.items():
        np.testing.assert_array_equal(given[name], latent)
    assert np.any(latents["z"] % 1) and not np.any(latents["z"] * 16 % 1)
    likelihoods = [golden("mbt2018-mean")[1][f"likelihoods/{name}"] for name in "yz"]
    wanted = -sum(np.log2(x).sum() for x in likelihoods)
    found = sum(bits[0] for bits in bitstream.estimate(frozen, picture).values())
    assert abs(found / wanted - 1) < 0.01


def test_scales_in_integers_take_the_nearest_row():
    between = priors.scale_steps()["between"]
    scales = np.exp(RNG.uniform(np.log(0.05), np.log(400), 4000))
    rows = np.searchsorted(between, np.rint(scales * priors.SCALE_STEPS), side="right")
    distance = np.abs(np.log(scales)[:, None] - np.log(tables.SCALES))
    nearest = distance.argmin(axis=1)
    clear = np.diff(np.sort(distance, axis=1)[:, :2])[:, 0] > 2e-3  # whole steps move the others
    np.testing.assert_array_equal(rows[clear], nearest[clear])
