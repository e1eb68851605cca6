"""Record files of TFDS that turn out to be damaged while they are read."""

from collections.abc import Callable
from typing import Any

import numpy as np

from icm_jax.errors import IcmError, reason

PREPARE = "prepare the data set anew"


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
