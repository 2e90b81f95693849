"""The table of jobs: each run, and the run and step that it starts from, decided once from the grid alone.

All horizons of one size and seed share their steps before the decay. The longest new one is the trunk: it saves the
steps at which the decays of the others begin, and these start from there. It also saves the start of its own decay,
from which a longer horizon that is added later continues.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gptjax.config.command_line import Recipe, parse
from gptjax.config.section import InputError, build
from gptjax.scaling.sweep.points import Point
from gptjax.storage import filesystem

FILE = "jobs.jsonl"


@dataclass(frozen=True)
class Job:
    """One run of `steps` steps that starts after step `start` of the run `parent`, or from scratch.

    `saves` are the steps that it keeps for others. `settings` is the digest of Point.settings, `flags` are the flags of
    pretrain besides the run's folder. `tokens` are trained tokens, `flops` their FLOPs by the "causal" count.
    """

    name: str
    size: str
    seed: int
    budget: float
    steps: int
    parent: str
    start: int
    saves: tuple[int, ...]
    parameters: int
    parameters_non_embedding: int
    tokens: int
    flops: float
    batch_tokens: int
    learning_rate: float
    settings: str
    flags: tuple[str, ...]

    @property
    def own_flops(self) -> float:
        """FLOPs of the steps after `start`."""
        return self.flops * (self.steps - self.start) / self.steps


def add_points(jobs: Sequence[Job], points: Iterable[Point], flags: Sequence[str]) -> list[Job]:
    """The table with a job for each point; raises InputError where a size is in it with other settings."""
    table = {job.name: job for job in jobs}
    new: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        known = next((job for job in jobs if job.size == point.size), None)
        if known is not None:
            _check_settings(known, point)
        if point.name not in table:
            new.setdefault((point.size, point.seed), []).append(point)
    for (size, seed), group in sorted(new.items()):
        saved = {s: job.name for job in reversed(jobs) if (job.size, job.seed) == (size, seed) for s in job.saves}
        group.sort(key=lambda p: (-p.steps, p.name))
        for i, point in enumerate(group):
            start = max((s for s in saved if s <= point.decay_start), default=0)
            others = {p.decay_start for p in group[i:]} if i == 0 else {point.decay_start}
            saves = tuple(sorted(s for s in others if s > start))
            job = _job(point, saved.get(start, ""), start, saves, flags)
            saved = {s: job.name for s in saves} | saved
            table[job.name] = job
    return list(table.values())


def check_recipe(jobs: Iterable[Job], points: Sequence[Point], recipe: Recipe) -> None:
    """Raises InputError where the recipe gives other settings than the table has, for sizes that are in no point.

    `add_points` checks the sizes of the points.
    """
    sizes = {point.size for point in points}
    for job in {job.size: job for job in jobs if job.size not in sizes}.values():
        given = parse(recipe.config("pretrain", job.size), list(job.flags[2:]), f"gptjax sweep {recipe.path}")
        # Its flags name the prepared text, but its settings the source of that, which all sizes share.
        text = {name: getattr(points[0].config.data, name) for name in ("source", "mixture")}
        config = replace(given, data=replace(given.data, **text))
        _check_settings(job, Point(job.size, job.seed, job.budget, job.steps, config))


def _check_settings(known: Job, point: Point) -> None:
    if known.settings != point.settings:
        raise InputError(
            f"size {point.size} was begun with other settings (job {known.name}); "
            "keep the recipe and --set as they were, or give another --out"
        )


def _job(point: Point, parent: str, start: int, saves: tuple[int, ...], flags: Sequence[str]) -> Job:
    config, counts, steps = point.config, point.counts, point.steps
    own = ["--size", point.size, *flags, "--seed", str(point.seed), "--steps", str(steps)]
    # Saves are a tenth of the run apart, and no nearer than the recipe's: a short run does not save for nothing.
    own += ["--checkpoint.every", str(max(config.checkpoint.every, -(-steps // 10))), "--checkpoint.keep-newest", "1"]
    own += ["--checkpoint.keep-every", "0", "--evaluate.every", str(steps), "--sinks", "--no-sample"]
    own += ["--checkpoint.at", *map(str, saves)] if saves else []
    return Job(
        name=point.name, size=point.size, seed=point.seed, budget=point.budget, steps=steps, parent=parent, start=start,
        saves=saves, parameters=counts["total"], parameters_non_embedding=counts["non_embedding"], tokens=point.tokens,
        flops=point.flops, batch_tokens=point.batch_tokens, learning_rate=config.optim.learning_rate,
        settings=point.settings, flags=tuple(own),
    )  # fmt: skip


def read_jobs(folder: Path) -> list[Job]:
    """Reads the table of a sweep, empty where there is none yet; raises InputError for a damaged one."""
    path, jobs = folder / FILE, []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: can't be read ({e})") from e
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError("not a JSON object")
            jobs.append(build(Job, values))
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path}:{number}: no line of a job ({e}); restore the file, or give another --out") from e
    names = {job.name for job in jobs}
    for job in jobs:
        if job.start and job.parent not in names:
            raise InputError(
                f"{path}: job {job.name} starts from {job.parent!r}, which is not in the table; "
                "restore the file, or give another --out"
            )
    return jobs


def write_jobs(folder: Path, jobs: Iterable[Job]) -> None:
    """Writes the table, whole or not at all."""
    text = "".join(json.dumps(asdict(job)) + "\n" for job in jobs)
    filesystem(folder).write(folder / FILE, text.encode())
