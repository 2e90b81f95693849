"""What throughput.py makes of its measurements: percentiles, ratios, MFU, the check of the losses, a table, a plot."""

import statistics
from pathlib import Path
from typing import Any

from contenders import Contest, flat
from report import spread

from gptjax.config import TrainConfig
from gptjax.model.counts import flops_per_token, parameters
from gptjax.runtime.hardware import sheet_flops
from gptjax.training.metrics import CONVENTIONS

# How far any loss, and the norm of the first gradient, may be from the reference's, relative to it. Rounding moves them
# by 2e-7 and 2e-7 in float32, in jax and in torch (TF32, a GPU's default, by some 1e-4), by 7e-4 and 8e-4 in bfloat16.
# The faults of planted_faults.py move the norm by 1.4e-2 (future_seen at length 256) to 0.3, a row's documents taken
# for one by 1.3e-2, queries taken for keys by 4e-3.
TOLERANCE = {"float32": {"loss": 3e-4, "grad_norm": 2e-3}, "bfloat16": {"loss": 2e-3, "grad_norm": 3e-3}}

Rows = list[dict[str, float]]


def gaps(rows: Rows, right: Rows) -> dict[str, float]:
    """How far the losses (the worst of them) and the first gradient's norm are from the reference's, as a share."""
    loss = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(rows, right))
    # Later gradients are taken at other weights; the first is a function of the same weights and rows.
    return {"loss": loss, "grad_norm": abs(rows[0]["grad_norm"] / right[0]["grad_norm"] - 1)}


def judge(contest: Contest, timed: dict[str, Any], right: dict[str, Rows]) -> list[str]:
    """One line for each competitor whose numbers are not the reference's."""
    faults = []
    for name, found in timed.items():
        if "failed" in found:
            continue
        for what, gap in gaps(found["rows"], right[documents(name)]).items():
            limit = TOLERANCE[contest.dtype][what]
            if not gap <= limit:
                off = f"{gap:.1e} off the reference; wanted at most {limit:g}"
                faults.append(f"{contest.name}: {name}: {what} is {off}")
    return faults


def documents(name: str) -> str:
    return "isolated" if name.endswith("isolated") else "crossing"


