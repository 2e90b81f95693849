"""Exact resume of a killed run on every kind of source: its loss curve against that of an uninterrupted one.

    python benchmarks/resume_sources.py --text FOLDER --out benchmarks/results

FOLDER holds .jsonl.gz files with a "text" in each line. A tiny model is trained on (prepared) a folder that
`gptjax prepare` made in TFDS's format, (tfds) a TFDS dataset, streamed by 2 workers,
(stream) JSONL.gz streamed by 2 workers, (parquet) a Parquet file and (mixture) three JSONL.gz files with one tokenizer
trained on them. Each is trained once uninterrupted, and once killed at random moments, with SIGKILL to its process
group, and run again by the same command, the last time with another number of workers. The two metrics.jsonl must
agree in every training and evaluation line, bit for bit, with one line a step. At the end a file of the source is
changed, and going on must be refused with exit code 2.
"""

import argparse
import gzip
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import ROOT, facts, write_report

from gptjax.data.corpus import example_type

MODEL = """
--model.num-layers 1 --model.width 32 --model.num-heads 2 --model.dtype float32 --model.dropout 0.1 --data.length 64
--data.batch-size 8 --optim.warmup-steps 10 --evaluate.max-rows 16 --checkpoint.keep-best 1 --sinks --no-sample
"""
BYTES = "--tokenizer.kind bytes --tokenizer.vocab-size 258"
COMPARED = ("step", "updates", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_bits_per_byte")
TEXT_BYTES = 1 << 20  # of each file of text


@dataclass(frozen=True)
class Case:
    """A source: the settings that name it, and the numbers of workers that its runs are started with in turn."""

    name: str
    settings: str
    workers: tuple[int, ...] = (0, 2)
    change: Path | None = None  # file of the source to be changed at the end


def cases(texts: list[Path], folder: Path) -> list[Case]:
    """The five sources, made in `folder` from at least three .jsonl.gz files."""
    sources = [shortened(path, folder / f"source{i}") for i, path in enumerate(texts[:3])]
    prepared, parquet, tfds = folder / "prepared", folder / "text.parquet", folder / "tfds"
    command = ["prepare", "--source", str(sources[0]), "--out", str(prepared), *BYTES.split()]
    subprocess.run([sys.executable, "-m", "gptjax", *command], check=True, env=environment(folder))
    write_parquet(sources[1], parquet)
    write_tfds(tfds, texts_of(sources[2]))
    stream = f"{BYTES} --data.loading stream"
    mixed = " ".join(f"{name}={source}" for name, source in zip(("first", "second", "third"), sources))
    return [
        Case("prepared", f"{BYTES} --data.source {prepared}"),
        Case("tfds", f"{stream} --data.source tfds:{tfds}", (2, 1)),
        stream_case(sources[0]),
        Case("parquet", f"{BYTES} --data.source {parquet}", change=parquet),
        mixture_case(mixed, "--tokenizer.kind sentencepiece --tokenizer.vocab-size 512", sources[1] / "text.jsonl.gz"),
    ]


def stream_case(source: Path) -> Case:
    settings = f"{BYTES} --data.loading stream --data.source {source}"
    return Case("stream", settings, (2, 3), change=next(source.iterdir()))


def mixture_case(sources: str, tokenizer: str, change: Path | None = None) -> Case:
    weights = "--data.weights 0.5 1 2"
    return Case("mixture", f"{tokenizer} --data.source mixture --data.mixture {sources} {weights}", change=change)


def measure(case: Case, folder: Path, steps: int, kills: int, rng: random.Random) -> dict[str, Any]:
    """Runs one case and returns what was seen; exits where the curves differ or a change is not refused."""
    straight, killed = folder / f"{case.name}_straight", folder / f"{case.name}_killed"
    began = time.monotonic()
    code, errors = finish(start(case, straight, steps, case.workers[0], folder))
    require(code == 0, case, errors)
    killed_at = []
    for number in range(kills):
        process = start(case, killed, steps, case.workers[0], folder)
        low, high = number * steps // kills, (number + 1) * steps // kills
        # Beyond the second save, which waits for the first: a run with nothing to go on from proves nothing.
        low = max(low, 2 * saved_every(steps))
        target = rng.randint(low + 1, max(low + 1, high - 10))
        while lines_of(killed) < target and process.poll() is None:
            time.sleep(rng.uniform(0, 0.02))
        time.sleep(rng.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        code, errors = finish(process)
        require(code == -signal.SIGKILL, case, f"it ended before it was killed: {errors}")
        killed_at.append(lines_of(killed))
    code, errors = finish(start(case, killed, steps, case.workers[-1], folder))
    require(code == 0, case, errors)
    want, got = curve(straight), curve(killed)
    trained = [line["step"] for line in read(killed) if "loss" in line]
    require(trained == list(range(1, steps + 1)), case, f"its steps are {trained}, killed at {killed_at}")
    require(want == got, case, f"the curves differ, killed at {killed_at}")
    found = {
        "steps": steps, "killed_after_steps": killed_at, "workers": case.workers[0],
        "workers_of_the_last_part": case.workers[-1], "identical": True, "lines_compared": len(want),
        "last_loss": read(killed)[-2].get("loss"), "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    if case.change is not None:
        found["refused"] = refusal(case, killed, steps + 10, folder)
    return found


def refusal(case: Case, run: Path, steps: int, folder: Path) -> str:
    """The line on stderr where the run shall go on after a file of its source was changed."""
    assert case.change is not None
    with case.change.open("ab") as file:
        file.write(gzip.compress(b'{"text": "one more line"}\n'))
    code, errors = finish(start(case, run, steps, case.workers[0], folder))
    said = [line for line in errors.splitlines() if line.startswith("gptjax: ")]
    require(code == 2 and len(said) == 1, case, f"a changed source gave code {code}: {errors}")
    return said[0].replace(str(folder), "FOLDER")


def start(case: Case, run: Path, steps: int, workers: int, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "gptjax", "pretrain", "shakespeare_char", "--run-dir", str(run)]
    command += MODEL.split()
    command += f"--steps {steps} --checkpoint.every {saved_every(steps)} --evaluate.every {steps // 2}".split()
    command += [*case.settings.split(), "--data.workers", str(workers)]
    return subprocess.Popen(
        command, env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def saved_every(steps: int) -> int:
    return max(1, steps // 12)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate(timeout=900)
    return process.returncode, errors


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    more = {"PYTHONPATH": path, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}
    return os.environ | more


def require(ok: bool, case: Case, what: str) -> None:
    if not ok:
        raise SystemExit(f"{case.name}: {what}")


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def curve(run: Path) -> list[tuple]:
    """Every training and evaluation line, without what a clock says, and with the tokens of each source."""
    return [
        tuple(line.get(k) for k in COMPARED)
        + tuple(v for k, v in line.items() if k.startswith("tokens_") and k != "tokens_per_second")
        for line in read(run)
    ]


def shortened(path: Path, folder: Path) -> Path:
    """A folder with the first lines of a .jsonl.gz file, about TEXT_BYTES of them."""
    folder.mkdir()
    size = 0
    with gzip.open(path, "rb") as whole, gzip.open(folder / "text.jsonl.gz", "wb") as out:
        for line in whole:
            out.write(line)
            size += len(line)
            if size >= TEXT_BYTES:
                break
    return folder


def texts_of(source: Path) -> list[str]:
    with gzip.open(source / "text.jsonl.gz", "rb") as file:
        return [json.loads(line)["text"] for line in file]


def write_parquet(source: Path, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts_of(source)}), path, row_group_size=100)


def write_tfds(folder: Path, texts: list[str], field: str = "text", **splits: list[str]) -> Path:
    """A prepared TFDS dataset of two shards a split, as download_and_prepare writes it."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    folder.mkdir(parents=True)
    data_dir: Any = folder
    infos = []
    for name, own in {"train": texts, **splits}.items():
        half = len(own) // 2
        for shard, part in enumerate((own[:half], own[half:])):
            path = folder / f"own-{name}.array_record-{shard:05d}-of-00002"
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
            for text in part:
                example = example_type()()
                example.features.feature[field].bytes_list.value.append(text.encode())
                writer.write(example.SerializeToString())
            writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=data_dir, dataset_name="own", split=name, filetype_suffix="array_record"
        )
        lengths = [half, len(own) - half]
        infos.append(tfds.core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=0, filename_template=template))
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder),
        features=tfds.features.FeaturesDict({field: tfds.features.Text()}),
        split_infos=infos,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,
    )
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of at least three .jsonl.gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the dated report")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], help="cases to run; all of them where none is named")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 16), help="of the moments")
    args = parser.parse_args()
    texts = sorted(args.text.glob("*.jsonl.gz"), key=lambda path: path.stat().st_size)
    if len(texts) < 3:
        parser.error(f"--text {args.text}: {len(texts)} .jsonl.gz files; wanted at least three")
    rng, found = random.Random(args.seed), {}
    with tempfile.TemporaryDirectory(prefix="gptjax-bench-") as name:
        for case in cases(texts[-3:], Path(name)):
            if case.name in args.only or not args.only:
                found[case.name] = measure(case, Path(name), args.steps, args.kills, rng)
                print(case.name, json.dumps(found[case.name]), flush=True)
    device = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    report = facts(device, "jax", "jaxlib", "tensorflow-datasets") | {
        "command": "python benchmarks/resume_sources.py --text FOLDER --out benchmarks/results "
        f"--steps {args.steps} --kills {args.kills} --seed {args.seed}",
        "texts": [path.name for path in texts[-3:]],
        "cases": found,
    }
    path = write_report(report, args.out, "resume_sources")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
