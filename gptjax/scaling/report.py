"""Reports of a fit: one screen of text, and one self-contained HTML page of it with plots, in light and dark."""

import base64
import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gptjax.scaling.plots import draw, have_matplotlib
from gptjax.scaling.predicting import optimum
from gptjax.scaling.saved import Fit
from gptjax.scaling.table import INPUTS
from gptjax.storage import write_file, write_json

AHEAD = (3, 10)  # planned budgets, as multiples of the largest fitted one
SHOWN = 2  # notes of an approach on the screen; the page has all
NO_PLOTS = "no plots, for matplotlib is not installed: pip install 'gptjax[plots]'"

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
pre { white-space: pre-wrap; } img { max-width: 100%; background: #fff; border-radius: 6px; }
"""
IMAGES = {
    "losses": "losses of the runs and the law", "optimum": "best parameters and tokens over FLOPs",
    "isoflop": "loss over parameters at each budget", "residuals": "relative residuals",
}  # fmt: skip


def write_report(fit: Fit, folder: Path) -> list[str]:
    """Writes fit.json, report.html and plots/ into a folder; returns their paths inside of it."""
    plots = draw(fit)
    write_json(folder / "fit.json", fit.document)
    for name, png in plots.items():
        write_file(folder / "plots" / f"{name}.png", png)
    write_file(folder / "report.html", page(fit, plots).encode())
    return ["fit.json", "report.html", *(f"plots/{name}.png" for name in plots)]


def screen(fit: Fit, notes: int | None = SHOWN) -> list[str]:
    """The lines of one screen, with so many notes of each approach; None: all."""
    doc, table = fit.document, fit.document["table"]
    low, high = doc["range"]["flops"]
    lines = [
        *_disagreement(fit),
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
    for times in AHEAD:
        row = optimum(fit, doc["range"]["flops"][1] * times)
        loss = row["loss_interval"]
        spread = f" [{loss[0]:.4f}, {loss[1]:.4f}]" if loss else ""
        lines.append(f"  at {row['flops']:.3g} FLOPs: N {row['parameters']:.3g}, D {row['tokens']:.3g}, "
                     f"loss {row['loss']:.4f}{spread}")  # fmt: skip
    lines.append(_left_out(doc["leave_one_out"]))
    lines += [f"note: {note}" for note in doc["notes"]]
    for name, approach in fit.approaches.items():
        every = approach.get("notes", [])
        lines += [f"note: {name}: {note}" for note in every[:notes]]
        if more := len(every) - len(every[:notes]):
            lines.append(f"note: {name}: {more} more in report.html")
    return lines if have_matplotlib() else [*lines, NO_PLOTS]


def page(fit: Fit, plots: dict[str, bytes]) -> str:
    """The screen with all notes, the plots, the points and the settings as one HTML page that loads nothing else."""
    title = html.escape(f"{fit.document['law']} law of {Path(fit.document['table']['source']).name}")
    images = [
        f'<p><img alt="{alt}" src="data:image/png;base64,{base64.b64encode(plots[name]).decode()}"></p>'
        for name, alt in IMAGES.items()
        if name in plots
    ]
    body = [_section("", screen(fit, notes=None)), *images, _section("Approaches", _approaches(fit)),
            _section("Points", _points(fit)),
            _section("Settings", _settings(fit.document))]  # fmt: skip
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n" + "\n".join(body)
        + "\n</body></html>\n"
    )  # fmt: skip


def _disagreement(fit: Fit) -> list[str]:
    """A line where the intervals of the approaches' exponents have nothing in common, or none."""
    done = {name: approach for name, approach in fit.approaches.items() if approach["done"]}
    exponents = {name: (a["exponents"]["N"], *a["intervals"]["N"]) for name, a in done.items() if a["intervals"]["N"]}
    lows, highs = ([edges[i] for edges in exponents.values()] for i in (1, 2))
    if not exponents or max(lows) <= min(highs):
        return []
    words = ", ".join(f"C^{a:.3f} [{low:.3f}, {high:.3f}] by {name}" for name, (a, low, high) in exponents.items())
    return [f"warning: the approaches disagree beyond their {fit.level:.0%} intervals, N ~ {words}: one of their "
            "assumptions (report.html) fails here"]  # fmt: skip


def _approaches(fit: Fit) -> Iterator[str]:
    done = {name: approach for name, approach in fit.approaches.items() if approach["done"]}
    yield from (f"{name} assumes: {approach['assumes']}" for name, approach in done.items())
    if minima := done.get("isoflop", {}).get("minima"):
        yield "\nisoflop budget" + "".join(
            f"{word:>13}" for word in ("N", "D", "least loss", "sizes used", "from", "to")
        )
        for c, n, d in (minimum.values() for minimum in minima):
            values = (f"{n['best']:.4g}", f"{d['best']:.4g}", f"{n['loss']:.4f}", n["sizes"], f"{n['low']:.4g}",
                      f"{n['high']:.4g}")  # fmt: skip
            yield f"{c:<14.4g}" + "".join(f"{value:>13}" for value in values)


def _section(title: str, lines: Iterable[str]) -> str:
    return (f"<h2>{title}</h2>\n" if title else "") + f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def _points(fit: Fit) -> Iterator[str]:
    points, inputs = fit.document["points"], list(fit.fitted.inputs)
    yield f"{'run':28}" + "".join(f"{name:>11}" for name in (*inputs, "FLOPs", "budget", "loss", "law", "loss/law-1"))
    columns = ("name", "budget", "loss", "predicted", *(INPUTS[name] for name in inputs), "flops")
    for name, budget, loss, law, *sizes in zip(*(points[column] for column in columns)):
        numbers = [*(f"{x:.4g}" for x in sizes), "" if budget is None else f"{budget:.3g}", f"{loss:.4f}",
                   f"{law:.4f}", f"{100 * (loss / law - 1):+.2f} %"]  # fmt: skip
        yield f"{name:28}" + "".join(f"{x:>11}" for x in numbers)


def _settings(doc: dict[str, Any]) -> list[str]:
    rows = [("table", doc["table"]["source"]), ("sha256", doc["table"]["sha256"]), *doc["versions"].items()]
    for name, value in doc["settings"].items():
        words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append((f"--{name.replace('_', '-')}", words))
    return [f"{name:20} {value}" for name, value in rows]


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
