"""How far off the counted memory of a training step is from the compiler's, and how long compiling takes by layers.

    python benchmarks/plan.py --out benchmarks/results
    python benchmarks/plan.py --cpu 8 --out benchmarks/results
    python benchmarks/plan.py --again benchmarks/results/DATE_plan.json --out benchmarks/results
    python benchmarks/plan.py --layers 12 24 48 96 --out benchmarks/results

Needs libtpu (pip install 'gptjax[tpu-plan]'), and no TPU: everything is compiled for slices that are not here, nothing
is run. The error of a setting is counted / compiled - 1 of all bytes a device: arguments, results that are not the
arguments' memory, temporaries, from the compiler's buffer assignment. FITTED are the settings by which the few numbers
of training/memory.py's Temporaries were chosen; HELD_OUT nobody had looked at when they were fixed. Settings that take
less than 1 GiB are given apart, since a chip's own fast memory then holds a good part. Settings that do not fit are
counted and left out. --cpu does the same for some settings on fake CPU devices. --again takes the compiled bytes of an
earlier report, and counts its settings, but for HELD_OUT, as fitted: they have been looked at. --layers times
processes that trace, lower and compile GPT-2's step with so many layers, scanned: for a CPU device, all of it; for a
TPU slice until its memory is laid out. Their processor seconds, of all threads, are of use on a busy machine.
"""

import argparse
import json
import resource
import shlex
import statistics
from pathlib import Path
from typing import Any

import jax
from report import facts, write_report

from gptjax.config import TrainConfig
from gptjax.config.command_line import load_recipe, parse, take
from gptjax.config.section import InputError
from gptjax.diagnostics.plan.compiled import Target, compile_for
from gptjax.diagnostics.plan.search import Planner
from gptjax.runtime.hardware import topology

