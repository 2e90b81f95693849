"""Ten losses and the digest of every leaf after them, bit for bit, of two checkouts of gptjax on this machine.

    git worktree add /tmp/before COMMIT
    python benchmarks/same_numbers.py /tmp/before .

Trains six small runs with each checkout, every run in a process of its own: the quickstart's shape, a GPT-2 shape with
dropout and accumulation, meshes of fsdp=4 x tensor=2 and context=2 of fake devices, a stream, and a mixture. Exits with
1 where a loss or a leaf differs, and says which. A refactor shows this table; a change of numbers says why.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

BYTES = "--tokenizer.kind bytes --tokenizer.vocab-size 258"
SMALL = f"--model.num-layers 2 --model.width 64 --model.num-heads 4 --model.mlp-ratio 4 {BYTES}"
SMALL += " --data.length 64 --data.batch-size 8"
GPT2 = "--model.dropout 0.1 --optim.accumulate 2 --model.activation gelu --model.norm layernorm --model.biases"
# name: (fake devices, recipe and flags)
CASES = {
    "quickstart": (1, "quickstart"),
    "gpt2, dropout, accumulation": (1, f"quickstart {SMALL} {GPT2} --model.positions learned"),
    "fsdp=4 x tensor=2": (8, f"quickstart {SMALL} --mesh.fsdp 4 --mesh.tensor 2"),
    "context=2": (2, f"quickstart {SMALL} --mesh.context 2"),
    "stream": (1, f"quickstart {SMALL} --data.loading stream --data.workers 2"),
    "mixture": (1, f"quickstart {SMALL} --data.source mixture --data.weights 3 1 --data.mixture"),
}

DTYPE = ("--model.dtype", "bfloat16")  # named: what auto takes is measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "text"
        text.mkdir()
        for name, count in {"a": 800, "b": 400}.items():
            lines = (
                f"{name} {i}: the quick brown fox, {i * i % 97} of {i % 13} times. " * (1 + i % 7) for i in range(count)
            )
            (text / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        for name in args.only:
            devices, flags = CASES[name]
            if name != "quickstart":  # which is on its own built-in text
                flags += (
                    f" a={text / 'a.jsonl'} b={text / 'b.jsonl'}" if name == "mixture" else f" --data.source {text}"
                )
            found = [
                trained(
                    checkout.resolve(), Path(work) / f"{name.replace(' ', '-')}-{i}", devices, [*flags.split(), *DTYPE]
                )
                for i, checkout in enumerate((args.before, args.after))
            ]
            different += report(name, *found)
    return min(different, 1)


def trained(checkout: Path, run: Path, devices: int, flags: list[str]) -> tuple[list[float], dict]:
    """The ten losses of a run by a checkout, and the digest of each leaf of its last checkpoint."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    recipe, *flags = flags
    main = "import sys; from gptjax.cli import main; sys.exit(main())"
    command = [
        sys.executable, "-c", main, "pretrain", str(checkout / "configs" / f"{recipe}.py"), *flags,
        "--steps", "10", "--run-dir", str(run), "--no-sample", "--evaluate.max-rows", "8",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=run.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (digests,) = (run / "checkpoints").glob("*10/digests/*.json")
    return [line["loss"] for line in lines if "loss" in line], json.loads(digests.read_text())


def report(name: str, before: tuple[list[float], dict], after: tuple[list[float], dict]) -> bool:
    """Prints a line about a case; True where something differs."""
    steps = [i for i, (a, b) in enumerate(zip(before[0], after[0], strict=True), 1) if a != b]
    leaves = sorted(n for n in before[1].keys() | after[1].keys() if before[1].get(n) != after[1].get(n))
    same = f"{len(before[0])} losses and {len(before[1])} leaves the same, last loss {before[0][-1]!r}"
    print(f"{name}: {f'losses differ at steps {steps}, leaves {leaves}' if steps or leaves else same}", flush=True)
    return bool(steps or leaves)


if __name__ == "__main__":
    sys.exit(main())
