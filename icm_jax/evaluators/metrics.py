"""Pure functions of rate and quality."""

import numpy as np


def bpp(size: float, height: int, width: int) -> float:
    """Bits per pixel of `size` bytes."""
    return 8 * size / (height * width)


def psnr(reference: np.ndarray, given: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays; infinite for equal ones."""
    error = np.mean(np.square(reference.astype(np.float64) - given.astype(np.float64)))
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def bd_rate(anchor: np.ndarray, curve: np.ndarray) -> float:
    """Bjøntegaard delta rate: mean difference of rate at equal quality, in per cent.

    Log rate is interpolated over quality by a monotone piecewise cubic (PCHIP), as the standards'
    newer reports do. Points that a cheaper point already equals or beats in quality are dropped, so
    that noisy accuracy curves have an inverse.

    Args:
      anchor, curve: float [n, 2] of (rate, quality), any order.

    Returns: negative where `curve` needs fewer bits; NaN where fewer than two points remain or the
      quality ranges do not overlap.
    """
    (rate_a, quality_a), (rate_b, quality_b) = (_increasing(points) for points in (anchor, curve))
    if min(len(rate_a), len(rate_b)) < 2:
        return float("nan")
    low, high = max(quality_a[0], quality_b[0]), min(quality_a[-1], quality_b[-1])
    if low >= high:
        return float("nan")
    at = np.linspace(low, high, 1001)
    difference = pchip(quality_b, np.log(rate_b), at) - pchip(quality_a, np.log(rate_a), at)
    middle = (difference[1:] + difference[:-1]) / 2
    return float(100 * np.expm1(middle.mean()))


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
