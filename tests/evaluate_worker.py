"""One process of tests/test_evaluators.py: scores trained runs, and predictions without networks.

python evaluate_worker.py BASE COORDINATOR COUNT INDEX
"""

import pathlib
import sys
import warnings

import jax

warnings.simplefilter("ignore")
base, coordinator, count, index = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(coordinator, int(count), int(index))

import numpy as np  # noqa: E402

from icm_jax.data import open_source, pipeline  # noqa: E402
from icm_jax.engine.run import load_run  # noqa: E402
from icm_jax.files import write_json  # noqa: E402
from icm_jax.measure import MeanIoU, average_precision  # noqa: E402
from icm_jax.measure.evaluate import evaluate, over_batches  # noqa: E402
from icm_jax.tasks.detection import PROTOCOLS  # noqa: E402

for folder in sorted(pathlib.Path(base).glob("*/config.json")):
    evaluate(load_run(folder.parent), base)

source = open_source(dict(name="scenes", size=32, train=1, validation=9), "validation")


def segmented(batch, tally):
    """Masks, moved by as many pixels as the image's number says."""
    moved = np.roll(batch["mask"], batch["number"][0], axis=1)
    tally.update({"segments": np.where(moved == 255, 0, moved)}, batch)
    return []


def detected(batch, tally):
    """Boxes, moved likewise; many are as sure as others."""
    number = batch["number"].reshape(-1, 1, 1)
    found = {"boxes": batch["boxes"] + 0.02 * number, "labels": batch["box_labels"]}
    found |= {"scores": 1.0 / (1 + number[..., 0] % 3 + 0 * batch["box_labels"])}
    tally.update(found | {"valid": batch["box_valid"]}, batch)
    return [{"pixels": 1024, "bpp": int(n)} for n in batch["number"][batch["valid"]]]


whole = pipeline.BatchSpec(1, (24, 24), whole=True)
boxes = pipeline.BatchSpec(2, (32, 32), boxes=4)
found = {"mask": over_batches("", source, whole, lambda: MeanIoU(source.mask_classes), segmented)}
for protocol in PROTOCOLS:
    tally = lambda p=protocol: average_precision(p, source.classes)  # noqa: E731
    found[protocol] = over_batches("", source, boxes, tally, detected)
if jax.process_index() == 0:
    write_json(pathlib.Path(base) / "scores.json", found)
