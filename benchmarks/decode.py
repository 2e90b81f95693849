"""Greedy decoding: tokens a second, beside transformers' `generate` with the same weights, and the share of the bound.

    python benchmarks/decode.py --out DIR                                    # 124M, float32, batches 1 and 32
    python benchmarks/decode.py --shape 1b --dtype bfloat16 --peer none --batch 1 --out DIR        # an accelerator

Each round runs, one after another, for each batch: our prefill and our decode loop, the peer's `generate` (which notes
when its first token is there), and a raw read of memory. So a ratio compares neighbours in time. Prefill is reported
apart: decode tokens/s are rows x tokens over the time behind the prompt's pass. End to end is both together.

The bound of decoding is reading: every step reads the layers' weights, the head, and the keys and values written so
far (the mean over the steps; padding of the cache is not counted). Share = bytes a step x steps a second / raw read,
which is the fastest of the ways here to add up an array as large as those bytes, on as many threads as decoding uses.

The peer gets the very weights (random, of GPT-2's initialisation, saved and imported again) and the same prompts. Where
the first --compare greedy tokens of any row differ, the benchmark fails with exit code 1. Without the peer, a row of
the batch is compared with the full forward pass instead.

Peak memory is that of the compiled loop: its arguments (weights, cache) and what it allocates. Writes DATE_decode.json
and .png; the peer takes torch and transformers, the plot matplotlib.
"""

import argparse
import dataclasses
import importlib.util
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from facts import facts, spread, write_report

from gptjax.cache import bucket
from gptjax.config import ModelConfig
from gptjax.decoder import Decoder, Params, init_params
from gptjax.fewrows import several
from gptjax.generate import decode, decode_params, prefill
from gptjax.startup import tune_process

NEVER = np.array([-1], np.int32)  # stop ids that no row meets
SHAPES = {
    "124m": (ModelConfig(num_layers=12, width=768, num_heads=12), 50_257, 1024),
    "1b": (
        ModelConfig(
            num_layers=16, width=2048, num_heads=32, queries_per_kv=4, positions="rope", norm="rmsnorm",
            activation="swiglu", biases=False, rope_theta=500_000.0,
        ), 128_256, 2048,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="rows decoded at once")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens added to each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compare", type=int, default=16, help="first greedy tokens that must agree")
    parser.add_argument("--peer", choices=("transformers", "none"), default="transformers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the peer and raw reads")
    parser.add_argument("--out", type=Path, required=True, help="folder for the dated report")
    args = parser.parse_args()
    cfg, vocab_size, context = SHAPES[args.shape]
    cfg = dataclasses.replace(cfg, dtype=args.dtype)
    if args.peer != "none" and (args.shape != "124m" or args.dtype != "float32"):
        parser.error("--peer transformers: wanted --shape 124m --dtype float32; add --peer none")
    if args.prompt + args.new > context:
        parser.error(f"--prompt {args.prompt} --new {args.new}: wanted at most {context} tokens together")

    device = f"{platform.machine()} {jax.devices()[0].device_kind}, {args.threads} host threads"
    packages = ("jax", "flax", "numpy") + (() if args.peer == "none" else ("torch", "transformers"))
    report: dict[str, Any] = facts(device, *packages) | {"setting": vars(args) | {"out": str(args.out)}, "batches": {}}
    decoder = Decoder(cfg, vocab_size, context)
    peer, params = (None, random_params(decoder)) if args.peer == "none" else Peer.make(decoder, args.threads)
    failed = False
    for rows in args.batch:
        weights = jax.block_until_ready(decode_params(params, cfg.dtype, several(rows, cfg.dtype)))
        row = report["batches"][str(rows)] = measure(decoder, params, weights, peer, rows, args)
        del weights
        show(rows, row)
        failed |= not row["tokens_agree"]
    path = write_report(report, args.out, "decode")
    print(f"wrote {path}")
    if importlib.util.find_spec("matplotlib"):
        plot(report, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")
    else:
        print("no plot: pip install matplotlib")
    if failed:
        sys.exit("greedy tokens differ: these speeds mean nothing")


def random_params(decoder: Decoder) -> Params:
    """Random weights, made on the device."""
    return jax.block_until_ready(jax.jit(init_params(decoder))(jax.random.key(0)))


class Peer:
    """transformers' GPT-2 on the CPU, in float32."""

    def __init__(self, model: Any):
        self.model = model

    @classmethod
    def make(cls, decoder: Decoder, threads: int) -> tuple["Peer", Params]:
        """The peer with random weights, and the same weights as our decoder's."""
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]

        from gptjax.interop.huggingface import import_huggingface

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        cfg = decoder.cfg
        shape = transformers.GPT2Config(vocab_size=decoder.vocab_size, n_positions=decoder.context, n_embd=cfg.width,
                                        n_layer=cfg.num_layers, n_head=cfg.num_heads)  # fmt: skip
        model = transformers.GPT2LMHeadModel(shape).eval()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            params = import_huggingface(Path(folder))[3]
        return cls(model), jax.tree.map(jnp.asarray, params)

    def generate(self, prompt_BL: np.ndarray, new: int) -> tuple[np.ndarray, float, float]:
        """The new ids, the seconds until the first of them is there, and those of the rest."""
        import torch  # pyright: ignore[reportMissingImports]

        times: list[float] = []

        def note(ids, scores, **_):
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        ids_BL = torch.from_numpy(prompt_BL.astype(np.int64))
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids_BL, attention_mask=torch.ones_like(ids_BL), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, use_cache=True, pad_token_id=0, stopping_criteria=[note],
            )  # fmt: skip
        return out[:, prompt_BL.shape[1] :].numpy(), times[0] - start, times[-1] - times[0]


