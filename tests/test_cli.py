"""The command line as its user meets it: help, the small life of a run, and bad input in one line with exit code 2."""

import ast
import contextlib
import fcntl
import functools
import gzip
import os
import pty
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gptjax import cli
from gptjax.cli import VERBS, main
from gptjax.config import TrainConfig
from gptjax.runs.run import Run
from gptjax.training.metrics_file import MetricsFile

SMALL = """--model.num-layers 1 --model.width 32 --model.num-heads 2 --data.length 32 --data.batch-size 8 --steps 3
--evaluate.max-rows 4 --optim.warmup-steps 1 --generate.max-new-tokens 5""".split()
BYTES = "--tokenizer.kind bytes --tokenizer.vocab-size 258".split()
PIECES = "--tokenizer.kind sentencepiece --tokenizer.vocab-size 300".split()
GPTJAX = (sys.executable, "-m", "gptjax")
COLOURS = {**os.environ, "TERM": "xterm-256color"}
pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(
        "It was the best of times, it was the worst of times; \u00e6on, na\u00efve.\n" * 60, encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory, compile_cache):
    """A run of three steps on bytes."""
    folder = tmp_path_factory.mktemp("runs") / "it's small"
    run_verb("pretrain", "shakespeare_char", *SMALL, "--data.source", text, "--run-dir", folder)
    return folder


