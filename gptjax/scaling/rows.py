"""Rows of a table as text, with their locations: from CSV, JSONL, the folder of a sweep, or folders of runs."""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.section import InputError
from gptjax.model.counts import parameters, token_flops
from gptjax.runs.run import load_config
from gptjax.storage import filesystem, resolve_path

SWEEP_TABLE = "table.csv"
WINDOWS = 48  # points of a curve of training losses
ENOUGH = 5  # evaluations of a curve
WANTED = "wanted a .csv or .jsonl file, the folder of a sweep, or the folders of runs"


class RunRow(NamedTuple):
    """One row: its cells as text by column, its file and line, and the (tokens, losses) along the run."""

    cells: dict[str, str]
    place: str
    curve: tuple[np.ndarray, np.ndarray] | None = None


class RunRows(NamedTuple):
    """All rows of a table, and the sha256 of its source."""

    source: str
    sha256: str
    header: tuple[str, ...]
    rows: list[RunRow]
    notes: tuple[str, ...]
    evaluated: bool = False
    """True where the curves are of evaluations, not of training losses."""


def read_rows(paths: Sequence[str | Path]) -> RunRows:
    """Reads a file, the table in a sweep's folder, or the folders of runs; raises InputError for anything else."""
    if not paths:
        raise InputError(f"no table is given; {WANTED}")
    if len(paths) == 1 and not _is_run(resolve_path(paths[0])):
        path = resolve_path(paths[0])
        if filesystem(path).is_folder(path):
            if not filesystem(path).is_file(path / SWEEP_TABLE):
                raise InputError(f"{path}: a folder with neither {SWEEP_TABLE} nor config.json; {WANTED}")
            path = path / SWEEP_TABLE
        rows = _read_file(path)
        return _with_curves(_without_diverged(rows), path.parent) if "run_dir" in rows.header else rows
    for path in map(resolve_path, paths):
        if not _is_run(path):
            raise InputError(f"{path}: not the folder of a run, and several tables can't be read at once; {WANTED}")
    runs, unfinished = [], []
    for path in map(resolve_path, paths):
        row, curves, steps = _of_run(path)
        runs.append((row, curves))
        if curves.step < steps:
            unfinished.append(f"{path.name} at step {curves.step} of {steps}")
    rows, *notes, evaluated = _same_curves(runs)
    if unfinished:
        notes.append(f"{len(unfinished)} runs have not ended, so their losses lie high: {', '.join(unfinished)}")
    text = json.dumps([row.cells for row in rows], sort_keys=True)
    source = str(paths[0]) if len(paths) == 1 else f"{len(paths)} runs ({paths[0]}, ...)"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return RunRows(source, digest, tuple(rows[0].cells), rows, tuple(notes), evaluated)


def _is_run(path: Path) -> bool:
    return filesystem(path).is_file(path / "config.json")


def _read_file(path: Path) -> RunRows:
    if not filesystem(path).is_file(path):
        raise InputError(f"{path}: no such file or folder; {WANTED}")
    raw = _bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not a text in UTF-8 (byte {e.start}); {WANTED}") from e
    if not text.strip():
        raise InputError(f"{path}: the file is empty; wanted a header and a row for each run")
    jsonl = path.suffix.lower() in (".jsonl", ".ndjson")
    header, rows = _jsonl(text, str(path)) if jsonl else _csv(text, str(path))
    if not rows:
        raise InputError(f"{path}: a header and no rows; wanted a row for each run")
    return RunRows(str(path), hashlib.sha256(raw).hexdigest(), header, rows, ())


