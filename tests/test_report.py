"""What a report states, against numbers worked out by hand; and that gaps are named, not fatal."""

import dataclasses
import json
import re

import ml_collections
import numpy as np
import pytest

from icm_jax.engine.run import Labels, Point, Run
from icm_jax.errors import IcmError
from icm_jax.measure import draws
from icm_jax.report import curves, looks, outside, page, pictures, tables, training

CLASSIFY = curves.MEASURES[0]
RATES = (0.1, 0.2, 0.4, 0.8)
LOOKS = {
    "omni": {"title": "Omni-ICM", "colour": "#0072B2", "reference": True},
    "unfiltered": {"title": "α = 0 twin", "colour": "#D55E00"},
}
PAIRS = (("1", 0.1), ("2", 0.2))
SHARES = (0.50, 0.60, 0.66, 0.70)


def stream(arm, point, bpp, top1, seed=0):
    """A record as `icm_jax.measure.evaluate` writes it for the learned codec."""
    run = f"seed{seed}/{arm}/classify-{point}"
    own = {"curve": "classify", "arm": arm, "point": point, "seed": seed, "kind": "stream"}
    own |= LOOKS.get(arm, {})
    rates = {"bpp": bpp, "bpp_estimated": 0.9 * bpp, "bpp_header": 0.1 * bpp, "images": 20}
    return {**own, **rates, "top1": top1, "top5": min(1.0, top1 + 0.25), "run": run}


def pixels(kind, top1, **rates):
    """A record of the network on pixels: as they are, or from JPEG or WebP files."""
    own = {"curve": "classify", "arm": "rgb", "point": "", "seed": 0, "kind": kind, "images": 20}
    return {**own, "top1": top1, "top5": 0.9, "run": "seed0/rgb/classify", **rates}


def full_records():
    records = []
    for number, (rate, share) in enumerate(zip(RATES, SHARES, strict=True)):
        records.append(stream("unfiltered", str(number), rate, share))
        records.append(stream("omni", str(number), 0.6 * rate, share))
        bare = {"bpp": 2 * rate, "bpp_without_tables": rate}
        records.append(pixels("jpeg", share, quality=10 * number, **bare))
        records.append(pixels("webp", share - 0.45, quality=10 * number, bpp=rate))
    return [*records, pixels("pixels", 0.75)]


@pytest.fixture
def experiment(tmp_path):
    """(config, runs, work directory) with one finished run and one that never started."""
    config = ml_collections.ConfigDict(
        {"name": "trial", "data": {"name": "folder", "canvas": 8}, "rate": {"α": 0.5}}
    )
    runs = [
        Run(
            name=n,
            seed=0,
            task=ml_collections.ConfigDict({"name": "trial"}),
            data=config.data,
            optim=ml_collections.ConfigDict(),
            batch_size=1,
            steps=20,
            log_every=10,
            save_every=10,
            evaluate=(Point("stream"),),
            labels=Labels("classify", "omni"),
        )
        for n in ("finished", "absent")
    ]
    own = tmp_path / "finished"
    own.mkdir()
    (own / "records.json").write_text(json.dumps(full_records()))
    (own / "done.json").write_text('{"step": 1, "metrics": {}}')
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (10, 20)]
    (own / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "command.json").write_text(json.dumps({"command": "python -m trial --x=<1>"}))
    return config, runs, tmp_path


def test_points_are_averaged_over_seeds_with_their_spread():
    records = [
        stream("omni", "1", 0.2, 0.5, seed=0),
        stream("omni", "1", 0.4, 0.7, seed=1),
        stream("omni", "3", 0.1, 0.4),
    ]
    rows = curves.curves_of(records, "top1")["omni"]
    # sorted by rate; mean and standard deviation (over n) of (0.2, 0.4) and (0.5, 0.7)
    np.testing.assert_allclose(rows, [[0.1, 0.4, 0, 0], [0.3, 0.6, 0.1, 0.1]], atol=1e-12)


def test_rivals_are_curves_of_their_own_and_bare_pixels_are_none():
    found = curves.curves_of(full_records(), "top1")
    assert sorted(found) == ["jpeg", "omni", "unfiltered", "webp"]
    np.testing.assert_allclose(found["jpeg"][:, 0], 2 * np.array(RATES))
    bare = curves.curves_of(full_records(), "top1", "bpp_without_tables")
    assert list(bare) == ["jpeg"]
    np.testing.assert_allclose(bare["jpeg"][:, 0], RATES)


