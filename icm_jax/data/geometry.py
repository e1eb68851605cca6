"""Images and masks on the host: decoding, and fitting to the fixed canvas of a batch."""

import io

import numpy as np
import simplejpeg
from PIL import Image

from icm_jax.errors import IcmError


def decode_image(data: bytes, name: str, smallest: int = 0) -> np.ndarray:
    """RGB uint8 [H, W, 3] of a JPEG (or any format that Pillow reads).

    Args:
      data: the file's bytes. name: what an error calls it.
      smallest: a JPEG may be decoded at a fraction of its size as long as both sides keep this
        many pixels, which costs a fraction of the time.

    Raises: IcmError if the bytes are not a whole image.
    """
    try:
        if simplejpeg.is_jpeg(data):
            return simplejpeg.decode_jpeg(
                data, "RGB", min_height=smallest, min_width=smallest, strict=True
            )
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise IcmError(f"cannot read the image {name}: {error}; repair or remove it") from error


def decode_mask(data: bytes, name: str) -> np.ndarray:
    """Class ids uint8 [H, W] of a PNG with one channel or a palette."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            mask = np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise IcmError(f"cannot read the mask {name}: {error}; repair or remove it") from error
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise IcmError(
            f"the mask {name} must have one 8-bit channel, not {mask.dtype} {mask.shape}"
        )
    return mask


def fit(array: np.ndarray, canvas: tuple[int, int], resample=Image.Resampling.BILINEAR):
    """Scales so that the canvas is just covered, then cuts out its centre.

    Args:
      array: uint8 [H, W] or [H, W, 3]. canvas: (height, width). resample: NEAREST for masks.
    Returns: uint8 [*canvas] or [*canvas, 3].
    """
    height, width = array.shape[:2]
    scale = max(canvas[0] / height, canvas[1] / width)
    if scale != 1:
        size = (max(canvas[1], round(width * scale)), max(canvas[0], round(height * scale)))
        array = np.asarray(Image.fromarray(array).resize(size, resample))
    top, left = (array.shape[0] - canvas[0]) // 2, (array.shape[1] - canvas[1]) // 2
    return array[top : top + canvas[0], left : left + canvas[1]]
