"""What `icm import` costs: a codec of CompressAI's shape, trained here, exported and imported.

    python benchmarks/bench_import.py PHOTOS PICTURES --architecture mbt2018-mean --steps 2000

It is trained on crops of PHOTOS, written under CompressAI's names, and imported with PICTURES for
`--calibrate`. Printed is what the command prints, and whether the model is the one that the trained
variables give without that detour. Where CompressAI is installed, its own class takes the file,
and its latents, bits and picture are compared on each of PICTURES.
"""

import argparse
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

from zoo import exported, saved

from icm_jax.codecs import bitstream, compressai_codec, model_file
from icm_jax.codecs.codec import forward
from icm_jax.codecs.compressai import ARCHITECTURES, SERIAL
from icm_jax.data.images import read_rgb
from icm_jax.data.sources import SUFFIXES
from icm_jax.files import listed, read
from icm_jax.weights import compressai, convert
from icm_jax.weights.tensors import tensors

BATCH, SIDE, RATE = 8, 128, 1e-3
PLAIN = tuple(name for name in ARCHITECTURES if name not in SERIAL)


def trained(codec, folder: str, steps: int, weight: float, limit: int = 300) -> dict:
    """Variables after so many steps of bits per pixel + weight · mean squared error."""
    names = [file.name for file in listed([folder], SUFFIXES, recursive=True)][:limit]
    photos = [read_rgb(read(name), name) for name in names]
    photos = [image for image in photos if min(image.shape[:2]) >= SIDE]
    rng, variables = np.random.default_rng(0), codec.init(jax.random.key(0), None)
    schedule = optax.cosine_decay_schedule(RATE, steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss(variables, x, key):
        found = forward(codec, variables, {"image": x}, x.shape[1:3], key=key)
        bits = sum(value.mean() for value in found.bits.values()) / SIDE**2
        distortion = jnp.square(x.astype(jnp.float32) - found.outputs["image"]).mean()
        return bits + weight * distortion, (bits, distortion)

    @jax.jit
    def step(variables, state, x, key):
        gradient, told = jax.grad(loss, has_aux=True)(variables, x, key)
        change, state = optimiser.update(gradient, state)
        return optax.apply_updates(variables, change), state, told

    def crop():
        image = photos[rng.integers(len(photos))]
        top, left = (rng.integers(side - SIDE + 1) for side in image.shape[:2])
        return image[top : top + SIDE, left : left + SIDE]

    state, bar = optimiser.init(variables), tqdm.trange(steps)
    for number in bar:
        x = np.stack([crop() for _ in range(BATCH)])
        key = jax.random.fold_in(jax.random.key(1), number)
        variables, state, told = step(variables, state, x, key)
        if number % 100 == 99:
            bits, distortion = map(float, told)
            bar.set_postfix_str(f"{bits:.3f} bpp, {10 * np.log10(255**2 / distortion):.2f} dB")
    return jax.device_get(variables)


def with_medians(variables, codec, pictures) -> dict:
    """The medians of the coded latent on some pictures: training here needs none."""
    latents = codec.analyse(variables, {"image": pictures})
    coded = np.asarray(latents[codec.segments[0].name])
    own = variables["params"]["compressai"] | {"median": np.median(coded, axis=(0, 1, 2))}
    return variables | {"params": {"compressai": own}}


def compared(path, found, pictures) -> None:
    """Prints the largest differences from what CompressAI computes."""
    import compressai.models as theirs
    import torch

    kinds = dict(
        zip(
            PLAIN,
            (theirs.FactorizedPrior, theirs.ScaleHyperprior, theirs.MeanScaleHyperprior),
            strict=True,
        )
    )
    network = kinds[found.architecture](found.width, found.channels).eval()
    state = {n: torch.from_numpy(x.read()) for n, x in tensors(path).items()}
    network.load_state_dict(network.state_dict() | state)  # its tables are made by `update`
    run = jax.jit(lambda v, x: forward(found.codec, v, {"image": x}, x.shape[1:3]))
    worst = np.zeros(2)
    for picture in pictures:
        ours = jax.device_get(run(found.variables, picture[None]))
        with torch.inference_mode():
            given = network(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)
        image = given["x_hat"][0].permute(1, 2, 0).numpy()
        bits = sum(-x.log2().sum().item() for x in given["likelihoods"].values())
        apart = np.abs(ours.outputs["image"][0] / 255 - image)
        rate = abs(sum(x[0] for x in ours.bits.values()) / bits - 1)
        worst = np.maximum(worst, [np.quantile(apart, 0.999) / np.abs(image).max(), rate])
    print(f"beside CompressAI: picture within {worst[0]:.1e} (999 of 1000 values), ", end="")
    print(f"bits within {worst[1]:.1e}")


def main():
    parser = argparse.ArgumentParser(description="what `icm import` costs")
    parser.add_argument("photos", help="folder to train on")
    parser.add_argument("pictures", help="folder to calibrate and count on")
    parser.add_argument("--architecture", choices=PLAIN, default=PLAIN[2])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--channels", type=int, default=48)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--weight", type=float, default=0.0130, help="λ, as of quality 4 there")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("trained.safetensors"))
    options = parser.parse_args()
    codec = compressai_codec(options.architecture, options.width, options.channels)
    pictures = convert.middles(options.pictures)
    variables = trained(codec, options.photos, options.steps, options.weight)
    variables = with_medians(variables, codec, pictures)
    saved(options.out, exported(variables))
    content = convert.codec_file(options.out, None, options.pictures)
    options.out.with_suffix(".icmc").write_bytes(content)
    direct = bitstream.freeze(codec, variables, pictures)
    found = model_file.load(options.out.with_suffix(".icmc"), {"compressai": compressai_codec})
    print("the same model without the detour:", found.fingerprint == direct.fingerprint)
    if importlib.util.find_spec("compressai"):
        compared(options.out, compressai.read(options.out), pictures)


if __name__ == "__main__":
    main()
