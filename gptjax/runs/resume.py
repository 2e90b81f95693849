"""The settings that a run begins with, or goes on with: a recipe's, or by its folder alone those in config.json.

Then no recipe is run, and no code that the folder names.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from gptjax.config import STAGES, PolicyConfig, TrainConfig, TuneConfig
from gptjax.config.command_line import given_names, load_recipe, origins, parse, take
from gptjax.config.section import InputError, leaves
from gptjax.runs.init_check import with_init
from gptjax.runs.run import Provenance, Run, load_config, read_config
from gptjax.storage import filesystem, resolve_path


def settings_of(stage: str, name: str, args: list[str]) -> tuple[TrainConfig, Provenance]:
    """The settings of a recipe, or of a run that goes on, changed by the words of a command line, and their sources.

    Raises InputError for a run of another stage.
    """
    given = given_names(args)
    if is_run(name):
        saved = saved_settings(name, args)
        if saved.stage != stage:
            raise InputError(f"{name} is a run of gptjax {saved.stage}, which goes on by: gptjax {saved.stage} {name}")
        if "epochs" in given and "steps" not in given:
            saved = dataclasses.replace(saved, steps=0)  # they are those of the epochs
        config = parse(saved, args, f"gptjax {stage} {name}")
        return config, saved_provenance(name, config)
    from gptjax.data.manifest import with_corpus_tokenizer

    recipe = load_recipe(name)
    size, args = take(args, "size")
    written = recipe.config(stage, size)
    config = parse(written, args, f"gptjax {stage} {name} [--size SIZE]", recipe.doc)
    taken: dict[str, str] = {}
    if isinstance(config, TuneConfig):
        before, config = dict(leaves(config)), with_init(config, given)
        taken = {n: "init" for n, value in leaves(config) if value != before[n] and n != "init"}
    else:
        config = with_corpus_tokenizer(config, given)
    return config, Provenance(str(recipe.path), recipe.sha256, origins(STAGES[stage](), written, config) | taken)


def is_run(name: str) -> bool:
    """True for the folder of a run, or one that holds checkpoints and lost its settings."""
    run = Run.at(name)
    files = filesystem(resolve_path(name))
    return files.is_file(run.config_path) or files.is_folder(run.checkpoints)


def saved_settings(name: str, args: Sequence[str]) -> TrainConfig:
    """The settings of a run that goes on in its folder, to which `args` are the words of the command line.

    Raises InputError where they move the run, or leave out a function that config.json names: what a folder says is
    never imported, so the user names it again.
    """
    given = given_names(list(args))
    if "run_dir" in given:
        raise InputError(
            f"--run-dir: {name} goes on in its own folder; to train another run from its weights give a recipe, "
            f"--run-dir FOLDER and --init {name}"
        )
    Run.existing(name)
    config = dataclasses.replace(load_config(name), run_dir=name)
    for setting, value in _functions(config):
        if setting not in given:
            raise InputError(
                f"{name} was trained with {setting}={value}, code of yours that a run's folder can't name; "
                f"name it again: --{setting} {value}"
            )
    return config


def saved_provenance(name: str, config: TrainConfig) -> Provenance:
    """The recipe of a run as config.json has it, and the source of each setting, of which some may be new."""
    document = read_config(name)
    saved = document["settings"]
    sources = {
        n: saved[n]["from"] if n == "run_dir" or value == _as_saved(saved[n]["value"]) else "command line"
        for n, value in leaves(config)
    }
    return Provenance(document["recipe"]["path"], document["recipe"]["sha256"], sources)


def _as_saved(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _functions(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yields the settings that name functions of the user, with their values as a command line has them."""
    from gptjax.data.sources import is_function  # numpy, which --help does not need

    for setting, value in (("loss", config.loss), ("model.block", config.model.block)):
        if value:
            yield setting, value
    data, rewards = config.data, config.rewards.sources if isinstance(config, PolicyConfig) else ()
    for setting, entries in (("data.source", (data.source,)), ("data.mixture", data.mixture),
                             ("data.validation", data.validation), ("sinks", config.sinks),
                             ("rewards.sources", rewards)):  # fmt: skip
        if any(is_function(entry.partition("=")[2] or entry) for entry in entries):
            yield setting, " ".join(entries)
