"""Laws of the path: how much of the package a training step and a verb run through, so that both can be read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gptjax"

# Bounds of what a reader follows from the training step down, and from the command line to the first projection.
MOST_FUNCTIONS, MOST_FILES, MOST_FRAMES = 60, 15, 12
ONE_DEVICE = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}

TRACED = """
import json, sys
from pathlib import Path
package, out, recipe, *flags = sys.argv[1:]
from gptjax import cli
from gptjax.model import block
from gptjax.training import build

ours = lambda code: code.co_filename.startswith(package)
entered, depth, make = set(), [], build.make_train_step

def note(frame, event, argument):
    if event == "call" and ours(frame.f_code) and frame.f_code.co_name not in COMPREHENSIONS:
        entered.add((frame.f_code.co_filename, frame.f_code.co_firstlineno, frame.f_code.co_name))

COMPREHENSIONS = {"<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>"}  # no functions of their own since 3.12

def first_projection(*args, **more):
    if not depth:
        frame, names = sys._getframe(1), []
        while frame:
            names += [frame.f_code.co_name] if ours(frame.f_code) else []
            frame = frame.f_back
        depth.append([n for n in reversed(names) if n not in COMPREHENSIONS])
    return linear(*args, **more)

def make_train_step(*args, **more):
    step = make(*args, **more)

    def train_step(*args):
        depth.clear()  # of the projections that initialised the parameters
        sys.setprofile(note)
        try:
            return step(*args)
        finally:
            sys.setprofile(None)
            Path(out).write_text(json.dumps({"entered": sorted(entered), "frames": depth[0]}))

    return train_step

linear, block.linear, build.make_train_step = block.linear, first_projection, make_train_step
sys.exit(cli.main(["pretrain", recipe, *flags]))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> dict:
    """Our functions that tracing one training step of the quickstart enters, and our frames above its projections."""
    folder = tmp_path_factory.mktemp("path")
    flags = ["--run-dir", folder / "run", "--steps", "1", "--model.num-layers", "1", "--model.width", "32",
             "--data.batch-size", "4", "--data.length", "32", "--model.num-heads", "2", "--evaluate.max-rows", "4",
             "--tokenizer.kind", "bytes", "--tokenizer.vocab-size", "258"]  # fmt: skip
    command = [sys.executable, "-c", TRACED, str(PACKAGE), folder / "path.json", "quickstart", *flags]
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, cwd=ROOT, env=ONE_DEVICE)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "path.json").read_text()) | {"run": folder / "run"}


def test_a_training_step_runs_through_few_functions_in_few_files(path):
    functions = [f"{Path(file).relative_to(PACKAGE)}:{line} {name}" for file, line, name in path["entered"]]
    files = sorted({entry.partition(":")[0] for entry in functions})
    assert len(functions) <= MOST_FUNCTIONS, "\n".join(functions)
    assert len(files) <= MOST_FILES, "\n".join(files)


def test_few_frames_stand_above_the_first_projection(path):
    assert len(path["frames"]) <= MOST_FRAMES, " -> ".join(path["frames"])


def test_continuing_a_prompt_imports_little(path):
    code = """
import json, sys
from gptjax import cli
code = cli.main(["generate", sys.argv[1], "--prompt", "a", "--max-new-tokens", "2"])
print(json.dumps([name for name in sys.modules if name.split(".")[0] == "gptjax"]), file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path["run"])], capture_output=True, text=True, cwd=ROOT, env=ONE_DEVICE
    )
    assert done.returncode == 0, done.stderr
    # A folder's own file (__init__.py) is no module of its own where it holds nothing but its name.
    names = json.loads(done.stderr.splitlines()[-1])
    empty = [n for n in names if (PACKAGE.parent / n.replace(".", "/") / "__init__.py").exists()]
    modules = sorted(n for n in names if n not in empty or n in ("gptjax", "gptjax.config"))
    assert len(modules) <= 50, "\n".join(modules)
    rooms = {name.split(".")[1] for name in modules if "." in name}
    assert not rooms & {"data", "interop", "evals", "scaling"}, "\n".join(modules)
