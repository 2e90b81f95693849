"""Ten training steps at a length of 32,768 with attention by blocks, where the plain scores would take 8 GiB a layer.

    python benchmarks/long_context.py --out benchmarks/results/2026-11-22_long_context.json

A decoder of 2 layers, width 64 and 2 heads on bytes, one row a step, in float32; the normal training step. The backward
pass computes each layer again, all but the output of its attention. Prints losses, seconds a step, processor seconds a
step (which other work on the machine hardly changes) and the process's peak memory.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from facts import ROOT, facts

from gptjax.assemble import assemble
from gptjax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TokenizerConfig, TrainConfig
from gptjax.sharding import make_mesh, put
from gptjax.train import compile_step, init_state

TEXT = ROOT / "gptjax" / "data" / "corpora" / "shakespeare.txt"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=32_768, help="tokens a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="training steps (default: %(default)s)")
    parser.add_argument("--block", type=int, default=512, help="model.attention_block (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: none)")
    args = parser.parse_args()
    most = TEXT.stat().st_size // args.length
    if not 2 <= args.steps <= most:
        parser.error(f"--steps {args.steps}: wanted 2 to {most}, the rows of {args.length} bytes in the text")

    device = f"{platform.machine()} {jax.devices()[0].device_kind}, shared with other work"
    report = facts(device, "jax", "jaxlib", "flax", "optax") | train(recipe(args.length, args.steps, args.block))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {args.out}")


def recipe(length: int, steps: int, block: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        model=ModelConfig(num_layers=2, width=64, num_heads=2, positions="rope", norm="rmsnorm", biases=False,
                          dtype="float32", attention="blockwise", attention_block=block,
                          remat="names", remat_names=("attention",)),
        tokenizer=TokenizerConfig(kind="bytes", vocab_size=258),
        data=DataConfig(batch_size=1, length=length),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=2, schedule="constant"),
    )  # fmt: skip


def batch(length: int, step: int) -> dict[str, np.ndarray]:
    """The step-th stretch of the text, as one document."""
    ids = np.frombuffer(TEXT.read_bytes(), np.uint8)[step * length :][: length + 1].astype(np.int32)
    return {
        "inputs_BL": ids[None, :-1],
        "targets_BL": ids[None, 1:],
        "positions_BL": np.arange(length, dtype=np.int32)[None],
        "segments_BL": np.ones((1, length), np.int32),
        "weights_BL": np.ones((1, length), np.float32),
    }


def train(config: TrainConfig) -> dict[str, Any]:
    length, mesh, parts = config.data.length, make_mesh(MeshConfig(data=1), jax.devices()[:1]), assemble(config)
    with jax.set_mesh(mesh):
        state = init_state(parts.init, config.seed, mesh)
        example = batch(length, 0)
        step = compile_step(parts.step, mesh, state, {}, example).lower(state, {}, example).compile()
        temporary = step.memory_analysis().temp_size_in_bytes
        print(f"{temporary / 2**20:,.0f} MiB of temporaries in the compiled step", flush=True)
        losses, seconds, processor = [], [], []
        for i in range(config.steps):
            start, used = time.perf_counter(), time.process_time()
            state, metrics = step(state, {}, put(batch(length, i), mesh))
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - used)
            print(
                f"step {i + 1}: loss {losses[-1]:.4f}, {seconds[-1]:.1f} s, processor {processor[-1]:.1f} s", flush=True
            )
    assert np.isfinite(losses).all() and losses[-1] < losses[0], losses
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    median = statistics.median(seconds[1:])
    print(f"{median:.1f} s a step, {length / median:,.0f} tokens/s, peak memory {peak / 2**20:,.0f} MiB")
    return {
        "length": length, "block": config.model.attention_block, "losses": losses,
        "seconds": seconds, "processor_seconds": processor, "median_seconds": median,
        "tokens_per_second": length / median, "step_temporary_bytes": temporary, "peak_resident_bytes": peak,
    }  # fmt: skip


if __name__ == "__main__":
    main()
