"""The verbs that train, one a stage: what needs no jax is checked before that is imported."""

import importlib
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.config import PolicyConfig, TrainConfig
from gptjax.parallel.processes import say, working
from gptjax.runs.run import Provenance
from gptjax.runtime.process import tune_process
from gptjax.stages.early import check_early
from gptjax.stages.summary import print_summary
from gptjax.storage.bucket import is_transient


def stage_function(stage: str) -> Callable[[Any, Provenance], Path]:
    """The function of a stage, which trains by its settings and returns the run's folder."""
    return getattr(importlib.import_module(f"gptjax.stages.{stage}"), stage)


def train(config: TrainConfig, provenance: Provenance, fail: Callable[[Exception], None]) -> tuple[int, Path]:
    """Runs the stage of the settings; returns the exit code of `cli.main` and the run's folder.

    Raises InputError for bad input; `fail` is told what ended the run for good.
    """
    check_early(config)
    print_summary(config, provenance.origins)
    tune_process()
    with working("importing jax"):
        from gptjax.runs.checkpoint import CheckpointError
        from gptjax.training.loop import Diverged
        from gptjax.training.stop import Interrupted

        stage = stage_function(config.stage)

    try:
        return 0, stage(config, provenance)
    except Interrupted:
        again = shlex.join(["gptjax", config.stage, config.run_dir])
        say(f"interrupted, with everything saved; run the same command again to go on, or: {again}")
        return 75, Path(config.run_dir)
    except (CheckpointError, Diverged) as e:
        fail(e)
        return 75 if is_transient(e) else 3, Path(config.run_dir)


def following(config: TrainConfig) -> list[str]:
    """The words of the command to try on a run that was trained: a reward model is measured, others write."""
    if "score_D" in config.heads:
        return ["eval", config.run_dir]
    chats = config.stage != "pretrain" and (config.tokenizer.template or not isinstance(config, PolicyConfig))
    prompt, chat = config.generate.prompt[0].strip(), ["--chat"] if chats else []
    return ["generate", config.run_dir, *([*chat, "--prompt", prompt] if prompt else [])]
