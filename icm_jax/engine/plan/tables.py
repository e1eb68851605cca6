"""Plans as Markdown tables, the figures they rest on, and advice for what does not fit."""

import math
from collections.abc import Sequence

from icm_jax.engine.plan.chips import GIB, Target


def describe(target: Target, records: list[dict]) -> str:
    """Tables of the records, the figures they rest on, and advice for what does not fit."""
    chip = target.chip
    lines = [f"{target.name}: {len(target.devices)} devices"]
    if chip:
        lines[0] += (
            f" of {chip.flops / 1e12:.0f} TFLOP/s (bfloat16), {chip.memory / GIB:.0f} GiB at "
            f"{chip.memory_rate / 1e9:.0f} GB/s, sending {chip.network_rate / 1e9:.0f} GB/s "
            f"({chip.source})"
        )
    lines += ["", "Per device:", "", memory_table(records), "", "A step:", "", cost_table(records)]
    for record in records:
        if "excess" in record:
            lines += ["", advice(record)]
    return "\n".join(lines)


def advice(record: dict) -> str:
    """What would make a program fit that is too large."""
    much = f"{record['run']} at batch {record['batch']:,} needs {_size(record['excess'])} too much"
    ways = []
    if record["remat"] != "blocks":
        ways.append("--config.train.remat=blocks")
    ways.append(f"a batch of about {_fitting(record):,}")
    held = record["parameters"] + record["optimiser"]
    if held > 0.2 * record["peak"]:
        ways.append(f"--config.train.fsdp={math.gcd(8, record['devices'])}")
    return f"{much}: try {', or '.join(ways)}; --compare compiles these"


def _fitting(record: dict) -> int:
    """The batch that would fit if memory beside the state grew with it."""
    held = record["parameters"] + record["optimiser"] + record["others"]
    rows = record["batch"] / record["devices"]
    rows *= max(record["memory"] - held, 0) / max(record["peak"] - held, 1)
    return record["devices"] * 2 ** max(0, math.floor(math.log2(max(rows, 1))))


def memory_table(records: list[dict]) -> str:
    """Bytes of one device, as a Markdown table."""
    kept = ("parameters", "optimiser", "others", "batch_bytes", "temporary", "peak")
    rows = []
    for record in records:
        sizes = [_size(record.get(name)) for name in kept]
        room = record["memory"] - record["peak"] if "memory" in record else None
        sizes.append("" if room is None else ("" if room >= 0 else "-") + _size(abs(room)))
        rows.append([*_what(record), *sizes])
    heads = ("parameters", "optimiser", "other state", "batch", "within a step", "peak", "free")
    return _table([*_WHAT, *heads], rows)


def cost_table(records: list[dict]) -> str:
    """Work of one step on one device and the roofline's times, as a Markdown table."""
    rows = []
    for record in records:
        if "flops" not in record:
            continue
        kinds = ", ".join(f"{kind} {_size(size)}" for kind, size in sorted(record["sent"].items()))
        row = [f"{record['flops'] / 1e12:.3g}", _size(record["bytes_accessed"]), kinds or "nothing"]
        if "seconds" in record:
            row += [f"{1e3 * record[name]:.3g} ms" for name in ("compute", "traffic", "network")]
            row += [record["bound"], f"{record['images_per_second']:,.0f}"]
        rows.append([*_what(record), *row])
    heads = ["TFLOP", "memory traffic", "sent"]
    if any("seconds" in record for record in records):
        heads += ["compute", "traffic", "network", "bound", "images/s at most"]
    return _table([*_WHAT, *heads], rows)


_WHAT = ("run", "batch", "remat", "fsdp")


def _what(record: dict) -> list[str]:
    return [record["run"], f"{record['batch']:,}", record["remat"], str(record["fsdp"])]


def _table(heads: Sequence[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _size(size: float | None) -> str:
    if size is None:
        return ""
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"
