"""JPEG and WebP as rivals: whole files, measured, through well-kept encoders.

Both code YCbCr 4:2:0. JPEG uses optimised Huffman tables (libjpeg-turbo in Pillow,
`optimize=True`), WebP the slowest method (`method=6`).
"""

import io

import numpy as np
from PIL import Image

FORMATS = {"jpeg": {"optimize": True, "subsampling": "4:2:0"}, "webp": {"method": 6}}


def encode(image: np.ndarray, codec: str, quality: int) -> bytes:
    """The file of a uint8 [H, W, 3] image; `codec` is "jpeg" or "webp", quality 0 to 100."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, codec.upper(), quality=quality, **FORMATS[codec])
    return file.getvalue()


def decode(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
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
