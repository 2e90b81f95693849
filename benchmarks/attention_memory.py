"""Memory and speed of attention by blocks against the plain attention, forward and backward.

    python benchmarks/attention_memory.py --out benchmarks/results/2026-11-22_attention_memory.json

Memory is what the compiled program says it needs beside its arguments and results (`temp_size_in_bytes`): of attention
alone, and of a small decoder's loss and gradients, which recomputes its blocks. Times are medians of rounds in which
all variants take turns, with the least and the processor's time beside them, since other work on the machine only ever
adds to the first. Before anything is timed, its outputs and gradients are compared with the plain attention's.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from facts import facts

from gptjax.attention import attend, causal
from gptjax.blockwise import attend_blockwise
from gptjax.config import ModelConfig
from gptjax.decoder import Decoder, init_params
from gptjax.pretrain import language_model_loss

ROWS, HEADS, HEAD_SIZE, BLOCK = 1, 4, 64, 512
MEMORY_LENGTHS, SPEED_LENGTHS, BLOCKS = (4096, 8192, 16384), (1024, 2048, 4096), (128, 256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: none)")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: wanted at least 1")

    report: dict[str, Any] = machine() | {"rows": ROWS, "heads": HEADS, "head_size": HEAD_SIZE, "block": BLOCK}
    report["attention_bytes"] = memory(lambda kind, n: compiled(kind, n, BLOCK, "float32"), ("plain", "blockwise"))
    report["decoder_bytes"] = memory(compiled_decoder, ("plain", "blockwise"))
    report["speed"] = [
        speed(length, dtype, {"plain": ("plain", BLOCK), "blockwise": ("blockwise", BLOCK)}, args.rounds)
        for dtype in ("float32", "bfloat16")
        for length in SPEED_LENGTHS
    ]
    # Documents of 512 tokens in a row: blocks that share none are not visited.
    packed = {"plain": ("plain", BLOCK), "blockwise": ("blockwise", BLOCK)}
    report["speed_packed"] = [speed(4096, "float32", packed, args.rounds, document=512)]
    blocks = {f"block {b}": ("blockwise", b) for b in BLOCKS}
    report["block_sizes"] = [speed(length, "float32", blocks, args.rounds) for length in (4096, 8192)]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {args.out}")


def machine() -> dict[str, Any]:
    """The facts of this machine and of the packages that these measurements depend on."""
    device = f"{platform.machine()} {jax.devices()[0].device_kind}, shared with other work"
    return facts(device, "jax", "jaxlib", "flax", "optax")


def compiled(kind: str, length: int, block: int, dtype: str) -> Any:
    """Output and gradients of one attention (q_BLHK, k_BMGK, v_BMGK, g_BLHK, segments_BL), compiled."""
    attention = attend if kind == "plain" else functools.partial(attend_blockwise, block=block)

    def run(q_BLHK, k_BMGK, v_BMGK, g_BLHK, segments_BL):
        sight = causal(segments_BL)
        out_BLHK, back = jax.vjp(
            lambda q, k, v: attention(q, k, v, sight, scale=HEAD_SIZE**-0.5), q_BLHK, k_BMGK, v_BMGK
        )
        return out_BLHK, *back(g_BLHK)

    x = jax.ShapeDtypeStruct((ROWS, length, HEADS, HEAD_SIZE), dtype)
    return jax.jit(run).lower(x, x, x, x, jax.ShapeDtypeStruct((ROWS, length), jnp.int32)).compile()


def compiled_decoder(kind: str, length: int) -> Any:
    """Loss and gradients of a decoder of 2 layers, width 64 and 2 heads on one row, compiled."""
    cfg = ModelConfig(num_layers=2, width=64, num_heads=2, positions="rope", attention=kind,  # pyright: ignore[reportArgumentType]
                      attention_block=BLOCK, remat="full", dtype="float32")  # fmt: skip
    decoder = Decoder(cfg, 258, length)
    params = jax.eval_shape(init_params(decoder), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    batch = dict.fromkeys(("inputs_BL", "targets_BL", "positions_BL", "segments_BL"), ids)
    batch |= {"weights_BL": jax.ShapeDtypeStruct((1, length), jnp.float32)}
    loss = language_model_loss(decoder)
    grads = jax.jit(jax.value_and_grad(lambda p, batch: loss(p, {}, batch, jax.random.key(0))[0]))
    return grads.lower(params, batch).compile()


def memory(compile_one: Callable[[str, int], Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    """Bytes by kind and length, and how they grow from the first length to the last."""
    table: dict[str, Any] = {}
    for kind in kinds:
        sizes = [compile_one(kind, n).memory_analysis().temp_size_in_bytes for n in MEMORY_LENGTHS]
        growth = sizes[-1] / sizes[0]
        table[kind] = dict(zip(map(str, MEMORY_LENGTHS), sizes)) | {"growth": growth}
        print(f"{kind}: {[f'{s / 2**20:,.1f} MiB' for s in sizes]}, grows {growth:.2f} times", flush=True)
    return table


def speed(length: int, dtype: str, variants: dict[str, tuple[str, int]], rounds: int, document: int = 0) -> dict:
    """Milliseconds of output and gradients of each variant (kind, block), and how far it is from the plain one's."""
    rng = np.random.default_rng(0)
    shape = (ROWS, length, HEADS, HEAD_SIZE)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4)]
    segments_L = jnp.arange(length) // (document or length) + 1
    arrays.append(jnp.broadcast_to(segments_L, (ROWS, length)).astype(jnp.int32))
    programs = {name: compiled(kind, length, block, dtype) for name, (kind, block) in variants.items()}
    if length <= 4096:
        wanted = compiled("plain", length, 0, dtype)(*arrays)
        far = {name: max(map(distance, program(*arrays), wanted)) for name, program in programs.items()}
        assert max(far.values()) < (1e-4 if dtype == "float32" else 0.05), far
    else:
        far = None
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    processor: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(rounds + 1):
        for name, program in programs.items():
            start, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*arrays))
            if i:  # the first round fills caches and memory pools
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - used)
    row: dict[str, Any] = {"length": length, "dtype": dtype} | ({"document": document} if document else {})
    for name, times in seconds.items():
        median, least, used = (1e3 * x for x in (statistics.median(times), min(times), min(processor[name])))
        row[name] = {"median_ms": median, "least_ms": least, "least_processor_ms": used}
        row[name] |= {} if far is None else {"distance_from_plain": far[name]}
        print(f"{length} {dtype} {name}: {median:.0f} ms, least {least:.0f}, processor {used:.0f}", flush=True)
    return row


def distance(got: jax.Array, wanted: jax.Array) -> float:
    """The largest difference, as a share of the largest element."""
    a, b = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    return float(np.abs(a - b).max() / np.abs(b).max())


if __name__ == "__main__":
    main()
