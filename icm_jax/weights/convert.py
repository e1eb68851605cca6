"""Checkpoints of CompressAI as codec files: `icm import`.

Transforms and densities are taken as they are. The network that tells scales and means becomes one
of integers, whose ranges are set on pictures; on the same pictures is counted what that costs.
"""

import os
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np
import tqdm

from icm_jax.codecs import bitstream, model_file, walk
from icm_jax.codecs.bitstream import FrozenCodec
from icm_jax.data.images import read_rgb
from icm_jax.data.sources import SUFFIXES as PICTURES
from icm_jax.errors import IcmError
from icm_jax.files import listed, read
from icm_jax.weights import compressai
from icm_jax.weights.compressai import Checkpoint

SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt")
"""Of checkpoints in folders."""
MOST = 16
"""Pictures, evenly spread over those of a folder."""
GRID, LONGEST = 64, 512
"""Sides of what is taken from a picture's middle: multiples of one, the other at most."""


def codec_file(
    path: str | os.PathLike,
    architecture: str | None,
    folder: str | None,
) -> bytes:
    """The .icmc file of a checkpoint; on standard error, what it is and what freezing cost.

    Args:
      architecture: what the file has to be, or None to take what it is.
      folder: with typical pictures, or None.

    Raises: IcmError as `compressai.read` and `middles`, for a codec with a hyperprior and no
      folder, or for one that cannot be frozen.
    """
    found, name = compressai.read(path, architecture), pathlib.Path(path).name
    if folder is None and any(segment.spent for segment in found.codec.segments):
        raise IcmError(
            f"{path} is {found.architecture}, whose hyper-synthesis becomes a network of integers; "
            "their ranges are set on pictures: give --calibrate FOLDER, with a dozen typical ones"
        )
    pictures = np.zeros((1, GRID, GRID, 3), np.uint8) if folder is None else middles(folder)
    frozen = bitstream.freeze(found.codec, found.variables, pictures)
    what = f"{found.architecture}, N = {found.width}, M = {found.channels}"
    told, about = [f"{name}: {what}"], f"CompressAI's {what}, imported from {name}"
    if folder is not None:
        bits = counted(found, frozen, pictures)
        count, height, width, _ = pictures.shape
        told += [
            f"  bits per pixel of {count} pictures, {height} × {width} of the middle of each:",
            f"  {bits.floats:.4f}           in floats, as CompressAI estimates",
            f"  {bits.integers:.4f} {bits.cost:+8.2%}  with integers for scales and means",
            f"  {bits.files:.4f} {bits.files / bits.floats - 1:+8.2%}  whole files",
        ]
        about += f"; integers cost {bits.cost:+.2%} bits on the {count} pictures they were set on"
    content = model_file.packed(frozen, licence="that of the weights imported", description=about)
    told.append(f"  model {frozen.fingerprint.hex()}, {len(content):,} bytes")
    print("\n".join(told), file=sys.stderr)
    return content


def middles(folder: str) -> np.ndarray:
    """uint8 [N, H, W, 3], of one size: the middles of at most `MOST` pictures of a folder.

    Raises: IcmError if there are none, or one cannot be read or has a side below `GRID`.
    """
    names = [file.name for file in listed([folder], PICTURES, recursive=True)]
    chosen = np.linspace(0, len(names) - 1, min(len(names), MOST)).round().astype(int)
    images = [(names[number], read_rgb(read(names[number]), names[number])) for number in chosen]
    for name, image in images:
        if min(image.shape[:2]) < GRID:
            raise IcmError(f"{name} has {image.shape[0]} × {image.shape[1]} pixels, below {GRID}")
    least = [min(image.shape[axis] for _, image in images) for axis in (0, 1)]
    height, width = (min(side, LONGEST) // GRID * GRID for side in least)

    def middle(image):
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        return image[top : top + height, left : left + width]

    return np.stack([middle(image) for _, image in images])


class Bits(NamedTuple):
    """Per pixel: as the networks in floats estimate them, as those of integers do, of files."""

    floats: float
    integers: float
    files: float

    @property
    def cost(self) -> float:
        """Of integers in place of floats, as a share."""
        return self.integers / self.floats - 1


def counted(found: Checkpoint, frozen: FrozenCodec, pictures: np.ndarray) -> Bits:
    """What pictures, uint8 [N, H, W, 3], take before and after freezing."""
    variables = jax.device_put(found.variables, jax.local_devices()[0])
    total = np.zeros(3)
    for number in tqdm.trange(len(pictures), unit="picture", disable=not sys.stderr.isatty()):
        picture = pictures[number : number + 1]
        floats = walk.maps(found.codec, variables, {"image": picture})
        integers = bitstream.estimate(frozen, picture)
        stream = bitstream.encode(frozen, picture)[0]
        total += [sum(map(np.sum, floats.values())), sum(map(np.sum, integers.values())), 0]
        total[2] += 8 * len(stream)
    return Bits(*(total / pictures[..., 0].size).tolist())