def refusal(capsys, *args) -> str:
    """The one line that bad input gets."""
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    out, err = capsys.readouterr()
    # What is to be trained, and what went well before; of the error one line, the last.
    told = ("gptjax 0", "model ", "batch ", "optimizer ", "dtype ", "curves ", "attention ", "memory ", "preparing ",
            "data ", "resumed", "warning")  # fmt: skip
    lines = [line for line in err.splitlines() if not line.startswith(told) and not line.endswith(" ...")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("gptjax: "), err
    assert err.endswith(lines[0] + "\n")
    return lines[0]


def run_verb(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def pretrain(text, folder, *more) -> list:
    return ["pretrain", "shakespeare_char", *SMALL, "--no-sample", "--data.source", text, "--run-dir", folder, *more]


def test_a_run_is_trained_read_and_continued(run, capsys):
    lines = MetricsFile(run / "metrics.jsonl").read()
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert {"step", "loss", "tokens", "tokens_per_second"} <= set(lines[0])
    assert {"eval_loss", "eval_bits_per_byte"} <= set(lines[-1])
    capsys.readouterr()
    run_verb("eval", run, "--max-rows", 4)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(printed["eval_loss"]) == pytest.approx(lines[-1]["eval_loss"], rel=1e-5)
    run_verb("data", "show", run, "--step", 2)
    shown = capsys.readouterr().out
    assert "batch of 8 rows of 32" in shown and "times" in shown
    run_verb("checkpoint", "list", run)
    assert "step 3" in capsys.readouterr().out
    run_verb("checkpoint", "verify", run)
    assert "step 3: sound" in capsys.readouterr().out


def test_generate_prints_the_text_alone_and_a_seed_repeats_it(run, capsys):
    texts = []
    for seed in (1, 1, 2):
        capsys.readouterr()
        run_verb("generate", run, "--prompt", "It was", "--max-new-tokens", 12, "--seed", seed)
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("It was") and texts[0] == texts[1] != texts[2]


def test_every_next_command_can_be_pasted_into_a_shell(run, text, tmp_path, capsys):
    def following(*words: object) -> list[str]:
        capsys.readouterr()
        run_verb(*words)
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("next: "))
        return shlex.split(line.removeprefix("next: "))

    out, model = str(tmp_path / "it's $mine"), tmp_path / "to ken" / "tokenizer.model"
    trained = ["gptjax", "pretrain", "quickstart", "--data.source", out, "--run-dir", "runs/NAME"]
    assert following("prepare", "--source", text, "--out", out, *BYTES) == trained
    assert following("data", "verify", out) == trained
    prepared = ["gptjax", "prepare", "--source", str(text), "--out", "FOLDER", "--tokenizer.vocab-size", "300"]
    prepared += ["--tokenizer.path", str(model)]
    assert following("tokenizer", "train", "--source", text, "--out", model.parent, "--vocab-size", 300) == prepared
    run = str(run)
    assert following("data", "show", run) == ["gptjax", "data", "show", run, "--step", "2"]
    assert following("checkpoint", "list", run) == ["gptjax", "checkpoint", "verify", run]
    assert following("checkpoint", "verify", run) == ["gptjax", "eval", run]
    assert following("eval", run, "--max-rows", 4) == ["gptjax", "generate", run]
    again = ["gptjax", "generate", run, "--prompt", "it's", "we", "--seed", "1"]
    assert following("generate", run, "--prompt", "it's", "we", "--max-new-tokens", 2) == again
    more = [*SMALL[:-2], "--no-sample", "--data.source", text, "--run-dir", run, "--generate.prompt", 'say "a"']
    assert following("pretrain", "shakespeare_char", *more) == ["gptjax", "generate", run, "--prompt", 'say "a"']
    for call in ast.walk(ast.parse(Path(cli.__file__).read_text())):  # of the others: one argument is one word
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "_next":
            texts = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            assert not any(" " in text for text in texts), texts


def test_a_prepared_folder_and_a_trained_tokenizer_are_sources(text, tmp_path, capsys):
    tokenizer, corpus = tmp_path / "tokenizer", tmp_path / "corpus"
    run_verb("tokenizer", "train", "--source", text, "--out", tokenizer, "--vocab-size", 300)
    settings = ("--tokenizer.vocab-size", 300, "--tokenizer.path", tokenizer / "tokenizer.model")
    run_verb("prepare", "--source", text, "--out", corpus, *settings)
    run_verb("data", "verify", corpus)
    run_verb(*pretrain(corpus, tmp_path / "run", *PIECES))
    assert not (tmp_path / "run" / "data").exists()
    line = refusal(capsys, *pretrain(corpus, tmp_path / "other", "--tokenizer.vocab-size", "258"))
    assert f"tokenizer.vocab_size=258, but {corpus} was prepared with 300; leave it out" in line


def test_settings_that_are_wrong_are_refused(text, tmp_path, capsys):
    def said(*more):
        return refusal(capsys, *pretrain(text, tmp_path / "run", *more))

    assert "did you mean --model.width?" in said("--model.widht", "64")
    assert "did you mean --optim.learning-rate?" in said("--lr", "1e-3")
    assert "did you mean --steps?" in said("--max_iters", "9")
    assert "the same command, run again, goes on" in said("--resume")
    assert "mesh.tensor=3" in said("--mesh.tensor", "3") and "8 device(s)" in said("--mesh.tensor", "3")
    assert "data.batch_size=6 does not divide over mesh.data x mesh.fsdp = 8" in said("--data.batch-size", "6")
    assert "data.batch_size=8 does not divide" in said("--optim.accumulate", "2")
    assert "wanted more than one row" in said("--data.length", "100000")


def on_a_terminal(*words: str) -> tuple[int, str]:
    """The exit code of a command whose output is a terminal of 80 columns, and what it printed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen([*GPTJAX, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=COLOURS)
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while piece := os.read(ours, 4096):
            printed += piece
    os.close(ours)
    return process.wait(), printed.decode()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--model.width abc", "--model.width: got 'abc', wanted a whole number"),
        ("--optim.learning-rate fast", "--optim.learning-rate: got 'fast', wanted a number"),
        ("--optim.kind adam", "invalid choice 'adam' for argument '--optim.kind'. Expected one of ('adamw', 'lion'"),
        ("--data.source", "Missing value for argument '--data.source'"),
        ("--sample yes", "Unrecognized options: yes"),
        ("--model.num-heads 7", "model.width=192: wanted a multiple of model.num_heads=7"),
    ],
)
def test_a_wrong_value_is_one_plain_line_on_a_terminal_too(words, wanted):
    code, printed = on_a_terminal("pretrain", "quickstart", *words.split())
    assert code == 2 and printed.startswith(f"gptjax: {wanted}"), printed
    assert printed.count("\n") == 1 and printed.rstrip("\r\n").isascii() and printed.rstrip("\r\n").isprintable()


def test_help_on_a_terminal_has_its_colours():
    code, printed = on_a_terminal("prepare", "--help")
    assert code == 0 and "\x1b[" in printed


def test_sources_that_are_wrong_are_refused(tmp_path, capsys):
    def said(source):
        return refusal(capsys, *pretrain(source, tmp_path / "run"))

    assert "nowhere.txt" in said(tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in said(tmp_path / "empty.txt")
    (tmp_path / "folder").mkdir()
    assert "folder" in said(tmp_path / "folder")
    lines = ['{"text": "one"}', '{"text": "two"}', '{"text": "thr', '{"text": "four"}']
    with gzip.open(tmp_path / "broken.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    assert "broken.jsonl.gz:3" in said(tmp_path / "broken.jsonl.gz")
    assert "builtin:shakespeare" in said("builtin:milton")


def test_a_changed_vocabulary_is_refused_on_resume(run, text, capsys):
    line = refusal(capsys, *pretrain(text, run, *PIECES, "--steps", "5"))
    assert "tokenizer.vocab_size was 258, got 300" in line


def test_data_that_a_run_was_not_trained_on_is_refused_by_what_reads_the_run(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "data")
    (tmp_path / "b.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely.\n" * 60)
    run_verb("prepare", "--source", tmp_path / "b.txt", "--out", copy / "data", *BYTES)
    for verb in (["eval"], ["data", "show"]):
        line = refusal(capsys, *verb, copy)
        assert line.endswith("is not what it was when this run was trained on it: its content was changed; restore it")


@pytest.mark.slow
def test_a_damaged_shard_is_refused_by_name(text, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    run_verb("prepare", "--source", text, "--out", corpus, *BYTES)
    (shard,) = corpus.glob("*train.array_record*")
    raw = shard.read_bytes()
    at = raw.index("It was the best".encode("utf-16-le"))  # ids are stored as 16-bit numbers
    shard.write_bytes(raw[:at] + b"\xff\x7f" + raw[at + 2 :])
    line = refusal(capsys, *pretrain(corpus, tmp_path / "run"))
    assert shard.name in line
    assert shard.name in refusal(capsys, "data", "verify", corpus)


def test_prompts_that_do_not_fit_are_refused(run, capsys):
    line = refusal(capsys, "generate", run, "--prompt", "x" * 40)
    assert "has 41 tokens; wanted at most 31" in line
    assert "32" in refusal(capsys, "generate", run, "--prompt", "It was", "--max-new-tokens", "30")


def test_advice_on_a_vocabulary_names_the_flag_of_the_verb(text, tmp_path, capsys):
    line = refusal(capsys, "tokenizer", "train", "--source", text, "--out", tmp_path / "t", "--vocab-size", "9999")
    assert "gptjax: vocab_size=9999: the training text has pieces for at most" in line and "; add --vocab-size " in line


def test_a_run_that_was_not_saved_yet_has_nothing_to_list_or_to_verify(tmp_path, capsys):
    Run.open(tmp_path / "run", TrainConfig())
    assert "run has no checkpoint yet" in refusal(capsys, "checkpoint", "verify", tmp_path / "run")
    assert main(["checkpoint", "list", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err == f"{tmp_path / 'run'} has no checkpoint yet\n"


def test_what_is_no_verb_and_no_run_is_refused(tmp_path, capsys):
    assert "did you mean 'pretrain'?" in refusal(capsys, "pertrain", "quickstart")
    assert refusal(capsys, "convert", "x") == "gptjax: there is no verb 'convert'; see gptjax --help"
    assert "RUN is missing" in refusal(capsys, "eval")
    assert "wanted the folder of a run" in refusal(capsys, "eval", tmp_path)
    assert "no such recipe" in refusal(capsys, "pretrain", "nowhere.py")
    assert "the nearest is quickstart" in refusal(capsys, "pretrain", "quikstart")
    assert "unexpected 'more'" in refusal(capsys, "checkpoint", "list", tmp_path, "more")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_in_the_help_and_has_its_own(verb, capsys, run):
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert f"  {verb}" in usage and max(map(len, usage.splitlines())) <= 80
    with pytest.raises(SystemExit) as exit_code:
        main([*verb.split(), "--help"])
    assert exit_code.value.code == 0 and "usage: gptjax" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["", "modern "])
@pytest.mark.parametrize(("verb", "flags"), [("pretrain", "size"), ("plan", "size topology json out compiles")])
def test_help_names_the_flags_that_are_no_settings_too(recipe, verb, flags, capsys):
    with pytest.raises(SystemExit):
        main(f"{verb} {recipe}--help".split())
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"[--{flag} " in said for flag in flags.split())


SOME = "--run-dir --model.num-layers --optim.learning-rate --mesh.fsdp --checkpoint.every"


@pytest.mark.parametrize(
    ("words", "flags"), [("pretrain quickstart", SOME), ("verify", "--json"), ("doctor", "--json")]
)
def test_help_names_every_setting_and_needs_no_jax(words, flags):
    code = (
        f"import sys; from gptjax.cli import main\ntry: main('{words} --help'.split())\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and all(flag in done.stdout for flag in flags.split()), done.stderr


AT_IMPORT = """
import sys
def trace(frame, event, arg):
    if frame.f_globals.get("__name__") == {name!r}:
        sys.settrace(None)
        print("begun", file=sys.stderr, flush=True)
        __import__("time").sleep(30)
sys.settrace(trace)
from gptjax.cli import main
sys.exit(main(sys.argv[1:]))
"""
INTERRUPTED = "gptjax: interrupted; run the same command again to go on"


def interrupt(process: subprocess.Popen, begun: Callable[[], bool]) -> str:
    """Sends Ctrl-C to a command and all it started, as a terminal does, once it has begun; returns its errors."""
    while process.poll() is None and not begun():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    return errors


def started(*command: str) -> subprocess.Popen:
    # As a terminal starts it: what a shell starts in the background ignores SIGINT, and its children inherit that.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, start_new_session=True, preexec_fn=heeds)


@pytest.mark.parametrize(
    ("words", "module"),
    [
        ("tokenizer train --source {text} --out {out} --vocab-size 300", "gptjax.data.prepare"),
        ("generate {out}", "jax"),
        ("fit {text}", "gptjax.scaling.fitting"),
        ("plan quickstart", "gptjax.diagnostics.plan.report"),
        ("pretrain quickstart", "jax"),
        ("sweep quickstart --out {out} --grid 1e13:1", "gptjax.scaling.sweep.work"),
    ],
)
def test_ctrl_c_during_the_imports_of_a_verb_is_one_line_and_75(words, module, text, tmp_path):
    code = AT_IMPORT.format(name=module)
    process = started(sys.executable, "-c", code, *words.format(text=text, out=tmp_path / "out").split())
    assert process.stderr is not None
    assert interrupt(process, lambda: "begun" in process.stderr.readline()) == f"{INTERRUPTED}\n"


def test_ctrl_c_while_workers_of_prepare_write_is_one_line_and_the_same_command_goes_on(tmp_path):
    text, corpus = tmp_path / "a.txt", tmp_path / "corpus"
    text.write_text("It was the best of times, it was the worst of times.\n" * 200_000)
    words = [*GPTJAX, "prepare", "--source", str(text), "--out", str(corpus), "--workers", "2", *BYTES]
    assert interrupt(started(*words), lambda: bool(list(corpus.glob("**/*array_record*")))) == f"{INTERRUPTED}\n"
    assert subprocess.run(words, stderr=subprocess.DEVNULL).returncode == 0


def test_a_reader_that_goes_away_is_no_error():
    for words in ("--help", "pretrain quickstart --help"):
        command = f"{shlex.join(GPTJAX)} {words} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
