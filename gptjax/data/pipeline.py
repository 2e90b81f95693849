"""The data of a run: batches that continue exactly from a saved state, and the validation sets."""

from pathlib import Path

from gptjax.config import TrainConfig
from gptjax.data.batches import DataState
from gptjax.data.prepared import PreparedData, Say, open_corpora
from gptjax.data.streamed import StreamedData
from gptjax.data.validation import ValidationSet

__all__ = ["DataPipeline", "DataState", "ValidationSet", "open_pipeline"]

DataPipeline = PreparedData | StreamedData
"""Both have the same methods: tokenizer, validation, start, check(state), batches(state, part), batch(step, part),
sources(step) and describe(). `part` are the indices of the rows that this host must give, all where they are left out.
The state after each batch is JSON, to be saved with what was trained on it."""


def open_pipeline(
    config: TrainConfig, folder: Path, *, training: bool = False, say: Say = lambda line: None
) -> DataPipeline:
    """The data of a run: prepared corpora, text that is prepared into `folder`, or a stream of text.

    Only for training is text prepared, and code imported that the settings name; else both must be there. `say` gets
    lines that report progress. Raises InputError where the data is not there or is not of this run's settings, for
    training also that of a validation set.
    """
    if config.data.loading == "stream":
        pipeline = StreamedData(config, training, say)
    else:
        pipeline = PreparedData(open_corpora(config, folder, training, say), config, training, say)
    if training:
        _ = pipeline.validation  # an error of a validation set is raised now, not at the first evaluation
    return pipeline