def _csv(text: str, source: str) -> tuple[tuple[str, ...], list[RunRow]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    except csv.Error as e:
        raise InputError(f"{source}:{reader.line_num}: not CSV ({e}); repair the line") from e
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if not lines:
        raise InputError(f"{source}: every cell is empty; wanted a header and a row for each run")
    (number, header), *lines = lines
    _once(header, f"{source}:{number}")
    rows = []
    for number, cells in lines:
        if len(cells) != len(header):
            raise InputError(
                f"{source}:{number}: {len(cells)} cells in the row, {len(header)} columns in the header; "
                "repair the row (a text with commas needs quotes)"
            )
        rows.append(RunRow(dict(zip(header, cells, strict=True)), f"{source}:{number}"))
    return tuple(header), rows


def _once(names: Sequence[str], where: str) -> None:
    """Raises InputError for a column name that occurs twice."""
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        what = f"the column {name!r} is" if name else "columns without a name are"
        raise InputError(f"{where}: {what} there {times} times; wanted each name once, rename or remove the others")


def _jsonl(text: str, source: str) -> tuple[tuple[str, ...], list[RunRow]]:
    rows, header = [], {}
    for where, line in _objects(text, source):
        cells = {}
        for name, value in line.items():
            if isinstance(value, dict | list | bool):
                raise InputError(f"{where}: {name} is {json.dumps(value)[:40]}; wanted a number or a text")
            cells[name] = "" if value is None else str(value)
        header |= dict.fromkeys(cells)
        rows.append(RunRow(cells, where))
    return tuple(header), rows


def _objects(text: str, source: str, torn: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of JSON; with `torn` the last may be half a line."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if pairs:
            _once([name for name, _ in pairs], where)
        return dict(pairs)

    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        where = f"{source}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=once)
        except InputError:
            raise
        except (ValueError, RecursionError) as e:
            if torn and number == len(lines):
                return
            raise InputError(f"{where}: not JSON ({e}); wanted one object a line, repair or remove it") from e
        if not isinstance(value, dict):
            raise InputError(f"{where}: {type(value).__name__}, not an object; wanted {{name: value, ...}} a line")
        yield where, value


def _bytes(path: Path) -> bytes:
    try:
        return filesystem(path).read(path)
    except OSError as e:
        raise InputError(f"{path}: can't be read ({e.strerror})") from e


class _Curves(NamedTuple):
    """Losses along a run: of evaluations, and of training averaged over windows of tokens.

    step: the step of the last evaluation, 0 for none; diverged: its loss is not finite.
    """

    evaluation: tuple[np.ndarray, np.ndarray]
    training: tuple[np.ndarray, np.ndarray]
    step: int
    diverged: bool


def _of_run(folder: Path) -> tuple[RunRow, _Curves, int]:
    """The row of a run's folder (loss of its last evaluation, tokens until then), its curves, and its steps."""
    config = load_config(folder)
    count = parameters(config.model, config.tokenizer.vocab_size, config.data.length)
    curves = _curves(folder)
    tokens, losses = curves.evaluation
    if curves.diverged:
        raise InputError(
            f"{folder}/metrics.jsonl: the last evaluation, at step {curves.step}, is not a finite number above 0; "
            "wanted a run that did not diverge: leave it out"
        )
    if not len(losses):
        raise InputError(f"{folder}/metrics.jsonl: no evaluation; wanted a run with evaluate.every above 0")
    cells = {
        "name": folder.name,
        "parameters": str(count["total"]),
        "parameters_non_embedding": str(count["non_embedding"]),
        "tokens": str(tokens[-1]),
        "flops": str(float(tokens[-1] * token_flops(config))),
        "loss": str(float(losses[-1])),
    }
    return RunRow(cells, str(folder)), curves, config.steps


def _curves(folder: Path) -> _Curves:
    """Reads the losses along a run from its metrics."""
    path = folder / "metrics.jsonl"
    if not filesystem(path).is_file(path):
        raise InputError(f"{path}: no such file; wanted a run that was trained")
    tokens_at: dict[int, float] = {}
    evaluated: dict[int, float] = {}
    trained: dict[int, tuple[float, float]] = {}  # by step, since a resumed run has some steps twice
    for where, line in _objects(_bytes(path).decode("utf-8", "replace"), str(path), torn=True):
        if type(line.get("step")) is not int:
            raise InputError(f"{where}: no step; wanted a metrics.jsonl that gptjax wrote")
        if _is_number(line.get("tokens")):
            tokens_at[line["step"]] = line["tokens"]
            if _is_number(line.get("loss")):
                trained[line["step"]] = line["tokens"], line["loss"]
        if "eval_loss" in line:
            evaluated[line["step"]] = line["eval_loss"] if _is_number(line["eval_loss"]) else np.nan
    last = max(evaluated, default=0)
    steps = sorted(step for step in evaluated.keys() & tokens_at.keys() if evaluated[step] > 0)
    evaluation = np.array([tokens_at[s] for s in steps]), np.array([evaluated[s] for s in steps])
    training = _windows(np.array([trained[s] for s in sorted(trained)], float).reshape(-1, 2))
    return _Curves(evaluation, training, last, bool(evaluated) and not evaluated[last] > 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def _windows(points_T2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of the training loss over windows that grow with tokens, so that noise falls as the curve flattens."""
    if len(points_T2) < 2 * ENOUGH:
        return np.array([]), np.array([])
    edges = np.unique(np.geomspace(1, len(points_T2), WINDOWS + 1).astype(int))
    tokens, loss = points_T2.T
    parts = [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return np.array([tokens[p].mean() for p in parts]), np.array([loss[p].mean() for p in parts])


def _same_curves(runs: Sequence[tuple[RunRow, _Curves]]) -> tuple[list[RunRow], str, bool]:
    """The rows with curves, all of evaluations or all of training losses; a note of the kind; True for the former."""
    if all(len(curves.evaluation[0]) >= ENOUGH for _, curves in runs):
        return [row._replace(curve=curves.evaluation) for row, curves in runs], "curves: losses of evaluations", True
    rows = [row._replace(curve=curves.training if len(curves.training[0]) else None) for row, curves in runs]
    why = f"some runs have fewer than {ENOUGH} evaluations"
    return rows, f"curves: training losses averaged over {WINDOWS} windows of each run, for {why}", False


def _without_diverged(rows: RunRows) -> RunRows:
    """Leaves out the diverged runs of a sweep, whose loss is inf; a note names them."""
    diverged = [row for row in rows.rows if row.cells.get("loss") == "inf"]
    if not diverged:
        return rows
    kept = [row for row in rows.rows if row not in diverged]
    if not kept:
        raise InputError(f"{rows.source}: every run diverged; wanted at least one that did not")
    names = ", ".join(row.cells["run_dir"] for row in diverged)
    return rows._replace(rows=kept, notes=(*rows.notes, f"left out, for they diverged: {names}"))


def _with_curves(rows: RunRows, folder: Path) -> RunRows:
    """The rows of a sweep with the curves of the runs that still exist; a note gives their number."""
    runs, without = [], []
    for row in rows.rows:
        name = row.cells["run_dir"]
        places = (folder / name, resolve_path(name)) if name else ()
        folders = [path for path in places if filesystem(path).is_file(path / "metrics.jsonl")]
        if folders:
            runs.append((row, _curves(folders[0])))
        else:
            without.append(row)
    if not runs:
        return rows._replace(notes=(*rows.notes, "curves: none, for no run_dir of the table is there"))
    with_curves, note, evaluated = _same_curves(runs)
    by_place = {row.place: row for row in [*with_curves, *without]}
    missing = [f"curves: {len(without)} of {len(rows.rows)} run_dirs are not there"] if without else []
    ordered = [by_place[row.place] for row in rows.rows]
    return rows._replace(rows=ordered, notes=(*rows.notes, note, *missing), evaluated=evaluated)
