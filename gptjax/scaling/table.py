"""Tables of finished runs: size, tokens, FLOPs and loss of each, from CSV, JSONL, a sweep's folder or run folders.

Columns are recognized by name, in the usual spellings (FIELDS), or named by the user. Missing columns are derived where
possible, with a note; any other error of a table is one line with file and line number.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.config.section import InputError
from gptjax.scaling.rows import RunRow, RunRows, read_rows

# The names of each field, our own first. Case, spaces and dashes do not matter.
FIELDS = {
    "parameters": ("parameters", "params", "n", "n_params", "num_params", "n_parameters", "num_parameters",
                   "parameters_total", "total_parameters", "total_params", "model_size"),
    "parameters_non_embedding": ("parameters_non_embedding", "params_non_embedding", "non_embedding_parameters",
                                 "non_embedding_params", "params_no_embed", "n_no_embed", "n_non_embedding"),
    "tokens": ("tokens", "d", "n_tokens", "num_tokens", "train_tokens", "training_tokens", "tokens_seen"),
    "unique_tokens": ("unique_tokens", "u", "unique", "n_unique_tokens", "num_unique_tokens", "dataset_tokens",
                      "data_tokens"),
    "flops": ("flops", "c", "compute", "train_flops", "training_flops", "total_flops"),
    "loss": ("loss", "val_loss", "eval_loss", "valid_loss", "validation_loss", "test_loss", "final_loss", "l"),
    "budget": ("budget", "flops_budget", "flop_budget", "compute_budget", "isoflop_budget"),
    "seed": ("seed", "random_seed"),
    "name": ("name", "run", "run_name", "run_id", "id"),
    "run_dir": ("run_dir",),
}  # fmt: skip
MOST = 1e100  # largest number of a table, so that products of several are finite and not 0
NUMBERS = ("parameters", "parameters_non_embedding", "tokens", "unique_tokens", "flops", "loss", "budget")
INPUTS = {"N": "parameters", "D": "tokens", "U": "unique_tokens"}  # a law's input: its field in a table
SAME_BUDGET = 0.02  # FLOPs that differ by less are one budget, where the table has no column of budgets
USUAL = (1.0, 100.0)  # FLOPs a parameter and token, in any convention of counting
CONDITION = re.compile(r"\s*([^<>=!]+?)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*")


class Curve(NamedTuple):
    """Losses along one run: tokens [T] trained and loss [T] there."""

    tokens_T: np.ndarray
    loss_T: np.ndarray


@dataclasses.dataclass(frozen=True)
class Table:
    """Finished runs, one an entry of each array [P]; `budget` is NaN where there is none.

    `unique_tokens` is at most `tokens`, and equal to it where the law has no input U.
    """

    source: str
    sha256: str
    names: tuple[str, ...]
    seeds: tuple[str, ...]
    parameters: np.ndarray
    tokens: np.ndarray
    unique_tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    budget: np.ndarray
    curves: tuple[Curve | None, ...]
    evaluated: bool
    """True where the curves are of evaluations, not of training losses."""
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def budgets(self) -> np.ndarray:
        """The different budgets in FLOPs, in ascending order; empty where the table has none."""
        return np.unique(self.budget[np.isfinite(self.budget)])

    def best(self, budget: float) -> np.ndarray:
        """The rows of this budget's best run: see `best_run`."""
        return best_run(self.budget == budget, self.loss, *self.inputs(INPUTS))

    @property
    def new(self) -> np.ndarray:
        """True for the points that see no token twice, [P]."""
        return self.unique_tokens >= self.tokens

    def inputs(self, names: Iterable[str]) -> list[np.ndarray]:
        """The columns of a law's inputs, each [P], by their letters."""
        return [getattr(self, INPUTS[name]) for name in names]

    def keep(self, mask_P: np.ndarray) -> "Table":
        """The table of the points where the mask is true."""
        kept = np.flatnonzero(mask_P)
        changed = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray):
                changed[f.name] = value[kept]
            elif f.name in ("names", "seeds", "curves"):
                changed[f.name] = tuple(value[i] for i in kept)
        return dataclasses.replace(self, **changed)

    def up_to(self, max_flops: float) -> "Table":
        """The points whose budget (FLOPs where they have none) is at most max_flops."""
        nominal = np.where(np.isfinite(self.budget), self.budget, self.flops)
        return self.keep(nominal <= max_flops * (1 + 1e-5))  # budgets have six digits


