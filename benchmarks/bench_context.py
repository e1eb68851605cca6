"""What a context model in raster order takes: seconds of a whole codec of CompressAI, of any size.

    python benchmarks/bench_context.py PICTURE --architecture mbt2018 --width 192 --channels 192
    python benchmarks/bench_context.py PICTURE ... --theirs     (CompressAI, where it is installed)

Weights are random, as times hardly depend on them. Printed is the best of a few rounds, and the
first, which compiles programs.
"""

import argparse
import time

import numpy as np
from PIL import Image


def timed(name: str, call, rounds: int):
    """The last result of some calls; prints the first and the least of the other times."""
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - began)
    print(f"{name:24} {min(seconds[1:]):8.3f} s   the first time {seconds[0]:.2f} s")
    return found


def ours(picture: np.ndarray, architecture: str, width: int, channels: int, rounds: int) -> None:
    import jax

    from icm_jax.codecs import bitstream, compressai_codec, walk
    from icm_jax.codecs.compressai import SERIAL
    from icm_jax.nets import context

    codec = compressai_codec(architecture, width, channels)
    variables = jax.jit(lambda: codec.init(jax.random.key(0), None))()
    frozen = bitstream.freeze(codec, variables, picture[None, :256, :256])
    shape = codec.segments[-1].shape(*picture.shape[:2])
    count = context.waves(*shape[:2]) if architecture in SERIAL else 1
    data = timed("compress", lambda: frozen.compress(picture), rounds)
    timed(
        "  analysis",
        lambda: walk.analyse(frozen.codec, frozen.on_device, picture[None], {}),
        rounds,
    )
    timed("decompress", lambda: frozen.decompress(data), rounds)
    timed("  latents", lambda: bitstream.decode_latents(frozen, data), rounds)
    print(f"{len(data):,} bytes; y of {shape[0]} × {shape[1]} positions in {count} waves")


def theirs(picture: np.ndarray, architecture: str, width: int, channels: int, rounds: int) -> None:
    import compressai.models as models
    import torch

    kinds = {
        "mbt2018-mean": lambda: models.MeanScaleHyperprior(width, channels),
        "mbt2018": lambda: models.JointAutoregressiveHierarchicalPriors(width, channels),
        "cheng2020-anchor": lambda: models.Cheng2020Anchor(width),
    }
    torch.manual_seed(0)
    network = kinds[architecture]().eval()
    network.update()
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        data = timed("compress", lambda: network.compress(x), rounds)
        timed("decompress", lambda: network.decompress(**data), rounds)


def main():
    parser = argparse.ArgumentParser(description="what a context model takes")
    parser.add_argument("picture", help="sides of at least 256, for CompressAI multiples of 64")
    parser.add_argument("--architecture", default="mbt2018")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--channels", type=int, default=192)
    parser.add_argument("--side", type=int, help="of a square out of its middle")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--theirs", action="store_true")
    options = parser.parse_args()
    picture = np.asarray(Image.open(options.picture).convert("RGB"))
    if options.side:
        top, left = ((side - options.side) // 2 for side in picture.shape[:2])
        picture = picture[top : top + options.side, left : left + options.side]
    run = theirs if options.theirs else ours
    run(picture, options.architecture, options.width, options.channels, options.rounds)


if __name__ == "__main__":
    main()
