"""Sinks have every number of metrics.jsonl, go on after a resume, and neither stall nor end a run."""

import collections
import errno
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gptjax.config import DataConfig, ModelConfig, TrainConfig
from gptjax.config.plugins import register
from gptjax.config.section import InputError
from gptjax.stages.runner import Provenance, join
from gptjax.training import metrics, sinks
from gptjax.training.metrics import Metrics
from gptjax.training.metrics_file import MetricsFile
from gptjax.training.sinks import Sinks, check_sinks, scalars
from gptjax.training.trackers import TRACKERS, Sent, TensorBoard

SETTINGS = {"run_dir": "runs/a", "model.width": 8}


class Fake:
    """A sink that keeps what it was given; `made` are all of them."""

    made: "list[Fake]" = []

    def __init__(self):
        self.started, self.curve, self.texts, self.closed = None, [], [], False
        Fake.made.append(self)

    def start(self, run, settings, resumed_step):
        self.started = (run, settings["model.width"], resumed_step)

    def scalars(self, step, values):
        self.curve.append((step, dict(values)))

    def text(self, step, name, text):
        self.texts.append((step, name, text))

    def close(self):
        self.closed = True


class Stuck(Fake):
    """A sink that never comes back from its first line."""

    release = threading.Event()

    def scalars(self, step, values):
        Stuck.release.wait()


class Raising(Fake):
    """A sink that fails in the first two lines: with an error of two lines of text, like those of a client."""

    def scalars(self, step, values):
        if step < 3:
            raise ConnectionError("refused\nby peer")
        super().scalars(step, values)


class Dead(Fake):
    """A sink whose library leaves the interpreter, as some do where nobody is logged in."""

    def start(self, run, settings, resumed_step):
        sys.exit(1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda dtype: (1e12, "measured"))
    monkeypatch.setattr(Fake, "made", [])
    yield
    Stuck.release.set()
    Stuck.release = threading.Event()


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.6)
    monkeypatch.setattr(sinks, "QUIET_SECONDS", 0.2)


def config(*names: str, **more) -> TrainConfig:
    return TrainConfig(
        steps=40, log_every=1, sinks=names, **more,
        model=ModelConfig(num_layers=2, width=8, num_heads=2, dtype="float32"), data=DataConfig(batch_size=4, length=8),
    )  # fmt: skip


def run_with(
    folder: Path, cfg: TrainConfig, first: int = 1, last: int = 30, resumed: int = 0, pause: float = 0.0,
    evaluated: int = 0, killed: float = 0.0,
) -> list[dict]:  # fmt: skip
    """A run's metrics from one step to another, with an evaluation and a sample at the last; killed then, or ended."""
    folder.mkdir(exist_ok=True)
    report = Metrics(folder / "metrics.jsonl", cfg, 258, resumed_step=resumed)
    for step in range(first, last + 1):
        values = {"loss": np.float32(1 / step), "learning_rate": 1e-3 / 3, "grad_norm_N": np.ones(2, np.float32) / step}
        report.log_step(step, values)
        time.sleep(pause)
        if step in (last, evaluated):
            report.log_evaluation(step, {"eval_loss": 1.1, "eval_bits_per_byte": 2.2, "eval_loss_books": 3.3})
    report.log_sample(last, "Once", f" upon\n<{last}>")
    if killed:
        while report._sinks._feeds[0]._written < last - first + 3:
            time.sleep(0.05)
        time.sleep(killed)  # clients send from threads of their own
        os.kill(os.getpid(), signal.SIGKILL)
    report.close()
    return MetricsFile(folder / "metrics.jsonl").read()


