"""Tables of a report, as lists of rows of cells: curves, BD-rates, bitstreams, arms."""

from collections.abc import Iterator, Sequence

import numpy as np

from icm_jax.measure import draws
from icm_jax.measure.metrics import bd_rate, rate_at
from icm_jax.report.curves import Measure, curves_of
from icm_jax.report.looks import SOURCE, looks_of, name_and_point, set_of, title_of

LOSS = 2
"""Points, in per cent, of a score that a codec may cost."""
WITHIN = f"{100 * draws.LEVEL:.0f} % of draws"
"""Head of a column of intervals."""


def curve_table(records: list[dict], measure: Measure) -> list[list[str]]:
    """A row a record; of scores in per cent also the difference to the pixels of the same seed."""
    top5, looks = any("top5" in record for record in records), looks_of(records)
    pixels = {r["seed"]: r for r in records if r["kind"] == "pixels"}
    apart = any(drawn_difference(r, pixels, measure) is not None for r in records)
    head = ["curve", "point", "seed", "bpp measured", "bpp without tables", measure.axis]
    head += [f"to pixels ({WITHIN})"] if apart else []
    rows = [[*head, *(["top-5 [%]"] if top5 else []), "images"]]
    for r in sorted(
        records, key=lambda r: (r["arm"], r["kind"], r.get("quality") or 0, r.get("bpp", 99))
    ):
        name, point = name_and_point(r)
        stream = r["kind"] == "stream"
        rates = [f"{r[key]:.4f}" if key in r else "–" for key in ("bpp", "bpp_without_tables")]
        difference = drawn_difference(r, pixels, measure)
        last = ["–" if difference is None else difference] if apart else []
        last += [f"{100 * r['top5']:.1f}"] if top5 else []
        value = f"{measure.factor * r[measure.key]:.{1 if measure.factor == 100 else 2}f}"
        title = looks[name].title if stream or measure.curve == "image" else f"pixels: {name}"
        if stream and measure.curve != "image":
            point = title_of(point)
        rows.append([title, point, str(r["seed"]), *rates, value, *last, str(r["images"])])
    return rows


def class_table(records: list[dict], measure: Measure) -> list[list[str]]:
    """A row a class, or another part of what is measured, a column a point of a curve, in per cent;
    means over the seeds that have the class. Of label maps also the share of pixels that are right.
    """
    points: dict[tuple[str, str], list[dict]] = {}
    for record in sorted(records, key=lambda r: (r["kind"] != "pixels", r["arm"], r.get("bpp", 0))):
        if measure.parts in record:
            points.setdefault(name_and_point(record), []).append(record)
    looks = looks_of(records)
    said = {
        at: title_of(at[1]) if of[0]["kind"] == "stream" else at[1] for at, of in points.items()
    }
    head = [measure.classes, *(f"{looks[at[0]].title} {said[at]}".strip() for at in points)]
    known = dict.fromkeys(name for of in points.values() for r in of for name in r[measure.parts])

    def row(title: str, values_of) -> list[str]:
        found = [[v for r in of if (v := values_of(r)) is not None] for of in points.values()]
        return [title, *(f"{100 * np.mean(v):.1f}" if v else "–" for v in found)]

    rows = [row(name, lambda r, name=name: r[measure.parts].get(name)) for name in known]
    if any("pixel_accuracy" in record for record in records):
        rows.append(row("pixels right", lambda r: r.get("pixel_accuracy")))
    return [head, *rows]


def drawn_difference(record: dict, pixels: dict[int, dict], measure: Measure) -> str | None:
    """By how many points a record's score differs from that of pixels, with its interval."""
    other = pixels.get(record["seed"])
    if other is None or record is other or measure.factor != 100:
        return None
    drawn = draws.of(record, measure.key), draws.of(other, measure.key)
    if drawn[0] is None or drawn[1] is None:
        return None
    value = 100 * (record[measure.key] - other[measure.key])
    return f"{value:+.1f} ({between(draws.interval(100 * (drawn[0] - drawn[1])), '+.1f')})"


def between(found: tuple[float, float], form: str) -> str:
    """An interval in words; "–" if it has none."""
    return "–" if np.isnan(found).any() else f"{found[0]:{form}} to {found[1]:{form}}"


