"""Record files of TFDS that are not there, or turn out to be damaged while they are read."""

from collections.abc import Callable
from typing import Any

import numpy as np

from icm_jax.errors import IcmError, reason

PREPARE = "prepare the data set anew"


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
