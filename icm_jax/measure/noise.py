"""Images that are disturbed before anything is made of them."""

from collections.abc import Iterable

import numpy as np

_KEY = 0x6E6F6973  # apart from all other draws


def with_noise(images: np.ndarray, numbers: Iterable[int], deviation: float) -> np.ndarray:
    """Images plus white Gaussian noise, rounded and clipped.

    Args:
      images: uint8 [N, H, W, 3]. numbers: of each in its split; the noise of an image depends on
        its number alone. deviation: of the noise, in levels of 0...255.

    Returns: uint8, of the same shape.
    """
    noisy = np.empty_like(images)
    for row, number in enumerate(numbers):
        rng = np.random.default_rng((_KEY, int(number)))
        noise = deviation * rng.standard_normal(images.shape[1:], np.float32)
        noisy[row] = np.rint(images[row] + noise).clip(0, 255)
    return noisy
