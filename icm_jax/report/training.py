"""The figure of losses over steps."""

import pathlib
import re
from collections.abc import Sequence

from matplotlib import colormaps, ticker
from matplotlib.figure import Figure

from icm_jax.engine.log import read_log
from icm_jax.engine.run import Run
from icm_jax.report.looks import save

TAB20 = [colormaps["tab20"](i) for i in range(20)]
DASHES = ("-", "--", ":", "-.")
WIDE = 10  # largest over smallest loss of a panel from which on its axis is logarithmic


def draw_training(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """Loss over steps, a panel per task with names beneath; seeds share a name and a colour."""
    logs = {run.name: read_log(workdir / run.name / "metrics.jsonl") for run in runs}
    kinds = sorted({run.task.name for run in runs})
    figure = Figure(figsize=(5 * len(kinds), 3.4), dpi=110)
    figure.subplots_adjust(wspace=0.3)
    axes = figure.subplots(1, len(kinds), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        looks, losses = {}, []
        for run in runs:
            if run.task.name != kind or not logs[run.name]:
                continue
            name = re.sub(r"^seed\d+/", "", run.name)
            label = name if name not in looks else None
            dashes, colour = divmod(looks.setdefault(name, len(looks)), len(TAB20))
            look = dict(color=TAB20[colour], linestyle=DASHES[dashes % len(DASHES)], linewidth=1)
            values = [line["loss"] for line in logs[run.name]]
            axis.plot([line["step"] for line in logs[run.name]], values, label=label, **look)
            losses += values
        if losses:
            if min(losses) > 0 and max(losses) > WIDE * min(losses):
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter(ticker.NullFormatter())
            beneath = dict(loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
            axis.legend(fontsize=6, ncols=1 if len(looks) < 4 else 3, **beneath)
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.grid(alpha=0.3)
    return save(figure, workdir / "training.png")
