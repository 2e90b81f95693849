"""`gptjax predict`: the optimal run for a budget, the loss of a run, or a whole table compared with the fit."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gptjax.config.scaling import PredictConfig
from gptjax.config.section import InputError
from gptjax.scaling.recipes import batch_rule
from gptjax.scaling.saved import Fit, interval, open_fit, strict
from gptjax.scaling.table import Table, best_run, read_table
from gptjax.storage import write_json

MOST_ROWS = 24  # of a table on the screen; the JSON has all


def predict(folder: str, cfg: PredictConfig, show: Callable[[str], None]) -> list[str]:
    """Predicts by cfg, passes lines to `show`, writes cfg.json, and returns the words of the next command.

    Raises InputError for a prediction more than a decade beyond the fitted points, unless cfg.extrapolate is set.
    """
    fit = open_fit(folder)
    if cfg.unique_tokens and "U" not in fit.fitted.inputs:
        raise InputError(
            f"unique_tokens={cfg.unique_tokens:g}: in the law of {fit.source}, {fit.document['law']}, every token is "
            "unique; leave it out, or fit --law data_constrained"
        )
    again = ["--unique-tokens", f"{cfg.unique_tokens:.3g}"] if cfg.unique_tokens else []
    if cfg.flops:
        result, lines = _budget(fit, cfg)
        twice = ["--parameters", f"{result['parameters'] / 2:.3g}", "--tokens", f"{result['tokens'] * 2:.3g}"]
        following = [*twice, *again, *(["--extrapolate"] if cfg.extrapolate else [])]
    elif cfg.parameters:
        result, lines = _run(fit, cfg)
        following = ["--flops", f"{result['flops']:.3g}", *again]
    elif cfg.against:
        result, lines = _against(fit, cfg)
        following = ["--flops", f"{fit.document['range']['flops'][1]:.3g}"]
    else:
        raise InputError(
            "nothing to predict; wanted --flops 1e21, --parameters N with --tokens D, or --against TABLE "
            f"(this fit: {fit.document['range']['flops'][0]:.3g} to {fit.document['range']['flops'][1]:.3g} FLOPs)"
        )
    if cfg.json:
        about = {"path": fit.source, "sha256": fit.sha256, "law": fit.document["law"], "level": fit.level}
        write_json(cfg.json, strict({"fit": about | {"table": fit.document["table"]}} | result))
    for line in lines:
        show(line)
    return ["predict", folder, *following]


def optimum(fit: Fit, flops: float, *unique_tokens: float) -> dict[str, Any]:
    """The optimal N and D for a budget and their loss, each with its interval, by the law and by each approach.

    The approaches assume that all tokens are unique; the law accounts for `unique_tokens` where they are given.
    """
    fitted, per = fit.fitted, fit.flops_per
    (n,), (d,) = (np.atleast_1d(x) for x in fit.optimal(flops, *unique_tokens))
    loss, loss_interval = fit.loss_of_run(float(n), float(d), *unique_tokens)
    by = {
        name: {
            "parameters": result["coefficients"]["N"] * flops ** result["exponents"]["N"],
            "tokens": result["coefficients"]["D"] * flops ** result["exponents"]["D"],
        }
        for name, result in fit.approaches.items()
        if result["done"]
    }
    return {
        "flops": flops,
        "parameters": float(n),
        "parameters_interval": interval(fitted.of(lambda law: law.optimal(flops, per, *unique_tokens)[0])[1:]),
        "tokens": float(d),
        "tokens_interval": interval(fitted.of(lambda law: law.optimal(flops, per, *unique_tokens)[1])[1:]),
        "loss": loss,
        "loss_interval": loss_interval,
        "approaches": by,
    }


def _budget(fit: Fit, cfg: PredictConfig) -> tuple[dict[str, Any], list[str]]:
    outside = fit.check(cfg.extrapolate, flops=cfg.flops)
    unique = _unique(cfg)
    result = optimum(fit, cfg.flops, *unique.values())
    outside += fit.check(cfg.extrapolate, parameters=result["parameters"], tokens=result["tokens"], **unique)
    advice = batch_rule(cfg.recipe, result["parameters"], result["tokens"])
    lines = [
        f"best for {cfg.flops:.4g} FLOPs by {fit.document['law']}, {fit.level:.0%} intervals ({fit.source})",
        f"  parameters {_value(result['parameters'], result['parameters_interval'])}",
        f"  tokens     {_value(result['tokens'], result['tokens_interval'])}, "
        f"{result['tokens'] / result['parameters']:.3g} a parameter{_epochs(cfg, result['tokens'])}",
        f"  loss       {_value(result['loss'], result['loss_interval'], '.4f')} nats a token, of one run",
    ]
    lines += [
        f"  by {name}{' of new tokens' if unique else ''}: parameters {by['parameters']:.3g}, tokens {by['tokens']:.3g}"
        for name, by in result["approaches"].items()
        if name != "parametric"
    ]
    lines += _advised(fit, advice) + _extrapolated(outside)
    return result | unique | {"outside": outside, "recipe": advice}, lines


def _run(fit: Fit, cfg: PredictConfig) -> tuple[dict[str, Any], list[str]]:
    flops = fit.flops_per * cfg.parameters * cfg.tokens
    unique = _unique(cfg)
    outside = fit.check(cfg.extrapolate, flops=flops, parameters=cfg.parameters, tokens=cfg.tokens, **unique)
    loss, loss_interval = fit.loss_of_run(cfg.parameters, cfg.tokens, *unique.values())
    best = float(np.squeeze(fit.law.loss(*fit.optimal(flops, *unique.values()), *unique.values())))
    advice = batch_rule(cfg.recipe, cfg.parameters, cfg.tokens)
    lines = [
        f"{cfg.parameters:.4g} parameters on {cfg.tokens:.4g} tokens{_epochs(cfg, cfg.tokens)}, {flops:.4g} FLOPs "
        f"({fit.source})",
        f"  loss {_value(loss, loss_interval, '.4f')} nats a token, of one run, {fit.level:.0%} interval",
        f"  the best use of these FLOPs would reach {best:.4f}, {100 * (1 - best / loss):.2f} % less",
    ]
    lines += _advised(fit, advice) + _extrapolated(outside)
    result = {"parameters": cfg.parameters, "tokens": cfg.tokens, "flops": flops, "loss": loss,
            "loss_interval": loss_interval, "best_loss": best, "outside": outside, "recipe": advice}  # fmt: skip
    return result | unique, lines


def _unique(cfg: PredictConfig) -> dict[str, float]:
    """The law's argument of unique tokens; empty without --unique-tokens."""
    return {"unique_tokens": cfg.unique_tokens} if cfg.unique_tokens else {}


