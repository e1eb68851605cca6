"""Every reported number against a hand-computed or independent answer."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest
import scipy.interpolate
from small import small_codec
from strangers import second_data

from icm_jax.codecs import model_file
from icm_jax.data import open_source, pipeline
from icm_jax.engine.run import Point, Run, read_records
from icm_jax.engine.train import train
from icm_jax.errors import IcmError
from icm_jax.files import read_json
from icm_jax.measure import (
    Accuracy,
    MeanIoU,
    average_precision,
    classical,
    coded,
    draws,
    evaluate,
    metrics,
    precision,
)
from icm_jax.measure.points import file_points
from icm_jax.tasks.detection import PROTOCOLS

HERE = pathlib.Path(__file__).parent


def test_accuracy_counts_valid_rows_once_in_any_batching():
    logits = np.float32([[3, 1, 2, 0, 0, 0, 9], [0, 5, 1, 1, 1, 1, 1], [1, 2, 0, 0, 0, 0, 0]])
    label = np.array([0, 1, 2])
    whole, parts = Accuracy(), Accuracy()
    whole.update({"logits": logits}, {"label": label, "valid": np.array([True, True, True])})
    for row in range(3):
        rows = [row, 0]
        valid = np.array([True, False])
        parts.update({"logits": logits[rows]}, {"label": label[rows], "valid": valid})
    assert whole.result() == parts.result()
    assert whole.result() == {"top1": 1 / 3, "top5": 2 / 3, "examples": 3}


def test_constant_or_broken_logits_are_never_right():
    score = Accuracy()
    logits = np.float32([[0] * 10, [np.nan] * 10])
    score.update({"logits": logits}, {"label": np.array([0, 0]), "valid": np.array([True, True])})
    assert score.result()["top1"] == 0 and score.result()["top5"] == 0


def test_mean_iou_by_hand():
    score = MeanIoU("abcd")
    mask = np.array([[[0, 0, 1], [1, 255, 2]]])
    segments = np.array([[[0, 1, 1], [1, 3, 1]]])
    score.update({"segments": segments}, {"mask": mask, "valid": np.array([True])})
    # class 0: 1/2, class 1: 2/4, class 2: 0/1, class 3 absent (its only pixel is ignored)
    assert score.result() == {"miou": 1 / 3, "pixel_accuracy": 3 / 5, "examples": 1}
    assert score.by_class() == {"a": 1 / 2, "b": 1 / 2, "c": 0}


def test_accuracy_and_iou_of_images_drawn_again():
    """They are those of a set which holds the images so often; every draw has all classes."""
    rng = np.random.default_rng(1)
    logits, label = np.float32(rng.normal(size=(5, 9))), rng.integers(0, 9, 5)
    masks, segments = rng.choice([0, 1, 2, 255], (2, 5, 8, 8))
    valid, segments = np.ones(5, bool), np.where(segments == 255, 0, segments)
    images = np.array([np.arange(5), [4, 4, 0, 0, 2], np.full(5, 1)])
    counts = np.array([np.bincount(row, minlength=5) for row in images])
    for make, found, truth in (
        (Accuracy, {"logits": logits}, {"label": label}),
        (lambda: MeanIoU("abc"), {"segments": segments}, {"mask": masks}),
    ):
        score = make()
        score.update(found, truth | {"valid": valid})
        drawn = score.resampled(counts)
        for row, several in enumerate(images):
            again = make()
            chosen = ({k: v[several] for k, v in side.items()} for side in (found, truth))
            again.update(next(chosen), next(chosen) | {"valid": valid})
            one = {name: values[row] for name, values in drawn.items()}
            assert one | {"examples": 5} == pytest.approx(again.result())


def scored(found, truth, ignored=(), parts=1, protocol="coco"):
    """Average precision of images: found [(label, score, box)...], truth [(label, box)...]."""
    return tallied(found, truth, ignored, parts, protocol).result()


def tallied(found, truth, ignored=(), parts=1, protocol="coco"):
    score, rows = average_precision(protocol, "abc"), 4
    for own in np.array_split(np.arange(len(found)), parts):
        n = len(own)
        batch = {"valid": np.ones(n, bool), "boxes": np.zeros((n, rows, 4), np.float32)}
        batch |= {"box_labels": np.zeros((n, rows), int), "box_valid": np.zeros((n, rows), bool)}
        batch |= {"box_ignored": np.zeros((n, rows), bool), "image": np.zeros((n, 8, 4, 3))}
        batch |= {"extent": np.tile([0, 0, 8, 4], (n, 1))}
        given = {"boxes": np.zeros((n, rows, 4), np.float32), "labels": np.zeros((n, rows), int)}
        given |= {"scores": np.zeros((n, rows)), "valid": np.zeros((n, rows), bool)}
        for row, image in enumerate(own):
            for i, (label, box) in enumerate(truth[image]):
                batch["box_labels"][row, i], batch["boxes"][row, i] = label, box
                crowd = (image, i) in ignored
                batch["box_valid"][row, i], batch["box_ignored"][row, i] = not crowd, crowd
            for i, (label, certainty, box) in enumerate(found[image]):
                given["labels"][row, i], given["boxes"][row, i] = label, box
                given["scores"][row, i], given["valid"][row, i] = certainty, True
        score.update(given, batch)
    return score


LEFT, RIGHT, WHOLE = (0, 0, 1, 0.5), (0, 0.5, 1, 1), (0, 0, 1, 1)
NEAR = (0, 0, 1, 0.35)  # overlap 0.7 with LEFT: right at IoU 0.5, 0.55, 0.6, 0.65 and 0.7


def test_average_precision_by_hand():
    truth = [[(0, LEFT), (1, RIGHT)], [(0, WHOLE)], []]
    right = [[(0, 0.9, LEFT), (1, 0.8, RIGHT)], [(0, 0.7, WHOLE)], []]
    assert scored(right, truth) == pytest.approx({"map": 1.0, "map50": 1.0, "examples": 3})
    # Class 0: of two boxes one is found, precision 1 up to recall 0.5, at 51 of 101 recalls.
    missed = [right[0], [], []]
    assert scored(missed, truth)["map50"] == pytest.approx((51 / 101 + 1) / 2)
    # A false alarm that is surer than all: precision 1/2, then 2/3.
    alarm = [right[0], right[1], [(0, 0.95, WHOLE)]]
    assert scored(alarm, truth)["map50"] == pytest.approx((2 / 3 + 1) / 2)
    assert scored(alarm, truth, parts=3) == scored(alarm, truth)
    # Another class, or too far, is no hit; a second box on one object is a false alarm.
    assert scored([[(1, 0.9, LEFT)]], [[(0, LEFT)]])["map50"] == 0
    twice = [[(0, 0.9, LEFT), (0, 0.8, LEFT)], [(0, 0.7, WHOLE)]]
    assert scored(twice, [[(0, LEFT)], [(0, WHOLE)]])["map50"] == pytest.approx(
        (51 + 50 * 2 / 3) / 101
    )
    # What is found ends with the picture: this is the left half and nothing more.
    beyond = scored([[(0, 0.9, (-1, -2, 3, 0.5))]], [[(0, LEFT)]])
    assert beyond["map"] == pytest.approx(1)
    near = scored([[(0, 0.9, NEAR)]], [[(0, LEFT)]])
    assert near["map50"] == pytest.approx(1) and near["map"] == pytest.approx(0.5, abs=0.11)


def test_average_precision_of_voc_by_hand():
    """The protocols part where a precision of 2/3 begins, who gets an object, and what is passed
    over."""
    truth = [[(0, LEFT), (1, RIGHT)], [(0, WHOLE)], []]
    found = [[(0, 0.9, LEFT), (1, 0.8, RIGHT)], [(0, 0.7, WHOLE)], [(0, 0.8, WHOLE)]]
    # Class 0: precision 1 up to recall 1/2 (6 of 11 points), then 2/3 (5 points); class 1: all.
    eleven = (6 + 5 * 2 / 3) / 11
    assert scored(found, truth, protocol="voc2007") == pytest.approx(
        {"voc2007": (eleven + 1) / 2, "examples": 3}
    )
    assert scored(found, truth, protocol="voc2010")["voc2010"] == pytest.approx((5 / 6 + 1) / 2)
    score = tallied(found, truth, protocol="voc2007", parts=2)
    assert score.by_class() == pytest.approx({"a": eleven, "b": 1})
    # A second box on an object is a false alarm, but on a difficult one it is nothing.
    twice = [[(0, 0.9, LEFT), (0, 0.8, LEFT), (0, 0.7, RIGHT)]]
    of = [[(0, LEFT), (0, RIGHT)]]
    assert scored(twice, of, protocol="voc2010")["voc2010"] == pytest.approx((1 + 2 / 3) / 2)
    difficult = {(0, 0)}
    assert scored(twice, of, difficult, protocol="voc2010")["voc2010"] == pytest.approx(1)
    # Half of a difficult object is half of a pass: COCO's crowds pass all of it.
    half = [[(0, 0.9, (0, 0, 0.4, 0.5)), (0, 0.7, RIGHT)]]
    assert scored(half, of, difficult, protocol="voc2010")["voc2010"] == pytest.approx(1 / 2)
    assert scored(half, of, difficult)["map50"] == pytest.approx(1)
    # NEAR overlaps LEFT most, which is taken: VOC counts it as false, COCO gives it what is left.
    near, both = (0, 0, 1, 0.35), [[(0, LEFT), (0, (0, 0, 1, 0.2))]]
    taken = [[(0, 0.9, LEFT), (0, 0.8, near)]]
    assert scored(taken, both, protocol="voc2010")["voc2010"] == pytest.approx(1 / 2)
    assert scored(taken, both)["map50"] == pytest.approx(1, abs=1e-9)
    with pytest.raises(IcmError, match="no protocol 'voc'; choose one of coco, voc2007"):
        average_precision("voc", "abc")


def voc_precision(found, truth, ignored, label, eleven):
    """As VOC's development kit (VOCevaldet.m) goes: box by box over all images."""
    objects = {
        i: [(box, (i, n) in ignored) for n, (of, box) in enumerate(rows) if of == label]
        for i, rows in enumerate(truth)
    }
    given = [(s, i, box) for i, rows in enumerate(found) for of, s, box in rows if of == label]
    taken, right, wrong, curve = set(), 0, 0, []
    count = sum(not difficult for rows in objects.values() for _, difficult in rows)
    for _, image, (top, left, bottom, end) in sorted(given, key=lambda row: -row[0]):
        most, at = -1.0, None
        for n, ((t, l, b, r), _) in enumerate(objects[image]):  # noqa: E741
            height, width = min(bottom, b) - max(top, t), min(end, r) - max(left, l)
            shared = max(height, 0) * max(width, 0)
            union = (bottom - top) * (end - left) + (b - t) * (r - l) - shared
            if shared / union > most:
                most, at = shared / union, n
        if most < 0.5:
            wrong += 1
        elif objects[image][at][1]:
            pass
        elif (image, at) in taken:
            wrong += 1
        else:
            right += 1
            taken.add((image, at))
        if right + wrong:
            curve.append((right / count, right / (right + wrong)))
    if eleven:
        return sum(max([p for r, p in curve if r >= t / 10], default=0) for t in range(11)) / 11
    area = before = 0.0
    for n, (recall, _) in enumerate(curve):
        area, before = area + (recall - before) * max(p for _, p in curve[n:]), recall
    return area


