"""Conversations as the data of a run: rendered by the tokenizer's template, a share of them held out, packed whole."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gptjax.config import SftConfig
from gptjax.config.section import InputError
from gptjax.data.batches import ALL_ROWS, DataState, RowSlice
from gptjax.data.dialogue import ConversationRows, Messages, fits, is_answered, messages_of, tools_of
from gptjax.data.formats import read_records
from gptjax.data.image_messages import pictures_of
from gptjax.data.image_rows import ImageConversation, ImageRows, digest_parts, place_images
from gptjax.data.images import decoder_versions
from gptjax.data.packing import Batch
from gptjax.data.pictures import PictureFile
from gptjax.data.preferences import keeps_branches
from gptjax.data.rendered import RecordData, chat_tokenizer, held_out, question_hash, record_files
from gptjax.parallel.processes import say
from gptjax.tokenizer import Tokenizer
from gptjax.tokenizer.known_templates import template_of


class ChatData(RecordData):
    """The conversations of a source, to train on and held out, with the methods of a pipeline's data.

    A conversation is held out by a hash of its first image, or without one of its first message of a user, so that
    equal questions, and the questions of an image, stay together and the order of the file does not matter. `folder` is
    the run's; its tokenizer lies beside it once it was begun. Where the model reads images and a run begins, all are
    decoded once. Raises InputError for records of another form, for images of a model that reads none and those that
    can't be decoded, and where there is nothing to learn or to hold out.
    """

    def __init__(self, config: SftConfig, folder: Path, training: bool, resumes: bool = False):
        super().__init__(config, chat_tokenizer(config, folder.with_name("tokenizer")), training)
        template, vision = template_of(self.tokenizer), config.model.vision
        self.pictures = PictureFile(vision, folder) if vision.patch else None
        rendered: list[ImageConversation] = []
        questions = []
        for path in record_files(config.data.source, "conversations"):
            for origin, record in read_records(path):
                messages = messages_of(record, origin, path.parent)
                try:
                    pair = template.render(self.tokenizer, messages, tools=tools_of(record, origin))
                except InputError as e:
                    raise InputError(f"{origin}: {e}") from e
                keys = self._keep(messages, origin)
                pair = pair if self.pictures is None else place_images(*pair, keys, vision)
                rendered.append(ImageConversation(*pair, keys, origin))
                questions.append(question_hash(messages))
        if self.pictures is not None and training and not resumes:
            self.pictures.check()
        length = config.data.length
        usable = [fits(c, length) and is_answered(c) for c in rendered]
        if self.pictures is not None and rendered and not any(usable):
            self._rows(rendered)  # which says what the first one has too many of
        held = held_out(np.array(questions), np.array(usable), config.data.validation_fraction, config.data.source)
        self.train = self._rows([c for c, h in zip(rendered, held) if not h], config.seed)
        held_rows = self._rows([c for c, h in zip(rendered, held) if h])
        self.train.num_images = held_rows.num_images = max(self.train.num_images, held_rows.num_images)
        self.held = HeldOut(config, held_rows, [c for c, h in zip(rendered, held) if h], self.tokenizer)
        self._counts = sum(usable) - int(held[usable].sum()), int(held[usable].sum())
        self.validation = [self.held]
        if self.pictures is None:
            self.begin(np.array([len(c.ids), *c.ids, *c.weights], np.int32).tobytes() for c in rendered)
        else:
            self.begin(digest_parts(rendered))
            self.start |= {"decoders": decoder_versions()} if len(self.pictures) else {}

    def _keep(self, messages: Messages, origin: str) -> list[str]:
        """Keeps the images of messages; returns their keys."""
        found = pictures_of(messages)
        if self.pictures is not None:
            for picture in found:
                self.pictures.add(picture)
        elif found:
            raise InputError(
                f"{origin} holds an image, and model.vision.patch=0 reads none; train with images by e.g. "
                "--model.vision.patch 16 --model.vision.side 224"
            )
        return [picture.key for picture in found]

    def _rows(self, conversations: Sequence[ImageConversation], seed: int = 0) -> ConversationRows:
        length = self.config.data.length
        if self.pictures is None:
            return ConversationRows(conversations, length, seed)
        return ImageRows(conversations, length, self.pictures, seed, keeps_branches(self.config.model, length))

    def check(self, state: DataState) -> None:
        """As `RecordData.check`; other versions of the decoders of images are named in a line."""
        super().check(state)
        before, now = state.get("decoders", {}), self.start.get("decoders", {})
        if other := [f"{n} {before.get(n)}, now {now.get(n)}" for n in before | now if before.get(n) != now.get(n)]:
            say(f"warning: this run began with {'; '.join(other)}: an image's pixels may differ a little from then on")

    def batch(self, first: int, part: RowSlice = ALL_ROWS) -> Batch:
        """The batch that begins with row `first`, or some of its rows: no other ones are laid out."""
        return self.train.batch(first, self.config.data.batch_size, part)

    @property
    def example(self) -> Batch:
        """Names, shapes and types of the batches, with nothing read and nothing allocated."""
        return self.train.example(self.config.data.batch_size)

    def describe(self) -> str:
        """The numbers of conversations and rows, and of those that were left out, in a line."""
        train, held = self._counts
        long, none = (sum(getattr(x, n) for x in (self.train, self.held.rows)) for n in ("too_long", "unanswered"))
        said = self.train.said_of_long or self.held.rows.said_of_long
        left = [f"{long:,} of more than {self.config.data.length + 1:,} tokens{said}"] if long else []
        left += [f"{none:,} without an answer"] if none else []
        images = ""
        if self.pictures is not None:
            images = f"; {len(self.pictures):,} images, at most {self.train.num_images:,} in a row"
        return (
            f"{train:,} conversations to train on in {self.train.num_rows:,} rows, {held:,} held out{images}"
            f"{'; left out: ' * bool(left)}{', '.join(left)}; {self.passes}"
        )


class HeldOut:
    """The conversations that are held out, as an evaluation reads them: the loss on the assistant's tokens alone."""

    name, own = "", True

    def __init__(
        self,
        config: SftConfig,
        rows: ConversationRows,
        conversations: Sequence[ImageConversation],
        tokenizer: Tokenizer,
    ):
        self.config, self.rows = config, rows
        answers = [
            [i for i, weight in zip(c.ids[1:], c.weights[1:]) if weight]
            for c in conversations
            if fits(c, config.data.length)
        ]
        num_bytes = sum(len(tokenizer.decode_bytes(ids)) for ids in answers)
        self.bytes_per_target = num_bytes / sum(map(len, answers))

    def batches(self, max_rows: int, part: RowSlice = ALL_ROWS) -> Iterator[Batch]:
        """Yields the rows, or only the first max_rows of them (0: all), in batches, or some rows of each batch."""
        yield from self.rows.in_order(self.config.data.batch_size, max_rows, part)
