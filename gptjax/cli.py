"""The command line: one verb a stage, no logic. Heavy modules are imported by the verb that needs them."""

import functools
import os
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from gptjax import config
from gptjax.config.command_line import (
    HELP,
    load_recipe,
    nothing_left,
    parse,
    positional,
    positionals,
    unknown_verb,
)
from gptjax.config.section import InputError, leaves
from gptjax.parallel.cluster import RetryableError
from gptjax.parallel.processes import exit_all, is_main_process, join_processes, process_label, say, working
from gptjax.runtime.process import require_platform, tune_process
from gptjax.runtime.status import write_line
from gptjax.runtime.versions import __version__
from gptjax.storage.bucket import is_transient

Verb = Callable[[list[str]], int]


def tokenizer_train(args: list[str]) -> int:
    """tokenizer train          train a SentencePiece tokenizer on a text"""
    cfg = parse(config.TrainTokenizerConfig(), args, "gptjax tokenizer train")
    from gptjax.data.prepare import train_tokenizer

    trained = train_tokenizer(cfg, say)
    say(f"wrote {cfg.out}/tokenizer.model: {trained.vocab_size:,} ids")
    _next("prepare", "--source", cfg.source, "--out", "FOLDER", "--tokenizer.vocab-size", trained.vocab_size,
          "--tokenizer.path", f"{cfg.out}/tokenizer.model")  # fmt: skip
    return 0


def prepare(args: list[str]) -> int:
    """prepare                  tokenise a text into a folder that training reads"""
    cfg = parse(config.PrepareConfig(), args, "gptjax prepare")
    from gptjax.data.prepare import prepare, progress_bar, report

    with progress_bar() as progress:
        corpus = prepare(cfg, progress)
    say(report(corpus))
    _next("pretrain", "quickstart", "--data.source", cfg.out, "--run-dir", "runs/NAME")
    return 0


def data_show(args: list[str]) -> int:
    """data show RUN            show exactly what the model saw at a step"""
    run, args = positional(args, "RUN", "gptjax data show RUN --step N")
    cfg = parse(config.ShowConfig(), args, f"gptjax data show {run}")
    from gptjax.commands import show_step

    print(show_step(run, cfg.step, cfg.rows))
    _next("data", "show", run, "--step", cfg.step + 1)
    return 0


def data_verify(args: list[str]) -> int:
    """data verify FOLDER       check every file of a prepared folder against its manifest"""
    folder, args = positional(args, "FOLDER", "gptjax data verify FOLDER")
    nothing_left(args, "gptjax data verify FOLDER")
    from gptjax.data.corpus import open_corpus
    from gptjax.data.prepare import report

    corpus = open_corpus(folder)
    corpus.verify()
    say(f"{report(corpus)}\nevery file is as it was written")
    _next("pretrain", "quickstart", "--data.source", folder, "--run-dir", "runs/NAME")
    return 0


def plan(args: list[str]) -> int:
    """plan RECIPE              memory, speed and price on --topology v5e:4x4, h100:8 ..., before any bill"""
    name, args = positional(args, "RECIPE", "gptjax plan llama_8b --topology v5p:4x4x4")
    os.environ["JAX_PLATFORMS"] = "cpu"  # a GPU or TPU that is here is not taken
    from gptjax.diagnostics.plan.verb import plan

    _next(*plan(name, args, print))
    return 0


def sweep(args: list[str]) -> int:
    """sweep RECIPE --out DIR   train a grid of budgets and sizes, one trunk for all horizons of a size"""
    name, args = positional(args, "RECIPE", "gptjax sweep modern --out DIR --grid 1e17:4,6 3e17:4,6,8")
    from gptjax.config.sweep import SweepConfig

    cfg = parse(SweepConfig(), args, f"gptjax sweep {name}")
    from gptjax.scaling.sweep.work import sweep

    code = sweep(cfg, load_recipe(name), say)
    if code == 0:
        _next("fit", cfg.out, "--out", f"{cfg.out}/fit")
    return code


def evaluate(args: list[str]) -> int:
    """eval RUN [--tasks FILE]  loss and bits per byte on the validation split, or tasks: accuracy, perplexity ..."""
    run, args = positional(args, "RUN", "gptjax eval RUN")
    cfg = parse(config.EvalConfig(), args, f"gptjax eval {run}")
    tune_process()
    from gptjax.commands import show_evaluation

    show_evaluation(run, cfg, _print, say)
    _next("generate", run)
    return 0


def generate(args: list[str]) -> int:
    """generate RUN             continue prompts"""
    run, args = positional(args, "RUN", 'gptjax generate RUN --prompt "Once upon a time"')
    cfg = parse(config.ContinueConfig(), args, f"gptjax generate {run}")
    tune_process()
    from gptjax.commands import generate_run

    generate_run(run, cfg, functools.partial(_print, end=""))
    mode = ["--image", *cfg.image] if cfg.image else []
    mode += ["--chat"] if cfg.chat else ["--shots", cfg.shots] if cfg.shots else []
    _next("generate", run, *mode, "--prompt", *cfg.prompt, "--seed", cfg.seed + 1)
    return 0


