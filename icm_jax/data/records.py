"""Sources of record files of TFDS, which may not be there or turn out to be damaged."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from icm_jax.data.fields import FieldError
from icm_jax.data.masks import CITYSCAPES, CITYSCAPES_IDS, mask_ids
from icm_jax.data.outlines import read_outlines
from icm_jax.data.sources import Source, cache_folder, largest, objects_of
from icm_jax.errors import IcmError, reason

PREPARE = "prepare the data set anew"
KEYS = {key: key for key in ("image", "mask", "objects", "outlines", "label", "name")}
"""Features that hold what an example has, in most data sets."""


def unprepared(name: str, path: str | None, why: str) -> str:
    """What to say of a data set of TFDS that cannot be opened."""
    place = f", data_dir={path!r}" if path else ""
    by_hand = {
        "imagenet2012": "Place ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in "
        f"{path or '~/tensorflow_datasets'}/downloads/manual first (they need an account). "
    }
    return (
        f"the TFDS data set {name} is not prepared as array_record ({why}). "
        f"{by_hand.get(name, '')}Prepare it once, where TensorFlow and a network are: "
        f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}{place})'
        ".download_and_prepare(file_format='array_record')\", then set --config.data.path to its "
        "data_dir"
    )


def guarded(load: Callable[[int], dict], builder: Any, split: str, remedy: str) -> Callable:
    """`load` of an example by its number, with an IcmError that names the file and ends with
    `remedy` where array_record, TFDS or what is made of its example fail."""
    files = builder.info.splits[split]
    ends = np.cumsum(files.shard_lengths)

    def guarded_load(number: int) -> dict:
        try:
            return load(number)
        except IcmError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            path = files.filepaths[int(np.searchsorted(ends, number, side="right"))]
            why = reason(error).split(";")[0]
            raise IcmError(f"{path}: no whole record file ({why}); {remedy}") from error

    return guarded_load


def scenes_source(config, split: str) -> Source:
    """The embedded data; fields path ("": the cache) and those of `scenes.ScenesConfig`."""
    from icm_jax.data import scenes

    sizes = {field: value for field, value in config.items() if field != "path"}
    builder = scenes.prepared(config["path"] or cache_folder(), **sizes)
    names = tuple(scenes.CLASSES)
    return from_builder(builder, split, names, ("background", *names))


def tfds_source(name: str) -> Callable:
    """Opens a prepared TFDS data set: array_record files below data.path or TFDS's own folder."""

    def open_source(config, split: str) -> Source:
        source, features = _prepared(name, config["path"], split, KEYS)
        named = features["objects"]["label"] if "objects" in features else features["label"]
        return dataclasses.replace(source, classes=tuple(named.names))

    return open_source


def tfds_cityscapes(config, split: str) -> Source:
    """Cityscapes as TFDS prepares it, left images and their fine masks by train ids."""
    keys = {"image": "image_left", "mask": "segmentation_label"}
    source, _ = _prepared("cityscapes/semantic_segmentation", config["path"], split, keys)
    classes = tuple(CITYSCAPES.split())
    return dataclasses.replace(source, mask_classes=classes, mask_ids=CITYSCAPES_IDS)


def tfds_masks(config, split: str) -> Source:
    """Images and masks of any TFDS data set that is prepared as array_record.

    Fields:
      builder: its name, as "oxford_iiit_pet".
      train_split, validation_split: its splits, "train" and "validation".
      image, mask: the features that hold them, "image" and "segmentation_mask".
      mask_classes: names of the classes; () where the feature has them.
      mask_ids: pairs (id in the file, class), if ids are not classes; see `images.read_mask`.

    Raises: IcmError if there is no such data set, split or feature of images.
    """
    import tensorflow_datasets as tfds

    keys = {"image": config["image"], "mask": config["mask"]}
    name = config["builder"]
    if not name:
        raise FieldError(("data", "builder"), name, 'is empty; set it, as "oxford_iiit_pet"')
    source, features = _prepared(name, config["path"], config[f"{split}_split"], keys)
    images = sorted(n for n, kind in features.items() if isinstance(kind, tfds.features.Image))
    for key, given in keys.items():
        if given not in images:
            told = f"is {given!r}; {name} has the images {', '.join(images)}"
            raise FieldError(("data", key), given, told)
    named = config["mask_classes"] or getattr(features[config["mask"]], "names", None) or ()
    if not named:
        told = f"is empty, and {name} does not name the classes of {config['mask']}; set it"
        raise FieldError(("data", "mask_classes"), (), told)
    ids = mask_ids(config["mask_ids"], len(named), "data.mask_classes")
    return dataclasses.replace(source, mask_classes=tuple(map(str, named)), mask_ids=ids)


def _prepared(name: str, path: str, split: str, keys: Mapping[str, str]) -> tuple[Source, Any]:
    """A split of a data set that TFDS has prepared, and its features."""
    from tensorflow_datasets.core import read_only_builder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:  # from the files alone: the code that made some of them imports TensorFlow
            builder = read_only_builder.builder_from_files(name, data_dir=path or None)
            features: Any = builder.info.features
            if split not in builder.info.splits:
                raise IcmError(
                    f"the TFDS data set {name} has no split {split!r}; it has "
                    f"{', '.join(builder.info.splits)}"
                )
            return from_builder(builder, split, (), (), keys=keys), features
        except IcmError:
            raise
        except Exception as error:
            why = str(error).split("\n")[0]
            raise IcmError(unprepared(name, path or None, why)) from error


def from_builder(
    builder: Any,
    split: str,
    classes: tuple[str, ...],
    mask_classes: tuple[str, ...],
    remedy: str = PREPARE,
    keys: Mapping[str, str] = KEYS,
) -> Source:
    """A split of a TFDS builder whose files are there; an example's label of -1 is none.

    Args: keys: of an example -> the feature that holds it, if there is one.
    """
    import tensorflow_datasets as tfds

    skip, features = tfds.decode.SkipDecoding(), builder.info.features
    held = {key: name for key, name in keys.items() if name in features}
    decoders = {held[key]: skip for key in ("image", "mask") if key in held}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = builder.as_data_source(split=split, decoders=decoders)

    def load(index):
        example = data[index]
        found = {key: example[name] for key, name in held.items()}
        loaded = {"image": found["image"], "name": f"{builder.name} {split} {index}"}
        if "objects" in found:
            given = found["objects"]
            flags = given.get("is_crowd", given.get("is_difficult", np.zeros(len(given["label"]))))
            loaded["objects"] = objects_of(given["bbox"], given["label"], flags)
            loaded["label"] = largest(loaded["objects"])
        if "outlines" in found:
            loaded["outlines"] = functools.partial(read_outlines, found["outlines"])
        if "label" in found:
            loaded["label"] = int(found["label"]) if found["label"] >= 0 else None
        if "mask" in found:
            loaded["mask"] = found["mask"]
        if "name" in found:
            loaded["name"] = found["name"].decode()
        return loaded

    load = guarded(load, builder, split, remedy)
    return Source(builder.name, len(data), classes, load, mask_classes)
