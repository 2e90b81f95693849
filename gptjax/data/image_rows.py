"""Rows of conversations with images: whole, and several questions of one image behind it, which is there once.

A row is a tree, or several one after the other, its tokens depth first: each conversation is a path from a root and
sees the tokens of its path alone (`ops.reference.tree`). It shares with the one before it what both begin with, as far
as nothing of that is an answer: so the loss of each is what it is alone in a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.config import VisionConfig
from gptjax.config.section import InputError
from gptjax.data.dialogue import ConversationRows, fits, pack_best_fit
from gptjax.data.packing import Batch, example_batch
from gptjax.data.pictures import PictureFile


def place_id(key: str) -> int:
    """The id of the places of an image, below 0, from its SHA-256 in hex: equal ids are equal images.

    No text can spell one and no logit is its own; the model reads the image's tokens there.
    """
    return -1 - int(key[:15], 16)


def place_images(
    ids: Sequence[int], weights: Sequence[int], keys: Sequence[str], vision: VisionConfig
) -> tuple[list[int], list[int]]:
    """The ids and weights of a conversation as `Template.render` gives them, with the tokens of its images in place.

    The place -1 becomes those of the image with the first key, -2 of the second, ...: vision.begin, as many times
    `place_id` as an image has tokens, vision.end; their weights are 0. Raises InputError for another number of keys.
    """
    count = sum(i < 0 for i in ids)
    if count != len(keys):
        raise InputError(f"a conversation has {count} places for {len(keys)} images; wanted as many")
    placed: list[int] = []
    placed_weights: list[int] = []
    for i, weight in zip(ids, weights):
        if i < 0:
            new = [*vision.begin, *[place_id(keys[-1 - i])] * vision.num_tokens, *vision.end]
            placed += new
            placed_weights += [0] * len(new)
        else:
            placed.append(i)
            placed_weights.append(weight)
    return placed, placed_weights


class ImageConversation(NamedTuple):
    """The ids of a conversation and a weight for each, with its images in place; see `place_images`."""

    ids: Sequence[int]
    weights: Sequence[int]
    keys: Sequence[str] = ()
    """The SHA-256 of each image, in their order."""
    origin: str = ""
    """The place of its record."""


class ImageRows(ConversationRows):
    """Rows of `ImageConversation`s, and their images. Without `share` each has all of its tokens."""

    def __init__(
        self,
        conversations: Sequence[ImageConversation],
        length: int,
        pictures: PictureFile,
        seed: int = 0,
        share: bool = True,
    ):
        self.vision, self._pictures, self._share = pictures.vision, pictures, share
        self.said_of_long = said_of(next((c for c in conversations if not fits(c, length)), None))
        super().__init__(conversations, length, seed)

    def _laid_out(self, kept: Sequence[ImageConversation]) -> list[list[tuple[int, int]]]:
        self._ids = [np.array(c.ids, np.int64) for c in kept]
        self._keys = [c.keys for c in kept]
        self._answers = [int(np.argmax(np.asarray(c.weights[1:]) > 0)) + 1 for c in kept]
        groups, sizes = self._groups()
        rows = [[pair for group in row for pair in groups[group]] for row in pack_best_fit(sizes, self.length)]
        counts = [len({key for n, _ in row for key in self._keys[n]}) for row in rows]
        self.most_images, self.mean_images = max(counts), sum(counts) / len(counts)
        """The most images that a row has, and their mean."""
        self.num_images = max(1, self.most_images)
        """Images of each row of a batch, I; those that it lacks are zeros."""
        return rows

    def example(self, num_rows: int) -> Batch:
        """Names, shapes and types of the batches, with nothing read and nothing allocated."""
        return example_batch(num_rows, self.length, self.vision, self.num_images)

    def _groups(self) -> tuple[list[list[tuple[int, int]]], list[int]]:
        """Conversations that stay together, as (number, tokens shared with the one before it), and their tokens.

        They begin with the same image, in the same text. What does not fit into one row is several groups.
        """
        by_image: dict[str, list[int]] = {}
        for number, keys in enumerate(self._keys):
            by_image.setdefault(keys[0] if self._share and keys else f"{number}", []).append(number)
        groups, sizes = [], []
        for numbers in by_image.values():
            before = -1
            for number in sorted(numbers, key=lambda n: self._ids[n].tolist()):
                shared, own = self._shared(before, number), len(self._ids[number]) - 1
                if shared and sizes[-1] + own - shared <= self.length:
                    groups[-1].append((number, shared))
                    sizes[-1] += own - shared
                else:
                    groups.append([(number, 0)])
                    sizes.append(own)
                before = number
        return groups, sizes

    def _shared(self, before: int, number: int) -> int:
        """Tokens that a conversation can share with the one before it; 0 where these do not reach over its image.

        The last of them predicts one token only: that one is in no answer.
        """
        if before < 0:
            return 0
        a, b = self._ids[before], self._ids[number]
        most = min(self._answers[before], self._answers[number]) - 1
        same = a[:most] == b[:most]
        shared = most if same.all() else int(same.argmin())
        return shared if np.count_nonzero(b[:shared] < 0) >= self.vision.num_tokens else 0

    def _cut(self, rows: Sequence[Sequence[tuple[int, int]]]) -> Batch:
        """A batch of these rows: what `packing.cut` gives, and their images.

        weights_BL is 1 where the target is the assistant's, and 0 elsewhere; segments_BL counts the conversations. A
        key at place m is seen up to until_BL[m] - 1. index_BL is the token of the row's images at a place, counted
        through all of them (image x vision.num_tokens + token), -1 for text; last_BL the place up to which a query
        sees. patches_BIPY uint8 are the images. int32.
        """
        example = self.example(len(rows))
        batch = {name: np.zeros(x.shape, x.dtype) for name, x in example.items()}
        batch["index_BL"][:] = -1
        batch["last_BL"][:] = np.arange(self.length)
        batch["until_BL"][:] = self.length  # of padding
        images = []
        for number, row in enumerate(rows):
            keys = self._fill({name: x[number] for name, x in batch.items()}, row)
            images += [((number, slot), key) for slot, key in enumerate(keys)]
        for (at, _), patches_PY in zip(images, self._pictures.patches([key for _, key in images])):
            batch["patches_BIPY"][at] = patches_PY
        return batch

    def _fill(self, row: Batch, paths: Sequence[tuple[int, int]]) -> list[str]:
        """Lays a row out; returns the keys of its images in the order of index_BL."""
        at, trail = 0, np.zeros(0, np.int64)  # the places of the last conversation's tokens
        slots: dict[str, int] = {}
        num_tokens, num_places = self.vision.num_tokens, 0
        for segment, (number, shared) in enumerate(paths, 1):
            ids, size = self._ids[number], len(self._ids[number]) - 1
            here = slice(at, at + size - shared)
            row["until_BL"][trail[shared:]] = at
            trail = np.concatenate([trail[:shared], np.arange(here.start, here.stop)])
            row["inputs_BL"][here] = np.maximum(ids[shared:-1], 0)
            row["targets_BL"][here] = np.maximum(ids[shared + 1 :], 0)
            row["positions_BL"][here], row["segments_BL"][here] = np.arange(shared, size), segment
            start = self._weights.starts[number]
            row["weights_BL"][here] = self._weights.tokens(start + shared + 1, start + size + 1)
            places = np.flatnonzero(ids[:-1] < 0)
            assert len(places) == len(self._keys[number]) * num_tokens, "an image has all of its places"
            slot = np.repeat([slots.setdefault(key, len(slots)) for key in self._keys[number]], num_tokens).astype(int)
            token = np.arange(len(places)) % num_tokens
            own = places >= shared
            columns = trail[places[own]]
            row["index_BL"][columns] = slot[own] * num_tokens + token[own]
            if self.vision.sees_all:
                row["last_BL"][columns] = columns + num_tokens - 1 - token[own]
            num_places += len(columns)
            at = here.stop
        row["until_BL"][trail] = at
        assert np.count_nonzero(row["index_BL"] >= 0) == num_places, "no two tokens share a place"
        return list(slots)


def said_of(conversation: ImageConversation | None) -> str:
    """The end of a line that counts conversations that are too long: the first one of them, and its image tokens."""
    if conversation is None:
        return ""
    tokens = sum(i < 0 for i in conversation.ids)
    of_images = f", {tokens:,} of them of images" if tokens else ""
    return f" (the first, {conversation.origin}, has {len(conversation.ids):,}{of_images})"


def digest_parts(conversations: Iterable[ImageConversation]) -> Iterator[bytes]:
    """Yields what identifies conversations: their ids, weights and images."""
    for c in conversations:
        yield np.array([len(c.ids), *c.ids, *c.weights], np.int64).tobytes()
        yield from (bytes.fromhex(key) for key in c.keys)
