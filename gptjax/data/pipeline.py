"""The data of a run: batches that continue exactly from a saved state, and the validation sets."""

import dataclasses
from pathlib import Path

from gptjax.config import DpoConfig, PolicyConfig, RewardConfig, SftConfig, TrainConfig
from gptjax.data.batches import DataState
from gptjax.data.chats import ChatData
from gptjax.data.pairs import PreferenceData
from gptjax.data.prepared import PreparedData, Say, open_corpora
from gptjax.data.prompts import PromptData
from gptjax.data.streamed import StreamedData
from gptjax.data.validation import ValidationSet

__all__ = ["DataPipeline", "DataState", "ValidationSet", "open_pipeline"]

DataPipeline = PreparedData | StreamedData | ChatData | PreferenceData | PromptData
"""All have the same methods: tokenizer, validation, start, check(state), batches(state, part), batch(row, part),
sources(row) and describe(). `part` are the indices of the rows that this host must give, all where they are left out.
The state after each batch is JSON, to be saved with what was trained on it."""


def open_pipeline(
    config: TrainConfig,
    folder: Path,
    *,
    training: bool = False,
    resumes: bool = False,
    say: Say = lambda line: None,
) -> DataPipeline:
    """The data of a run: corpora, text that is prepared into `folder`, a stream of text, conversations, preferences or
    prompts.

    Only for training is text prepared, and code imported that the settings name; else both must be there. `say` gets
    lines that report progress. A run that `resumes` goes on with its own tokenizer and tokens, beside and in `folder`,
    where those that its settings name are not here. Raises InputError where the data is not there or is not of this
    run's settings, for training also that of a validation set.
    """
    path = config.tokenizer.path
    if resumes and path and not Path(path).exists():
        own = folder.with_name("tokenizer")
        say(f"tokenizer.path {path} is not here; going on with the run's own tokenizer in {own}")
        config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path=str(own)))
    if isinstance(config, SftConfig):
        return ChatData(config, folder, training)
    if isinstance(config, RewardConfig):
        return PreferenceData(config, folder, training, trees=True)
    if isinstance(config, DpoConfig):
        return PreferenceData(config, folder, training, trees=False)
    if isinstance(config, PolicyConfig):
        return PromptData(config, folder, training)
    if config.data.loading == "stream":
        pipeline = StreamedData(config, training, say)
    else:
        pipeline = PreparedData(open_corpora(config, folder, training, resumes, say), config, training, say)
    if training:
        _ = pipeline.validation  # an error of a validation set is raised now, not at the first evaluation
    return pipeline
