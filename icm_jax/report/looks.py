"""How arms, points and figures look everywhere in a report."""

import pathlib

from matplotlib.figure import Figure

NAMES = {"omni": "Omni-ICM (α > 0)", "unfiltered": "α = 0 twin", "jpeg": "JPEG", "webp": "WebP"}
NAMES |= {
    "heif": "HEIF (HEVC intra)",
    "vvc": "VVC intra",
    "disentangled": "disentangled latents",
    "split": "split latents (Choi and Bajić)",
    "split-cheng2020": "split latents (the original's transforms)",
    "residual": "feature, then residual (SSSIC)",
    "single": "one layer (hyperprior)",
    "r50": "ResNet-50 on decoded RGB",
    "r71": "ResNet-71 on decoded RGB",
    "c39": "cResNet-39 on the code",
    "c51": "cResNet-51 on the code",
    "c72": "cResNet-72 on the code",
    "r50-d": "ResNet-50-d on decoded RGB",
    "c39-d": "cResNet-39-d on the code",
    "c51-d": "cResNet-51-d on the code",
    "joint": "trained jointly",
    "alone": "trained on, codec frozen",
    "anew": "joint codec frozen, network anew",
    "again": "joint codec frozen, network anew and trained on",
    "jpeg2000": "JPEG 2000",
}
"""Titles of the curves."""
COLOURS = {"omni": "#0072B2", "unfiltered": "#D55E00", "jpeg": "#009E73", "webp": "#CC79A7"}
COLOURS |= {"disentangled": "#0072B2", "split": "#D55E00", "residual": "#E69F00"}
COLOURS |= {"split-cheng2020": "#8B3A00", "single": "#000000", "heif": "#56B4E9", "vvc": "#7F7F7F"}


def title_of(point: str) -> str:
    """A point's label: numbers alone are λ."""
    return f"λ = {point}" if point.replace(".", "").replace("e-", "").isdigit() else point


def save(figure: Figure, path: pathlib.Path) -> str:
    """Writes a PNG file; returns its name, for a part of the page."""
    figure.savefig(path, bbox_inches="tight")
    return path.name
