"""Batches over processes and epochs, and pixels on their way to the canvas."""

import dataclasses
import io
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import simplejpeg
from ml_collections import ConfigDict
from PIL import Image

from icm_jax.data import geometry, images, jpeg, pipeline
from icm_jax.data.pipeline import BatchSpec
from icm_jax.data.resize import bilinear
from icm_jax.data.sources import Objects, Source
from icm_jax.errors import IcmError

CANVAS = (4, 4)


def numbered(length, unlabelled=(), masks=False):
    """Images, labels and masks that say their number; some without a label."""

    def load(index):
        file = io.BytesIO()
        Image.new("RGB", CANVAS, (index + 1,) * 3).save(file, "PNG")
        label = None if index in unlabelled else index
        example = {"image": file.getvalue(), "label": label, "name": str(index)}
        if masks:
            mask = io.BytesIO()
            Image.new("L", CANVAS, index).save(mask, "PNG")
            example["mask"] = mask.getvalue()
        return example

    return Source("numbered", length, (), load, tuple(map(str, range(length))))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    length=st.integers(1, 9),
    rows=st.sampled_from([2, 4, 8]),
    processes=st.sampled_from([1, 2]),
    seed=st.integers(0, 5),
    start=st.integers(0, 4),
)
def test_batches_depend_on_seed_and_step_alone(length, rows, processes, seed, start):
    def labels(first, process=0, among=1):
        steps = pipeline.batches(
            numbered(length),
            BatchSpec(rows, CANVAS, process=process, processes=among, threads=2),
            seed=seed,
            start=first,
            stop=6,
        )
        return [batch["label"] for batch in steps]

    whole = np.concatenate(labels(0))
    resumed = labels(start)
    assert len(resumed) == 6 - start
    np.testing.assert_array_equal(np.concatenate(resumed), whole[start * rows :])
    parts = [labels(0, p, processes) for p in range(processes)]
    joined = np.concatenate([np.concatenate(step) for step in zip(*parts, strict=True)])
    np.testing.assert_array_equal(joined, whole)
    for epoch in range(len(whole) // length):
        part = whole[epoch * length : (epoch + 1) * length]
        assert sorted(part) == list(range(length))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    length=st.integers(1, 13),
    processes=st.sampled_from([1, 2, 4]),
    own=st.integers(1, 3),
    unlabelled=st.sets(st.integers(0, 12)),
    limit=st.none() | st.integers(0, 15),
)
def test_evaluation_is_complete_on_any_number_of_processes(
    length, processes, own, unlabelled, limit
):
    source = numbered(length, unlabelled, masks=True)
    seen, counts = [], set()
    for process in range(processes):
        spec = BatchSpec(own * processes, CANVAS, process=process, processes=processes, threads=2)
        batches = list(pipeline.evaluation_batches(source, spec, limit=limit))
        counts.add(len(batches))
        for batch in batches:
            assert {k: v.shape[0] for k, v in batch.items()} == dict.fromkeys(
                ("image", "valid", "label", "mask", "number"), own
            )
            assert np.all(np.diff(batch["valid"].astype(int)) <= 0)
            valid = batch["valid"]
            np.testing.assert_array_equal(
                batch["image"][valid][:, 0, 0, 0], batch["label"][valid] + 1
            )
            np.testing.assert_array_equal(batch["mask"][valid][:, 0, 0], batch["label"][valid])
            seen += batch["label"][valid].tolist()
    used = range(length if limit is None else min(limit, length))
    assert sorted(seen) == [i for i in used if i not in unlabelled]
    assert len(counts) == 1


def test_padding_is_blank_and_ignored():
    batches = list(pipeline.evaluation_batches(numbered(5, masks=True), BatchSpec(4, CANVAS)))
    last = batches[-1]
    assert last["valid"].tolist() == [True, False, False, False]
    assert not last["image"][1:].any() and np.all(last["mask"][1:] == images.IGNORE)


def test_masks_that_nobody_asks_for_are_not_read():
    whole = numbered(5, masks=True)
    source = Source("s", 5, (), lambda n: {**whole.load(n), "mask": b"no picture"}, ("0",))
    spec = BatchSpec(4, CANVAS, masks=False)
    cropped = dataclasses.replace(spec, crop=(0.5, 1.0))
    for batches in (
        pipeline.batches(source, cropped, seed=0, stop=1),
        pipeline.in_order(source, spec),
    ):
        assert sorted({*next(batches)} - {"number"}) == ["image", "label", "valid"]
    with pytest.raises(IcmError, match="cannot read"):
        next(pipeline.in_order(source, BatchSpec(4, CANVAS)))