def best_run(among_P: np.ndarray, loss_P: np.ndarray, *inputs: np.ndarray) -> np.ndarray:
    """The rows, of those where `among` is true, of the run whose loss, averaged over its seeds, is the least.

    The seeds of one run are rows that agree in all inputs of a law, each [P].
    """
    rows = np.flatnonzero(among_P)
    _, run = np.unique(np.stack(inputs)[:, rows], axis=1, return_inverse=True)
    return min((rows[run.ravel() == i] for i in range(run.max() + 1)), key=lambda of: loss_P[of].mean())


def read_table(
    paths: Sequence[str | Path],
    *,
    columns: Iterable[str] = (),
    where: Iterable[str] = (),
    inputs: Sequence[str] = ("N", "D"),
    count: str = "total",
    flops_per: float = 6.0,
    planned: bool = False,
) -> Table:
    """Reads a table of runs: a CSV, a JSONL, the folder of a sweep, or the folders of runs.

    `columns` are FIELD=COLUMN, `where` are conditions such as dataset=rpj or tokens>=1e9, all of which a point meets.
    `inputs` are the law's: with U, a column of unique tokens is required.
    `count` is the parameter count to use, "total" or "non-embedding"; `planned` runs need no column of losses, which
    are then NaN. Where FLOPs are missing they are `flops_per` N D, where tokens are, FLOPs / (flops_per N).
    Raises InputError for any error of the table, with its file and line.
    """
    rows = read_rows(paths)
    mapping = _mapping(rows, columns)
    notes: list[str] = list(rows.notes)
    size = _size(mapping, count, rows.source, notes)
    repeats = "U" in inputs
    for name in (size, *(() if planned else ("loss",)), *(("unique_tokens",) if repeats else ())):
        if name not in mapping:
            raise _missing(name, rows)
    if "tokens" not in mapping and "flops" not in mapping:
        raise _missing("tokens", rows, " or flops")
    deferred = []  # conditions on derived fields
    kept = rows.rows
    for text in where:
        condition = _condition(text, mapping, rows)
        if condition.column:
            kept = [row for row in kept if condition.holds(row.cells.get(condition.column, ""), row.place)]
        else:
            deferred.append(condition)
    if not kept:
        raise InputError(f"{rows.source}: none of {len(rows.rows)} rows meets --where {' '.join(where)}; change it")
    got = {
        name: np.array([_number(row, column, name, required=name != "budget") for row in kept])
        for name, column in mapping.items()
        if name in NUMBERS and (name == size or not name.startswith("parameters"))
        if name != "unique_tokens" or repeats
    }
    parameters = got[size]
    if "tokens" not in got:
        got["tokens"] = got["flops"] / (flops_per * parameters)
        notes.append(f"no column of tokens: D = C / ({flops_per:g} N)")
    if "flops" not in got:
        got["flops"] = flops_per * parameters * got["tokens"]
        notes.append(f"no column of FLOPs: C = {flops_per:g} N D")
    else:
        ratio = got["flops"] / (parameters * got["tokens"])
        low, middle, high = (f"{edge:.3g}" for edge in (ratio.min(), np.median(ratio), ratio.max()))
        notes.append(f"FLOPs of the table: {middle} N D" + (f", from {low} to {high}" if low != high else ""))
        if not USUAL[0] <= np.median(ratio) <= USUAL[1]:
            notes.append("that is far from 6 N D: is a column in other units (millions, petaFLOPs)?")
    unique = np.minimum(got.get("unique_tokens", np.inf), got["tokens"])
    if repeats:
        notes.append(
            f"U: column {mapping['unique_tokens']}; {np.sum(unique < got['tokens'])} of {len(kept)} runs repeat their "
            f"tokens, for {np.max(got['tokens'] / unique):.3g} epochs at most"
        )
    if "budget" in got:  # computed values may differ in their last digits
        got["budget"] = np.array([float(f"{budget:.6g}") for budget in got["budget"]])
    if "budget" not in got:
        got["budget"] = _same_flops(got["flops"])
        if np.isfinite(got["budget"]).any():
            notes.append("no column of budgets: points whose FLOPs agree within 2 % are one")
    table = Table(
        source=rows.source,
        sha256=rows.sha256,
        names=_texts(kept, mapping.get("name"), lambda i: f"line {kept[i].place.rpartition(':')[2]}"),
        seeds=_texts(kept, mapping.get("seed"), lambda i: ""),
        parameters=parameters,
        tokens=got["tokens"],
        unique_tokens=unique,
        flops=got["flops"],
        loss=got.get("loss", np.full(len(kept), np.nan)),
        budget=got["budget"],
        curves=tuple(row.curve and Curve(*row.curve) for row in kept),
        evaluated=rows.evaluated,
        notes=(),
    )
    for condition in deferred:
        values = getattr(table, condition.field)
        table = table.keep(np.array([condition.holds(repr(float(v)), rows.source) for v in values], bool))
    if not len(table):
        raise InputError(f"{rows.source}: no row meets --where {' '.join(where)}; change it")
    again = len(table) - len(set(zip(table.seeds, *table.inputs(INPUTS), table.loss)))
    if again and "loss" in got:
        notes.append(f"{again} rows repeat another's size, tokens, loss and seed, and count again: remove copies")
    if len(table) < len(rows.rows):
        notes.append(f"--where left out {len(rows.rows) - len(table)} of {len(rows.rows)} rows")
    return dataclasses.replace(table, notes=tuple(notes))


