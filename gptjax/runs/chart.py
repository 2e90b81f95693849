"""Charts of curves over steps as inline SVG, in the colours of the page around them; nothing is loaded or run."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 210  # of the drawing, in units that a phone shows as pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 24, 36  # margins, for the labels
SMOOTH = 0.02  # the share of a curve that its mean is taken over

STYLE = """
figure { margin: 0; } figcaption { display: flex; flex-wrap: wrap; gap: 0 .8rem; }
figcaption b { margin-right: auto; } figcaption span { font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
svg .raw { fill: none; stroke-width: 1; opacity: .35; }
.a { color: var(--a); stroke: var(--a); } .b { color: var(--b); stroke: var(--b); }
circle.a { fill: var(--a); } circle.b { fill: var(--b); } span.a, span.b { stroke: none; }
"""


@dataclass(frozen=True)
class Series:
    """A name, its points (step, value) in order, and a format of its last value for the caption.

    `noisy` draws a mean over its points beside them, `dots` marks each.
    """

    name: str
    points: Sequence[tuple[int, float]]
    show: Callable[[float], str]
    noisy: bool = False
    dots: bool = False


def chart(title: str, unit: str, curves: Sequence[Series], log: bool = False) -> str:
    """A figure of curves over steps from 0, its last values in the caption; "" where no curve has a finite point."""
    # A logarithmic axis has no place for 0.
    ok = [[(x, y) for x, y in c.points if math.isfinite(y) and (y > 0 or not log)] for c in curves]
    curves_of = [(c, p, "ab"[i]) for i, (c, p) in enumerate(zip(curves, ok, strict=True)) if p]
    if not curves_of:
        return ""
    xs, ys = ([point[i] for _, p, _ in curves_of for point in p] for i in (0, 1))
    y_ticks = _decades(min(ys), max(ys)) if log else _ticks(min(ys), max(ys), 5)
    x_ticks = [x for x in _ticks(0, max(xs), 5) if x <= max(xs)]
    scale, inverse = (math.log10, lambda y: 10**y) if log else (float, float)
    low, high = scale(y_ticks[0]), scale(y_ticks[-1])

    def px(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / max(max(xs), 1)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (scale(y) - low) / (high - low)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)

    parts = []
    for y in y_ticks:
        parts += [f'<path class=grid d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>',
                  f'<text x={LEFT - 6} y="{py(y) + 4:.1f}" text-anchor=end>{_short(y)}</text>']  # fmt: skip
    for x in x_ticks:
        parts.append(f'<text x="{px(x):.1f}" y={HEIGHT - BOTTOM + 15} text-anchor=middle>{_short(x)}</text>')
    parts.append(f"<text x={(LEFT + WIDTH - RIGHT) / 2} y={HEIGHT - 4} text-anchor=middle>step</text>")
    parts.append(f"<text x=4 y=12>{html.escape(unit)}</text>")
    for curve, points, colour in curves_of:
        if curve.noisy:
            parts.append(f'<polyline class="raw {colour}" points="{path(points)}"/>')
            points = [(x, inverse(y)) for x, y in _smooth([(x, scale(y)) for x, y in points])]
        parts.append(f'<polyline class="curve {colour}" points="{path(points)}"/>')
        if curve.dots or len(points) == 1:
            parts += [f'<circle class={colour} cx="{px(x):.1f}" cy="{py(y):.1f}" r=2.5 />' for x, y in points]
    last = "".join(f"<span class={colour}>{c.name} {c.show(p[-1][1])}</span>" for c, p, colour in curves_of)
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b>{last}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{html.escape(title)} over steps">'
        f"{''.join(parts)}</svg></figure>"
    )


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean around each point, over as many on either side."""
    reach = int(len(points) * SMOOTH / 2)
    means = []
    for i, (x, _) in enumerate(points):
        k = min(reach, i, len(points) - 1 - i)
        means.append((x, math.fsum(y for _, y in points[i - k : i + k + 1]) / (2 * k + 1)))
    return means


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers, at most `most` + 1, the first at or below `low`, the last at or above `high`."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / (most - 1)
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    stride = -(-(last - first) // 5)
    return [10.0**i for i in range(first, last + stride, stride)]


def _short(x: float) -> str:
    """'1.5k', '20M', '0.002', '2e-05'."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.4g}{unit}"
    return f"{x:.4g}"
