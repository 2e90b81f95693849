"""The four plots of a fit, as PNG: losses, IsoFLOP minima, N-opt and D-opt, residuals. Needs matplotlib."""

import importlib.util
import io
from typing import Any

import numpy as np

from gptjax.scaling.saved import Fit

SIZE, DPI = (7.2, 4.6), 110
COLOURS = {"parametric": "#1f5fa8", "isoflop": "#c2451e", "envelope": "#2d8a4e"}
GREY = "#777777"


def have_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(fit: Fit) -> dict[str, bytes]:
    """The plots that this fit allows, as the bytes of PNG files by name; empty without matplotlib."""
    return {name: _png(figure) for name, figure in figures(fit).items()} if have_matplotlib() else {}


def figures(fit: Fit) -> dict[str, Any]:
    """The plots that this fit allows, as matplotlib's figures by name."""
    makers = {"losses": _losses, "isoflop": _isoflop, "optimum": _optimum, "residuals": _residuals}
    made = {name: figure for name, make in makers.items() if (figure := make(fit)) is not None}
    for figure in made.values():
        _thin_log_ticks(figure)
    return made


def _figure(columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE if columns == 1 else (10.4, 4.4), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.grid(True, color="#e3e3e3", linewidth=0.7, zorder=0)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _losses(fit: Fit) -> Any:
    """Loss over FLOPs: points by size, the law at each size, and the least loss with its interval."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    figure, (ax,) = _figure()
    n, c, loss = (fit.points[k] for k in ("parameters", "flops", "loss"))
    norm, cmap = LogNorm(n.min() * 0.99, n.max() * 1.01), colormaps["viridis"]
    sizes = np.exp(_clusters(np.log(n), 0.02))
    for size in sizes if len(sizes) <= 24 else []:
        of = np.abs(np.log(n / size)) < 0.03
        if of.sum() < 2:
            continue
        ratio = np.exp(np.log(fit.points["tokens"][of] / c[of]).mean())
        over = np.geomspace(c[of].min() / 1.3, c[of].max() * 1.3, 60)
        ax.plot(over, fit.law.loss(size, over * ratio), color=cmap(norm(size)), linewidth=1.0, alpha=0.8, zorder=2)
    marks = ax.scatter(c, loss, c=n, norm=norm, cmap=cmap, s=22, edgecolors="white", linewidths=0.4, zorder=3)
    over = np.geomspace(c.min() / 1.5, c.max() * 10, 80)
    n_opt, d_opt = fit.optimal(over)
    middle, low, high = fit.loss(n_opt, d_opt)
    ax.plot(over, middle, color="black", linestyle="--", linewidth=1.2, label="law at the best N and D", zorder=2)
    if low is not None:
        label = f"{fit.level:.0%} interval of one run"
        ax.fill_between(over, low, high, color="black", alpha=0.12, linewidth=0, label=label)
    ax.axvline(c.max(), color=GREY, linewidth=0.8, linestyle=":")
    ax.annotate("largest fitted", (c.max(), 0.985), xycoords=("data", "axes fraction"), fontsize=8, color=GREY,
                rotation=90, ha="right", va="top")  # fmt: skip
    labels = {"xlabel": "training FLOPs", "ylabel": "loss (nats a token)", "title": "Losses and the law"}
    ax.set(xscale="log", yscale="log", **labels)
    _plain_loss_ticks(ax)
    ax.legend(frameon=False, fontsize=9)
    figure.colorbar(marks, ax=ax, label="parameters")
    return figure


def _isoflop(fit: Fit) -> Any:
    """Loss over N for each budget, the curve through the losses near the minimum, and the minimum."""
    isoflop = fit.approaches["isoflop"]
    if not isoflop["done"]:
        return None
    from matplotlib import colormaps

    figure, (ax,) = _figure()
    minima, tokens = isoflop["minima"], fit.points["tokens"]
    new = fit.points.get("unique_tokens", tokens) >= tokens
    colours = colormaps["viridis"](np.linspace(0, 0.88, len(minima)))
    for found, colour in zip(minima, colours):
        of, best = new & (np.abs(np.log(fit.points["budget"] / found["budget"])) < 1e-6), found["N"]
        ax.scatter(fit.points["parameters"][of], fit.points["loss"][of], color=colour, s=20, zorder=3)
        over = np.geomspace(best["low"], best["high"], 80)
        near = np.exp(np.polyval(best["coefficients"], np.log(over / best["centre"])))
        ax.plot(over, near, color=colour, linewidth=1.2, label=f"{found['budget']:.3g}", zorder=2)
        ax.plot(best["best"], best["loss"], marker="*", color=colour, markeredgecolor="black", markeredgewidth=0.6,
                markersize=12, zorder=4)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="parameters", ylabel="loss (nats a token)",
           title="Losses of each budget; stars are minima, curves what they rest on")  # fmt: skip
    _plain_loss_ticks(ax)
    ax.legend(title="FLOPs", frameon=False, fontsize=8, title_fontsize=9)
    return figure


def _optimum(fit: Fit) -> Any:
    """N-opt and D-opt over FLOPs by each approach, with intervals."""
    done = {name: a for name, a in fit.approaches.items() if a["done"]}
    if not done:
        return None
    figure, axes = _figure(2)
    c = fit.points["flops"]
    over = np.geomspace(c.min(), c.max() * 10, 60)
    for ax, key, label in zip(axes, ("N", "D"), ("parameters", "tokens")):
        for name, approach in done.items():
            a, k = approach["exponents"][key], approach["coefficients"][key]
            ax.plot(over, k * over**a, color=COLOURS[name], label=f"{name}: C^{a:.3f}", linewidth=1.4, zorder=3)
            if approach["band"]:
                band = approach["band"]
                ax.fill_between(band["flops"], band[key][0], band[key][1], color=COLOURS[name], alpha=0.15, linewidth=0)
            for spot in approach["minima"]:
                ax.plot(spot["budget"], spot[key]["best"], marker="*", color=COLOURS[name], markersize=10, zorder=4)
        ax.axvline(c.max(), color=GREY, linewidth=0.8, linestyle=":")
        ax.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=label, title=f"Best {label} for a budget")
        ax.legend(frameon=False, fontsize=9)
    return figure


def _residuals(fit: Fit) -> Any:
    """Relative residuals in percent, over FLOPs and over tokens a parameter."""
    figure, axes = _figure(2)
    n, d, c, loss = (fit.points[k] for k in ("parameters", "tokens", "flops", "loss"))
    off = 100 * (loss / fit.points["predicted"] - 1)
    for ax, x, label in zip(axes, (c, d / n), ("training FLOPs", "tokens a parameter")):
        ax.axhline(0, color="black", linewidth=0.8)
        ax.scatter(x, off, s=20, color=COLOURS["parametric"], alpha=0.75, edgecolors="white", linewidths=0.4, zorder=3)
        ax.set(xscale="log", xlabel=label, ylabel="observed / law - 1 (%)")
    rms = float(np.sqrt(np.mean(off**2)))
    figure.suptitle(f"Residuals: root mean square {rms:.3g} %, largest {np.abs(off).max():.3g} %", fontsize=12)
    return figure


def _clusters(values: np.ndarray, gap: float) -> np.ndarray:
    """The mean of each group of values that lie closer than `gap` to a neighbour."""
    ordered = np.sort(values)
    return np.array([group.mean() for group in np.split(ordered, np.flatnonzero(np.diff(ordered) > gap) + 1)])


def _plain_loss_ticks(ax: Any) -> None:
    """Losses as 3.5, not as powers of ten."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    ax.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(ScalarFormatter())


def _thin_log_ticks(figure: Any) -> None:
    """Labels of logarithmic axes at 1, 2 and 5 alone: those of 3 and 4 run into each other."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator

    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        if isinstance(axis.get_major_locator(), LogLocator):
            axis.set_minor_locator(LogLocator(subs=(2, 5)))
            axis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 2)))
