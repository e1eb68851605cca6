"""Sources of images with masks of classes: two folders, PASCAL VOC's and Cityscapes' own."""

import dataclasses

from icm_jax.data.images import IGNORE, OTHERS
from icm_jax.data.sources import SPLITS, SUFFIXES, Source, bytes_of, existing, listed_in, named
from icm_jax.errors import IcmError


def mask_folder(config, split: str) -> Source:
    """Images and masks (PNG, class ids, 255 to ignore) of equal stems, in two folders.

    Fields:
      images, masks: the folders, relative to the path; subfolders are searched too, and "{split}"
        stands for train or val.
      image_suffix, mask_suffix: what ends the stem of each file and is no part of the name that
        both have: with "_leftImg8bit" and "_gtFine_labelIds", a_leftImg8bit.png and
        a_gtFine_labelIds.png are "a".
      mask_ids: pairs (id in the file, class), if ids are not classes; see `images.read_mask`.

    `train.txt` and `val.txt` list names; they may be absent where `images` has "{split}". Names of
    classes are in `classes.txt`.
    """
    root = existing(config)
    folders = [root / config[kind].format(split=SPLITS[split]) for kind in ("images", "masks")]
    found = {}
    for kind, folder in zip(("image", "mask"), folders, strict=True):
        found[kind] = named(folder, config[f"{kind}_suffix"])
    listed = root / f"{SPLITS[split]}.txt"
    by_folder = "{split}" in config["images"] and not listed.is_file()
    names = sorted(found["image"]) if by_folder else listed_in(listed)
    if not names:
        raise IcmError(f"no images for {split} in {folders[0]}; expected {', '.join(SUFFIXES)}")
    classes = tuple(listed_in(root / "classes.txt"))
    ids = mask_ids(config["mask_ids"], len(classes), "classes.txt")
    hint = "; data.images and data.masks name other folders, data.image_suffix and "
    hint += "data.mask_suffix what ends stems"
    source = _with_masks(str(root), names, found["image"], found["mask"], classes, folders, hint)
    return dataclasses.replace(source, mask_ids=ids)


def mask_ids(given, classes: int, place: str) -> dict[int, int] | None:
    """{id in the files: class} of a field of pairs; None of an empty one.

    Args: classes: how many there are. place: where they are named, for errors.

    Raises: IcmError if it is something else, or names a class that there is not.
    """
    try:
        ids = {int(found): int(meant) for found, meant in given} or None
    except (TypeError, ValueError) as error:
        raise IcmError(
            f"data.mask_ids is a list of pairs (id in the file, class), not {given!r}"
        ) from error
    strange = [i for i in (ids or {}).values() if i != IGNORE and not 0 <= i < classes]
    if strange:
        raise IcmError(
            f"data.mask_ids names the class {strange[0]}; {place} has {classes}, and {IGNORE} "
            "is none"
        )
    return ids


VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
)


def voc_masks(config, split: str) -> Source:
    """PASCAL VOC's own folder, as `VOCdevkit/VOC2012`: JPEGImages, SegmentationClass, ImageSets.

    For the 10,582 images with the masks of Hariharan et al. 2011, `data.masks` names their folder
    ("SegmentationClassAug") and `data.list` their list ("trainaug").
    """
    root = existing(config)
    listed = config["list"] if split == "train" else "val"
    stems = listed_in(root / "ImageSets" / "Segmentation" / f"{listed}.txt")
    folders = root / "JPEGImages", root / config["masks"]
    images, masks = (named(folder, "") for folder in folders)
    return _with_masks(str(root), stems, images, masks, tuple(VOC_CLASSES.split()), folders)


CITYSCAPES = (
    "road sidewalk building wall fence pole light sign vegetation terrain sky person rider car "
    "truck bus train motorcycle bicycle"
)
"""The 19 classes that are scored, by their train ids (Cordts et al. 2016)."""
_SCORED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_IDS = {found: meant for meant, found in enumerate(_SCORED)} | {OTHERS: IGNORE}
"""Train ids by the ids in `*_labelIds.png`."""


def cityscapes(config, split: str) -> Source:
    """Cityscapes' own folder: leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY, its ids made train ids.

    The field `masks` names another labelling, "gtCoarse".
    """
    root, kind = existing(config), config["masks"]
    folders = [root / name / SPLITS[split] for name in ("leftImg8bit", kind)]
    images = named(folders[0], "_leftImg8bit")
    masks = named(folders[1], f"_{kind}_labelIds")
    if not images:
        raise IcmError(f"{folders[0]} has no *_leftImg8bit.png; data.path is the folder above it")
    classes = tuple(CITYSCAPES.split())
    source = _with_masks(str(root), sorted(images), images, masks, classes, folders)
    return dataclasses.replace(source, mask_ids=CITYSCAPES_IDS)


def _with_masks(name: str, names, images, masks, classes, folders, hint="") -> Source:
    """Images and masks of these names, each {name: file}; `folders` are for errors."""
    for kind, there, folder in zip(("image", "mask"), (images, masks), folders, strict=True):
        missing = [name for name in names if name not in there]
        if missing:
            share = f"{len(missing)} of {len(names)} are missing"
            raise IcmError(f"{folder} has no {kind} {missing[0]!r} ({share}){hint}")

    def load(index):
        path = images[names[index]]
        return {"image": bytes_of(path), "mask": bytes_of(masks[names[index]]), "name": str(path)}

    return Source(name, len(names), (), load, classes)