@pytest.mark.parametrize("protocol", ("voc2007", "voc2010"))
def test_average_precision_of_voc_equals_its_development_kit(protocol):
    rng = np.random.default_rng(5)

    def box():
        corner, size = rng.random(2) * 0.3, 0.3 + 0.4 * rng.random(2)
        return tuple(float(x) for x in (*corner, *np.float32(corner + size)))

    truth = [[(int(rng.integers(3)), box()) for _ in range(4)] for _ in range(12)]
    found = [[(label, float(rng.random()), box()) for label, _ in of] for of in truth]
    for image, of in enumerate(found):  # half of them are near
        of[:2] = [
            (label, 0.5 + score / 2, truth[image][n][1])
            for n, (label, score, _) in enumerate(of[:2])
        ]
    ignored = {(image, int(rng.integers(4))) for image in range(0, 12, 2)}
    expected = [voc_precision(found, truth, ignored, k, protocol == "voc2007") for k in range(3)]
    score = tallied(found, truth, ignored, 3, protocol)
    assert [*score.by_class().values()] == pytest.approx(expected, abs=1e-6)
    assert 0.1 < score.result()[protocol] < 0.9


@pytest.mark.parametrize("at_once", (1, 1 << 20))
@pytest.mark.parametrize("protocol", ("coco", "voc2007", "voc2010"))
def test_average_precision_of_images_drawn_again(monkeypatch, at_once, protocol):
    """It is that of a data set which holds them so often, however many draws are made together."""
    monkeypatch.setattr(precision, "_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    truth = [[(int(rng.integers(3)), LEFT), (int(rng.integers(3)), RIGHT)] for _ in range(6)]
    found = [
        [(int(rng.integers(3)), rng.random(), box) for box in (LEFT, NEAR, RIGHT, WHOLE)]
        for _ in range(6)
    ]
    images = np.array([np.arange(6), [5, 0, 0, 3, 3, 3], np.full(6, 2), [1, 1, 4, 4, 4, 4]])
    counts = np.array([np.bincount(row, minlength=6) for row in images])
    drawn = tallied(found, truth, protocol=protocol).resampled(counts)
    for row, several in enumerate(images):
        given = [found[i] for i in several], [truth[i] for i in several]
        expected = scored(*given, protocol=protocol)
        one = {name: values[row] for name, values in drawn.items()}
        assert one | {"examples": 6} == pytest.approx(expected)
    drawn = tallied(found, truth, protocol=protocol).resampled(draws.resamples(6, 200))
    key = "map50" if protocol == "coco" else protocol
    low, high = draws.interval(drawn[key])
    assert low < scored(found, truth, protocol=protocol)[key] < high
    # Draws without a box have no precision; ignored boxes are none.
    few = tallied(found, [truth[0], *[[]] * 5], protocol=protocol)
    bare = few.resampled(np.array([[0, 6, 0, 0, 0, 0]]))
    assert all(np.isnan(values).all() for values in bare.values())


def test_ignored_boxes_are_neither_hits_nor_misses():
    truth = [[(0, LEFT), (0, RIGHT)]]
    one = scored([[(0, 0.9, LEFT)]], truth, ignored={(0, 1)})
    both = scored([[(0, 0.9, LEFT), (0, 0.95, RIGHT)]], truth, ignored={(0, 1)})
    assert one["map50"] == both["map50"] == pytest.approx(1)
    with pytest.raises(IcmError, match="no box to find"):
        scored([[]], [[(0, LEFT)]], ignored={(0, 0)})


def test_rate_and_psnr_by_hand():
    assert metrics.bpp(96, 16, 24) == 2.0
    assert metrics.psnr(np.uint8([0, 255]), np.uint8([0, 255])) == float("inf")
    assert metrics.psnr(np.uint8([0, 0]), np.uint8([255, 0])) == pytest.approx(3.0103, abs=1e-4)


def test_interpolation_equals_scipy():
    rng = np.random.default_rng(0)
    for size in (2, 3, 6):
        x = np.cumsum(rng.uniform(0.1, 1, size))
        y = np.cumsum(rng.normal(size=size))
        at = np.linspace(x[0], x[-1], 50)
        expected = scipy.interpolate.PchipInterpolator(x, y)(at)
        np.testing.assert_allclose(metrics.pchip(x, y, at), expected, atol=1e-12)


def test_bd_rate_of_scaled_rates_is_the_scale():
    anchor = np.array([[0.1, 50], [0.2, 60], [0.4, 66], [0.8, 70]])
    assert metrics.bd_rate(anchor, anchor * [0.6, 1]) == pytest.approx(-40)
    assert metrics.bd_rate(anchor, anchor * [2, 1]) == pytest.approx(100)
    noisy = np.insert(anchor * [0.6, 1], 2, [0.2, 55], axis=0)  # dearer and worse: dropped
    assert metrics.bd_rate(anchor, noisy) == pytest.approx(-40)
    assert np.isnan(metrics.bd_rate(anchor, anchor + np.array([0, 30])))
    assert np.isnan(metrics.bd_rate(anchor, anchor[:1]))


def test_bd_rate_between_rates_looks_no_further():
    """Half the rate below 1 bpp, twice the rate above: the limits choose what is seen."""
    rate = np.geomspace(0.125, 8, 25)
    anchor = np.stack([rate, 30 + 10 * np.log2(rate)], axis=1)
    curve = anchor * np.stack([np.where(rate < 1, 0.5, 2), np.ones(25)], axis=1)
    assert metrics.bd_rate(anchor, curve, (0.2, 0.7)) == pytest.approx(-50, abs=0.1)
    assert metrics.bd_rate(anchor, curve, (1.2, 20)) == pytest.approx(100, abs=0.5)
    assert np.isnan(metrics.bd_rate(anchor, curve, (10, 20)))


def test_unknown_formats_are_refused():
    with pytest.raises(IcmError, match="cannot write 'gif'"):
        classical.encode(np.zeros((8, 8, 3), np.uint8), "gif", 5)


@pytest.mark.parametrize("codec", list(classical.FORMATS))
def test_classical_files_come_back_as_images(codec):
    if not classical.available(codec):
        pytest.skip(f"nothing that is installed here writes {codec}")
    image = np.tile(np.arange(47, dtype=np.uint8)[:, None, None] * 5, (1, 41, 3))
    qualities = (50, 10) if codec == "vvc" else (5, 95)
    small, large = (classical.encode(image, codec, quality) for quality in qualities)
    assert len(small) < len(large)
    assert metrics.psnr(image, classical.decode(large)) > 35


def test_cut_vvc_files_are_said():
    if not classical.available("vvc"):
        pytest.skip("nothing that is installed here writes vvc")
    data = classical.encode(np.full((70, 90, 3), 128, np.uint8), "vvc", 40)
    assert classical.decode(data).shape == (70, 90, 3)
    with pytest.raises(IcmError, match="FFmpeg failed"):
        classical.decode(data[:12])


def test_jpeg_tables_are_told_from_the_scan():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    data = classical.encode(image, "jpeg", 50)
    start = classical.table_bytes(data)
    assert data[:2] == b"\xff\xd8" and data[start - 14 : start - 12] == b"\xff\xda"
    twice = classical.encode(np.tile(image, (2, 2, 1)), "jpeg", 50)
    scans = [len(d) - classical.table_bytes(d) for d in (data, twice)]
    assert 3.5 < scans[1] / scans[0] < 4.5


def scored_by(point, **fields):
    """An unfinished run that is to be scored by a point."""
    task = dict(name="classification", frontend="pixels", variant="10", width=8, dtype="float32")
    task |= dict(mode="linear", size=8, crop=(1.0, 1.0))
    empty = ml_collections.ConfigDict()
    fields |= dict(batch_size=1, steps=1, log_every=1, save_every=1, evaluate=(point,))
    return Run("run", 0, ml_collections.ConfigDict(task), empty, empty, **fields)


def test_a_learned_model_is_a_rival_by_its_files(tmp_path):
    """Its files' bytes are measured, and its pictures seen; a wrong model or quality is said."""
    path, codec = tmp_path / "a.icmc", small_codec("space_channel")
    model_file.save(path, codec)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    (point, single) = file_points({"icm": ((str(path), 30), (str(path), None))})
    assert str(point) == f"icm {path} 30"
    given, sizes = coded.through_file(image, point)
    file = codec.compress(image, quality=30)
    np.testing.assert_array_equal(given, codec.decompress(file))
    assert sizes["bpp"] == len(file) and 0 < sizes["bpp_without_tables"] < len(file)
    evaluate.check_points(scored_by(point))
    for wrong in (single, dataclasses.replace(point, quality=101)):
        with pytest.raises(IcmError, match="it must be a number of at least 0 and of at most 100"):
            evaluate.check_points(scored_by(wrong))
    with pytest.raises(IcmError, match=r"nothing\.icmc"):
        evaluate.check_points(scored_by(Point("icm", 30, model=str(tmp_path / "nothing.icmc"))))
    for given in ("high", None, ("a.icmc", "high")):
        with pytest.raises(IcmError, match=r"a quality of config\.files\.icm is"):
            file_points({"icm": (given,)})


def test_points_of_an_unknown_kind_are_refused():
    with pytest.raises(IcmError, match="run is to be scored by 'gif 3', which is none of stream"):
        evaluate.check_points(scored_by(Point("gif", 3)))


@pytest.mark.parametrize(
    "point, needs, message",
    [
        (Point("pixels"), (), "needs none of mask, objects, label"),
        (Point("picture", 50), (), "neither trains a codec"),
        (Point("detect"), (), "neither trains a codec"),
    ],
)
def test_points_that_a_run_cannot_have_are_refused(tmp_path, point, needs, message):
    run = scored_by(point, needs=needs)
    asked = evaluate.Asked(point, run, tmp_path, run.data, None, run.task, None, {}, None)
    with pytest.raises(IcmError, match=message):
        evaluate.SCORERS[point.kind](asked)


def scored_again(base, count):
    """Records of all runs in a work directory, scored by so many processes; without times."""
    for path in base.glob("*/records.json"):
        path.unlink()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(HERE.parent))
    environment["JAX_COMPILATION_CACHE_DIR"] = str(base / "compiled")
    command = [sys.executable, str(HERE / "evaluate_worker.py"), str(base), coordinator, str(count)]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    workers = [subprocess.Popen([*command, str(index)], **options) for index in range(count)]
    for worker in workers:
        output, _ = worker.communicate(timeout=400)
        assert worker.returncode == 0, output[-3000:]
    found = {}
    for path in sorted(base.glob("*/records.json")):
        for record in read_records(path.parent):
            kept = {name: value for name, value in record.items() if not name.endswith("_ms")}
            found[path.parent.name, record["kind"], record["quality"]] = kept
    return found | read_json(base / "scores.json", dict, "")


