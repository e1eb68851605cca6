"""Classical formats as rivals: whole files, measured, through well-kept encoders.

JPEG, WebP, AVIF and HEIF code YCbCr 4:2:0. JPEG uses optimised Huffman tables (libjpeg-turbo), WebP
its slowest method, AVIF libavif's default speed; JPEG 2000 (OpenJPEG) the irreversible wavelet and
colour transform.
HEIF (libheif with x265) and JPEG XL (libjxl) come with the extra `formats`.
"""

import functools
import importlib
import io

import numpy as np
from PIL import Image, features

from icm_jax.errors import IcmError

FORMATS = {
    "jpeg": {"optimize": True, "subsampling": "4:2:0"},
    "webp": {"method": 6},
    "avif": {"subsampling": "4:2:0", "speed": 6},
    "jpeg2000": {"quality_mode": "dB", "irreversible": True, "mct": 1},
    "heif": {"chroma": 420},
    "jxl": {},
}
_FEATURES = {"jpeg": "jpg", "webp": "webp", "avif": "avif", "jpeg2000": "jpg_2000"}


def available(codec: str) -> bool:
    """Whether a format can be written with what is installed."""
    if codec in _FEATURES:
        return bool(features.check(_FEATURES[codec]))
    return codec in _plugins()


@functools.cache
def _plugins() -> tuple[str, ...]:
    """Formats that Pillow writes with the help of other packages, which are registered here."""
    found = []
    for name, package in (("heif", "pillow_heif"), ("jxl", "pillow_jxl")):
        try:
            plugin = importlib.import_module(package)
        except ImportError:
            continue
        if name == "heif":
            plugin.register_heif_opener()
        found.append(name)
    return tuple(found)


def encode(image: np.ndarray, codec: str, quality: float) -> bytes:
    """The file of a uint8 [H, W, 3] image.

    Args:
      codec: a key of `FORMATS`.
      quality: 0 to 100, higher is better; of JPEG 2000 the PSNR to aim at, in dB.

    Raises: IcmError for a format that is unknown or not installed.
    """
    if not available(codec):
        raise IcmError(f"cannot write {codec!r} here; formats are {', '.join(FORMATS)}")
    options = dict(FORMATS[codec])
    options |= {"quality_layers": [quality]} if codec == "jpeg2000" else {"quality": int(quality)}
    file = io.BytesIO()
    Image.fromarray(image).save(file, codec.upper(), **options)
    return file.getvalue()


def decode(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    _plugins()
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def table_bytes(data: bytes) -> int:
    """Bytes of a JPEG file that are not image: quantisation and Huffman tables, headers.

    On images of a few thousand pixels they are most of the file at low quality, so reports give the
    rate without them, too.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xDA:  # start of scan: entropy-coded data follow its header
            return at + 2 + length
        at += 2 + length
    return len(data)