def chat(args: list[str]) -> int:
    """chat RUN                 talk to a model in the terminal; in a pipe each line is a message"""
    run, args = positional(args, "RUN", "gptjax chat runs/chat")
    cfg = parse(config.ChatConfig(), args, f"gptjax chat {run}")
    tune_process()
    from gptjax.serve.terminal import open_session, talk

    return talk(open_session(run, cfg), sys.stdin, sys.stdout)


def serve(args: list[str]) -> int:
    """serve RUN                serve a model over HTTP, as OpenAI's clients expect it (extra serve)"""
    run, args = positional(args, "RUN", "gptjax serve runs/chat")
    from gptjax.config.serving import ServeConfig

    cfg = parse(ServeConfig(), args, f"gptjax serve {run}")
    tune_process()
    from gptjax.commands import serve_run

    return serve_run(run, cfg, say)


def inspect(args: list[str]) -> int:
    """inspect RUN "TEXT"       a look inside: losses, attention, the guess of each layer, as a table and a page"""
    run, args = positional(args, "RUN", 'gptjax inspect RUN "The capital of France is"')
    text, args = positional(args, "TEXT", 'gptjax inspect RUN "The capital of France is"')
    cfg = parse(config.InspectConfig(), args, f"gptjax inspect {run} TEXT")
    tune_process()
    from gptjax.commands import inspect_run

    inspect_run(run, text, cfg, _print, say)
    return 0


def checkpoint_list(args: list[str]) -> int:
    """checkpoint list RUN      list the checkpoints of a run"""
    run, args = positional(args, "RUN", "gptjax checkpoint list RUN")
    nothing_left(args, "gptjax checkpoint list RUN")
    from gptjax.commands import list_checkpoints

    if list_checkpoints(run, _print, say):
        _next("checkpoint", "verify", run)
    return 0


def checkpoint_verify(args: list[str]) -> int:
    """checkpoint verify RUN    check every checkpoint's files and numbers"""
    run, args = positional(args, "RUN", "gptjax checkpoint verify RUN")
    nothing_left(args, "gptjax checkpoint verify RUN")
    from gptjax.commands import verify_checkpoints

    verify_checkpoints(run, _print)
    _next("eval", run)
    return 0


def fit(args: list[str]) -> int:
    """fit TABLE [--out DIR]    fit a scaling law to finished runs (a CSV, a sweep, runs): intervals, plots, a report"""
    tables, args = positionals(args, "TABLE", "gptjax fit TABLE --out DIR")
    from gptjax.config.scaling import FitConfig

    cfg = parse(FitConfig(), args, "gptjax fit TABLE")
    with working("importing jax"):
        from gptjax.scaling.fitting import fit_table

    _next(*fit_table(tables, cfg, _print, say))
    return 0


def predict(args: list[str]) -> int:
    """predict FIT              the loss that a budget or a run will reach, or how far a fit was off on a table"""
    folder, args = positional(args, "FIT", "gptjax predict FIT --flops 1e21")
    from gptjax.config.scaling import PredictConfig

    cfg = parse(PredictConfig(), args, f"gptjax predict {folder}")
    from gptjax.scaling.predicting import predict

    _next(*predict(folder, cfg, _print))
    return 0


def import_run(args: list[str]) -> int:
    """import SOURCE RUN        make a run of a Hugging Face folder, a GGUF file, or a name of the hub (ORG/NAME)"""
    source, args = positional(args, "SOURCE", "gptjax import SOURCE RUN")
    run, args = positional(args, "RUN", "gptjax import SOURCE RUN")
    cfg = parse(config.ImportConfig(), args, f"gptjax import {source} {run}")
    tune_process()
    from gptjax.interop.importing import import_run

    said, following = import_run(source, run, cfg)
    say(said)
    _next(*following)
    return 0


def export(args: list[str]) -> int:
    """export RUN DIR           write a run's model as transformers (or llama.cpp) opens it, with a model card"""
    run, args = positional(args, "RUN", "gptjax export RUN DIR")
    folder, args = positional(args, "DIR", "gptjax export RUN DIR")
    from gptjax.config.export import GGUF_FILE, ExportConfig

    cfg = parse(ExportConfig(), args, f"gptjax export {run} {folder}")
    os.environ["JAX_PLATFORMS"] = "cpu"  # a GPU or TPU that is here is not taken: a run may train on it
    from gptjax.interop.export import export_run

    say(export_run(run, folder, cfg))
    exported = f"{folder}/{GGUF_FILE}" if cfg.format == "gguf" else folder
    _next("import", exported, "runs/NAME")
    return 0


def verify(args: list[str]) -> int:
    """verify                   prove on these devices that every mesh and setting gives the same numbers"""
    from gptjax.config.checks import VerifyConfig

    cfg = parse(VerifyConfig(), args, "gptjax verify")
    _start(cfg)
    from gptjax.diagnostics.verify.checks import verify

    if not verify(cfg, _print):
        _next("doctor")
        return 3
    _next("pretrain", "quickstart")
    return 0