def test_table_states_measured_beside_estimated_rate():
    head, row = tables.curve_table([stream("omni", "3", 0.25, 0.5)], CLASSIFY)
    cells = dict(zip(head, row, strict=True))
    assert cells["bpp measured"] == "0.2500"
    assert cells["top-1 accuracy [%]"] == "50.0" and cells["top-5 [%]"] == "75.0"
    assert cells["point"] == "λ = 3" and cells["images"] == "20"
    head, row = tables.stream_table([stream("omni", "3", 0.25, 0.5)])
    cells = dict(zip(head, row, strict=True))
    assert cells["bpp measured"] == "0.2500" and cells["bpp estimated"] == "0.2250"
    assert cells["header bpp"] == "0.0250"
    assert "images of" not in cells
    places = [dict(asked={"data": {"name": "coco_json", "path": p}}) for p in ("a/one", "b/two")]
    head, *rows = tables.stream_table([stream("omni", "3", 0.25, 0.5) | p for p in places])
    assert head[-1] == "images of" and {row[-1] for row in rows} == {"one", "two"}


def drawn_records():
    """`full_records` with draws: of every draw k the rates of "omni" are s_k of the others', which
    have twice theirs or not; scores are the same, but of pixels, which lose t_k."""
    rng = np.random.default_rng(0)
    share, lost = rng.uniform(0.5, 0.7, draws.DRAWS), rng.uniform(0, 0.02, draws.DRAWS)
    found = []
    for record in full_records():
        rate = record.get("bpp", 0) * (
            share / 0.6 if record["arm"] == "omni" else np.ones_like(share)
        )
        score = record["top1"] - (lost if record["kind"] == "pixels" else 0 * lost)
        kept = {"top1": score} | ({"bpp": rate} if "bpp" in record else {})
        found.append(record | {"draws": draws.packed(kept)})
    return found, share, lost


def test_intervals_are_those_of_the_draws():
    records, share, lost = drawn_records()
    head, *rows = tables.bd_table(records, CLASSIFY)
    assert head[-1] == "95 % of draws"
    cells = {row[0]: row[1:] for row in rows}
    low, high = 100 * (np.quantile(share, [0.025, 0.975]) - 1)
    assert cells["α = 0 twin"] == ["-40.0 %", f"{low:+.1f} to {high:+.1f}"]
    assert cells["WebP"][1] == "–"
    # Differences are of the same images: those of the pixels alone.
    head, *rows = tables.curve_table(records, CLASSIFY)
    column = head.index("to pixels (95 % of draws)")
    found = {(row[0], row[1]): row[column] for row in rows}
    low, high = 100 * (0.6 - 0.75 + np.quantile(lost, [0.025, 0.975]))
    assert found["Omni-ICM", "λ = 1"] == f"-15.0 ({low:+.1f} to {high:+.1f})"
    assert found["pixels: pixels", ""] == "–"
    # Records of before have none, and their curves no interval.
    older = [{k: v for k, v in r.items() if k != "draws"} for r in records if r["kind"] == "jpeg"]
    rows = tables.bd_table([r for r in records if r["kind"] != "jpeg"] + older, CLASSIFY)
    assert next(row for row in rows if row[0] == "JPEG")[1:] == ["-70.0 %", "–"]


