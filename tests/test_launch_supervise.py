"""The supervisor starts a command again as long as its run gets on, passes signals on, and returns every other code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
from commands import finish

SUPERVISE = Path(__file__).parent.parent / "launch" / "supervise.py"

# Each start does the next thing of its script: a number ends it with that code, "+N" saves the checkpoint of step N,
# "=N" logs step N, "wait" sleeps until a signal, which is written down, and ends with 75 as gptjax does.
CHILD = """
import os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1])
starts = run / "starts"
number = int(starts.read_text()) if starts.exists() else 0
starts.write_text(str(number + 1))
for word in sys.argv[2].split(",")[number].split():
    if word[0] == "+":
        (run / "checkpoints" / word[1:].zfill(8)).mkdir(parents=True)
        (run / "checkpoints" / word[1:].zfill(8) / "manifest.json").write_text("{}")
    elif word[0] == "=":
        with open(run / "metrics.jsonl", "w") as file:
            file.write('{"step": %s, "loss": 1.0}\\n{"step": 9' % word[1:])
    elif word == "wait":
        def stop(received, frame):
            with open(run / "signals", "a") as file:
                file.write(f"{received}\\n")
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(name, stop)
        (run / "waiting").write_text("")
        while not (run / "signals").exists():
            time.sleep(0.01)
        time.sleep(0.3)  # a signal that came twice would be seen
        sys.exit(75)
    elif word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "leave":
        if os.fork() == 0:
            (run / "left").write_text(str(os.getpid()))
            time.sleep(60)
    else:
        sys.exit(int(word))
"""


# Undoes what nohup and a shell's background leave to their children; the supervisor itself honours it.
HEED = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start(run: Path, script: str, *options: str, **settings) -> subprocess.Popen:
    command = [sys.executable, "-c", HEED, SUPERVISE, "--run-dir", run, "--pause", "0.01", *options]
    command += ["--", sys.executable, "-c", CHILD, run, script]
    return commands.start(command, **settings)


def starts(run: Path) -> int:
    return int((run / "starts").read_text())


@pytest.mark.parametrize("code", [0, 1, 2, 3, 139])
def test_any_other_code_is_returned_at_once(tmp_path, code):
    assert finish(start(tmp_path, str(code))) == (code, "")
    assert starts(tmp_path) == 1


# The script and --crashes; the code that is returned, after how many starts, and what is said.
RESTARTS = {
    "what was interrupted, aborted or killed is started again":
        ("+5 75,+10 134,+15 137,+20 kill,0", 5, 0, 5, "ended with 137 (newest checkpoint: step 20)"),
    "crashes without progress are given up with the last code":
        ("+5 137,137,134,+6 137,137,134,kill,0", 3, 137, 7,
         "3 ends in a row without progress (newest checkpoint: step 6): giving up"),
    "interruptions without progress are no endless loop": ("75,75,0", 2, 75, 2, "giving up"),
    "before the first checkpoint the last logged step is the progress":
        ("=3 137,=3 137,=7 137,=7 137,=7 137,0", 2, 137, 5, "no checkpoint yet, last step 7"),
    "the first checkpoint is progress, though more steps were logged": ("=7 137,+4 137,137,0", 2, 0, 4, "step 4"),
}  # fmt: skip


@pytest.mark.parametrize("script, crashes, code, times, says", RESTARTS.values(), ids=RESTARTS)
def test_a_command_is_started_again_as_long_as_its_run_gets_on(tmp_path, script, crashes, code, times, says):
    found, errors = finish(start(tmp_path, script, "--crashes", str(crashes)))
    assert (found, starts(tmp_path)) == (code, times) and says in errors, errors


# Its gptjax: `checkpoint list` tells what the file says, or ends with its code; every other verb ends with 137.
GPTJAX = """#!/usr/bin/env bash
cd "$(dirname "$0")"
if [ "$1" = checkpoint ]; then
  answer=$(head -n 1 answers); sed -i 1d answers
  case $answer in step*) echo "$answer  3 MB"; exit ;; *) echo "no answer" >&2; exit "$answer" ;; esac