def test_features_take_the_place_of_their_own_images():
    source, features = numbered(5, unlabelled=(1,)), np.arange(5.0).reshape(5, 1, 1, 1)
    spec, order = BatchSpec(5, CANVAS), dict(seed=3, stop=2)
    plain = list(pipeline.batches(source, spec, **order))
    given = pipeline.batches(source, spec, **order, features=features)
    for batch, other in zip(given, plain, strict=True):
        assert "image" not in batch
        np.testing.assert_array_equal(batch["valid"], other["valid"])
        numbers = other["image"][:, 0, 0, 0] - 1  # which every image shows
        np.testing.assert_array_equal(batch["feature"].ravel(), numbers)


def test_in_order_keeps_the_order_of_examples_without_a_label():
    source = numbered(5, unlabelled=(0, 3))
    batches = list(pipeline.in_order(source, BatchSpec(4, CANVAS)))
    shown = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    np.testing.assert_array_equal(shown, [1, 2, 3, 4, 5, 0, 0, 0])
    numbers = np.concatenate([batch["number"] for batch in batches])
    np.testing.assert_array_equal(numbers[:5], range(5))


def test_epochs_differ_and_are_complete_when_the_batch_is_larger():
    spec = BatchSpec(20, CANVAS)
    batch = next(pipeline.batches(numbered(6), spec, seed=1, stop=1))
    epochs = batch["label"][:18].reshape(3, 6)
    assert [sorted(epoch) for epoch in epochs.tolist()] == [list(range(6))] * 3
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    other = next(pipeline.batches(numbered(6), spec, seed=2, stop=1))
    assert not np.array_equal(other["label"], batch["label"])


def test_starting_late_loads_nothing_earlier():
    loaded = []
    source = numbered(1000)

    def load(index):
        loaded.append(index)
        return source.load(index % 200)

    spied = Source("spied", 1000, (), load, source.mask_classes)
    late = pipeline.batches(spied, BatchSpec(2, CANVAS), seed=0, start=400, stop=403)
    assert len(list(late)) == 3 and len(loaded) == 6


def test_what_is_loaded_ahead_does_not_grow_with_threads_times_batch():
    loaded = []
    source = numbered(200)

    def load(index):
        loaded.append(index)
        return source.load(index)

    spied = Source("spied", 200, (), load, source.mask_classes)
    batches = pipeline.batches(spied, BatchSpec(8, CANVAS, threads=8), seed=0, stop=25)
    next(batches)
    assert len(loaded) <= 8 + 3 * 16


def test_an_error_in_a_thread_reaches_the_loop():
    def load(index):
        return {"image": b"no image", "label": 0, "name": f"picture {index}"}

    with pytest.raises(IcmError, match="cannot read the image picture"):
        next(pipeline.batches(Source("s", 3, (), load), BatchSpec(2, (4, 4)), seed=0, stop=2))


def test_bad_arguments():
    with pytest.raises(IcmError, match="2 processes do not divide the batch size 3"):
        BatchSpec(3, CANVAS, processes=2)
    with pytest.raises(IcmError, match="seed must not be negative"):
        pipeline.batches(numbered(3), BatchSpec(2, CANVAS), seed=-1, stop=1)
    with pytest.raises(IcmError, match="no examples"):
        next(pipeline.evaluation_batches(numbered(0), BatchSpec(2, CANVAS)))


def test_a_spec_is_made_of_a_runs_data_fields():
    data = ConfigDict(dict(name="folder", path="x", canvas=(16, 32), crop=(0.5, 1.0)))
    spec = pipeline.batch_spec(data, 4, masks=False)
    assert spec == BatchSpec(4, (16, 32), crop=(0.5, 1.0), masks=False)
    assert pipeline.batch_spec(dict(canvas=48, boxes=3), 2) == BatchSpec(2, (48, 48), boxes=3)
    assert pipeline.image_spec(data, 4) == BatchSpec(4, (16, 32), masks=False)
    read_back = ConfigDict(json.loads(data.to_json()))  # where a tuple has become a list
    assert pipeline.batch_spec(read_back, 4) == pipeline.batch_spec(data, 4)
    for size in (0, (1, 2, 3), (4, 0.5), "large"):
        with pytest.raises(IcmError, match="a whole number of pixels or"):
            geometry.sides(size)