# Slice, recipe, rows, micro-batches, remat, attention, mesh (data, fsdp, tensor), further settings.
FITTED = [
    ("v5p:2x2x2", "gpt2 --size 124m", 64, 1, "none", "plain", (1, 8, 1), ""),
    ("v5p:2x2x2", "gpt2 --size 124m", 64, 1, "full", "plain", (1, 8, 1), ""),
    ("v5p:2x2x2", "gpt2 --size 124m", 64, 1, "dots", "plain", (1, 8, 1), ""),
    ("v5p:2x2x2", "gpt2 --size 124m", 64, 1, "names", "plain", (1, 8, 1), ""),
    ("v5p:2x2x2", "gpt2 --size 124m", 64, 1, "full", "plain", (2, 1, 4), ""),
    ("v5p:2x2x2", "gpt2 --size 124m", 256, 4, "full", "plain", (8, 1, 1), ""),
    ("v5p:2x2x2", "gpt2 --size 124m", 128, 1, "none", "blockwise", (8, 1, 1), ""),
    ("v5p:2x2x2", "gpt2 --size 124m", 128, 1, "none", "splash", (8, 1, 1), ""),
    ("v5p:2x2x2", "gpt2 --size 124m", 64, 1, "full", "plain", (8, 1, 1), "--model.dtype float32"),
    ("v5p:2x2x2", "gpt2 --size 124m", 64, 1, "full", "plain", (8, 1, 1), "--optim.kind muon"),
    ("v5p:2x2x2", "gpt2 --size 124m", 32, 1, "dots", "plain", (8, 1, 1), "--data.length 2048"),
    ("v5p:2x2x2", "llama_1b", 16, 1, "full", "plain", (1, 8, 1), ""),
    ("v5p:2x2x2", "llama_1b", 16, 1, "dots", "plain", (1, 8, 1), ""),
    ("v5p:2x2x2", "llama_1b", 16, 1, "full", "plain", (1, 2, 4), ""),
    ("v5p:2x2x2", "llama_1b", 64, 1, "full", "blockwise", (1, 8, 1), ""),
    ("v5p:2x2x2", "llama_1b", 16, 1, "full", "splash", (1, 8, 1), "--data.length 4096"),
    ("v6e:2x4", "llama_1b", 32, 1, "full", "plain", (1, 8, 1), ""),
    ("v6e:2x4", "llama_1b", 64, 2, "dots", "splash", (2, 4, 1), ""),
    ("v6e:2x4", "llama_1b", 8, 1, "none", "blockwise", (1, 8, 1), ""),
    ("v5e:4x4", "gpt3 --size 1.3b", 64, 2, "dots", "splash", (1, 16, 1), ""),
    ("v5p:2x2x4", "gpt3 --size 6.7b", 16, 1, "full", "plain", (1, 16, 1), ""),
    ("v5p:2x2x4", "gpt3 --size 6.7b", 64, 1, "dots", "plain", (1, 16, 1), ""),
    ("v5p:2x2x4", "gpt3 --size 6.7b", 64, 1, "full", "plain", (1, 4, 4), ""),
    ("v5p:2x2x4", "gpt3 --size 6.7b", 16, 1, "none", "blockwise", (1, 16, 1), ""),
    ("v5p:8x8x8", "gpt3 --size 175b", 1600, 25, "full", "plain", (1, 64, 8), ""),
    ("v5e:8x8", "llama_8b", 64, 1, "full", "splash", (1, 64, 1), ""),
    # Held out until the loss came to be cut into fewer chunks.
    ("v4:2x2x2", "gpt2 --size 774m", 8, 1, "none", "splash", (4, 1, 2), "--data.length 1024"),
    ("v4:2x2x2", "gpt2 --size 774m", 32, 2, "dots", "splash", (1, 8, 1), "--data.length 1024 --optim.kind adafactor"),
    ("v5p:2x2x4", "gpt2 --size 1.5b", 512, 4, "dots", "plain", (1, 16, 1), "--data.length 1024 --optim.kind lion"),
    ("v5p:2x2x4", "llama_8b", 128, 2, "names", "plain", (4, 2, 2), "--data.length 2048 --optim.kind lion"),
    ("v5p:2x4x4", "gpt3 --size 6.7b", 128, 2, "full", "blockwise", (16, 2, 1),
     "--data.length 2048 --optim.kind adafactor"),
    ("v6e:4x4", "gpt3 --size 760m", 128, 1, "dots", "blockwise", (16, 1, 1), "--data.length 1024"),
    ("v4:2x2x2", "gpt2 --size 355m", 4, 2, "none", "blockwise", (2, 1, 4), "--data.length 2048 --optim.kind lion"),
    ("v4:2x2x2", "gpt2 --size 355m", 64, 1, "names", "splash", (1, 8, 1), "--data.length 512"),
    ("v5p:2x2x4", "gpt2 --size 1.5b", 16, 1, "full", "splash", (16, 1, 1),
     "--data.length 2048 --model.dtype float32 --optim.kind adafactor"),
    ("v4:2x2x4", "gpt2 --size 1.5b", 64, 1, "names", "plain", (4, 4, 1), "--data.length 2048"),
    ("v6e:4x4", "gpt3 --size 760m", 64, 4, "dots", "plain", (2, 8, 1), "--data.length 2048"),
    ("v6e:4x8", "gpt3 --size 6.7b", 128, 2, "full", "blockwise", (1, 8, 4), "--data.length 2048"),
    ("v4:2x2x2", "gpt2 --size 774m", 64, 2, "full", "splash", (4, 1, 2), "--data.length 2048"),
    ("v6e:4x4", "gpt3 --size 760m", 64, 4, "none", "plain", (2, 2, 4), "--data.length 1024 --optim.kind lion"),
    ("v6e:4x4", "gpt3 --size 760m", 8, 1, "dots", "splash", (1, 8, 2), "--data.length 2048 --optim.kind lion"),
    ("v5e:2x4", "llama_1b", 32, 1, "full", "splash", (4, 2, 1), "--data.length 8192 --optim.kind adafactor"),
    ("v4:2x2x2", "gpt2 --size 774m", 128, 4, "full", "plain", (4, 2, 1), "--data.length 2048 --optim.kind adafactor"),
    ("v6e:2x4", "gpt2 --size 1.5b", 2, 1, "none", "plain", (1, 2, 4), "--data.length 1024 --optim.kind lion"),
    ("v5e:2x4", "gpt2 --size 355m", 8, 2, "dots", "blockwise", (2, 2, 2), "--data.length 512"),
    ("v5p:2x4x4", "gpt3 --size 6.7b", 256, 1, "dots", "splash", (16, 2, 1),
     "--data.length 1024 --model.dtype float32 --optim.kind adafactor"),
    ("v6e:4x4", "llama_1b", 32, 2, "none", "blockwise", (4, 4, 1), "--data.length 2048 --model.dtype float32"),
    ("v5e:4x4", "gpt2 --size 355m", 16, 1, "full", "blockwise", (4, 4, 1), "--data.length 2048"),
    ("v5p:2x4x4", "gpt3 --size 6.7b", 256, 4, "none", "plain", (1, 32, 1), "--data.length 1024"),
    ("v6e:4x4", "llama_1b", 32, 1, "none", "splash", (4, 1, 4), "--data.length 2048 --optim.kind lion"),
    ("v5p:4x4x4", "llama_8b", 1024, 4, "dots", "splash", (8, 8, 1),
     "--data.length 2048 --model.dtype float32 --optim.kind lion"),
    ("v5p:4x4x4", "llama_8b", 128, 1, "full", "splash", (32, 2, 1),
     "--data.length 2048 --model.dtype float32 --optim.kind lion"),
    ("v5p:4x4x4", "llama_8b", 1024, 2, "names", "splash", (32, 2, 1), "--data.length 2048 --optim.kind lion"),
    ("v4:2x2x4", "llama_1b", 128, 1, "names", "splash", (8, 2, 1), "--data.length 2048 --optim.kind lion"),
]  # fmt: skip
# Drawn at random. Nobody had looked at what the compiler says of them when the numbers were fixed.
HELD_OUT = [
    ("v4:2x2x2", "gpt2 --size 355m", 8, 1, "names", "splash", (4, 1, 2), "--data.length 512 --optim.kind adafactor"),
    ("v5p:2x4x4", "gpt2 --size 124m", 64, 1, "none", "plain", (8, 1, 4), "--data.length 4096 --optim.kind adafactor"),
    ("v4:2x2x2", "gpt2 --size 1.5b", 32, 2, "names", "plain", (2, 1, 4), "--data.length 512"),
    ("v6e:4x4", "gpt2 --size 774m", 64, 1, "dots", "blockwise", (2, 4, 2), "--data.length 2048 --optim.kind adafactor"),
    ("v4:2x2x2", "gpt2 --size 124m", 16, 1, "none", "splash", (2, 4, 1), "--data.length 4096 --optim.kind adafactor"),
    ("v5p:2x2x4", "llama_1b", 128, 1, "full", "plain", (2, 8, 1), "--data.length 2048 --optim.kind adafactor"),
    ("v6e:2x4", "llama_8b", 16, 2, "full", "splash", (1, 4, 2), "--data.length 2048 --optim.kind lion"),
    ("v5p:2x4x4", "gpt3 --size 760m", 512, 2, "full", "blockwise", (16, 2, 1),
     "--data.length 4096 --model.dtype float32"),
    ("v4:2x2x4", "gpt2 --size 774m", 256, 4, "names", "splash", (4, 4, 1), "--data.length 2048"),
    ("v5p:2x2x2", "gpt3 --size 760m", 128, 4, "dots", "splash", (2, 4, 1), "--data.length 4096 --optim.kind adafactor"),
    ("v5e:2x4", "gpt2 --size 124m", 64, 1, "dots", "blockwise", (4, 2, 1), "--data.length 1024"),
    ("v5p:2x2x2", "gpt3 --size 6.7b", 256, 4, "names", "blockwise", (2, 4, 1), "--data.length 4096"),
    ("v4:2x2x2", "gpt2 --size 774m", 64, 1, "full", "splash", (2, 4, 1), "--data.length 512 --model.dtype float32"),
    ("v5p:2x2x2", "llama_1b", 8, 1, "none", "plain", (1, 8, 1), "--data.length 512"),
]  # fmt: skip
SMALL = 2**30
KNOWN: dict[tuple[str, str, str], dict[str, Any]] = {}  # of an earlier report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the dated report")
    parser.add_argument("--cpu", type=int, default=0, help="compile for so many fake CPU devices instead")
    parser.add_argument("--again", type=Path, help="an earlier report, whose compiled bytes are taken")
    parser.add_argument("--layers", type=int, nargs="*", default=[], help="time compiling with so many layers instead")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # nothing is computed here: a TPU or GPU stays free
    report: dict[str, Any] = facts("compiled for, not run on", "jax", "jaxlib", "libtpu")
    if args.again:
        earlier = json.loads(args.again.read_text())
        report["compiled_by"] = {name: earlier[name] for name in ("date", "commit", "versions")}
        KNOWN.update({_key(r): r for r in earlier["fitted"] + earlier["held_out"]})
    if args.layers:
        report["layers"] = [compile_time(n) for n in args.layers]
        lines = [
            f"{x['layers']:4} layers: {x['cpu']:.1f} s for a CPU (processor {x['cpu_processor']:.1f}), "
            f"{x['tpu']:.1f} s for v5e:2x4 until its memory (processor {x['tpu_processor']:.1f})"
            for x in report["layers"]
        ]
    elif args.cpu:
        report["cpu"] = [measured(*s) for s in on_cpu(args.cpu)]
        lines = [table(report["cpu"]), f"fake CPU devices: {summary(report['cpu'])}"]
    else:
        held_out = [*map(setting, HELD_OUT)]
        fitted = [s for s in KNOWN if s not in held_out] or [*map(setting, FITTED)]
        report["fitted"] = [measured(*s) for s in fitted]
        report["held_out"] = [measured(*s) for s in held_out]
        lines = [table(report["fitted"] + report["held_out"])]
        lines += [f"{name}: {summary(report[name.replace('-', '_')])}" for name in ("fitted", "held-out")]
    path = write_report(report, args.out, "plan_layers" if args.layers else "plan_cpu" if args.cpu else "plan")
    print("\n".join(lines))
    print(f"wrote {path}")


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["for"], row["recipe"], row["flags"]


