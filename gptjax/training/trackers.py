"""Sinks by name: TensorBoard's event files, W&B, trackio and MLflow, through their own libraries.

A library is imported once its sink starts. Its own variables (WANDB_MODE, WANDB_PROJECT, TRACKIO_PROJECT,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...) tell it where to send to. The id of a run there is kept in sinks.json,
so that a resume goes on with its curves. A run that was killed has more there than it saved. These steps are made
again, to the same losses: TensorBoard drops what it had of them; MLflow and trackio, which can't, are not given them a
second time (Sent); W&B, which in its offline mode does not tell what it has, holds two equal points of each.
"""

import html
import json
import os
import struct
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gptjax.storage import write_json

PROJECT = "gptjax"
IDS = "sinks.json"
SPLITS = ("train", "validation")
LONGEST = 6000  # characters of a setting: the most that MLflow takes
_ids = threading.Lock()  # the sinks' threads write one file


class Sent:
    """Steps that a run has in a place already, by split; none where its settings were others, by which they differ."""

    def __init__(self, settings: Mapping[str, Any], before: Mapping[str, Any], steps: Mapping[str, Iterable[int]]):
        same = all(_text(before.get(name, value)) == _text(value) for name, value in settings.items())
        self._last = {split: max(of, default=-1) for split, of in steps.items()} if same else {}

    def new(self, step: int, values: Mapping[str, float]) -> bool:
        """Returns True where a line of numbers, all of one split, is not there yet."""
        split = next(iter(values), "").rpartition("/")[2]
        return step > self._last.get(split, -1)


class TensorBoard:
    """Event files in tensorboard/train and tensorboard/validation: TensorBoard draws equal tags of both in one chart.

    Each record is one write, taken back where it fails, so that a disk that was full leaves a file that can be read.
    """

    library, install = "tensorboardX", "tensorboardX"

    def start(self, run: Path, settings: Mapping[str, Any], resumed_step: int) -> None:
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._pb, self._crc, self._files = event_pb2, masked_crc32c, {}
        for split in SPLITS:
            folder = run / "tensorboard" / split
            folder.mkdir(parents=True, exist_ok=True)
            # Named by the time, so that readers, which sort by name, have the files in order.
            self._files[split] = (folder / f"events.out.tfevents.{time.time_ns()}").open("wb", buffering=0)
            self._write(split, 0, file_version="brain.Event:2")
            # Readers drop what other files hold of this step and later ones.
            self._write(split, resumed_step + 1, session_log=self._pb.SessionLog(status=self._pb.SessionLog.START))
        if not resumed_step:
            rows = "".join(f"| {name} | {value!r} |\n" for name, value in settings.items())
            self.text(0, "settings", f"| setting | value |\n|---|---|\n{rows}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for split in SPLITS:
            of = {name.removesuffix(f"/{split}"): x for name, x in values.items() if name.endswith(f"/{split}")}
            if of:
                self._write(split, step, summary={"value": [{"tag": k, "simple_value": x} for k, x in of.items()]})

    def text(self, step: int, name: str, text: str) -> None:
        plugin = {"plugin_data": {"plugin_name": "text"}}
        tensor = {"dtype": "DT_STRING", "string_val": [text.encode()], "tensor_shape": {"dim": [{"size": 1}]}}
        value = {"tag": f"{name}/text_summary", "metadata": plugin, "tensor": tensor}
        self._write("validation", step, summary={"value": [value]})

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, split: str, step: int, **what: Any) -> None:
        data = self._pb.Event(wall_time=time.time(), step=step, **what).SerializeToString()
        size = struct.pack("<Q", len(data))
        record = size + struct.pack("<I", self._crc(size)) + data + struct.pack("<I", self._crc(data))
        file = self._files[split]
        begin = file.tell()
        try:
            if file.write(record) != len(record):
                raise OSError(f"{file.name}: no room for a record")
        except OSError:
            file.seek(begin)
            file.truncate()
            raise


