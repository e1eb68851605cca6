"""What a function costs, counted on its program."""

import math
from collections.abc import Callable
from typing import Any

import jax


def held(compiled: Any) -> int:
    """Bytes of a device that a compiled function takes at once: its arguments, results, program and
    what lives in between."""
    size = compiled.memory_analysis()
    return (
        size.argument_size_in_bytes
        + size.output_size_in_bytes
        - size.alias_size_in_bytes
        + size.temp_size_in_bytes
        + size.generated_code_size_in_bytes
    )


def multiply_accumulates(function: Callable, *arguments: Any) -> int:
    """Multiply-accumulates of the convolutions and matrix products of a function.

    Of branches the cheapest counts: forms of one convolution for this and that platform differ by
    taps that are zero.

    Args:
      arguments: arrays, or `jax.ShapeDtypeStruct`s: nothing is computed.

    >>> left, right = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 3), (3, 4)))
    >>> multiply_accumulates(lambda a, b: a @ b, left, right)
    24
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
            features = kernel[numbers.rhs_spec[0]]
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // features
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(
                left[axis] for axis in contracted
            )
        for name, value in equation.params.items():
            values = value if isinstance(value, tuple | list) else (value,)
            inner = (getattr(nested, "jaxpr", nested) for nested in values)
            counts = [_count(nested) for nested in inner if hasattr(nested, "eqns")]
            total += min(counts) if name == "branches" else sum(counts)
    return total
