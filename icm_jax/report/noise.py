"""The table of scores on images with noise."""

import numpy as np

from icm_jax.report.looks import title_of_arm

KEYS = {"top1": "top-1 [%]", "miou": "mIoU [%]"}


def noise_table(records: list[dict]) -> list[list[str]]:
    """A row an arm at its operating point: its score on the images as they are and for each
    deviation of the noise, means over the seeds, with what the noise costs. No rows without noise.
    """
    noisy = [record for record in records if record.get("curve") == "noise"]
    runs = {record["run"] for record in noisy}
    plain = [r for r in records if r["run"] in runs and r["kind"] in ("stream", "pixels")]
    levels = sorted({record["quality"] for record in noisy})
    rows = [["arm", "point", "score", "σ = 0", *(f"σ = {level:g}" for level in levels)]]
    found: dict[tuple, dict[float, list]] = {}
    for record in plain + noisy:
        for key in KEYS.keys() & record.keys():
            of_arm = found.setdefault((title_of_arm(record), record["point"], key), {})
            of_arm.setdefault(record["quality"] or 0, []).append(100 * record[key])
    for (arm, point, key), values in found.items():
        whole = np.mean(values[0]) if 0 in values else np.nan
        cells = [f"{whole:.1f}"]
        for level in levels:
            mean = np.mean(values[level]) if level in values else np.nan
            cells.append("–" if np.isnan(mean) else f"{mean:.1f} ({mean - whole:+.1f})")
        rows.append([arm, point or "–", KEYS[key], *cells])
    return rows if noisy else []
