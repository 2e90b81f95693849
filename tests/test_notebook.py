"""The notebook of the Python API runs from its first cell to its last, in an empty folder."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "launch" / "python_api.ipynb"


@pytest.mark.slow
def test_the_notebook_of_the_python_api_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as a notebook has
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "a notebook is kept without its outputs"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = [str(out) for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("eval_bits_per_byte" in text for text in texts)
    assert (tmp_path / "runs" / "notebook_squares" / "metrics.jsonl").is_file()
