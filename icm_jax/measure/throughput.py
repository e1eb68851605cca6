"""Images per second: of a network on what lies on the device, and of the whole path from bytes."""

import concurrent.futures
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import simplejpeg

from icm_jax.codecs import bitstream
from icm_jax.data import pipeline
from icm_jax.engine.cost import held, multiply_accumulates


class Path(NamedTuple):
    """One way from files to predictions.

    predict: (variables, inputs) -> anything; variables: its weights, on the device; files: of one
    batch; read: one file -> its row of the inputs, {name: array}; decoding: multiply-accumulates
    of networks in `read`; decoder_bytes: what these hold at once, for a batch.
    """

    predict: Callable
    variables: dict
    files: list[bytes]
    read: Callable
    decoding: int = 0
    decoder_bytes: int = 0


def jpeg_path(predict, variables, images: np.ndarray, quality: int, coefficients: bool) -> Path:
    """From JPEG files of the images, uint8 [N, H, W, 3], to predictions.

    Args:
      coefficients: read DCT coefficients (sides are multiples of 16); else decode to RGB.
    """
    files = [pipeline.write_jpeg(image, quality) for image in images]

    def read(data: bytes) -> dict:
        if coefficients:
            return pipeline.read_planes(data, "a JPEG file", images.shape[1:3])
        return {"image": simplejpeg.decode_jpeg(data)}

    return Path(predict, jax.device_put(variables), files, read)


def stream_path(predict, variables, images: np.ndarray, frozen, output: str) -> Path:
    """From .icm files of the images to predictions on the output of their codec."""
    files = bitstream.encode(frozen, images)

    def read(data: bytes) -> dict:
        return {output: bitstream.decode(frozen, [data], output)[0]}

    decoded, header = bitstream.decode_latents(frozen, files[0])

    def decoder(variables, latents):
        return frozen.codec.outputs[output](variables, latents, header.shape)

    decoding = multiply_accumulates(decoder, frozen.on_device, decoded)
    batch = jax.tree.map(lambda x: np.zeros((len(files), *x.shape[1:]), x.dtype), decoded)
    size = held(jax.jit(decoder).lower(frozen.on_device, batch).compile())
    return Path(predict, jax.device_put(variables), files, read, decoding, size)


def measure(paths: dict[str, Path], rounds: int = 5) -> dict[str, dict]:
    """Times paths in turns.

    Returns: per path, medians over the rounds: network_images_per_second; images_per_second, files
      read by as many threads as there are cores, a batch ahead of the device; read_per_second, the
      reading alone; and, counted, multiply_accumulates of an image, decoding included, parameters
      of all networks, and peak_bytes, which the programs of a batch take at once: the network's or,
      where it takes more, that of a codec's decoder.
    """
    found: dict[str, dict] = {}
    times: dict[str, list] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        ready: dict[str, tuple] = {}
        for name, path in paths.items():
            inputs = _stacked(path, pool)
            program = jax.jit(path.predict).lower(path.variables, inputs).compile()
            ready[name] = program, inputs, jax.device_put(inputs)
            macs = multiply_accumulates(path.predict, path.variables, inputs)
            weights = jax.tree.leaves(path.variables["params"])
            found[name] = {
                "multiply_accumulates": macs // len(path.files) + path.decoding,
                "parameters": sum(leaf.size for leaf in weights),
                "peak_bytes": max(held(program), path.decoder_bytes),
            }
            times[name] = []
            jax.block_until_ready(program(path.variables, inputs))
        for _ in range(rounds):
            for name, path in paths.items():
                predict, inputs, placed = ready[name]
                times[name].append(_once(path, predict, inputs, placed, pool))
    for name, seconds in times.items():
        network, whole, reading = (len(paths[name].files) / t for t in np.median(seconds, axis=0))
        found[name] |= {
            "network_images_per_second": float(network),
            "images_per_second": float(whole),
            "read_per_second": float(reading),
        }
    return found


def _once(path: Path, predict, inputs, on_device, pool) -> tuple[float, float, float]:
    """Seconds of a batch: the network alone, the whole path, reading."""
    began = time.perf_counter()
    jax.block_until_ready(predict(path.variables, on_device))
    network = time.perf_counter() - began
    began = time.perf_counter()
    _stacked(path, pool)
    reading = time.perf_counter() - began
    began = time.perf_counter()
    running = predict(path.variables, inputs)  # as a batch before would
    following = _stacked(path, pool)
    jax.block_until_ready((running, jax.device_put(following)))
    return network, time.perf_counter() - began, reading


def _stacked(path: Path, pool) -> dict[str, np.ndarray]:
    rows = list(pool.map(path.read, path.files))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
