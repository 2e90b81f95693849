"""What a sweep found: one line a finished run, from the runs' own files alone, the same whatever order they ran in."""

import csv
import io
from pathlib import Path

from gptjax.runs.run import Run
from gptjax.scaling.sweep.fork import checkpoints_of
from gptjax.scaling.sweep.jobs import Job, read_jobs
from gptjax.scaling.sweep.points import budget_text
from gptjax.storage import filesystem
from gptjax.training.metrics import MetricsFile

FILE = "table.csv"
COLUMNS = ("name", "size", "seed", "budget", "parameters", "parameters_non_embedding", "tokens", "flops", "loss",
           "bits_per_byte", "steps", "batch_tokens", "learning_rate", "run_dir")  # fmt: skip


def run_dir(job: Job) -> str:
    """Where the job's run lies within the sweep's folder."""
    return f"runs/{job.name}"


class Results:
    """The evaluations of finished jobs; what is finished stays so and is read once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._found: dict[str, tuple[float, float]] = {}

    def of(self, job: Job) -> tuple[float, float] | None:
        """(loss in nats a token, bits per byte) at the job's last step; None before that is saved and evaluated."""
        if job.name not in self._found:
            run = self._folder / run_dir(job)
            if checkpoints_of(run).newest() != job.steps:
                return None
            line = MetricsFile(Run.at(run).metrics_path).evaluation(job.steps)
            if line is None:
                return None
            self._found[job.name] = line["eval_loss"], line["eval_bits_per_byte"]
        return self._found[job.name]


def write_table(folder: Path, results: Results) -> None:
    """Writes table.csv, sorted, whole or not at all. The caller must hold the sweep's lock."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for job in sorted(read_jobs(folder), key=lambda job: (job.budget, job.parameters, job.size, job.seed)):
        if (found := results.of(job)) is not None:
            values = vars(job) | {"budget": budget_text(job.budget), "run_dir": run_dir(job)}
            values |= {"loss": found[0], "bits_per_byte": found[1]}
            rows.writerow([values[name] for name in COLUMNS])
    filesystem(folder).write(folder / FILE, text.getvalue().encode())
