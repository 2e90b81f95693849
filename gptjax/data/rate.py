"""The speed at which batches are made, with no model behind them."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.config import DataConfig
from gptjax.data.batches import batches
from gptjax.data.corpus import open_corpus
from gptjax.data.mixture import Mixture

WARM = 20  # batches before the clock starts


def rows_rate(folder: Path, data: DataConfig, seconds: float) -> float:
    """Predictions a second of the batches of a prepared corpus, in training's order, by the thread that makes them."""
    split = open_corpus(folder).split("train")
    split.tokens(0, split.num_tokens)  # its pages are read before, where they fit the cache
    with contextlib.closing(batches(Mixture({"": split}, data, 0), 0)) as rows:
        return rate(rows, data, seconds)


def rate(batches: Iterator[Any], data: DataConfig, seconds: float) -> float:
    """Predictions (rows x length) a second of an iterator of batches, over so many seconds."""
    for _ in range(WARM):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return count * data.batch_size * data.length / (time.perf_counter() - start)
