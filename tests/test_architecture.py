"""The house rules: imports go downward, each dependency has one door, files stay readable."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gptjax"

# A module imports from lower rows, or from its own package.
ROWS = {
    "cli": 5, "api": 5,
    "pretrain": 4, "verbs": 4, "plan": 4, "verify": 4, "sweep": 4,
    "assemble": 3, "evaluate": 3, "transfer": 3, "doctor": 3,
    "train": 2, "trained": 2, "generate": 2, "data": 2, "interop": 2,
    "decoder": 1, "optim": 1, "checkpoint": 1, "metrics": 1, "run": 1,
    "installation": 0, "xla_flags": 0, "startup": 0, "settings": 0, "paths": 0, "cluster": 0, "preflight": 0,
    "distributed": 0, "hardware": 0, "plugins": 0, "config": 0, "digest": 0, "flags": 0, "sharding": 0, "zigzag": 0,
    "mup": 0, "tokenizer": 0, "attention": 0, "blockwise": 0, "triangle": 0, "backends": 0, "rope": 0,
    "fewrows": 0, "products": 0, "cache": 0, "block": 0, "losses": 0, "scaling": 0, "lint": 0,
}  # fmt: skip

# Within row 0 some modules stand on others; this is their order.
GROUND = [
    "installation", "xla_flags", "startup", "settings", "paths", "cluster", "preflight", "distributed", "hardware",
    "plugins", "config", "digest", "flags", "sharding", "zigzag", "mup", "tokenizer", "attention", "blockwise",
    "triangle", "backends", "rope", "fewrows", "products", "cache", "block", "losses", "scaling", "lint",
]  # fmt: skip

DOORS = {
    "flax.linen": {"decoder"},
    "orbax": {"checkpoint"},
    "fsspec": {"paths"},
    "etils": {"paths", "data"},
    "sentencepiece": {"tokenizer"},
    "tokenizers": {"tokenizer"},
    "tiktoken": {"tokenizer"},
    "tensorflow_datasets": {"data"},
    "grain": {"data"},
    "array_record": {"data"},
    "tensorboardX": {"metrics"},
    "tqdm": {"metrics", "data"},
    "tyro": {"flags"},
    "safetensors": {"interop"},
    "pyarrow": {"data"},
    "zstandard": {"data"},
    "packaging": {"doctor"},
    "datasets": {"data"},
}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def room(path: Path) -> str:
    """The first name below the package: a module's own, or its folder's."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Every module that a file imports, at its top or inside a function."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def test_every_module_has_a_row():
    assert {room(p) for p in modules()} == set(ROWS)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    here = room(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "gptjax" or len(parts) < 2 or parts[1] not in ROWS or parts[1] == here:
            continue
        there = parts[1]
        lower = ROWS[there] < ROWS[here]
        ground = ROWS[there] == ROWS[here] == 0 and GROUND.index(there) < GROUND.index(here)
        assert lower or ground, f"{here} (row {ROWS[here]}) may not import {there} (row {ROWS[there]})"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_dependency_has_one_door(path):
    for name in imported(path):
        for dependency, doors in DOORS.items():
            if name == dependency or name.startswith(dependency + "."):
                assert room(path) in doors, f"only {sorted(doors)} may import {dependency}"


def test_train_knows_no_model():
    assert not any(name.startswith("gptjax.model.decoder") for name in imported(PACKAGE / "train.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in {"utils", "util", "common", "helpers", "misc", "base"}