def _spelled(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _mapping(rows: RunRows, columns: Iterable[str]) -> dict[str, str]:
    """The column of each field that the table has."""
    mapping: dict[str, str] = {}
    for text in columns:
        field, equals, column = text.partition("=")
        if not equals or field not in FIELDS:
            raise InputError(f"--columns {text}: wanted FIELD=COLUMN, with a FIELD of {', '.join(FIELDS)}")
        if field in mapping:
            raise InputError(f"--columns names {field} twice ({mapping[field]} and {column}); give it once")
        if column not in rows.header:
            raise InputError(f"--columns {text}: {rows.source} has no column {column!r}; it has {_listed(rows.header)}")
        mapping[field] = column
    for field, spellings in FIELDS.items():
        matches = [column for column in rows.header if _spelled(column) in spellings and field not in mapping]
        matches.sort(key=lambda column: spellings.index(_spelled(column)))
        if len(matches) > 1 and field in NUMBERS:
            raise InputError(
                f"{rows.source}: the columns {' and '.join(matches)} may each be the {field}; "
                f"choose one: --columns {field}={matches[0]}"
            )
        if matches:
            mapping[field] = matches[0]
    return mapping


def _size(mapping: Mapping[str, str], count: str, source: str, notes: list[str]) -> str:
    """The field of the requested parameter count; raises InputError where the table has only the other."""
    other = {"total": "parameters_non_embedding", "non-embedding": "parameters"}[count]
    wanted = {"total": "parameters", "non-embedding": "parameters_non_embedding"}[count]
    if wanted in mapping:
        notes.append(f"N: {count} parameters, column {mapping[wanted]}")
    elif other in mapping:
        available = {"total": "non-embedding", "non-embedding": "total"}[count]
        raise InputError(
            f"{source}: --count {count}, but the table has no column of {wanted}; it has {available} parameters: "
            f"give --count {available}, or name the column: --columns {wanted}=COLUMN"
        )
    return wanted


def _missing(field: str, rows: RunRows, more: str = "") -> InputError:
    names = ", ".join(FIELDS[field][:4])
    return InputError(
        f"{rows.source}: no column of {field}{more} among {_listed(rows.header)}; wanted {names}, ..., "
        f"or name it: --columns {field}=COLUMN"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f", ... ({len(names)})" if len(names) > 12 else "")


def _number(row: RunRow, column: str, field: str, required: bool) -> float:
    """The number in a cell, from 1 / MOST to MOST; NaN for an empty cell that is not required."""
    text = row.cells.get(column, "")
    if not text.strip() and not required:
        return np.nan
    called = field if column == field else f"{field} (column {column})"
    then = "repair the row, or leave it out with --where"
    if not text.strip():
        raise InputError(f"{row.place}: {called} is empty; wanted a number above 0; {then}")
    try:
        value = float(text)
    except ValueError:
        value = None
    if value is None or not 1 / MOST <= value <= MOST:
        wanted = f"wanted a number above 0, from {1 / MOST:g} to {MOST:g}"
        raise InputError(f"{row.place}: {called} is {text.strip()!r}; {wanted}; {then}")
    return value


def _texts(rows: Sequence[RunRow], column: str | None, other: Callable[[int], str]) -> tuple[str, ...]:
    return tuple((row.cells.get(column, "") if column else "") or other(i) for i, row in enumerate(rows))


def _same_flops(flops_P: np.ndarray) -> np.ndarray:
    """The mean FLOPs of each group of three or more points whose FLOPs agree; NaN for the others.

    A group ends where the next FLOPs are SAME_BUDGET more. A group wider than twice that is no budget: such a table has
    runs at all FLOPs.
    """
    budget_P = np.full(len(flops_P), np.nan)
    order = np.argsort(flops_P)
    gaps = np.flatnonzero(np.diff(np.log(flops_P[order])) > SAME_BUDGET) + 1
    for group in np.split(order, gaps):
        if len(group) >= 3 and np.ptp(np.log(flops_P[group])) <= 2 * SAME_BUDGET:
            budget_P[group] = np.exp(np.log(flops_P[group]).mean())
    return budget_P


class _Condition(NamedTuple):
    """One --where: `column` is the table's, or "" where the field is derived."""

    text: str
    field: str
    column: str
    sign: str
    value: str

    def holds(self, cell: str, place: str) -> bool:
        if self.sign in ("=", "==", "!="):
            same = any(_same(cell.strip(), value) for value in (self.value, *self.value.split(",")))
            return same != (self.sign == "!=")
        a, b = _maybe(cell), _maybe(self.value)
        if a is None or b is None:
            got = repr(cell.strip())
            raise InputError(f"{place}: --where {self.text} compares {got}, which is not a number; use = or !=")
        return {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[self.sign]


def _same(cell: str, value: str) -> bool:
    a, b = _maybe(cell), _maybe(value)
    return cell == value.strip() or (a is not None and a == b)  # as text too: nan is not equal to itself


def _maybe(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _condition(text: str, mapping: Mapping[str, str], rows: RunRows) -> _Condition:
    match = CONDITION.fullmatch(text)
    if match is None:
        raise InputError(f"--where {text}: wanted COLUMN=VALUE (or VALUE,VALUE), or !=, <, <=, > or >= in its place")
    name, sign, value = match.groups()
    if sign in ("<", "<=", ">", ">=") and _maybe(value) is None:
        raise InputError(f"--where {text}: {value!r} is not a number; wanted one after {sign}")
    column = name if name in rows.header else mapping.get(name, "")
    if not column and name not in ("tokens", "flops", "budget"):
        raise InputError(f"--where {text}: {rows.source} has no column {name!r}; it has {_listed(rows.header)}")
    return _Condition(text, name, column, sign, value)
