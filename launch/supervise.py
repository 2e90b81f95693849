"""Runs a command, and again where it was interrupted, lost a peer or was killed, for as long as its run gets on.

    python launch/supervise.py [options] -- gptjax pretrain configs/gpt2.py --run-dir runs/gpt2

It imports no jax, so that it starts anywhere and outlives what befalls the command. A command that
ends with one of --restart-on is started again, after a pause that doubles; any other code is returned as it is. The
newest checkpoint of the run (before there is one: the last step in metrics.jsonl) says whether it got on: after
--crashes ends in a row without a newer one, it gives up and returns the last code. Of a run in a bucket the command's
own gptjax is asked; where it can't tell (the store may be down), the end does not count, and the longest pause
follows. SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 are passed on, and after one of the first three nothing is
started again.

The command has a process group of its own, so that Ctrl-C reaches it once, and what it left behind is ended with it.
Codes: the command's; 128 + N where signal N ended it; 2 for bad arguments; 127 where it can't be started.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, where gptjax is not installed

from gptjax.runtime.restart import MOST_IN_VAIN, RESTART_ON, exit_code, pause_before

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PASSED_ON = (*ENDING, signal.SIGUSR1, signal.SIGUSR2)
USAGE = "python launch/supervise.py [options] -- COMMAND --run-dir RUN"


class Child:
    """The command, run again and again, and the signals on their way to it."""

    def __init__(self, command: list[str]):
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._signals: list[int] = []
        self.to_end = False

    def run(self) -> int:
        """Runs the command to its end and returns its code as a shell would."""
        self._process = process = subprocess.Popen(self._command, process_group=0)
        self._deliver()
        code = process.wait()
        self._process = None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that outlived it would keep memory and devices
        return exit_code(code)

    def receive(self, number: int, frame: object) -> None:
        """A handler of signals: what comes while nothing runs waits for the next start, or prevents it."""
        self.to_end |= number in ENDING
        self._signals.append(number)
        self._deliver()

    def _deliver(self) -> None:
        while self._process is not None and self._signals:
            number = self._signals.pop(0)
            # A terminal that was closed is a reason to save, and SIGTERM is how one asks for that.
            self._process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)


def supervise(
    child: Child, look: Callable[[], tuple[int, int] | None], restart_on: tuple[int, ...], crashes: int, pause: float,
    longest: float,
) -> int:  # fmt: skip
    """Runs the child until its code is not one to restart on, it was asked to end, or it no longer gets on.

    `look` gives the progress of its run; None where that can't be seen now.
    """
    reached, in_vain = look() or (0, 0), 0
    while True:
        code = child.run()
        if code not in restart_on or child.to_end:
            return code
        now = look()
        if now is not None:
            in_vain = 0 if now > reached else in_vain + 1
            reached = max(now, reached)
        if in_vain >= crashes:
            say(f"ended with {code}; {in_vain} ends in a row without progress ({told(reached)}): giving up")
            return code
        seconds = longest if now is None else pause_before(in_vain, pause, longest)
        say(f"ended with {code} ({told(reached)}); without progress: {in_vain} of {crashes}; next in {seconds:g} s")
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
            if child.to_end:
                return code


def progress(run: str, gptjax: list[str]) -> tuple[int, int] | None:
    """(newest checkpoint, last step in metrics.jsonl), the second only while there is no checkpoint, 0 for neither.

    Of a run in a bucket the command `gptjax` says it; None where it fails.
    """
    if "://" in run:
        return _progress_in_bucket(run, gptjax)
    saved = Path(run).glob("checkpoints/*/manifest.json")
    newest = max((int(path.parent.name) for path in saved if path.parent.name.isdecimal()), default=0)
    return (newest, 0) if newest else (0, _last_step(Path(run) / "metrics.jsonl"))


def _progress_in_bucket(run: str, gptjax: list[str]) -> tuple[int, int] | None:
    command = [*gptjax, "checkpoint", "list", run]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except (OSError, subprocess.TimeoutExpired) as e:
        say(f"{run}: its progress can't be seen ({e})")
        return None
    if done.returncode not in (0, 2):  # 2: there is no such run yet
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        say(f"{run}: its progress can't be seen ({' '.join(command)} ended with {done.returncode}: {last})")
        return None
    return max((int(step) for step in re.findall(r"^step (\d+)", done.stdout, re.MULTILINE)), default=0), 0


def _last_step(metrics: Path) -> int:
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 65536))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the line that a killed process did not finish
            return int(json.loads(line)["step"])
    return 0


def told(reached: tuple[int, int]) -> str:
    saved, logged = reached
    return f"newest checkpoint: step {saved}" if saved else f"no checkpoint yet, last step {logged}"


def say(line: str) -> None:
    print(f"supervise: {line}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    cut = argv.index("--") if "--" in argv else len(argv)
    options, command = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(usage=USAGE, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run-dir", help="the run's folder; found in the command where that says --run-dir")
    parser.add_argument("--restart-on", default=",".join(map(str, RESTART_ON)), help="codes; default %(default)s")
    parser.add_argument(
        "--crashes", type=int, default=MOST_IN_VAIN, help="ends in a row without progress; default %(default)s"
    )
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before a restart; default %(default)s")
    parser.add_argument("--longest-pause", type=float, default=300.0, help="in seconds; default %(default)s")
    args = parser.parse_args(options)
    run = args.run_dir or _run_dir(command)
    if not command:
        parser.error("the command is missing; wanted it after --")
    if not run:
        parser.error("no run folder, so progress can't be seen; give --run-dir RUN before -- or in the command")
    if not re.fullmatch(r"\d+(,\d+)*", args.restart_on):
        parser.error(f"--restart-on: got {args.restart_on!r}; wanted codes and commas, e.g. 75,134,137")
    if args.crashes < 1 or args.pause < 0 or args.longest_pause < 0:
        parser.error("--crashes must be 1 or more, and no pause below 0")
    child = Child(command)
    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it for SIGHUP
            signal.signal(number, child.receive)
    codes = tuple(int(code) for code in args.restart_on.split(","))
    try:
        gptjax = _gptjax(command)
        return supervise(child, lambda: progress(run, gptjax), codes, args.crashes, args.pause, args.longest_pause)
    except OSError as e:
        say(f"{command[0]} can't be started ({e.strerror}); is it installed, and is its environment active?")
        return 127


def _gptjax(command: list[str]) -> list[str]:
    """How the command calls gptjax, without what launches it (srun, mpirun): GPTJAX, or PYTHON -m gptjax."""
    before = command[: command.index("pretrain")] if "pretrain" in command else ["gptjax"]
    return before[-3:] if before[-2:] == ["-m", "gptjax"] else before[-1:]


def _run_dir(command: list[str]) -> str:
    """The run's folder as the command names it, by the last --run-dir; empty where it does not."""
    found = ""
    for word, following in zip(command, [*command[1:], ""]):
        name, equals, value = word.partition("=")
        if name in ("--run-dir", "--run_dir"):
            found = value if equals else following
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
