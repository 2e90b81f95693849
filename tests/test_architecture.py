"""The house rules: imports go downward, each dependency has one door, files stay readable."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gptjax"

# The rooms, lowest first: a module imports from lower rooms, and from its own where that makes no cycle of files.
ROOMS = (
    "config runtime storage parallel ops model tokenizer data training generation evals runs interop align scaling "
    "stages serve diagnostics commands api cli __main__"
).split()

# A dependency and the rooms, or modules, that may import it.
DOORS = {
    "flax": {"model", "training"},
    "orbax": {"runs.checkpoint"},
    "fsspec": {"storage"},
    "etils": {"storage"},
    "sentencepiece": {"tokenizer"},
    "tokenizers": {"tokenizer"},
    "tiktoken": {"tokenizer"},
    "tensorflow_datasets": {"data"},
    "array_record": {"data"},
    "tensorboardX": {"training.trackers"},
    "wandb": {"training.trackers"},
    "trackio": {"training.trackers"},
    "mlflow": {"training.trackers"},
    "tqdm": {"training.progress", "data"},
    "tyro": {"config.command_line"},
    "safetensors": {"interop"},
    "huggingface_hub": {"interop.hub"},
    "gguf": {"interop"},
    "pyarrow": {"data"},
    "PIL": {"data"},
    "packaging": {"diagnostics.doctor.versions"},
    "datasets": {"data"},
    "lm_eval": {"interop.lm_eval"},
    "starlette": {"serve"},
    "uvicorn": {"serve.listening"},
    "pydantic": {"serve.protocol"},
    "pydantic_core": {"serve.protocol"},
    "prometheus_client": {"serve.monitoring"},
}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def room(name: str) -> str:
    """The first name below the package: a module's own, or its folder's."""
    return name.split(".")[1]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def ours() -> dict[str, set[str]]:
    """The modules of the package, by dotted name, that each module imports; a folder's name is its __init__.py."""
    dotted = {
        ".".join(("gptjax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    # `from gptjax.a import b` of a module b is an import of b, not of a's __init__.py.
    return {
        name: {n for n in imported(path) if n in dotted and not any(m.startswith(n + ".") for m in imported(path))}
        for name, path in dotted.items()
    }


def test_every_module_has_a_room():
    assert {room(name) for name in ours() if name != "gptjax"} <= set(ROOMS)


def test_imports_go_downward():
    upward = [
        f"{name} imports {other}"
        for name, others in ours().items()
        for other in others
        if "gptjax" not in (name, other)
        and room(other) != room(name)
        and ROOMS.index(room(other)) >= ROOMS.index(room(name))
    ]
    assert not upward, "\n".join(upward)


def test_no_files_import_each_other_in_a_circle():
    below = {name: others - {name} for name, others in ours().items() if name != "gptjax"}
    try:
        list(graphlib.TopologicalSorter(below).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_dependency_has_one_door(path):
    for name in imported(path):
        for dependency, doors in DOORS.items():
            if name == dependency or name.startswith(dependency + "."):
                here = path.relative_to(PACKAGE).with_suffix("").parts
                assert here[0] in doors or ".".join(here) in doors, f"only {sorted(doors)} may import {dependency}"


def test_the_loop_and_the_step_know_no_model():
    for name in ("step", "loop", "optim", "metrics"):
        if (path := PACKAGE / "training" / f"{name}.py").exists():
            assert not any(other.startswith("gptjax.model.decoder") for other in imported(path))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in {"utils", "util", "common", "helpers", "misc", "base"}


ASKING = {"default_backend", "device_kind", "cpu_count", "sched_getaffinity", "process_cpu_count", "usable_cores"}


def asks_for_a_device(source: str) -> list[str]:
    """Names in a file by which it asks for devices: their platform or kind, and how many cores there are."""
    asked = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            # sys.platform and platform.platform() are the operating system's.
            system = isinstance(node.value, ast.Name) and node.value.id in {"sys", "platform"}
            if node.attr in ASKING or (node.attr == "platform" and not system):
                asked.append(ast.unparse(node))
        elif isinstance(node, ast.alias | ast.Name):
            name = node.name if isinstance(node, ast.alias) else node.id
            asked += [name] if name.split(".")[-1] in ASKING else []
    return asked


def test_only_ops_runtime_parallel_and_diagnostics_ask_for_a_device():
    assert asks_for_a_device("import jax\nif jax.default_backend() == 'cpu': pass")
    assert asks_for_a_device("a = jax.devices()[0].platform") and asks_for_a_device("from os import cpu_count")
    assert not asks_for_a_device("sys.platform == 'darwin'")
    allowed = {"ops", "runtime", "parallel", "diagnostics"}
    found = {
        str(path.relative_to(PACKAGE)): asked
        for path in modules()
        if path.relative_to(PACKAGE).parts[0] not in allowed and (asked := asks_for_a_device(path.read_text()))
    }
    assert not found


QUESTIONS = {"What", "Which", "Whether", "Where", "How", "Who", "When", "Why"}


def test_a_docstring_states_and_does_not_ask():
    """The first sentence is a noun phrase or a verb in the third person."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    asking = [
        f"{path.relative_to(PACKAGE)}: {text.splitlines()[0]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds) and (text := ast.get_docstring(node)) and re.split(r"\W", text)[0] in QUESTIONS
    ]
    assert not asking, "\n".join(asking)


DOORS_OF_ROOMS = {"api", "cli", "commands"}  # a verb is named there once more
# Names of two rooms, each the usual one there.
SHARED_NAMES = {
    "main": "the entry point of a process",
    "write_manifest": "of a corpus, and of a checkpoint",
}


def test_a_public_name_has_one_meaning():
    rooms: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                rooms.setdefault(node.name, set()).add(room)
    several = {name: sorted(of - DOORS_OF_ROOMS) for name, of in rooms.items() if len(of - DOORS_OF_ROOMS) > 1}
    assert several.keys() == SHARED_NAMES.keys(), several
