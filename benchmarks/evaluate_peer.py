"""Evaluation beside lm-eval and transformers in torch: the same answers in float32, and the seconds they take.

    python benchmarks/evaluate_peer.py --gguf MODEL.gguf --data FOLDER --out benchmarks/results

The folder holds mmlu_1000.jsonl, bigbench_mc.jsonl.gz and wikipedia_1000_passages.jsonl. One model, read from the GGUF
file by either side's own code, answers the same strings: MMLU with the texts of its answers as continuations, a family
of BIG-bench with 0, 1 and 4 examples in context, and whole passages of Wikipedia. Choices must agree wherever the two
best of transformers are more than MARGIN nats apart, by the sum and by the mean over characters; texts by their bits.
The requests go through lm-eval with our model class, too, whose answers must be those of its class for transformers. Of
some passages transformers gives the log-likelihoods in float64 as well, which tells whose rounding a difference is.

Seconds are those of whole processes on the MMLU items, ours and theirs in turn, and of the scoring alone; theirs at the
best of --batches, found before on its first items, and without the time in which lm-eval reads the tasks that it ships.
"""

import argparse
import gzip
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from report import facts, processor, write_report

TRIED = 24
EXACT = 8  # passages in float64
MARGIN = 1e-3  # nats: where two answers are closer, rounding may choose
FAMILY, SHOTS = "general_knowledge", (0, 1, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--items", type=int, default=200, help="MMLU items, those that are timed")
    parser.add_argument("--few", type=int, default=40, help="items of the family, passages, MMLU items by our class")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 2, 4, 8, 16), help="sizes that lm-eval tries")
    parser.add_argument("--work", type=Path, help="folder for the run and the converted model, kept for the next time")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report = compare(args, Path(args.work or temporary).absolute())
    print(table(report))
    if args.out:
        print(f"wrote {write_report(report, args.out, 'evaluate_peer')}")


def compare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every comparison, as the report's JSON."""
    work.mkdir(parents=True, exist_ok=True)
    prepare_models(args.gguf, work)
    files = prepare_items(args.data, args.items, args.few, work)
    report = facts(processor(), "jax", "gptjax", "torch", "transformers", "lm_eval")
    report["choices"], report["seconds"] = {}, {"gptjax eval": [], "lm_eval --model hf": []}
    batch = best_batch(work, files["mmlu"], args.batches)
    report["batch_size"] = batch["best"]
    report["batch_sizes_tried"] = batch["seconds"]
    for name, path in files.items():
        items, took = ours(work, path, shots=int(name.rpartition("_")[2]) if name.startswith(FAMILY) else 0)
        rows = [
            {"context": x.get("context", ""), "continuations": x.get("continuations", [x.get("text")])} for x in items
        ]
        theirs = answers(work, "hf", rows, batch["best"], rolling=name == "wikipedia")
        if name == "wikipedia":
            report["bits_per_byte"] = bits_per_byte(items, theirs["answers"])
            through = answers(work, "gptjax", rows, 1, rolling=True)
            sizes = [[item["tokens"]] for item in items]
            report["lm_eval_rolling"] = difference(through["answers"], theirs["answers"], sizes)
            exact = answers(work, "hf", rows[:EXACT], 1, rolling=True, dtype="float64")["answers"]
            report["from_float64"] = {
                name: difference(found["answers"][:EXACT], exact, sizes[:EXACT])
                for name, found in (("gptjax", through), ("transformers", theirs))
            }
            continue
        report["choices"][name] = agreement(items, theirs["answers"])
        if name == "mmlu":
            report["seconds"]["gptjax eval"].append(took)
            report["seconds"]["lm_eval --model hf"].append(theirs["seconds"])
            through = answers(work, "gptjax", rows[: args.few], 1)
            sizes = [item["tokens"] for item in items[: args.few]]
            report["lm_eval_choices"] = difference(through["answers"], theirs["answers"][: args.few], sizes)
            for _ in range(args.rounds - 1):
                report["seconds"]["gptjax eval"].append(ours(work, path)[1])
                again = answers(work, "hf", rows, batch["best"])
                report["seconds"]["lm_eval --model hf"].append(again["seconds"])
    return report


# -- Models and items.


def prepare_models(gguf: Path, work: Path) -> None:
    """Imports the file as a run, and converts it for transformers by transformers' own reader."""
    if not (work / "run").exists():
        subprocess.run([sys.executable, "-m", "gptjax", "import", str(gguf.absolute()), "run"], cwd=work, check=True)
    if not (work / "hf").exists():
        child(work, {"job": "convert", "gguf": str(gguf.absolute()), "folder": str(work / "hf")})


