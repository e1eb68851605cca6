"""Image files and their pixels: one reader for the command and the pipelines, and the writer.

Pixels are those of the upright image: the EXIF orientation is applied, so boxes and masks are those
of what a viewer shows. Transparency is laid over white; of 16 bits the upper 8 stay.
"""

import io
import struct
import zlib
from collections.abc import Mapping

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from icm_jax.errors import IcmError

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
_SIGNATURE, _AVERAGE, _ROWS = b"\x89PNG\r\n\x1a\n", 3, 256
"""How a PNG file begins, the number of its filter, and how many rows are filtered at a time."""
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def read_image(data: bytes, name: str, smallest: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Pixels of a JPEG, PNG or any other file that Pillow reads.

    Args:
      data: the file's bytes. name: what an error calls it.
      smallest: (height, width); a JPEG may be decoded at a fraction of its size as long as both
        sides keep this many pixels, which costs a fraction of the time. (0, 0): at its full size.

    Returns: uint8 [H, W, 3], or [H, W] of a greyscale file; perhaps a view with negative strides.
    Raises: IcmError if the bytes are not a whole image, or one so large that Pillow refuses it.
    """
    return _read(data, name, smallest, colour=False)


def read_rgb(data: bytes, name: str, smallest: tuple[int, int] = (0, 0)) -> np.ndarray:
    """As `read_image`, always uint8 [H, W, 3]."""
    image = _read(data, name, smallest, colour=True)
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def _read(data: bytes, name: str, smallest: tuple[int, int], colour: bool) -> np.ndarray:
    try:
        if simplejpeg.is_jpeg(data):
            image = _read_jpeg(data, smallest, colour)
            if image is not None:
                return image
        with Image.open(io.BytesIO(data)) as opened:
            return _pixels(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError as error:
        raise IcmError(
            f"cannot read the image {name}: it is of no format that Pillow knows; repair or "
            "remove it"
        ) from error
    except _UNREADABLE as error:
        raise IcmError(f"cannot read the image {name}: {error}; repair or remove it") from error


def orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG file, 1 (upright) to 8; 1 where nothing is said.

    Pillow is asked only of files in whose head the words stand that an orientation needs.
    """
    end = 2
    while data[end : end + 1] == b"\xff" and data[end + 1 : end + 2] != b"\xda":  # to the scans
        end += 2 + max(int.from_bytes(data[end + 2 : end + 4]), 2)
    head = data[:end]
    if b"Exif\0\0" not in head and b"tiff:Orientation" not in head:
        return 1
    with Image.open(io.BytesIO(data)) as opened:
        found = opened.getexif().get(0x0112, 1)
    return found if found in _TURNED else 1


def _read_jpeg(data: bytes, smallest: tuple[int, int], colour: bool) -> np.ndarray | None:
    """Pixels of a JPEG; None where TurboJPEG does not know the sampling, as 4:1:0."""
    turned = orientation(data)
    height, width = smallest[::-1] if turned >= 5 else smallest
    options = {}
    if height and width:
        # Between a half and all of a size, libjpeg takes longer than for all of it.
        options = dict(min_height=height, min_width=width, min_factor=2)
    grey = not colour and _kind(data) == "Gray"
    try:
        image = simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB", strict=True, **options)
    except ValueError:
        if not _kind(data):
            return None
        raise
    image = image[..., 0] if grey else image
    return _TURNED[turned](image) if turned in _TURNED else image


def _kind(data: bytes) -> str:
    """The colour space that a JPEG is stored in; "" of a header that TurboJPEG cannot read."""
    try:
        return simplejpeg.decode_jpeg_header(data)[2]
    except (ValueError, KeyError):  # KeyError: simplejpeg has no name for 4:4:1
        return ""


def _pixels(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # Pillow's own conversion would saturate, not scale
        return (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB"))


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
    except _UNREADABLE as error:
        raise IcmError(f"cannot read the mask {name}: {error}; repair or remove it") from error
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


def write_image(image: np.ndarray, suffix: str) -> bytes:
    """The file of a uint8 image in the format that a suffix names. Raises IcmError if none does."""
    file = io.BytesIO()
    kind = Image.registered_extensions().get(suffix.lower())
    if kind is None:
        raise IcmError(f"no image format has the suffix {suffix!r}; use .png")
    try:
        if kind == "PNG":
            return _png(image)
        Image.fromarray(image).save(file, kind)
    except (KeyError, OSError, ValueError) as error:
        raise IcmError(f"cannot write images as {suffix!r}: {error}; use .png") from error
    return file.getvalue()


def _png(image: np.ndarray) -> bytes:
    """A PNG file (ISO/IEC 15948) of uint8 [H, W] or [H, W, 3].

    One filter for all rows, the mean of left and above, and runs in place of matches: of a
    photograph 2 % more bytes than with the best filter of each row, in half of the time.
    """
    height, width, channels = image.reshape(*image.shape[:2], -1).shape
    rows = np.ascontiguousarray(image).reshape(height, width * channels)
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    packed, before = [], np.zeros_like(rows[:1])
    for begin in range(0, height, _ROWS):
        block = rows[begin : begin + _ROWS]
        above = np.concatenate([before, block[:-1]])
        left = np.zeros_like(block)
        left[:, channels:] = block[:, :-channels]
        filtered = np.full((len(block), 1 + block.shape[1]), _AVERAGE, np.uint8)
        # Half of a sum of bytes, rounded down, in bytes.
        np.subtract(block, (left & above) + ((left ^ above) >> 1), out=filtered[:, 1:])
        packed.append(packer.compress(filtered.data))
        before = block[-1:]
    colour = {1: 0, 3: 2}[channels]
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = (b"IHDR", head), (b"IDAT", b"".join([*packed, packer.flush()])), (b"IEND", b"")
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