def _epochs(cfg: PredictConfig, tokens: float) -> str:
    unique = cfg.unique_tokens
    return f", {max(tokens / unique, 1):.3g} epochs of {min(unique, tokens):.4g} unique ones" if unique else ""


def _advised(fit: Fit, advice: dict[str, Any]) -> list[str]:
    return [
        f"  batch {advice['batch_tokens']:.3g} tokens, peak learning rate {advice['learning_rate']:.2g}, "
        f"with N the {fit.document['settings']['count']} parameters",
        f"    by {advice['source']}; measured on {advice['measured']}",
    ]


def _against(fit: Fit, cfg: PredictConfig) -> tuple[dict[str, Any], list[str]]:
    settings = fit.document["settings"]
    how = {"columns": cfg.columns, "where": cfg.where, "count": settings["count"], "flops_per": settings["flops_per"]}
    table = read_table([cfg.against], inputs=list(fit.fitted.inputs), planned=True, **how)
    outside: list[str] = []
    for what in fit.document["range"]:
        values = getattr(table, what)
        for edge in (values.min(), values.max()):
            outside += fit.check(cfg.extrapolate, **{what: float(edge)})
    rows = compare_with_table(fit, table)
    outside = list(dict.fromkeys(outside))
    planned = bool(np.isnan(table.loss).all())
    result: dict[str, Any] = {"planned" if planned else "against": {"source": table.source, "sha256": table.sha256}}
    result |= {"rows": rows, "outside": outside}
    if not planned:
        for name in ("unseen", "fitted"):
            result[name] = summary([row for row in rows if row["fitted"] == (name == "fitted")])
    return result, _compared(fit, table, rows, result) + _extrapolated(tuple(outside))


