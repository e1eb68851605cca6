"""What a frozen codec consists of: the names, shapes and types of its arrays, by its configuration.

A fingerprint is over names, types and bytes. So an array of another shape is found here, and by
its name, before it takes memory or fails inside of a network.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from icm_jax.codecs import programs
from icm_jax.codecs.codec import Codec
from icm_jax.coding.archive import Stored
from icm_jax.errors import IcmError
from icm_jax.nets import integer

Form = tuple[tuple[int, ...], str]
"""Shape and dtype of an array."""
_LONGEST_ROW = (1 << 16) + 2
"""Of a table: a precision of 16 bits leaves room for no more."""


def require(codec: Codec, arrays: Mapping[str, Stored]) -> None:
    """Raises: IcmError, naming an array, if those of a codec file are not what its codec needs.

    It is remembered where compiled programs are kept, for initialising a codec takes a third of a
    second even without numbers.
    """
    described = sorted((name, array.shape, array.dtype.name) for name, array in arrays.items())
    programs.once(codec, repr(described), lambda: _require(codec, arrays))


def _require(codec: Codec, arrays: Mapping[str, Stored]) -> None:
    given: dict[str, Form] = {
        name: (array.shape, "float32" if array.dtype == "float16" else array.dtype.name)
        for name, array in arrays.items()
    }
    needed = _of_transforms(codec) | _of_priors(codec, given)
    spare = {name for name in needed if _is_spent(codec, name)}
    for name in sorted(needed.keys() - given.keys() - spare):
        raise IcmError(f"it lacks the array {name}, {_said(needed[name])}")
    for name in sorted(given.keys() - needed.keys()):
        raise IcmError(f"its codec {codec.config[0]!r} has no array {name}")
    for name, form in given.items():
        if form != needed[name]:
            raise IcmError(
                f"the array {name} is {_said(form)}, its codec takes {_said(needed[name])}"
            )


def _said(form: Form) -> str:
    return f"{form[1]} {list(form[0])}"


@functools.lru_cache(64)
def _of_transforms(codec: Codec) -> dict[str, Form]:
    """Of the variables that training gives."""
    image = (1, 64, 64, 3)
    variables: Any = jax.eval_shape(
        lambda: codec.init(jax.random.key(0), jnp.zeros(image, jnp.uint8))
    )
    flat: Any = flax.traverse_util.flatten_dict(variables)
    return {
        "/".join(("variables", *path)): (leaf.shape, leaf.dtype.name)
        for path, leaf in flat.items()
        if path[0] in ("params", "batch_stats") and path[1] in codec.parts
    }


def _is_spent(codec: Codec, name: str) -> bool:
    """Whether an array is of a network that the exact priors do without."""
    spent = ("/".join(("variables", "params", *s.spent, "")) for s in codec.segments if s.spent)
    return name.startswith(tuple(spent))


def _of_priors(codec: Codec, given: Mapping[str, Form]) -> dict[str, Form]:
    """Of integer networks and tables; where a codec does not tell, of what is given."""
    found = {}
    channels = {segment.name: segment.shape(1, 1)[2] for segment in codec.segments}
    for segment in codec.segments:
        own = f"variables/integer/{segment.name}/"
        own_given = {name: form for name, form in given.items() if name.startswith(own)}
        if segment.integers is None:
            found |= own_given
        else:
            shapes: dict[str, dict[str, tuple[int, ...]]] = {}
            for name, (shape, _) in own_given.items():
                node, _, array = name.removeprefix(own).partition("/")
                shapes.setdefault(node, {})[array] = shape
            needed = segment.integers(shapes, channels)
            found |= {own + "/".join(path): form for path, form in needed.items()}
        cdf, offsets = (f"tables/{segment.name}/{name}" for name in ("cdf", "offsets"))
        rows = segment.rows or math.prod(given.get(offsets, ((1,), ""))[0])
        length = min(math.prod(given.get(cdf, ((0,), ""))[0]), rows * _LONGEST_ROW)
        found |= {cdf: ((length,), "int32"), offsets: ((rows,), "int32")}
    return found


def of_network(
    nodes: Sequence[integer.Node],
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    channels: Mapping[str, int],
    outputs: int,
) -> dict[tuple[str, str], Form]:
    """What `integer.run` takes: {(node or input, array): (shape, dtype)}.

    How wide its inner nodes are is told by their kernels.

    Args:
      shapes: of the arrays that are there. channels: of the inputs. outputs: F of the last node.
    """
    found: dict[tuple[str, str], Form] = {}
    features = dict(channels)
    for name in integer.input_names(nodes):
        given = shapes.get(name)
        if given is not None:  # one shift for all, in older files
            one = given.get("shift", ()) in ((), (1,))
            found[name, "shift"] = (given.get("shift", ()) if one else (features[name],), "int32")
    for node in nodes:
        kernel = shapes.get(node.name, {}).get("kernel", ())
        own = node.features or (outputs if node is nodes[-1] else max((1, *kernel[-1:])))
        own += -own % (4 if node.up else 1)
        features[node.name] = own // 4 if node.up else own
        seen = sum(features[name] for name in node.inputs)
        found[node.name, "kernel"] = ((node.side, node.side, seen, own), "int8")
        vectors = ("bias", "first", "multiplier", "second", "low", "high")
        for name in (*vectors, *(("negative",) if node.activation == "leaky_relu" else ())):
            found[node.name, name] = ((own,), "int32")
    return found
