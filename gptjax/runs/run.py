"""A run is a folder: its settings and where each came from, the machine, metrics, checkpoints.

In a bucket (gs://, s3://) the folder is made of objects. What is appended to, mapped into memory or read by libraries
as files lies in `local`, a folder of this machine that `pull` makes equal to the bucket and `push` brings there.
"""

import dataclasses
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.config import CHANGEABLE, SCHEMA, STAGES, TrainConfig, frozen_changes
from gptjax.config.section import InputError, build, leaves
from gptjax.runs.manifest import committed_steps, unsealed_steps
from gptjax.runtime.versions import versions
from gptjax.storage import PROBE, filesystem, resolve_path, write_json

HEADER = ("schema", "stage", "recipe", "settings")
LOGS = ("metrics.jsonl", "samples.jsonl", "events.jsonl", "sinks.json", "tensorboard")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The source of a run's settings: a recipe's path and sha256, and the origin of each setting by its name."""

    path: str = ""
    sha256: str = ""
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """"recipe" or "command line"; absent: "default"."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of a run and the places in it."""

    folder: Path
    changes: tuple[str, ...] = ()
    """The settings that differ from the last start's, one line each, to be shown to the user."""

    @property
    def local(self) -> Path:
        """The folder of the run's parts that must be files on this machine: its own folder, or a bucket's mirror."""
        return filesystem(self.folder).local(self.folder)

    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"

    @property
    def environment_path(self) -> Path:
        return self.folder / "environment.json"

    @property
    def metrics_path(self) -> Path:
        return self.local / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def samples_path(self) -> Path:
        return self.local / "samples.jsonl"

    @property
    def events_path(self) -> Path:
        return self.local / "events.jsonl"

    @property
    def scores_path(self) -> Path:
        """Of a reward model: the step at which its scores were normalised, their mean until then, and how they hold."""
        return self.folder / "scores.json"

    @property
    def report_path(self) -> Path:
        return self.folder / "report.html"

    @property
    def tokenizer(self) -> Path:
        return self.local / "tokenizer"

    @property
    def data(self) -> Path:
        return self.local / "data"

    @property
    def exports(self) -> Path:
        return self.local / "exports"

    @property
    def profile(self) -> Path:
        return self.local / "profile"

    @staticmethod
    def open(folder: str | Path, config: TrainConfig, provenance: Provenance = Provenance()) -> "Run":
        """Makes a run, with its config.json and environment.json, or goes on with the one in `folder`.

        Once a checkpoint exists, frozen settings may not differ from those in config.json, which stays as it is until
        the caller has compared the data and calls `write_settings`. Raises InputError for
        those, for a folder that can't be written to, and while another process trains this run.
        """
        import jax

        run = Run.at(folder)
        files = filesystem(run.folder)
        if jax.process_count() > 1 and not files.direct:
            raise InputError(
                f"{run.folder}: {jax.process_count()} processes train this run, but Orbax can't write there and one "
                "process would have to upload all; wanted a gs:// or a shared --run-dir, or one process"
            )
        if jax.process_index() == 0:
            files.make_writable(run.folder, "a run")
            files.lock(run.folder)
            for name in files.names(run.folder):
                if name.startswith(PROBE):  # left by a process that was killed
                    files.remove(run.folder / name)
            if not files.is_file(run.config_path):
                files.clear(run.folder)
        changes = changed_settings(run, config)
        if not committed_steps(run.checkpoints):
            run.write_settings(config, provenance)
        if jax.process_index() == 0:
            files.pull(run.folder, *LOGS)
            run.local.mkdir(parents=True, exist_ok=True)
            files.keep_pushing(run.folder, *LOGS)
        return dataclasses.replace(run, changes=changes)

    def write_settings(self, config: TrainConfig, provenance: Provenance) -> None:
        """Writes config.json and environment.json; of a run that goes on, once its data was found to be that of it."""
        import jax

        if jax.process_index() == 0:
            origins, recipe = provenance.origins, {"path": provenance.path, "sha256": provenance.sha256}
            settings = {n: {"value": v, "from": origins.get(n, "default")} for n, v in leaves(config)}
            document = {"schema": SCHEMA, "stage": config.stage, "recipe": recipe, "settings": settings}
            write_json(self.config_path, document)
            write_json(self.environment_path, environment())

    @staticmethod
    def at(folder: str | Path) -> "Run":
        """The run in `folder`, which need not exist."""
        path = resolve_path(folder)
        return Run(filesystem(path).absolute(path))

    def pull(self, *paths: Path) -> None:
        """Makes these (`data`, `tokenizer`, ...) what they are in the run's bucket; of a local run they are that."""
        filesystem(self.folder).pull(self.folder, *(path.name for path in paths))

    def push(self, *paths: Path) -> None:
        """Brings these (`data`, `tokenizer`, ...) into the run's bucket; a local run has them."""
        filesystem(self.folder).push(self.folder, *(path.name for path in paths))

    def push_logs(self) -> None:
        """Brings the logs into the run's bucket; called before a step is committed, so that none is missing."""
        filesystem(self.folder).push(self.folder, *LOGS)

    def close(self) -> None:
        """After training: the logs and profiles go to a run's bucket, and its lease is given up."""
        import jax

        try:
            if jax.process_index() == 0:
                self.push_logs()
                self.push(self.profile)
        finally:
            filesystem(self.folder).release(self.folder)

    @staticmethod
    def existing(folder: str | Path) -> "Run":
        """The run in `folder`, to read; raises InputError where there is none."""
        run, files = Run.at(folder), filesystem(resolve_path(folder))
        if not files.is_file(run.config_path):
            if files.is_folder(run.checkpoints):
                raise InputError(
                    f"{run.folder} holds checkpoints but no config.json, so their settings are unknown; "
                    "restore that file, or give another --run-dir"
                )
            is_a = "a folder without config.json" if files.is_folder(run.folder) else "no folder"
            raise InputError(f"{folder}: {is_a}; wanted the folder of a run, as given to --run-dir when it was trained")
        return run