def task_table(scored: Sequence[tuple[Measure, list[dict]]]) -> list[list[str]]:
    """A row for each of several tasks, a measure and the records that have it: the score on pixels,
    the best one of the reference and what that takes, and its BD-rate against every other curve,
    mean of the seeds. No rows of a single task."""
    found, titles = [], {}
    for measure, records in scored:
        ours, points = reference_of(records), curves_of(records, measure.key)
        if ours not in points:
            continue
        looks, rates = looks_of(records), _bd_rates(records, measure.key, ours)
        against = {name: _compared(rates[name][0], points[name], points[ours]) for name in rates}
        titles |= {name: looks[name].title for name in rates}
        pixels = [record[measure.key] for record in records if record["kind"] == "pixels"]
        best = points[ours][points[ours][:, 1].argmax()]
        cells = [f"{measure.factor * np.mean(pixels):.1f}" if pixels else "–"]
        cells += [f"{measure.factor * best[1]:.1f}", f"{best[0]:.4f}"]
        found.append((f"{measure.title}: {measure.axis}", looks[ours].title, cells, against))
    if len(found) < 2:
        return []
    head = ["task", "pixels", f"{found[0][1]}, best", "at bpp"]
    rows = [[*head, *(f"bits against {title}" for title in titles.values())]]
    for title, _, cells, against in found:
        rows.append([title, *cells, *(against.get(name, "–") for name in titles)])
    return rows


def _compared(values: np.ndarray, other: np.ndarray, ours: np.ndarray) -> str:
    """BD-rates of several seeds in words; `other`, `ours`: curves, float [n, 4]."""
    if len(values) and not np.isnan(values).any():
        return f"{values.mean():+.1f} %"
    if other[:, 1].max() < ours[:, 1].min():
        return "it is never as good"
    return "it is always better" if other[:, 1].min() > ours[:, 1].max() else "–"


def bd_table(records: list[dict], measure: Measure) -> list[list[str]]:
    """BD-rate of the reference, or the first learned codec, against every other, seed by seed.

    A curve that does not depend on the seed (one file format on one network) stands against all.
    """
    ours = reference_of(records)
    if not ours:
        return []
    looks, drawn = looks_of(records), [*_drawn(records, measure.key)]
    rows = [[f"BD-rate of {looks[ours].title} against", "bits at equal quality"]]
    rows[0] += [WITHIN] if drawn else []
    means: dict[str, list] = {}  # of each draw
    for again in drawn:
        for name, (values, _) in _bd_rates(again, measure.key, ours).items():
            means.setdefault(name, []).append(values.mean() if len(values) else np.nan)
    for name, (values, few) in _bd_rates(records, measure.key, ours).items():
        bare = not len(values) or np.isnan(values).any()
        if bare:
            text = "– (needs two points)" if few else "– (no quality that both curves reach)"
        elif len(values) == 1:
            text = f"{values[0]:+.1f} %"
        else:
            each_text = ", ".join(f"{value:+.1f}" for value in values)
            text = f"{values.mean():+.1f} ± {values.std():.1f} % (by seed: {each_text})"
        row = [looks[name].title, text]
        if drawn:
            known = name in means and not bare
            row.append(between(draws.interval(np.array(means[name])), "+.1f") if known else "–")
        rows.append(row)
    return rows


def reference_of(records: list[dict]) -> str:
    """The arm that others are compared with: the reference, or else the first learned codec; "" if
    there is none."""
    streams = [record for record in records if record["kind"] == "stream"]
    first = streams[0]["arm"] if streams else ""
    return next((r["arm"] for r in streams if r.get("reference")), first)


def _bd_rates(records: list[dict], key: str, ours: str) -> dict[str, tuple[np.ndarray, bool]]:
    """{curve: (BD-rate of `ours` against it by seed, whether a curve has one point only)}."""
    arms = {record["arm"] for record in records if record["kind"] == "stream"}
    seeds = sorted({record["seed"] for record in records})
    each = [curves_of([r for r in records if r["seed"] == s], key) for s in seeds]
    found = {}
    for name, whole in curves_of(records, key).items():
        if name == ours:
            continue
        anchors = [curve.get(name, None if name in arms else whole) for curve in each]
        both = [(a, curve) for a, curve in zip(anchors, each, strict=True) if a is not None]
        pairs = [(anchor, curve[ours]) for anchor, curve in both if ours in curve]
        values = np.array([bd_rate(anchor[:, :2], curve[:, :2]) for anchor, curve in pairs])
        found[name] = values, any(min(map(len, pair)) < 2 for pair in pairs)
    return found


def _drawn(records: list[dict], key: str) -> Iterator[list[dict]]:
    """The records as each draw of images has them; those that keep no draws are left out."""
    kept = []
    for record in records:
        drawn = {name: draws.of(record, name) for name in (key, "bpp", "bpp_source")}
        drawn = {name: values for name, values in drawn.items() if values is not None}
        if key in drawn:
            kept.append((record, drawn))
    for row in range(draws.DRAWS if kept else 0):
        yield [record | {name: v[row] for name, v in drawn.items()} for record, drawn in kept]


