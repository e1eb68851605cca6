"""Tables of a report, as lists of rows of cells: curves, BD-rates, bitstreams, arms."""

import numpy as np

from icm_jax.measure.metrics import bd_rate
from icm_jax.report.curves import Measure, curves_of
from icm_jax.report.looks import looks_of, name_and_point, title_of


def curve_table(records: list[dict], measure: Measure) -> list[list[str]]:
    top5, looks = any("top5" in record for record in records), looks_of(records)
    head = ["curve", "point", "seed", "bpp measured", "bpp without tables", measure.axis]
    rows = [[*head, *(["top-5 [%]"] if top5 else []), "images"]]
    for r in sorted(
        records, key=lambda r: (r["arm"], r["kind"], r.get("quality") or 0, r.get("bpp", 99))
    ):
        name, point = name_and_point(r)
        stream = r["kind"] == "stream"
        rates = [f"{r[key]:.4f}" if key in r else "–" for key in ("bpp", "bpp_without_tables")]
        last = [f"{100 * r['top5']:.1f}"] if top5 else []
        value = f"{measure.factor * r[measure.key]:.{1 if measure.factor == 100 else 2}f}"
        title = looks[name].title if stream or measure.curve == "image" else f"pixels: {name}"
        if stream and measure.curve != "image":
            point = title_of(point)
        rows.append([title, point, str(r["seed"]), *rates, value, *last, str(r["images"])])
    return rows


def bd_table(records: list[dict], measure: Measure) -> list[list[str]]:
    """BD-rate of the reference, or the first learned codec, against every other, seed by seed.

    A curve that does not depend on the seed (one file format on one network) stands against all.
    """
    streams = [record for record in records if record["kind"] == "stream"]
    if not streams:
        return []
    ours = next((r["arm"] for r in streams if r.get("reference")), streams[0]["arm"])
    looks = looks_of(records)
    rows = [[f"BD-rate of {looks[ours].title} against", "bits at equal quality"]]
    arms = {record["arm"] for record in streams}
    seeds = sorted({record["seed"] for record in records})
    each = [curves_of([r for r in records if r["seed"] == s], measure.key) for s in seeds]
    for name, whole in curves_of(records, measure.key).items():
        if name == ours:
            continue
        anchors = [curve.get(name, None if name in arms else whole) for curve in each]
        both = [(a, curve) for a, curve in zip(anchors, each, strict=True) if a is not None]
        pairs = [(anchor, curve[ours]) for anchor, curve in both if ours in curve]
        values = np.array([bd_rate(anchor[:, :2], curve[:, :2]) for anchor, curve in pairs])
        if not len(values) or np.isnan(values).any():
            few = any(min(map(len, pair)) < 2 for pair in pairs)
            text = "– (needs two points)" if few else "– (no quality that both curves reach)"
        elif len(values) == 1:
            text = f"{values[0]:+.1f} %"
        else:
            each_text = ", ".join(f"{value:+.1f}" for value in values)
            text = f"{values.mean():+.1f} ± {values.std():.1f} % (by seed: {each_text})"
        rows.append([looks[name].title, text])
    return rows


def stream_table(records: list[dict]) -> list[list[str]]:
    """Each codec once: where its bits go, how near they are to the estimate, how long it takes."""
    segments = list(dict.fromkeys(key for r in records for key in r if key.startswith("bpp_")))
    segments = [key for key in segments if key not in ("bpp_estimated", "bpp_header")]
    rows = [
        [
            "codec",
            "point",
            "seed",
            "bpp measured",
            "bpp estimated",
            "header bpp",
            *(f"{key.removeprefix('bpp_')} bpp" for key in segments),
            "worst bytes above estimate + 1 %",
            "encode [ms]",
            "decode [ms]",
        ]
    ]
    looks = looks_of(records)
    codecs_seen = {(*name_and_point(r), r["seed"]): r for r in reversed(records)}
    for (arm, point, seed), r in sorted(codecs_seen.items(), key=lambda item: item[1]["bpp"]):
        rates = ("bpp", "bpp_estimated", "bpp_header", *segments)
        others = ("worst_gap_bytes", "encode_ms", "decode_ms")
        rows.append(
            [
                looks[arm].title,
                point,
                str(seed),
                *(f"{r[key]:.4f}" if key in r else "–" for key in rates),
                *(f"{r[key]:.1f}" if key in r else "–" for key in others),
            ]
        )
    return rows


def arms_table(arms: list[dict], speeds: list[dict]) -> list[list[str]]:
    """One row an arm, as in the tables of Gueguen et al. 2018; factors are to the first arm."""
    head = ["arm", "top-1 [%]", "top-5 [%]", "seeds", "network [images/s]", "from files [images/s]"]
    rows = [[*head, "G multiply-accumulates", "M parameters"]]
    timed, first = by_arm(speeds), {}
    for arm, of_arm in by_arm(arms).items():
        scores = []
        for key in ("top1", "top5"):
            values = 100 * np.array([r[key] for r in of_arm])
            spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
            scores.append(f"{values.mean():.1f}{spread}")
        cells = ["–"] * 4
        if arm in timed:
            for place, key in enumerate(("network_images_per_second", "images_per_second")):
                value = float(np.median([r[key] for r in timed[arm]]))
                first.setdefault(key, value)
                cells[place] = f"{value:.0f} ({value / first[key]:.2f} ×)"
            cells[2] = f"{timed[arm][0]['multiply_accumulates'] / 1e9:.3f}"
            cells[3] = f"{timed[arm][0]['parameters'] / 1e6:.2f}"
        rows.append([arm, *scores, str(len(of_arm)), *cells])
    return rows if speeds else [row[:4] for row in rows]  # with speed=0 nothing is measured


def by_arm(records: list[dict]) -> dict[str, list[dict]]:
    """Records of each arm, in order of appearance."""
    found: dict[str, list] = {}
    for record in records:
        found.setdefault(arm_of(record), []).append(record)
    return found


def arm_of(record: dict) -> str:
    """A network, at its operating point if it has one."""
    return f"{record['arm']} {record['point']}".strip()
