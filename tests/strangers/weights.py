"""A reader of another format of weights: .safetensors, with PyTorch's layout of kernels.

A file is the length of a header, 64 bits; the header, JSON that tells of each tensor its type, its
shape and where its bytes lie; and these bytes. Names here are those of the package, with dots.
"""

import json
import pathlib

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from icm_jax.errors import IcmError

TYPES = {"F32": "<f4", "F16": "<f2"}


def safetensors(path, shapes) -> dict:
    """Those parameters of the task that a file has.

    Raises: IcmError if it cannot be read, or holds another type than real numbers.
    """
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise IcmError(f"cannot read the weights {path}: {error.strerror}") from error
    begin = 8 + int.from_bytes(data[:8], "little")
    header, found = json.loads(data[8:begin]), {}
    for place in flatten_dict(shapes["params"]):
        told = header.get(".".join(place))
        if told is None:
            continue
        if told["dtype"] not in TYPES:
            raise IcmError(f"{path} holds {told['dtype']}; expected {', '.join(TYPES)}")
        first, end = (begin + offset for offset in told["data_offsets"])
        array = np.frombuffer(data[first:end], TYPES[told["dtype"]]).reshape(told["shape"])
        found[place] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    return {"params": unflatten_dict(found)}
