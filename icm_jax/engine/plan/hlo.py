"""What a compiled program sends to other devices, read off its HLO text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective operation of a program: its kind, the bytes of its whole result on a device,
    how many devices take part, and how often it runs in a step."""

    kind: str
    size: int
    group: int
    times: int


def collectives(text: str, devices: int) -> Iterator[Collective]:
    """Every collective operation of a program compiled for so many devices, from its HLO text."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)
        if head and line.endswith("{"):
            name = head[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    yield from _within(bodies, entry, 1, devices)


_DONE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def _within(bodies, name: str, times: int, devices: int) -> Iterator[Collective]:
    for line in bodies.get(name, ()):
        found = _DONE.search(line)
        if found:
            shapes, kind, start = found.groups()
            parts = [_shape_bytes(*shape) for shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes)]
            one_to_one = kind == "collective-permute"
            if start and kind != "all-reduce":  # its result holds the operands, too
                parts = parts[1:2] if one_to_one else parts[len(parts) // 2 :]
            group = 2 if one_to_one else _group(line, devices)
            yield Collective(kind, sum(parts), group, times)
            continue
        loop = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
        inner = times * (int(loop[1]) if loop else 1)
        for called in _CALLED.findall(line):
            yield from _within(bodies, called, inner, devices)
        for called in (name for group in _BRANCHES.findall(line) for name in group.split(", ")):
            yield from _within(bodies, called.strip("% "), times, devices)


def _group(line: str, devices: int) -> int:
    """Devices in a group, which XLA writes in one of these ways: {{0,1},{2,3}}; {} for all;
    [groups,devices]<=[...]; mesh['a'=2,'b'=4] {'b'}, axes of a mesh or parts 'b':(before)size, also
    with device_ids=([2,4]T(1,0)) between, the order of its devices."""
    groups = line.partition("replica_groups=")[2]
    if re.match(r"\{\{", groups):
        return groups[: groups.index("}")].count(",") + 1
    if groups.startswith("{}"):
        return devices
    if compact := re.match(r"\[(\d+),(\d+)\]", groups):
        return int(compact[2])
    if mesh := re.match(r"\w*mesh\w*\[([^\]]*)\](?:, device_ids=\S+)?\s*\{([^}]*)\}", groups):
        sides = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sides[name] for name, part in parts)
    raise ValueError(f"cannot read the groups of {line.strip()[:200]}")


_WIDTHS = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}


def _shape_bytes(dtype: str, sides: str) -> int:
    bits = re.fullmatch(r"[su](\d+)", dtype)
    width = _WIDTHS.get(dtype) or (max(1, int(bits[1]) // 8) if bits else 1)
    return width * math.prod(int(side) for side in sides.split(",") if side)


def sent(text: str, devices: int) -> dict[str, float]:
    """{kind: bytes that a device sends in a step}, by rings: those move the least.

    >>> program = "ENTRY %main {\\n  %s = f32[8]{0} all-reduce(%x), replica_groups={}\\n}"
    >>> sent(program, 4)
    {'all-reduce': 48.0}
    """
    totals: dict[str, float] = {}
    for kind, size, group, times in collectives(text, devices):
        others = group - 1
        share = {
            "all-reduce": 2 * others / group,
            "reduce-scatter": others,  # its result is one part
            "collective-permute": 1,
        }.get(kind, others / group)
        totals[kind] = totals.get(kind, 0.0) + times * share * size
    return totals
