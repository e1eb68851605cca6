"""What a field of a config may be: tables {name: `Field`}, and how values are held against them.

A table stands beside what reads its fields: those of data sets in `icm_jax.data`, of codecs in
`icm_jax.codecs.fields`, of tasks in `icm_jax.tasks.fields`, of runs in `icm_jax.engine.fields`,
which checks a run when it is made.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from icm_jax.data import geometry
from icm_jax.errors import IcmError


class Field(NamedTuple):
    """One field.

    Attributes:
      expected: what it must be, in words. fits: value -> whether it is that.
      needed: whether it is wrong to leave it out.
    """

    expected: str
    fits: Callable[[Any], bool]
    needed: bool = True


class Named(NamedTuple):
    """A field that holds a name and what belongs to it: {"name": "yolov3", "width": 0.25}.

    Attributes:
      names: those that there are; None: any. tables: name -> the fields beside it; of a name that
        is not there nothing is checked. needed: as of `Field`.
    """

    names: Mapping[str, Any] | None
    tables: Mapping[str, Mapping[str, "Field | Named"]]
    needed: bool = True


Table = Mapping[str, Field | Named]


class FieldError(IcmError):
    """A field that cannot be used.

    Attributes: place: names from the outermost on, e.g. ("task", "codec", "width"). value: what was
      given. told: what is wrong with it, in words that follow its name. run: which one it is of.
    """

    def __init__(self, place: tuple[str, ...], value: Any, told: str, run: str = ""):
        self.place, self.value, self.told, self.run = place, value, told, run
        super().__init__(f"{run}: {self.text()}" if run else self.text())

    def text(self, name: str = "") -> str:
        """The message, with another name of the field."""
        return f"{name or '.'.join(self.place)} {self.told}"


def check(given: Mapping[str, Any], table: Table, *place: str, run: str = "") -> None:
    """Raises FieldError for the first field of a table that is not as it says; those that no table
    names are left alone. `place` and `run` are for the message."""
    for name, field in table.items():
        here = (*place, name)
        if name not in given:
            if field.needed:
                raise FieldError(here, ..., "is missing", run)
        elif isinstance(field, Named):
            value = given[name]
            if not hasattr(value, "items") or "name" not in value:
                raise FieldError(here, value, f"is {value!r}; it must have a name", run)
            if field.names is not None and value["name"] not in field.names:
                told = f"is {value['name']!r}; it must be one of {', '.join(field.names)}"
                raise FieldError((*here, "name"), value["name"], told, run)
            check(value, field.tables.get(value["name"], {}), *here, run=run)
        elif not field.fits(given[name]):
            value = given[name]
            raise FieldError(here, value, f"is {value!r}; it must be {field.expected}", run)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field of a config.

    >>> list(leaves({"seeds": (0,), "train": {"ema": 0.0}}))
    [('seeds', (0,)), ('train.ema', 0.0)]
    """
    for name, value in tree.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def whole(least: int = 0, most: int | None = None) -> Field:
    """A whole number.

    >>> whole(1).expected, whole(1).fits(0), whole(1).fits(True), whole(0, 9).fits(9)
    ('a whole number of at least 1', False, False, True)
    """
    text = f"of at least {least}" if most is None else f"from {least} to {most}"

    def fits(value):
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return value >= least and (most is None or value <= most)

    return Field(f"a whole number {text}", fits)


def number(
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Field:
    """A finite number between bounds, which `above` and `below` leave out.

    >>> number(0, below=1).expected, number(0, below=1).fits(1)
    ('a number of at least 0 and below 1', False)
    """
    bounds = {"of at least": least, "above": above, "of at most": most, "below": below}
    said = [f"{words} {bound}" for words, bound in bounds.items() if bound is not None]

    def fits(value):
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        low = (least is None or value >= least) and (above is None or value > above)
        high = (most is None or value <= most) and (below is None or value < below)
        return math.isfinite(value) and low and high

    return Field(" ".join(["a number", " and ".join(said)]).strip(), fits)


def one_of(*names: str | int) -> Field:
    """One of the names, or numbers, given."""
    listed = [name if isinstance(name, str) else str(name) for name in names]
    expected = f"one of {', '.join(listed)}" if len(listed) > 1 else listed[0]
    return Field(expected, lambda value: any(type(value) is type(n) and value == n for n in names))


def several(field: Field, count: int | None = None, least: int = 1) -> Field:
    """A tuple of such values: exactly `count`, or at least so many."""
    words = f"{count}" if count else "one or more" if least else "none or more"

    def fits(value):
        if not isinstance(value, tuple | list):
            return False
        right = len(value) == count if count else len(value) >= least
        return right and all(map(field.fits, value))

    return Field(f"a tuple of {words}, each {field.expected}", fits)


def either(one: Field, other: Field) -> Field:
    """What fits one of two."""
    return Field(
        f"{one.expected}, or {other.expected}", lambda value: one.fits(value) or other.fits(value)
    )


FieldOrNamed = TypeVar("FieldOrNamed", Field, Named)


def optional(field: FieldOrNamed) -> FieldOrNamed:
    """The same; it may be left out."""
    return field._replace(needed=False)


def _is_size(value) -> bool:
    try:
        return geometry.sides(value) is not None and not isinstance(value, bool)
    except (IcmError, TypeError):
        return False


def _is_shares(value) -> bool:
    share = number(above=0, most=1)
    return several(share, 2).fits(value) and value[0] <= value[1]


def _is_colour(value) -> bool:
    digits = "0123456789abcdefABCDEF"
    plain = isinstance(value, str) and len(value) == 7 and value[0] == "#"
    return value == "" or (plain and all(digit in digits for digit in value[1:]))


FLAG = Field("True or False", lambda value: isinstance(value, bool))
TEXT = Field("text", lambda value: isinstance(value, str))
NAME = Field("text that is not empty", lambda value: isinstance(value, str) and value != "")
SIZE = Field("a whole number of pixels or (height, width), above 0", _is_size)
SHARES = Field("a least and a largest share of the area, as (0.5, 1.0)", _is_shares)
COLOUR = Field('"#rrggbb", or ""', _is_colour)
DTYPE = one_of("float32", "bfloat16", "float16")
SCENES = {
    "size": whole(32),
    "train": whole(1),
    "validation": whole(1),
    "seed": whole(),
    "quality": whole(1, 100),
}
"""Of the embedded data, `icm_jax.data.scenes`."""
