"""Images with the objects that networks on codecs find: boxes and, where they have them, masks."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from icm_jax.data import geometry, pipeline
from icm_jax.engine import checkpoint
from icm_jax.engine.codes import open_source
from icm_jax.engine.frozen import load_codec, with_file
from icm_jax.engine.run import Run
from icm_jax.engine.train import complete
from icm_jax.measure.coded import through_stream
from icm_jax.measure.instances import paste
from icm_jax.report.detections import DRAWN, draw_box, middles
from icm_jax.report.looks import placed, save, title_of
from icm_jax.report.masks import coloured
from icm_jax.tasks import build_task

SHOWN = 5
"""Images of each network."""


def objects(runs: Sequence[Run], workdir: pathlib.Path, place: str) -> list[tuple[str, object]]:
    """Validation images with the boxes that are there (dashed) and what `runs` find, finished ones
    with the task "object_detection" on one data set, which `place` says if there are several: a row
    on pixels and one on the bits of the middle λ of each arm, of the first seed."""
    chosen = sorted(middles(runs), key=lambda run: any(start.codec for start in run.start))
    figure = Figure(figsize=(2.1 * SHOWN, 2.2 * len(chosen)), dpi=110)
    axes = figure.subplots(len(chosen), SHOWN, squeeze=False)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    for cells, run in zip(axes, chosen, strict=True):
        labels: Any = run.labels
        cells[0].set_ylabel(f"{labels.arm}\n{title_of(labels.point)}", fontsize=8)
        _draw(run, workdir, cells)
    figure.tight_layout()
    text = f"Dashed: the truth. Lines: objects with a score of at least {DRAWN}."
    stem = "instances" if runs[0].task.masks else "objects"
    title = stem.capitalize() + (f", on {place}" if place else "")
    return [("h2", title), ("image", save(figure, workdir / placed(stem, place))), ("p", text)]


def _draw(run: Run, workdir: pathlib.Path, cells) -> None:
    source = open_source(run.data, "validation")
    spec = pipeline.batch_spec(run.data, SHOWN, outlines=0)
    batch = next(pipeline.evaluation_batches(source, spec, limit=SHOWN))
    found, texts = _found(run, workdir, source, batch)
    for row, axis in enumerate(cells):
        if not batch["valid"][row]:
            continue
        down, across = geometry.inside(batch["extent"][row])
        place = across.start - 0.5, across.stop - 0.5, down.stop - 0.5, down.start - 0.5
        picture = batch["image"][row].copy()
        drawn = np.flatnonzero(found["valid"][row] & (found["scores"][row] >= DRAWN))
        for i in drawn if "masks" in found else ():
            box = found["boxes"][row, i] * np.tile(spec.canvas, 2)
            there = paste(found["masks"][row, i], box, *spec.canvas)
            colour = coloured(np.full((1, 1), i % 20, np.uint8))[0, 0]
            picture[there] = picture[there] // 2 + colour // 2
        axis.imshow(picture[down, across], extent=place)
        axis.set_xlabel(texts[row], fontsize=7)
        for box in batch["boxes"][row][batch["box_valid"][row]]:
            draw_box(axis, box, spec.canvas, "white", "--")
        for i in drawn:
            label = int(found["labels"][row, i])
            text = f"{source.classes[label]} {found['scores'][row, i]:.2f}"
            draw_box(axis, found["boxes"][row, i], spec.canvas, f"C{label % 10}", "-", text)


def _found(run: Run, workdir: pathlib.Path, source, batch) -> tuple[dict, list[str]]:
    """(what the task predicts of a batch, what each image takes in words)."""
    task = build_task(complete(run, source))
    variables, frozen = checkpoint.load_variables(workdir / run.name), load_codec(run, workdir)
    inputs, texts = {"image": batch["image"]}, [""] * len(batch["image"])
    if frozen is not None:
        variables = with_file(variables, frozen)
        given, sizes = through_stream(frozen, batch["image"], task.reads)
        inputs = {task.reads: given.clip(0, 255) if task.reads == "image" else given}
        texts = [f"{size['bpp']} bytes" for size in sizes]
    return jax.device_get(jax.jit(task.predict)(variables, inputs)), texts
