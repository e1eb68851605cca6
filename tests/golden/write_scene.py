"""Writes FINGERPRINT.icm and FINGERPRINT.npz, after the model in the package was replaced.

    python tests/golden/write_scene.py

FINGERPRINT.npz holds what the file must decode to: latents, and pixels, within one level.
"""

import pathlib

import numpy as np
from PIL import Image

import icm_jax
from icm_jax.codecs import bitstream

GOLDEN = pathlib.Path(__file__).parent


def main():
    scene = np.asarray(Image.open(GOLDEN / "scene.png").convert("RGB"))
    codec = icm_jax.load()
    data = codec.compress(scene, quality=60)
    path = GOLDEN / f"{codec.fingerprint.hex()}.icm"
    path.write_bytes(data)
    latents = bitstream.decode_latents(codec, data).latents
    whole = {name: latents[name].astype(np.float32) for name in latents if name != "quality"}
    np.savez_compressed(path.with_suffix(".npz"), image=codec.decompress(data), **whole)


if __name__ == "__main__":
    main()