def test_bits_at_two_points_of_loss():
    records, share, _ = drawn_records()
    for record in records:
        if record["kind"] == "pixels":
            del record["draws"]  # score as it is in every draw
            record.update(top1=0.68, bpp_source=3.0)
            record["draws"] = draws.packed({"top1": np.full(draws.DRAWS, 0.68)})
    head, *rows = tables.loss_table(records, CLASSIFY)
    assert head[0] == "2 points below pixels" and head[3] == "bits of Omni-ICM"
    cells = {row[0]: row[1:] for row in rows}
    assert cells["α = 0 twin"][0] == "0.4000" and cells["Omni-ICM"][0] == "0.2400"  # at 66 %
    low, high = np.quantile(share, [0.025, 0.975])
    assert cells["α = 0 twin"][2:] == [
        "-40.0 %",
        f"{100 * (low - 1):+.1f} to {100 * (high - 1):+.1f}",
    ]
    assert cells["Omni-ICM"][1:] == [f"{0.4 * low:.4f} to {0.4 * high:.4f}", "–", "–"]
    assert cells["WebP"] == ["not reached", "–", "–", "–"]
    better = [r | {"top1": 0.1 + r["top1"]} if r["kind"] == "webp" else r for r in records]
    better = [r | {"top1": 0.2} if r["kind"] == "pixels" else r for r in better]
    assert [row[1] for row in tables.loss_table(better, CLASSIFY) if row[0] == "JPEG"] == [
        "at most 0.2000"
    ]
    assert cells["source files as they are"][0] == "3.0000"
    assert cells["source files as they are"][2] == "-92.0 %"
    without = [record for record in records if record["kind"] != "pixels"]
    assert tables.loss_table(without, CLASSIFY) == []
    head, *rows = tables.loss_table([r for r in records if r["kind"] != "stream"], CLASSIFY)
    assert head == ["2 points below pixels", "bpp", "95 % of draws"]
    assert [row[0] for row in rows] == ["JPEG", "WebP", "source files as they are"]
    assert rows[0][1] == "0.8000"


def test_bd_rates_are_those_of_the_scaled_rates():
    rows = dict(tables.bd_table(full_records(), CLASSIFY)[1:])
    assert rows["α = 0 twin"] == "-40.0 %"  # 0.6 of its rates
    assert rows["JPEG"] == "-70.0 %"  # 0.6 of half its rates
    assert "no quality that both" in rows["WebP"]  # its best is below our worst


def test_a_row_for_each_task_and_none_of_one():
    """Of records of two tasks, the second of which files of JPEG alone are compared in."""
    records = full_records()
    few = [r | {"map50": r["top1"] / 2} for r in records if r["kind"] in ("jpeg", "stream")]
    box = next(m for m in curves.MEASURES if m.key == "map50")
    head, first, second = tables.task_table([(CLASSIFY, records), (box, few)])
    cells = [dict(zip(head, row, strict=True)) for row in (first, second)]
    assert cells[0]["bits against JPEG"] == cells[1]["bits against JPEG"] == "-70.0 %"
    assert cells[0]["bits against WebP"] == "it is never as good"
    assert cells[1]["bits against WebP"] == cells[1]["pixels"] == "–"
    best = max(r["top1"] for r in records if r["arm"] == "omni")
    assert cells[0]["Omni-ICM, best"] == f"{100 * best:.1f}"
    assert cells[1]["task"] == "Detection, COCO's mAP at IoU 0.5: mAP@0.5 [%]"
    assert tables.task_table([(CLASSIFY, records)]) == []


def test_bd_rates_of_several_seeds_are_given_with_their_spread():
    records = []
    for seed, factor in ((0, 0.6), (1, 0.8)):
        for number, (rate, share) in enumerate(zip(RATES, SHARES, strict=True)):
            records.append(stream("omni", str(number), factor * rate, share, seed))
            records.append(stream("unfiltered", str(number), rate, share, seed))
    (row,) = tables.bd_table(records, CLASSIFY)[1:]
    assert row == ["α = 0 twin", "-30.0 ± 10.0 % (by seed: -40.0, -20.0)"]


