"""The whole scale-hyperprior codec (N = 128, M = 192) against CompressAI's `bmshj2018-hyperprior`.

    python benchmarks/bench_codec.py
    python benchmarks/bench_codec.py --isa avx2

Each library runs in processes of its own, in turn, --turns times, with all cores; printed are
medians, by the clock and of the time of all cores together, and ratios: a 768×512 image made of
smoothed noise, compressed and decompressed; the analysis and synthesis transforms alone; a training
step of 8×256×256 (forward, backward, Adam).

Weights are random, but scaled so that both libraries code the same work: y by one factor, found by
bisection, until the file has --bytes within 1 %; z to a standard deviation of 2; and the last layer
of the hyper-synthesis so that it gives each channel of y about the scale that it has. CompressAI
(and PyTorch) must be installed beside this package; without them only our own figures are printed.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np

WIDTH, CHANNELS = 128, 192
HEIGHT, WIDTH_PX = 512, 768
ROUNDS = {"codec": 7, "train": 3}
PARTS = ("codec", "train")
BYTES, TOLERANCE = 40_000, 0.01
# MKL is PyTorch's for matrix products. YNNPACK, XLA's for convolutions and products, takes what the
# processor has whatever it is told, so XLA does without and leaves them to Eigen and oneDNN.
ISA = {
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX512",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2 --xla_cpu_experimental_ynn_fusion_type=",
    },
}


def picture(height: int, width: int, count: int = 1) -> np.ndarray:
    """uint8 [count, height, width, 3] with the spectrum of photographs, about 1/f."""
    rng = np.random.default_rng(0)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    spectrum = rng.normal(size=(count, 3, height, width // 2 + 1, 2)) @ np.array([1, 1j])
    noise = np.fft.irfft2(spectrum / (np.hypot(y, x) + 1 / width), s=(height, width))
    noise = 128 + 50 * noise / noise.std()
    return noise.transpose(0, 2, 3, 1).clip(0, 255).astype(np.uint8)


def times(calls: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each call, by the clock and of all cores, after one that is not counted."""
    found = {}
    for name, call in calls.items():
        call()
        taken = []
        for _ in range(rounds):
            start = time.perf_counter(), time.process_time()
            call()
            taken.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        found[name], found[f"{name}, cores"] = map(float, np.median(taken, axis=0))
    return found


def at_bytes(coded_with, wanted: int):
    """What `coded_with`(logarithm of a factor), a tuple that ends in a string's or strings' bytes,
    gives where these are as wanted, by bisection."""
    low, high = -5.0, 12.0
    for _ in range(20):
        middle = (low + high) / 2
        found = coded_with(middle)
        if abs(found[-1] - wanted) <= TOLERANCE * wanted:
            return found
        low, high = (middle, high) if found[-1] < wanted else (low, middle)
    raise SystemExit(f"error: no factor gives {wanted} bytes; the last gave {found[-1]}")


def our_codec(image: np.ndarray, wanted: int):
    """(codec with scaled random weights, its file of an image, its bytes)."""
    import jax

    from icm_jax.codecs import bitstream, image_codec
    from icm_jax.coding.tables import SCALES

    codec = image_codec("scale_hyperprior", WIDTH, CHANNELS)
    variables = jax.device_get(jax.jit(codec.init)(jax.random.key(0), image[None]))
    weights = variables["params"]["image_codec"]
    analyse = jax.jit(codec.analyse)
    y = np.asarray(analyse(variables, {"image": image[None]})["y"])
    first, spread = weights["gain"]["log_gain"], y.std(axis=(0, 1, 2))
    last = weights["hyper_analysis"]["Down_1"]
    kernel, scales = last["kernel"], weights["hyper_synthesis"]["Conv_0"]

    def coded_with(log_factor: float):
        weights["gain"] = {"log_gain": first + log_factor, "log_inverse": first + log_factor}
        last["kernel"] = kernel
        z = analyse(variables, {"image": image[None]})["z"]
        last["kernel"] = kernel * 2 / np.std(z)
        # HyperSynthesis gives 64 times this plus 18, an index into the table of scales.
        index = np.interp(np.log(np.exp(log_factor) * spread), np.log(SCALES), np.arange(64))
        scales["bias"] = ((index - 18) / 64).astype(np.float32)
        frozen = bitstream.freeze(codec, variables, image[None])
        data = frozen.compress(image)
        return frozen, data, len(data)

    return at_bytes(coded_with, wanted)


def ours(part: str, wanted: int) -> dict:
    import jax
    import ml_collections
    from accelerator_cases import our_training

    from icm_jax.engine.run import Run
    from icm_jax.tasks import build_task

    if part == "codec":
        image = picture(HEIGHT, WIDTH_PX)[0]
        frozen, data, _ = our_codec(image, wanted)
        codec = frozen.codec
        analyse = jax.jit(codec.tiling.front)
        y = analyse(frozen.on_device, {"image": image[None]})
        synthesise = jax.jit(
            lambda variables, y: codec.outputs["image"](variables, {"y": y}, (HEIGHT, WIDTH_PX))
        )
        inputs = {"image": image[None]}
        calls = {
            "compress": lambda: frozen.compress(image),
            "decompress": lambda: frozen.decompress(data),
            "analysis": lambda: jax.block_until_ready(analyse(frozen.on_device, inputs)),
            "synthesis": lambda: jax.block_until_ready(synthesise(frozen.on_device, y)),
        }
        return times(calls, ROUNDS[part]) | {"bytes": len(data)}
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
    optim = dict(name="adam", learning_rate=1e-4, schedule="constant", warmup_steps=0)
    optim |= dict(weight_decay=0.0, clip_norm=0.0)
    run = Run(
        name="step",
        seed=0,
        task=config,
        data=ml_collections.ConfigDict({"canvas": 256}),
        optim=ml_collections.ConfigDict(optim),
        batch_size=8,
        steps=100,
        log_every=100,
        save_every=100,
    )
    _, step = our_training(run, build_task(config), {"image": picture(256, 256, 8)})
    calls = {"training step": lambda: jax.block_until_ready(step())}
    return times(calls, ROUNDS[part])


