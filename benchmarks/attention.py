"""Time, memory and rightness of every way of computing attention that this device has.

    python benchmarks/attention.py --out benchmarks/results

For each length, once with packed documents, which do not see each other, and once with rows of one document (as with
data.cross_documents): milliseconds of the forward pass and of forward and backward, tokens a second of the latter, and
the memory that the compiled program needs beside its arguments and results. All ways take turns in each round; times
are medians with the 5th and 95th percentile, ratios are to the plain reference in the same round. Before anything is
timed, output and gradients of the timed program are compared with the plain attention in float32, on the first and the
last row and group of heads; where they differ the command ends with exit code 1.

Also: forward and backward of blockwise attention by size of block, and the memory of a decoder's loss and gradients
(2 layers, width 64, one row, blocks recomputed). A way whose scores would not fit in --most-gib is left out and named.
"""

import argparse
import dataclasses
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import facts, spread, write_report

from gptjax.config import ModelConfig
from gptjax.config.attention import KERNELS
from gptjax.model.decoder import Decoder, init_params
from gptjax.ops.attention import attention, select_kernel, unsupported_reason
from gptjax.ops.device import device
from gptjax.ops.reference import attend, causal
from gptjax.training.losses import language_model_loss

BLOCKS, DECODER_LENGTHS = (128, 256, 512, 1024), (4096, 8192, 16384)
# Relative distance from the float32 reference that rounding explains; documents that crossed would be at about 1.
MOST_DISTANT = {"float32": 1e-4, "bfloat16": 2e-2}


