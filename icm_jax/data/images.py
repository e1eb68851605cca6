"""Image files and their pixels: one reader for the command and the pipelines, and the writer.

Pixels are those of the upright image in sRGB: the EXIF orientation is applied, so boxes and masks
are those of what a viewer shows, and so is a colour profile. Transparency is laid over white; of 16
bits the upper 8 stay, of an animation or several pages the first.
"""

import contextlib
import importlib
import io
import pathlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from icm_jax.data import colour
from icm_jax.errors import IcmError, reason

IGNORE = 255
"""The class id of pixels without one."""
OTHERS = -1
"""In a map of ids: every id that it does not list."""
_TURNED = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}
"""How pixels that were stored with an EXIF orientation stand upright (CIPA DC-008, 4.6.5)."""
_BEGINNING = 1 << 14
"""Bytes in which most JPEG files have their header."""


def read_image(data: bytes, name: str, smallest: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Pixels of a JPEG, PNG or any other file that Pillow reads.

    Args:
      data: the file's bytes. name: what an error calls it.
      smallest: (height, width); a JPEG may be decoded at a fraction of its size as long as both
        sides keep this many pixels, which costs a fraction of the time. (0, 0): at its full size.

    Returns: uint8 [H, W, 3], or [H, W] of a greyscale file; perhaps a view with negative strides.
    Raises: IcmError if the bytes are not a whole image, one so large that Pillow refuses it, or one
      whose numbers have no known range, as floats.
    """
    try:
        found = _read_jpeg(data, smallest) if simplejpeg.is_jpeg(data) else None
        if found is not None:
            return found
        with _opened(data) as image:
            return pixels(_upright(image))
    except IcmError as error:
        raise IcmError(f"cannot read the image {name}: {error}") from error
    except UnidentifiedImageError as error:
        raise IcmError(
            f"cannot read the image {name}: it is of no format that Pillow knows; repair or "
            "remove it"
        ) from error
    except Exception as error:  # decoders of damaged files raise whatever they meet
        raise IcmError(
            f"cannot read the image {name}: {reason(error)}; repair or remove it"
        ) from error


def read_rgb(data: bytes, name: str, smallest: tuple[int, int] = (0, 0)) -> np.ndarray:
    """As `read_image`, always uint8 [H, W, 3]."""
    image = read_image(data, name, smallest)
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def _opened(data: bytes | pathlib.Path) -> Image.Image:
    """Pillow's image; of HEIF and JPEG XL, too, where their packages are installed."""

    def given():
        return data if isinstance(data, pathlib.Path) else io.BytesIO(data)

    try:
        return Image.open(given())
    except UnidentifiedImageError:
        with contextlib.suppress(ImportError):
            importlib.import_module("pillow_heif").register_heif_opener()
        with contextlib.suppress(ImportError):
            importlib.import_module("pillow_jxl")
        return Image.open(given())


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a sound image with EXIF that Pillow cannot make sense of
        return image


def orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG file, 1 (upright) to 8; 1 where nothing is said.

    Pillow is asked only of files in whose head the words stand that an orientation needs.
    """
    head = _head(data)
    if b"Exif\0\0" not in head and b"tiff:Orientation" not in head:
        return 1
    try:
        with Image.open(io.BytesIO(data)) as opened:
            found = opened.getexif().get(0x0112, 1)
    except Exception:  # as in `_upright`
        return 1
    return found if found in _TURNED else 1


class Header(NamedTuple):
    """Of an image file: sides of the pixels as they are stored, and EXIF's orientation."""

    height: int
    width: int
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) of the image as it is shown."""
        turned = self.orientation >= 5
        return (self.width, self.height) if turned else (self.height, self.width)


def header(given: pathlib.Path | bytes) -> Header | None:
    """What the beginning of an image file says, of which no more is read, or of its content; None
    if it is none.

    Raises: OSError if it cannot be read.
    """
    if isinstance(given, bytes):
        head = given[:_BEGINNING]
    else:
        with open(given, "rb", buffering=0) as file:
            head = file.read(_BEGINNING)
    if simplejpeg.is_jpeg(head) and b"\xff\xda" in head[len(_head(head)) :][:2]:
        with contextlib.suppress(ValueError, KeyError):  # as in `_kind`
            found: Any = simplejpeg.decode_jpeg_header(head)
            return Header(found[0], found[1], orientation(head))
    try:
        with _opened(given) as image:
            found = image.getexif().get(0x0112, 1)
            return Header(image.height, image.width, found if found in _TURNED else 1)
    except Exception:  # as in `read_image`
        return None


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """An array [H, W, ...] as stored, upright."""
    return _TURNED[orientation](array) if orientation in _TURNED else array


def turned_points(points: Iterable[Sequence[float]], orientation: int) -> list[tuple[float, float]]:
    """Points (y, x), fractions of the sides of an image as it is stored, on the upright one."""
    swapped = [(x, y) if orientation >= 5 else (y, x) for y, x in points]
    down, across = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return [(1 - y if down else y, 1 - x if across else x) for y, x in swapped]


def _head(data: bytes) -> bytes:
    """A JPEG file up to its scans."""
    end = 2
    while data[end : end + 1] == b"\xff" and data[end + 1 : end + 2] != b"\xda":
        end += 2 + max(int.from_bytes(data[end + 2 : end + 4]), 2)
    return data[:end]


def _read_jpeg(data: bytes, smallest: tuple[int, int]) -> np.ndarray | None:
    """Pixels of a JPEG; None where TurboJPEG does not know the sampling, as 4:1:0, or the colours,
    as CMYK."""
    kind = _kind(data)
    if kind not in ("Gray", "YCbCr", "RGB"):
        return None
    turned_by = orientation(data)
    height, width = smallest[::-1] if turned_by >= 5 else smallest
    options = {}
    if height and width:
        # Between a half and all of a size, libjpeg takes longer than for all of it.
        options = dict(min_height=height, min_width=width, min_factor=2)
    space = "GRAY" if kind == "Gray" else "RGB"
    image = simplejpeg.decode_jpeg(data, space, strict=True, **options)
    image = image[..., 0] if kind == "Gray" else image
    if b"ICC_PROFILE\0" in _head(data):
        with Image.open(io.BytesIO(data)) as opened:
            profile = opened.info.get("icc_profile")
        image = np.asarray(colour.to_srgb(Image.fromarray(image), profile))
    return turned(image, turned_by)


def _kind(data: bytes) -> str:
    """The colour space that a JPEG is stored in; "" of a header that TurboJPEG cannot read."""
    try:
        return simplejpeg.decode_jpeg_header(data)[2]
    except (ValueError, KeyError):  # KeyError: simplejpeg has no name for 4:4:1
        return ""


def pixels(image: Image.Image) -> np.ndarray:
    """What `read_image` gives, of an image that Pillow has opened or made; it stays as turned as it
    is.

    Raises: IcmError for integers of 32 bits and floats, whose range nothing tells.
    """
    profile = image.info.get("icc_profile")
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        kind = "floats" if image.mode == "F" else "integers of 32 bits"
        raise IcmError(
            f"its numbers are {kind}, of a range that nothing tells; scale them to 8 bits"
        )
    if image.mode.startswith("I"):  # Pillow's own conversion would saturate, not scale
        upper = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return np.asarray(colour.to_srgb(Image.fromarray(upper), profile))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        above = colour.to_srgb(image.convert("RGB"), profile)
        above.putalpha(image.getchannel("A"))
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), above)
        return np.asarray(image.convert("RGB"))
    mode = {"1": "L", "L": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(image.mode, "RGB")
    return np.asarray(colour.to_srgb(image.convert(mode), profile))


def not_kept(data: bytes) -> list[str]:
    """What of an image file `read_image` leaves behind: "frames beyond the first", "EXIF"."""
    try:
        with _opened(data) as image:
            several, exif = getattr(image, "n_frames", 1) > 1, image.info.get("exif")
        return ["frames beyond the first"] * several + ["EXIF"] * bool(exif)
    except Exception:  # as in `_upright`
        return []


def read_mask(
    data: bytes, name: str, classes: int = 256, ids: Mapping[int, int] | None = None
) -> np.ndarray:
    """Class ids of a PNG with one channel or a palette.

    Args:
      classes: how many there are; ids are below that, or 255, which is none.
      ids: {id in the file: class, or 255}; `OTHERS` stands for all that are not listed. 255 is
        none unless it is listed. Without a map, ids are classes.

    Returns: uint8 [H, W].
    Raises: IcmError if it cannot be read, or has an id of which nothing is known.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            mask = np.asarray(image)
    except Exception as error:  # as in `read_image`
        raise IcmError(
            f"cannot read the mask {name}: {reason(error)}; repair or remove it"
        ) from error
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise IcmError(
            f"the mask {name} must have one 8-bit channel, not {mask.dtype} {mask.shape}"
        )
    known = {IGNORE: IGNORE} | ({i: i for i in range(classes)} if ids is None else dict(ids))
    table = np.full(256, known.pop(OTHERS, OTHERS), np.int16)
    table[list(known)] = list(known.values())
    found = table[mask]
    strange = mask[found == OTHERS]
    if strange.size:
        given = f"ids are 0 to {classes - 1}" if ids is None else f"data.mask_ids lists {len(ids)}"
        raise IcmError(
            f"the mask {name} has the class id {strange.max()}; its data set names {classes} "
            f"classes, {given}, and {IGNORE} is where nothing is known"
        )
    return found.astype(np.uint8)


_WRITING = {
    # Runs in place of matches: 2 % more bytes of a photograph in a quarter of the time.
    "PNG": {"compress_type": zlib.Z_RLE},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "JPEG2000": {"irreversible": False},
}
"""How decoded images are written: without loss, or with one below what coding has cost."""


def write_image(image: np.ndarray, suffix: str) -> bytes:
    """The file of a uint8 image in the format that a suffix names. Raises IcmError if none does."""
    file = io.BytesIO()
    kind = Image.registered_extensions().get(suffix.lower())
    if kind is None:
        raise IcmError(f"no image format has the suffix {suffix!r}; use .png")
    options = _WRITING.get(kind, {})
    try:
        Image.fromarray(image).save(file, kind, **options)
    except (KeyError, OSError, ValueError) as error:
        raise IcmError(f"cannot write images as {suffix!r}: {error}; use .png") from error
    return file.getvalue()
