"""Several processes are one job: the same batches, the same losses, one end for all, and no hang where one is wrong."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
from commands import GPTJAX, environment, free_port
from corpora import BYTES, write_jsonl

from gptjax import cli
from gptjax.config import CheckpointConfig, DataConfig, TrainConfig
from gptjax.config.section import InputError
from gptjax.data.batches import RowSampler, validation_batches
from gptjax.data.packing import MemorySplit
from gptjax.data.pipeline import open_pipeline
from gptjax.parallel import processes as distributed
from gptjax.parallel.cluster import Cluster, RetryableError, find_cluster
from gptjax.parallel.preflight import RendezvousServer, preflight
from gptjax.runs.checkpoint import Checkpoints
from gptjax.stages.runner import barrier_at_exit
from gptjax.training.loop import Diverged
from gptjax.training.metrics_file import MetricsFile
from gptjax.training.stop import Interrupted

SETTINGS = """
--model.num-layers 1 --model.width 32 --model.num-heads 2 --model.dtype float32 --model.dropout 0
--tokenizer.kind bytes --tokenizer.vocab-size 258 --data.length 32 --data.batch-size 8
--optim.warmup-steps 4 --optim.schedule constant --evaluate.max-rows 13 --sinks --generate.max-new-tokens 4
"""


# Who is who.

SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[03-05]", "SLURM_NTASKS": "6", "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "3",
}  # fmt: skip
JOBSET = {
    "JOBSET_NAME": "gpt", "REPLICATED_JOB_NAME": "workers", "PROCESSES_IN_JOB": "4", "JOB_COMPLETION_INDEX": "1",
    "JOB_INDEX": "2", "REPLICATED_JOB_REPLICAS": "3",
}  # fmt: skip
GIVEN = {"GPTJAX_COORDINATOR": "[::1]:80", "GPTJAX_PROCESSES": "2", "GPTJAX_PROCESS": "0"}


@pytest.mark.parametrize(
    "environment, wanted",
    [
        ({}, None),
        ({"GPTJAX_PROCESSES": "1"} | SLURM, None),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (SLURM, Cluster("Slurm", "node03:61441", 6, 4, (0,), 3)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, Cluster("Slurm", "node03:61441", 6, 4, None, 3)),
        (SLURM | {"SLURM_NTASKS": "3", "SLURM_PROCID": "2"}, Cluster("Slurm", "node03:61441", 3, 2, None, 3)),
        (JOBSET, Cluster("JobSet", "gpt-workers-0-0.gpt:8476", 12, 9)),
        (JOBSET | {"GPTJAX_COORDINATOR": "a:5"}, Cluster("GPTJAX_COORDINATOR", "a:5", 12, 9)),
        (GIVEN, Cluster("GPTJAX_COORDINATOR", "[::1]:80", 2, 0)),
    ],
)
def test_a_scheduler_s_variables_tell_which_process_this_is(monkeypatch, environment, wanted):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)  # jax's detection reads os.environ itself
    assert find_cluster() == wanted


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"GPTJAX_COORDINATOR": "a:5"}, "no scheduler was found"),
        (GIVEN | {"GPTJAX_COORDINATOR": "a"}, "wanted host:port"),
        (GIVEN | {"GPTJAX_PROCESS": "2"}, "from 0 to 1"),
        (GIVEN | {"GPTJAX_PROCESSES": "two"}, "GPTJAX_PROCESSES='two'"),
        (GIVEN | {"GPTJAX_COORDINATOR": ""}, "address of process 0 is unknown"),
        ({k: v for k, v in JOBSET.items() if k != "PROCESSES_IN_JOB"}, "PROCESSES_IN_JOB"),
    ],
)
def test_incomplete_variables_are_refused_in_one_line(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message) as error:
        find_cluster()
    assert "\n" not in str(error.value)


NOTES = [({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, "not started by srun"), ({"PMI_SIZE": "2"}, "MPI"), ({}, "")]


@pytest.mark.parametrize("environment, note", NOTES)
def test_a_process_that_a_launcher_left_alone_says_so(capsys, environment, note):
    assert find_cluster(environment) is None
    said = capsys.readouterr().err
    assert note in said and said.endswith("it trains alone\n") == bool(note)


# What is wrong is named by all, in time.


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("gptjax.parallel.preflight.LATE_SECONDS", 0.5)
    monkeypatch.setattr("gptjax.parallel.preflight.PROBE_SECONDS", 1.0)


OPEN = dict(versions={"jax": "1"}, settings={"seed": 0}, folder=None, seconds=20.0)


def met(cards: list[dict], processes: int | None = None) -> list[str]:
    """What preflight says in each of some processes, which are threads here; "" where it lets them through."""
    port, said = free_port(), [""] * len(cards)

    def one(i: int, process: int = -1, count: int = 0, host: str = "127.0.0.1", **changed) -> None:
        cluster = Cluster("test", f"{host}:{port}", count or processes or len(cards), i if process < 0 else process)
        try:
            preflight(cluster, **{**OPEN, **changed})
        except (InputError, RetryableError) as e:
            said[i] = f"{type(e).__name__}: {e}"

    threads = [threading.Thread(target=one, args=(i,), kwargs=card) for i, card in enumerate(cards)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "it hangs"
    return said


def test_processes_that_agree_are_let_through(tmp_path):
    assert met([{"folder": tmp_path / "run"}] * 3) == ["", "", ""]
    assert list((tmp_path / "run").iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(
    "cards, processes, message",
    [
        ([{}, {"settings": {"seed": 1}}], None, "InputError: process 1 on .* has seed 1, process 0 on .* has 0"),
        ([{}, {"versions": {"jax": "2"}}], None, "InputError: process 1 on .* has jax '2', process 0 .* '1'"),
        ([{}, {"count": 3}], None, "InputError: process 1 on .* is set to 3 processes, process 0 to 2"),
        ([{}, {}, {"process": 1}], 4, "InputError: process 1 on .* and process 1 on .* have the same number"),
        ([{"folder": Path("a")}, {"folder": Path("b")}], None, "InputError: process 1 on .* not see the run folder"),
        ([{"seconds": 1.0}, {}], 5, r"RetryableError: 2 of 5 .* connected to .* within 1 s; missing: 2, 3, 4 \(th"),
    ],
)
def test_what_is_wrong_is_named_in_every_process(tmp_path, monkeypatch, cards, processes, message):
    monkeypatch.chdir(tmp_path)
    for said in met(cards, processes):
        assert re.match(message, said), said
        assert "\n" not in said


def test_a_hello_beside_a_problem_gets_the_result_too(monkeypatch):
    one_by_one, first = RendezvousServer._messages, []

    def at_once(server):
        found = one_by_one(server)
        if first:
            return found
        while len(found) < 3:
            found += one_by_one(server)
        first.append(found)
        return sorted(found, key=lambda one: -one[1]["process"])  # process 0 behind the two that clash

    monkeypatch.setattr(RendezvousServer, "_messages", at_once)
    for said in met([{"seconds": 3.0}, {}, {"process": 1}], 4):
        assert "have the same number" in said


def test_a_coordinator_that_can_t_be_reached_is_named():
    def alone(address: str, kind: str = "GPTJAX_COORDINATOR", process: int = 1, hosts: int = 0) -> str:
        try:
            preflight(Cluster(kind, address, 2, process, None, hosts), **{**OPEN, "seconds": 0.5})
        except (InputError, RetryableError) as e:
            return f"{type(e).__name__}: {e}"
        return ""

    port = free_port()
    assert alone(f"127.0.0.1:{port}").startswith("RetryableError: the coordinator 127.0.0.1")
    assert "nothing listens there" in alone(f"127.0.0.1:{port}")
    assert "loopback address" in alone(f"127.0.0.1:{port}")
    assert alone("no-such-host.invalid:1").startswith("InputError") and "resolve" in alone("no-such-host.invalid:1")
    assert alone("no-such-host.invalid:1", "JobSet").startswith("RetryableError"), "the pod may not be there yet"
    assert "each of the 2 hosts takes for itself" in alone(f"localhost:{port}", hosts=2)
    with socket.create_server(("", port)) as server:
        assert "can't listen on port" in alone(f"127.0.0.1:{port}", process=0)
        server.settimeout(5)
        closing = threading.Thread(target=answer_nonsense, args=(server,), daemon=True)
        closing.start()
        assert "what answers there is no process 0" in alone(f"127.0.0.1:{port}")


def answer_nonsense(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            with server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_strangers_at_the_port_do_not_disturb():
    port = free_port()
    threads = [
        threading.Thread(target=preflight, args=(Cluster("test", f"127.0.0.1:{port}", 2, i),), kwargs=OPEN)
        for i in range(2)
    ]
    threads[0].start()
    for _ in range(50):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\n")
            break
        time.sleep(0.05)
    threads[1].start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


# Rows.


def split() -> MemorySplit:
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, 1000), 40, replace=False))
    return MemorySplit.of(np.split(rng.integers(1, 250, 1000), cuts))


@pytest.mark.parametrize("packing, crossing", [("packed", False), ("packed", True), ("padded", False)])
def test_shards_of_a_batch_are_the_batch_and_their_targets_are_counted(packing, crossing):
    cfg = DataConfig(batch_size=8, length=16, packing=packing, cross_documents=crossing)
    rows = RowSampler(split(), cfg, seed=3)
    parts = [np.array([0, 1, 5]), np.array([2, 3, 4, 6, 7])]
    for step in (0, 5, 60):
        whole = rows.batch(step * 8)
        for name, x in whole.items():
            for part in parts:
                np.testing.assert_array_equal(rows.batch(step * 8, part)[name], x[part])
        assert rows.num_targets(step * 8 + np.arange(8)) == np.count_nonzero(whole["weights_BL"])
    for whole, *some in zip(*(validation_batches(split(), cfg, 21, p) for p in (slice(None), *parts)), strict=True):
        for part, given in zip(parts, some):
            np.testing.assert_array_equal(given["targets_BL"], whole["targets_BL"][part])


@pytest.mark.parametrize("kind", ["prepared", "padded", "mixture", "stream", "holes"])
def test_the_batches_of_several_processes_are_parts_of_those_of_one(tmp_path, words, kind):
    for name, letter in (("a", "z"), ("b", "y")):
        write_jsonl(tmp_path / f"{name}.jsonl", [x for x in words.read_text().replace("a", letter).split("e") if x])
    mixture = tuple(f"{name}={tmp_path / name}.jsonl" for name in "ab")
    more = {
        "prepared": {}, "padded": {"packing": "padded"}, "stream": {"loading": "stream"}, "holes": {"max_corrupt": 3},
        "mixture": {"source": "mixture", "mixture": mixture},
    }[kind]  # fmt: skip
    data = DataConfig(**{"source": str(tmp_path / "a.jsonl"), "length": 32, "batch_size": 8} | more)
    feed = open_pipeline(TrainConfig(data=data, tokenizer=BYTES), tmp_path / "data", training=True)
    parts = [slice(None), np.array([0, 1, 5]), np.array([2, 3, 4, 6, 7])]
    made = [itertools.islice(feed.batches(feed.start, part), 12) for part in parts]
    for (whole, state), *some in zip(*made, strict=True):
        for part, (given, its_state) in zip(parts[1:], some, strict=True):
            assert its_state == state
            for name, x in whole.items():
                np.testing.assert_array_equal(given[name], x[part])


# The end.


@pytest.mark.parametrize("error", [None, Interrupted, Diverged, OSError])
def test_processes_wait_at_the_end_only_where_all_reach_it(tmp_path, monkeypatch, error):
    checkpoints, done = Checkpoints(tmp_path, CheckpointConfig()), []
    monkeypatch.setattr("gptjax.runs.checkpoint.barrier", done.append)
    monkeypatch.setattr("gptjax.stages.runner.barrier", done.append)
    checkpoints._thread = threading.Thread(target=lambda: done.append("saved"))
    checkpoints._thread.start()
    with pytest.raises(error) if error else contextlib.nullcontext(), contextlib.ExitStack() as cleanup:
        cleanup.callback(done.append, "run closed")
        cleanup.callback(checkpoints.wait, all_processes=False)
        with barrier_at_exit(checkpoints, cleanup):
            if error:
                raise error
    alone, all_come = ["saved", "run closed"], ["saved", "checkpoint committed", "run closed", "closed"]
    assert done == (alone if error is OSError else all_come)


class Store(dict):
    """jax's key-value store: a key is set once."""

    key_value_try_get = dict.__getitem__

    def key_value_set(self, key, value):
        if key in self:
            raise RuntimeError("ALREADY_EXISTS")
        self[key] = value