def test_an_arm_that_nobody_labelled_has_its_name_and_a_colour(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(curves, "save", lambda figure, path: figures.append(figure))
    records = [stream(arm, p, rate, 0.5 + rate) for arm in ("mine", "yours") for p, rate in PAIRS]
    records += [stream("unfiltered", p, rate, 0.4 + rate) for p, rate in PAIRS]
    curves.draw_curves(records, tmp_path / "unseen.png", CLASSIFY)
    handles, labels = figures[0].axes[0].get_legend_handles_labels()
    assert labels == ["mine", "yours", "α = 0 twin"]
    colours = [handle.lines[0].get_color() for handle in handles]
    assert len(set(colours)) == 3 and colours[2] == LOOKS["unfiltered"]["colour"]
    assert tables.bd_table(records, CLASSIFY)[0][0] == "BD-rate of mine against"
    for record in records:
        record["reference"] = record["arm"] == "yours"
    assert tables.bd_table(records, CLASSIFY)[0][0] == "BD-rate of yours against"


def test_images_are_measured_in_decibels():
    own = {"curve": "image", "arm": "codec", "point": "", "seed": 0, "images": 3}
    records = [{**own, "kind": "stream", "quality": 12.5, "bpp": 0.5, "psnr": 30.125}]
    jpeg = {"kind": "jpeg", "quality": 7, "bpp": 0.7, "bpp_without_tables": 0.6}
    records.append({**own, **jpeg, "psnr": 29.0})
    measure = next(measure for measure in curves.MEASURES if measure.key == "psnr")
    head, *rows = tables.curve_table(records, measure)
    cells = [dict(zip(head, row, strict=True)) for row in rows]
    assert {c["curve"]: (c["point"], c["PSNR [dB]"]) for c in cells} == {
        "codec": ("12.5", "30.12"),
        "JPEG": ("7", "29.00"),
    }


def arm(name, seed, top1, network, files):
    """Records of one network: its accuracy and its speed."""
    own = {"arm": name, "seed": seed, "point": "", "images": 10, "run": f"seed{seed}/{name}"}
    speed = {"network_images_per_second": network, "images_per_second": files, "read_per_second": 9}
    cost = {"multiply_accumulates": 3_858_000_000, "parameters": 25_500_000}
    cost |= {"peak_bytes": 12_340_000} if name == "rgb-50" else {}  # new records have it
    accuracy = {"curve": "arms", "kind": "pixels", "top1": top1, "top5": 0.9}
    return [own | accuracy, own | speed | cost | {"curve": "speed", "kind": "speed", "quality": 16}]


def test_arms_are_averaged_over_seeds_and_compared_with_the_first(experiment):
    config, runs, workdir = experiment
    own = [arm("rgb-50", 0, 0.5, 100.0, 80.0), arm("rgb-50", 1, 0.6, 120.0, 80.0)]
    own += [arm("jpeg-downsampling", 0, 0.4, 220.0, 200.0), arm("rgb-26", 0, 0.3, 1.0, 1.0)[:1]]
    records = [record for pair in own for record in pair]
    (workdir / "finished" / "records.json").write_text(json.dumps(records))
    text = page.write_report(config, runs, workdir).with_suffix(".md").read_text(encoding="utf-8")
    for row in (
        "55.0 ± 5.0 | 90.0 ± 0.0 | 2 | 110 (1.00 ×) | 80 (1.00 ×) | 3.858 | 25.50 | 12.3 |",
        "| jpeg-downsampling | 40.0 | 90.0 | 1 | 220 (2.00 ×) | 200 (2.50 ×) | 3.858 | 25.50 | – |",
        "| rgb-26 | 30.0 | 90.0 | 1 | – | – | – | – | – |",
    ):
        assert row in text
    assert (workdir / "speed.png").read_bytes().startswith(b"\x89PNG")
    (workdir / "finished" / "records.json").write_text(json.dumps(records[:1]))
    text = page.write_report(config, runs, workdir).with_suffix(".md").read_text(encoding="utf-8")
    assert "| rgb-50 | 50.0 | 90.0 | 1 |\n" in text  # and no empty columns


def test_principal_colours_separate_what_differs_most():
    rng = np.random.default_rng(0)
    features = rng.normal(scale=0.01, size=(2, 4, 4, 6))
    features[0, ..., 2] += 5.0  # the two images differ along one channel above all
    colours = pictures.principal_colours(features)
    assert colours.shape == (2, 4, 4, 3)
    assert colours.min() >= 0 and colours.max() <= 1
    first = np.sort(colours[..., 0].mean(axis=(1, 2)))
    assert first[0] < 0.1 and first[1] > 0.9
    np.testing.assert_allclose(pictures.principal_colours(features + 7.0), colours, atol=1e-6)
    flat = pictures.principal_colours(np.ones((1, 2, 2, 4)))
    assert np.isfinite(flat).all()


def test_panels_of_training_keep_their_size_however_many_runs(experiment, monkeypatch):
    _, (finished, _), folder = experiment
    figures = []
    monkeypatch.setattr(training, "save", lambda figure, path: figures.append(figure))
    runs = []
    for number in range(90):
        run = dataclasses.replace(finished, name=f"seed{number % 3}/arm{number // 3}")
        (folder / run.name).mkdir(parents=True)
        (folder / run.name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        runs.append(run)
    for some in (runs[:1], runs):
        training.draw_training(some, folder)
        figures[-1].canvas.draw()
    few, many = (figure.axes[0] for figure in figures)
    assert few.bbox.size.tolist() == many.bbox.size.tolist()
    assert len(many.lines) == 90
    named = {line.get_label(): line for line in many.lines if line.get_label().startswith("arm")}
    assert len(named) == len(many.get_legend().get_texts()) == 30
    looks = {(line.get_color(), line.get_linestyle()) for line in named.values()}
    assert len(looks) == 30


def test_report_is_complete_and_self_contained(experiment):
    config, runs, workdir = experiment
    path = page.write_report(config, runs, workdir)
    text = path.read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]{0,30})', text)
    assert len(sources) == 2 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "python -m trial --x=&lt;1&gt;" in text and "--x=<1>" not in text
    text = (workdir / "report.md").read_text(encoding="utf-8")
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")
    for stated in ("jax ", "numpy ", "commit ", "-40.0 %", "python -m trial --x=<1>", "CPU cores"):
        assert stated in text
    assert not list(workdir.glob("*.tmp"))