def prepare_items(data: Path, items: int, few: int, work: Path) -> dict[str, Path]:
    """The files of items, by name; FAMILY is there once for each number of examples."""
    with gzip.open(data / "bigbench_mc.jsonl.gz", "rt", encoding="utf-8") as file:
        family = [line for line in file if json.loads(line)["task"] == FAMILY]
    texts = {
        "mmlu": (data / "mmlu_1000.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:items],
        "wikipedia": (data / "wikipedia_1000_passages.jsonl").read_text(encoding="utf-8").splitlines(True)[:few],
        FAMILY: family[:few],
    }
    head = {"kind": "multiple_choice", "prompt": "Question: {input}\nAnswer:", "gold": "answer"}
    for name, lines in texts.items():
        first = json.dumps({"task": {"kind": "text"} if name == "wikipedia" else head}) + "\n"
        (work / f"{name}.jsonl").write_text(first + "".join(lines), encoding="utf-8")
    paths = {name: work / f"{name}.jsonl" for name in texts}
    return {k: v for k, v in paths.items() if k != FAMILY} | {f"{FAMILY}_{k}": paths[FAMILY] for k in SHOTS}


def ours(work: Path, path: Path, shots: int = 0) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The lines that `gptjax eval` writes for the items of a file, in order, and its seconds."""
    out, numbers = work / "items.jsonl", work / "numbers.json"
    task = str(path) if shots == 0 else f"{path}:shots={shots}"
    command = [
        sys.executable,
        "-m",
        "gptjax",
        "eval",
        "run",
        "--tasks",
        task,
        "--items",
        str(out),
        "--json",
        str(numbers),
    ]
    start = time.perf_counter()
    subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL)
    seconds = {
        "process": time.perf_counter() - start,
        "scoring": json.loads(numbers.read_text())["tasks"][0]["seconds"],
    }
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()], seconds


# -- lm-eval, in processes of its own.


def child(work: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The result of a job done by this file in a process of its own, with the seconds of that process."""
    asked, answered = work / "job.json", work / "answer.json"
    asked.write_text(json.dumps(job))
    start = time.perf_counter()
    subprocess.run([sys.executable, __file__, "--job", str(asked), str(answered)], check=True)
    process = time.perf_counter() - start
    result = json.loads(answered.read_text())
    return result | {"seconds": {"process": process, "scoring": result.get("scoring", 0.0)}}


def answers(
    work: Path,
    model: str,
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    rolling: bool = False,
    dtype: str = "float32",
) -> dict[str, Any]:
    """lm-eval's `answers`, a list of log-likelihoods a row, and `seconds`, by its class hf or by ours."""
    path = work / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = work / ("hf" if model == "hf" else "run")
    job = {"job": "answer", "model": model, "folder": str(folder), "rows": str(path), "cache": str(work / "cache")}
    return child(work, job | {"batch_size": batch_size, "rolling": rolling, "dtype": dtype})


def best_batch(work: Path, path: Path, sizes: Sequence[int]) -> dict[str, Any]:
    """The batch size by which transformers answers the first items soonest, and the seconds of each that was tried."""
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1 : TRIED + 1]]
    rows = [
        {"context": f"Question: {x['input']}\nAnswer:", "continuations": [f" {c}" for c in x["choices"]]} for x in read
    ]
    seconds = {size: answers(work, "hf", rows, size)["scoring"] for size in sizes}
    return {"best": min(seconds, key=lambda size: seconds[size]), "seconds": seconds}


def do_job(job: dict[str, Any]) -> dict[str, Any]:
    """A job's result, in the child."""
    return {"convert": convert, "answer": answer}[job["job"]](job)