def their_codec(model, x, wanted: int):
    """(what CompressAI's model, its random weights scaled, writes of an image, its bytes)."""
    import torch

    last, first, narrow, scales = model.g_a[-1], model.g_s[0], model.h_a[-1], model.h_s[-2]
    analysis, synthesis, hyper, scale = (
        layer.weight.clone() for layer in (last, first, narrow, scales)
    )
    bias, spread = last.bias.clone(), model.g_a(x).std(dim=(0, 2, 3))

    def coded_with(log_factor: float):
        factor = float(np.exp(log_factor))
        last.weight.copy_(analysis * factor)
        last.bias.copy_(bias * factor)
        first.weight.copy_(synthesis / factor)
        narrow.weight.copy_(hyper)
        narrow.weight.mul_(2 / model.h_a(model.g_a(x).abs()).std())
        scales.weight.copy_(scale * factor * spread.reshape(-1, 1, 1, 1))
        scales.bias.copy_(factor * spread)
        coded = model.compress(x)
        return coded, sum(len(string[0]) for string in coded["strings"])

    with torch.no_grad():
        return at_bytes(coded_with, wanted)


def compressai(part: str, wanted: int) -> dict:
    import torch
    from compressai.zoo import bmshj2018_hyperprior

    torch.manual_seed(0)
    # Quality 1 to 5 are N = 128, M = 192; channels-last is CompressAI's faster layout on CPUs.
    model = bmshj2018_hyperprior(quality=3, pretrained=False)
    model = model.to(memory_format=torch.channels_last)
    size = (HEIGHT, WIDTH_PX, 1) if part == "codec" else (256, 256, 8)
    x = torch.from_numpy(picture(*size)).permute(0, 3, 1, 2).float() / 255
    x = x.contiguous(memory_format=torch.channels_last)
    if part == "codec":
        model.eval()
        model.update(force=True)
        with torch.no_grad():
            coded, size = their_codec(model, x, wanted)
            y = model.g_a(x)
            calls = {
                "compress": lambda: model.compress(x),
                "decompress": lambda: model.decompress(**coded),
                "analysis": lambda: model.g_a(x),
                "synthesis": lambda: model.g_s(y),
            }
            return times(calls, ROUNDS[part]) | {"bytes": size}
    optimiser = torch.optim.Adam(model.parameters(), 1e-4)

    def step():
        optimiser.zero_grad()
        out = model(x)
        bits = -sum(torch.log2(p).sum() for p in out["likelihoods"].values()) / (8 * 256 * 256)
        loss = bits + 0.01 * 255**2 * torch.mean((out["x_hat"] - x) ** 2)
        loss.backward()
        optimiser.step()

    return times({"training step": step}, ROUNDS[part])


LIBRARIES = {"icm_jax": ours, "compressai": compressai}


def surroundings(isa: str) -> dict[str, str]:
    """The environment of a child that may take no other instructions than `isa`."""
    environment, limits = dict(os.environ), ISA.get(isa, {})
    flags = f"{environment.get('XLA_FLAGS', '')} {limits.get('XLA_FLAGS', '')}".strip()
    return environment | limits | ({"XLA_FLAGS": flags} if flags else {})


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=2, metavar=("LIBRARY", "PART"), help=argparse.SUPPRESS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--turns", type=int, default=2, help="processes of each library and part")
    parser.add_argument("--bytes", type=int, default=BYTES, help=f"of each file ({BYTES:,})")
    parser.add_argument(
        "--isa",
        choices=ISA,
        default="",
        help="instructions that both libraries may use at most, in place of all that this CPU has: "
        "sets ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS for PyTorch, "
        "--xla_cpu_max_isa, ONEDNN_MAX_CPU_ISA and, for avx2, XLA without YNNPACK, which has no "
        "such limit, for JAX; our range coder, a hundredth of the time, stays as it is",
    )
    return parser.parse_args()


def main():
    given = options()
    if given.child:
        library, part = given.child
        result = LIBRARIES[library](part, given.bytes)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result | {f"peak memory, {part}": peak}))
        return
    libraries = ["icm_jax", *filter(importlib.util.find_spec, ["compressai"])]
    found: dict[str, dict[str, list[float]]] = {name: {} for name in libraries}
    for part in given.parts:
        for name in given.turns * libraries:
            command = [sys.executable, __file__, "--bytes", str(given.bytes)]
            command += ["--child", name, part]
            output = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=surroundings(given.isa)
            ).stdout
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
