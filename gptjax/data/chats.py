"""Conversations as the data of a run: rendered by the tokenizer's template, a share of them held out, packed whole."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gptjax.config import SftConfig
from gptjax.config.section import InputError
from gptjax.data.batches import ALL_ROWS, RowSlice
from gptjax.data.dialogue import ConversationRows, Rendered, fits, is_answered, messages_of, tools_of
from gptjax.data.formats import read_records
from gptjax.data.packing import Batch
from gptjax.data.rendered import RecordData, chat_tokenizer, held_out, question_hash, record_files
from gptjax.tokenizer import Tokenizer
from gptjax.tokenizer.known_templates import template_of


class ChatData(RecordData):
    """The conversations of a source, to train on and held out, with the methods of a pipeline's data.

    A conversation is held out by a hash of its first message of a user, so that equal questions stay together and the
    order of the file does not matter. `folder` is the run's; its tokenizer lies beside it once it was begun. Raises
    InputError for records of another form, and where there is nothing to learn or to hold out.
    """

    def __init__(self, config: SftConfig, folder: Path, training: bool):
        super().__init__(config, chat_tokenizer(config, folder.with_name("tokenizer")), training)
        template = template_of(self.tokenizer)
        rendered, questions = [], []
        for path in record_files(config.data.source, "conversations"):
            for origin, record in read_records(path):
                messages = messages_of(record, origin)
                try:
                    rendered.append(template.render(self.tokenizer, messages, tools=tools_of(record, origin)))
                except InputError as e:
                    raise InputError(f"{origin}: {e}") from e
                questions.append(question_hash(messages))
        length = config.data.length
        usable = [fits(pair, length) and is_answered(pair) for pair in rendered]
        held = held_out(np.array(questions), np.array(usable), config.data.validation_fraction, config.data.source)
        self.train = ConversationRows([p for p, h in zip(rendered, held) if not h], length, config.seed)
        self.held = HeldOut(config, [p for p, h in zip(rendered, held) if h], self.tokenizer)
        self._counts = sum(usable) - int(held[usable].sum()), int(held[usable].sum())
        self.validation = [self.held]
        self.begin(np.array([len(ids), *ids, *weights], np.int32).tobytes() for ids, weights in rendered)

    def describe(self) -> str:
        """The numbers of conversations and rows, and of those that were left out, in a line."""
        train, held = self._counts
        long, none = (sum(getattr(x, n) for x in (self.train, self.held.rows)) for n in ("too_long", "unanswered"))
        left = [f"{long:,} of more than {self.config.data.length + 1:,} tokens"] if long else []
        left += [f"{none:,} without an answer"] if none else []
        return (
            f"{train:,} conversations to train on in {self.train.num_rows:,} rows, {held:,} held out"
            f"{'; left out: ' * bool(left)}{', '.join(left)}; {self.passes}"
        )


class HeldOut:
    """The conversations that are held out, as an evaluation reads them: the loss on the assistant's tokens alone."""

    name, own = "", True

    def __init__(self, config: SftConfig, rendered: Sequence[Rendered], tokenizer: Tokenizer):
        self.config = config
        self.rows = ConversationRows(rendered, config.data.length)
        answers = [
            [i for i, weight in zip(ids[1:], weights[1:]) if weight]
            for ids, weights in rendered
            if fits((ids, weights), config.data.length)
        ]
        num_bytes = sum(len(tokenizer.decode_bytes(ids)) for ids in answers)
        self.bytes_per_target = num_bytes / sum(map(len, answers))

    def batches(self, max_rows: int, part: RowSlice = ALL_ROWS) -> Iterator[Batch]:
        """Yields the rows, or only the first max_rows of them (0: all), in batches, or some rows of each batch."""
        for batch in self.rows.in_order(self.config.data.batch_size, max_rows):
            yield {n: x[part] for n, x in batch.items()}
