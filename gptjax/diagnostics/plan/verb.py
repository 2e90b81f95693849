"""`gptjax plan` of a recipe: on a topology, or a comparison of several, with what it is asked to write."""

import dataclasses
from collections.abc import Callable

from gptjax.config import STAGES, TrainConfig, TuneConfig
from gptjax.config.command_line import given_names, load_recipe, parse, take
from gptjax.config.section import InputError
from gptjax.config.tuning import SCRATCH
from gptjax.data.manifest import with_corpus_tokenizer
from gptjax.diagnostics.plan import report
from gptjax.storage import check_file, write_json

FLAGS = "[--size SIZE] [--topology KIND:SIZE] [--json FILE] [--out FILE] [--compiles N] [--prices FILE] [--images N]"


def plan(name: str, args: list[str], say: Callable[[str], None]) -> list[str]:
    """Reports on a recipe with the settings and the FLAGS in args; returns the next command.

    Raises InputError for a file that can't be written, before anything is planned.
    """
    if name == "RECIPE":
        parse(STAGES["pretrain"](), args, f"gptjax plan RECIPE {FLAGS}")
    recipe, given = load_recipe(name), {}
    for flag in ("topology", "json", "out", "compiles", "size", "prices", "images"):
        given[flag], args = take(args, flag)
    # A recipe without pretraining is one of fine-tuning, whose settings alone say what its model is: from scratch.
    stage = "pretrain" if hasattr(recipe.module, "pretrain") or not hasattr(recipe.module, "sft") else "sft"
    written = recipe.config(stage, given["size"])
    recipe_words = [name, *(["--size", given["size"]] if given["size"] else [])]
    parsed = parse(written, args, f"gptjax plan {name} {FLAGS}", recipe.doc)
    cfg = _as_pretraining(with_corpus_tokenizer(parsed, given_names(args)))
    images = _images(cfg, given["images"])
    place, out = given["topology"], given["out"]
    for file in filter(None, (out, given["json"])):
        check_file(file)
    if place:
        found, best = report.plan(cfg, place, report.check_compiles(given["compiles"]), given["prices"], say, images)
        settings = {} if best is None else report.changes(written, best)
        if out:
            report.write_recipe(out, str(recipe.path), given["size"], settings, place, best is not None, stage)
        if "found" in found and best is None:  # nothing fits: the comparison shows where it would
            after = ["plan", *recipe_words]
        else:
            after = [stage, *([out] if out else [*recipe_words, *report.to_flags(settings)])]
    else:
        found = report.compare_topologies(cfg, given["prices"], say, images)
        after = ["plan", *recipe_words, "--topology", "v5e:4x4"]
    if given["json"]:
        write_json(given["json"], found)
    return after


def _as_pretraining(config: TrainConfig) -> TrainConfig:
    """The settings of a stage that count for memory and speed; raises InputError where its model is another run's."""
    if isinstance(config, TuneConfig):
        config.require(config.from_scratch, "init", f"{SCRATCH}: gptjax plan counts a model that the settings describe")
        config = TrainConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)})
    return config


def _images(config: TrainConfig, given: str) -> int:
    """Images of a row: those that --images says, else as many as a row has places for."""
    vision = config.model.vision
    most = config.data.length // vision.tokens_around if vision.patch else 0
    if not given:
        return most
    if not given.isdecimal() or int(given) > most:
        raise InputError(f"--images {given}: wanted 0 to {most}, as many as fit into data.length={config.data.length}")
    return int(given)