def test_report_names_what_is_missing(experiment):
    config, runs, workdir = experiment
    text = page.write_report(config, runs, workdir).with_suffix(".md").read_text(encoding="utf-8")
    assert "Not finished yet: absent" in text and "No frozen codec yet." in text
    empty = workdir / "empty"
    empty.mkdir()
    text = page.write_report(config, runs, empty).with_suffix(".md").read_text(encoding="utf-8")
    assert "Not finished yet: finished, absent" in text


def test_same_records_give_the_same_files(experiment):
    config, runs, workdir = experiment
    first = {}
    for _ in range(2):
        page.write_report(config, runs, workdir)
        files = {p.name: p.read_bytes() for p in workdir.iterdir() if p.is_file()}
        assert files == (first or files)
        first = files


ROW = "VTM,EncoderApp -q 37,37,0.4,0.3,30.0,20.0,64\n"
HEAD = "name,command,quality,bpp,map50,psnr,ms_ssim_db,images\n"


def test_curves_from_outside_stand_beside_ours(tmp_path):
    """Each row gives a point of detection and one of pictures; the command is in the report."""
    path = tmp_path / "vtm.csv"
    path.write_text(HEAD + ROW + ROW.replace("37,0.4,0.3", "42,0.2,0.2"))
    data = {"name": "photos", "path": "sets/kodak"}
    records = outside.read([str(path)], data, seed=3)
    found = curves.curves_of([r for r in records if r["curve"] == "detect"], "map50")
    np.testing.assert_allclose(found["VTM"][:, :2], [[0.2, 0.2], [0.4, 0.3]])
    pictures = [r for r in records if r["curve"] == "image"]
    assert {looks.set_of(r) for r in pictures} == {"kodak"}
    assert [(r["psnr"], r["ms_ssim_db"]) for r in pictures] == [(30.0, 20.0)] * 2
    assert outside.commands(records)[1:] == [["VTM", "EncoderApp -q 37"]]
    streams = [stream("omni", p, rate, 0.3) for p, rate in PAIRS]
    rivals = [dict(r, curve="classify", top1=r["map50"]) for r in records if "map50" in r]
    ours = [dict(r, top1=s) for r, s in zip(streams, (0.2, 0.3), strict=True)]
    for seed in (0, 1):  # of one seed alone, it stands against each of ours
        (row,) = tables.bd_table([*(dict(r, seed=seed) for r in ours), *rivals], CLASSIFY)[1:]
        assert row == ["VTM", "-50.0 %"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no column name, command, bpp"),
        ("name,command,quality,bpp,images\nx,y,1,1,1\n", "has no column of scores"),
        (HEAD + ROW.replace("0.3,", "0,3,"), r":2: .*int"),
        (HEAD + ROW.replace("0.3,", "30,"), "map50 is 30.0; it goes from 0 to 1"),
        (HEAD + ROW.replace("0.4,", "0,"), "bpp is above 0"),
    ],
)
def test_curves_that_cannot_be_read_are_named(tmp_path, text, message):
    (tmp_path / "vtm.csv").write_text(text)
    with pytest.raises(IcmError, match=message):
        outside.read([str(tmp_path / "vtm.csv")])
