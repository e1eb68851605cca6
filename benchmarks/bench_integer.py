"""What integer entropy parameters cost: bits with the integer hyper-synthesis over the float one's.

    python benchmarks/bench_integer.py RUN IMAGES

RUN is the folder of a finished run of configs/hyperprior.py. Both are the information of the same
rounded latents, at their table rows' scales (integers) and at the network's own (floats); written
bytes stand beside them. One line per quality, over all images.
"""

import argparse
import pathlib

import jax
import numpy as np
from PIL import Image

from icm_jax.codecs import bitstream
from icm_jax.codecs.codec import forward
from icm_jax.engine import checkpoint
from icm_jax.engine.frozen import freeze
from icm_jax.engine.run import load_run
from icm_jax.tasks import build_task

QUALITIES = (0, 25, 50, 75, 100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, help="folder of a run, with its config.json")
    parser.add_argument("images", type=pathlib.Path, help="folder of .png and .jpg files")
    options = parser.parse_args()
    run = load_run(options.run)
    codec = build_task(run.task).codec
    variables = checkpoint.load_variables(options.run)
    frozen = freeze(codec, variables, run)
    floats = jax.device_put(variables)

    @jax.jit
    def float_bits(variables, inputs):
        return forward(codec, variables, inputs, inputs["image"].shape[1:3]).bits

    qualities = QUALITIES if codec.qualities else (None,)
    totals = np.zeros((len(qualities), 3))
    paths = sorted(path for path in options.images.iterdir() if path.suffix in (".png", ".jpg"))
    for path in paths:
        image = np.asarray(Image.open(path).convert("RGB"))[None]
        for row, quality in enumerate(qualities):
            inputs = {"image": image}
            if quality is not None:
                inputs["quality"] = np.full(1, quality / 100, np.float32)
            exact = bitstream.estimate(frozen, image, quality=quality)
            real = jax.device_get(float_bits(floats, inputs))
            written = 8 * len(bitstream.encode(frozen, image, quality=quality)[0])
            totals[row] += [sum(v.sum() for v in exact.values()), sum(real.values())[0], written]
    print(f"{len(paths)} images, model {frozen.fingerprint.hex()}")
    for quality, (exact, real, written) in zip(qualities, totals, strict=True):
        print(
            f"quality {quality}: integer / float {exact / real:.5f}, "
            f"written / integer estimate {written / exact:.5f}"
        )


if __name__ == "__main__":
    main()