def loss_table(records: list[dict], measure: Measure) -> list[list[str]]:
    """The bits at which each curve loses no more than `LOSS` points of what pixels score, and where
    there is a learned codec how many fewer the reference takes.

    Rates are interpolated as for BD-rates, over means of the seeds; "at most": the cheapest point
    is as good already. No rows without pixels.
    """
    pixels = [record for record in records if record["kind"] == "pixels"]
    ours = reference_of(records)
    if measure.factor != 100 or not pixels:
        return []
    looks, rates = looks_of(records), _rates_at_loss(records, measure.key)
    drawn = [_rates_at_loss(again, measure.key) for again in _drawn(records, measure.key)]
    goal, least = _goal(records, measure.key), {}
    for name, curve in curves_of(records, measure.key).items():
        rate, score = curve[curve[:, 0].argmin(), :2]
        least |= {name: rate} if score > goal else {}
    rows = [[f"{LOSS} points below pixels", "bpp", WITHIN]]
    rows[0] += [f"bits of {looks[ours].title}", WITHIN] if ours else []

    def spread(values: np.ndarray, form: str) -> str:
        return between(draws.interval(values), form) if drawn else "–"

    for name, rate in rates.items():
        of_name = np.array([again.get(name, np.nan) for again in drawn])
        of_ours = np.array([again.get(ours, np.nan) for again in drawn])
        share = 100 * (rates.get(ours, np.nan) / rate - 1)
        cells = [f"{rate:.4f}", spread(of_name, ".4f")]
        if np.isnan(rate):
            cells = [f"at most {least[name]:.4f}" if name in least else "not reached", "–"]
        shares = [f"{share:+.1f} %", spread(100 * (of_ours / of_name - 1), "+.1f")]
        known = name != ours and not np.isnan(share)
        title = SOURCE if name == SOURCE else looks[name].title
        rows.append([title, *cells, *(shares if known else ["–", "–"] if ours else [])])
    return rows


def _rates_at_loss(records: list[dict], key: str) -> dict[str, float]:
    """{curve: its bpp at `LOSS` points below pixels, NaN where it does not get there}, and that of
    the files which the pixels are read from."""
    quality, pixels = _goal(records, key), [r for r in records if r["kind"] == "pixels"]
    found = {n: rate_at(curve[:, :2], quality) for n, curve in curves_of(records, key).items()}
    source = [record["bpp_source"] for record in pixels if "bpp_source" in record]
    return found | ({SOURCE: float(np.mean(source))} if source else {})


def _goal(records: list[dict], key: str) -> float:
    """The score that is `LOSS` points below that of pixels."""
    pixels = [record[key] for record in records if record["kind"] == "pixels"]
    return float(np.mean(pixels)) - LOSS / 100


def stream_table(records: list[dict]) -> list[list[str]]:
    """Each codec once, on each data set: where its bits go, how near they are to the estimate, how
    long it takes."""
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
    looks, several = looks_of(records), len({*map(set_of, records)}) > 1
    rows[0] += ["images of"] * several
    seen = {(*name_and_point(r), r["seed"], set_of(r)): r for r in reversed(records)}
    for (arm, point, seed, place), r in sorted(seen.items(), key=lambda item: item[1]["bpp"]):
        rates = ("bpp", "bpp_estimated", "bpp_header", *segments)
        others = ("worst_gap_bytes", "encode_ms", "decode_ms")
        rows.append(
            [
                looks[arm].title,
                point,
                str(seed),
                *(f"{r[key]:.4f}" if key in r else "–" for key in rates),
                *(f"{r[key]:.1f}" if key in r else "–" for key in others),
                *([place] if several else []),
            ]
        )
    return rows


def arms_table(arms: list[dict], speeds: list[dict]) -> list[list[str]]:
    """One row an arm, as in the tables of Gueguen et al. 2018; factors are to the first arm."""
    head = ["arm", "top-1 [%]", "top-5 [%]", "seeds", "network [images/s]", "from files [images/s]"]
    rows = [[*head, "G multiply-accumulates", "M parameters", "MB of a batch"]]
    timed, first = by_arm(speeds), {}
    for arm, of_arm in by_arm(arms).items():
        scores = []
        for key in ("top1", "top5"):
            values = 100 * np.array([r[key] for r in of_arm])
            spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
            scores.append(f"{values.mean():.1f}{spread}")
        cells = ["–"] * 5
        if arm in timed:
            for place, key in enumerate(("network_images_per_second", "images_per_second")):
                value = float(np.median([r[key] for r in timed[arm]]))
                first.setdefault(key, value)
                cells[place] = f"{value:.0f} ({value / first[key]:.2f} ×)"
            cells[2] = f"{timed[arm][0]['multiply_accumulates'] / 1e9:.3f}"
            cells[3] = f"{timed[arm][0]['parameters'] / 1e6:.2f}"
            if "peak_bytes" in timed[arm][0]:
                cells[4] = f"{timed[arm][0]['peak_bytes'] / 1e6:.1f}"
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
