"""The input path: images per second of one core beside Pillow, and of all cores beside a step.

    python benchmarks/bench_input.py FOLDER [--size 224] [--rounds 7] [--config FILE]

The JPEG files of a folder are read as `icm_jax.data.pipeline` does and as a loader on Pillow would
(open, convert, crop, bilinear resize, to an array), in turns: "fit" scales and cuts out the middle,
"crop" a random window of 0.08 to 1 of the area, mirrored or not. Prints medians of images per
second of one core's time, and the ratio; then images per second of batches with all cores. With a
config, the step of its first run is timed on JAX's devices, for what that would consume.
"""

import argparse
import io
import math
import os
import pathlib
import time

import ml_collections
import numpy as np
from PIL import Image

from icm_jax.data import geometry, images, open_source, pipeline

CROP = (0.08, 1.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--config", help="a file of configs/, and ':scale'")
    given = parser.parse_args()
    paths = sorted(p for p in given.folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        parser.error(f"no JPEG files in {given.folder}")
    files = [path.read_bytes() for path in paths[:256]]
    for kind in ("fit", "crop"):
        one_core(kind, files, (given.size,) * 2, given.rounds)
    rate = all_cores(given.folder, given.size)
    print(f"batches, {os.cpu_count()} cores, from files: {rate:.0f} images/s")
    if given.config:
        consumed = step_rate(given.config)
        print(f"a step of {given.config} consumes {consumed:.1f} images/s: {rate / consumed:.1f} ×")


def one_core(kind, files, canvas, rounds):
    """Prints medians of both readers."""

    def ours(data, rng):
        share = math.sqrt(CROP[0] if kind == "crop" else 1)
        least = tuple(math.ceil(side / share) for side in canvas)
        image = images.read_rgb(data, "", least)
        if kind == "fit":
            return geometry.fit(image, canvas)
        return geometry.random_view(image, canvas, CROP, rng)

    readers = {"icm_jax": ours, "Pillow": lambda data, rng: with_pillow(data, kind, canvas, rng)}
    times = {name: [] for name in readers}
    for number in range(rounds + 1):  # the first is not counted
        for name in sorted(readers, reverse=number % 2):
            rng = np.random.default_rng(0)
            began = time.process_time()
            for data in files:
                assert readers[name](data, rng).shape == (*canvas, 3)
            times[name].append(time.process_time() - began)
    rates = {name: len(files) / np.median(taken[1:]) for name, taken in times.items()}
    ratios = np.divide(times["Pillow"], times["icm_jax"])[1:]
    print(
        f"{kind} to {canvas[1]} × {canvas[0]}: "
        + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        + f" images/s of one core, {np.median(ratios):.2f} × ({ratios.min():.2f} to "
        f"{ratios.max():.2f})"
    )


def with_pillow(data: bytes, kind: str, canvas, rng) -> np.ndarray:
    """What a loader on Pillow alone does for the same view."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    if kind == "fit":  # the middle, cut out before it is scaled: the faster order
        scale = min(image.width / canvas[1], image.height / canvas[0])
        sides = min(scale * canvas[1], image.width), min(scale * canvas[0], image.height)
        corner = (image.width - sides[0]) / 2, (image.height - sides[1]) / 2
    else:  # as geometry.random_view
        scale = min(image.height / canvas[0], image.width / canvas[1])
        part = np.sqrt(rng.uniform(*CROP)) * scale
        squeeze = np.exp(rng.uniform(-1, 1) * np.log(4 / 3) / 2)
        sides = part * canvas[1] / squeeze, part * canvas[0] * squeeze
        sides = min(sides[0], image.width), min(sides[1], image.height)
        down, across = rng.uniform(size=2)
        corner = across * (image.width - sides[0]), down * (image.height - sides[1])
    ends = min(corner[0] + sides[0], image.width), min(corner[1] + sides[1], image.height)
    image = image.resize(canvas[::-1], Image.Resampling.BILINEAR, (*corner, *ends))
    if kind == "crop" and rng.uniform() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def all_cores(folder: pathlib.Path, size: int, seconds: float = 5.0) -> float:
    """Images per second of `pipeline.batches` of the folder, after a first batch."""
    source = open_source(ml_collections.ConfigDict(dict(name="photos", path=str(folder))), "train")
    batches = pipeline.batches(source, pipeline.BatchSpec(64, (size, size)), seed=0, stop=10**6)
    next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += len(next(batches)["image"])
    return count / (time.perf_counter() - began)


def step_rate(config: str, rounds: int = 3) -> float:
    """Images per second that the compiled step of a config's first run takes, on blank arrays."""
    import jax
    import jax.numpy as jnp

    from icm_jax.engine import plan
    from icm_jax.main import load_experiment

    path, _, scale = config.partition(":")
    module = load_experiment(path)
    run = module.runs(module.get_config(scale) if scale else module.get_config())[0]
    step, (*shapes, _) = plan.abstract_step(run, plan.open_target("local"))
    blank = lambda own: jax.device_put(jnp.zeros(own.shape, own.dtype), own.sharding)  # noqa: E731
    state, batch = jax.tree.map(blank, shapes)
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch, jax.random.key(0)))
        times.append(time.perf_counter() - began)
    return run.batch_size / float(np.median(times[1:]))


if __name__ == "__main__":
    main()