def summary(
    contest: Contest,
    config: TrainConfig,
    timed: dict[str, dict[str, Any]],
    ceilings: dict[str, list[list[float]]],
    shapes: list[tuple[int, int, int]],
    right: dict[str, Rows],
) -> dict[str, Any]:
    """The report of one contest; `ratio` is our tokens a second over another's in the same round."""
    vocab_size, length = config.tokenizer.vocab_size, config.data.length
    tokens, flops = config.data.batch_size * length, flops_per_token(config.model, vocab_size, length)
    measured = {
        library: {
            "median_gflops": statistics.median(rate for rates in rounds for rate in rates),
            "gflops_by_shape": {
                "x".join(map(str, shape)): spread([rates[i] for rates in rounds]) for i, shape in enumerate(shapes)
            },
        }
        for library, rounds in ceilings.items()
    }
    ceiling = 1e9 * max((m["median_gflops"] for m in measured.values()), default=float("nan"))
    sheet = sheet_flops(timed.get("ours", {}).get("device", "cpu"), contest.dtype)
    competitors = {}
    for name, found in timed.items():
        competitors[name] = dict(found)
        if "failed" in found:
            continue
        rate = spread([tokens / s for s in found["seconds"]])
        mfu = {"of_measured": {c: rate["median"] * flops[c] / ceiling for c in CONVENTIONS}}
        if sheet:
            mfu["of_data_sheet"] = {c: rate["median"] * flops[c] / sheet for c in CONVENTIONS}
        ours = timed["ours"].get("seconds", [])
        gap = gaps(found["rows"], right[documents(name)])
        competitors[name] |= {
            "tokens_per_second": rate,
            "ratio": spread([theirs / s for theirs, s in zip(found["seconds"], ours)]) if ours else None,
            "mfu": mfu,
            "final_loss": found["rows"][-1]["loss"],
            "reference_loss": right[documents(name)][-1]["loss"],
            "gap": gap,
            "right": all(gap[what] <= limit for what, limit in TOLERANCE[contest.dtype].items()),
        }
    return {
        "name": contest.name, "shape": contest.shape, "family": contest.family, "dtype": contest.dtype,
        "parameters": parameters(config.model, vocab_size, length)["total"], "tokens_a_step": tokens,
        "flops_per_token": flops, "ceiling": measured, "ceiling_flops": ceiling, "data_sheet_flops": sheet,
        "tolerance": TOLERANCE[contest.dtype], "reference": right, "config": flat(config), "competitors": competitors,
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    device = ", ".join(f"{k} {v}" for k, v in report["device"].items())
    versions = dict(report["versions"])
    for contest in report["contests"]:
        for found in contest["competitors"].values():
            versions |= found.get("versions", {})
    order = "one after the other" if report.get("one_by_one") else "taking turns"
    lines = [
        f"# Training steps, {report['date']}", "",
        f"`{report['command']}`, commit {report['commit']}, {device}, XLA_FLAGS={report['xla_flags']!r}, "
        + ", ".join(f"{k} {v}" for k, v in versions.items()), "",
        f"{report['rounds']} rounds of {report['steps']} steps, {order}; median (5th to 95th percentile). Ratio: ours "
        "over it, in the same round. MFU: 6N/causal/PaLM, of the measured ceiling and of the data sheet.",
    ]  # fmt: skip
    for contest in report["contests"]:
        lines += ["", f"## {contest['name']}: {contest['parameters'] / 1e6:,.1f}M parameters, "
                  f"{contest['tokens_a_step']:,} tokens a step", ""]  # fmt: skip
        ceilings = [f"{library} {m['median_gflops']:,.0f}" for library, m in contest["ceiling"].items()]
        sheet = contest["data_sheet_flops"]
        lines += [f"Ceiling, GFLOP/s: {', '.join(ceilings)}; data sheet: {sheet / 1e9 if sheet else 'unknown'}", ""]
        lines += rows(contest)
        lines += [f"\n**FAILED** {fault}" for fault in contest["faults"]]
    return "\n".join(lines) + "\n"


def rows(contest: dict[str, Any]) -> list[str]:
    """A contest as a table, one line a competitor."""
    head = "| | tokens/s | ratio | MFU | memory, MiB | first step, s | loss | gap of loss, gradient |"
    return [head, "|---|---|---|---|---|---|---|---|", *(_row(*item) for item in contest["competitors"].items())]


def _row(name: str, c: dict[str, Any]) -> str:
    if "failed" in c:
        return f"| {name} | failed | | | | | | |"
    mfu = "; ".join("/".join(f"{100 * share[k]:.1f}" for k in CONVENTIONS) for share in c["mfu"].values())
    memory = c["device_bytes"] or c["resident_bytes"]
    warm = f" ({c['warm_first_step_seconds']:.1f} warm)" if "warm_first_step_seconds" in c else ""
    gap = f"{c['gap']['loss']:.1e}, {c['gap']['grad_norm']:.1e}" + ("" if c["right"] else " **WRONG**")
    return (
        f"| {name} | {_shown(c['tokens_per_second'], ',.0f')} | {_shown(c['ratio'], '.2f')} | {mfu} % | "
        f"{memory / 2**20:,.0f} | {c['first_step_seconds']:.1f}{warm} | {c['final_loss']:.4f} | {gap} |"
    )


def _shown(values: dict[str, float] | None, form: str) -> str:
    return "" if values is None else f"{values['median']:{form}} ({values['p5']:{form}} to {values['p95']:{form}})"


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of tokens a second with their 5th to 95th percentile, one panel a contest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contests = report["contests"]
    figure, axes = plt.subplots(len(contests), 1, figsize=(8, 0.6 + 2.2 * len(contests)), squeeze=False)
    for axis, contest in zip(axes[:, 0], contests):
        shown = [(name, c) for name, c in contest["competitors"].items() if "failed" not in c][::-1]
        for i, (name, c) in enumerate(shown):
            rate = c["tokens_per_second"]
            reach = [[rate["median"] - rate["p5"]], [rate["p95"] - rate["median"]]]
            color = "tab:blue" if name.startswith("ours") else "tab:gray"
            axis.barh(i, rate["median"], xerr=reach, color=color if c["right"] else "tab:red", capsize=3)
            axis.text(rate["median"] / 2, i, f"{rate['median']:,.0f}", va="center", ha="center", color="white")
        axis.set_yticks(range(len(shown)), [name if c["right"] else f"{name} (WRONG)" for name, c in shown])
        axis.set_title(contest["name"], fontsize=10)
    axes[-1, 0].set_xlabel(f"tokens a second, training step ({report['date']}, {report['commit']})")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