def test_all_exit_with_the_code_of_the_first():
    store = Store()
    assert [distributed.first_exit_code(store, code) for code in (75, 3)] == [75, 75]


def test_a_reader_that_goes_away_ends_all_processes(monkeypatch):
    def write(args):
        raise BrokenPipeError

    left = []
    monkeypatch.setitem(cli.VERBS, "generate", write)
    monkeypatch.setattr(cli, "exit_all", left.append)
    monkeypatch.setattr(os, "dup2", lambda *fds: None)
    assert cli.main(["generate"]) == 0 and left == [0]


def test_processes_that_were_joined_by_someone_else_are_refused(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    distributed.join_processes({})
    monkeypatch.setattr(distributed._jax_state(), "num_processes", 2)
    with pytest.raises(InputError, match=r"initialize\(\) was called before, for 2 processes; leave it out"):
        distributed.join_processes({})


UNKNOWN = RuntimeError("'rocm' is not in the list of known backends")
CUDA, TPU = (f"install its plugin (pip install 'gptjax[{name}]') and its driver, or set" for name in ("cuda12", "tpu"))


@pytest.mark.parametrize(
    ("platform", "error", "wanted"),
    [
        ("cuda", RuntimeError("Unable to initialize 'cuda': no driver\n(more)"), f"'cuda': no driver (more); {CUDA}"),
        ("cuda", AssertionError(), f"no plugin for JAX_PLATFORMS=cuda; {CUDA}"),
        ("gpu", UNKNOWN, f"no plugin for JAX_PLATFORMS=gpu; {CUDA}"),
        ("tpu", RuntimeError("no libtpu.so"), f"no libtpu.so; {TPU}"),
        ("rocm", RuntimeError("no driver"), "no driver; set"),
    ],
)
def test_devices_that_are_not_here_are_one_line_that_names_the_extra(monkeypatch, platform, error, wanted):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    line = f"^jax can't start: .*{re.escape(wanted)} JAX_PLATFORMS=cpu; see gptjax doctor$"
    with pytest.raises(InputError, match=line):
        distributed.join_processes({})


# Whole runs, as processes on this machine.


def start(
    count: int, run: Path, text: Path, *more: str, devices: int = 1, last: dict[str, str] | None = None,
    **variables: str,
) -> list[subprocess.Popen]:  # fmt: skip
    """The processes of one training run, each with so many fake devices; `last` are variables of the last alone."""
    command = [*GPTJAX, "pretrain", "shakespeare_char", "--run-dir", str(run), *SETTINGS.split()]
    command += ["--data.source", str(text), *more]
    return launch(count, command, text.parent / "cache", last, **{"JAX_NUM_CPU_DEVICES": str(devices)} | variables)


def launch(
    count: int, command: list[str], cache: Path, last: dict[str, str] | None = None, **variables: str
) -> list[subprocess.Popen]:
    """So many processes of a command, as one job."""
    job = {"GPTJAX_COORDINATOR": f"127.0.0.1:{free_port()}", "GPTJAX_PROCESSES": str(count)}
    env = environment(cache, GPTJAX_HEARTBEAT_SECONDS="60") | variables | job
    own = [env | {"GPTJAX_PROCESS": str(i)} for i in range(count)]
    own[-1] |= last or {}
    return [commands.start(command, env=mine, stdout=subprocess.PIPE) for mine in own]


def finish(processes: list[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    ended = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=seconds)
            ended.append((process.returncode, out, errors))
    finally:
        for process in processes:
            process.kill()
    return ended


def codes(ended: list[tuple[int, str, str]]) -> list[int]:
    return [code for code, _, _ in ended]


def lines(run: Path) -> list[dict]:
    return MetricsFile(run / "metrics.jsonl").read()


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run) if "loss" in line]