def main() -> None:
    args = arguments()
    cfg = ModelConfig(num_heads=args.heads, queries_per_kv=args.heads // args.kv_heads, head_dim=args.head_size,
                      width=args.heads * args.head_size, dtype=args.dtype)  # fmt: skip
    kind = jax.devices()[0].device_kind
    report: dict[str, Any] = facts(f"{platform.machine()} {kind}", "jax", "jaxlib", "flax")
    report |= {"dtype": args.dtype, "heads": args.heads, "kv_heads": args.kv_heads, "head_size": args.head_size,
               "tokens": args.tokens, "document": args.document}  # fmt: skip
    report["left_out"] = {n: found for n in KERNELS if (found := unsupported_reason(n, cfg, device()))}
    for name, reason in report["left_out"].items():
        print(f"{name} is left out: {reason}")
    report["auto"] = {
        str(n): select_kernel(dataclasses.replace(cfg, attention="auto"), n, device()) for n in args.lengths
    }
    # Elsewhere than on a CPU "plain" is the reference itself.
    names = [
        "reference",
        *(n for n in KERNELS if n not in report["left_out"] and (n != "plain" or device().platform == "cpu")),
    ]
    print(f"{kind}, {args.dtype}, {args.heads} heads of {args.head_size}; auto takes {report['auto']}")
    print(f"{'length':>7} {'rows':8} {'attention':14} {'forward':>9} {'both ms':>9} {'5 %':>8} {'95 %':>8} "
          f"{'ratio':>6} {'tokens/s':>12} {'MiB':>9}  distance")  # fmt: skip
    rows = [
        row
        for length in args.lengths
        for packed in (True, False)
        for row in measure({name: (cfg, name) for name in names}, length, packed, args)
    ]
    blocks = {
        f"blockwise {b}": (dataclasses.replace(cfg, attention_block=b), "blockwise") for b in BLOCKS if args.blocks
    }
    longest = max(args.lengths)
    report |= {"rows": rows, "blocks": measure(blocks, longest, True, args) if blocks else []}
    if args.decoder:
        report["decoder_bytes"] = {name: decoder_bytes(name) for name in ("plain", "blockwise")}
    if args.out:
        save(report, args.out)
    wrong = [r for r in rows + report["blocks"] if not r.get("distance", 0) <= MOST_DISTANT[args.dtype]]
    for row in wrong:
        kind = "packed" if row["packed"] else "one document"
        print(f"WRONG: {row['attention']} at {row['length']}, {kind}: {row['distance']:.2g} from the reference")
    sys.exit(1 if wrong else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cpu = jax.default_backend() == "cpu"
    lengths, tokens, dtype = ((256, 1024, 4096), 4096, "float32") if cpu else ((1024, 4096, 16384), 32_768, "bfloat16")
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=lengths, help="tokens a row (default: %(default)s)")
    add("--tokens", type=int, default=tokens, help="tokens in all rows together (default: %(default)s)")
    add("--document", type=int, default=400, help="mean tokens of a packed document (default: %(default)s)")
    add("--heads", type=int, default=6 if cpu else 12, help="query heads (default: %(default)s)")
    add("--kv-heads", type=int, default=0, help="key-value heads; 0: as many as heads (default: %(default)s)")
    add("--head-size", type=int, default=64, help="size of a head (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default=dtype, help="type of the inputs (default: %(default)s)")
    add("--rounds", type=int, default=7 if cpu else 20, help="timed rounds (default: %(default)s)")
    add("--most-gib", type=float, default=4.0 if cpu else 32.0, help="most that scores may take (default: %(default)s)")
    add("--blocks", action="store_true", help="also blockwise attention by size of block, at the longest length")
    add("--decoder", action="store_true", help="also the memory of a decoder, compiled and not run")
    add("--out", type=Path, help="folder for DATE_attention.json and .png (default: none)")
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads
    for name, ok in (
        ("rounds", args.rounds > 0), ("lengths", min(args.lengths) > 1), ("document", args.document > 0),
        ("tokens", args.tokens >= max(args.lengths)), ("kv-heads", args.heads % args.kv_heads == 0),
    ):  # fmt: skip
        if not ok:
            parser.error(f"--{name} {getattr(args, name.replace('-', '_'))}: too small, or no divisor of the heads")
    return args


def program(cfg: ModelConfig, name: str, packed: bool, backward: bool) -> Callable:
    """Output, and gradients, of one attention (q_BLHK, k_BLGK, v_BLGK, g_BLHK, segments_BL)."""
    cfg = cfg if name == "reference" else dataclasses.replace(cfg, attention=name)

    def run(q_BLHK, k_BLGK, v_BLGK, g_BLHK, segments_BL):
        mask, scale = causal(segments_BL, packed), cfg.head_size**-0.5

        def out(q_BLHK, k_BLGK, v_BLGK):
            if name == "reference":
                return attend(q_BLHK, k_BLGK, v_BLGK, mask, scale=scale)
            return attention(cfg, q_BLHK, k_BLGK, v_BLGK, mask, scale=scale)

        if not backward:
            return (out(q_BLHK, k_BLGK, v_BLGK),)
        out_BLHK, back = jax.vjp(out, q_BLHK, k_BLGK, v_BLGK)
        return out_BLHK, *back(g_BLHK)

    return run


def inputs(cfg: ModelConfig, length: int, rows: int, document: int) -> list[jax.Array]:
    """Random q_BLHK, k_BLGK, v_BLGK, g_BLHK and segments_BL of documents of random lengths."""
    rng = np.random.default_rng(0)
    H, G, K = cfg.num_heads, cfg.num_kv_heads, cfg.head_size
    made = [jnp.asarray(rng.normal(size=(rows, length, heads, K)), cfg.dtype) for heads in (H, G, G, H)]
    begins_BL = rng.random((rows, length)) < 1 / document
    begins_BL[:, 0] = True
    return [*made, jnp.asarray(np.cumsum(begins_BL, axis=1), jnp.int32)]


def measure(variants: dict[str, tuple[ModelConfig, str]], length: int, packed: bool, args) -> list[dict[str, Any]]:
    """One row of results for each variant (settings, name), printed as it is made."""
    cfg = next(iter(variants.values()))[0]
    count = args.tokens // length
    given = inputs(cfg, length, count, args.document)
    quadratic = 3 * 4 * count * cfg.num_heads * length**2 / 2**30
    compiled, found = {}, []
    for label, (settings, name) in variants.items():
        row: dict[str, Any] = {"attention": label, "length": length, "rows": count, "packed": packed}
        found.append(row)
        if name in ("reference", "plain") and quadratic > args.most_gib:
            row["left_out"] = f"scores of about {quadratic:.0f} GiB are over --most-gib {args.most_gib:g}"
            continue
        one, both = (
            jax.jit(program(settings, name, packed, backward)).lower(*given).compile() for backward in (False, True)
        )
        row["bytes"] = temporary_bytes(both)
        row["distance"] = distance(cfg, both(*given), given, packed)
        compiled[label] = (one, both)
    times: dict[str, list[list[float]]] = {label: [[], []] for label in compiled}
    for _ in range(args.rounds):
        for label, programs in compiled.items():
            for run, kept in zip(programs, times[label], strict=True):
                start = time.perf_counter()
                jax.block_until_ready(run(*given))
                kept.append(1e3 * (time.perf_counter() - start))
    kind = "packed" if packed else "one"
    for row in found:
        label = row["attention"]
        if label not in compiled:
            print(f"{length:7} {kind:8} {label:14} left out: {row['left_out']}")
            continue
        for what, values in zip(("forward", "both"), times[label], strict=True):
            row[what] = {f"{name}_ms": value for name, value in spread(values).items()}
        row["tokens_per_second"] = 1e3 * count * length / row["both"]["median_ms"]
        ratios = np.array(times[label][1]) / np.array(times["reference"][1]) if "reference" in times else None
        if ratios is not None:
            row["ratio"] = spread(ratios.tolist())
        ratio = f"{row['ratio']['median']:.2f}" if "ratio" in row else "-"
        both = row["both"]
        print(f"{length:7} {kind:8} {label:14} {row['forward']['median_ms']:9.2f} {both['median_ms']:9.2f} "
              f"{both['p5_ms']:8.2f} {both['p95_ms']:8.2f} {ratio:>6} {row['tokens_per_second']:12,.0f} "
              f"{row['bytes'] / 2**20:9,.1f}  {row['distance']:.1e}", flush=True)  # fmt: skip
    return found


def distance(cfg: ModelConfig, got: tuple[jax.Array, ...], given: list[jax.Array], packed: bool) -> float:
    """The largest relative distance of output and gradients from float32's, on the first and last row and group."""
    reference = jax.jit(program(cfg, "reference", packed, backward=True))
    furthest = 0.0
    for at in (0, -1):
        each = slice(at, None) if at else slice(0, 1)
        group = cfg.queries_per_kv
        of_queries = slice(-group, None) if at else slice(0, group)
        heads = (of_queries, each, each, of_queries)
        parts = [x[each, :, h].astype(jnp.float32) for x, h in zip(given[:4], heads, strict=True)]
        with jax.default_matmul_precision("highest"):
            wanted = reference(*parts, given[4][each])
        for x, want, h in zip(got, wanted, (of_queries, of_queries, each, each), strict=True):
            far = jnp.linalg.norm(x[each, :, h].astype(jnp.float32) - want) / jnp.linalg.norm(want)
            furthest = max(furthest, float(far)) if np.isfinite(far) else float("inf")
    return furthest


def temporary_bytes(compiled: Any) -> int:
    """What a compiled program needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def decoder_bytes(name: str) -> dict[str, float]:
    """Memory of a decoder's loss and gradients by length, beside arguments and results, and its growth."""
    sizes = {}
    for length in DECODER_LENGTHS:
        cfg = ModelConfig(num_layers=2, width=64, num_heads=2, positions="rope", attention=name,  # pyright: ignore[reportArgumentType]
                          remat="full", dtype="float32")  # fmt: skip
        decoder = Decoder(cfg, 258, length)
        params = jax.eval_shape(init_params(decoder), jax.random.key(0))
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        batch = dict.fromkeys(("inputs_BL", "targets_BL", "positions_BL", "segments_BL"), ids)
        batch |= {"weights_BL": jax.ShapeDtypeStruct((1, length), jnp.float32)}
        loss = language_model_loss(decoder)
        grads = jax.jit(jax.value_and_grad(lambda p, b, loss=loss: loss(p, {}, b, jax.random.key(0))[0]))
        sizes[str(length)] = temporary_bytes(grads.lower(params, batch).compile())
    print(f"decoder, {name}: {', '.join(f'{n}: {s / 2**20:,.1f} MiB' for n, s in sizes.items())}", flush=True)
    return sizes | {"growth": sizes[str(DECODER_LENGTHS[-1])] / sizes[str(DECODER_LENGTHS[0])]}


def save(report: dict[str, Any], folder: Path) -> None:
    """Writes DATE_attention.json and DATE_attention.png into the folder."""
    from matplotlib import pyplot

    path = write_report(report, folder, "attention")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for name in dict.fromkeys(r["attention"] for r in report["rows"]):
        for packed, line in ((True, "-"), (False, "--")):
            run = [r for r in report["rows"] if r["attention"] == name and r["packed"] == packed and "both" in r]
            label = f"{name}, {'packed' if packed else 'one document'}"
            lengths = [r["length"] for r in run]
            axes[0].plot(lengths, [r["tokens_per_second"] for r in run], line, marker="o", label=label)
            axes[1].plot(lengths, [max(r["bytes"], 1) / 2**20 for r in run], line, marker="o", label=label)
    for axis, title in zip(axes, ("tokens/s, forward and backward", "MiB beside arguments and results")):
        axis.set(title=title, xlabel="length", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{report['device']}, {report['dtype']}, commit {report['commit']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
