"""Memory and speed of the loss in chunks against the plain one, which holds the float32 logits of the whole batch.

    python benchmarks/cross_entropy.py --out benchmarks/results

Loss and both gradients (hidden states and head) of 4,096 positions, width 768 and 50,304 ids. Memory is what the
compiled program needs beside its arguments: temporaries and results. The two take turns, and the ratio of times is that
of each round. Fails (exit 1) where loss or gradients differ by more than the tolerance from the plain float32 ones.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from report import facts, write_report

from gptjax.runtime.process import tune_process
from gptjax.training.losses import cross_entropy

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def plain(x_BLD: jax.Array, head_VD: jax.Array, targets_BL: jax.Array) -> jax.Array:
    logits_BLV = jnp.einsum("BLD,VD->BLV", x_BLD, head_VD.astype(x_BLD.dtype)).astype(jnp.float32)
    picked_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits_BLV, axis=-1) - picked_BL).mean()


def chunked(x_BLD: jax.Array, head_VD: jax.Array, targets_BL: jax.Array) -> jax.Array:
    weights_BL = jnp.full(targets_BL.shape, 1 / targets_BL.size)
    return cross_entropy(x_BLD, head_VD, targets_BL, weights_BL, head_VD.shape[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs=2, default=(4, 1024), help="rows and length")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab-size", type=int, default=50_304)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(TOLERANCE), default=tuple(TOLERANCE))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    args = parser.parse_args()

    (rows, length), width, vocab = args.positions, args.width, args.vocab_size
    keys = jax.random.split(jax.random.key(0), 3)
    x_BLD, targets_BL = (
        jax.random.normal(keys[0], (rows, length, width)),
        jax.random.randint(keys[1], (rows, length), 0, vocab),
    )
    head_VD = 0.02 * jax.random.normal(keys[2], (vocab, width))
    want = jax.jit(jax.value_and_grad(plain, (0, 1)))(x_BLD, head_VD, targets_BL)
    report, wrong = [], False
    for dtype in args.dtypes:
        inputs = (x_BLD.astype(dtype), head_VD, targets_BL)
        programs = {
            f.__name__: jax.jit(jax.value_and_grad(f, (0, 1))).lower(*inputs).compile() for f in (plain, chunked)
        }
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        line: dict = {"dtype": dtype}
        for name, program in programs.items():
            found = program(*inputs)
            errors = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), found, want)
            memory: Any = program.memory_analysis()
            line[name] = {
                "bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
                "loss_error": errors[0], "hidden_gradient_error": errors[1][0], "head_gradient_error": errors[1][1],
            }  # fmt: skip
            # In float32 both are held to it; in bfloat16 the plain form shows what rounding alone does.
            wrong |= name == "chunked" and max(jax.tree.leaves(errors)) > TOLERANCE[dtype]
        for _ in range(args.rounds):
            for name, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*inputs))
                seconds[name].append(time.perf_counter() - start)
        ratios = [c / p for c, p in zip(seconds["chunked"], seconds["plain"], strict=True)]
        for name in programs:
            line[name]["seconds"] = statistics.median(seconds[name])
        line["time_ratio"], line["time_ratios"] = statistics.median(ratios), ratios
        line["memory_ratio"] = line["chunked"]["bytes"] / line["plain"]["bytes"]
        report.append(line)
        print(
            f"{dtype:9s} memory {line['memory_ratio']:.3f} ({line['chunked']['bytes'] / 2**20:,.0f} of "
            f"{line['plain']['bytes'] / 2**20:,.0f} MiB)  time {line['time_ratio']:.3f} "
            f"({line['chunked']['seconds']:.3f} of {line['plain']['seconds']:.3f} s)  largest error "
            f"{max(v for k, v in line['chunked'].items() if k.endswith('error')):.1e} of the largest value",
            flush=True,
        )
    setting = {"positions": [rows, length], "width": width, "vocab_size": vocab, "rounds": args.rounds}
    document = facts(f"{jax.devices()[0].device_kind}", "jax", "jaxlib") | {"setting": setting, "results": report}
    print(write_report(document, args.out, "cross_entropy"))
    if wrong:
        print("the chunked loss or its gradient is wrong", file=sys.stderr)
    return int(wrong)


if __name__ == "__main__":
    tune_process()
    sys.exit(main())
