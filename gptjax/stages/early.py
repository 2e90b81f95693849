"""Checks of what a run needs, made before jax is imported: a wrong path is told at once."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

from gptjax.config import PolicyConfig, TrainConfig, TuneConfig, check_divisible
from gptjax.config.data import parse_sources
from gptjax.config.export import ExportConfig
from gptjax.config.section import InputError
from gptjax.data.corpus import is_corpus, open_corpus
from gptjax.data.prepared import kept_texts
from gptjax.data.records import HF, TFDS
from gptjax.data.rendered import chat_tokenizer, record_files, tuned_tokenizer
from gptjax.data.sources import is_function, is_saved_source, open_source
from gptjax.evals.during import named_tasks
from gptjax.interop.export_check import check_export
from gptjax.parallel.cluster import given_rank
from gptjax.parallel.processes import no_devices
from gptjax.runs.init_check import check_init
from gptjax.runs.manifest import committed_steps
from gptjax.runs.run import Run, changed_settings, load_config
from gptjax.runtime.process import cpu_devices, expected_platform
from gptjax.storage import filesystem
from gptjax.tokenizer import check_trainable, open_tokenizer
from gptjax.tokenizer.known_templates import template_of


def check_early(config: TrainConfig) -> None:
    """Raises InputError for devices, a run folder, a source, a tokenizer, an --init or a task that can't be used.

    What only jax or a look into the text can tell comes later. In a job of several processes all of it does: process 0
    may see what the others do not, and ends them where it fails.
    """
    if given_rank() is not None:
        return
    check_plugin()
    if expected_platform() == "cpu":  # of others only jax knows the number
        check_divisible(config, config.mesh.covering(cpu_devices()))
    run = Run.at(config.run_dir)
    _check_folder(run)
    begun = bool(committed_steps(run.checkpoints))
    if begun and config.model.dtype == "auto":  # which becomes what the run began with
        config = config.with_dtype(load_config(run.folder).model.dtype)
    sources = config.data.sources
    # What a bucket keeps is known once it is pulled.
    elsewhere = (kept_texts(run.data, sources) if run.local == run.folder else sources) if begun else {}
    changed_settings(run, config)
    named_tasks(config.evaluate.tasks)
    if "://" not in str(run.folder) and (run.folder / ".lock").is_file():
        filesystem(run.folder).lock(run.folder)  # until this process ends; raises InputError where another has it
    scratch = isinstance(config, TuneConfig) and config.from_scratch
    if config.init and not begun and not scratch:
        check_init(config)
    if not begun:
        check_trainable(config.tokenizer)
    if config.checkpoint.export_every:
        check_export(config, ExportConfig())
    if isinstance(config, TuneConfig):
        for source in {} if begun else sources.values():
            record_files(source, config.RECORDS)
        # A policy without a template goes on with plain text.
        tokenizer = (tuned_tokenizer if isinstance(config, PolicyConfig) else chat_tokenizer)(config, run.tokenizer)
        if tokenizer.template:
            template_of(tokenizer)
        return
    if config.tokenizer.path and not begun and not Path(config.tokenizer.path).exists():  # else it keeps its own
        open_tokenizer(Path(config.tokenizer.path), config.tokenizer.kind, config.tokenizer.pattern)
    for name, source in (sources | parse_sources(config.data.validation)).items():
        if name not in elsewhere:
            _check_source(source)


def check_plugin() -> None:
    """Raises InputError where JAX_PLATFORMS asks for a GPU or a TPU, and jax has no plugin for it here."""
    kind = expected_platform()
    if not os.environ.get("JAX_PLATFORMS") or kind == "cpu":
        return
    if kind == "tpu":
        there = importlib.util.find_spec("libtpu") is not None
    else:
        found = importlib.util.find_spec("jax_plugins")
        folders = [Path(folder) for folder in (found and found.submodule_search_locations) or ()]
        there = any(list(folder.glob("xla_*")) for folder in folders)
        there = there or bool(importlib.metadata.entry_points(group="jax_plugins"))
    if not there:
        raise InputError(no_devices(""))


def _check_folder(run: Run) -> None:
    """Raises InputError where the run's folder can't be made; nothing is made."""
    if "://" in str(run.folder):  # of a bucket only a request can tell
        return
    asked = Path(run.folder)
    place = next(p for p in (asked, *asked.parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        reason = "is no folder" if not place.is_dir() else "can't be written"
        raise InputError(f"{asked}: a run can't be written there ({place} {reason}); give another --run-dir")


def _check_source(source: str) -> None:
    if is_corpus(source):
        open_corpus(source)
    elif not source.startswith((TFDS, HF)) and not is_saved_source(source) and not is_function(source):
        open_source(source)
