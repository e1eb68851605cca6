"""Whole images, their label maps, and what networks make of them."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from icm_jax.data import pipeline
from icm_jax.engine import checkpoint
from icm_jax.engine.codes import open_source
from icm_jax.engine.frozen import load_codec, with_file
from icm_jax.engine.run import Run
from icm_jax.engine.train import complete
from icm_jax.measure import segments
from icm_jax.measure.coded import through_stream
from icm_jax.measure.scores import IGNORE
from icm_jax.report.looks import placed, save, title_of
from icm_jax.tasks import build_task

SHOWN = 3
"""Images."""
MOST = 6
"""Networks."""
COLOURS = 20
"""Of classes; the next ones have them again."""


def segmentations(
    runs: Sequence[Run], workdir: pathlib.Path, place: str
) -> list[tuple[str, object]]:
    """Validation images with their label maps and what each of `runs`, finished ones that segment
    one data set, which `place` says if there are several, finds, of the first seed: on the bits of
    its codec, or on pixels where it has none."""
    first = [(run, run.labels) for run in runs if run.seed == runs[0].seed and run.labels]
    chosen = sorted(first, key=lambda pair: any(start.codec for start in pair[0].start))[:MOST]
    source = open_source(runs[0].data, "validation")
    spec = pipeline.batch_spec(runs[0].data, 1, whole=True)
    batches = list(pipeline.in_order(source, spec, limit=SHOWN))
    figure = Figure(figsize=(2.4 * (2 + len(chosen)), 2.1 * len(batches)), dpi=110)
    axes = figure.subplots(len(batches), 2 + len(chosen), squeeze=False)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0, 1].set_title("labels", fontsize=8)
    for cells, batch in zip(axes, batches, strict=True):
        cells[0].imshow(batch["image"][0])
        cells[1].imshow(coloured(batch["mask"][0]))
    for column, (run, labels) in enumerate(chosen, 2):
        axes[0, column].set_title(f"{labels.arm}\n{title_of(labels.point)}", fontsize=8)
        for cells, (found, text) in zip(axes, _found(run, workdir, batches), strict=True):
            cells[column].imshow(coloured(found))
            cells[column].set_xlabel(text, fontsize=7)
    names = zip(source.mask_classes, _colours() / 255, strict=False)
    patches = [Patch(color=tuple(colour), label=name) for name, colour in names]
    figure.tight_layout()
    below = figure.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=7)
    below.set_frame_on(False)
    text = "Whole images, label maps at their own size; black: not known."
    title, path = "Segments" + (f", on {place}" if place else ""), placed("segments", place)
    return [("h2", title), ("image", save(figure, workdir / path)), ("p", text)]


def _found(run: Run, workdir: pathlib.Path, batches: Sequence[dict]) -> list[tuple]:
    """(uint8 [H, W], what it takes in words) of each image, a batch of one."""
    task = build_task(complete(run, open_source(run.data, "train")))
    variables, frozen = checkpoint.load_variables(workdir / run.name), load_codec(run, workdir)
    variables = variables if frozen is None else with_file(variables, frozen)
    found = []
    for batch in batches:
        inputs, text, image = {"image": batch["image"]}, "", batch["image"]
        if frozen is not None:
            given, (size,) = through_stream(frozen, image, task.reads, same=False)
            inputs = {task.reads: given.clip(0, 255) if task.reads == "image" else given}
            text = f"{size['bpp']} bytes, {8 * size['bpp'] / size['pixels']:.3f} bpp"
        shapes = image.shape[1:3], batch["mask"].shape[1:]
        found.append((segments.segmented(task.predict, variables, inputs, *shapes)[0], text))
    return found


def coloured(ids: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of class ids uint8 [H, W]; `IGNORE` is black."""
    return np.where((ids == IGNORE)[..., None], np.uint8(0), _colours()[ids % COLOURS])


def _colours() -> np.ndarray:
    """uint8 [COLOURS, 3]."""
    shares = np.asarray(colormaps["tab20"](np.arange(COLOURS)))
    return (255 * shares[:, :3]).round().astype(np.uint8)