def convert(job: dict[str, Any]) -> dict[str, Any]:
    """Writes the model of a GGUF file, dequantised to float32 by transformers, as a folder.

    transformers 5.24 cuts text into words as GPT-2 does, whatever tokenizer.ggml.pre says; for smollm, the digits
    that SmolLM2's own tokenizer and llama.cpp cut off are cut off here, too.
    """
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import Digits, Sequence

    source = {"pretrained_model_name_or_path": str(Path(job["gguf"]).parent), "gguf_file": Path(job["gguf"]).name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config  # its tensors are no longer quantised
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(job["folder"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    pre = GGUFReader(job["gguf"]).fields.get("tokenizer.ggml.pre")
    if pre is not None and pre.contents() == "smollm":
        words = tokenizer.backend_tokenizer.pre_tokenizer
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), words])
    tokenizer.save_pretrained(job["folder"])
    return {}


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """The answers of lm-eval to a file of rows, and the seconds of the scoring."""
    import os

    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": job["cache"]}
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if job["model"] == "hf":
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

        model: Any = HFLM(job["folder"], device="cpu", dtype=job["dtype"], batch_size=job["batch_size"])
    else:
        from gptjax.interop.lm_eval import GptjaxLM

        model = GptjaxLM(job["folder"])
    task = {"task": "rows", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": job["rows"]}},
            "test_split": "test", "target_delimiter": "", "num_fewshot": 0}  # fmt: skip
    if job["rolling"]:
        metric = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        task |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{continuations[0]}}"}
    else:
        metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
        task |= {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "continuations",
                 "doc_to_target": "0"}  # fmt: skip
    start = time.perf_counter()
    found: Any = lm_eval.simple_evaluate(
        model=model, tasks=[task | {"metric_list": [metric]}], bootstrap_iters=0, log_samples=True,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    scoring = time.perf_counter() - start
    samples = sorted(found["samples"]["rows"], key=lambda sample: sample["doc_id"])
    return {"answers": [[first(resp) for resp in sample["resps"]] for sample in samples], "scoring": scoring}


def first(value: Any) -> float:
    """The number that a response of lm-eval begins with."""
    while isinstance(value, list | tuple):
        value = value[0]
    return float(value)


# -- Comparisons.


def difference(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]]
) -> dict[str, float]:
    """The largest difference of log-likelihoods in nats, in all and a token, and how many log-likelihoods there are."""
    gaps = [abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    each = [gap / n for gap, n in zip(gaps, itertools.chain(*tokens), strict=True)]
    return {"count": len(gaps), "largest": max(gaps), "largest_a_token": max(each)}


def agreement(items: Sequence[dict[str, Any]], theirs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Counts of choices that agree, that differ, and that differ where two are within MARGIN; accuracies."""
    scores, tokens = ([item[name] for item in items] for name in ("scores", "tokens"))
    result: dict[str, Any] = difference(scores, theirs, tokens)
    for name, divide in (("by_sum", False), ("by_characters", True)):
        counts = {"agree": 0, "differ": 0, "close": 0}
        right = np.zeros((2, len(items)))
        for i, (item, scores) in enumerate(zip(items, theirs, strict=True)):
            sizes = np.array(item["characters"]) if divide else 1
            mine, other = np.array(item["scores"]) / sizes, np.array(scores) / sizes
            best = np.sort(np.array(other))[::-1]
            same = mine.argmax() == other.argmax()
            counts["agree" if same else "close" if best[0] - best[1] <= MARGIN else "differ"] += 1
            right[:, i] = [choice.argmax() in item["gold"] for choice in (mine, other)]
        result[name] = counts | {"accuracy": right[0].mean(), "transformers": right[1].mean()}
    return result


def bits_per_byte(items: Sequence[dict[str, Any]], theirs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Bits per byte of all passages together by ours and by transformers, and the largest difference of one passage."""
    size = sum(item["bytes"] for item in items) * math.log(2)
    mine, other = [item["score"] for item in items], list(itertools.chain(*theirs))
    most = max(abs(a - b) / item["bytes"] / math.log(2) for a, b, item in zip(mine, other, items, strict=True))
    return {"passages": len(items), "gptjax": -sum(mine) / size, "transformers": -sum(other) / size, "largest": most}


def gap(found: dict[str, float]) -> str:
    """A `difference` as text."""
    return f"{found['largest']:.2g} nats ({found['largest_a_token']:.2g} a token)"


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{'items':31}{'n':>5}{'agree':>7}{'differ':>8}{'close':>7}{'accuracy':>10}  largest difference"]
    for name, found in report["choices"].items():
        for how in ("by_sum", "by_characters"):
            c = found[how]
            n = c["agree"] + c["differ"] + c["close"]
            lines.append(f"{name + ' ' + how[3:]:31}{n:5}{c['agree']:7}{c['differ']:8}{c['close']:7}"
                         f"{c['accuracy']:10.3f}  {gap(found)}")  # fmt: skip
    bits = report["bits_per_byte"]
    lines.append(f"bits per byte of {bits['passages']} passages: gptjax {bits['gptjax']:.6f}, transformers "
                 f"{bits['transformers']:.6f}, largest difference {bits['largest']:.2g}")  # fmt: skip
    for name, what in (("lm_eval_choices", "loglikelihood"), ("lm_eval_rolling", "loglikelihood_rolling")):
        lines.append(f"lm-eval's {what} by our class: {report[name]['count']} answers within "
                     f"{gap(report[name])} of its class hf")  # fmt: skip
    for name, found in report["from_float64"].items():
        lines.append(f"{name} in float32: {found['count']} passages within {gap(found)} of transformers in float64")
    for name, rounds in report["seconds"].items():
        shown = ", ".join(" ".join(f"{k} {v:.1f}" for k, v in took.items()) for took in rounds)
        lines.append(f"{name}: seconds of each round: {shown}")
    ours, theirs = ({k: min(took[k] for took in rounds) for k in rounds[0]} for rounds in report["seconds"].values())
    ratios = ", ".join(f"{theirs[k] / ours[k]:.2f} ({k})" for k in ours)
    lines.append(f"lm_eval --model hf, batch size {report['batch_size']}, takes so many times as long: {ratios}")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        Path(sys.argv[3]).write_text(json.dumps(do_job(json.loads(Path(sys.argv[2]).read_text()))))
    else:
        main()
