"""`gptjax plan` of a recipe: on a topology, or a comparison of several, with what it is asked to write."""

from collections.abc import Callable, Mapping

from gptjax.config import TrainConfig
from gptjax.diagnostics.plan import report
from gptjax.storage import check_file, write_json


def plan(
    written: TrainConfig,
    cfg: TrainConfig,
    recipe_words: list[str],
    path: str,
    given: Mapping[str, str],
    say: Callable[[str], None],
) -> list[str]:
    """Reports on the settings `cfg` of the recipe at `path`, which are `written` there; returns the next command.

    `given` holds the flags topology, json, out, compiles, size and prices, "" for those that are not. Raises InputError
    for a file that can't be written, before anything is planned.
    """
    place, out = given["topology"], given["out"]
    for file in filter(None, (out, given["json"])):
        check_file(file)
    if place:
        found, best = report.plan(cfg, place, report.check_compiles(given["compiles"]), given["prices"], say)
        settings = {} if best is None else report.changes(written, best)
        if out:
            report.write_recipe(out, path, given["size"], settings, place, best is not None)
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
