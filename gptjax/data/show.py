"""Batches as text that a person can check."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from gptjax.data.packing import Batch, batch_hash
from gptjax.tokenizer import Tokenizer


def show(batch: Batch, tokenizer: Tokenizer, rows: Iterable[int] = (0,), sources: Sequence[str] = ()) -> str:
    """The chosen rows of a batch: each segment's columns, its text with special tokens spelled out, and its targets.

    Newlines are shown as a new line behind a bar, so that nothing of the text is changed or left out. `sources` names
    the source of each row of the batch; an empty name is left out. Of prompts with answers `rows` are the prompts. Of
    images the tokens are counted.
    """
    if "inputs_BSL" in batch:  # answers to prompts, each a row of its own
        answers = {n.replace("SL", "L"): x.reshape(-1, x.shape[-1]) for n, x in batch.items() if n.endswith("BSL")}
        per_prompt = len(answers["inputs_BL"]) // len(batch["inputs_BSL"])
        rows = [row * per_prompt + answer for row in rows for answer in range(per_prompt)]
        return show(answers, tokenizer, rows)
    num_rows, length = batch["inputs_BL"].shape
    batch = {"weights_BL": np.zeros((num_rows, length), np.float32)} | batch  # of answers to score nothing is predicted
    weighted = int(np.count_nonzero(batch["weights_BL"]))
    lines = [f"batch of {num_rows} rows of {length}: {weighted} weighted targets, sha256 {batch_hash(batch)}"]
    for row in rows:
        name = f"{row} of {sources[row]}" if sources and sources[row] else f"{row}"
        lines.extend(_row(name, {name: value[row] for name, value in batch.items()}, tokenizer))
    return "\n".join(lines)


def _row(name: str, row: dict[str, np.ndarray], tokenizer: Tokenizer) -> list[str]:
    segments_L, weights_L = row["segments_BL"], row["weights_BL"]
    weighted = int(np.count_nonzero(weights_L))
    edges = [0, *(np.flatnonzero(np.diff(segments_L)) + 1).tolist(), len(segments_L)]
    lines = [f"row {name}: {int(segments_L.max())} segments, {weighted} weighted targets"]
    for start, stop in zip(edges[:-1], edges[1:]):
        columns = f"  [{start}:{stop}]"
        if segments_L[start] == 0:
            lines.append(f"{columns} padding")
            continue
        first, last = int(row["positions_BL"][start]), int(row["positions_BL"][stop - 1])
        used = int(np.count_nonzero(weights_L[start:stop]))
        lines.append(f"{columns} segment {segments_L[start]}, positions {first} to {last}, {used} weighted targets")
        is_image = row["index_BL"] >= 0 if "index_BL" in row else np.zeros(len(segments_L), bool)
        text = _spelled(np.where(is_image, -1, row["inputs_BL"])[start:stop].tolist(), tokenizer)
        lines.extend(f"    | {line}" for line in text.split("\n"))
        if weights_L[stop - 1]:
            final = _spelled(row["targets_BL"][stop - 1 : stop].tolist(), tokenizer)
            lines.append(f"    last target: {final!r}")
    return lines


def _spelled(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text with the beginning and end of documents made visible, and the tokens of images (-1)."""
    special = {tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>", -1: ""}
    parts = []
    for kind, run in itertools.groupby(ids, lambda token: special.get(token)):
        tokens = list(run)
        if kind is None:
            parts.append(tokenizer.decode(tokens))
        else:
            parts.append(kind * len(tokens) or f"<{len(tokens)} image tokens>")
    return "".join(parts)
