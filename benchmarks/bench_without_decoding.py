"""Networks on DCT coefficients and on a learned code against ResNet-50 on pixels, full width.

    python benchmarks/bench_without_decoding.py [FOLDER] [--batch 16 64] [--size 224] [--rounds 5]
        [--parts coefficients code]

Weights are random, which changes no shape. Images of a folder, or else smooth random ones, become
JPEG files of the size; each arm of configs/jpeg_dct.py reads them and predicts. Prints images per
second of inference, of the network alone and of the whole path, medians over the rounds, with
ratios to ResNet-50 on RGB beside those of Gueguen et al. 2018 (docs/papers.md 2.5; on a GPU),
multiply-accumulates, and how many of them the network alone does in a second: where these are
equal, the count explains the time; and the memory that a batch takes at once, in the network or in
a codec's decoder before it. Then cResNet-51 on the code of an autoencoder (N = 128, C = 32)
beside ResNet-50 on what it decodes, from its files on (1.5 to 2 times fewer operations in Torfason
et al. 2018).
"""

import argparse
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from icm_jax.codecs import bitstream
from icm_jax.measure import throughput
from icm_jax.nets.dct import WIRINGS
from icm_jax.tasks import build_task

PARTS = ("coefficients", "code")
PAPER = dict(
    upsampling=396 / 208,
    upsampling_rfa=266 / 208,
    deconvolution_rfa=268 / 208,
    downsampling=451 / 208,
    late_concat=401 / 208,
    late_concat_rfa=267 / 208,
    late_concat_rfa_thinner=369 / 208,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, nargs="?")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--width", type=float, default=1.0, help="factor of all channels")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    given = parser.parse_args()
    paths = []
    if given.folder:
        paths = sorted(p for p in given.folder.rglob("*") if p.suffix in (".png", ".jpg"))
        if not paths:
            parser.error(f"no images in {given.folder}")
    for batch in given.batch:
        images = pictures(paths, batch, given.size)
        device = jax.devices()[0].device_kind
        print(f"{given.size} × {given.size} pixels, batch {batch}, {given.dtype}, {device}")
        if "coefficients" in given.parts:
            show(throughput.measure(coefficient_paths(given, images), given.rounds))
        if "code" in given.parts:
            print("from files of the autoencoder, one decoded at a time")
            show(throughput.measure(code_paths(given, images), given.rounds))


def coefficient_paths(given, images) -> dict:
    """From JPEG files: ResNet-50 on their pixels, the wirings on their coefficients."""
    arms = {"rgb": "50", "ycbcr": "50"} | {name: name for name in WIRINGS}
    paths = {}
    for arm, network in arms.items():
        fields = dict(name="coefficient_classification", network=network, width=given.width)
        fields |= dict(input=arm if network == "50" else "jpeg", size=given.size, classes=1000)
        task = build_task(ConfigDict(fields | dict(dtype=given.dtype)))
        paths[arm] = throughput.jpeg_path(
            task.predict, drawn(task), images, given.quality, arm in WIRINGS
        )
    return paths


def show(measured: dict[str, dict]) -> None:
    """One row an arm; factors are to the first."""
    first = next(iter(measured.values()))
    heads = f"{'network':>17} {'from files':>17} {'paper':>8} {'G MAC':>7} {'G MAC/s':>8}"
    print(f"{'':24} {heads} {'M weights':>9} {'MB at once':>10}")
    for arm, own in measured.items():
        cells = []
        for key in ("network_images_per_second", "images_per_second"):
            cells.append(f"{own[key]:8.1f} ({own[key] / first[key]:.2f} ×)")
        paper = f"{PAPER[arm]:.2f} ×" if arm in PAPER else ""
        work = own["multiply_accumulates"] / 1e9
        cells += [f"{paper:>8}", f"{work:7.2f}", f"{work * own['network_images_per_second']:8.0f}"]
        cells += [f"{own['parameters'] / 1e6:9.2f}", f"{own['peak_bytes'] / 1e6:10.0f}"]
        print(f"{arm:24}", *cells)


def code_paths(given, images: np.ndarray) -> dict[str, throughput.Path]:
    """ResNet-50 on decoded images and cResNet-51 on the code."""
    code = dict(name="autoencoder", width=round(128 * given.width), channels=32, centres=6)
    fields = dict(codec=code | dict(learned=True, blocks=3), mode="finetune")
    fields |= dict(
        width=round(64 * given.width),
        name="classification",
        size=given.size,
        crop=(1.0, 1.0),
        dtype=given.dtype,
    )
    paths, codec = {}, None
    for arm, variant, frontend in (("decoded", "50", "decoded"), ("code", "c51", "code")):
        own = dict(fields, variant=variant, frontend=frontend, classes=1000)
        task = build_task(ConfigDict(own))
        if codec is None:
            start = jax.jit(task.codec.init)(jax.random.key(0), images[:1])
            codec = bitstream.freeze(task.codec, start, images[:2])
        output = "image" if frontend == "decoded" else "feature"
        variables = drawn(task, {"image": jax.ShapeDtypeStruct(images.shape, images.dtype)})
        paths[arm] = throughput.stream_path(task.predict, variables, images, codec, output)
    return paths


def pictures(paths, count: int, size: int) -> np.ndarray:
    """uint8 [count, size, size, 3]."""
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        if paths:
            image = Image.open(paths[number % len(paths)]).convert("RGB")
        else:
            image = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), np.uint8))
        found.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(found)


def drawn(task, batch=None) -> dict:
    """Random weights; compiling a task's own start would take longer than all else."""
    rng = np.random.default_rng(0)

    def leaf_of(path, leaf):
        if path[-1].key == "kernel":
            scale = np.prod(leaf.shape[:-1]) ** -0.5
            return rng.normal(0, scale, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    shapes = jax.eval_shape(task.init, jax.random.key(0), batch or {})
    return jax.tree_util.tree_map_with_path(leaf_of, shapes)


if __name__ == "__main__":
    main()
