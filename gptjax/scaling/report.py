"""Reports of a fit: one screen of text, and one self-contained HTML page, in light and dark."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gptjax.scaling.plots import draw, have_matplotlib
from gptjax.scaling.predicting import optimum
from gptjax.scaling.saved import Fit
from gptjax.scaling.table import INPUTS
from gptjax.storage import write_file, write_json

AHEAD = (1, 3, 10)  # planned budgets, as multiples of the largest fitted one
SHOWN = 2  # notes of an approach on the screen; the page has all
NO_PLOTS = "no plots, for matplotlib is not installed: pip install 'gptjax[plots]'"

STYLE = """
:root { color-scheme: light dark; --text: #1c1c1e; --soft: #63636a; --line: #dcdce0; --back: #ffffff; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8ea; --soft: #9d9da5; --line: #3a3a40; --back: #17171a; --bad: #ff8a80; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p, li { max-width: 48rem; } .soft { color: var(--soft); } .bad { color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .22rem .9rem .22rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td.words { text-align: left; } td.words { white-space: normal; }
th { font-weight: 600; color: var(--soft); }
code { font-size: .9rem; overflow-wrap: anywhere; }
img { max-width: 100%; background: #fff; border-radius: 6px; margin: .4rem 0; }
"""


def write_report(fit: Fit, folder: Path) -> list[str]:
    """Writes fit.json, report.html and plots/ into a folder; returns their paths inside of it."""
    plots = draw(fit)
    write_json(folder / "fit.json", fit.document)
    for name, png in plots.items():
        write_file(folder / "plots" / f"{name}.png", png)
    write_file(folder / "report.html", page(fit, plots).encode())
    return ["fit.json", "report.html", *(f"plots/{name}.png" for name in plots)]


def screen(fit: Fit) -> list[str]:
    """The lines of one screen."""
    doc, table = fit.document, fit.document["table"]
    low, high = doc["range"]["flops"]
    lines = [
        f"{doc['law']}: {doc['formula']}",
        f"{table['points']} points of {table['source']}"
        + (f", {table['left_out']} left out" if table["left_out"] else "")
        + f"; {low:.3g} to {high:.3g} FLOPs, N {_range(doc, 'parameters')}, D {_range(doc, 'tokens')}",
    ]  # fmt: skip
    for name, c in doc["coefficients"].items():
        lines.append(f"  {name:7} {c['value']:11.5g}  {_pair(c['interval'], '.5g')}")
    r = doc["residuals"]
    lines.append(f"residuals: root mean square {100 * r['rms']:.3g} %, largest {100 * r['largest']:.3g} %")
    lines.append(f"best N and D for a budget C (C = {fit.flops_per:.4g} N D), {fit.level:.0%} intervals:")
    for name, approach in fit.approaches.items():
        if approach["done"]:
            a, b = (f"C^{approach['exponents'][k]:.4f} {_pair(approach['intervals'][k], '.4f')}" for k in "ND")
            lines.append(f"  {name:10} N ~ {a}  D ~ {b}")
        else:
            lines.append(f"  {name:10} not done: {approach['why']}")
    for row in plans(fit)[1:]:
        loss = row["loss_interval"]
        spread = f" [{loss[0]:.4f}, {loss[1]:.4f}]" if loss else ""
        lines.append(f"  at {row['flops']:.3g} FLOPs: N {row['parameters']:.3g}, D {row['tokens']:.3g}, "
                     f"loss {row['loss']:.4f}{spread}")  # fmt: skip
    lines.append(_left_out(doc["leave_one_out"]))
    lines += [f"note: {note}" for note in doc["notes"]]
    for name, approach in fit.approaches.items():
        notes = approach.get("notes", [])
        lines += [f"note: {name}: {note}" for note in notes[:SHOWN]]
        if len(notes) > SHOWN:
            lines.append(f"note: {name}: {len(notes) - SHOWN} more in report.html")
    return lines if have_matplotlib() else [*lines, NO_PLOTS]


def plans(fit: Fit) -> list[dict[str, Any]]:
    """The optimal runs at the largest fitted budget, and at 3 and 10 times it."""
    return [optimum(fit, fit.document["range"]["flops"][1] * times) for times in AHEAD]


def page(fit: Fit, plots: dict[str, bytes]) -> str:
    """The report as one HTML page without scripts or external fonts, images and styles."""
    doc, table = fit.document, fit.document["table"]
    parts = [
        f"<h1>{_text(doc['law'])} law of {_text(Path(table['source']).name)}</h1>",
        f"<p class=soft>{table['points']} runs, {_range(doc, 'flops')} FLOPs, {_range(doc, 'parameters')} "
        f"parameters ({doc['settings']['count']}), {_range(doc, 'tokens')} tokens; {fit.level:.0%} intervals from "
        f"{doc['settings']['bootstraps']} resampled tables. Losses are in nats a token.</p>",
        "<h2>The law</h2>", f"<p><code>{_text(doc['formula'])}</code></p>",
        _table(("", "value", "interval"),
               [(n, f"{c['value']:.5g}", _pair(c["interval"], ".5g")) for n, c in doc["coefficients"].items()]),
        f"<p>Residuals: root mean square {100 * doc['residuals']['rms']:.3g} %, largest "
        f"{100 * doc['residuals']['largest']:.3g} %.</p>",
        *_image(plots, "losses", "losses of the runs and the law"),
        "<h2>Best size and tokens for a budget</h2>", *_approaches(fit),
        *_image(plots, "optimum", "best parameters and tokens over FLOPs"),
        *_image(plots, "isoflop", "loss over parameters at each budget"),
        *_plans(fit),
        "<h2>Validation</h2>", *_validation(doc),
        *_image(plots, "residuals", "relative residuals"),
        "<h2>Points</h2>", _points(fit),
        "<h2>Provenance</h2>", *_provenance(doc),
    ]  # fmt: skip
    if not plots:
        parts.insert(2, f"<p class=bad>{_text(NO_PLOTS)}</p>")
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{_text(doc['law'])}: {_text(Path(table['source']).name)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _approaches(fit: Fit) -> list[str]:
    rows = []
    for name, approach in fit.approaches.items():
        if approach["done"]:
            a, b, k = approach["exponents"], approach["intervals"], approach["coefficients"]
            rows.append((name, f"{k['N']:.4g} C^{a['N']:.4f}", _pair(b["N"], ".4f"), f"{k['D']:.4g} C^{a['D']:.4f}",
                         _pair(b["D"], ".4f")))  # fmt: skip
        else:
            rows.append((name, f"not done: {approach['why']}", "", "", ""))
    notes = [f"{name}: {note}" for name, approach in fit.approaches.items() for note in approach.get("notes", ())]
    return [
        f"<p class=soft>C = {fit.flops_per:.4g} N D. The three approaches of Hoffmann et al. 2022: envelope of "
        "training curves, IsoFLOP parabolas, parametric fit.</p>",
        _table(("", "N-opt", "exponent's interval", "D-opt", "exponent's interval"), rows), *_list(notes),
    ]  # fmt: skip


def _plans(fit: Fit) -> list[str]:
    rows = [
        (f"{row['flops']:.3g}", f"{row['parameters']:.3g}", _pair(row["parameters_interval"], ".3g"),
         f"{row['tokens']:.3g}", _pair(row["tokens_interval"], ".3g"), f"{row['tokens'] / row['parameters']:.3g}",
         f"{row['loss']:.4f}", _pair(row["loss_interval"], ".4f"))
        for row in plans(fit)
    ]  # fmt: skip
    head = ("FLOPs", "N", "interval", "D", "interval", "D / N", "loss", "interval of one run")
    return ["<p>By the law, at the largest fitted budget and beyond:</p>", _table(head, rows)]


def _validation(doc: dict[str, Any]) -> list[str]:
    left_out, line = doc["leave_one_out"], doc["baseline"]
    parts = []
    if left_out["done"]:
        rows = [(f"{r['budget']:.3g}" + (" (extrapolated)" if r["beyond"] else ""), str(r["points"]),
                 *("too little left" if r[k] is None else f"{100 * r[k]:{form}} %"
                   for k, form in (("error", "+.2f"), ("worst", ".2f"))))
                for r in left_out["budgets"]]  # fmt: skip
        parts += ["<p>Each budget predicted by a law fitted to the others; errors are prediction / loss - 1:</p>",
                  _table(("budget left out", "runs", "mean error", "largest, of a run"), rows)]  # fmt: skip
    else:
        parts.append(f"<p>Leave one budget out: not done, {_text(left_out['why'])}.</p>")
    if line["done"]:
        parts.append(
            f"<p class=soft>Baseline: the two-point line, loss {line['losses'][1]:.4f} (C / {line['flops'][1]:.3g})"
            f"<sup>{line['slope']:.4f}</sup>, through the best runs of the two largest budgets.</p>"
        )
    else:
        parts.append(f"<p class=soft>Two-point line: not done, {_text(line['why'])}.</p>")
    return parts


def _points(fit: Fit) -> str:
    points, inputs = fit.document["points"], list(fit.fitted.inputs)
    rows = [
        (name, *(f"{x:.4g}" for x in sizes), "" if b is None else f"{b:.3g}", f"{loss:.4f}", f"{law:.4f}",
         f"{100 * (loss / law - 1):+.2f} %")
        for name, b, loss, law, *sizes in zip(*(points[k] for k in (
            "name", "budget", "loss", "predicted", *(INPUTS[name] for name in inputs), "flops")))
    ]  # fmt: skip
    return _table(("run", *inputs, "FLOPs", "budget", "loss", "law", "loss / law - 1"), rows)


def _provenance(doc: dict[str, Any]) -> list[str]:
    table = doc["table"]
    rows = [("table", table["source"]), ("sha256", table["sha256"]), ("points left out", str(table["left_out"]))]
    for name, value in doc["settings"].items():
        words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append((f"--{name.replace('_', '-')}", words))
    rows += [(name, version) for name, version in doc["versions"].items()]
    return [*_list(doc["notes"]), _table(("", ""), rows, words=True)]


def _left_out(result: dict[str, Any]) -> str:
    if not result["done"]:
        return f"leave one budget out: not done, {result['why']}"
    rows = [row for row in result["budgets"] if row["error"] is not None]
    worst = max(rows, key=lambda row: abs(row["error"]))
    errors = ", ".join(f"{100 * row['error']:+.2f}" for row in rows)
    words = f"leave one budget out: mean errors {errors} %"
    if rows[-1]["beyond"]:
        return f"{words}; the last, {rows[-1]['budget']:.3g} FLOPs, is an extrapolation"
    return f"{words}; the largest at {worst['budget']:.3g} FLOPs"


def _range(doc: dict[str, Any], what: str) -> str:
    low, high = doc["range"][what]
    return f"{low:.3g} to {high:.3g}"


def _pair(interval: Sequence[float] | None, form: str) -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "no interval"


def _text(words: Any) -> str:
    return html.escape(str(words))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False) -> str:
    top = "<tr>" + "".join(f"<th>{_text(name)}</th>" for name in head) + "</tr>" if any(head) else ""
    cell = "<td class=words>" if words else "<td>"
    body = "\n".join(
        "<tr><td>" + f"</td>{cell}".join(_text(c) for c in row) + "</td></tr>" if row[1][:9] != "not done:" else
        f"<tr><td>{_text(row[0])}</td><td class=words colspan={len(head) - 1}>{_text(row[1])}</td></tr>" for row in rows
    )  # fmt: skip
    return f"<div class=wide><table>{top}\n{body}</table></div>"


def _list(lines: Sequence[str]) -> list[str]:
    return ["<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"] if lines else []


def _image(plots: dict[str, bytes], name: str, alt: str) -> list[str]:
    if name not in plots:
        return []
    return [f'<img alt="{_text(alt)}" src="data:image/png;base64,{base64.b64encode(plots[name]).decode()}">']