def measure(
    decoder: Decoder, params: Params, weights: Params, peer: Peer | None, rows: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Every round's numbers for one batch size, their medians, and whether the tokens agree."""
    prompt_BL = np.random.default_rng(1).integers(0, decoder.vocab_size, (rows, args.prompt)).astype(np.int32)
    length_B = np.full(rows, args.prompt, np.int32)
    slots = bucket(args.prompt + args.new, decoder.context)
    padded_BL = np.pad(prompt_BL, ((0, 0), (0, bucket(args.prompt, decoder.context) - args.prompt)))
    constant = {"copy_B": np.zeros(rows, np.int32), "last_B": length_B + args.new - 1}
    rest = (constant, {}, np.uint32(0), NEVER, np.zeros(rows, bool), np.int32(args.new))

    def ours() -> tuple[np.ndarray, float, float]:
        start = time.perf_counter()
        state = jax.block_until_ready(prefill(decoder, weights, padded_BL, length_B, slots, False))
        middle = time.perf_counter()
        state = jax.block_until_ready(decode(decoder, weights, state, *rest))
        end = time.perf_counter()
        return np.asarray(state["tokens_BM"])[:, args.prompt : args.prompt + args.new], middle - start, end - middle

    size = {"weights": read_weights(weights), "cache": read_cache(decoder.cfg, rows, args.prompt + args.new / 2)}
    reads = raw_reads(sum(size.values()), args.threads)
    got_BN = ours()[0]  # compiles
    rounds: list[dict[str, float]] = []
    wanted_BN = None
    for _ in range(args.rounds):
        _, prefill_s, decode_s = ours()
        # Our loop makes the first token, too; the peer's first one belongs to its prefill.
        round_ = {"prefill_s": prefill_s, "tokens_per_second": rows * args.new / decode_s}
        round_["end_to_end_tokens_per_second"] = rows * args.new / (prefill_s + decode_s)
        round_["raw_read_gb_s"] = max(read() for read in reads.values()) / 1e9
        round_["share_of_bandwidth"] = sum(size.values()) * args.new / decode_s / 1e9 / round_["raw_read_gb_s"]
        if peer:
            wanted_BN, first_s, rest_s = peer.generate(prompt_BL, args.new)
            round_["peer_prefill_s"] = first_s
            round_["peer_tokens_per_second"] = rows * (args.new - 1) / rest_s
            round_["peer_end_to_end_tokens_per_second"] = rows * args.new / (first_s + rest_s)
            round_["ratio"] = round_["tokens_per_second"] / round_["peer_tokens_per_second"]
            round_["end_to_end_ratio"] = (
                round_["end_to_end_tokens_per_second"] / round_["peer_end_to_end_tokens_per_second"]
            )
        rounds.append(round_)
    if wanted_BN is None:
        wanted_BN, got_BN = forward_tokens(decoder, params, prompt_BL[:1], got_BN[:1]), got_BN[:1]
    program = decode.lower(  # pyright: ignore[reportFunctionMemberAccess]
        decoder, weights, jax.eval_shape(lambda: prefill(decoder, weights, padded_BL, length_B, slots, False)), *rest
    ).compile()
    memory: Any = program.memory_analysis()
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "bytes_a_step": size,
        "loop_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "tokens_agree": bool((got_BN[:, : args.compare] == wanted_BN[:, : args.compare]).all()),
        "tokens_compared": int(got_BN[:, : args.compare].size),
        "tokens_equal_in_all": float((got_BN == wanted_BN).mean()),
        "rounds": rounds,
    } | {name: spread([r[name] for r in rounds]) for name in rounds[0]}


