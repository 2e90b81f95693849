"""Promise 2 on sources of every kind: a short version of benchmarks/resume_sources.py, on small texts made here."""

import dataclasses
import gzip
import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

STEPS = 40


@pytest.fixture(scope="module")
def resume_sources() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "resume_sources.py"
    spec = importlib.util.spec_from_file_location("resume_sources", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all, and so one compile cache: the runs differ in their data alone."""
    return tmp_path_factory.mktemp("sources")


def texts(folder: Path, name: str, letters: str) -> Path:
    """A folder with a .jsonl.gz file of two hundred documents."""
    rng = random.Random(name)
    (folder / name).mkdir()
    with gzip.open(folder / name / "text.jsonl.gz", "wt") as file:
        for _ in range(200):
            file.write(json.dumps({"text": "".join(rng.choices(letters + " \n", k=rng.randint(1, 400)))}) + "\n")
    return folder / name


# Killed once here and twice by the benchmark; the last part has another number of workers, which are fewer here.
@pytest.mark.slow
def test_a_killed_stream_with_workers_has_the_curve_of_one_that_was_not(folder, resume_sources):
    case = dataclasses.replace(resume_sources.stream_case(texts(folder, "source", "abcdefgh")), workers=(2, 1))
    found = resume_sources.measure(case, folder, STEPS, 1, random.Random())
    assert found["identical"] and "is not what this run was trained on" in found["refused"]


@pytest.mark.slow
def test_a_killed_mixture_has_the_curve_of_one_that_was_not(folder, resume_sources):
    sources = [texts(folder, name, letters) for name, letters in (("a", "abcd"), ("b", "efgh"), ("c", "ijkl"))]
    mixed = " ".join(f"{name}={source}" for name, source in zip(("first", "second", "third"), sources))
    case = resume_sources.mixture_case(mixed, resume_sources.BYTES)
    assert resume_sources.measure(case, folder, STEPS, 1, random.Random())["identical"]
