"""Speed and memory of `gptjax prepare` on a folder of JSONL.gz, and proof that a kill loses nothing.

    python benchmarks/prepare.py --text FOLDER --tokenizer MODEL --out benchmarks/results

Three runs of the command in a process group of their own: one uninterrupted, one killed at a random moment (SIGKILL to
the whole group), and the killed one again. Seconds are of the whole command, from the start of Python to its end, with
every reading of the source in them; MB are 10^6 bytes of the text that is stored, as UTF-8. CPU seconds are those of
all its processes. Memory is the sum over these of their proportional set size (PSS of /proc/PID/smaps_rollup: pages
that processes share are counted once), sampled every 0.1 s. After the third run the counts and the sha256 of every
file must be those of the first.
"""

import argparse
import gzip
import hashlib
import json
import os
import platform
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import ROOT, facts, write_report

from gptjax.data.corpus import open_corpus
from gptjax.data.prepare import WORK
from gptjax.tokenizer import open_tokenizer

EVERY = 0.1  # seconds between two samples of memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of .jsonl.gz files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer file or folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the dated report")
    parser.add_argument("--workers", type=int, default=2)
    seed = random.SystemRandom().randrange(1 << 16)
    parser.add_argument("--seed", type=int, default=seed, help="of the moment of the kill; else a new one each time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gptjax-bench-") as folder:
        report = measure(args, Path(folder))
    path = write_report(report, args.out, "prepare")
    print(json.dumps(report, indent=1))
    print(f"wrote {path}")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Does the three runs and returns the report; exits where the restarted run is not the uninterrupted one."""
    source, left_out = link_texts(args.text, folder / "text")
    tokenizer = open_tokenizer(args.tokenizer)
    command = [sys.executable, "-m", "gptjax", "prepare", "--source", str(source), "--workers", str(args.workers)]
    command += ["--tokenizer.kind", tokenizer.kind, "--tokenizer.vocab-size", str(tokenizer.vocab_size)]
    command += ["--tokenizer.path", str(args.tokenizer)]
    whole, killed = folder / "whole", folder / "killed"

    before = cpu_seconds()
    seconds, memory, _ = run([*command, "--out", str(whole)])
    used = cpu_seconds() - before
    corpus = open_corpus(whole)
    num_bytes = sum(split.bytes for split in corpus.manifest.splits.values())
    print(f"{num_bytes / 1e6:.1f} MB in {seconds:.1f} s: {num_bytes / seconds / 1e6:.2f} MB/s", flush=True)

    rng, expected, was_killed = random.Random(args.seed), seconds, False
    while not was_killed:  # a run that is faster than the first may end before its moment
        shutil.rmtree(killed, ignore_errors=True)
        moment, _, was_killed = run([*command, "--out", str(killed)], kill_after=rng.uniform(0.05, 0.95) * expected)
        expected = moment
    parts = len(list((killed / WORK).glob("part-*.npz")))
    print(f"killed after {moment:.1f} s, with {parts} parts done", flush=True)
    again, _, _ = run([*command, "--out", str(killed)])
    differ = sorted(name for name, sha in (files(whole).items() ^ files(killed).items()))
    if differ or open_corpus(killed).manifest != corpus.manifest:
        raise SystemExit(f"the restarted run differs from the uninterrupted one in {differ}")
    splits = {
        name: {"documents": split.documents, "tokens": split.tokens, "bytes": split.bytes}
        for name, split in corpus.manifest.splits.items()
    }
    device = {"cpu": cpu(), "cores": os.cpu_count(), "load_before": LOAD, "system": platform.platform()}
    return facts(device, "numpy", "sentencepiece", "tensorflow-datasets", "array-record") | {
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
        "workers": args.workers,
        "text_files": len(list(source.iterdir())),
        "files_left_out": left_out,
        "splits": splits,
        "left_out": {k: v for k, v in vars(corpus.manifest.report).items() if k != "corrupt"},
        "text_mb": round(num_bytes / 1e6, 2),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(used, 2),
        "mb_per_second": round(num_bytes / seconds / 1e6, 3),
        "peak_pss_mib": round(memory / 2**20, 1),
        "kill": {
            "seed": args.seed,
            "after_seconds": round(moment, 2),
            "parts_done": parts,
            "restart_seconds": round(again, 2),
            "files_equal": len(files(whole)),
        },
        "corpus_sha256": corpus.sha256,
    }


def link_texts(folder: Path, links: Path) -> tuple[Path, list[str]]:
    """A folder of links to the files whose records have a text, and the names of the others."""
    links.mkdir()
    left_out = []
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path) as file:
            has_text = "text" in json.loads(file.readline())
        if has_text:
            (links / path.name).symlink_to(path.resolve())
        else:
            left_out.append(path.name)
    return links, left_out


def run(command: list[str], kill_after: float = 0.0) -> tuple[float, int, bool]:
    """Seconds and peak memory of a command, and whether it was killed: with kill_after, its process group is then."""
    start, peak = time.perf_counter(), 0
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    errors = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(command, env=env, start_new_session=True, stderr=errors)
    while process.poll() is None:
        stopped = time.perf_counter() - start
        if kill_after and stopped >= kill_after:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return stopped, peak, True
        peak = max(peak, group_memory(process.pid))
        time.sleep(EVERY if not kill_after else min(EVERY, max(0.0, kill_after - stopped)))
    seconds = time.perf_counter() - start
    if process.returncode:
        errors.seek(0)
        raise SystemExit(f"{shlex.join(command)} ended with code {process.returncode}:\n{errors.read()}")
    return seconds, peak, False


def group_memory(group: int) -> int:
    """Bytes of memory (PSS) of all processes in a process group."""
    total = 0
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and os.getpgid(int(process.name)) == group:
                lines = (process / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue  # it ended meanwhile
    return total


def cpu_seconds() -> float:
    """Of this program's children that ended, and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def files(folder: Path) -> dict[str, str]:
    """The sha256 of every file below the folder by its name."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


LOAD = [round(load, 2) for load in os.getloadavg()]

if __name__ == "__main__":
    main()