def curves(lines) -> dict[str, dict[int, float]]:
    """{name: {step: value}} of the lines of metrics.jsonl, as a sink should have them."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in scalars("validation" if "eval_loss" in line else "train", line).items():
            found.setdefault(name, {})[line["step"]] = value
    return found


# Names and settings.


def test_loss_and_validation_loss_are_one_quantity_of_two_splits():
    line = {"step": 5, "loss": 1.5, "rate": None, "batch": "ab", "norm_by_layer": [1.0, 2.0]}
    by_layer = {"norm_by_layer/000/train": 1.0, "norm_by_layer/001/train": 2.0}
    assert scalars("train", line) == {"loss/train": 1.5, **by_layer}
    assert scalars("validation", {"step": 5, "eval_loss": 1.25}) == {"loss/validation": 1.25}


@pytest.mark.parametrize("bad", [("tensorbord",), ("wandb", "wandb"), ("",)])
def test_a_sink_that_is_none_is_refused(bad):
    with pytest.raises(InputError, match="sinks=.*wanted tensorboard, wandb, trackio, mlflow, or module:function"):
        config(*bad)


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow", "nowhere.at.all:sink", "a:b:c"])
def test_an_absent_library_is_one_line_before_anything_starts(name, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    monkeypatch.setattr("gptjax.stages.runner.join_processes", lambda *args: pytest.fail("it went on"))
    wanted = rf"pip install 'gptjax\[{name}\]'" if ":" not in name else f"sinks='{name}': wanted module:name"
    with pytest.raises(InputError, match=wanted) as e, join(config(name, run_dir=str(tmp_path)), Provenance()):
        pass
    assert "\n" not in str(e.value)


def test_every_extra_that_a_line_names_is_there():
    import tomllib

    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for name, sink in TRACKERS.items():
        of = extras["dependencies"] if name == "tensorboard" else extras["optional-dependencies"][name]
        assert any(package.startswith(sink.library) for package in of)
        assert sink.install == ("tensorboardX" if name == "tensorboard" else f"'gptjax[{name}]'")
    check_sinks(["tensorboard", register(Fake)])


# Feeding.


def test_a_users_function_gets_every_number_of_metrics_jsonl(tmp_path):
    lines = run_with(tmp_path / "run", config(register(Fake), log_norms_every=10))
    (sink,) = Fake.made
    assert sink.started == (tmp_path / "run", 8, 0) and sink.closed
    found: dict[str, dict[int, float]] = {}
    for step, values in sink.curve:
        for name, value in values.items():
            found.setdefault(name, {})[step] = value
    assert found == curves(lines) and len(found["loss/train"]) == 30
    assert {"grad_norm_by_layer/001/train", "loss/validation", "loss_books/validation"} <= found.keys()
    assert sink.texts == [(30, "sample", "Once upon\n<30>")]


def test_lines_between_log_every_are_in_metrics_jsonl_alone(tmp_path):
    cfg = TrainConfig(log_every=10, sinks=(register(Fake),), model=config().model, data=config().data)
    assert len(run_with(tmp_path / "run", cfg)) == 31
    assert [step for step, _ in Fake.made[0].curve] == [1, 10, 20, 30, 30]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Stuck, "did not end within 1 s"),
        (Raising, r"step 1 was not written \(ConnectionError: refused by peer\)"),
        (Dead, r"can't be started \(SystemExit: 1\)"),
    ],
)
def test_a_sink_that_blocks_raises_or_exits_is_said_once_and_changes_nothing(tmp_path, hasty, capsys, kind, said):
    alone = run_with(tmp_path / "alone", config())
    capsys.readouterr()
    start = time.perf_counter()
    beside = run_with(tmp_path / "beside", config(register(kind), register(Fake)))
    assert time.perf_counter() - start < 5
    assert [line.get("loss") for line in beside] == [line.get("loss") for line in alone]
    errors = capsys.readouterr().err
    told = [line for line in errors.splitlines() if f"{kind.__qualname__}:" in line]
    name = register(kind)
    assert len(told) == 2 and told[0].startswith(f"sink {name}: ") and "the run goes on without it" in told[0], errors
    assert re.search(said, told[0]), told[0]
    lost = {Stuck: 32, Raising: 2, Dead: 32}[kind]
    assert told[1] == f"sink {name}: {lost} of 32 lines were not written; metrics.jsonl has all"
    other = next(sink for sink in Fake.made if type(sink) is Fake)
    assert len(other.curve) == 31 and other.closed, "the other sink has all"


def test_a_slow_sinks_queue_is_bounded_and_what_it_lacks_is_counted(tmp_path, hasty, monkeypatch, capsys):
    monkeypatch.setattr(sinks, "MOST_WAITING", 5)
    notes: list[str] = []
    feed = Sinks([register(Stuck)], tmp_path, SETTINGS, 0, notes.append)
    time.sleep(0.1)
    for step in range(1, 101):
        feed.scalars(step, "train", {"loss": 1.0})
    name = register(Stuck)
    assert notes == [f"sink {name}: is 5 lines behind; what does not fit is left out; the run goes on without it"]
    assert feed._feeds[0]._queue.qsize() <= 6
    Stuck.release.set()
    feed.close()
    (lost,) = notes[1:]
    assert "of 100 lines were not written; metrics.jsonl has all" in lost
    assert int(lost.split()[2]) in (94, 95)


def test_a_sink_that_needs_longer_at_the_end_is_waited_for_and_named(hasty):
    class Slow(Fake):
        def close(self):
            time.sleep(0.3)
            super().close()

    notes: list[str] = []
    feed = Sinks([register(Slow)], Path(), SETTINGS, 0, notes.append)
    feed.close()
    assert notes == [f"waiting up to 1 s for the sinks: {register(Slow)}"] and Fake.made[0].closed


# TensorBoard's files.


def tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    """{name: {step: value}} of a run's event files, as TensorBoard shows them: what a START drops is left out."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    found: dict[str, dict[int, float]] = {}
    for split in ("train", "validation"):
        for path in sorted((folder / split).iterdir()):
            raw = path.read_bytes()
            while raw:
                size = int.from_bytes(raw[:8], "little")
                event, raw = Event.FromString(raw[12 : 12 + size]), raw[16 + size :]
                if event.session_log.status == 1:
                    for curve in (curve for name, curve in found.items() if name.endswith(split)):
                        for step in [s for s in curve if s >= event.step]:
                            del curve[step]
                for value in event.summary.value:
                    text = value.tensor.string_val
                    shown = text[0].decode() if text else value.simple_value
                    found.setdefault(f"{value.tag}/{split}", {})[event.step] = shown
    return found