def reaches(run: Path, step: int, processes: list[subprocess.Popen]) -> None:
    """Waits until a step is logged."""
    while not any(line["step"] >= step for line in lines(run)):
        assert all(p.poll() is None for p in processes), finish(processes)
        time.sleep(0.02)


def same(a: list[float], b: list[float]) -> None:
    assert len(a) == len(b)
    np.testing.assert_allclose(a, b, rtol=1e-5)


SPLITS = [(2, 1, (1, 2, 1)), (4, 1, (4, 1, 1)), (4, 1, (2, 2, 1)), (2, 2, (2, 1, 2)), (2, 2, (1, 2, 2))]
MARKS = [pytest.mark.slow, *[pytest.mark.exhaustive] * 4]


@pytest.mark.parametrize(
    "count, devices, mesh", [pytest.param(*split, marks=mark) for split, mark in zip(SPLITS, MARKS, strict=True)]
)
def test_several_processes_train_as_one(tmp_path, words, count, devices, mesh):
    one, many = tmp_path / "one", tmp_path / "many"
    tasks = [tmp_path / "text.txt", tmp_path / "choices.jsonl"]
    tasks[0].write_text(words.read_text()[:200])
    tasks[1].write_text(json.dumps({"query": "ab", "choices": ["cab", "dab"], "gold": 0}))
    more = ("--steps", "6", "--evaluate.every", "6", "--checkpoint.every", "4")
    more += ("--evaluate.tasks", *map(str, tasks))
    sizes = [x for axis, size in zip(("data", "fsdp", "tensor"), mesh) for x in (f"--mesh.{axis}", str(size))]
    running = start(count, many, words, *more, *sizes, devices=devices)
    assert codes(finish(start(1, one, words, *more, "--no-sample"))) == [0]
    ended = finish(running)
    assert codes(ended) == [0] * count, ended
    assert all(rest[1:] == ("", "") for rest in ended[1:]), "only process 0 speaks"
    assert "sample of 4 tokens" in ended[0][1] and "Gloo" not in ended[0][1]
    same(losses(many), losses(one))
    names = ("eval_loss", "task_text", "task_choices")
    same([lines(many)[-1][name] for name in names], [lines(one)[-1][name] for name in names])


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_any_process_stops_all_and_another_count_resumes(tmp_path, words, number):
    run, alone = tmp_path / "run", tmp_path / "alone"
    stopped, meshes = 0, {2: ("--mesh.fsdp", "2", "--mesh.data", "1"), 1: ()}
    for count in (2, 1, 2):
        some = start(count, run, words, "--steps", "4000", "--checkpoint.every", "3000", *meshes[count])
        reaches(run, stopped + 3, some)
        some[-1].send_signal(number)
        ended = finish(some)
        assert codes(ended) == [75] * count, ended
        before, stopped = stopped, lines(run)[-1]["step"]
        assert (run / "checkpoints" / f"{stopped:08d}" / "manifest.json").is_file()
        assert not before or f"after step {before}" in ended[0][2]
    assert codes(finish(start(1, alone, words, "--steps", str(stopped), "--mesh.data", "1"))) == [0]
    same(losses(run), losses(alone))


