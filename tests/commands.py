"""Commands as processes or in this one: how they start, end and are refused."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from gptjax.cli import main

GPTJAX = [sys.executable, "-m", "gptjax"]


def environment(cache: Path, **variables: str) -> dict[str, str]:
    """The variables of a run that is started here: one CPU device, this source tree, and a cache of its own."""
    tree = str(Path(__file__).parent.parent)
    own = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": tree, "XDG_CACHE_HOME": str(cache)}
    return os.environ | own | variables


def start(command: list, **settings) -> subprocess.Popen:
    """Starts a command, for `finish`; the settings are Popen's."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes | settings)


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    """The exit code and stderr of a process, which may take so long."""
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, errors


def kill_group(process: subprocess.Popen) -> bool:
    """Kills a process, the leader of a session, with all that it started; False where it had ended before."""
    runs = process.poll() is None
    if runs:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return runs


def pretrain(run: Path | str, text: Path, settings: str, *more: str) -> subprocess.Popen:
    """Starts a training run on a text, whose compile cache lies beside it."""
    command = [*GPTJAX, "pretrain", "shakespeare_char", "--run-dir", str(run), "--data.source", str(text)]
    return start([*command, *settings.split(), *more], env=environment(text.parent / "cache"))


def curve(metrics: bytes) -> list[tuple]:
    """Every training and evaluation line of a metrics.jsonl, without what a clock says."""
    kept = ("step", "updates", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_bits_per_byte")
    return [tuple(json.loads(line).get(k) for k in kept) for line in metrics.splitlines()]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def said(capsys, *args) -> str:
    """What a command that is right prints."""
    capsys.readouterr()
    assert main([str(a) for a in args]) == 0
    return capsys.readouterr().out


def refused(capsys, *args) -> str:
    """The one line by which a command is refused, with exit code 2."""
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    return err