def stored(array, kind, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def test_16_bit_grey_keeps_its_steps():
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = images.read_rgb(stored(grey, "PNG"), "x")
    np.testing.assert_array_equal(image, np.repeat((grey // 256).astype(np.uint8)[..., None], 3, 2))


def test_greyscale_cmyk_and_palette_become_rgb():
    colour = np.full((8, 8, 3), (200, 60, 30), np.uint8)
    cmyk, palette = io.BytesIO(), io.BytesIO()
    Image.fromarray(colour).convert("CMYK").save(cmyk, "JPEG", quality=100)
    Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE).save(palette, "PNG")
    for data in (cmyk.getvalue(), palette.getvalue()):
        np.testing.assert_allclose(
            images.read_rgb(data, "x").astype(int), colour.astype(int), atol=4
        )
    grey = images.read_rgb(stored(colour[..., 0], "JPEG", quality=100), "x")
    np.testing.assert_allclose(grey.astype(int), 200, atol=2)


def test_an_image_too_large_for_pillow_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(IcmError, match="cannot read the image x"):
        images.read_rgb(stored(np.zeros((20, 20, 3), np.uint8), "PNG"), "x")


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    height=st.integers(40, 400),
    width=st.integers(40, 400),
    canvas=st.tuples(st.integers(8, 48), st.integers(8, 48)),
)
def test_image_and_mask_stay_aligned(height, width, canvas):
    """The left part is bright and of class 1, also where the JPEG is decoded at reduced size."""
    mask = (np.arange(width)[None] < width // 2).astype(np.uint8) * np.ones((height, 1), np.uint8)
    jpeg = simplejpeg.encode_jpeg(
        np.ascontiguousarray(np.repeat(mask[..., None] * 255, 3, axis=2)), 100, "RGB", "444"
    )
    image = images.read_rgb(jpeg, "x", canvas)
    assert image.shape[0] >= min(height, canvas[0]) and image.shape[1] >= min(width, canvas[1])
    geometry.check_aspect(image, mask, "x")
    fitted = geometry.fit(image, canvas)[..., 0] > 127
    labels = geometry.fit(mask, canvas, Image.Resampling.NEAREST)
    assert fitted.shape == labels.shape == canvas
    assert np.abs(fitted.sum(axis=1) - labels.sum(axis=1, dtype=int)).max() <= 1


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    sides=st.tuples(*[st.integers(1, 60)] * 4),
    edges=st.tuples(*[st.floats(0, 1)] * 4),
    whole=st.booleans(),
)
def test_resizing_is_pillows(sides, edges, whole):
    height, width, *size = sides
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    (left, right), (top, bottom) = sorted(edges[:2]), sorted(edges[2:])
    box = (
        left * (width - 1),
        top * (height - 1),
        right * (width - 1) + 1,
        bottom * (height - 1) + 1,
    )
    box = None if whole else box
    expected = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, box)
    given = bilinear(image, size, box)
    np.testing.assert_allclose(given.astype(int), np.asarray(expected, int), atol=1)


@pytest.mark.parametrize("value", [0, 1, 200, 255])
def test_resizing_keeps_flat_areas(value):
    image = np.full((1200, 701, 3), value, np.uint8)
    assert (bilinear(image, (3, 5)) == value).all() and (bilinear(image, (999, 7)) == value).all()


def shown(boxes, labels, ignored, size=(30, 20)):
    """A source of one picture of this (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).save(file, "PNG")
    objects = Objects(np.float32(boxes), np.int32(labels), np.array(ignored))
    example = {"image": file.getvalue(), "label": None, "name": "shown", "objects": objects}
    return Source("shown", 1, ("a", "b"), lambda index: example)


def test_boxes_come_letterboxed_largest_first():
    given = [[0, 0, 0.5, 0.2], [0, 0, 1, 1], [0.25, 0.5, 0.75, 1], [0, 0, 0.1, 0.1]]
    source = shown(given, [0, 1, 1, 0], [False, True, False, False])
    spec = BatchSpec(2, (16, 12), boxes=3)
    for batch in (
        next(pipeline.in_order(source, spec)),
        next(pipeline.batches(source, spec, seed=0, stop=1)),
    ):
        assert batch["image"].shape == (2, 16, 12, 3) and batch["valid"][0]
        assert batch["extent"][0].tolist() == [0, 0, 8, 12]
        assert (batch["image"][0, :8] == [200, 100, 50]).all()
        assert (batch["image"][0, 8:] == geometry.GREY).all()
        np.testing.assert_allclose(
            batch["boxes"][0], [[0, 0, 0.5, 1], [0.125, 0.5, 0.375, 1], [0, 0, 0.25, 0.2]]
        )
        assert batch["box_labels"][0].tolist() == [1, 1, 0]
        assert batch["box_valid"][0].tolist() == [False, True, True]
        assert batch["box_ignored"][0].tolist() == [True, False, False]
    centred = next(pipeline.in_order(source, BatchSpec(1, (16, 12), boxes=3, letterbox="centre")))
    assert centred["extent"][0].tolist() == [4, 0, 8, 12]
    assert (centred["image"][0, 4:12] == [200, 100, 50]).all()
    assert (centred["image"][0, [3, 12]] == geometry.GREY).all()
    np.testing.assert_allclose(
        centred["boxes"][0], [[0.25, 0, 0.75, 1], [0.375, 0.5, 0.625, 1], [0.25, 0, 0.5, 0.2]]
    )
    with pytest.raises(IcmError, match=r"data\.letterbox is corner or centre, not 'middle'"):
        BatchSpec(1, (16, 12), boxes=3, letterbox="middle")
    few = next(pipeline.in_order(source, BatchSpec(1, (16, 12), boxes=6)))
    assert few["box_valid"].sum() == 3 and few["box_ignored"].sum() == 1
    padding = next(pipeline.in_order(source, spec))
    assert not padding["valid"][1] and not padding["box_valid"][1].any()


def test_boxes_of_data_without_any():
    with pytest.raises(IcmError, match=r"has no boxes, which data\.boxes asks for; set it to 0"):
        next(pipeline.batches(numbered(3), BatchSpec(1, CANVAS, boxes=2), seed=0, stop=1))


@hypothesis.given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40))
@hypothesis.settings(max_examples=60, deadline=None)
def test_letterboxed_pictures_touch_two_sides(height, width, down, across):
    canvas = (down, across)
    image = np.zeros((height, width, 3), np.uint8)
    for place in geometry.LETTERBOXES:
        boxed, (top, left, h, w) = geometry.letterbox(image, canvas, place)
        assert boxed.shape == (*canvas, 3) and (h == canvas[0] or w == canvas[1])
        bars = boxed == geometry.GREY
        assert not boxed[geometry.inside((top, left, h, w))].any()
        assert bars.sum() == boxed.size - 3 * h * w
        low, right = canvas[0] - h - top, canvas[1] - w - left
        if place == "centre":
            assert 0 <= low - top <= 1 and 0 <= right - left <= 1
        else:
            assert (top, left) == (0, 0)
    scale = min(canvas[0] / height, canvas[1] / width)
    assert abs(h - height * scale) < 1 and abs(w - width * scale) < 1


def files(*contents):
    """A source of these image files."""

    def load(index):
        return {"image": contents[index], "label": index, "name": f"file {index}"}

    names = tuple(map(str, range(len(contents))))
    return Source("files", len(contents), (), load, names)


def noisy(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_coefficients_are_those_of_the_file_or_of_one_written_anew():
    image = noisy(50, 70)
    colour = stored(image, "JPEG", quality=90)
    grey = stored(image[..., 0], "JPEG", quality=80)
    spec, order = BatchSpec(2, (32, 48), coefficients="file"), dict(seed=0, stop=1)
    (batch,) = pipeline.batches(files(colour, grey), spec, **order)
    assert "image" not in batch and batch["luma"].dtype == np.int16
    rows = {int(label): row for row, label in enumerate(batch["label"])}
    own = jpeg.read_coefficients(colour)
    # The middle, at multiples of 16: nothing of 18 rows and 22 columns can be left above or beside.
    np.testing.assert_array_equal(batch["luma"][rows[0]], own.planes[0][:4, :6])
    np.testing.assert_array_equal(batch["chroma"][rows[0], ..., 64:], own.planes[2][:2, :3])
    np.testing.assert_array_equal(batch["steps"][rows[0]], np.concatenate(own.tables))
    assert not batch["chroma"][rows[1]].any() and batch["luma"][rows[1]].any()
    spec = dataclasses.replace(spec, coefficients="75")
    (anew,) = pipeline.batches(files(colour, grey), spec, **order)
    fitted = geometry.fit(images.read_rgb(colour, ""), (32, 48))
    again = jpeg.read_coefficients(simplejpeg.encode_jpeg(fitted, 75, "RGB", "420"))
    np.testing.assert_array_equal(anew["luma"][rows[0]], again.planes[0])
    (whole,) = pipeline.in_order(files(colour), BatchSpec(1, (32, 48), coefficients="75"))
    np.testing.assert_array_equal(whole["luma"][0], anew["luma"][rows[0]])


@pytest.mark.parametrize(
    "file, wanted, canvas, message",
    [
        (stored(noisy(20, 64), "JPEG"), "file", (32, 32), "fewer than the canvas"),
        (
            stored(noisy(64, 64), "JPEG", subsampling=0),
            "file",
            (32, 32),
            "no YCbCr image with 4:2:0",
        ),
        (stored(noisy(64, 64), "PNG"), "file", (32, 32), "no JPEG"),
        (stored(noisy(64, 64), "JPEG"), "file", (24, 32), "multiples of 16"),
        (stored(noisy(64, 64), "JPEG"), "raw", (32, 32), '"file" or a quality'),
    ],
)
def test_coefficients_that_cannot_be_had(file, wanted, canvas, message):
    with pytest.raises(IcmError, match=message):
        list(pipeline.in_order(files(file), BatchSpec(1, canvas, coefficients=wanted)))


@pytest.mark.parametrize("canvas", [(32, 48), (64, 32)])
def test_random_windows_show_a_part_of_the_image(canvas):
    """Of an image whose colours say their place: where a view begins, ends, and what it covers."""
    height, width = 90, 120
    place = np.zeros((height, width, 3), np.uint8)
    place[..., 0], place[..., 1] = np.arange(height)[:, None], np.arange(width)[None]
    mirrored, shares = 0, []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        view = geometry.random_view(place, canvas, (0.25, 0.5), rng).astype(float)
        assert view.shape == (*canvas, 3)
        flip = view[0, 0, 1] > view[0, -1, 1]
        mirrored += flip
        view = view[:, ::-1] if flip else view
        sides = [
            np.ptp(view[:, 0, 0]) * canvas[0] / (canvas[0] - 1),
            np.ptp(view[0, :, 1]) * canvas[1] / (canvas[1] - 1),
        ]
        scale = min(height / canvas[0], width / canvas[1])
        shares.append(np.prod(sides) / np.prod(canvas) / scale**2)
        aspect = sides[0] / sides[1] * canvas[1] / canvas[0]
        assert 0.7 < aspect < 1.4
    assert 8 < mirrored < 32
    assert 0.2 < min(shares) and max(shares) < 0.56 and np.ptp(shares) > 0.1


def test_windows_are_cut_before_an_image_is_written():
    """The same window as pixels and as coefficients; another in the next epoch."""
    image = stored(noisy(64, 64), "PNG")
    spec, order = BatchSpec(1, (32, 32), crop=(0.3, 0.6)), dict(seed=3, stop=2)
    pixels = list(pipeline.batches(files(image), spec, **order))
    coded = dataclasses.replace(spec, coefficients="90")
    planes = list(pipeline.batches(files(image), coded, **order))
    for one, other in zip(pixels, planes, strict=True):
        written = pipeline.write_jpeg(one["image"][0], 90)
        own = pipeline.read_planes(written, "", (32, 32))
        np.testing.assert_array_equal(own["luma"], other["luma"][0])
    assert (pixels[0]["image"] != pixels[1]["image"]).any()
    (late,) = pipeline.batches(files(image), spec, start=1, **order)
    np.testing.assert_array_equal(late["image"], pixels[1]["image"])
    for changes in (dict(coefficients="file"), dict(boxes=2)):
        with pytest.raises(IcmError, match="goes neither with boxes nor with features"):
            dataclasses.replace(spec, **changes)
    with pytest.raises(IcmError, match="goes neither with boxes nor with features"):
        pipeline.batches(files(image), spec, **order, features=np.zeros((1, 2, 2, 3)))
    with pytest.raises(IcmError, match="share of the area"):
        dataclasses.replace(spec, crop=(0.0, 1.0))
