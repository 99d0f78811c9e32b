"""The Colab notebooks run from their first to their last cell."""

from __future__ import annotations

import pathlib

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "colab"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def ran(name: str, narrow_folder: pathlib.Path, *changes: tuple[str, str]) -> str:
    """All that the cells of a notebook show, run with some layers and experts of the bundled model in its place.
    changes: what is written in one cell, and what stands there instead."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    for old, new in changes:
        (cell,) = [cell for cell in notebook.cells if old in cell.source and cell.cell_type == "code"]
        cell.source = cell.source.replace(old, new)
    model = f"import os, pathlib, dynamo_jax.models.bundled as own\nown.BUNDLED = pathlib.Path({str(narrow_folder)!r})"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(model))
    done = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    return "".join(str(cell.get("outputs", "")) for cell in done.cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_without_outputs(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_the_demo_notebook(narrow_folder, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    texts = "KINDS = {k: lambda _, k=k: (f'{k} {i} {i * i}' for i in range(9000)) for k in KINDS}"
    small = ("calibration_windows=8", "calibration_windows=4, window=128"), ("limit=16", "limit=4")
    shown = ran("demo.ipynb", narrow_folder, ("import KINDS, collect\n", f"import KINDS, collect\n{texts}\n"), *small)
    assert "Verdict(nearest=" in shown and "auto " in shown  # what the small model calls novel says nothing
    assert "layers x 8 experts" in shown  # the small model was there
    assert "image/png" in shown


@pytest.mark.slow
def test_the_notebook_of_a_real_model_runs_on_a_small_one(narrow_folder, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    shown = ran("real_model.ipynb", narrow_folder, ("SMALL = False", "SMALL = True"), ("tiny-moe", str(narrow_folder)))
    for words in ("are free", "2 layers x 8", "about ", "reference", "auto", "mine", "--"):
        assert words in shown, words


@pytest.mark.slow
def test_the_notebook_of_ones_own_model(narrow_folder):
    shown = ran("own_model.ipynb", narrow_folder)
    assert "the monitors say:" in shown and "adapted: " in shown and "image/png" in shown
