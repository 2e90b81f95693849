"""What a run trains and evaluates on: batches that can go on exactly where they were, and the validation sets."""

from collections.abc import Callable
from pathlib import Path

from gptjax.config import TrainConfig
from gptjax.data.batches import DataState
from gptjax.data.prepared import PreparedData, open_corpora
from gptjax.data.streamed import StreamedData
from gptjax.data.validation import ValidationSet

__all__ = ["DataPipeline", "DataState", "ValidationSet", "open_pipeline"]

DataPipeline = PreparedData | StreamedData
"""Both have the same methods: tokenizer, validation, start, check(state), batches(state, rows), batch(step, rows),
sources(step), passes(state) and describe(). `rows` are the numbers of those that this host must give, all where they
are left out. The state after each batch is JSON, to be saved with what was trained on it."""


def open_pipeline(config: TrainConfig, folder: Path, say: Callable[[str], None] | None = None) -> DataPipeline:
    """The data of a run: prepared corpora, text that is prepared into `folder`, or a stream of text.

    Training gives `say`, for lines that tell what is done; without it nothing is prepared, only opened. Raises
    InputError where the data is not there or is not of this run's settings, also for a validation set.
    """
    if config.data.loading == "stream":
        feed = StreamedData(config, say)
    else:
        feed = PreparedData(open_corpora(config, folder, say), config, say)
    if say is not None:
        _ = feed.validation  # what is wrong with a validation set is told now, not at the first evaluation
    return feed
