"""Segmentation of whole images at their own size, against NumPy on images that are not square."""

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image
from small import FEATURE, RNG, images

from icm_jax.data import geometry, open_source
from icm_jax.engine.run import Labels, Point, Run
from icm_jax.measure import evaluate, segments
from icm_jax.tasks import build_task

CLASSES = ("road", "sky", "tree", "car")
TASK = dict(name="segmentation", variant="10", width=8, dtype="float32", size=32, crop=(1.0, 1.0))
TASK |= dict(aspp_rates=(1, 2), output_stride=8, mask_classes=len(CLASSES))


def drawn(task):
    """Variables of a task, drawn here, for its own take long to compile."""

    def leaf(path, shape):
        if path[-1].key in ("scale", "var"):
            return np.ones(shape.shape, np.float32)
        scale = np.prod(shape.shape[:-1]) ** -0.5 if len(shape.shape) > 1 else 0.02
        return RNG.normal(0, scale, shape.shape).astype(np.float32)

    shapes = jax.eval_shape(task.init, jax.random.key(0), {"image": images(1, 32, 32, 3)})
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def enlarged(logits, sides, shape, stride=8):
    """Class of each pixel by bilinear interpolation, as products with matrices in float64."""

    def weights(length, side, cells):
        place = ((np.arange(length) + 0.5) * side / length / stride - 0.5).clip(0, cells - 1)
        return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(cells)[None]))

    down, across = (weights(*given) for given in zip(shape, sides, logits.shape[:2], strict=True))
    return np.einsum("ph,hwk,qw->pqk", down, logits.astype(float), across).argmax(axis=-1)


@pytest.mark.parametrize(
    ("more", "name", "step"),
    [
        (dict(frontend="pixels"), "image", 1),
        (dict(frontend="feature", codec=dict(FEATURE, name="omni_feature")), "feature", 4),
    ],
    ids=["pixels", "feature"],
)
def test_segments_of_a_window_are_those_of_the_whole_image(more, name, step):
    """Sides that no stride divides; a second size of the same window compiles nothing."""
    task = build_task(ml_collections.ConfigDict(TASK | more))
    variables, windows = drawn(task), []
    cached = segments._segments._cache_size
    for sides, shape in (((45, 77), (97, 150)), ((37, 67), (105, 159))):
        array = images(1, *sides, 3)
        if step > 1:
            array = np.float32(RNG.normal(size=(1, *(-(-side // step) for side in sides), 8)))
        logits = np.asarray(task.predict(variables, {name: array})["logits"][0])
        found = segments.segmented(task.predict, variables, {name: array}, sides, shape)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found[0], enlarged(logits, sides, shape))
        assert len(np.unique(found)) > 1
        windows.append(cached())
    assert windows[0] == windows[1]


def folder(root):
    """Two photographs, one standing and one lying, with masks at the same size; some unknown."""
    for place in ("images", "masks"):
        (root / place).mkdir()
    truth = {}
    for name, (height, width) in (("a", (60, 97)), ("b", (131, 70))):
        picture = Image.fromarray(images(height // 8, width // 8, 3)).resize((width, height))
        mask = RNG.integers(0, len(CLASSES), (height, width)).astype(np.uint8)
        mask[:, : width // 4] = 255
        picture.save(root / f"images/{name}.png")
        Image.fromarray(mask).save(root / f"masks/{name}.png")
        truth[name] = np.asarray(picture), mask
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("a\nb\n")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return truth


def test_the_score_is_that_of_whole_images_at_their_own_size(tmp_path):
    truth = folder(tmp_path)
    data = ml_collections.ConfigDict(dict(name="mask_folder", path=str(tmp_path), canvas=48))
    config = ml_collections.ConfigDict(TASK | dict(frontend="pixels"))
    task, labels = build_task(config), Labels("segment", "pixels")
    variables, point = drawn(task), Point("pixels")
    fields = dict(batch_size=2, steps=1, log_every=1, save_every=1, labels=labels, needs=("mask",))
    run = Run("run", 0, config, data, ml_collections.ConfigDict(), **fields)
    source = open_source(data, "validation")
    asked = evaluate.Asked(point, run, tmp_path, data, source, config, task, variables, None)
    record = evaluate.SCORERS["pixels"](asked)
    counts = np.zeros((3, len(CLASSES)))  # right, in the mask, predicted
    for picture, mask in truth.values():
        height, width = mask.shape
        scale = 48 / min(height, width)
        small = geometry.cover(picture, (48, 48))
        assert small.shape[:2] == (round(height * scale), round(width * scale))
        logits = np.asarray(task.predict(variables, {"image": small[None]})["logits"][0])
        found = enlarged(logits, small.shape[:2], mask.shape)
        for k in range(len(CLASSES)):
            there, here = (mask == k), (found == k) & (mask != 255)
            counts[:, k] += (there & here).sum(), there.sum(), here.sum()
    iou = counts[0] / (counts[1] + counts[2] - counts[0])
    assert record["by_class"] == pytest.approx(dict(zip(CLASSES, iou, strict=True)))
    assert record["miou"] == pytest.approx(iou.mean())
    assert record["pixel_accuracy"] == pytest.approx(counts[0].sum() / counts[1].sum())
    assert record["images"] == 2 and "miou" in record["draws"]