def setting(row: tuple) -> tuple[str, str, str]:
    place, recipe, rows, accumulate, remat, attention, (data, fsdp, tensor), more = row
    flags = (
        f"--data.batch-size {rows} --optim.accumulate {accumulate} --model.remat {remat} --model.attention {attention} "
        f"--mesh.data {data} --mesh.fsdp {fsdp} --mesh.tensor {tensor} {more}"
    )
    return place, recipe, flags.strip()


def on_cpu(devices: int) -> list[tuple[str, str, str]]:
    """The fitted settings of two small models whose mesh has so many devices."""
    rows = [r for r in FITTED if r[1] in ("gpt2 --size 124m", "llama_1b") and r[5] != "splash"]
    return [setting((f"cpu:{devices}", *r[1:])) for r in rows if r[6][0] * r[6][1] * r[6][2] == devices]


def shipped(recipe: str, flags: str) -> TrainConfig:
    """The config of NAME [--size SIZE] with flags."""
    size, (name,) = take(recipe.split(), "size")
    return parse(load_recipe(name).config("pretrain", size), shlex.split(flags), "benchmark")


def measured(place: str, recipe: str, flags: str) -> dict[str, Any]:
    """A setting with the counted bytes, the compiled ones and the error, or why there is none."""
    row: dict[str, Any] = {"for": place, "recipe": recipe, "flags": flags}
    where, config = topology(place), shipped(recipe, flags)
    known = KNOWN.get((place, recipe, flags), {})
    if "left_out" in known:
        return known
    try:
        counted = Planner(config, where).as_written()
        if known:
            total = counted.memory.total
            return known | {"counted": total, "error": round(total / known["compiled"] - 1, 4)}
        target = Target(devices=where.devices, tpu=where.libtpu, megacore=where.kind == "v4")
        compiled = compile_for(counted.config, target)
    except InputError as e:
        return row | {"left_out": str(e)}
    print(f"{recipe} {flags}", flush=True)
    if not compiled.fits:
        return row | {"left_out": f"does not fit: {compiled.error}", "seconds": compiled.seconds}
    total = counted.memory.total
    return row | {
        "counted": total, "compiled": compiled.total, "temporaries": compiled.temporaries,
        "error": round(total / compiled.total - 1, 4), "seconds": compiled.seconds,
    }  # fmt: skip


