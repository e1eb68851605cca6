"""Classical formats as rivals: whole files, measured, through well-kept encoders.

JPEG, WebP, AVIF and HEIF code YCbCr 4:2:0. JPEG uses optimised Huffman tables (libjpeg-turbo), WebP
its slowest method, AVIF libavif's default speed; JPEG 2000 (OpenJPEG) the irreversible wavelet and
colour transform.
HEIF (libheif with x265), JPEG XL (libjxl) and VVC intra (VVenC through FFmpeg; YCbCr 4:2:0 in 10
bits, preset "medium" without its perceptual adaptation) come with the extra `formats`.
"""

import functools
import importlib
import io
import struct
import subprocess

import numpy as np
from PIL import Image, features

from icm_jax.data.fields import Field, number
from icm_jax.errors import IcmError

FORMATS = {
    "jpeg": {"optimize": True, "subsampling": "4:2:0"},
    "webp": {"method": 6},
    "avif": {"subsampling": "4:2:0", "speed": 6},
    "jpeg2000": {"quality_mode": "dB", "irreversible": True, "mct": 1},
    "heif": {"chroma": 420},
    "jxl": {},
    "vvc": {},
}


def _steps(most: int) -> Field:
    whole = lambda value: number(0, most).fits(value) and value == int(value)  # noqa: E731
    return Field(f"a whole number from 0 to {most}", whole)


QUALITIES = dict.fromkeys(FORMATS, _steps(100))
QUALITIES |= {"jpeg2000": number(above=0, most=120), "vvc": _steps(63)}
"""What qualities there are; see `encode`."""
_FEATURES = {"jpeg": "jpg", "webp": "webp", "avif": "avif", "jpeg2000": "jpg_2000"}


def available(codec: str) -> bool:
    """Whether a format can be written with what is installed."""
    if codec in _FEATURES:
        return bool(features.check(_FEATURES[codec]))
    return _ffmpeg() is not None if codec == "vvc" else codec in _plugins()


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


def encode(image: np.ndarray, codec: str, quality: float | None) -> bytes:
    """The file of a uint8 [H, W, 3] image.

    Args:
      codec: a key of `FORMATS`.
      quality: 0 to 100, higher is better; of JPEG 2000 the PSNR to aim at, in dB; of VVC its
        quantisation parameter, 0 to 63, lower is better.

    Raises: IcmError for a format that is unknown or not installed, or without a quality.
    """
    if not available(codec):
        raise IcmError(f"cannot write {codec!r} here; formats are {', '.join(FORMATS)}")
    if quality is None:
        raise IcmError(f"a file of the format {codec!r} needs a quality; none was given")
    if codec == "vvc":
        return _encode_vvc(image, int(quality))
    options = dict(FORMATS[codec])
    options |= {"quality_layers": [quality]} if codec == "jpeg2000" else {"quality": int(quality)}
    file = io.BytesIO()
    Image.fromarray(image).save(file, codec.upper(), **options)
    return file.getvalue()


def decode(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    if data[4:8] == _START:
        return _decode_vvc(data)
    _plugins()
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


_START = b"\0\0\0\1"  # of a VVC stream's first unit
_EXACT = ("-sws_flags", "accurate_rnd+full_chroma_int", "-pix_fmt")
_GRID, _LEAST = 8, 64  # VVenC wants sides that are multiples of 8 and no tiny pictures


@functools.cache
def _ffmpeg() -> str | None:
    """FFmpeg's program, if the package that carries one is installed and it writes VVC."""
    try:
        program = importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return None
    listed = subprocess.run([program, "-hide_banner", "-encoders"], capture_output=True, text=True)
    return program if " libvvenc " in listed.stdout else None


def _convert(data: bytes, *arguments: str) -> bytes:
    """What FFmpeg writes to its output when it reads `data` from its input."""
    command = [_ffmpeg(), "-loglevel", "error", *arguments, "-"]
    done = subprocess.run(command, input=data, capture_output=True)
    if done.returncode:
        why = " ".join(done.stderr.decode(errors="replace").split())[-500:]
        raise IcmError(f"FFmpeg failed on a VVC picture: {why}")
    return done.stdout


def _encode_vvc(image: np.ndarray, parameter: int) -> bytes:
    """Height and width, two bytes each, as streams know padded sides only; then the stream."""
    height, width = image.shape[:2]
    rows, columns = (max(_LEAST, side + -side % _GRID) - side for side in (height, width))
    whole = np.pad(image, ((0, rows), (0, columns), (0, 0)), mode="edge")
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width + columns}x{height + rows}")
    coder = ("-c:v", "libvvenc", "-preset", "medium", "-qp", str(parameter), "-qpa", "0")
    stream = _convert(whole.tobytes(), *raw, "-i", "-", *_EXACT, "yuv420p10le", *coder, "-f", "vvc")
    return struct.pack(">HH", height, width) + stream


def _decode_vvc(data: bytes) -> np.ndarray:
    """The picture of `_encode_vvc`'s bytes."""
    height, width = struct.unpack(">HH", data[:4])
    netpbm = ("-f", "image2pipe", "-c:v", "ppm")
    picture = _convert(data[4:], "-f", "vvc", "-i", "-", *_EXACT, "rgb24", *netpbm)
    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image)[:height, :width]


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
