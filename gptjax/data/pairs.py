"""Preferences as the data of a run: rendered by the tokenizer's template, a share of the prompts held out."""

from pathlib import Path

import numpy as np

from gptjax.config import TuneConfig
from gptjax.config.section import InputError
from gptjax.data.dialogue import messages_of, tools_of
from gptjax.data.formats import read_records
from gptjax.data.preferences import (
    AnswerTrees,
    PreferenceRows,
    PromptRows,
    RankedAnswers,
    preference_of,
    render_answers,
    shares_prompts,
    written,
)
from gptjax.data.rendered import RecordData, chat_tokenizer, held_out, question_hash, record_files
from gptjax.tokenizer.known_templates import template_of


class PreferenceData(RecordData):
    """The preferences of a source, to train on and held out, with the methods of a pipeline's data.

    A batch holds data.batch_size prompts: with `trees` as `AnswerTrees`, else as `PreferenceRows`. A prompt is held out
    with its answers by a hash of its first message of a user, as conversations are, so that neither the order of the
    file nor a conversation's later turns matter. `folder` is the run's; its tokenizer lies beside it once it was begun.
    Raises InputError for records of another form, and where there is nothing to learn or to hold out.
    """

    def __init__(self, config: TuneConfig, folder: Path, training: bool, trees: bool):
        super().__init__(config, chat_tokenizer(config, folder.with_name("tokenizer")), training)
        template, source, length = template_of(self.tokenizer), config.data.source, config.data.length
        prompts, questions = [], []
        for path in record_files(source, "preferences"):
            for origin, record in read_records(path):
                preference = preference_of(record, origin)
                try:
                    answers = render_answers(template, self.tokenizer, preference)
                except InputError as e:
                    raise InputError(f"{origin}: {e}") from e
                prompts.append(RankedAnswers(answers, preference.ranks))
                questions.append(question_hash(preference.prompt))

        def lay_out(some: list[RankedAnswers]) -> PromptRows:
            if not trees:
                return PreferenceRows(some, length, config.seed)
            return AnswerTrees(some, length, config.seed, shares_prompts(config.model, length))

        every = lay_out(prompts)
        usable = np.array([every.fits(prompt) for prompt in prompts])
        held = held_out(np.array(questions), usable, config.data.validation_fraction, source, "preferences")
        self.train, self.held = (lay_out([p for p, h in zip(prompts, held) if h == side]) for side in (False, True))
        self.begin(
            np.array([rank, len(ids), *ids, *weights], np.int32).tobytes()
            for prompt in prompts
            for (ids, weights), rank in zip(prompt.answers, prompt.ranks)
        )

    def demonstrations(self, source: str, most: int) -> list[np.ndarray]:
        """The ids of so many answers, with their prompts, to be scored 0 on average: the first that fit.

        They come from conversations or, without a source, are the best answers that are trained on.
        """
        if not source:
            assert isinstance(self.train, AnswerTrees)
            return self.train.best(most)[:most]
        template, found = template_of(self.tokenizer), []
        for path in record_files(source, "conversations"):
            for origin, record in read_records(path):
                try:
                    messages, tools = messages_of(record, origin), tools_of(record, origin)
                    rendered = template.render(self.tokenizer, messages, tools=tools)
                except InputError as e:
                    raise InputError(f"{origin}: {e}") from e
                ids = written(rendered)
                if any(rendered[1]) and len(ids) <= self.config.data.length:
                    found.append(ids)
                if len(found) == most:
                    return found
        if not found:
            raise InputError(f"demonstrations={source!r}: no answer fits into data.length={self.config.data.length}")
        return found

    def describe(self) -> str:
        """The numbers of prompts, of those that were left out and of tokens, in a line."""
        long, train = self.train.too_long + self.held.too_long, self.train.num_rows
        left = f"; left out: {long:,} that do not fit into {self.config.data.length:,} tokens" if long else ""
        saved = ""
        if isinstance(self.train, AnswerTrees):
            shared, alone = np.sum([self.train.size(prompt) for prompt in self.train.prompts], axis=0).tolist()
            saved = f"; {shared:,} tokens an epoch" + (
                f", {alone:,} were prompts not shared" if shared < alone else ", prompts not shared"
            )
        return (
            f"{train:,} prompts with answers to train on, {self.held.num_rows:,} held out{left}{saved}; {self.passes}"
        )
