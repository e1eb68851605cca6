"""Pure functions of rate and quality."""

import numpy as np

from icm_jax.errors import IcmError
from icm_jax.ops import MS_SSIM_WEIGHTS, SSIM_CONSTANTS, SSIM_SIGMA, SSIM_WINDOW

SMALLEST = SSIM_WINDOW << (len(MS_SSIM_WEIGHTS) - 1)
"""Sides of an image from which on MS-SSIM is defined."""


def bpp(size: float, height: int, width: int) -> float:
    """Bits per pixel of `size` bytes.

    >>> bpp(6144, 256, 384)
    0.5
    """
    return 8 * size / (height * width)


def psnr(reference: np.ndarray, given: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays; infinite for equal ones.

    >>> round(psnr(np.full((8, 8, 3), 100, np.uint8), np.full((8, 8, 3), 101, np.uint8)), 2)
    48.13
    """
    error = np.mean(np.square(reference.astype(np.float64) - given.astype(np.float64)))
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(reference: np.ndarray, given: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of two uint8 [H, W] or [H, W, C], C averaged.

    Raises: IcmError if shapes differ or a side is shorter than the window of 11 pixels.
    """
    return float(_similarity(*_planes(reference, given, SSIM_WINDOW))[0].mean())


def ms_ssim(reference: np.ndarray, given: np.ndarray) -> float:
    """Multi-scale SSIM (Wang et al. 2003, eq. 7), five scales, of uint8 [H, W] or [H, W, C].

    Contrast and structure count at each scale, luminance at the coarsest; negative means of a
    scale count as zero. Scales are halved by averaging 2 × 2 pixels, odd edges dropped.

    Raises: IcmError if shapes differ or a side is shorter than 176 pixels.
    """
    x, y = _planes(reference, given, SMALLEST)
    product = np.ones(len(x))
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        whole, structure = _similarity(x, y)
        last = scale == len(MS_SSIM_WEIGHTS) - 1
        product *= np.maximum(whole if last else structure, 0) ** weight
        x, y = _downsampled(x), _downsampled(y)
    return float(product.mean())


def decibels(similarity: float) -> float:
    """-10 log10(1 - s) of an SSIM or MS-SSIM; infinite for 1.

    >>> round(decibels(0.99), 6)
    20.0
    """
    return float("inf") if similarity >= 1 else float(-10 * np.log10(1 - similarity))


def _planes(reference, given, smallest: int) -> tuple[np.ndarray, np.ndarray]:
    """Both images as float64 [C, H, W]."""
    if reference.shape != given.shape or min(reference.shape[:2]) < smallest:
        raise IcmError(
            f"images of shapes {reference.shape} and {given.shape}; expected equal shapes with "
            f"sides of at least {smallest} pixels: crop both alike, or report PSNR"
        )
    x, y = (np.atleast_3d(image).astype(np.float64) for image in (reference, given))
    return np.moveaxis(x, -1, 0), np.moveaxis(y, -1, 0)


def _similarity(x, y) -> tuple[np.ndarray, np.ndarray]:
    """(SSIM, its contrast-structure factor), each [C]: means over the windows that fit."""
    c1, c2 = SSIM_CONSTANTS
    mean_x, mean_y = _blurred(x), _blurred(y)
    variances = _blurred(x * x) - mean_x**2 + _blurred(y * y) - mean_y**2
    structure = (2 * (_blurred(x * y) - mean_x * mean_y) + c2) / (variances + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * structure).mean(axis=(1, 2)), structure.mean(axis=(1, 2))


def _blurred(x: np.ndarray) -> np.ndarray:
    """Gaussian window of 11 pixels, σ = 1.5, without padding: [C, H - 10, W - 10]."""
    at = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-(at**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    for axis in (1, 2):
        x = np.lib.stride_tricks.sliding_window_view(x, SSIM_WINDOW, axis=axis) @ window
    return x


def _downsampled(x: np.ndarray) -> np.ndarray:
    height, width = (side // 2 for side in x.shape[1:])
    even = x[:, : 2 * height, : 2 * width]
    return even.reshape(len(x), height, 2, width, 2).mean(axis=(2, 4))


def bd_rate(
    anchor: np.ndarray, curve: np.ndarray, rates: tuple[float, float] | None = None
) -> float:
    """Bjøntegaard delta rate: mean difference of rate at equal quality, in per cent.

    Log rate is interpolated over quality by a monotone piecewise cubic (PCHIP), as the standards'
    newer reports do. Points that a cheaper point already equals or beats in quality are dropped, so
    that noisy accuracy curves have an inverse.

    Args:
      anchor, curve: float [n, 2] of (rate, quality), any order.
      rates: only qualities that the anchor has at rates between these two count.

    Returns: negative where `curve` needs fewer bits; NaN where fewer than two points remain or the
      quality ranges do not overlap.

    >>> anchor = np.array([(0.25, 28.0), (0.5, 31.0), (1.0, 34.0)])
    >>> round(bd_rate(anchor, anchor * (0.9, 1.0)), 6)
    -10.0
    """
    (rate_a, quality_a), (rate_b, quality_b) = (_increasing(points) for points in (anchor, curve))
    if min(len(rate_a), len(rate_b)) < 2:
        return float("nan")
    low, high = max(quality_a[0], quality_b[0]), min(quality_a[-1], quality_b[-1])
    if rates is not None:
        # Quality at a rate, by the same curve: the inverse of a monotone function, on a fine grid.
        grid = np.linspace(quality_a[0], quality_a[-1], 10_001)
        inside = grid[
            np.searchsorted(pchip(quality_a, np.log(rate_a), grid), np.log(rates)).clip(0, 10_000)
        ]
        low, high = max(low, inside[0]), min(high, inside[1])
    if low >= high:
        return float("nan")
    at = np.linspace(low, high, 1001)
    difference = pchip(quality_b, np.log(rate_b), at) - pchip(quality_a, np.log(rate_a), at)
    middle = (difference[1:] + difference[:-1]) / 2
    return float(100 * np.expm1(middle.mean()))


def rate_at(curve: np.ndarray, quality: float) -> float:
    """The rate at which a curve has a quality, interpolated as in `bd_rate`.

    Args: curve: float [n, 2] of (rate, quality), any order.

    Returns: NaN where the quality lies outside the curve.

    >>> round(rate_at(np.array([(0.25, 28.0), (1.0, 34.0)]), 31.0), 6)
    0.5
    """
    rate, known = _increasing(curve)
    if not len(known) or not known[0] <= quality <= known[-1]:
        return float("nan")
    if len(known) == 1:
        return float(rate[0])
    return float(np.exp(pchip(known, np.log(rate), np.array([quality]))[0]))


def _increasing(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    points = np.asarray(points, np.float64).reshape(-1, 2)
    kept: list[np.ndarray] = []
    for point in points[np.lexsort((-points[:, 1], points[:, 0]))]:
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    rate, quality = np.array(kept).reshape(-1, 2).T
    return rate, quality


def pchip(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Monotone piecewise cubic Hermite interpolation (Fritsch and Butland 1984), float64.

    Args:
      x: [n], increasing, n >= 2. y: [n]. at: [m], inside x.
    """
    width, slope = np.diff(x), np.diff(y) / np.diff(x)
    if len(x) == 2:
        return y[0] + slope[0] * (at - x[0])
    inner = np.zeros(len(x) - 2)
    same = slope[:-1] * slope[1:] > 0
    w1, w2 = 2 * width[1:] + width[:-1], width[1:] + 2 * width[:-1]
    inner[same] = ((w1 + w2)[same]) / (w1[same] / slope[:-1][same] + w2[same] / slope[1:][same])
    ends = [
        _end(width[0], width[1], slope[0], slope[1]),
        _end(width[-1], width[-2], slope[-1], slope[-2]),
    ]
    tangent = np.concatenate([ends[:1], inner, ends[1:]])
    cell = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    h = width[cell]
    t = (at - x[cell]) / h
    return (
        (1 + 2 * t) * (1 - t) ** 2 * y[cell]
        + t * (1 - t) ** 2 * h * tangent[cell]
        + t**2 * (3 - 2 * t) * y[cell + 1]
        + t**2 * (t - 1) * h * tangent[cell + 1]
    )


def _end(h0, h1, s0, s1):
    """Three-point tangent at an end, limited so that the curve stays monotone."""
    tangent = ((2 * h0 + h1) * s0 - h0 * s1) / (h0 + h1)
    if tangent * s0 <= 0:
        return 0.0
    if s0 * s1 <= 0 and abs(tangent) > 3 * abs(s0):
        return 3 * s0
    return tangent
