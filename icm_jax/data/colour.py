"""Colours of other profiles in sRGB, in which all pixels of the package are, by LittleCMS."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

_LEVEL = 1
"""By so much may what a profile gives differ from its numbers for these to be taken as sRGB's."""
_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Mode of Pillow's for the colour space of a profile (ICC.1:2022, 7.2.6)."""


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of mode "RGB", "L", "CMYK" or "LAB" in sRGB: "RGB", or "L" where it was that.

    Args: profile: an ICC profile's bytes. Without one, or with one that is damaged or of another
      colour space than the image, its numbers are those of sRGB, as browsers take them.
    """
    if image.mode == "LAB":
        lab = ImageCms.buildTransform(ImageCms.createProfile("LAB"), _srgb(), "LAB", "RGB")
        return lab.apply(image)
    transform = _transform(profile, image.mode) if profile else None
    if transform is not None:
        found = transform.apply(image)
        return found.getchannel("G") if image.mode == "L" else found
    return image if image.mode == "L" else image.convert("RGB")


@functools.cache
def _srgb():
    return ImageCms.createProfile("sRGB")


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where there is nothing to do, or nothing that can be done."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _SPACES.get(getattr(opened.profile, "xcolor_space", "")) != mode:
            return None
        # Threads share a transform; without its cache of the last colour they may.
        flags = ImageCms.Flags.NOCACHE | ImageCms.Flags.BLACKPOINTCOMPENSATION
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(opened, _srgb(), mode, "RGB", intent, flags)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform


def _changes_nothing(transform, mode: str) -> bool:
    """Whether a transform of grey levels, or of a grid of colours, leaves them as they are."""
    if mode == "L":
        shown = np.arange(256, dtype=np.uint8)[None]
    else:
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        shown = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    found = np.asarray(transform.apply(Image.fromarray(shown)))
    given = shown if mode == "RGB" else shown[..., None]
    return bool(np.abs(found.astype(int) - given).max() <= _LEVEL)
