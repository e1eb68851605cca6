"""The whole scale-hyperprior codec (N = 128, M = 192) against CompressAI's `bmshj2018-hyperprior`.

    python benchmarks/bench_codec.py

Each library runs in processes of its own, in turn, twice, with all cores; printed are medians and
ratios. Weights are random in both, so the bytes say nothing but that both write thousands of them:
a 768×512 image made of smoothed noise, compressed and decompressed; the analysis and synthesis
transforms alone; a training step of 8×256×256 (forward, backward, Adam). CompressAI (and PyTorch)
must be installed beside this package; without them only our own figures are printed.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time

import numpy as np

WIDTH, CHANNELS = 128, 192
HEIGHT, WIDTH_PX = 512, 768
ROUNDS = {"codec": 7, "train": 3}
PARTS = ("codec", "train")


def picture(height: int, width: int, count: int = 1) -> np.ndarray:
    """uint8 [count, height, width, 3] with the spectrum of photographs, about 1/f."""
    rng = np.random.default_rng(0)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    spectrum = rng.normal(size=(count, 3, height, width // 2 + 1, 2)) @ np.array([1, 1j])
    noise = np.fft.irfft2(spectrum / (np.hypot(y, x) + 1 / width), s=(height, width))
    noise = 128 + 50 * noise / noise.std()
    return noise.transpose(0, 2, 3, 1).clip(0, 255).astype(np.uint8)


def median(call, rounds: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def ours(part: str) -> dict:
    import jax
    import ml_collections
    import optax

    from icm_jax.codecs import bitstream, image_codec
    from icm_jax.engine.train import TrainState, make_step
    from icm_jax.tasks import build_task

    codec = image_codec("scale_hyperprior", WIDTH, CHANNELS)
    if part == "codec":
        image = picture(HEIGHT, WIDTH_PX)[0]
        variables = jax.jit(codec.init)(jax.random.key(0), image[None])
        frozen = bitstream.freeze(codec, variables, image[None, :256, :256])
        data = frozen.compress(image)
        analyse = jax.jit(codec.tiling.front)
        y = analyse(frozen.on_device, {"image": image[None]})
        synthesise = jax.jit(
            lambda variables, y: codec.outputs["image"](variables, {"y": y}, (HEIGHT, WIDTH_PX))
        )
        rounds = ROUNDS[part]
        return {
            "compress": median(lambda: frozen.compress(image), rounds),
            "decompress": median(lambda: frozen.decompress(data), rounds),
            "analysis": median(
                lambda: jax.block_until_ready(analyse(frozen.on_device, {"image": image[None]})),
                rounds,
            ),
            "synthesis": median(
                lambda: jax.block_until_ready(synthesise(frozen.on_device, y)), rounds
            ),
            "bytes": len(data),
        }
    config = ml_collections.ConfigDict(
        dict(
            name="image_compression",
            codec=dict(name="image", kind="scale_hyperprior", width=WIDTH, channels=CHANNELS),
            metric="mse",
            ms_ssim_weight=0.0,
            lambdas=(0.01,),
            size=256,
            straight_through=False,
        )
    )
    task, optimiser = build_task(config), optax.adam(1e-4)
    batch, key = {"image": picture(256, 256, 8)}, jax.random.key(0)
    variables = task.init(key, batch) | {"constants": dict(task.constants)}
    state = TrainState(
        jax.numpy.zeros((), jax.numpy.int32), variables, optimiser.init(variables["params"]), {}
    )
    step = jax.jit(make_step(task, optimiser, ml_collections.ConfigDict({"ema": 0.0})))
    return {
        "training step": median(
            lambda: jax.block_until_ready(step(state, batch, key)), ROUNDS[part]
        )
    }


def compressai(part: str) -> dict:
    import torch
    from compressai.zoo import bmshj2018_hyperprior

    torch.manual_seed(0)
    # Quality 1 to 5 are N = 128, M = 192; channels-last is CompressAI's faster layout on CPUs.
    model = bmshj2018_hyperprior(quality=3, pretrained=False)
    model = model.to(memory_format=torch.channels_last)
    size = (HEIGHT, WIDTH_PX, 1) if part == "codec" else (256, 256, 8)
    x = torch.from_numpy(picture(*size)).permute(0, 3, 1, 2).float() / 255
    x = x.contiguous(memory_format=torch.channels_last)
    rounds = ROUNDS[part]
    if part == "codec":
        model.eval()
        model.update(force=True)
        with torch.no_grad():
            coded = model.compress(x)
            y = model.g_a(x)
            size = sum(len(string[0]) for string in coded["strings"])
            return {
                "compress": median(lambda: model.compress(x), rounds),
                "decompress": median(lambda: model.decompress(**coded), rounds),
                "analysis": median(lambda: model.g_a(x), rounds),
                "synthesis": median(lambda: model.g_s(y), rounds),
                "bytes": size,
            }
    optimiser = torch.optim.Adam(model.parameters(), 1e-4)

    def step():
        optimiser.zero_grad()
        out = model(x)
        bits = -sum(torch.log2(p).sum() for p in out["likelihoods"].values()) / (8 * 256 * 256)
        loss = bits + 0.01 * 255**2 * torch.mean((out["x_hat"] - x) ** 2)
        loss.backward()
        optimiser.step()

    return {"training step": median(step, rounds)}


LIBRARIES = {"icm_jax": ours, "compressai": compressai}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=2, metavar=("LIBRARY", "PART"), help=argparse.SUPPRESS)
    child = parser.parse_args().child
    if child:
        result = LIBRARIES[child[0]](child[1])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result | {f"peak memory, {child[1]}": peak}))
        return
    libraries = ["icm_jax", *filter(importlib.util.find_spec, ["compressai"])]
    found: dict[str, dict[str, list[float]]] = {name: {} for name in libraries}
    for part in PARTS:
        for name in 2 * libraries:
            command = [sys.executable, __file__, "--child", name, part]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for key, value in json.loads(output.splitlines()[-1]).items():
                found[name].setdefault(key, []).append(value)
    for key in found["icm_jax"]:
        values = [float(np.median(found[name][key])) for name in libraries]
        shown = [written(key, value) for value in values]
        ratio = f"{values[1] / values[0]:6.2f} ×" if len(values) > 1 and key != "bytes" else ""
        cells = "  ".join(f"{name} {text:>10}" for name, text in zip(libraries, shown, strict=True))
        print(f"{key:20} {cells}  {ratio}")
    if len(libraries) > 1:
        print("ratio: CompressAI's over ours; above 1 ours is faster or smaller")


def written(key: str, value: float) -> str:
    if key == "bytes":
        return f"{value:,.0f}"
    return f"{value / 2**20:,.0f} MiB" if "memory" in key else f"{1e3 * value:,.0f} ms"


if __name__ == "__main__":
    main()
