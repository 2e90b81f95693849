"""`gptjax plan` of a recipe: on a topology, or a comparison of several, with what it is asked to write."""

from collections.abc import Callable

from gptjax.config import STAGES
from gptjax.config.command_line import given_names, load_recipe, parse, take
from gptjax.data.manifest import with_corpus_tokenizer
from gptjax.diagnostics.plan import report
from gptjax.storage import check_file, write_json

FLAGS = "[--size SIZE] [--topology KIND:SIZE] [--json FILE] [--out FILE] [--compiles N] [--prices FILE]"


def plan(name: str, args: list[str], say: Callable[[str], None]) -> list[str]:
    """Reports on a recipe with the settings and the FLAGS in args; returns the next command.

    Raises InputError for a file that can't be written, before anything is planned.
    """
    if name == "RECIPE":
        parse(STAGES["pretrain"](), args, f"gptjax plan RECIPE {FLAGS}")
    recipe, given = load_recipe(name), {}
    for flag in ("topology", "json", "out", "compiles", "size", "prices"):
        given[flag], args = take(args, flag)
    written = recipe.config("pretrain", given["size"])
    recipe_words = [name, *(["--size", given["size"]] if given["size"] else [])]
    parsed = parse(written, args, f"gptjax plan {name} {FLAGS}", recipe.doc)
    cfg = with_corpus_tokenizer(parsed, given_names(args))
    place, out = given["topology"], given["out"]
    for file in filter(None, (out, given["json"])):
        check_file(file)
    if place:
        found, best = report.plan(cfg, place, report.check_compiles(given["compiles"]), given["prices"], say)
        settings = {} if best is None else report.changes(written, best)
        if out:
            report.write_recipe(out, str(recipe.path), given["size"], settings, place, best is not None)
        if "found" in found and best is None:  # nothing fits: the comparison shows where it would
            after = ["plan", *recipe_words]
        else:
            after = ["pretrain", *([out] if out else [*recipe_words, *report.to_flags(settings)])]
    else:
        found = report.compare_topologies(cfg, given["prices"], say)
        after = ["plan", *recipe_words, "--topology", "v5e:4x4"]
    if given["json"]:
        write_json(given["json"], found)
    return after
