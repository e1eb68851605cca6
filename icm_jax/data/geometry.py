"""Images, masks and boxes on the host: decoding, and fitting to the fixed canvas of a batch."""

import io

import numpy as np
import simplejpeg
from PIL import Image

from icm_jax.data.resize import bilinear
from icm_jax.errors import IcmError

IGNORE = 255
"""The class id of pixels without one."""
GREY = 128
"""Of the bars beside a letterboxed image."""


def sides(size) -> tuple[int, int]:
    """(height, width) of a size in a config: one number for both, or both.

    >>> sides(96), sides((512, 1024))
    ((96, 96), (512, 1024))

    Raises: IcmError for anything else.
    """
    given = (size,) if isinstance(size, int) else tuple(size)
    whole = all(isinstance(side, int) and side > 0 for side in given)
    if not whole or len(given) not in (1, 2):
        raise IcmError(f"a size is a whole number of pixels or (height, width), not {size!r}")
    return given[0], given[-1]


def decode_image(data: bytes, name: str, smallest: int = 0) -> np.ndarray:
    """RGB uint8 [H, W, 3] of a JPEG (or any format that Pillow reads).

    Args:
      data: the file's bytes. name: what an error calls it.
      smallest: a JPEG may be decoded at a fraction of its size as long as both sides keep this
        many pixels, which costs a fraction of the time.

    16-bit grey is scaled to 8 bits; transparency is dropped.

    Raises: IcmError if the bytes are not a whole image, or one so large that Pillow refuses it.
    """
    try:
        if simplejpeg.is_jpeg(data):
            sides = dict(min_height=smallest, min_width=smallest)
            # Between a half and all of a size, libjpeg takes longer than for all of it.
            return simplejpeg.decode_jpeg(data, "RGB", min_factor=2, strict=True, **sides)
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I"):  # Pillow's own conversion would saturate, not scale
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise IcmError(f"cannot read the image {name}: {error}; repair or remove it") from error


def decode_mask(data: bytes, name: str, classes: int = 256) -> np.ndarray:
    """Class ids uint8 [H, W] of a PNG with one channel or a palette.

    Raises: IcmError if it cannot be read, or has an id that is neither below `classes` nor 255.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            mask = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise IcmError(f"cannot read the mask {name}: {error}; repair or remove it") from error
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise IcmError(
            f"the mask {name} must have one 8-bit channel, not {mask.dtype} {mask.shape}"
        )
    strange = mask[(mask >= classes) & (mask != IGNORE)]
    if strange.size:
        raise IcmError(
            f"the mask {name} has the class id {strange.max()}; its data set names {classes} "
            f"classes, so ids are 0 to {classes - 1}, and {IGNORE} where nothing is known"
        )
    return mask


def check_aspect(image: np.ndarray, mask: np.ndarray, name: str) -> None:
    """Raises IcmError if a mask [h, w] cannot lie over its (perhaps reduced) image [H, W, 3]."""
    (height, width), (h, w) = image.shape[:2], mask.shape
    if abs(h * width - w * height) > 2 * max(h, w):  # a reduced image has rounded sides
        raise IcmError(f"the mask of {name} is {h} x {w}, which does not fit {height} x {width}")


def fit(array: np.ndarray, canvas: tuple[int, int], resample=Image.Resampling.BILINEAR):
    """Scales so that the canvas is just covered, then cuts out its centre.

    Args:
      array: uint8 [H, W, 3], or of masks [H, W]. canvas: (height, width).
      resample: NEAREST for masks.
    Returns: uint8 [*canvas] or [*canvas, 3].
    """
    height, width = array.shape[:2]
    scale = max(canvas[0] / height, canvas[1] / width)
    size = (max(canvas[1], round(width * scale)), max(canvas[0], round(height * scale)))
    left, top = (size[0] - canvas[1]) // 2, (size[1] - canvas[0]) // 2
    if scale != 1 and resample == Image.Resampling.BILINEAR:
        across, down = width / size[0], height / size[1]
        box = left * across, top * down, (left + canvas[1]) * across, (top + canvas[0]) * down
        return bilinear(array, canvas[::-1], box)
    if scale != 1:
        array = np.asarray(Image.fromarray(array).resize(size, resample))
    return array[top : top + canvas[0], left : left + canvas[1]]


def random_view(
    image: np.ndarray, canvas: tuple[int, int], share: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A random window, scaled to the canvas and mirrored or not, as Inception's crops.

    Args:
      image: uint8 [H, W, 3]. canvas: (height, width). share: least and largest part of the area of
        the largest window with the canvas' aspect; the aspect varies by 3/4 to 4/3.
    Returns: uint8 [*canvas, 3].
    """
    height, width = image.shape[:2]
    scale = min(height / canvas[0], width / canvas[1])
    part = np.sqrt(rng.uniform(*share))
    squeeze = np.exp(rng.uniform(-1, 1) * np.log(4 / 3) / 2)
    sides = part * scale * np.array(canvas) * (squeeze, 1 / squeeze)
    sides = np.minimum(sides, (height, width))
    top, left = rng.uniform(size=2) * ((height, width) - sides)
    box = (left, top, left + sides[1], top + sides[0])
    return bilinear(image, canvas[::-1], box)[:, :: -1 if rng.uniform() < 0.5 else 1]


def letterbox(image: np.ndarray, canvas: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Scales so that the whole image just fits; it lies top left, the rest of the canvas is grey.

    Args:
      image: uint8 [H, W, 3]. canvas: (height, width).
    Returns: uint8 [*canvas, 3] and (height, width) of the image in it.
    """
    height, width = image.shape[:2]
    scale = min(canvas[0] / height, canvas[1] / width)
    h, w = (
        min(side, max(1, round(own * scale)))
        for side, own in zip(canvas, (height, width), strict=True)
    )
    if (h, w) != (height, width):
        image = bilinear(image, (w, h))
    boxed = np.full((*canvas, 3), GREY, np.uint8)
    boxed[:h, :w] = image
    return boxed, (h, w)