class WandB:
    """A run of Weights & Biases, its files in the run's folder. Its x-axis is the metric `step`.

    W&B's own step may not go back, as it must where a run is resumed from before its end; of a metric, the last wins.
    """

    library, install = "wandb", "'gptjax[wandb]'"

    def start(self, run: Path, settings: Mapping[str, Any], resumed_step: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        # Silent: no questions for a key on the terminal of a run, and no lines over its bar.
        options = wandb.Settings(silent=True, console="off", init_timeout=30, finish_timeout=10)
        wandb.setup(options)
        self._html = wandb.Html
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=run_name(settings), dir=run, settings=options,
            id=_new_id(run, "wandb", uuid.uuid4().hex[:8]), resume="allow",
            config=dict(settings), allow_val_change=True,
        )  # fmt: skip
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._html(f"<pre>{html.escape(text)}</pre>"), "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, in its database on this machine or where TRACKIO_SPACE_ID says."""

    library, install = "trackio", "'gptjax[trackio]'"

    def start(self, run: Path, settings: Mapping[str, Any], resumed_step: int) -> None:
        import trackio  # pyright: ignore[reportMissingImports]
        from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._markdown = trackio.Markdown
        name = _new_id(run, "trackio", f"{run_name(settings)}-{uuid.uuid4().hex[:8]}")  # by which it finds a run again
        lines = SQLiteStorage.get_logs(project, name) if resumed_step else []
        steps = {split: [x["step"] for x in lines if f"loss/{split}" in x] for split in SPLITS}
        self._sent = Sent(settings, SQLiteStorage.get_run_config(project, name) or {} if lines else {}, steps)
        self._run = trackio.init(
            project=project, name=name, resume="allow", config=dict(settings),
            auto_log_gpu=False, auto_log_cpu=False, embed=False,
        )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._sent.new(step, values):
            self._run.log(dict(values), step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._markdown(text)}, step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow; texts are its artifacts NAME/STEP.txt."""

    library, install = "mlflow", "'gptjax[mlflow]'"

    def start(self, run: Path, settings: Mapping[str, Any], resumed_step: int) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        self._metric, self._client, self._sent = Metric, MlflowClient(), Sent({}, {}, {})
        if known := _read_ids(run).get("mlflow"):
            self._id = known
            self._client.update_run(known, status="RUNNING")
            if resumed_step:
                curves = {split: self._client.get_metric_history(known, f"loss/{split}") for split in SPLITS}
                steps = {split: [point.step for point in curve] for split, curve in curves.items()}
                self._sent = Sent(settings, self._client.get_run(known).data.params, steps)
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment_id, run_name=run_name(settings)).info.run_id
        params = [Param(key, _text(value)) for key, value in settings.items()]
        for i in range(0, len(params), 100):
            self._client.log_batch(self._id, params=params[i : i + 100])
        _new_id(run, "mlflow", self._id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        if self._sent.new(step, values):
            self._client.log_batch(self._id, [self._metric(name, float(x), now, step) for name, x in values.items()])

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{name}/{step:08d}.txt")

    def close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio, "mlflow": MLflow}


def run_name(settings: Mapping[str, Any]) -> str:
    """The name of a run for its readers: that of its folder."""
    return Path(settings["run_dir"]).name


def _text(setting: Any) -> str:
    return str(list(setting) if isinstance(setting, tuple) else setting)[:LONGEST]


def _read_ids(run: Path) -> dict[str, str]:
    try:
        return json.loads((run / IDS).read_text())
    except FileNotFoundError:
        return {}


def _new_id(run: Path, sink: str, new: str) -> str:
    """The id that the run has in a sink: the one kept in its folder, or a new one, which is kept from now on."""
    with _ids:
        ids = {sink: new} | _read_ids(run)
        write_json(run / IDS, ids)
    return ids[sink]
