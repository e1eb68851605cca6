"""A reader of weights under other names: those of this package, with dots, in PyTorch's layout."""

from flax.traverse_util import flatten_dict, unflatten_dict

from icm_jax.weights.tensors import tensors


def dotted(path, shapes) -> dict:
    """Those parameters of the task that a file has. Raises: IcmError if it cannot be read."""
    there, found = tensors(path), {}
    for place in flatten_dict(shapes["params"]):
        if ".".join(place) in there:
            array = there[".".join(place)].read()
            found[place] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    return {"params": unflatten_dict(found)}
