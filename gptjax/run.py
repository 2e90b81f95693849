"""A run is a folder: its settings and where each came from, the machine, metrics, checkpoints."""

import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from gptjax.config import EXTENDABLE, SCHEMA, TrainConfig, frozen_changes
from gptjax.settings import InputError, build, leaves, make_writable

PACKAGES = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
HEADER = ("schema", "stage", "recipe", "settings")

# Locks this process holds, by the run's folder; kept until it ends, since closing any handle of the file would
# give a POSIX lock up.
_LOCKS: dict[Path, TextIO] = {}


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of a run and the places in it."""

    folder: Path
    changes: tuple[str, ...] = ()
    """What differs from the settings it was last started with, one line each, to be shown to the user."""

    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"

    @property
    def environment_path(self) -> Path:
        return self.folder / "environment.json"

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def profile(self) -> Path:
        return self.folder / "profile"

    @staticmethod
    def open(folder: str | Path, config: TrainConfig, recipe: Mapping[str, str], origins: Mapping[str, str]) -> "Run":
        """Makes a run, or goes on with the one in `folder`, and writes config.json and environment.json.

        `recipe` holds the path and sha256 of the recipe, `origins` the source of each setting by its dotted name
        ("recipe" or "command line"; absent means "default"). Once a checkpoint exists, frozen settings may not
        differ from those in config.json. Raises InputError for those, for a folder that can't be written to, and
        while another process trains this run.
        """
        import jax

        run = Run(Path(folder).absolute())
        if jax.process_index() == 0:
            make_writable(run.folder, "a run")
            _lock(run.folder)
        changes = _changes(run, config)
        if jax.process_index() == 0:
            settings = {n: {"value": v, "from": origins.get(n, "default")} for n, v in leaves(config)}
            document = {"schema": SCHEMA, "stage": "pretrain", "recipe": dict(recipe), "settings": settings}
            write_json(run.config_path, document)
            write_json(run.environment_path, environment())
        return dataclasses.replace(run, changes=changes)

    @staticmethod
    def existing(folder: str | Path) -> "Run":
        """The run in `folder`, to read; raises InputError where there is none."""
        run = Run(Path(folder).absolute())
        if not run.config_path.is_file():
            is_a = "a folder without config.json" if run.folder.is_dir() else "no folder"
            raise InputError(f"{folder}: {is_a}; wanted the folder of a run, as given to --run-dir when it was trained")
        return run


def load_config(run_dir: str | Path) -> TrainConfig:
    """The settings of a run, from its config.json alone; raises InputError where that is not a sound one."""
    settings = read_config(run_dir)["settings"]
    try:
        return build(TrainConfig, {name: setting["value"] for name, setting in settings.items()})
    except InputError as e:
        raise InputError(f"{Run(Path(run_dir)).config_path}: {e}") from e


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """All of a run's config.json: schema, stage, recipe, and settings with where each value came from."""
    path = Run.existing(run_dir).config_path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: can't be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not a text in UTF-8 (byte {e.start}); restore the file, or train again") from e
    except (ValueError, RecursionError) as e:
        line = f":{e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise InputError(f"{path}{line}: not valid JSON ({e}); restore the file, or train again") from e
    if not isinstance(document, dict) or "schema" not in document:
        raise InputError(f"{path}: no schema number; wanted a config.json that gptjax wrote")
    if type(document["schema"]) is not int or not 1 <= document["schema"] <= SCHEMA:
        raise InputError(
            f"{path}: schema {document['schema']!r}; this gptjax reads schema {SCHEMA}, use the version that wrote it"
        )
    if wrong := sorted(document.keys() ^ set(HEADER)):
        raise InputError(f"{path}: {wrong[0]!r} is missing or unknown; wanted exactly {', '.join(HEADER)}")
    settings = document["settings"]
    if not isinstance(settings, dict):
        raise InputError(f"{path}: settings is no table of names; restore the file, or train again")
    for name, setting in settings.items():
        if not isinstance(setting, dict) or setting.keys() != {"value", "from"}:
            raise InputError(f"{path}: setting {name!r} is not of the form {{'value': ..., 'from': ...}}")
    if document["schema"] < SCHEMA:
        # A newer schema only added settings, and the default of each is what was done before.
        document["settings"] = {n: {"value": v, "from": "default"} for n, v in leaves(TrainConfig())} | settings
    return document


def environment() -> dict[str, Any]:
    """What a reader needs to compare or repeat a run: versions, devices, commit, command line, time."""
    import jax

    devices = jax.devices()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "processes": jax.process_count(),
        "commit": _commit(),
    }


def write_json(path: Path, document: Any) -> None:
    """Writes a file whole or not at all: to a temporary one, to the disk, and then by a rename."""
    text = json.dumps(document, indent=1) + "\n"
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: can't be written ({e.strerror}); free the disk, or give another --run-dir") from e


def _changes(run: Run, config: TrainConfig) -> tuple[str, ...]:
    """What differs from the settings in config.json; raises where a checkpoint forbids it."""
    if not any(run.checkpoints.glob("*/manifest.json")):
        return ()  # no step was ever committed, so nothing is lost by starting afresh
    if not run.config_path.exists():
        raise InputError(
            f"{run.folder} holds checkpoints but no config.json, so it can't be told what they are; "
            "restore that file, or give another --run-dir"
        )
    old = load_config(run.folder)
    if frozen := frozen_changes(old, config):
        raise InputError(
            f"{run.folder} was trained with other settings: {'; '.join(frozen)}; "
            "keep the old values, or give another --run-dir"
        )
    before = dict(leaves(old))
    lines = []
    for name, value in leaves(config):
        if value != before[name] and name != "run_dir":
            then = ": the learning-rate schedule changes with it" if name in EXTENDABLE else ""
            lines.append(f"{name} was {before[name]!r}, now {value!r}{then}")
    return tuple(lines)


def _lock(folder: Path) -> None:
    """Holds the run for this process until it ends; a dead process holds nothing, so its run can be taken over."""
    folder = folder.resolve()
    if folder in _LOCKS:
        return
    path = folder / ".lock"
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path}: can't be opened ({e.strerror}); remove it, or give another --run-dir") from e
    try:
        # Unlike flock's, these locks are not passed on to forked workers, which may outlive a killed trainer.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(
            f"{folder} is being trained by {holder}; wait for it, stop it, or give another --run-dir"
        ) from e
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    _LOCKS[folder] = file


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        from gptjax import __version__

        return __version__ if package == "gptjax" else "not installed"


def _commit() -> str:
    """The commit of the checkout that this package lies in, "+changes" where files differ; empty outside of one."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # A package installed below someone else's checkout is not part of it.
        if not git("ls-files", "run.py"):
            return ""
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if commit and git("status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
