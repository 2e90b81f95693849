"""The table of a sweep: one line for each run that ended, from the runs' own files, independent of their order.

A run that diverged has a loss of inf.
"""

import csv
import io
import math
from pathlib import Path

from gptjax.runs.run import Run
from gptjax.scaling.sweep.fork import checkpoints_of
from gptjax.scaling.sweep.jobs import Job, read_jobs
from gptjax.scaling.sweep.points import budget_text
from gptjax.storage import filesystem
from gptjax.training.metrics_file import MetricsFile

FILE = "table.csv"
COLUMNS = ("name", "size", "seed", "budget", "parameters", "parameters_non_embedding", "tokens", "flops", "loss",
           "bits_per_byte", "steps", "batch_tokens", "learning_rate", "run_dir")  # fmt: skip


def run_dir(job: Job) -> str:
    """The path of the job's run within the sweep's folder."""
    return f"runs/{job.name}"


class Results:
    """The ends of jobs, evaluated or diverged, each read once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._evaluations: dict[str, tuple[float, float]] = {}
        self._diverged: dict[str, int] = {}

    def of(self, job: Job) -> tuple[float, float] | None:
        """(loss in nats a token, bits per byte) at the job's last step; None before that is saved and evaluated."""
        if job.name not in self._evaluations:
            run = self._folder / run_dir(job)
            if checkpoints_of(run).newest() != job.steps:
                return None
            line = self._metrics(job).evaluation(job.steps)
            if line is None:
                return None
            self._evaluations[job.name] = line["eval_loss"], line["eval_bits_per_byte"]
        return self._evaluations[job.name]

    def diverged(self, job: Job) -> int:
        """The step at which the job's loss or gradient stopped being finite; 0 where it did not."""
        if job.name not in self._diverged:
            last = [line for line in self._metrics(job).read() if "loss" in line][-1:]
            numbers = [line.get(name) for line in last for name in ("loss", "grad_norm")]
            if not any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                return 0
            self._diverged[job.name] = last[0]["step"]
        return self._diverged[job.name]

    def _metrics(self, job: Job) -> MetricsFile:
        return MetricsFile(Run.at(self._folder / run_dir(job)).metrics_path)


def write_table(folder: Path, results: Results) -> None:
    """Writes table.csv, sorted, whole or not at all. The caller must hold the sweep's lock."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for job in sorted(read_jobs(folder), key=lambda job: (job.budget, job.parameters, job.size, job.seed)):
        if evaluation := results.of(job) or (results.diverged(job) and (math.inf, math.inf)):
            values = vars(job) | {"budget": budget_text(job.budget), "run_dir": run_dir(job)}
            values |= {"loss": evaluation[0], "bits_per_byte": evaluation[1]}
            rows.writerow([values[name] for name in COLUMNS])
    filesystem(folder).write(folder / FILE, text.getvalue().encode())
