"""fit.json: the file of a fit, with all that a prediction needs."""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config.section import InputError
from gptjax.scaling.fits import Fitted
from gptjax.scaling.laws import TwoPoint
from gptjax.storage import filesystem, resolve_path

FORMAT = 1
KEYS = ("format", "law", "formula", "coefficients", "flops_per", "level", "range", "approaches", "leave_one_out",
        "baseline", "residuals", "points", "table", "settings", "versions", "notes", "fitted")  # fmt: skip
MOST = 1.0  # decades beyond the fitted points that a prediction may go without --extrapolate


@dataclass(frozen=True)
class Fit:
    """The contents of fit.json."""

    document: dict[str, Any]
    source: str = "fit.json"
    sha256: str = ""

    @cached_property
    def fitted(self) -> Fitted:
        return Fitted.of_record(self.document["fitted"])

    @property
    def law(self) -> Any:
        return self.fitted.law

    @property
    def level(self) -> float:
        return self.document["level"]

    @property
    def flops_per(self) -> float:
        """FLOPs a parameter and token: C = flops_per N D."""
        return self.document["flops_per"]

    @property
    def approaches(self) -> dict[str, Any]:
        return self.document["approaches"]

    @cached_property
    def points(self) -> dict[str, np.ndarray]:
        """The fitted points: the law's inputs, flops, loss, budget (NaN for none), predicted; each [P]."""
        numbers = {k: v for k, v in self.document["points"].items() if k not in ("name", "seed")}
        return {name: np.array([np.nan if x is None else x for x in values]) for name, values in numbers.items()}

    @property
    def baseline(self) -> TwoPoint | None:
        line = self.document["baseline"]
        return TwoPoint(tuple(line["flops"]), tuple(line["losses"])) if line["done"] else None

    def optimal(self, flops: Any, *unique_tokens: float) -> tuple[np.ndarray, np.ndarray]:
        """(N, D) of the least loss at these FLOPs, by the law."""
        return self.law.optimal(flops, self.flops_per, *unique_tokens)

    def loss(self, *inputs: Any) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """(loss, low, high) of runs, arrays [runs]; low and high are None where the fit has no intervals.

        The inputs are the law's: N, D, and U where it has one; without U all tokens are unique. Each run is predicted
        alone, so that its interval does not depend on the others.
        """
        runs = zip(*np.broadcast_arrays(*np.atleast_1d(*inputs)), strict=True)
        loss, low, high = np.concatenate([self.fitted.predict(*run) for run in runs], axis=1)
        return (loss, low, high) if np.isfinite([low, high]).all() else (loss, None, None)

    def loss_of_run(self, *inputs: float) -> tuple[float, list[float] | None]:
        """The loss of one run and its interval, None where there is none."""
        loss, low, high = self.loss(*inputs)
        return float(loss[0]), None if low is None or high is None else interval((low[0], high[0]))

    def check(self, extrapolate: bool, **values: float) -> tuple[str, ...]:
        """A sentence for each value outside of the fitted points.

        Raises InputError where one lies more than a decade outside, unless extrapolation was asked for.
        """
        sentences = []
        for key, value in values.items():
            low, high = self.document["range"][key]
            side, edge, limit = ("above", "largest", high) if value > high else ("below", "smallest", low)
            decades = math.log10(value / limit)
            if low <= value <= high or abs(decades) < 0.005:
                continue
            units = key.replace("flops", "FLOPs").replace("_", " ")
            line = f"{value:.3g} {units} are {abs(decades):.2f} decades {side} the {edge} fitted, {limit:.3g}"
            if abs(decades) > MOST + 1e-9 and not extrapolate:
                raise InputError(
                    f"{line}; wanted at most {MOST:g}, since no fitted point is near: "
                    "fit larger runs, or give --extrapolate"
                )
            sentences.append(line)
        return tuple(sentences)


def open_fit(path: str | Path) -> Fit:
    """Reads fit.json, or a folder that holds it; raises InputError for a file of another version."""
    file = resolve_path(path)
    if filesystem(file).is_folder(file):
        file = file / "fit.json"
    if not filesystem(file).is_file(file):
        raise InputError(f"{file}: no such file; wanted the folder that gptjax fit wrote (gptjax fit TABLE --out DIR)")
    raw = filesystem(file).read(file)
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{file}: not valid JSON ({e}); run gptjax fit again") from e
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        got = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise InputError(f"{file}: format {got!r}; wanted {FORMAT}, as this gptjax writes it: run gptjax fit again")
    if missing := [key for key in KEYS if key not in document]:
        raise InputError(f"{file}: {missing[0]!r} is missing; wanted what gptjax fit wrote: run it again")
    return Fit(document, str(file), hashlib.sha256(raw).hexdigest())


def strict(value: Any) -> Any:
    """Converts a value to strict JSON: plain numbers, and None for NaN and infinity."""
    if isinstance(value, dict):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return strict(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def interval(edges: tuple[float, float]) -> list[float] | None:
    """An interval for JSON; None where an edge is not finite."""
    return [float(edge) for edge in edges] if np.isfinite(edges).all() else None
