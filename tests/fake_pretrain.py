"""A sweep over a stand-in for pretrain, which does no arithmetic and needs no jax; for tests/test_sweep.py.

    fake_pretrain.py sweep RECIPE OUT WORKERS GRID...   the real sweep, with the other as its `gptjax`
    fake_pretrain.py pretrain RECIPE FLAGS...           makes a run's files; its loss tells which steps it made, and how

STANDIN_KILLS names a function of the sweep, which is killed with all it started where it first calls that.
STANDIN_DELAY is the seconds a step takes, STANDIN_FAILS names a run and the code that it ends with at its third step,
where with STANDIN_LOSS its loss is that.
"""

import argparse
import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

DECAY = 0.2


def sweep(recipe: str, out: str, workers: str, *grid: str) -> int:
    from gptjax.config.command_line import load_recipe
    from gptjax.config.sweep import SweepConfig
    from gptjax.scaling.sweep import work

    work._corpus = lambda *_: []
    work.PAUSE = 0.05
    cfg = SweepConfig(out=out, grid=grid, workers=int(workers))
    if where := os.environ.get("STANDIN_KILLS"):
        kill_at(where)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    return work.sweep(cfg, load_recipe(recipe), say, [sys.executable, __file__])


def kill_at(where: str) -> None:
    """Puts a kill in the place of a function: one of the sweep's, or of what a fork or a table is made with."""
    import shutil

    from gptjax.scaling.sweep import fork, work
    from gptjax.storage import disk
    from gptjax.training.metrics_file import MetricsFile

    real = os.replace

    def kill(*_: object, **__: object) -> None:
        os.killpg(0, signal.SIGKILL)

    def at_table(source: str, target: str) -> None:
        (kill if Path(target).name == "table.csv" else real)(source, target)

    def at_fork(source: str, target: str) -> None:
        (kill if Path(source).name.startswith(fork.PARTIAL) else real)(source, target)

    def half(source: Path, target: Path, **_: object) -> None:
        target.mkdir(parents=True)
        shutil.copy(source / "manifest.json", target)
        kill()

    owner, name, stand = {
        "write_jobs": (work, "write_jobs", kill),
        "write_table": (work, "write_table", kill),
        "fork.copytree": (shutil, "copytree", half),
        "fork.truncate_after": (MetricsFile, "truncate_after", kill),
        "fork.write_json": (fork, "write_json", kill),
        "fork.replace": (os, "replace", at_fork),
        "table.replace": (disk.os, "replace", at_table),
    }[where]
    setattr(owner, name, stand)


def pretrain(recipe: str, *flags: str) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag, kind in {"--steps": int, "--run-dir": Path, "--size": str, "--seed": str}.items():
        parser.add_argument(flag, type=kind, required=True)
    parser.add_argument("--checkpoint.at", type=int, nargs="*", default=[], dest="at")
    given, _ = parser.parse_known_args(flags)
    steps, run = given.steps, given.run_dir
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(75))
    run.mkdir(parents=True, exist_ok=True)
    lock = (run / ".lock").open("a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"{run} is being trained by another process", flush=True)
        return 2
    setting = {"value": 0, "from": "default"}
    document = {"schema": 1, "stage": "pretrain", "recipe": {}, "settings": {"steps": setting, "run_dir": setting}}
    write(run / "config.json", json.dumps(document))
    saved = sorted(int(path.parent.name) for path in run.glob("checkpoints/*/manifest.json"))
    start = saved[-1] if saved else 0
    state = (run / f"checkpoints/{start:08d}/state").read_text() if start else f"{given.size} {given.seed}"
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if start else []
    assert len(lines) >= start, f"{len(lines)} lines before a checkpoint of step {start}"
    write(metrics, "".join(lines[:start]))
    print(f"from step {start} of {steps}", flush=True)
    for step in range(start + 1, steps + 1):
        decayed = max(0.0, (step - 1 - (steps - max(steps * DECAY, 1))) / max(steps * DECAY, 1))
        state = hashlib.sha256(f"{state} {decayed!r}".encode()).hexdigest()
        time.sleep(float(os.environ.get("STANDIN_DELAY", "0")))
        name, _, code = os.environ.get("STANDIN_FAILS", "").partition("=")
        fails = step == 3 and name == run.name
        with metrics.open("a") as file:
            loss = os.environ.get("STANDIN_LOSS", state) if fails else state
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")
        if fails:
            return int(code)
        if step in given.at or step == steps or ended:
            save(run / "checkpoints" / f"{step:08d}", step, state)
        if ended and step < steps:
            return ended[0]
    loss = int(state[:6], 16) / 2**24
    with metrics.open("a") as file:
        file.write(json.dumps({"step": steps, "eval_loss": loss, "eval_bits_per_byte": loss / 2}) + "\n")
    return 0


def save(folder: Path, step: int, state: str) -> None:
    """As gptjax.runs.manifest.write_manifest: the manifest comes last, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").write_text(state)
    files = {"state": [len(state), hashlib.sha256(state.encode()).hexdigest()]}
    seal = hashlib.sha256(json.dumps([step, files], sort_keys=True).encode()).hexdigest()
    write(folder / "manifest.json", json.dumps({"step": step, "files": files, "sha256": seal}))


def write(path: Path, text: str) -> None:
    """Whole or not at all, as gptjax writes its files."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.rename(path)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    sys.exit({"sweep": sweep, "pretrain": pretrain}[verb](*rest))