def compile_time(layers: int) -> dict[str, float]:
    """Seconds of the processes that compile GPT-2's step with so many layers, from their start to their end."""
    flags = f"--model.num-layers {layers} --data.batch-size 8 --optim.accumulate 1 --model.remat full --mesh.data 1"
    one, eight = (shipped("gpt2 --size 124m", f"{flags} --mesh.fsdp {n}") for n in (1, 8))
    used = [resource.getrusage(resource.RUSAGE_CHILDREN)]
    made = []
    for config, target in ((one, Target(devices=1)), (eight, Target(devices=8, tpu="v5e:2x4"))):
        made.append(compile_for(config, target))
        used.append(resource.getrusage(resource.RUSAGE_CHILDREN))
    spent = [b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(used, used[1:])]
    return {
        "layers": layers, "cpu": made[0].seconds, "cpu_processor": round(spent[0], 2), "cpu_bytes": made[0].total,
        "tpu": made[1].seconds, "tpu_processor": round(spent[1], 2), "tpu_bytes": made[1].total,
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> str:
    errors = [abs(r["error"]) for r in rows if "error" in r and r["compiled"] >= SMALL]
    small = [abs(r["error"]) for r in rows if "error" in r and r["compiled"] < SMALL]
    said = (
        f"{len(errors)} settings, worst {max(errors):.1%}, median {statistics.median(errors):.1%}" if errors else "none"
    )
    below = f"; below 1 GiB: {len(small)}, worst {max(small):.1%}" if small else ""
    return f"{said}{below}; left out: {sum('left_out' in r for r in rows)}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| error | compiled GiB | for | recipe | settings |", "|---|---|---|---|---|"]
    for r in sorted((r for r in rows if "error" in r), key=lambda r: r["error"]):
        lines.append(f"| {r['error']:+.1%} | {r['compiled'] / 2**30:.2f} | {r['for']} | {r['recipe']} | {r['flags']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
