"""Reports of a run while it trains: metrics.jsonl, sinks, tokens/s and MFU, which the progress bar shows."""

import collections
import contextlib
import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gptjax.config import TrainConfig
from gptjax.config.section import leaves
from gptjax.model.counts import flops_per_token
from gptjax.runtime.hardware import describe_devices
from gptjax.runtime.peaks import MEASURED, keep_peak, peak_flops
from gptjax.runtime.status import entry, status, write_line
from gptjax.training.metrics_file import MetricsFile, number
from gptjax.training.progress import ProgressBar
from gptjax.training.sinks import Sinks

FIRST_KEYS = ("step", "updates", "loss", "tokens", "tokens_per_second", "learning_rate", "grad_norm")
CONVENTIONS = ("6n", "causal", "palm")


class Throughput:
    """Tokens/s and MFU (Chowdhery et al. 2022) over the last steps, whatever is no training left out.

    `flops` gives the FLOPs of a token by convention, `peak` the FLOP/s of all devices together. A measured peak comes
    with `keep`: what training reaches beyond it is the peak from then on, and is kept by keep(peak).
    """

    WINDOW = 20  # steps that a rate is taken over
    STEADY = 5  # and may raise a measured peak: the first steps may seem short, whose reports came late

    def __init__(
        self, tokens_a_step: int, flops: dict[str, float], peak: float, keep: Callable[[float], None] | None = None
    ):
        self._tokens, self._flops, self._peak, self._keep = tokens_a_step, flops, peak, keep
        self._laps: collections.deque[float] = collections.deque(maxlen=self.WINDOW)
        self._last: float | None = None

    def lap(self) -> None:
        """Counts a step that is done. The first lap only starts the clock, so that compilation is not counted."""
        now = time.perf_counter()
        if self._last is not None:
            self._laps.append(now - self._last)
        self._last = now

    def skip(self) -> None:
        """Leaves the time since the last lap out, for it went into something else."""
        self._last = None

    def rates(self) -> dict[str, float | None]:
        """tokens_per_second, mfu_6n, mfu_causal and mfu_palm; None before there are two laps."""
        # The median, so that a step which also waited for a checkpoint does not count as slow training.
        rate = self._tokens / max(statistics.median(self._laps), 1e-9) if self._laps else None
        known = 0.0 if rate is None or (self._keep and len(self._laps) < self.STEADY) else rate
        # The products that are needed ("causal") were made; PaLM's count has some that never are.
        if self._keep and known * self._flops["causal"] > self._peak:
            self._peak = known * self._flops["causal"]
            self._keep(self._peak)
        mfu = {f"mfu_{c}": known * self._flops[c] / self._peak if known else None for c in CONVENTIONS}
        return {"tokens_per_second": rate, **mfu}

    def seconds(self, steps: int) -> float | None:
        """Seconds that so many steps take; None before there are two laps."""
        return steps * sum(self._laps) / len(self._laps) if self._laps else None


