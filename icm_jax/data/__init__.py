"""Data on the host: sources of coded images and resumable batches. No JAX here."""

from collections.abc import Callable
from typing import NamedTuple

from icm_jax.data import scenes, sources
from icm_jax.errors import IcmError


class Dataset(NamedTuple):
    """keys: what examples have beside the image (label, mask, objects); open: (config, split).

    classes, mask_classes: how many there are, where that does not depend on the files.
    """

    keys: tuple[str, ...]
    open: Callable[..., sources.Source]
    classes: int | None = None
    mask_classes: int = 0


DATASETS = {
    "scenes": Dataset(("label", "mask", "objects"), sources.scenes_source, 12, 13),
    "folder": Dataset(("label",), sources.folder),
    "photos": Dataset((), sources.photos),
    "coco_json": Dataset(("label", "objects"), sources.coco_json),
    "mask_folder": Dataset(("mask",), sources.mask_folder),
    "voc_masks": Dataset(("mask",), sources.voc_masks, 0, 21),
    "imagenet2012": Dataset(("label",), sources.tfds_source("imagenet2012"), 1000),
    "coco/2014": Dataset(("label", "objects"), sources.tfds_source("coco/2014"), 80),
    "coco/2017": Dataset(("label", "objects"), sources.tfds_source("coco/2017"), 80),
    "voc/2012": Dataset(("label", "objects"), sources.tfds_source("voc/2012"), 20),
}


def open_source(config, split: str) -> sources.Source:
    """The source that `config.name` names; `split` is "train" or "validation".

    Raises: IcmError for an unknown name, absent data, or files of another structure.
    """
    if split not in scenes.SPLITS:
        raise IcmError(f"no split {split!r}; choose one of {', '.join(scenes.SPLITS)}")
    if config.name not in DATASETS:
        raise IcmError(f"unknown data set {config.name!r}; choose one of {', '.join(DATASETS)}")
    return DATASETS[config.name].open(config, split)