def load_config(run_dir: str | Path) -> TrainConfig:
    """The settings of a run, from its config.json alone; raises InputError where that is not a sound one."""
    document = read_config(run_dir)
    try:
        return build(STAGES[document["stage"]], {n: setting["value"] for n, setting in document["settings"].items()})
    except InputError as e:
        raise InputError(f"{Run.at(run_dir).config_path}: {e}") from e


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """All of a run's config.json: schema, stage, recipe, and settings with where each value came from."""
    path = Run.existing(run_dir).config_path
    try:
        document = json.loads(filesystem(path).read(path).decode("utf-8"))
    except OSError as e:
        raise InputError(f"{path}: can't be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not a text in UTF-8 (byte {e.start}); restore the file, or train again") from e
    except (ValueError, RecursionError) as e:
        line = f":{e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise InputError(f"{path}{line}: not valid JSON ({e}); restore the file, or train again") from e
    if not isinstance(document, dict) or "schema" not in document:
        raise InputError(f"{path}: no schema number; wanted a config.json that gptjax wrote")
    if type(document["schema"]) is not int or document["schema"] != SCHEMA:
        raise InputError(
            f"{path}: schema {document['schema']!r}; this gptjax reads schema {SCHEMA}, use the version that wrote it"
        )
    if wrong := sorted(document.keys() ^ set(HEADER)):
        raise InputError(f"{path}: {wrong[0]!r} is missing or unknown; wanted exactly {', '.join(HEADER)}")
    if document["stage"] not in STAGES:
        raise InputError(f"{path}: stage {document['stage']!r}; wanted one of {', '.join(STAGES)}")
    settings = document["settings"]
    if not isinstance(settings, dict):
        raise InputError(f"{path}: settings is no table of names; restore the file, or train again")
    for name, setting in settings.items():
        if not isinstance(setting, dict) or setting.keys() != {"value", "from"}:
            raise InputError(f"{path}: setting {name!r} is not of the form {{'value': ..., 'from': ...}}")
    return document


def environment() -> dict[str, Any]:
    """The surroundings of a run, to compare or repeat it: versions, devices, commit, command line, time."""
    import jax

    from gptjax.runtime.hardware import describe_devices

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "devices": describe_devices(),
        "processes": jax.process_count(),
        "commit": _commit(),
    }


def changed_settings(run: Run, config: TrainConfig) -> tuple[str, ...]:
    """The settings that differ from those in config.json; raises InputError where a checkpoint forbids it."""
    unsealed_steps(run.checkpoints)  # whose manifests were lost could have been trained with other settings
    steps = committed_steps(run.checkpoints)
    if not steps:
        return ()  # nothing is lost by starting afresh
    old = load_config(run.folder)
    if frozen := frozen_changes(old, config):
        raise InputError(
            f"{run.folder} was trained with other settings: {'; '.join(frozen)}; "
            f"keep the old values, or train another run: --run-dir FOLDER, from these weights with --init {run.folder}"
        )
    if 0 < config.steps < steps[-1]:  # 0: not known before the data is read
        raise InputError(
            f"steps={config.steps}: {run.folder} is at step {steps[-1]} already; wanted --steps {steps[-1]} or more, "
            "or another --run-dir"
        )
    before = dict(leaves(old))
    return tuple(
        f"{name} was {before[name]!r}, now {value!r}{': ' * bool(then := CHANGEABLE.get(name, ''))}{then}"
        for name, value in leaves(config)
        if value != before[name] and name != "run_dir"
    )


def _commit() -> str:
    """The commit of the checkout that this package lies in, "+changes" where files differ; empty outside of one."""
    package = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # A package installed below someone else's checkout is not part of it.
        if not git("ls-files", "runs/run.py"):
            return ""
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if commit and git("status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
