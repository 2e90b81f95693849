"""Training steps of gptjax against its peers in one run: tokens a second, memory, MFU, and whether they are right.

    python benchmarks/throughput.py --out benchmarks/results
    python benchmarks/throughput.py --suite h100 --out benchmarks/results      (one H100, at most twelve minutes)

Who competes, by name:

    ours, ours-isolated   our step as `gptjax pretrain` makes it; isolated: attention does not cross the row's documents
    plain                 benchmarks/plain_decoder.py: GPT-2 in plain JAX, einsums and optax, float32 logits
    torch, torch-compiled Hugging Face's GPT-2 or Llama in torch, eager and torch.compile, AdamW fused, autocast
    ...-float32           plain or torch (eager) in float32 where the others use bfloat16

All start from the same weights and train on the same packed rows of real text (documents crossing, but for isolated).
Each is a process of its own. On a CPU, whose speed drifts, all are started and take turns, one at a time while the
others wait: in each round each makes --steps steps, and ratios are taken within a round. A GPU's memory does not hold
them all: there (--one-by-one) each is started, makes all its rounds and ends before the next starts, those first that
matter most, and who is not done after --minutes has failed. Reported are medians with 5th and 95th percentiles.

Every loss and the norm of the first gradient are compared with a float32 run of the plain attention at highest
precision on the same rows. A step further off than its tolerance (throughput_report.py says why), or a competitor that
fails, ends with code 1, the report written all the same. MFU is in the three conventions of gptjax/scaling/counts.py,
of a measured ceiling (the median GFLOP/s over the shapes of the model's own products, forward and backward, in each
round; the higher of jax's and torch's) and of the device's data sheet where gptjax/metrics.py knows it.

Writes DATE_throughput.json, .md and .png (matplotlib: pip install 'gptjax[plots]'). Torch: pip install 'gptjax[peers]'.
"""

import argparse
import dataclasses
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contenders import MOST_BATCHES, SHAPES, SUITES, Contest, batches, flat, products, recipe, reference, write_batches
from report import ROOT, facts, write_report
from throughput_report import judge, plot, rows, summary, table
from worker_pool import Competitor, Failed

from gptjax.config.section import InputError

HERE = Path(__file__).parent
FLOAT32 = "-float32"
# Those first that matter most, for where there is not time for all.
COMPETITORS = ("ours", "torch-compiled", "ours-isolated", "plain", "torch", f"plain{FLOAT32}", f"torch{FLOAT32}")
WARM_UP = 2
PRODUCT_SECONDS = 0.05  # for each shape in each round