def read_weights(weights: Params) -> int:
    """Bytes of weights that one step reads: all but the tables that rows are looked up in."""
    read = {name: x for name, x in weights.items() if name not in ("embed_VD", "position_TD")}
    return sum(x.nbytes for x in jax.tree.leaves(read))


def read_cache(cfg: ModelConfig, rows: int, places: float) -> int:
    """Bytes of keys and values that one step reads at a mean of `places` tokens a row."""
    return int(2 * cfg.num_layers * rows * places * cfg.num_kv_heads * cfg.head_size * jnp.dtype(cfg.dtype).itemsize)


def raw_reads(size: int, threads: int) -> dict[str, Callable[[], float]]:
    """Ways to add up `size` bytes; each gives bytes a second."""
    array = jnp.ones(size // 4, jnp.float32)
    add = jax.jit(jnp.sum).lower(array).compile()
    ways: dict[str, Callable[[], Any]] = {"jax": lambda: jax.block_until_ready(add(array))}
    if jax.default_backend() == "cpu" and importlib.util.find_spec("torch"):
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        other = torch.ones(size // 4)
        ways["torch"] = other.sum

    def timed(way: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            for _ in range(3):
                way()
            return 3 * (size // 4 * 4) / (time.perf_counter() - start)

        run()
        return run

    return {name: timed(way) for name, way in ways.items()}


def forward_tokens(decoder: Decoder, params: Params, prompt_BL: np.ndarray, new_BN: np.ndarray) -> np.ndarray:
    """The likeliest token behind each prefix of the rows, by one pass without a cache."""
    ids_BL = np.concatenate([prompt_BL, new_BN], axis=1)
    position_BL = np.broadcast_to(np.arange(ids_BL.shape[1]), ids_BL.shape)

    @jax.jit
    def best(params, ids_BL, position_BL):
        x_BLD, _ = decoder.apply({"params": params}, ids_BL, position_BL, jnp.ones_like(ids_BL))
        logits_BLV: Any = decoder.apply({"params": params}, x_BLD, method="logits")
        return logits_BLV.argmax(-1)

    return np.asarray(best(params, ids_BL, position_BL))[:, prompt_BL.shape[1] - 1 : -1]


def show(rows: int, row: dict[str, Any]) -> None:
    print(f"batch {rows}: tokens agree: {row['tokens_agree']} ({row['tokens_compared']} compared)")
    for name, value in row.items():
        if isinstance(value, dict) and "median" in value:
            print(f"  {name:36s} {value['median']:10.3f}   ({value['p5']:.3f} to {value['p95']:.3f})", flush=True)


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    batches = report["batches"]
    for at, (name, label) in enumerate({"tokens_per_second": "gptjax", "peer_tokens_per_second": "peer"}.items()):
        rows = [row[name] for row in batches.values() if name in row]
        if rows:
            middle = np.array([r["median"] for r in rows])
            error = np.abs([[r["p5"] for r in rows], [r["p95"] for r in rows]] - middle)
            axes[0].bar(np.arange(len(rows)) + 0.4 * at, middle, 0.38, yerr=error, label=label)
    axes[0].set(yscale="log", ylabel="decode tokens/s", title=report["setting"]["shape"])
    axes[1].bar(np.arange(len(batches)), [100 * r["share_of_bandwidth"]["median"] for r in batches.values()], 0.5)
    axes[1].set(ylabel="% of raw read bandwidth", ylim=(0, 110))
    for ax in axes:
        ax.set_xticks(np.arange(len(batches)), [f"batch {rows}" for rows in batches])
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    tune_process()
    main()