fi
echo "$*" >>told
exit 137
"""


@pytest.mark.parametrize(
    ("answers", "starts", "says"),
    [
        (["2", "2", "2"], 2, "no checkpoint yet"),
        (["step 5", "step 6", "step 6", "step 6"], 3, "newest checkpoint: step 6"),
        (["step 5", "75", "1", "step 5", "75", "step 5"], 5, "checkpoint list s3://b/run ended with 75: no answer"),
    ],
)
def test_the_gptjax_of_the_command_tells_the_progress_of_a_run_in_a_bucket(tmp_path, answers, starts, says):
    (tmp_path / "answers").write_text("\n".join(answers) + "\n")
    (tmp_path / "gptjax").write_text(GPTJAX)
    (tmp_path / "gptjax").chmod(0o755)
    command = [sys.executable, SUPERVISE, "--pause", "0.01", "--longest-pause", "0.02", "--crashes", "2", "--", "env"]
    command += [tmp_path / "gptjax", "pretrain", "x", "--run-dir", "s3://b/run"]
    code, errors = finish(commands.start(command))
    assert code == 137 and says in errors, errors
    assert (tmp_path / "told").read_text() == "pretrain x --run-dir s3://b/run\n" * starts, "unknown does not count"


def test_pauses_double_until_the_longest_and_begin_anew_with_progress(tmp_path):
    script, options = "137,137,137,+1 137,0", ("--crashes", "5", "--pause", "0.1", "--longest-pause", "0.3")
    code, errors = finish(start(tmp_path, script, *options))
    assert code == 0
    assert [line.split("next in ")[1] for line in errors.splitlines()] == ["0.1 s", "0.2 s", "0.3 s", "0.1 s"]


@pytest.mark.parametrize(
    "sent, received", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGHUP", "SIGTERM"), ("SIGUSR1", "SIGUSR1")]
)
def test_signals_reach_the_command_once_and_an_end_that_was_asked_for_is_the_end(tmp_path, sent, received):
    process = start(tmp_path, "wait,0", process_group=0)
    wait_for(tmp_path / "waiting")
    os.killpg(process.pid, signal.Signals[sent])  # as a terminal sends Ctrl-C: to the whole group
    code, errors = finish(process)
    assert (tmp_path / "signals").read_text().split() == [str(int(signal.Signals[received]))], errors
    if sent == "SIGUSR1":
        assert (code, starts(tmp_path)) == (0, 2)  # no wish to end, so it was started again
    else:
        assert (code, starts(tmp_path), errors) == (75, 1, "")


def test_a_signal_during_a_pause_ends_it(tmp_path):
    process = start(tmp_path, "137,0", "--pause", "60")
    assert process.stderr is not None and "next in 60 s" in process.stderr.readline()
    process.terminate()
    assert process.wait(timeout=10) == 137
    process.stderr.close()
    assert starts(tmp_path) == 1


def test_what_the_command_left_behind_is_ended_with_it(tmp_path):
    assert finish(start(tmp_path, "leave 3"))[0] == 3
    left = int((tmp_path / "left").read_text())
    for _ in range(100):
        state = Path(f"/proc/{left}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("a worker outlived the command")


@pytest.mark.parametrize(
    "arguments, code, told",
    [
        ("", 2, "the command is missing"),
        ("--run-dir x", 2, "the command is missing"),
        ("-- true", 2, "no run folder"),
        ("--restart-on many --run-dir x -- true", 2, "--restart-on: got 'many'"),
        ("--crashes 0 -- true --run-dir x", 2, "--crashes must be 1 or more"),
        ("-- no-such-command --run-dir=x", 127, "no-such-command can't be started"),
    ],
)
def test_bad_arguments_and_a_command_that_is_not_there_are_told(tmp_path, arguments, code, told):
    found, errors = finish(commands.start([sys.executable, SUPERVISE, *arguments.split()], cwd=tmp_path))
    assert found == code and told in errors, errors


def test_the_supervisor_needs_the_standard_library_alone():
    assert finish(commands.start([sys.executable, "-I", "-S", SUPERVISE, "--help"]))[0] == 0


def wait_for(path: Path) -> None:
    until = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} did not appear"
        time.sleep(0.01)