def main() -> int:
    args, wrong = arguments(), []
    args.deadline = time.monotonic() + 60 * args.minutes
    try:
        contests = choose(args)
        report = machine() | {"suite": args.suite, "rounds": args.rounds, "steps": args.steps, "contests": []}
        report |= {"one_by_one": args.one_by_one, "minutes": None if args.minutes == math.inf else args.minutes}
        with tempfile.TemporaryDirectory(prefix="gptjax-bench-") as folder:
            for contest in contests:
                place = Path(folder) / contest.name
                place.mkdir()
                try:
                    report["contests"].append(compete(contest, args, place))
                except Failed as e:
                    wrong.append(f"{contest.name}: {e}")
                else:
                    say("\n".join(rows(report["contests"][-1])))
                    write_report(report, args.out, "throughput")  # what is known, should this process be ended
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    wrong += [fault for contest in report["contests"] for fault in contest["faults"]]
    report["faults"] = wrong
    if args.suite == "h100":
        report["others"] = others(args.out, args.deadline)
    path = write_report(report, args.out, "throughput")
    path.with_suffix(".md").write_text(table(report))
    plot(report, path.with_suffix(".png"))
    print(table(report))
    print(f"wrote {path}, .md and .png")
    for fault in wrong:
        print(f"FAILED: {fault}", file=sys.stderr)
    return 1 if wrong else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the dated report")
    parser.add_argument("--suite", choices=SUITES, default="cpu", help="what to run (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, help="only this shape, in place of a suite")
    parser.add_argument("--family", nargs="+", choices=("gpt2", "llama"), default=["gpt2", "llama"])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--competitors", nargs="+", choices=COMPETITORS, help="(default: all that a suite has)")
    parser.add_argument("--jax-only", action="store_true", help="no torch")
    parser.add_argument("--torch-python", default=sys.executable, help="Python that has torch and transformers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each competitor in each round")
    parser.add_argument("--batch", type=int, default=0, help="rows a step (default: the shape's)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="torch's (default: all)")
    parser.add_argument("--patience", type=float, help="seconds for an answer, compiling included (default: 300, 120)")
    parser.add_argument("--one-by-one", action="store_true", help="each starts when the one before has ended")
    parser.add_argument("--minutes", type=float, help="end by then, whoever is left out (default: none, 12)")
    parser.add_argument("--warm-start", action="store_true", help="time a second start of ours, from its compile cache")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of ours alone")
    args = parser.parse_args()
    for name in ("rounds", "steps", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: wanted at least 1")
    on_gpu = args.suite == "h100"  # whose second number above is its default
    args.competitors = args.competitors or [c for c in COMPETITORS if not (on_gpu and c.endswith(FLOAT32))]
    if "ours" not in args.competitors:
        parser.error("--competitors: wanted ours among them, which the others are compared with")
    args.patience = args.patience or (120.0 if on_gpu else 300.0)
    args.minutes = args.minutes or (12.0 if on_gpu else math.inf)
    args.one_by_one |= on_gpu
    args.warm_start |= on_gpu
    return args


def choose(args: argparse.Namespace) -> list[Contest]:
    """The contests asked for; raises InputError where there are none, or torch is wanted and not there."""
    known = SUITES[args.suite]
    if args.shape:
        families = SHAPES[args.shape].mlp_width
        known = [Contest(args.shape, family, dtype) for family in families for dtype in ("float32", "bfloat16")]
    chosen = [contest for contest in known if contest.family in args.family and contest.dtype in args.dtype]
    if not chosen:
        had = ", ".join(f"{c.family} {c.dtype}" for c in known)
        raise InputError(f"--family {' '.join(args.family)} --dtype {' '.join(args.dtype)}: wanted one of {had}")
    for contest in chosen:
        recipe(contest, args.batch, tuple(args.set))
    if any(entrants(contest, args, "torch") for contest in chosen):
        found = subprocess.run([args.torch_python, "-c", "import torch, transformers"], capture_output=True)
        if found.returncode:
            raise InputError(
                f"{args.torch_python} can't import torch and transformers; pip install 'gptjax[peers]', or give "
                f"--torch-python PATH or --jax-only"
            )
    return chosen


def entrants(contest: Contest, args: argparse.Namespace, prefix: str = "") -> list[str]:
    """Who takes part: the plain decoder is a GPT-2; torch's gradients of a billion weights don't fit beside ours."""
    left_out = ["plain"] if contest.family == "llama" else []
    if args.jax_only or contest.shape == "llama_1b":
        left_out.append("torch")
    names = [name for name in args.competitors if name.startswith(prefix) and name.split("-")[0] not in left_out]
    return [name for name in names if not name.endswith(FLOAT32) or contest.dtype != "float32"]


def machine() -> dict[str, Any]:
    """The facts of this run; what a device is, the children say."""
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    cpu = {"cpu": name, "cores": len(os.sched_getaffinity(0)), "load_before": round(os.getloadavg()[0], 2)}
    return facts(cpu, "jax", "jaxlib", "flax", "optax") | {"xla_flags": os.environ.get("XLA_FLAGS", "")}


def compete(contest: Contest, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs one contest and returns its report, with `faults` for all that failed or is wrong.

    Raises Failed where the reference fails, without which nothing can be judged, or where no time is left for it.
    """
    config, names = recipe(contest, args.batch, tuple(args.set)), entrants(contest, args)
    total = WARM_UP + args.rounds * args.steps
    right: dict[str, list[dict[str, float]]] = {}
    faults: list[str] = []
    for documents in ("crossing", "isolated"):
        if documents == "isolated" and "ours-isolated" not in names:
            continue
        write_batches(folder / f"{documents}.npz", batches(config, documents, min(total, MOST_BATCHES)))
        say(f"{contest.name}: reference, documents {documents}")
        child = start("reference", contest, args, folder, documents)
        right[documents] = child.ask("run", total)["result"]
        child.close()

    running: dict[str, Competitor] = {}
    timed: dict[str, dict[str, Any]] = {}
    ceilings: dict[str, list[list[float]]] = {}
    shapes = products(config)

    def attempt(act: Callable[..., None], name: str, *more: str) -> None:
        """act(name, *more); a competitor that fails leaves the contest, and the report says so."""
        try:
            act(name, *more)
        except Failed as e:
            faults.append(f"{contest.name}: {e}")
            timed.setdefault(name, {})["failed"] = str(e)
            if name in running:
                running.pop(name).close()

    def enter(name: str) -> None:
        began = time.perf_counter()
        child = running[name] = start(name, contest, args, folder)
        timed[name] = child.facts | {"start_seconds": time.perf_counter() - began, "seconds": []}
        first = child.ask("run", 1)
        timed[name]["first_step_seconds"] = first["seconds"]
        timed[name]["rows"] = first["result"] + child.ask("run", WARM_UP - 1)["result"]

    def turn(name: str) -> None:
        answer = running[name].ask("run", args.steps)
        timed[name]["seconds"].append(answer["seconds"] / args.steps)
        timed[name]["rows"] += answer["result"]

    def measure(name: str, library: str) -> None:
        rates = running[name].ask("products", shapes, contest.dtype, PRODUCT_SECONDS)["result"]
        ceilings.setdefault(library, []).append(rates)

    def leave(name: str) -> None:
        timed[name] |= running[name].ask("memory")["result"]
        running.pop(name).close()

    def enter_again(name: str) -> None:
        try:
            running[name] = start(name, contest, args, folder)
            timed[name]["warm_first_step_seconds"] = running[name].ask("run", 1)["seconds"]
        except Failed as e:  # its steps are timed already
            faults.append(f"{contest.name}: second start: {e}")
        finally:
            if name in running:
                running.pop(name).close()

    try:
        for group in [[name] for name in names] if args.one_by_one else [names]:
            for name in group:
                say(f"{contest.name}: {name} starts")
                attempt(enter, name)
            for i in range(args.rounds):
                order = list(running)
                turned = i % max(1, len(order))
                for name in order[turned:] + order[:turned]:
                    attempt(turn, name)
                for library, prefix in (("jax", "ours"), ("torch", "torch")):
                    if len(ceilings.get(library, [])) <= i:
                        for name in [name for name in running if name.startswith(prefix)][:1]:
                            attempt(measure, name, library)
                say(f"{contest.name}: round {i + 1} of {args.rounds}")
            for name in list(running):
                attempt(leave, name)
            for name in group if args.warm_start else ():
                if name.startswith("ours") and "failed" not in timed[name]:
                    enter_again(name)
    finally:
        for child in running.values():
            child.close()
    report = summary(contest, config, timed, ceilings, shapes, right)
    report["faults"] = faults + judge(contest, timed, right)
    return report


def start(name: str, contest: Contest, args: argparse.Namespace, folder: Path, documents: str = "") -> Competitor:
    """A competitor's process, ready to run; raises Failed where it does not start, or no time is left."""
    if time.monotonic() >= args.deadline:
        raise Failed(f"{name} was left out: the {args.minutes:g} minutes are over")
    contest = contest._replace(dtype="float32") if name.endswith(FLOAT32) else contest
    config = recipe(contest, args.batch, tuple(args.set) if name.startswith("ours") else ())
    config = reference(config) if name == "reference" else config
    documents = documents or ("isolated" if name == "ours-isolated" else "crossing")
    # A fused attention may leave segments out where a row is known to be one document.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cross_documents=documents == "crossing"))
    setting = {
        "kind": name.removesuffix(FLOAT32), "family": contest.family, "dtype": contest.dtype, "config": flat(config),
        "precision": "highest" if name == "reference" else "", "batches": str(folder / f"{documents}.npz"),
        "threads": args.threads, "compile": name == "torch-compiled",
    }  # fmt: skip
    torch = name.startswith("torch")
    if torch or (name == "reference" and documents == "crossing" and entrants(contest, args, "torch")):
        setting["weights"] = str(folder / "weights.npz")
    # A cache of compiled programs of each one's own, empty at first, so that its first start is a cold one.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "XDG_CACHE_HOME": str(folder / name)}
    env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    command = [args.torch_python if torch else sys.executable, str(HERE / f"train_{'torch' if torch else 'jax'}.py")]
    log = folder / f"{name}.log"
    return Competitor(name, command, setting, log, env, args.patience, args.deadline)


def others(out: Path, deadline: float) -> dict[str, Any]:
    """The other benchmarks of a GPU, each in a process; how each ended, for none of them may end this report."""
    commands = {
        "decode": [
            str(HERE / "decode.py"),
            *"--shape 1b --dtype bfloat16 --peer none --batch 1 --out".split(),
            str(out),
        ],
        "attention": [str(HERE / "attention.py"), "--dtype", "bfloat16", "--out", str(out)],
    }
    ended: dict[str, Any] = {}
    for name, command in commands.items():
        say(f"{name} starts")
        left = max(0.0, deadline - time.monotonic())
        try:
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=min(100, left))
            ended[name] = {"code": done.returncode, "end": (done.stdout + done.stderr)[-400:]}
        except (OSError, subprocess.TimeoutExpired) as e:
            ended[name] = {"code": None, "end": str(e)[:400]}
        say(f"{name} ended with {ended[name]['code']}")
    return ended


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
