"""What coding a detector's feature costs with a linear transform: a yardstick for base layers.

    python benchmarks/feature_limits.py --workdir RUNS/seed0/detector [--splits 7 9]

The feature of each position of 16 × 16 pixels is rotated to its principal axes (Karhunen-Loève), or
to those of what matters most to the tail (of the Fisher information of its outputs), rounded, and
costed by the entropy of each coefficient on the very images that are scored: no training, no side
information, nothing of the neighbours. A learned base layer has to do better; where the feature
holds nearly all that pixels hold, it has far to go. The detector is that of a run of
`configs/yolov3.py`, scored on the validation split of its data.

Prints a line a step of the quantiser: bits per pixel of the picture, relative squared error of the
feature, mAP@.5, mAP@[.5:.95].
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from icm_jax.data import pipeline
from icm_jax.engine import checkpoint
from icm_jax.engine.codes import open_source
from icm_jax.engine.run import load_run
from icm_jax.engine.train import complete
from icm_jax.measure import average_precision
from icm_jax.nets.detector import Detector, Part
from icm_jax.nets.yolo import build_detector
from icm_jax.tasks import build_task

CELL = 16
"""Pixels that the sides of a position have, as of the latents of a base layer."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of the run")
    parser.add_argument("--splits", type=int, nargs="+", default=[0], help="0: the detector's own")
    parser.add_argument("--steps", type=float, nargs="+", default=[0.35, 0.5, 0.7, 1.0, 1.4])
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()
    run = load_run(given.workdir)
    source = open_source(run.data, "validation")
    batches = list(pipeline.evaluation_batches(source, pipeline.batch_spec(run.data, given.batch)))
    variables = checkpoint.load_variables(given.workdir)
    for split in given.splits:
        config = complete(run, source)
        with config.unlocked():
            config.detector.split = split
        detector = build_detector(config.detector, config.classes)
        print(f"split {detector.split}, {detector.feature.channels} channels at 1/"
              f"{detector.feature.stride}, {source.length} images")  # fmt: skip
        for line in curves(detector, build_task(config).predict, variables, batches, given.steps):
            print("  " + line, flush=True)


def curves(detector: Detector, predict, variables, batches, steps):
    """A line a transform and step."""
    own = {name: tree["detector"] for name, tree in variables.items() if "detector" in tree}
    front, tail = Part(detector, end=detector.split), Part(detector, detector.split)
    fold = CELL // detector.feature.stride

    def cells_of(image):  # [N, H/16, W/16, fold², C] in one
        f = front.apply(own, image.astype(jnp.float32) / 255.0, train=False)
        n, h, w, c = f.shape
        f = f.reshape(n, h // fold, fold, w // fold, fold, c).swapaxes(2, 3)
        return f.reshape(n, h // fold, w // fold, -1)

    def feature_of(cells):
        n, h, w, c = cells.shape
        f = cells.reshape(n, h, w, fold, fold, c // fold**2).swapaxes(2, 3)
        return f.reshape(n, h * fold, w * fold, -1)

    def fisher(cells, key):
        """Of outputs as Bernoulli variables; log sizes count where objectness is."""
        outputs, pulled = jax.vjp(lambda c: tail.apply(own, feature_of(c), train=False), cells)
        drawn = []
        for number, raw in enumerate(outputs):
            p = jax.nn.sigmoid(raw)
            there, spread = p[..., 4:5], p * (1 - p)
            weight = jnp.concatenate([there * spread[..., :2], there * jnp.ones_like(p[..., 2:4]),
                                      spread[..., 4:5], there * spread[..., 5:]], -1)  # fmt: skip
            normal = jax.random.normal(jax.random.fold_in(key, number), raw.shape)
            drawn.append(jnp.sqrt(weight) * normal)
        (rows,) = pulled(tuple(drawn))
        rows = rows.reshape(-1, rows.shape[-1])
        return rows.T @ rows / len(rows)

    find = jax.jit(lambda cells: predict(variables, {"feature": feature_of(cells)}))
    cells = [np.asarray(jax.jit(cells_of)(batch["image"]), np.float64) for batch in batches]
    rows = np.concatenate([cell.reshape(-1, cell.shape[-1]) for cell in cells])
    mean, unit = rows.mean(axis=0), np.eye(rows.shape[1])
    covariance = np.cov(rows.T)
    covariance += 1e-6 * np.trace(covariance) / len(unit) * unit
    information = sum(
        np.asarray(jax.jit(fisher)(jnp.asarray(cell, jnp.float32), jax.random.key(number)))
        for number, cell in enumerate(cells)
    ).astype(np.float64) / len(cells)  # fmt: skip
    information += 1e-3 * np.trace(information) / len(unit) * unit
    for name, metric in (("of the feature", unit), ("of what follows", information)):
        root = np.linalg.cholesky(metric).T
        axes = np.linalg.eigh(root @ covariance @ root.T)[1].T @ root
        scale = 4 * np.sqrt(np.trace(axes @ covariance @ axes.T) / len(unit))
        for step in steps:
            coded = [np.rint((cell - mean) @ axes.T / (step * scale)) for cell in cells]
            decoded = [c @ np.linalg.inv(axes).T * (step * scale) + mean for c in coded]
            score = average_precision("coco", [*map(str, range(detector.classes))])
            for batch, cell in zip(batches, decoded, strict=True):
                score.update(jax.device_get(find(cell.astype(np.float32))), batch)
            found, bits = score.result(), np.concatenate([c.reshape(-1, len(unit)) for c in coded])
            error = sum(np.square(a - b).sum() for a, b in zip(cells, decoded, strict=True))
            yield (f"axes {name:15}  {bpp(bits):.4f} bpp, error "
                   f"{error / np.square(rows).sum():.3f}, mAP {100 * found['map50']:.1f} / "
                   f"{100 * found['map']:.1f} %")  # fmt: skip


def bpp(symbols: np.ndarray) -> float:
    """Bits per pixel of coefficients [positions, C], each at its own entropy."""
    total = 0.0
    for column in symbols.T:
        share = np.unique(column, return_counts=True)[1] / len(column)
        total -= float((share * np.log2(share)).sum())
    return total / CELL**2


if __name__ == "__main__":
    main()
