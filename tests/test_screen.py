"""The screen of a run: what is trained, a bar and its history, whatever the terminal's width; every wait is told."""

import contextlib
import dataclasses
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import jax
import pytest
from commands import GPTJAX, environment
from shipped import recipe

from gptjax.config import TrainConfig
from gptjax.ops.device import device
from gptjax.runtime import hardware
from gptjax.runtime.status import entry, status, write_line
from gptjax.stages.summary import describe_memory, short, summarize
from gptjax.training.build import build_components
from gptjax.training.memory import count_memory

SMALL = """pretrain quickstart --model.num-layers 1 --model.width 32 --model.num-heads 2 --data.length 32
--data.batch-size 8 --steps 25 --evaluate.every 20 --evaluate.max-rows 512 --optim.warmup-steps 1
--generate.max-new-tokens 5 --tokenizer.kind bytes --tokenizer.vocab-size 258 --run-dir run""".split()


def frames_on_a_terminal(command: list, columns: int, folder: Path, cache: Path) -> list[str]:
    """Every line as a terminal of so many columns showed it, also those that were overwritten."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, columns, 0, 0))
    settings = {"env": environment(cache, TERM="xterm-256color"), "cwd": folder}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, **settings)
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while piece := os.read(ours, 4096):
            printed += piece
    os.close(ours)
    assert process.wait() == 0, printed.decode()
    return [re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", frame) for frame in re.split(r"[\r\n]+", printed.decode())]


@pytest.mark.parametrize("columns", [80, 120])
def test_a_run_fits_its_terminal_and_says_what_is_trained_and_what_it_does(columns, tmp_path, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "screen-cache"
    frames = frames_on_a_terminal([*GPTJAX, *SMALL], columns, tmp_path, cache)
    sample = frames.index("sample of 5 tokens:")
    assert max(len(frame) for frame in frames[:sample]) <= columns
    header = " ".join(frames[:sample])
    for said in ("20.9k parameters: 1 layers x 32, 2 heads", "8 rows of 32 = 256 tokens; 25 steps", "adamw", "dtype ",
                 "run/report.html, and by tensorboard", "attention  plain", "memory     about ",
                 "tokens to train on", "epochs", "importing jax ..."):  # fmt: skip
        assert said in header, said
    bars = [frame for frame in frames if re.match(r"\d+/25 \|", frame)]
    full = [bar for bar in bars if "left" in bar]
    assert full and all(re.search(r"\| loss [\d.]+  [\d,]+ tokens/s .*\d+s left *$", bar) for bar in full)
    assert all(len(bar.split("|")[1]) >= 10 for bar in full)
    assert any(bar.startswith("25/25") and "evaluating ..." in bar for bar in bars), "the last evaluation is told"
    history = [frame for frame in frames if frame.startswith("step ")]
    numbers = [line.split()[1] for line in history]
    assert numbers == ["1/25", "10/25", "20/25", "20", "25/25", "25"]
    assert frames[-3].startswith("run folder: ") and frames[-2].startswith("next: gptjax generate")


HELD_BACK = """
import sys, threading
def trace(frame, event, arg):
    if frame.f_globals.get("__name__") == "jax":
        sys.settrace(None)
        __import__("time").sleep(3)
        __import__("os")._exit(5)
sys.settrace(trace)
from gptjax.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_what_is_trained_is_printed_before_jax_is_imported_and_the_wait_has_a_word(tmp_path):
    code = [sys.executable, "-c", HELD_BACK, *SMALL]
    done = subprocess.run(code, capture_output=True, text=True, cwd=tmp_path, env=environment(tmp_path))
    assert done.returncode == 5, done.stderr
    assert "20.9k parameters" in done.stderr and done.stderr.endswith("importing jax ...\n")


def test_a_wait_is_told_once_in_a_log_and_a_short_one_not_at_all(monkeypatch, capsys):
    monkeypatch.setattr("gptjax.runtime.status.SILENT_SECONDS", 0.05)
    with status("short"):
        pass
    with status("long"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "long ...\n"
    assert not [thread for thread in threading.enumerate() if thread.name == "status"]


def test_a_long_wait_in_a_log_is_told_again_each_time_it_has_doubled(monkeypatch, capsys):
    monkeypatch.setattr("gptjax.runtime.status.SILENT_SECONDS", 0.02)
    monkeypatch.setattr("gptjax.runtime.status.AGAIN_SECONDS", 0.4)
    with status("long"):
        time.sleep(1.2)
    assert capsys.readouterr().err == "long ...\nlong (0 s) ...\nlong (1 s) ...\n"


def test_a_wait_on_a_terminal_ticks_and_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(sys, "stderr", out := io.StringIO())
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("gptjax.runtime.status.TICK_SECONDS", 0.05)
    with status("compiling"):
        time.sleep(1.2)
        write_line("a line")
        time.sleep(0.1)
    shown = out.getvalue()
    assert "compiling ..." in shown and "compiling ... 1 s" in shown and shown.endswith("\r\x1b[K")
    assert "\r\x1b[Ka line\n" in shown
    wide = entry("label", "word " * 30)
    assert max(map(len, wide.splitlines())) <= 60 and all(
        line[:11].strip() in ("label", "") for line in wide.splitlines()
    )


def test_the_summary_tells_the_schedule_and_the_source_of_the_type():
    lines = "\n".join(summarize(TrainConfig(), {"model.dtype": "command line"}))
    assert "bfloat16, as the command line says" in lines
    assert "adamw, learning rate 0.0006 after 100 steps, then a cosine to 6e-05; weight decay 0.1" in lines
    assert [short(n) for n in (12, 21_700, 2_560_000, 124_400_000, 8_030_000_000)] == [
        "12", "21.7k", "2.56M", "124M", "8.03B"
    ]  # fmt: skip


def test_too_little_memory_is_a_warning_with_settings_that_fit(monkeypatch):
    config = recipe("gpt2 --size 124m")
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    shapes = jax.eval_shape(build_components(config).init, 0)
    monkeypatch.setattr(hardware, "host_memory", lambda: (0, 8 * 1000 * 2**30))
    assert "WARNING" not in describe_memory(config, shapes, sizes)
    monkeypatch.setattr(hardware, "host_memory", lambda: (0, 8 * 16 * 2**30))  # for each of 8 devices
    told = describe_memory(config, shapes, sizes)
    found = re.search(
        r"WARNING: .*which has 16.0 GiB; this would fit: --model.remat (\w+) --optim.accumulate (\d+)$", told
    )
    assert found, told
    fits = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=found[1]),
        optim=dataclasses.replace(config.optim, accumulate=int(found[2])),
    )
    assert count_memory(fits, shapes, sizes, device()) < 16 * 2**30 < count_memory(config, shapes, sizes, device())
    monkeypatch.setattr(hardware, "host_memory", lambda: (0, 8 * 2**20))
    assert describe_memory(config, shapes, sizes).endswith("see gptjax plan")