def doctor(args: list[str]) -> int:
    """doctor                   report what this machine and its cluster can do, and what is wrong with them"""
    from gptjax.config.checks import DoctorConfig

    cfg = parse(DoctorConfig(), args, "gptjax doctor")
    from gptjax.diagnostics.doctor.examine import examine

    if not examine(cfg, _print, start=lambda: _start(cfg)):
        return 3
    _next("verify")
    return 0


def _stage(stage: str, example: str, purpose: str) -> Verb:
    """The verb that trains by a recipe's function of that name, or goes on with its run."""

    def verb(args: list[str]) -> int:
        name, args = positional(args, "RECIPE", f"gptjax {stage} {example}")
        if name == "RECIPE":
            parse(config.STAGES[stage](), args, f"gptjax {stage} RECIPE|RUN [--size SIZE]")
        from gptjax.runs.resume import settings_of

        cfg, provenance = settings_of(stage, name, args)
        from gptjax.stages.verb import following, train

        code, folder = train(cfg, provenance, _fail)
        if code:
            return code
        say(f"run folder: {folder}")
        _next(*following(cfg))
        return 0

    verb.__doc__ = f"{stage + ' RECIPE|RUN':<25}{purpose}"
    return verb


VERBS: dict[str, Verb] = {
    "tokenizer train": tokenizer_train,
    "prepare": prepare,
    "data show": data_show,
    "data verify": data_verify,
    "plan": plan,
    "pretrain": _stage("pretrain", "quickstart", "train a model, or go on with its run"),
    "sft": _stage("sft", "chat", "fine-tune a run on conversations (RECIPE --init RUN)"),
    "reward": _stage("reward", "chat", "train a reward model on preferences (RECIPE --init RUN)"),
    "dpo": _stage("dpo", "chat", "train a run on preferences, by DPO or IPO (RECIPE --init RUN)"),
    "grpo": _stage("grpo", "chat", "train a policy on rewards of its own answers (RECIPE --init RUN)"),
    "ppo": _stage("ppo", "chat", "the same against a value function, with the KL in the reward (RECIPE --init RUN)"),
    "sweep": sweep,
    "eval": evaluate,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "inspect": inspect,
    "checkpoint list": checkpoint_list,
    "checkpoint verify": checkpoint_verify,
    "fit": fit,
    "predict": predict,
    "import": import_run,
    "export": export,
    "verify": verify,
    "doctor": doctor,
}

USAGE = f"""gptjax {__version__}: from a folder of text to a model that talks, in JAX and Flax.

usage: gptjax VERB ... [--help]

{chr(10).join(textwrap.fill(f"  {verb.__doc__}", 80, subsequent_indent=" " * 27) for verb in VERBS.values())}

RECIPE is the name of a shipped recipe (quickstart) or a Python file of
settings; some have a size: gptjax pretrain modern --size 4. RUN is the folder
that pretrain wrote. TABLE is a CSV or JSONL of finished runs, or their folders;
FIT is the folder that fit wrote. Every verb has --help with all its settings.

Start here: gptjax pretrain quickstart
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns its exit code.

    0 done, 2 bad input, 3 failed for good, 75 interrupted, by a store's outage too (run the same command again).
    """
    try:
        require_platform()
        verb, args = _find_verb(sys.argv[1:] if argv is None else argv)
        code = verb(args)
        print(end="", flush=True)
    except (InputError, RetryableError) as e:
        _fail(e)
        code = 75 if isinstance(e, RetryableError) or is_transient(e) else 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends what this process waits for at its end
        _fail("interrupted; run the same command again to go on")
        code = 75
    except BrokenPipeError:  # the reader of our output went away: `gptjax data show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_all(0)  # the other processes of this job would wait for this one
        code = 0
    if code:
        exit_all(code)  # with the other processes of this job, where there are any
    return code


def _find_verb(args: list[str]) -> tuple[Verb, list[str]]:
    """Returns the verb that the first words name, and the other words; raises InputError for one that is not there."""
    if not args or args[0] in (*HELP, "--version"):
        return _print_line, [__version__ if args[:1] == ["--version"] else USAGE]
    for words in (2, 1):
        if (verb := VERBS.get(" ".join(args[:words]))) is not None:
            return verb, args[words:]
    group = [f"  gptjax {verb.__doc__}" for name, verb in VERBS.items() if name.split()[0] == args[0]]
    if group and (not args[1:] or args[1] in HELP):
        return _print_line, ["\n".join(group)]
    raise unknown_verb(args, VERBS)


def _print_line(lines: list[str]) -> int:
    print(*lines)
    return 0


def _start(cfg: Any) -> None:
    """Sets XLA's flags and joins the other processes of this job, before anything asks jax for its devices."""
    tune_process()
    join_processes(dict(leaves(cfg)))


def _print(text: str, end: str = "\n") -> None:
    if is_main_process():
        print(text, end=end, flush=True)


def _fail(error: Exception | str) -> None:
    where = f"{process_label()}: " if process_label() else ""
    write_line(f"gptjax: {where}{error}")


def _next(*words: object) -> None:
    """Prints the command to run next, quoted for a shell."""
    say(f"next: {shlex.join(['gptjax', *map(str, words)])}")
