"""Weights of other software, as what a run starts from: one reader per format.

A reader takes a path and the shapes of the variables that a run would start from, and gives those
that the file has, under the same names:

    (path, {collection: {name: ... ShapeDtypeStruct}}) -> {collection: {name: ... array}}

It may leave out what it likes: the rest keeps its random start.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from icm_jax.errors import IcmError
from icm_jax.weights import darknet, icmc, resnet

READERS: dict[str, Callable[[str | os.PathLike, Mapping[str, Any]], Mapping[str, Any]]] = {
    "darknet": darknet.detector,
    "icmc": icmc.codec,
    "resnet": resnet.backbone,
}
"""Name -> reader."""
PACKAGED = "icmc"
"""The reader whose path may be empty, for the model in the package."""


def start_from(
    variables: Mapping[str, Any], reader: str, path: str | os.PathLike, kept: Sequence[str] = ()
) -> dict:
    """`variables` with what a file has in their place, as NumPy arrays of the same dtypes. What it
    lacks of these networks is named on standard error. The parts `kept` stay as they are.

    Raises: IcmError for an unknown reader, a file that it cannot read, or one that gives nothing,
    or anything that the variables have not, or in another shape.
    """
    if reader not in READERS:
        raise IcmError(f"no reader of weights {reader!r}; choose one of {', '.join(READERS)}")
    shapes = {
        collection: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        for collection, tree in variables.items()
    }
    shapes = {c: {k: v for k, v in tree.items() if k not in kept} for c, tree in shapes.items()}
    leaves: dict = flax.traverse_util.flatten_dict(variables, keep_empty_nodes=True)
    given: dict = flax.traverse_util.flatten_dict(READERS[reader](path, shapes))
    path = path or "the model in the package"
    if not given:
        raise IcmError(f"{path} has no weights for this task's networks")
    for place, value in given.items():
        if place not in leaves:
            name = "/".join(place)
            raise IcmError(f"{path} has weights {name}, which this task's networks have not")
        expected = leaves[place]
        if np.shape(value) != expected.shape:
            raise IcmError(
                f"the weights {'/'.join(place)} of {path} have shape {np.shape(value)}, those of "
                f"this task {expected.shape}"
            )
        leaves[place] = np.asarray(value, expected.dtype)
    networks = {place[:2] for place in given}
    absent = ["/".join(place) for place in leaves if place[:2] in networks and place not in given]
    if absent and jax.process_index() == 0:
        text = f"{path} lacks {absent[0]} and {len(absent) - 1} arrays more, which start at random"
        print(text, file=sys.stderr)
    return flax.traverse_util.unflatten_dict(leaves)
