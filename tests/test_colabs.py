"""Notebooks run from top to bottom and carry no outputs."""

import pathlib

import nbclient
import nbformat
import pytest
from small import UNOPTIMISED

COLABS = pathlib.Path(__file__).resolve().parent.parent / "colabs"

# Jupyter's own code warns of its event loop.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("shared_programs")]


@pytest.mark.parametrize("path", sorted(COLABS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    monkeypatch.setenv("XLA_FLAGS", UNOPTIMISED)
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(COLABS)}}
    )
    client.execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 2
