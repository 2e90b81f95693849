"""Forks of runs: a new run from another's checkpoint of a step, with its metrics up to there."""

import os
import shutil
from pathlib import Path

from gptjax.config import CheckpointConfig
from gptjax.config.section import InputError
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run, read_config
from gptjax.storage import write_json
from gptjax.training.metrics_file import MetricsFile

PARTIAL = ".fork-"


def checkpoints_of(folder: Path) -> Checkpoints:
    """Opens the checkpoints of a run, read-only."""
    return Checkpoints(Run.at(folder).checkpoints, CheckpointConfig(), readonly=True)


def fork(parent: Path, step: int, folder: Path, steps: int) -> list[str]:
    """Makes the run `folder`, of `steps` steps, from the checkpoint of `step` of the run `parent`.

    The parent may be training. The folder appears whole, by a rename; the rest of a killed attempt is removed. Only one
    process may make it. Returns the problems of that checkpoint, one line each, in which case it makes nothing.
    """
    source, partial = checkpoints_of(parent), folder.with_name(f"{PARTIAL}{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    copy = checkpoints_of(partial)
    try:
        shutil.copytree(source.path(step), copy.path(step))
        if problems := copy.verify(step):
            return problems
        metrics = Run.at(partial).metrics_path
        shutil.copyfile(Run.at(parent).metrics_path, metrics)
        MetricsFile(metrics).truncate_after(step)
        document = read_config(parent)
        document["settings"]["steps"]["value"] = steps
        document["settings"]["run_dir"]["value"] = str(folder)
        write_json(Run.at(partial).config_path, document)
        os.replace(partial, folder)
    except FileNotFoundError as e:
        return [f"{e.filename} is missing"]
    except OSError as e:
        raise InputError(f"{folder}: can't be made from {parent} ({e}); free the disk, or give another --out") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # where it was not renamed to the run
    return []
