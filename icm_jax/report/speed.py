"""The figure of accuracy over images per second."""

import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from icm_jax.report.looks import save
from icm_jax.report.tables import by_arm


def draw_speed(arms: list[dict], speeds: list[dict], path: pathlib.Path) -> str:
    """Accuracy over images per second, of the network alone and from files."""
    figure = Figure(figsize=(11, 4.8), dpi=110)
    titles = {"network_images_per_second": "network alone", "images_per_second": "from files"}
    timed, points = by_arm(speeds), []
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for arm, of_arm in by_arm(arms).items():
            if arm in timed:
                values = 100 * np.array([r["top1"] for r in of_arm])
                at = float(np.median([r[key] for r in timed[arm]]))
                marker = of_arm[0].get("marker") or "o"
                axes.errorbar(at, values.mean(), values.std(), marker=marker, capsize=2, label=arm)
                points.append((axes, arm, (at, values.mean())))
        axes.set_title(title)
        axes.set_xlabel("images per second, inference")
        axes.grid(alpha=0.3)
        axes.margins(x=0.2)
    figure.axes[0].set_ylabel("top-1 accuracy [%]")
    figure.tight_layout()
    _name(points, FigureCanvasAgg(figure).get_renderer())
    return save(figure, path)


def _name(points, renderer) -> None:
    """Names beside points (axes, name, (x, y)), on the side where they cover least."""
    centres = (axes.transData.transform(at) for axes, _, at in points)
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in centres]
    for axes, name, at in points:
        options = []
        for x, y, side in ((4, 4, "left"), (4, -9, "left"), (-4, 4, "right"), (-4, -9, "right")):
            text = axes.annotate(name, at, (x, y), textcoords="offset points", size=7, ha=side)
            box = text.get_window_extent(renderer)
            outside = not (axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1)
            options.append((outside + sum(box.overlaps(other) for other in taken), text, box))
        best = min(options, key=lambda option: option[0])
        taken.append(best[2])
        for option in options:
            if option is not best:
                option[1].remove()