def as_singles(found: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """The curves rounded to float32, which is what TensorBoard keeps."""
    return {name: {s: float(np.float32(x)) for s, x in curve.items()} for name, curve in found.items() if curve}


def test_tensorboards_files_hold_every_number_and_one_curve_after_a_resume(tmp_path):
    cfg = config("tensorboard", log_norms_every=10)
    run_with(tmp_path / "run", cfg)
    lines = run_with(tmp_path / "run", cfg, first=16, last=25, resumed=15)
    found = tensorboard(tmp_path / "run" / "tensorboard")
    texts = {name: found.pop(name) for name in list(found) if "text_summary" in name}
    assert as_singles(found) == as_singles(curves(lines)) and len(found["loss/train"]) == 25
    assert texts["sample/text_summary/validation"] == {25: "Once upon\n<25>"}
    assert "| model.width | 8 |" in texts["settings/text_summary/validation"][0]
    run_with(tmp_path / "run", cfg, last=3)
    assert max(tensorboard(tmp_path / "run" / "tensorboard")["loss/train"]) == 3, "a run that starts afresh, too"


class Disk:
    """A file on a disk with room for so many bytes more."""

    def __init__(self, file, room: int):
        self.file, self.room, self.name = file, room, file.name

    def write(self, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: self.room]
        self.room -= len(part)
        return self.file.write(part)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_disk_that_was_full_leaves_event_files_that_can_be_read(tmp_path):
    sink = TensorBoard()
    sink.start(tmp_path, SETTINGS, 0)
    sink.scalars(1, {"loss/train": 1.0})
    whole = sink._files["train"].tell()
    full = sink._files["train"] = Disk(sink._files["train"], 20)  # a part of the next record
    for step in (2, 3):
        with pytest.raises(OSError, match="No space left|no room"):
            sink.scalars(step, {"loss/train": 0.5})
        assert Path(full.name).stat().st_size == whole
    full.room = 1000
    sink.scalars(4, {"loss/train": 0.25})
    sink.close()
    assert tensorboard(tmp_path / "tensorboard")["loss/train"] == {1: 1.0, 4: 0.25}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a file system of 1 MB")
def test_a_full_file_system_is_one_line_and_the_run_goes_on(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "tensorboard").mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", run / "tensorboard"], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"can't mount: {mounted.stderr.decode()}")
    try:
        (run / "tensorboard" / "other").write_bytes(bytes(2**20 - 40_000))
        lines = run_with(run, config("tensorboard"), last=400)
        errors = capsys.readouterr().err
        found = tensorboard(run / "tensorboard")
        steps = found["loss/train"]
        assert len(lines) == 401 and 10 < len(steps) < 400 and sorted(steps) == list(range(1, len(steps) + 1))
        assert errors.count("No space left on device") + errors.count("no room for a record") == 1, errors
        small = sum(400 in found.get(f"{name}/validation", {}) for name in ("loss", "sample/text_summary"))  # may fit
        assert f"{402 - len(steps) - small} of 402 lines were not written" in errors, errors
    finally:
        subprocess.run(["umount", run / "tensorboard"], check=True)


def test_steps_that_a_place_has_are_not_sent_again_unless_the_settings_changed():
    settings = {"sinks": ("mlflow",), "model.width": 8}
    sent = Sent(settings, {"sinks": "['mlflow']", "model.width": "8"}, {"train": [1, 10, 30], "validation": []})
    assert [sent.new(step, {"loss/train": 1.0}) for step in (16, 30, 31)] == [False, False, True]
    assert sent.new(30, {"loss/validation": 1.0}) and Sent({}, {}, {}).new(0, {"loss/train": 1.0})
    assert Sent(settings, {"model.width": "16"}, {"train": [30]}).new(16, {"loss/train": 1.0})


# The real clients, in their local modes.


def overlaid(found: dict[str, dict[int, float]], name: str, step: int, value: float) -> None:
    found.setdefault(name, {})[int(step)] = value  # what is written last wins
    POINTS[name, int(step)] += 1


POINTS: collections.Counter = collections.Counter()  # how often a store holds a step of a quantity


def wandb_records(path: Path):
    """The records of an offline W&B file, which is a LevelDB log: blocks of 32 KiB, records in parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, parts = path.read_bytes(), 7, b""  # a header of 7 bytes
    while at + 7 <= len(raw):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        parts, at = parts + raw[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, last
            yield Record.FromString(parts)
            parts = b""


def read_wandb(run: Path) -> tuple[dict, dict, dict]:
    found, texts, configs, ids = {}, {}, {}, set()
    for folder in sorted((run / "wandb").glob("offline-run-*")):
        (file,) = folder.glob("*.wandb")
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                configs |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
            items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            for name, value in items.items():
                if name == "sample.path":
                    texts[items["step"]] = (folder / "files" / value).read_text()
                elif not name.startswith(("sample.", "_")) and name != "step":
                    overlaid(found, name, items["step"], float(value))
    assert len(ids) == 1, "one run of two parts"
    return found, texts, configs


def read_mlflow(run: Path) -> tuple[dict, dict, dict]:
    from mlflow import MlflowClient

    client, found = MlflowClient(), {}
    (experiment,) = [e for e in client.search_experiments() if e.name == "gptjax"]
    (only,) = client.search_runs([experiment.experiment_id])
    for name in only.data.metrics:
        for metric in client.get_metric_history(only.info.run_id, name):
            overlaid(found, name, metric.step, metric.value)
    files = [f.path for f in client.list_artifacts(only.info.run_id, "sample")]
    texts = {int(Path(f).stem): Path(client.download_artifacts(only.info.run_id, f)).read_text() for f in files}
    assert only.info.status == "FINISHED"
    return found, texts, only.data.params


def read_trackio(run: Path) -> tuple[dict, dict, dict]:
    from trackio.sqlite_storage import SQLiteStorage

    found, texts = {}, {}
    (record,) = SQLiteStorage.get_run_records("gptjax")
    for line in SQLiteStorage.get_logs("gptjax", record["name"], run_id=record["id"]):
        for name, value in line.items():
            if isinstance(value, dict):
                texts[line["step"]] = value["_value"]
            elif name not in ("step", "timestamp"):
                overlaid(found, name, line["step"], float(value))
    return found, texts, SQLiteStorage.get_run_config("gptjax", record["name"], run_id=record["id"])


def read_tensorboard(run: Path) -> tuple[dict, dict, dict]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found, texts = {}, {}
    for split in ("train", "validation"):
        reader = EventAccumulator(str(run / "tensorboard" / split), {"scalars": 0, "tensors": 0}).Reload()
        for tag in reader.Tags()["scalars"]:
            for event in reader.Scalars(tag):
                overlaid(found, f"{tag}/{split}", event.step, event.value)
        for tag in reader.Tags()["tensors"]:
            for event in reader.Tensors(tag):
                texts[event.step] = event.tensor_proto.string_val[0].decode()
    settings = texts.pop(0)
    rows = dict(line.strip("| ").split(" | ") for line in settings.splitlines()[2:])
    return found, texts, rows


READERS = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio, "tensorboard": read_tensorboard}


@pytest.mark.peers
@pytest.mark.parametrize("name", READERS)
def test_the_real_client_has_every_number_and_goes_on_with_one_curve(name, tmp_path, monkeypatch):
    for variable, value in {
        "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI") or str(tmp_path / "mlruns"),
    }.items():  # fmt: skip
        monkeypatch.setenv(variable, value)
    pytest.importorskip(name)  # after that: trackio reads its variable once
    POINTS.clear()
    run = tmp_path / "run"

    def part(**more) -> None:  # in a process of its own: clients remember runs
        code = f"import test_sinks, pathlib; test_sinks.metrics.peak_flops = lambda dtype: (1e12, 'measured')\n" \
               f"test_sinks.sinks.CLOSE_SECONDS = 60.0\n" \
               f"test_sinks.run_with(pathlib.Path({str(run)!r}), test_sinks.config({name!r}, log_norms_every=10, " \
               f"run_dir='runs/a'), **{more})"  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent)
        assert done.returncode == (-signal.SIGKILL if "killed" in more else 0)

    part(last=30, killed=3.0)
    before = curves(MetricsFile(run / "metrics.jsonl").read())
    part(first=16, last=40, resumed=15, evaluated=30)  # saved at 15
    wanted = curves(MetricsFile(run / "metrics.jsonl").read())
    found, texts, settings = READERS[name](run)
    measured = {metric for metric in wanted if metric.startswith(("seconds", "tokens_per", "mfu", "peak_memory"))}
    assert all(wanted[m].get(s, x) == x for m, of in before.items() for s, x in of.items() if m not in measured)
    if name == "tensorboard":  # the one client that drops what lies beyond the step resumed from
        assert as_singles(found) == as_singles(wanted)
    else:  # what was written before the kill stays: the same numbers, and what was measured then
        exact = {m: {s: float(x) for s, x in of.items()} for m, of in wanted.items() if m not in measured}
        assert {m: of for m, of in found.items() if m not in measured} == exact
        assert all(found[m].keys() >= wanted[m].keys() for m in measured)
    twice = {step for (_, step), times in POINTS.items() if times > 1}
    assert twice <= (set(range(16, 31)) if name == "wandb" else set())
    assert 40 in texts
    shown = texts[40].replace("&lt;", "<").replace("&gt;", ">")
    assert "Once upon\n<40>" in shown
    width = settings["model.width"]
    assert (width.get("value") if isinstance(width, dict) else width) in (8, "8")
