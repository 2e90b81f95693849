"""The metrics file holds one line a step whatever happens, and rates are what the clock says."""

import io
import json
import math
import struct
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import DataConfig, ModelConfig, TrainConfig
from gptjax.config.section import InputError
from gptjax.model.counts import flops_per_token
from gptjax.runtime import peaks
from gptjax.runtime.hardware import sheet_flops
from gptjax.runtime.peaks import DATA_SHEET, MEASURED, keep_peak, peak_flops
from gptjax.training import metrics
from gptjax.training.metrics import Metrics, Throughput
from gptjax.training.metrics_file import MetricsFile
from gptjax.training.progress import ProgressBar, duration

CFG = TrainConfig(
    steps=40,
    log_every=10,
    model=ModelConfig(num_layers=1, width=8, num_heads=2, dtype="float32"),
    data=DataConfig(batch_size=4, length=8),
)


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda dtype: (1e12, DATA_SHEET))


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only where a test changes its `now`."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    return clock


def make_file(path, steps=5) -> MetricsFile:
    file = MetricsFile(path)
    for step in range(1, steps + 1):
        file.write({"step": step, "loss": 1 / step})
    return file


# The file.


def test_floats_read_back_bit_for_bit(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    rng = np.random.default_rng(0)
    doubles = [struct.unpack("d", rng.bytes(8))[0] for _ in range(200)]
    singles = rng.normal(size=200).astype(np.float32) * np.float32(1e-30)
    file.write({"step": 1, **{str(i): v for i, v in enumerate(doubles)}})
    file.write({"step": 2, **{str(i): v for i, v in enumerate(singles)}})
    file.write({"step": 3, "loss": jnp.float32(0.1), "updates": jnp.int32(7), "batch": "ab12", "rate": None})
    first, second, third = file.read()
    for i, value in enumerate(doubles):
        assert first[str(i)].hex() == value.hex() or math.isnan(value)
    for i, value in enumerate(singles):
        assert np.float32(second[str(i)]).tobytes() == value.tobytes()
    assert third == {"step": 3, "loss": float(np.float32(0.1)), "updates": 7, "batch": "ab12", "rate": None}


def test_nan_and_infinity_are_valid_json_and_read_back(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write({"step": 1, "loss": math.nan, "grad_norm": jnp.float32(math.inf), "x": -math.inf})

    def refuse(name):
        raise AssertionError(name)

    raw = json.loads(file.path.read_text(), parse_constant=refuse)
    assert raw == {"step": 1, "loss": "nan", "grad_norm": "inf", "x": "-inf"}
    (line,) = file.read()
    assert math.isnan(line["loss"]) and line["grad_norm"] == math.inf and line["x"] == -math.inf


@pytest.mark.parametrize(
    ("step", "torn"),
    [(3, ""), (3, '{"step": 6, "lo'), (3, '{"step": 6, "loss": 0.1}'), (3, "\x00\x00\x00"), (3, '{"step": 3, "x": 1}'),
     (3, '{"step": 6, "lo\n'), (5, ""), (9, '{"step": 6, "loss"'), (0, "")],
)  # fmt: skip
def test_resuming_cuts_the_file_back_to_the_restored_step_and_drops_a_torn_line(tmp_path, step, torn):
    file = make_file(tmp_path / "m.jsonl")
    whole = file.path.read_bytes().splitlines(keepends=True)
    with file.path.open("a") as f:
        f.write(torn)
    file.truncate_after(step)
    assert file.path.read_bytes() == b"".join(whole[:step])
    file.write({"step": 4, "loss": 0.25})
    assert file.path.read_bytes() == b"".join([*whole[:step], whole[3]])


def test_lines_out_of_order_are_cut_too(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    for step in (1, 2, 9, 3):
        file.write({"step": step})
    file.truncate_after(3)
    assert [line["step"] for line in file.read()] == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize("bad", ["{", "[1]", '{"loss": 1}', '{"step": "3"}', "\xff", "[" * 100_000])
def test_a_broken_line_in_the_middle_is_named_by_its_number(tmp_path, bad):
    file = make_file(tmp_path / "m.jsonl", 2)
    file.path.write_text(file.path.read_text() + bad + '\n{"step": 4}\n')
    for act in (file.read, lambda: file.truncate_after(2)):
        with pytest.raises(InputError, match=r"m\.jsonl:3: ") as e:
            act()
        assert "\n" not in str(e.value)


def test_a_file_that_is_not_there_is_empty(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    file.truncate_after(3)
    assert file.read() == [] and file.best_steps(2) == [] and not file.path.exists()


def test_a_line_is_with_the_system_as_soon_as_it_is_written(tmp_path):
    code = (
        "import os, signal, sys\nfrom gptjax.training.metrics import MetricsFile\n"
        "f = MetricsFile(sys.argv[1])\nf.write({'step': 1})\nf.write({'step': 2})\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.jsonl")], check=False)
    assert [line["step"] for line in MetricsFile(tmp_path / "m.jsonl").read()] == [1, 2]


def test_a_full_disk_is_one_clear_line(tmp_path):
    full = tmp_path / "m.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"m\.jsonl: can't be written .No space left"):
        file = MetricsFile(full)
        file.write({"step": 1})
    file.close()
    with pytest.raises(InputError, match="can't be written"):
        MetricsFile(tmp_path).write({"step": 1})


def test_the_best_steps_are_those_of_lowest_evaluation_loss(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    for step, loss in [(10, 3.0), (20, 2.0), (30, 2.5), (40, math.nan), (50, 2.0)]:
        file.write({"step": step, "loss": 0.0})
        file.write({"step": step, "eval_loss": loss})
    assert file.best_steps(0) == []
    assert file.best_steps(2) == [20, 50]
    assert file.best_steps(9) == [20, 50, 30, 10]
    assert file.best_steps(1, among=[10, 30]) == [30], "the best of those that were saved"
    assert file.evaluation(30) is not None and file.evaluation(31) is None


# Throughput.


def test_rates_leave_out_compilation_and_evaluation(clock):
    rates = Throughput(1000, {"6n": 2.0, "causal": 3.0, "palm": 4.0}, 1e6)
    clock.now += 60  # compiles
    rates.lap()
    assert set(rates.rates().values()) == {None} and rates.seconds(5) is None
    for _ in range(3):
        clock.now += 0.5
        rates.lap()
    clock.now += 30
    rates.skip()  # evaluated
    clock.now += 99
    rates.lap()
    clock.now += 0.5
    rates.lap()
    assert rates.rates() == {"tokens_per_second": 2000.0, "mfu_6n": 0.004, "mfu_causal": 0.006, "mfu_palm": 0.008}
    assert rates.seconds(10) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("laps", "rate", "seconds"),
    [
        ([9.0, 1.0, 1.0, 1.0, 5.0], 100, 20),  # a step that waited for a save counts in the time left alone
        ([1.0] * 30 + [0.1] * 30, 1000, 1),
    ],
)
def test_rates_are_of_the_latest_steps_and_the_time_left_of_all_that_they_took(clock, laps, rate, seconds):
    rates = Throughput(100, {"6n": 1.0, "causal": 1.0, "palm": 1.0}, 1.0)
    for lap in laps:
        clock.now += lap
        rates.lap()
    assert rates.rates()["tokens_per_second"] == pytest.approx(rate)
    assert rates.seconds(10) == pytest.approx(seconds)


SHEETS = {
    "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989.4, "NVIDIA H200 NVL": 835.5,
    "NVIDIA A100-SXM4-40GB": 312, "Tesla V100-SXM2-16GB": 125, "Tesla T4": 65, "NVIDIA L4": 121, "NVIDIA A10G": 70,
    "NVIDIA GeForce RTX 4090": 165.2, "TPU v2": 22.5, "TPU v3": 61.5, "TPU v4": 275, "TPU v5 lite": 197, "TPU v5": 459,
    "TPU v5p": 459, "TPU v6 lite": 918, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA L40S": None, "cpu": None,
}  # fmt: skip


def test_peaks_are_those_of_the_data_sheets():
    assert {kind: sheet_flops(kind, "bfloat16") for kind in SHEETS} == {k: x and x * 1e12 for k, x in SHEETS.items()}
    assert sheet_flops("NVIDIA A100-SXM4-40GB", "float32") == 156e12 and sheet_flops("cpu", "float32") is None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and quick measures there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(peaks, "SECONDS", 0.001)
    return tmp_path / "cache" / "gptjax" / "peaks.json"


def test_an_unknown_device_is_measured_once_for_a_machine_a_type_and_a_version_of_jax(cache, monkeypatch):
    flops, source = peak_flops("float32")
    assert source == MEASURED and 1e8 < flops * jax.local_device_count() < 1e14
    (key,) = json.loads(cache.read_text())
    assert key.startswith("cpu, ") and key.endswith(f"cores, float32, jax {jax.__version__}")
    monkeypatch.setattr(peaks, "_measured", lambda dtype: 1e10)
    assert peak_flops("float32") == (flops, MEASURED), "it is not measured again"
    assert peak_flops("bfloat16")[0] * jax.local_device_count() == 1e10, "another type is"
    assert peak_flops("float32", refresh=True)[0] * jax.local_device_count() == 1e10
    assert peak_flops("float32")[0] * jax.local_device_count() == 1e10
    cache.write_text("torn")
    assert peak_flops("float32")[0] * jax.local_device_count() == 1e10
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # nothing can be kept: it is measured at each start
    assert peak_flops("float32")[0] * jax.local_device_count() == 1e10


def test_a_kept_peak_only_rises(cache):
    first, _ = peak_flops("float32")
    keep_peak("float32", first / 2)
    assert peak_flops("float32")[0] == first
    keep_peak("float32", first * 2)
    assert peak_flops("float32")[0] == first * 2


def test_steps_that_beat_a_measured_peak_raise_it_and_no_share_is_above_one(clock):
    kept = []
    rates = Throughput(1000, {"6n": 1.0, "causal": 2.0, "palm": 2.0}, 1e3, kept.append)
    rates.lap()
    for lap in [1e-6, *[0.5] * 9, *[0.25] * 20]:  # the first seems short: its report came late
        clock.now += lap
        rates.lap()
        share = rates.rates()["mfu_causal"]
        assert share is None or share <= 1
    assert kept == sorted(kept) and (kept[0], kept[-1]) == (4000.0, 8000.0) and share == 1
    known = Throughput(1000, {"6n": 1.0, "causal": 2.0, "palm": 2.0}, 1e3)  # a data sheet stays what it is
    known.lap()
    clock.now += 0.5
    known.lap()
    assert known.rates()["mfu_causal"] == 4


# Progress.


def test_without_a_terminal_there_is_a_line_every_so_many_steps(capsys):
    progress = ProgressBar(25, 0, 10)
    for step in range(1, 26):
        line = {"step": step, "loss": 3.12341, "tokens_per_second": 21345.4, "mfu_causal": 0.1304}
        progress.step(line, 190.0 if step > 1 else None)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25"]
    assert lines[1] == "step 10/25  loss 3.1234  21,345 tokens/s  mfu 13.0 %  3m10s left"


@pytest.mark.parametrize("total", [20, 1_000_000])
def test_a_bar_of_80_columns_has_loss_rate_and_time_left_and_history_above(monkeypatch, total):
    monkeypatch.setattr(sys, "stderr", out := io.StringIO())
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    progress = ProgressBar(total, 10, 10)
    monkeypatch.setattr(progress._bar, "dynamic_ncols", lambda *_: (80, 24))
    for step in (total - 10, total - 5):
        rate = {"tokens_per_second": 1234567.0 if total > 20 else 1234.0, "mfu_causal": 0.6}
        progress.step({"step": step, "loss": 12.0, **rate}, 61.0)
    with progress.status("evaluating"):
        progress._bar.refresh()
    progress.note("hello")
    progress.close()
    frames = [frame for line in out.getvalue().splitlines() for frame in line.split("\r")]
    assert max(map(len, frames)) <= 80
    bars = [frame for frame in frames if f"{total - 5}/{total} |" in frame and "left" in frame]
    assert bars and all("loss 12.0000" in bar and "tokens/s" in bar and "1m01s left" in bar for bar in bars)
    assert all(len(bar.split("|")[1]) >= 10 for bar in bars)
    assert any("evaluating ..." in frame for frame in frames) and "hello" in frames
    assert sum(frame.startswith(f"step {total - 10}/") for frame in frames) == 1


def test_durations_are_short():
    assert [duration(s) for s in (0.4, 59.6, 190, 7500)] == ["0s", "1m00s", "3m10s", "2h05m"]


# All together.


def log(report: Metrics, steps):
    for step in steps:
        values = {
            "loss": jnp.float32(1 / step),
            "learning_rate": 1e-3,
            "grad_norm": np.float32(2),
            "batch": f"{step:x}",
        }
        report.log_step(step, values)


def test_a_line_of_metrics_says_what_scripts_rely_on(tmp_path, clock):
    report = Metrics(tmp_path / "m.jsonl", CFG, 258)
    for step in (1, 2):
        clock.now += 0.5
        log(report, [step])
    report.log_evaluation(2, {"eval_loss": 1.5, "eval_perplexity": 4.48, "eval_bits_per_byte": 2.1})
    clock.now += 99  # evaluates
    for step in (3, 4):
        clock.now += 0.5
        log(report, [step])
    report.close()
    first, second, evaluation, _, fourth = MetricsFile(tmp_path / "m.jsonl").read()
    assert list(second)[:6] == ["step", "updates", "loss", "tokens", "tokens_per_second", "learning_rate"]
    assert first["tokens_per_second"] is None and first["mfu_6n"] is None
    assert (second["step"], second["updates"], second["tokens"], second["tokens_per_second"]) == (2, 2, 64, 64.0)
    assert fourth["tokens_per_second"] == 64.0
    assert second["batch"] == "2" and second["seconds"] == 1.0 and second["grad_norm"] == 2.0
    flops = flops_per_token(CFG.model, 258, 8)
    for convention in ("6n", "causal", "palm"):  # of a data sheet's peak, known from the start
        assert second[f"mfu_{convention}"] == pytest.approx(64 * flops[convention] / (1e12 * jax.device_count()))
    assert evaluation == {"step": 2, "eval_loss": 1.5, "eval_perplexity": 4.48, "eval_bits_per_byte": 2.1}


def test_a_resumed_run_has_one_line_a_step_and_time_goes_on(tmp_path, clock):
    path = tmp_path / "m.jsonl"
    report = Metrics(path, CFG, 258)
    for step in range(1, 8):
        clock.now += 1
        log(report, [step])
    report = Metrics(path, CFG, 258, resumed_step=5)
    clock.now += 1
    log(report, range(6, 10))
    report.close()
    lines = MetricsFile(path).read()
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["seconds"] for line in lines[3:6]] == [4.0, 5.0, 6.0]


def test_the_first_line_shown_names_the_peak_that_mfu_is_a_share_of(tmp_path, capsys):
    Metrics(tmp_path / "m.jsonl", CFG, 258).close()
    wanted = "mfu        a share of 1 TFLOP/s on each of 8 devices (float32, data sheet)"
    assert wanted in capsys.readouterr().err


def test_samples_of_later_steps_are_dropped_on_a_resume(tmp_path):
    for resumed, steps in ((0, (10, 20)), (10, (30,))):
        report = Metrics(tmp_path / "m.jsonl", CFG, 258, resumed_step=resumed)
        for step in steps:
            report.log_sample(step, "Once", f" at {step}")
        report.close()
    kept = MetricsFile(tmp_path / "samples.jsonl").read()
    assert kept == [{"step": step, "prompt": "Once", "text": f" at {step}"} for step in (10, 30)]
