"""Another data set: streets twice as wide as high, masks with the ids of another labelling.

Poles stand at both ends of a street and nowhere else: who sees its middle alone sees none.
"""

import io

import ml_collections
import numpy as np
from PIL import Image

from icm_jax.data import Dataset
from icm_jax.data.sources import Source
from icm_jax.engine.run import Labels, Point, make_run

CLASSES = ("road", "sky", "pole")
IDS = ((7, 0), (23, 1), (17, 2), (-1, 255))  # of the files; the others are nothing


def street(number: int) -> dict[str, np.ndarray]:
    """{"image": uint8 [64, 128, 3], "mask": uint8 [64, 128], ids of the files}."""
    rng = np.random.default_rng(number)
    mask = np.full((64, 128), 7, np.uint8)
    mask[: rng.integers(20, 40)] = 23
    mask[:, :20] = mask[:, -20:] = 17
    mask[-4:, 40:80] = 1  # the bonnet of the car that takes the picture
    colours = np.zeros((256, 3))
    colours[[7, 23, 17, 1]] = (90, 90, 90), (120, 170, 230), (240, 200, 30), (200, 20, 20)
    image = colours[mask] + rng.normal(0, 8, (64, 128, 3))
    return {"image": image.clip(0, 255).astype(np.uint8), "mask": mask}


def open_streets(fields, split: str) -> Source:
    """Field `count`: streets of each split."""
    first = 0 if split == "train" else fields["count"]

    def load(index: int) -> dict:
        files = {}
        for key, pixels in street(first + index).items():
            Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
            files[key] = file.getvalue()
        return files | {"name": f"street {first + index}"}

    return Source("streets", fields["count"], (), load, CLASSES, dict(IDS))


STREETS = Dataset(("mask",), open_streets, {"count": 16}, 0, len(CLASSES))


def segmentation_run(seed: int, size: tuple[int, int]):
    """A narrow DeepLab on the pixels of whole streets."""
    task = dict(name="segmentation", frontend="pixels", variant="10", width=8, dtype="float32")
    task |= dict(size=size, crop=(0.8, 1.0), bn_groups=0, aspp_rates=(1, 2), output_stride=8)
    train = dict(steps=60, batch_size=8, learning_rate=1e-2, optimiser="adamw", warmup_steps=3)
    train |= dict(clip_norm=1.0, accumulate=1, log_every=10, save_every=60, fsdp=1, remat="none")
    data = dict(name="streets", canvas=size)
    config = ml_collections.ConfigDict(dict(data=data, train=dict(train, ema=0.0)))
    more = dict(seed=seed, weight_decay=0.0, needs=("mask",))
    more |= dict(evaluate=(Point("pixels"),), labels=Labels("segment", "streets"))
    return make_run(config, config.train, name="streets", task=task, **more)
