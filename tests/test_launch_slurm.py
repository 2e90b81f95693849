"""launch/slurm.sbatch and sweep.sbatch under a real Slurm: pytest -m slurm -n 0 tests/test_launch_slurm.py

tests/slurm.sh fetches Debian's packages, starts Slurm on this machine in a folder of the test, and ends it.
"""

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from test_sweep import RECIPE, points

ROOT = Path(__file__).parent.parent
STEPS = 800
SETTINGS = f"""
--steps {STEPS} --model.num-layers 1 --model.width 32 --model.num-heads 2 --model.dtype float32 --model.unroll 1
--tokenizer.kind bytes --tokenizer.vocab-size 258 --data.length 32 --data.batch-size 4 --data.source words.txt
--optim.warmup-steps 10 --evaluate.every {STEPS} --evaluate.max-rows 8 --checkpoint.every 20 --sinks
--generate.max-new-tokens 4 --log-every 100
""".replace("\n", " ")


class Slurm:
    """The commands of the Slurm in a folder, and its one job (or array of jobs), which trains in `work`."""

    def __init__(self, folder: Path, work: Path):
        self.folder, self.work, self.job = folder, work, ""

    def __call__(self, command: str, **env: str) -> str:
        script = f'. "{self.folder}/env" && {command}'
        environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | env
        done = subprocess.run(["bash", "-c", script], cwd=self.work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def state(self, task: str = "") -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", self(f"scontrol show job {self.job}{task}")))

    def log(self) -> str:
        return "".join(path.read_text() for path in self.work.glob("*.log"))

    def step(self) -> int:
        """The last step that was logged."""
        metrics = self.work / "run" / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def wait(self, what: str, condition, seconds: float = 120.0) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"{what}: not within {seconds} s\n{self.state()}\n{self.log()}"
            time.sleep(0.1)

    def trains(self, times: int) -> None:
        """Waits until the job was started or resumed so many times and has made 20 steps since."""
        self.wait(f"start {times}", lambda: self.log().count("2 processes, found by Slurm") == times)
        if times > 1:
            self.wait(f"resume {times - 1}", lambda: self.log().count("resumed ") == times - 1)
        last = re.findall(r"resumed .* after step (\d+)", self.log())[-1:]
        reached = int(last[0]) if last else 0
        self.wait("20 steps", lambda: self.step() >= reached + 20)


@pytest.fixture
def slurm(tmp_path):
    rng = random.Random(0)
    (tmp_path / "words.txt").write_text(" ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(3000)))
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # the path of a socket has to be short
    try:
        started = subprocess.run([ROOT / "tests" / "slurm.sh", "up", folder], capture_output=True, text=True)
        if started.returncode == 77:
            pytest.skip(started.stdout.splitlines()[-1])
        assert started.returncode == 0, started.stdout + started.stderr
        yield Slurm(folder, tmp_path)
    finally:
        subprocess.run([ROOT / "tests" / "slurm.sh", "down", folder], check=True)
        shutil.rmtree(folder)
        assert not left(folder), "processes of Slurm outlived the test"


def left(folder: Path) -> list[str]:
    """The processes that the Slurm in the folder, or a job of it, has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURM_CONF={folder}/".encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.slurm
def test_a_job_of_two_tasks_is_interrupted_killed_and_cancelled_and_loses_no_step(slurm):
    slurm.job = slurm(
        f"sbatch --parsable --ntasks 2 --time 15 {ROOT}/launch/slurm.sbatch shakespeare_char {SETTINGS}",
        RUN_DIR=str(slurm.work / "run"), LAUNCH=str(ROOT / "launch"), XDG_CACHE_HOME=str(slurm.work / "cache"),
        PYTHON=sys.executable, GPTJAX=f"{sys.executable} -m gptjax", GPTJAX_HEARTBEAT_SECONDS="10",
    )  # fmt: skip
    slurm.trains(1)

    # What --signal=TERM@180 does before the time limit: saved, and the job puts itself into the queue again.
    slurm(f"scancel --signal=TERM {slurm.job}")
    slurm.wait("requeue by itself", lambda: slurm.state()["Restarts"] == "1")
    assert "slurm.sbatch: ended with 75" in slurm.log() and "interrupted; run the same command" in slurm.log()
    slurm.trains(2)

    # A task is killed: the other one ends, and the supervisor starts both again in the same allocation.
    tasks = re.findall(rf"^(\d+) +{slurm.job} +\d+ +1 +1", slurm(f"scontrol listpids {slurm.job}"), re.MULTILINE)
    assert len(tasks) == 1, slurm(f"scontrol listpids {slurm.job}")
    os.kill(int(tasks[0]), signal.SIGKILL)
    slurm.wait("the supervisor", lambda: re.search(r"supervise: ended with 13[47]", slurm.log()))
    slurm.trains(3)
    assert slurm.state()["Restarts"] == "1"

    # Cancelled by its owner: saved, and it stays so until it is requeued.
    slurm(f"scancel {slurm.job}")
    slurm.wait("the batch script's end", lambda: slurm.log().count("slurm.sbatch: ended with 75") == 2)
    reached = slurm.step()
    assert (slurm.work / "run" / "checkpoints" / f"{reached:08d}" / "manifest.json").is_file()
    time.sleep(3)
    assert slurm.state()["JobState"] == "CANCELLED" and reached < STEPS
    slurm(f"scontrol requeue {slurm.job}")
    slurm.wait("the end", lambda: slurm.state()["JobState"] == "COMPLETED", seconds=300)

    assert slurm.state()["ExitCode"] == "0:0" and slurm.state()["Restarts"] == "2"
    assert f"after step {reached}" in slurm.log()
    lines = map(json.loads, (slurm.work / "run" / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    print(slurm.log())


@pytest.mark.slurm
def test_the_tasks_of_an_array_share_a_sweep_and_one_that_is_interrupted_comes_back(slurm):
    (slurm.work / "tiny.py").write_text(RECIPE)
    times = slurm.work / "sweep" / "times.jsonl"
    grid = points(s16="100 200 4000", s32="100 200 4000")
    slurm.job = slurm(
        f"sbatch --parsable --array 1-2 --cpus-per-task 1 --time 15 {ROOT}/launch/sweep.sbatch tiny.py "
        f"--grid {' '.join(grid)}",
        OUT=str(slurm.work / "sweep"), GPTJAX=f"{sys.executable} -m gptjax",
    )  # fmt: skip

    def events() -> list[dict]:
        return [json.loads(line) for line in times.read_text().splitlines()] if times.exists() else []

    def steps() -> list[int]:
        return [len(path.read_text().splitlines()) for path in slurm.work.glob("sweep/runs/*/metrics.jsonl")]

    slurm.wait("both trunks", lambda: sum(n > 300 for n in steps()) == 2)
    assert len({event["process"] for event in events()}) == 2, "each task has taken one"

    # What --signal=TERM@180 does before the time limit of one task.
    slurm(f"scancel --signal=TERM {slurm.job}_1")
    slurm.wait("requeue by itself", lambda: slurm.state("_1")["Restarts"] == "1")
    assert slurm.log().count("sweep.sbatch: ended with 75") == 1
    for task in ("_1", "_2"):
        slurm.wait("the end", lambda task=task: slurm.state(task)["JobState"] == "COMPLETED", seconds=400)

    with (slurm.work / "sweep" / "table.csv").open(newline="") as table:
        assert len(list(csv.DictReader(table))) == len(grid)
    running = set()
    for event in sorted(events(), key=lambda event: event["time"]):
        if event["event"] == "start":
            assert event["job"] not in running, f"{event['job']} ran twice at once"
            running.add(event["job"])
        else:
            running.remove(event["job"])
    ends = [event["code"] for event in events() if event["event"] == "end"]
    assert sorted(ends) == [0] * len(grid) + [75], "nothing is done again but what was interrupted"
    print(slurm.log())