def compare_with_table(fit: Fit, table: Table) -> list[dict[str, Any]]:
    """Each row of a table with its prediction, and its error relative to the observed loss, if there is one.

    `fitted` is True where a row of this size, tokens and loss was among the fitted points.
    """
    predicted, low, high = fit.loss(*table.inputs(fit.fitted.inputs))
    line = fit.baseline
    known = {tuple(p) for p in zip(*(fit.points[k] for k in ("parameters", "tokens", "loss")))}
    rows = []
    for i, (n, d, c, loss) in enumerate(zip(table.parameters, table.tokens, table.flops, table.loss)):
        row = {"name": table.names[i], "parameters": n, "tokens": d, "flops": c, "budget": table.budget[i]}
        row["predicted"] = predicted[i]
        if low is not None and high is not None:
            row["interval"] = [low[i], high[i]]
        if line is not None:
            row["two_point"] = float(line.loss(c))
        if np.isfinite(loss):
            row |= {"loss": loss, "error": predicted[i] / loss - 1, "fitted": (n, d, loss) in known}
            if "interval" in row:
                row["within"] = bool(row["interval"][0] <= loss <= row["interval"][1])
            if "two_point" in row:
                row["two_point_error"] = row["two_point"] / loss - 1
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean and largest absolute error of the law over the rows, and the number of rows in their intervals.

    The two-point line is one of best runs, so it is compared on these: `best` has the mean errors of both over the best
    run of each budget, with the mean loss of its seeds (a row without a budget is a budget of its own).
    """
    if not rows:
        return {"rows": 0}
    errors = [abs(row["error"]) for row in rows]
    result: dict[str, Any] = {"rows": len(rows), "mean_error": np.mean(errors), "largest_error": np.max(errors)}
    within = [row["within"] for row in rows if "within" in row]
    if within:
        result["within"] = sum(within)
    if "two_point" not in rows[0]:
        return result
    keys = ("budget", "loss", "parameters", "tokens", "predicted")  # one prediction: as many unique tokens, too
    budget, loss, *inputs = (np.array([row[key] for row in rows]) for key in keys)
    budget = np.where(np.isfinite(budget), budget, -np.arange(1.0, len(rows) + 1))
    best = [best_run(budget == c, loss, *inputs) for c in np.unique(budget)]

    def mean_error(key: str) -> float:
        predicted = np.array([row[key] for row in rows])
        return float(np.mean([abs(predicted[of].mean() / loss[of].mean() - 1) for of in best]))

    result["best"] = {
        "rows": len(best), "mean_error": mean_error("predicted"), "mean_two_point_error": mean_error("two_point")
    }  # fmt: skip
    return result


def _compared(fit: Fit, table: Table, rows: list[dict[str, Any]], result: dict[str, Any]) -> list[str]:
    """The rows as a table, those that the fit has not seen first, and a summary; planned runs have no losses."""
    planned = "planned" in result
    about = (f"planned runs of {table.source} by {fit.source}: the table has no losses to compare" if planned else
             f"rows of {table.source} against {fit.source}; errors are (predicted - observed) / observed")  # fmt: skip
    lines = [f"{len(rows)} {about}",
             f"{'':28} {'N':>9} {'D':>9} {'FLOPs':>9} {'predicted':>9} {f'{fit.level:.0%} interval':>18}"
             + ("" if planned else f" {'loss':>8} {'error':>8}  {'two-point':>9}")]  # fmt: skip
    order = rows if planned else sorted(rows, key=lambda row: (row["fitted"], -row["flops"]))
    for row in order[:MOST_ROWS]:
        edges = row.get("interval")
        spread = f"{edges[0]:.4f}-{edges[1]:.4f}{' ' if row.get('within', True) else '!'}" if edges else "-"
        line = (f"{('* ' if row.get('fitted') else '  ') + row['name'][-26:]:28} {row['parameters']:9.3g} "
                f"{row['tokens']:9.3g} {row['flops']:9.3g} {row['predicted']:9.4f} {spread:>18}")  # fmt: skip
        if not planned:
            two_point = f"{100 * row['two_point_error']:+8.2f}%" if "two_point_error" in row else "-"
            line += f" {row['loss']:8.4f} {100 * row['error']:+7.2f}%  {two_point:>9}"
        lines.append(line)
    if len(rows) > MOST_ROWS:
        lines.append(f"... and {len(rows) - MOST_ROWS} more rows; --json FILE has all")
    if planned:
        return lines
    for name in ("unseen", "fitted"):
        s = result[name]
        if not s["rows"]:
            lines.append("no row is unseen: each was fitted" if name == "unseen" else "* fitted: none")
            continue
        parts = [f"mean |error| {100 * s['mean_error']:.2f} %, largest {100 * s['largest_error']:.2f} %"]
        if "within" in s:
            parts.append(f"{s['within']} within their {fit.level:.0%} intervals")
        if best := s.get("best"):
            parts.append(
                f"best of each of {best['rows']} budgets: law {100 * best['mean_error']:.2f} %, "
                f"two-point line {100 * best['mean_two_point_error']:.2f} %"
            )
        lines.append(f"{'unseen' if name == 'unseen' else '* fitted'}, {s['rows']} rows: {'; '.join(parts)}")
    if fit.baseline is None:
        lines.append(f"two-point line: {fit.document['baseline']['why']}")
    return lines


def _value(value: float, edges: list[float] | None, form: str = ".3g") -> str:
    return f"{value:{form}}" + (f" [{edges[0]:{form}}, {edges[1]:{form}}]" if edges else " (no interval)")


def _extrapolated(outside: tuple[str, ...]) -> list[str]:
    return [f"extrapolated: {words}" for words in outside] or ["within the fitted points"]
