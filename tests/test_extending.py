"""A stranger adds a codec, a detector, a data set, a weights reader and a task on other data.

Each lies in tests/strangers/ in at most 60 lines and uses the package as it is installed.
"""

import pathlib

import jax
import numpy as np
import pytest
from strangers import dataset

from icm_jax.data import DATASETS, open_source, pipeline
from icm_jax.engine import checkpoint
from icm_jax.engine.train import complete, train
from icm_jax.errors import IcmError
from icm_jax.measure.evaluate import evaluate
from icm_jax.tasks import build_task

STRANGERS = sorted(pathlib.Path(__file__).with_name("strangers").glob("*.py"))


@pytest.mark.parametrize("path", STRANGERS, ids=lambda path: path.stem)
def test_a_stranger_needs_at_most_sixty_lines(path):
    assert len(path.read_text().splitlines()) <= 60


def test_streets_of_another_data_set_are_trained_and_scored_whole(tmp_path, monkeypatch):
    """Both ends of each street are seen: classes that stand nowhere else are learned."""
    monkeypatch.setitem(DATASETS, "streets", dataset.STREETS)
    run = dataset.segmentation_run(seed=0, size=(32, 64))
    with jax.numpy_dtype_promotion("standard"):
        metrics = train(run, tmp_path)
        (record,) = evaluate(run, tmp_path)
    assert metrics["pixel_accuracy"] > 0.8
    assert record["images"] == 16 and record["miou"] > 0.5
    source = open_source(run.data, "validation")
    (batch,) = pipeline.in_order(source, pipeline.batch_spec(run.data, 16))
    assert batch["image"].shape == (16, 32, 64, 3) and batch["mask"].shape == (16, 32, 64)
    assert (batch["mask"][:, :30, :10] == 2).all() and (batch["mask"][:, :30, -10:] == 2).all()
    assert set(np.unique(batch["mask"])) == {0, 1, 2, 255}
    predict = jax.jit(build_task(complete(run.task, source)).predict)
    found = predict(checkpoint.load_variables(tmp_path / run.name), batch)["segments"]
    assert found.shape == batch["mask"].shape
    ends = np.asarray(found)[:, :24, [0, 1, 2, 61, 62, 63]]
    assert (ends == 2).mean() > 0.8 and (np.asarray(found)[:, :24, 16:48] == 2).mean() < 0.1
    with pytest.raises(IcmError, match=r"set streets has no field data\.path; it has count"):
        open_source(dict(name="streets", path="x"), "train")
