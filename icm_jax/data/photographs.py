"""Sources of images without labels: any folders, and Vimeo-90K."""

import os

from icm_jax.data.sources import (
    SPLITS,
    SUFFIXES,
    Source,
    bytes_of,
    existing,
    images_in,
    images_of,
    listed_in,
)
from icm_jax.errors import IcmError


def photos(config, split: str) -> Source:
    """Images without labels, in a folder and its subfolders, or in several, as "here:there".

    `train.txt` and `val.txt` list files, or every fifth image by name hash is kept for validation.
    With the field `whole` either split is all of them: a set that is only scored on, as Kodak's.
    """
    short, entries = SPLITS[split], []
    folders = str(config["path"]).split(os.pathsep)
    for root in [existing(dict(config, path=folder)) for folder in folders]:
        if config["whole"]:
            found = images_in(root)
        elif (root / f"{short}.txt").is_file():
            found = [root / line for line in listed_in(root / f"{short}.txt")]
        else:
            found = images_of(root, split)
        if not found:
            raise IcmError(f"no images for {split} in {root}; expected files {', '.join(SUFFIXES)}")
        entries += found

    def load(index):
        return {"image": bytes_of(entries[index]), "name": str(entries[index])}

    return Source(os.pathsep.join(folders), len(entries), (), load)


def vimeo90k(config, split: str) -> Source:
    """Vimeo-90K (Xue et al. 2019) as it is unpacked: sequences/NNNNN/NNNN/im1.png and so on.

    `sep_trainlist.txt` and `sep_testlist.txt` list the folders of seven frames, `tri_trainlist.txt`
    and `tri_testlist.txt` those of three. Every frame is an image; the field `frames` chooses among
    them, as (4,), the middle one of seven.
    """
    root = existing(config)
    ends = {"train": "trainlist.txt", "validation": "testlist.txt"}[split]
    lengths = {root / f"sep_{ends}": 7, root / f"tri_{ends}": 3}
    listed = next((path for path in lengths if path.is_file()), None)
    if listed is None:
        names = " nor ".join(path.name for path in lengths)
        raise IcmError(f"{root} has neither {names}; data.path is the folder that Vimeo-90K has")
    frames = tuple(config["frames"]) or tuple(range(1, lengths[listed] + 1))
    if not all(isinstance(n, int) and 1 <= n <= lengths[listed] for n in frames):
        raise IcmError(f"data.frames are numbers from 1 to {lengths[listed]}, not {frames}")
    folders = [root / "sequences" / name for name in listed_in(listed)]
    if not folders:
        raise IcmError(f"{listed} lists no sequence")

    def load(index):
        folder, frame = folders[index // len(frames)], frames[index % len(frames)]
        path = folder / f"im{frame}.png"
        return {"image": bytes_of(path), "name": str(path)}

    return Source(str(root), len(folders) * len(frames), (), load)