def test_records_do_not_depend_on_how_many_processes_score(tmp_path, monkeypatch):
    """Nine images, so shares are uneven, and one process of four has a batch less. Whole masks and
    boxes are scored without a network, see evaluate_worker.py."""
    codec = second_data.codec_run()
    with codec.data.unlocked():
        codec.data.validation = 9
    codec = dataclasses.replace(codec, evaluate=(Point("picture"), Point("jpeg", 40)))
    task = second_data.task_run(second_data.squares(tmp_path / "images"), tmp_path / "runs")
    with jax.numpy_dtype_promotion("standard"):
        for run in (codec, dataclasses.replace(task, batch_size=2)):
            train(run, tmp_path / "runs")
    alone = scored_again(tmp_path / "runs", 1)
    assert sorted(record["images"] for record in alone.values())[1:] == [9] * 6
    assert 0.1 < alone["mask"]["miou"] < 0.9 and len(alone["voc2010"]["by_class"]) > 1
    assert all(0 < alone[key][key] < 1 for key in ("voc2007", "voc2010"))
    assert {*alone["coco"]["draws"]} == {"map", "map50", "bpp"}
    for count in (2, 4):
        assert scored_again(tmp_path / "runs", count) == alone

    def stopped(asked):
        raise KeyboardInterrupt

    (tmp_path / "runs" / codec.name / "records.json").unlink()
    monkeypatch.setitem(evaluate.SCORERS, "jpeg", stopped)
    with pytest.raises(KeyboardInterrupt), jax.numpy_dtype_promotion("standard"):
        evaluate.evaluate(codec, tmp_path / "runs")
    (kept,) = read_records(tmp_path / "runs" / codec.name)  # of a point, as soon as it is scored
    assert kept["kind"] == "stream"


