"""Images with the boxes that a detector finds on pixels, and behind codecs."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from icm_jax.codecs import CODECS, bitstream, model_file
from icm_jax.coding import container
from icm_jax.data import geometry, pipeline
from icm_jax.engine import checkpoint
from icm_jax.engine.codes import open_source
from icm_jax.engine.run import Run
from icm_jax.engine.train import complete
from icm_jax.report.looks import save
from icm_jax.tasks import build_task

DRAWN = 0.4
"""Least score of a box that is drawn."""


def detections(run: Run, codecs: Sequence[Run], workdir: pathlib.Path) -> list[tuple[str, object]]:
    """Validation images with the boxes that are there (dashed) and those that are found.

    Under them, for the middle λ or quality of each arm of `codecs`, what it decodes to and what the
    detector finds there: behind a scalable codec from the base layer alone.
    """
    source, count = open_source(run.data, "validation"), 6
    spec = pipeline.batch_spec(run.data, count)
    batch = next(pipeline.evaluation_batches(source, spec, limit=count))
    task = build_task(complete(run, source))
    variables = checkpoint.load_variables(workdir / run.name)
    predict = jax.jit(task.predict)
    captions = [""] * count
    rows = [("pixels", batch["image"], predict(variables, {"image": batch["image"]}), captions)]
    for codec_run in middles(codecs):
        frozen = model_file.load(workdir / codec_run.name / "codec.icmc", CODECS)
        quality = middle_quality(codec_run)
        streams = bitstream.encode(frozen, batch["image"], quality=quality)
        pictures = bitstream.decode(frozen, streams, "image").clip(0, 255)
        captions, inputs = [f"{len(data)} bytes" for data in streams], {"image": pictures}
        if "feature" in frozen.codec.outputs:
            first = [container.prefix(data, 1) for data in streams]
            inputs = {"feature": bitstream.decode(frozen, first, "feature", layers=1)}
            captions = [
                f"boxes {len(base)} of {text}" for base, text in zip(first, captions, strict=True)
            ]
        labels: Any = codec_run.labels
        found = predict(variables, inputs)
        point = f"λ = {labels.point}" if quality is None else f"quality {quality:g}"
        title = f"{labels.arm}\n{point}"
        rows.append((title, pictures.astype(np.uint8), found, captions))
    figure = Figure(figsize=(2.1 * count, 2.2 * len(rows)), dpi=110)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for cells, (title, pictures, found, captions) in zip(axes, rows, strict=True):
        found = jax.device_get(found)
        cells[0].set_ylabel(title, fontsize=8)
        for row, axis in enumerate(cells):
            axis.set_xticks([])
            axis.set_yticks([])
            if not batch["valid"][row]:
                continue
            down, across = geometry.inside(batch["extent"][row])
            place = across.start - 0.5, across.stop - 0.5, down.stop - 0.5, down.start - 0.5
            axis.imshow(pictures[row, down, across], extent=place)
            axis.set_xlabel(captions[row], fontsize=7)
            for box in batch["boxes"][row][batch["box_valid"][row]]:
                draw_box(axis, box, spec.canvas, "white", "--")
            for i in np.flatnonzero(found["valid"][row] & (found["scores"][row] >= DRAWN)):
                label = int(found["labels"][row, i])
                text = f"{source.classes[label]} {found['scores'][row, i]:.2f}"
                box = found["boxes"][row, i]
                draw_box(axis, box, spec.canvas, f"C{label % 10}", "-", text)
    figure.tight_layout()
    text = f"Dashed: the truth. Lines: boxes with a score of at least {DRAWN}."
    if codecs:
        text += " Under the first row: decoded pictures, and the boxes that the detector finds "
        text += "in the base layer, or in the decoded picture of codecs with one layer."
    name = save(figure, workdir / "boxes.png")
    return [("h2", "Detections"), ("image", name), ("p", text)]


def middle_quality(run: Run) -> float | None:
    """Of the qualities that a codec is scored at; None of a codec of one rate."""
    points = {p.quality for p in run.evaluate if p.kind == "detect" and p.quality is not None}
    return sorted(points)[len(points) // 2] if points else None


def middles(runs: Sequence[Run]) -> list[Run]:
    """Of each arm, first seed, the run of the middle λ."""
    arms: dict[str, list] = {}
    for run in runs:
        if run.labels and run.seed == runs[0].seed:
            arms.setdefault(run.labels.arm, []).append(run)
    return [several[len(several) // 2] for several in arms.values()]


def draw_box(axis, box, size: tuple[int, int], colour: str, style: str, text: str = "") -> None:
    """A rectangle (ymin, xmin, ymax, xmax), fractions of `size` in pixels, and words above it."""
    top, left, bottom, right = np.clip(box, 0, 1) * np.tile(size, 2)
    corner = (left - 0.5, top - 0.5)
    axis.add_patch(
        Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=colour, linestyle=style)
    )
    if text:
        axis.text(*corner, text, color="white", backgroundcolor=colour, fontsize=6)
