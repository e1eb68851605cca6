"""Detection from the base layer of a scalable file against detection on a decoded picture.

    python benchmarks/bench_scalable.py [--side 416] [--classes 80] [--detector 1.0] [--rounds 5]

Weights are random, which changes the number of bits but no shape. Three ways from bytes to boxes
take turns on one image:

    base       base layer -> f_hat -> tail of the detector
    picture    both layers -> x_hat -> whole detector
    single     file of a single-layer hyperprior -> x_hat -> whole detector

Prints median milliseconds and, counted on the programs themselves, multiply-accumulates of their
convolutions and matrix products.
"""

import argparse
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from icm_jax.codecs import bitstream, image_codec, scalable_codec
from icm_jax.coding import container
from icm_jax.engine.cost import multiply_accumulates
from icm_jax.nets.yolo import yolov3
from icm_jax.tasks import build_task


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=416, help="of the image, in pixels")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--detector", type=float, default=1.0, help="width factor of YOLOv3")
    parser.add_argument("--width", type=int, default=128, help="N")
    parser.add_argument("--base", type=int, default=128, help="C_b")
    parser.add_argument("--enhancement", type=int, default=64, help="C_e")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    channels = given.base, given.enhancement
    scalable = scalable_codec(
        "disentangled", given.width, *channels, 2, yolov3(given.classes, given.detector)
    )
    single = image_codec("scale_hyperprior", given.width, sum(channels))
    rng = np.random.default_rng(0)
    image = smooth(rng, given.side)[None]
    codecs = {}
    for name, codec in (("scalable", scalable), ("single", single)):
        codecs[name] = bitstream.freeze(codec, drawn(codec, image, rng), image)
    own = dict(name="yolov3", width=given.detector, depth=1.0)
    fields = dict(name="detection", classes=given.classes, detector=own)
    fields |= dict(dtype="float32", size=given.side, anchor_scale=1.0, crop=(1.0, 1.0))
    task = build_task(ConfigDict(dict(fields, least=0.1, overlap=0.45, limit=100)))
    predict = jax.jit(task.predict)
    detector = codecs["scalable"].on_device
    whole = bitstream.encode(codecs["scalable"], image)[0]
    files = {"base": container.prefix(whole, 1), "picture": whole}
    files["single"] = bitstream.encode(codecs["single"], image)[0]

    def detect(name):
        layers, output = (1, "feature") if name == "base" else (None, "image")
        frozen = codecs["single" if name == "single" else "scalable"]
        decoded = bitstream.decode(frozen, [files[name]], output, layers=layers)
        return jax.block_until_ready(predict(detector, {output: decoded}))

    times = {name: [] for name in files}
    for _ in range(given.rounds + 1):
        for name, own in times.items():
            began = time.perf_counter()
            detect(name)
            own.append(1e3 * (time.perf_counter() - began))
    print(f"{given.side} × {given.side} pixels, {jax.devices()[0].device_kind}")
    first = None
    for name, own in times.items():
        median = float(np.median(own[1:]))  # the first round compiles
        frozen = codecs["single" if name == "single" else "scalable"]
        count = decoding_macs(frozen, files[name], name) + multiply_accumulates(
            task.predict, detector, example(scalable, image, name)
        )
        first = first or (median, count)
        print(
            f"  {name:8} {len(files[name]):9,} bytes  {median:8.1f} ms ({median / first[0]:.2f} ×)"
            f"  {count / 1e9:7.2f} G multiply-accumulates ({count / first[1]:.2f} ×)"
        )


def example(codec, image, name) -> dict:
    """The detector's input, by shape."""
    if name != "base":
        return {"image": jax.ShapeDtypeStruct(image.shape, jnp.float32)}
    shape = image.shape[1:3]
    variables = jax.eval_shape(codec.init, jax.random.key(0), image)
    latents = {
        s.name: jax.ShapeDtypeStruct((1, *s.shape(*shape)), jnp.float32) for s in codec.segments
    }
    output = codec.outputs["feature"]
    return {"feature": jax.eval_shape(lambda v, d: output(v, d, shape), variables, latents)}


def decoding_macs(frozen, data: bytes, name: str) -> int:
    """Of the hyper-syntheses and the synthesis that decoding a file runs."""
    layers = 1 if name == "base" else None
    decoded, header = bitstream.decode_latents(frozen, data, layers=layers)
    output = "feature" if name == "base" else "image"
    variables, shape = frozen.on_device, header.shape
    total = multiply_accumulates(
        lambda v, d: frozen.codec.outputs[output](v, d, shape), variables, decoded
    )
    for segment in frozen.codec.segments:
        if layers is None or segment.layer < layers:
            own = (1, *segment.shape(*shape))
            total += multiply_accumulates(
                lambda v, d, s=segment, o=own: s.prior(v, d, o).index, variables, decoded
            )
    return total


def smooth(rng, side: int) -> np.ndarray:
    """uint8 [side, side, 3] without much detail."""
    small = jnp.asarray(rng.uniform(0, 255, (side // 16, side // 16, 3)), jnp.float32)
    return np.asarray(jax.image.resize(small, (side, side, 3), "cubic").clip(0, 255), np.uint8)


def drawn(codec, image, rng):
    """Initial variables, the detector's drawn here: compiling its own start takes minutes."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(codec.init, key, image)
    if "detector" not in shapes["params"]:
        return jax.jit(codec.init)(key, image)

    def leaf_of(path, leaf):
        if path[-1].key == "kernel":
            scale = math.prod(leaf.shape[:3]) ** -0.5
            return rng.normal(0, scale, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    detector = {name: {"detector": tree["detector"]} for name, tree in shapes.items()}
    variables = jax.tree_util.tree_map_with_path(leaf_of, detector)
    own = jax.jit(lambda: codec.init(key, image)["params"]["scalable"])()
    variables["params"]["scalable"] = own
    return variables


if __name__ == "__main__":
    main()
