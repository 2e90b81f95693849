"""The results of tasks as a table, as JSON, and in one number."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from gptjax.evals.measure import TaskResult
from gptjax.storage import write_file

COLUMNS = ("task", "shots", "items", "metric", "value", "stderr", "chance", "centred")


def centred_mean(results: Sequence[TaskResult]) -> float | None:
    """The mean of the tasks' centred accuracies, of each its first metric; None without any.

    As CORE averages its tasks (Li et al. 2024, DataComp-LM). Texts, which have no chance level, are left out.
    """
    centred = [first.centred for r in results if (first := next(iter(r.metrics.values()))).centred is not None]
    return sum(centred) / len(centred) if centred else None


def table(results: Sequence[TaskResult]) -> Iterator[str]:
    """Yields the lines of a table of all metrics, and of what there is to say about them."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for r in results:
        for n, (name, metric) in enumerate(r.metrics.items()):
            front = ("", "", "") if n else (r.task.name, str(r.task.config.shots), _items(r))
            numbers = (metric.value, metric.stderr, metric.chance, metric.centred)
            rows.append((*front, name, *map(_number, numbers)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        cells = [
            cell.ljust(width) if name in ("task", "metric") else cell.rjust(width)
            for name, cell, width in zip(COLUMNS, row, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()
    for r in results:
        if r.truncated:
            yield f"{r.task.name}: {r.truncated} items are longer than the model's context and lost tokens on the left"
    summary = centred_mean(results)
    if summary is not None:
        count = sum(next(iter(r.metrics.values())).chance is not None for r in results)
        yield f"centred accuracy {summary:.4f}, the mean over {count} task{'s' * (count > 1)}"
    tokens, seconds = sum(r.tokens for r in results), sum(r.seconds for r in results)
    yield f"{tokens:,} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):,.0f} a second)"


def _items(result: TaskResult) -> str:
    used, total = len(result.records), len(result.task.items)
    return f"{used:,}" if used == total else f"{used:,} of {total:,}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def results_json(results: Sequence[TaskResult]) -> dict[str, Any]:
    """All numbers, by task in the order given, and the summary; those that are not finite are null."""

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    tasks = []
    for r in results:
        metrics = {
            name: {
                "value": finite(m.value),
                "stderr": finite(m.stderr),
                "chance": m.chance,
                "centred": finite(m.centred),
            }
            for name, m in r.metrics.items()
        }
        tasks.append({
            "task": r.task.name, "kind": r.task.config.kind, "file": str(r.task.path), "sha256": r.task.sha256,
            "shots": r.task.config.shots, "items": len(r.records), "items_in_file": len(r.task.items),
            "metrics": metrics, "truncated": r.truncated, "tokens": r.tokens, "seconds": round(r.seconds, 3),
        })  # fmt: skip
    return {"tasks": tasks, "centred_accuracy": centred_mean(results)}


def write_records(path: str, results: Sequence[TaskResult]) -> None:
    """Writes a JSON line for every item."""
    lines = (json.dumps(record, ensure_ascii=False) for r in results for record in r.records)
    write_file(path, "".join(line + "\n" for line in lines).encode())
