"""Laws of hub names: what is fetched is named by its commit, is never code, and what can't be fetched is one line."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from hub_server import COMMIT, serve
from test_interop import FIXTURES

from gptjax.api import load
from gptjax.cli import main
from gptjax.config.section import InputError
from gptjax.interop.hub import fetch
from gptjax.interop.huggingface import import_huggingface

huggingface_hub = pytest.importorskip("huggingface_hub", reason="names of the hub: pip install 'gptjax[hf]'")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The requests to a hub with org/tiny, a Llama with code and a pickle beside it, and org/closed, which is gated."""
    folder = tmp_path / "hub"
    shutil.copytree(FIXTURES / "tiny_random_llama", folder)
    for name in ("modeling_tiny.py", "pytorch_model.bin", "consolidated.safetensors", "tiny.gguf"):
        (folder / name).write_bytes(b"not to be read")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # datasets without a network set it for a whole process
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with serve({"org/tiny": folder}, gated="org/closed") as (address, requests):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield requests


def test_a_name_gives_the_model_that_its_folder_gives_and_the_run_names_the_commit(hub, tmp_path):
    assert main(["import", "org/tiny@v1", "run"]) == 0
    want = import_huggingface(FIXTURES / "tiny_random_llama")[3]
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "run").params, want)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["path"] == f"org/tiny@{COMMIT}"
    fetched = {request.split("/")[-1] for request in hub if request.startswith("GET") and "resolve" in request}
    assert {"config.json", "model.safetensors"} <= fetched
    assert not fetched & {"modeling_tiny.py", "pytorch_model.bin", "consolidated.safetensors", "tiny.gguf"}


def test_a_file_of_a_model_is_fetched_alone(hub):
    path, name = fetch("org/tiny/tiny.gguf")
    assert path.read_bytes() == b"not to be read" and name == f"org/tiny@{COMMIT}/tiny.gguf"
    assert not any("safetensors" in request for request in hub)


def test_what_lies_here_wins_over_the_hub(hub, tmp_path):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert fetch("org/tiny") == (tmp_path.joinpath("org", "tiny").relative_to(tmp_path), "org/tiny") and not hub
    with pytest.raises(InputError, match="is not here; wanted a Hugging Face folder, a .gguf file, or a name"):
        fetch("no_name_of_the_hub")
    assert not hub


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("org/none", "org/none is not here, and no model org/none on the hub"),
        ("org/closed", "org/closed is gated: accept the terms on the page of org/closed, then: hf auth login"),
        ("org/tiny@nope", "org/tiny has no revision nope; wanted a branch, tag or commit"),
        ("org/tiny@v1/other.gguf", "org/tiny has no file other.gguf"),
        ("org/ti--ny", "org/ti--ny is not here, and could not be fetched from the hub"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(hub, tmp_path, capsys, source, said):
    assert main(["import", source, "run"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gptjax:")]
    assert len(errors) == 1 and said in errors[0] and not (tmp_path / "run").exists()


def test_without_a_network_what_was_fetched_is_used_and_all_else_is_one_line(hub, monkeypatch):
    path, _ = fetch("org/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch("org/tiny").path == path
    with pytest.raises(
        InputError, match="org/other is not here, and could not be fetched .*refused.*; check the network"
    ):
        fetch("org/other")


def test_the_package_that_fetches_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"org/tiny is not here; .*pip install 'gptjax\[hf\]'"):
        fetch("org/tiny")
