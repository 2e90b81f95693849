"""Promise 2 on sources of every kind: a short version of benchmarks/resume_sources.py, on small texts made here."""

import dataclasses
import random
from pathlib import Path

import pytest
import resume_sources
from corpora import write_jsonl

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all, and so one compile cache: the runs differ in their data alone."""
    return tmp_path_factory.mktemp("sources")


def texts(folder: Path, name: str, letters: str) -> Path:
    """A folder with a .jsonl.gz file of two hundred documents."""
    rng = random.Random(name)
    (folder / name).mkdir()
    documents = ["".join(rng.choices(letters + " \n", k=rng.randint(1, 400))) for _ in range(200)]
    return write_jsonl(folder / name / "text.jsonl.gz", documents).parent


# Killed once here and twice by the benchmark; the last part has another number of workers, which are fewer here.
@pytest.mark.slow
def test_a_killed_stream_with_workers_has_the_curve_of_one_that_was_not(folder):
    case = dataclasses.replace(resume_sources.stream_case(texts(folder, "source", "abcdefgh")), workers=(2, 1))
    found = resume_sources.measure(case, folder, STEPS, 1, random.Random())
    assert found["identical"] and "is not what it was when this run was trained on it" in found["refused"]


@pytest.mark.slow
def test_a_killed_mixture_has_the_curve_of_one_that_was_not(folder):
    sources = [texts(folder, name, letters) for name, letters in (("a", "abcd"), ("b", "efgh"), ("c", "ijkl"))]
    mixed = " ".join(f"{name}={source}" for name, source in zip(("first", "second", "third"), sources))
    case = resume_sources.mixture_case(mixed, resume_sources.BYTES)
    assert resume_sources.measure(case, folder, STEPS, 1, random.Random())["identical"]
