"""Tasks that are evaluated while a model is trained: their files, read once, and their numbers by name."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gptjax.config.section import InputError
from gptjax.evals.tasks import Task, load_task

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from gptjax.model.decoder import Decoder
    from gptjax.tokenizer import Tokenizer


def named_tasks(specs: Sequence[str]) -> dict[str, Task]:
    """The tasks by the names of their numbers, task_NAME, or task_NAME_5shot with examples in front.

    Raises InputError where a file is no good, or two tasks have one name.
    """
    tasks: dict[str, Task] = {}
    for spec in specs:
        task = load_task(spec)
        shots = f"_{task.config.shots}shot" if task.config.shots else ""
        name = "task_" + re.sub(r"[^\w.-]", "_", task.name) + shots
        if name in tasks:
            raise InputError(
                f"evaluate.tasks: {spec}: {name} is another task's name, too; add :name=... to one of them"
            )
        tasks[name] = task
    return tasks


def measure_tasks(
    tasks: Mapping[str, Task],
    decoder: "Decoder",
    params: Any,
    tokenizer: "Tokenizer",
    mesh: "Mesh",
    limit: int,
    chat: bool = False,
) -> dict[str, float]:
    """The first metric of each task on its first `limit` items (0: all) by its name, and NAME_stderr, its error.

    With `chat` a prompt is a message of a user, as with `gptjax eval --chat`.
    """
    if not tasks:
        return {}
    from gptjax.evals.measure import measure
    from gptjax.evals.score import Scorer

    scorer = Scorer(decoder.clone(cfg=decoder.cfg.anywhere(), packed=True), params, mesh)
    numbers: dict[str, float] = {}
    for name, task in tasks.items():
        metric = next(iter(measure(task, scorer, tokenizer, limit=limit, chat=chat).metrics.values()))
        numbers[name] = metric.value
        if math.isfinite(metric.stderr):  # one item alone has none
            numbers[f"{name}_stderr"] = metric.stderr
    return numbers
