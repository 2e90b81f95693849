"""The notebooks run from their first cell to their last, in an empty folder."""

import copy
import json
from pathlib import Path

import pytest
from test_docs import TINY

LAUNCH = Path(__file__).parent.parent / "launch"


def read(name):
    notebook = pytest.importorskip("nbformat").read(LAUNCH / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "a notebook is kept without its outputs"
    return notebook


def run(notebook, folder, monkeypatch) -> list[str]:
    """What each of the notebook's cells wrote, after running it in the folder."""
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    # One device, as a notebook has; compiling is most of the time, and how fast the steps are is not what is asked.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("PYTHONPATH", str(LAUNCH.parent))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return ["".join(map(str, cell.get("outputs", []))) for cell in notebook.cells]


@pytest.mark.slow
def test_the_notebook_of_the_python_api_runs(tmp_path, monkeypatch):
    texts = run(read("python_api.ipynb"), tmp_path, monkeypatch)
    assert any("eval_bits_per_byte" in text for text in texts)
    assert (tmp_path / "runs" / "notebook_squares" / "metrics.jsonl").is_file()


@pytest.mark.slow
def test_the_one_cell_of_the_colab_notebook_trains_and_run_again_goes_on(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 200)
    notebook = read("colab.ipynb")
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", "code"]
    first, again = notebook.cells[1], copy.deepcopy(notebook.cells[1])
    for cell, steps in ((first, 6), (again, 8)):
        assert cell.source.count("settings = {}") == 1
        cell.source = cell.source.replace("settings = {}", f"settings = {TINY | {'steps': steps}}")
    notebook.cells.append(again)
    _, trained, went_on = run(notebook, tmp_path, monkeypatch)
    assert "not on Drive" in trained and "sample of 4 tokens" in trained
    assert "after step 6" in went_on
    metrics = (tmp_path / "gptjax" / "quickstart" / "metrics.jsonl").read_text().splitlines()
    assert [line["step"] for line in map(json.loads, metrics) if "loss" in line] == list(range(1, 9))


def test_the_colab_notebook_installs_the_wheel_beside_it_or_says_what_is_missing(tmp_path, monkeypatch):
    notebook = json.loads((LAUNCH / "colab.ipynb").read_text())
    (cell,) = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    code = "".join(cell["source"]).replace('find_spec("gptjax")', 'find_spec("gptjax_that_is_not_installed")')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="source is empty, and no wheel of gptjax lies here; wanted a folder"):
        exec(compile(code, "colab.ipynb", "exec"), {})
    (tmp_path / "dist").mkdir()
    wheel = tmp_path / "dist" / "gptjax-0.1.0-py3-none-any.whl"
    wheel.touch()
    installed: list[list[str]] = []

    class Installed(Exception):
        pass

    def install(command, check):
        installed.append(command)
        raise Installed

    monkeypatch.setattr("subprocess.run", install)
    with pytest.raises(Installed):
        exec(compile(code, "colab.ipynb", "exec"), {})
    assert installed[0][1:4] == ["-m", "pip", "install"] and installed[0][-1].startswith(str(wheel))