def test_what_was_scored_apart_adds_up():
    """COCO's measure goes by the order of images where scores are equal."""
    rng = np.random.default_rng(0)
    logits = np.float32(rng.normal(size=(6, 8)))
    masks = rng.integers(0, 3, (6, 4, 4))
    boxes = np.float32(rng.random((6, 4, 4)).cumsum(-1))
    given = {"boxes": boxes, "box_labels": rng.integers(0, 2, (6, 4)), "valid": np.ones(6, bool)}
    given |= {"box_valid": np.ones((6, 4), bool), "box_ignored": np.zeros((6, 4), bool)}
    given |= {"label": rng.integers(0, 8, 6), "mask": masks, "image": np.zeros((6, 2, 2, 3))}
    given |= {"extent": np.tile([0, 0, 2, 2], (6, 1))}
    predicted = {"logits": logits, "segments": rng.integers(0, 3, (6, 4, 4)), "boxes": boxes}
    predicted |= {"scores": np.full((6, 4), 0.5), "labels": rng.integers(0, 2, (6, 4))}
    predicted |= {"valid": np.ones((6, 4), bool)}
    of_boxes = [lambda p=p: average_precision(p, "ab") for p in PROTOCOLS]
    for make in (Accuracy, lambda: MeanIoU("abc"), *of_boxes):
        whole, joint = make(), make()
        whole.update(predicted, given)
        for rows in (slice(0, 2), slice(2, 3), slice(3, 6)):
            part = make()
            part.update(*({k: v[rows] for k, v in side.items()} for side in (predicted, given)))
            joint.add(part)
        assert joint.result() == whole.result()
        counts = draws.resamples(6, 20)
        apart, together = joint.resampled(counts), whole.resampled(counts)
        for name, values in together.items():
            np.testing.assert_array_equal(apart[name], values)


def test_images_without_a_label_count_in_no_draw():
    source = open_source(dict(name="scenes", size=32, train=1, validation=5), "validation")
    load = source.load
    source = dataclasses.replace(
        source, load=lambda number: load(number) | ({"label": None} if number == 1 else {})
    )

    def score(batch, tally):
        tally.update({"logits": np.eye(12)[batch["label"]]}, batch)
        return [{"pixels": 8, "bpp": int(n)} for n in batch["number"][batch["valid"]]]

    found = evaluate.over_batches("", source, pipeline.BatchSpec(2, (32, 32)), Accuracy, score)
    assert found["examples"] == 4 and found["top1"] == 1 and found["bpp"] == (0 + 2 + 3 + 4) / 4
    assert (draws.of(found, "top1") == 1).all() and draws.of(found, "bpp").min() < found["bpp"]
