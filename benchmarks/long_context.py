"""Ten training steps at a length of 32,768 with attention by blocks, where the plain scores would take 8 GiB a layer.

    python benchmarks/long_context.py --out benchmarks/results
    python benchmarks/long_context.py --context 4 --out benchmarks/results
    python benchmarks/long_context.py --context 4 --length 4096 --rows 2 --block 128 --layers 4 --groups 2 --against-one
    python benchmarks/long_context.py --context 4 --length 131072 --steps 0

A decoder of 2 layers, width 64 and 2 heads on bytes, in float32; the normal training step. The backward pass computes
each layer again, all but the output of its attention. Prints losses, seconds a step, processor seconds a step (which
other work on the machine hardly changes), what the compiled step needs on each device beside its arguments, and the
process's peak memory.

--context N has N devices share each row; on a CPU these are N parts of this processor, so that the numbers and the
memory of a device mean something and the time does not. --against-one trains on one device a row too, and exits with 1
unless ten losses agree within 1e-5 and each leaf of the first gradient within 1e-4 of its largest number (or of a
thousandth of the largest of all). --steps 0 only compiles.
"""

import argparse
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from report import ROOT, facts, write_report

from gptjax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TokenizerConfig, TrainConfig
from gptjax.ops.attention import describe
from gptjax.parallel.sharding import make_mesh, to_global
from gptjax.training.build import build_components
from gptjax.training.losses import language_model_loss
from gptjax.training.step import compile_step, init_state

TEXT = ROOT / "gptjax" / "data" / "corpora" / "shakespeare.txt"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=32_768, help="tokens a row (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1, help="rows a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="training steps (default: %(default)s)")
    parser.add_argument("--block", type=int, default=512, help="model.attention_block (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="model.num_layers (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=1, help="model.queries_per_kv, 1 or 2 (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1, help="devices that share a row (default: %(default)s)")
    parser.add_argument("--against-one", action="store_true", help="compare with one device a row")
    parser.add_argument("--out", type=Path, help="folder for the JSON file (default: none)")
    args = parser.parse_args()
    most = TEXT.stat().st_size // args.length // args.rows
    if args.steps not in (0, *range(2, most + 1)):
        parser.error(f"--steps {args.steps}: wanted 0 or 2 to {most}, the batches of {args.rows} rows in the text")

    jax.config.update("jax_num_cpu_devices", args.rows * args.context)
    device = f"{platform.machine()} {jax.devices()[0].device_kind}, shared with other work"
    model = ModelConfig(num_layers=args.layers, width=64, num_heads=2, queries_per_kv=args.groups, positions="rope",
                        norm="rmsnorm", biases=False, dtype="float32", attention="blockwise",
                        attention_block=args.block, remat="names", remat_names=("attention",))  # fmt: skip
    config = TrainConfig(
        steps=max(args.steps, 1),
        model=model,
        tokenizer=TokenizerConfig(kind="bytes", vocab_size=258),
        data=DataConfig(batch_size=args.rows, length=args.length),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=2, schedule="constant"),
    )
    with jax.default_matmul_precision("highest"):
        result = train(config, args.context, args.steps, gradients=args.against_one)
        report = facts(device, "jax", "jaxlib", "flax", "optax") | result.numbers
        if args.against_one:
            one = train(config, 1, args.steps, gradients=True)
            report |= {"one_device_a_row": one.numbers} | compare(result, one)
    if args.out:
        print(f"wrote {write_report(report, args.out, f'long_context_{args.length}_over_{args.context}')}")
    if args.against_one and not report["equal"]:
        sys.exit(1)


def batch(rows: int, length: int, step: int) -> dict[str, np.ndarray]:
    """The step-th stretches of the text, each a row of one document."""
    ids = np.frombuffer(TEXT.read_bytes(), np.uint8)[step * rows * length :][: rows * length + 1].astype(np.int32)
    return {
        "inputs_BL": ids[:-1].reshape(rows, length),
        "targets_BL": ids[1:].reshape(rows, length),
        "positions_BL": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segments_BL": np.ones((rows, length), np.int32),
        "weights_BL": np.ones((rows, length), np.float32),
    }


class Result(NamedTuple):
    numbers: dict[str, Any]
    gradients: Any  # of the first batch, on the host; None where they were not asked for


def train(config: TrainConfig, context: int, steps: int, gradients: bool) -> Result:
    """Trains with `context` devices a row and returns what was measured."""
    length, rows, parts = config.data.length, config.data.batch_size, build_components(config)
    mesh = make_mesh(MeshConfig(data=rows, context=context), jax.devices()[: rows * context])
    with jax.set_mesh(mesh):
        describe(config.model, length, config.data.several_documents)
        state, example = init_state(parts.init, config.seed, mesh), batch(rows, length, 0)
        step = compile_step(parts.step, mesh, state, {}, example).lower(state, {}, example).compile()
        temporary = step.memory_analysis().temp_size_in_bytes
        print(f"{context} device(s) a row: {temporary / 2**20:,.1f} MiB of temporaries on each", flush=True)
        numbers = {"length": length, "rows": rows, "context": context, "block": config.model.attention_block,
                   "layers": config.model.num_layers, "queries_per_kv": config.model.queries_per_kv,
                   "step_temporary_bytes": temporary}  # fmt: skip
        first = None
        if gradients:
            loss = language_model_loss(parts.decoder)
            grads = jax.jit(jax.grad(lambda p, b: loss(p, {}, b, jax.random.key(0))[0]))
            first = jax.device_get(grads(state.params, to_global(example, mesh)))
        if not steps:
            return Result(numbers, first)
        losses, seconds, processor = [], [], []
        for i in range(steps):
            start, used = time.perf_counter(), time.process_time()
            state, metrics = step(state, {}, to_global(batch(rows, length, i), mesh))
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - used)
            print(
                f"step {i + 1}: loss {losses[-1]:.4f}, {seconds[-1]:.1f} s, processor {processor[-1]:.1f} s", flush=True
            )
    assert np.isfinite(losses).all() and losses[-1] < losses[0], losses
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    median = statistics.median(seconds[1:])
    speed = rows * length / median
    print(f"{median:.1f} s a step, {speed:,.0f} tokens/s, peak memory {peak / 2**20:,.0f} MiB")
    measured = {
        "losses": losses, "seconds": seconds, "processor_seconds": processor, "median_seconds": median,
        "tokens_per_second": speed, "peak_resident_bytes": peak,
    }  # fmt: skip
    return Result(numbers | measured, first)


def compare(result: Result, one: Result) -> dict[str, Any]:
    """How far losses and gradients lie apart, as shares of what they may, and how much less memory a device needs."""
    losses, wanted = (np.array(r.numbers.get("losses", [0.0])) for r in (result, one))
    largest = max(np.abs(g).max() for g in jax.tree.leaves(one.gradients))
    apart = [
        np.abs(g - w).max() / max(np.abs(w).max(), 1e-3 * largest)
        for g, w in zip(jax.tree.leaves(result.gradients), jax.tree.leaves(one.gradients), strict=True)
    ]
    loss, gradient = float(np.max(np.abs(losses / wanted - 1))), float(max(apart))
    memory = one.numbers["step_temporary_bytes"] / result.numbers["step_temporary_bytes"]
    print(f"losses differ by {loss:.1e}, gradients by {gradient:.1e}; a device needs {memory:.2f} times less memory")
    return {"loss_difference": loss, "gradient_difference": gradient, "memory_ratio": memory,
            "equal": loss <= 1e-5 and gradient <= 1e-4}  # fmt: skip


if __name__ == "__main__":
    main()