@pytest.mark.exhaustive
def test_a_lost_process_ends_the_others(tmp_path, words):
    run = tmp_path / "run"
    both = start(2, run, words, "--steps", "4000", GPTJAX_HEARTBEAT_SECONDS="30")
    reaches(run, 3, both)
    both[1].kill()
    began = time.monotonic()
    assert codes(finish(both, 60)) == [-signal.SIGABRT, -signal.SIGKILL]
    assert time.monotonic() - began < 60


@pytest.mark.exhaustive
def test_a_process_that_fails_names_itself_and_ends_the_others(tmp_path, words):
    (tmp_path / "cache" / "gptjax" / "compiled").mkdir(parents=True)
    (tmp_path / "cache" / "gptjax" / "compiled").chmod(0o777)
    both = start(2, tmp_path / "run", words, "--steps", "40", last={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    (first, _, said), (second, _, errors) = finish(both)
    assert (first, second) == (2, 2)
    assert errors.startswith("gptjax: process 1 of 2 on ") and "can be written by others" in errors
    assert len(errors.splitlines()) == 1 and "gptjax:" not in said


@pytest.mark.exhaustive
def test_the_time_limit_saves_and_ends_all_processes_before_it(tmp_path, words):
    run, began = tmp_path / "run", time.monotonic()
    ended = finish(start(2, run, words, "--steps", "100000", "--checkpoint.every", "100000", "--time-limit", "90"))
    assert codes(ended) == [75, 75], ended
    assert time.monotonic() - began < 92
    assert "time limit of 90 s is near" in ended[0][2]
    stopped = lines(run)[-1]["step"]
    assert (run / "checkpoints" / f"{stopped:08d}" / "manifest.json").is_file()


TIMES = {"4h": 14400, "90m": 5400, "1h30m": 5400, "1:30:00": 5400, "2-12:00:00": 216000, "45": 45, "5:30": 330}


@pytest.mark.parametrize("written, seconds", TIMES.items())
def test_a_time_limit_is_read_as_users_and_slurm_write_it(written, seconds):
    assert TrainConfig(time_limit=written).time_limit_seconds == seconds


@pytest.mark.parametrize("written", ["soon", "0", "-5", "4 h", "1:2:3:4", "h"])
def test_a_time_limit_that_is_none_is_refused(written):
    with pytest.raises(InputError, match="time_limit='.*': wanted a time above 0"):
        TrainConfig(time_limit=written)