class Metrics:
    """All reports of a training run; in processes other than the first it does nothing.

    `path` is metrics.jsonl, in the run's folder, beside which samples.jsonl has the texts of evaluations.
    `resumed_step` is the step restored (0 for a new run): later lines are dropped. Step s is the s-th batch, so the
    first line says step 1. Call `log_step(s)` before saving step s, or a kill right after the save leaves the file
    without that line. A step trains on `rows` rows of data.length tokens (0: data.batch_size), with the products of
    `passes` forward passes: three where all weights are trained, as the conventions of MFU have it. A row has so many
    `images` on average.
    """

    def __init__(
        self,
        path: Path,
        cfg: TrainConfig,
        vocab_size: int,
        resumed_step: int = 0,
        rows: int = 0,
        passes: float = 3.0,
        images: float = 0,
    ):
        self.file, self._samples = MetricsFile(path), MetricsFile(path.with_name("samples.jsonl"))
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._cfg = cfg
        last = self.file.truncate_after(resumed_step)
        if last and not resumed_step:
            write_line(f"no checkpoint of this run is there: it had come to step {last}, and begins again")
        if resumed_step and not last:
            write_line(f"{path} is not there: its curves begin after step {resumed_step}")
        self._samples.truncate_after(resumed_step)
        lines = self.file.read()
        self._seconds_before = max((line.get("seconds", 0.0) for line in lines), default=0.0)
        self._start = time.perf_counter()
        devices = describe_devices()
        with status("measuring the device's peak"):  # where it isn't known yet
            peak, source = peak_flops(cfg.model.dtype)
        self._tokens_a_step = (rows or cfg.data.batch_size) * cfg.data.length
        counted = flops_per_token(cfg.model, vocab_size, cfg.data.length, images)
        flops = {convention: x * passes / 3 for convention, x in counted.items()}
        keep = functools.partial(self._keep_peak, devices["count"]) if source == MEASURED else None
        self._throughput = Throughput(self._tokens_a_step, flops, devices["count"] * peak, keep)
        each = "" if devices["count"] == 1 else f" on each of {devices['count']} devices"
        write_line(entry("mfu", f"a share of {peak / 1e12:.4g} TFLOP/s{each} ({cfg.model.dtype}, {source})"))
        self.progress = ProgressBar(cfg.steps, resumed_step, cfg.log_every)
        self._sinks = Sinks(cfg.sinks, path.parent, dict(leaves(cfg)), resumed_step, self.progress.note)

    def _keep_peak(self, devices: int, peak: float) -> None:
        keep_peak(self._cfg.model.dtype, peak / devices)

    def log_step(self, step: int, metrics: dict[str, Any]) -> None:
        """Reports a training step: `loss`, `learning_rate`, `grad_norm`, `updates` and whatever else is in `metrics`.

        `tokens`, the total trained on so far, is rows x length x step unless `metrics` says otherwise. Rates
        are null in the line of the first step after a start, which holds the compilation. What is named ..._N has one
        number a layer, and is written as ..._by_layer every log_norms_every steps.
        """
        if not self._active:
            return
        self._throughput.lap()
        stacks = {name for name, value in metrics.items() if name.endswith("_N") and getattr(value, "ndim", 0)}
        layers = {name.removesuffix("_N"): metrics[name] for name in stacks}
        metrics = {name: value for name, value in metrics.items() if name not in stacks}
        known = {"step": step, "updates": step, "tokens": step * self._tokens_a_step, **metrics}
        known = {k: number(v) for k, v in known.items()} | self._throughput.rates()
        line = {k: known[k] for k in FIRST_KEYS if k in known} | known
        line["seconds"] = round(self._seconds_before + time.perf_counter() - self._start, 3)
        line["peak_memory_bytes"] = peak_memory()
        every = self._cfg.log_norms_every
        if layers and every and (step % every == 0 or step == 1):
            line |= {f"{name}_by_layer": [float(x) for x in values] for name, values in layers.items()}
        self.file.write(line)
        self.progress.step(line, self._throughput.seconds(self._cfg.steps - step))
        if step % self._cfg.log_every == 0 or step == 1:
            self._sinks.scalars(step, "train", line)

    def log_evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """Reports an evaluation: `eval_loss`, `eval_perplexity`, `eval_bits_per_byte`."""
        if not self._active:
            return
        self._throughput.skip()
        line = {"step": step} | {k: number(v) for k, v in metrics.items()}
        self.file.write(line)
        shown = (f"{k.removeprefix('eval_').replace('_', ' ')} {v:.4f}" for k, v in line.items() if type(v) is float)
        self.progress.note(f"step {step}  evaluation: {'  '.join(shown)}")
        self._sinks.scalars(step, "validation", line)

    def log_sample(self, step: int, prompt: str, text: str, **more: Any) -> None:
        """Keeps a continuation of a prompt by the model of a step, with numbers such as its reward."""
        if self._active:
            self._samples.write({"step": step, "prompt": prompt, "text": text, **more})
            self._sinks.text(step, "sample", prompt + text)

    def status(self, text: str) -> contextlib.AbstractContextManager[None]:
        """Says on the screen what is being done meanwhile."""
        return self.progress.status(text) if self._active else contextlib.nullcontext()

    def close(self) -> None:
        if not self._active:
            return
        self.progress.close()
        self.file.close()
        self._samples.close()
        self._sinks.close()


def peak_memory() -> int:
    """The most bytes that a device of this process has held so far; on a CPU, which does not count, the process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    most = max((s.get("peak_bytes_in_use", 0) for s in stats), default=0)
    return most or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
