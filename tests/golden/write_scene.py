"""Writes scene.png, scene.icm and scene.npz anew, after the model in the package was replaced.

    python tests/golden/write_scene.py

scene.npz holds what the file must decode to: latents z and y, and pixels, within one level.
"""

import pathlib

import numpy as np
from PIL import Image

import icm_jax
from icm_jax.codecs import bitstream
from icm_jax.data import scenes

GOLDEN = pathlib.Path(__file__).parent


def main():
    scene = scenes.draw(0, "validation", 3, 96)["image"]
    Image.fromarray(scene).save(GOLDEN / "scene.png")
    codec = icm_jax.load()
    data = codec.compress(scene, quality=60)
    (GOLDEN / "scene.icm").write_bytes(data)
    latents = bitstream.decode_latents(codec, data).latents
    whole = {name: latents[name].astype(np.float32) for name in ("z", "y")}
    np.savez_compressed(GOLDEN / "scene.npz", image=codec.decompress(data), **whole)


if __name__ == "__main__":
    main()
