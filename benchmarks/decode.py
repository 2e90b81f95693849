"""Greedy decoding: tokens a second, beside transformers' `generate` with the same weights, and the share of the bound.

    python benchmarks/decode.py --out DIR                                    # 124M, float32, batches 1 and 32
    python benchmarks/decode.py --shape 1b --dtype bfloat16 --peer none --batch 1 --out DIR        # an accelerator

Each round runs, for each batch: our prefill and our decode loop, a raw read of memory, and the peer's `generate`, which
notes when its first token is there. So a ratio compares neighbours in time. The peer is a process of its own, with
threads and malloc as they come; ours are as `gptjax generate` sets them. Prefill is reported apart: decode tokens/s are
rows x tokens over the time behind the prompt's pass. End to end is both together.

The bound of decoding is reading: every step reads the layers' weights, the head, and the keys and values written so
far (the mean over the steps; padding of the cache is not counted). Share = bytes a step x steps a second / raw read,
which is the faster of adding up an array as large as those bytes in jax and in torch.

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
from report import facts, spread, write_report
from worker_pool import Competitor, Failed

from gptjax.config import ModelConfig
from gptjax.generation.engine import decode, decode_params, prefill
from gptjax.model.cache import round_up_length
from gptjax.model.decoder import Decoder, Params, init_params
from gptjax.runtime.process import tune_process

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
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the peer")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch and transformers")
    parser.add_argument("--out", type=Path, required=True, help="folder for the dated report")
    args = parser.parse_args()
    cfg, vocab_size, context = SHAPES[args.shape]
    cfg = dataclasses.replace(cfg, dtype=args.dtype)
    if args.peer != "none" and (args.shape != "124m" or args.dtype != "float32"):
        parser.error("--peer transformers: wanted --shape 124m --dtype float32; add --peer none")
    if args.prompt + args.new > context:
        parser.error(f"--prompt {args.prompt} --new {args.new}: wanted at most {context} tokens together")

    device = f"{platform.machine()} {jax.devices()[0].device_kind}, {args.threads} host threads"
    report: dict[str, Any] = facts(device, "jax", "flax", "numpy") | {
        "setting": vars(args) | {"out": str(args.out)},
        "batches": {},
    }
    decoder = Decoder(cfg, vocab_size, context)
    failed, peer = False, None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.peer == "none":
            params = random_params(decoder)
        else:
            peer, params = start_peer(decoder, folder, args)
            report["versions"] |= peer.facts["versions"]
        for rows in args.batch:
            prompt_BL = np.random.default_rng(1).integers(0, decoder.vocab_size, (rows, args.prompt)).astype(np.int32)
            np.save(folder / f"prompts_{rows}.npy", prompt_BL)
            weights = jax.block_until_ready(decode_params(params, cfg.dtype))
            row = report["batches"][str(rows)] = measure(decoder, params, weights, peer, prompt_BL, args)
            del weights
            show(rows, row)
            failed |= not row["tokens_agree"]
        if peer:
            peer.close()
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


def start_peer(decoder: Decoder, folder: Path, args: argparse.Namespace) -> tuple[Competitor, Params]:
    """transformers' GPT-2 in a process of its own, and its random weights as our decoder's."""
    from gptjax.interop.huggingface import import_huggingface

    cfg = decoder.cfg
    config = {"vocab_size": decoder.vocab_size, "n_positions": decoder.context, "n_embd": cfg.width,
              "n_layer": cfg.num_layers, "n_head": cfg.num_heads}  # fmt: skip
    setting = {"threads": args.threads, "folder": str(folder), "config": config}
    command = [args.torch_python, str(Path(__file__).with_name("decode_torch.py"))]
    peer = Competitor("transformers", command, setting, folder / "log", dict(os.environ), patience=600)
    return peer, jax.tree.map(jnp.asarray, import_huggingface(folder)[3])


def measure(
    decoder: Decoder,
    params: Params,
    weights: Params,
    peer: Competitor | None,
    prompt_BL: np.ndarray,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Every round's numbers for one batch size, their medians, and whether the tokens agree."""
    rows = len(prompt_BL)
    length_B = np.full(rows, args.prompt, np.int32)
    slots = round_up_length(args.prompt + args.new, decoder.context)
    padded_BL = np.pad(prompt_BL, ((0, 0), (0, round_up_length(args.prompt, decoder.context) - args.prompt)))
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
    read = raw_read(sum(size.values()))
    got_BN = ours()[0]  # compiles
    rounds: list[dict[str, float]] = []
    wanted_BN = None
    for _ in range(args.rounds):
        _, prefill_s, decode_s = ours()
        # Our loop makes the first token, too; the peer's first one belongs to its prefill.
        round_ = {"prefill_s": prefill_s, "tokens_per_second": rows * args.new / decode_s}
        round_["end_to_end_tokens_per_second"] = rows * args.new / (prefill_s + decode_s)
        reads = [read(), *([peer.ask("read", sum(size.values()))["result"]] if peer else [])]
        round_["raw_read_gb_s"] = max(reads) / 1e9
        round_["share_of_bandwidth"] = sum(size.values()) * args.new / decode_s / 1e9 / round_["raw_read_gb_s"]
        if peer:
            said = peer.ask("generate", rows, args.new)["result"]
            wanted_BN, first_s, rest_s = np.array(said["ids"]), said["first_s"], said["rest_s"]
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


def raw_read(size: int) -> Callable[[], float]:
    """Adds up an array of `size` bytes; gives bytes a second."""
    array = jnp.ones(size // 4, jnp.float32)
    add = jax.jit(jnp.sum).lower(array).compile()

    def run() -> float:
        start = time.perf_counter()
        for _ in range(3):
            jax.block_until_ready(add(array))
        return 3 * array.nbytes / (time.perf_counter() - start)

    run()
    return run


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
    try:
        main()
    except Failed as e:
        sys.exit(str(e))
