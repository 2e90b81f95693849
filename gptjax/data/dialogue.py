"""Conversations for fine-tuning: records to messages, and rows of whole conversations with a weight for each token.

A template turns messages into ids and weights (1 where the assistant writes, its end included). A row holds whole
conversations, each with a segment of its own; none is cut, so that no answer loses its question.
"""

import bisect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config.section import InputError, one_line
from gptjax.data.batches import ALL_ROWS, RowSlice
from gptjax.data.formats import read_records
from gptjax.data.image_messages import RecordImages
from gptjax.data.packing import Batch, MemorySplit, Spans, cut, example_batch
from gptjax.data.permutation import shuffled
from gptjax.tokenizer.tool_calls import ToolSpec, checked_calls, checked_tools

Messages = list[dict[str, Any]]
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def messages_of(record: Any, origin: str, folder: Path | None = None) -> Messages:
    """The messages of a record, in the forms that Hugging Face's datasets have.

    "messages" is a list of {"role", "content"}, "conversations" one of {"from", "value"}; "prompt" and "completion"
    are two texts, and so are "question" and "answer" about an image. In "messages" an answer may have "tool_calls"
    beside its content, and messages of the role "tool" behind it hold their results, as OpenAI's API has them. Content
    may be a list of parts, which stays one where it holds images: {"type": "text", "text"} and {"type": "image",
    "image": Picture}; see `RecordImages`. `folder` is that of the record's file, in which images lie; None: none is
    read from a file. Raises InputError, which names `origin`, where a record has another form.
    """
    given: Mapping[str, Any] = record if isinstance(record, Mapping) else {}
    images = RecordImages(given, origin, folder)
    pair = ("question", "answer") if images.pictures and "prompt" not in given else ("prompt", "completion")
    if isinstance(given.get(pair[0]), str):
        if not isinstance(given.get(pair[1]), str):
            raise InputError(f"{origin} has a {pair[0]} and no {pair[1]}; wanted both as texts, or messages")
        said = images.content(given[pair[0]], "user", f"{origin}: {pair[0]}")
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": given[pair[1]]}]
        images.finish(messages)
        return messages
    for name, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if not isinstance(turns := given.get(name), list):
            continue
        messages = [_message(turn, role, content, f"{origin}: {name}[{i}]", images) for i, turn in enumerate(turns)]
        images.finish(messages)
        return messages
    fields = f"the fields {', '.join(map(str, record))}" if isinstance(record, Mapping) else one_line(repr(record), 80)
    raise InputError(f"{origin} has {fields}; wanted messages, conversations, or prompt and completion")


def _message(turn: Any, role: str, content: str, where: str, images: RecordImages) -> dict[str, Any]:
    got: Mapping[str, Any] = turn if isinstance(turn, Mapping) else {}
    said, text = got.get(role), got.get(content)
    calls = got.get("tool_calls") if said == "assistant" else None
    known = (*ROLES, "tool") if role == "role" else tuple(ROLES)
    is_content = isinstance(text, str | list) or (calls and text is None)
    if not isinstance(said, str) or said not in known or not is_content:
        raise InputError(
            f'{where} is {one_line(json.dumps(turn, default=repr), 80)}; wanted {{"{role}": one of {", ".join(known)}, '
            f'"{content}": a text}}'
        )
    text = images.content(text, ROLES.get(said, said), where)
    if said == "tool":
        return {"role": said, "tool_call_id": str(got.get("tool_call_id") or ""), "content": text}
    made = {"tool_calls": [call.as_openai() for call in checked_calls(calls, where)]} if calls else {}
    return {"role": ROLES[said], "content": text or "", **made}


def tools_of(record: Any, origin: str) -> list[ToolSpec]:
    """The tools that a record says the model has, in OpenAI's form, as a list or as the JSON text of one.

    Raises InputError, which names `origin`, for others.
    """
    given = record.get("tools") if isinstance(record, Mapping) else None
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise InputError(f"{origin}: tools is {one_line(given, 60)!r}; wanted a list as JSON") from None
    return checked_tools(given, origin) if given else []


def read_conversations(path: Path) -> Iterator[Messages]:
    """Yields the messages of each record of a file (see `read_records`); raises InputError, which names the place."""
    for origin, record in read_records(path):
        yield messages_of(record, origin, path.parent)


def pack_best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Rows of at most `length` as the numbers of what they hold: the largest first, each where the least room is left.

    Best-fit decreasing needs at most 11/9 of the fewest rows, and one more (Johnson et al. 1974).
    """
    assert max(sizes, default=0) <= length, "what does not fit is dropped before"
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), by room
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(free, (sizes[number], -1))
        room, row = free.pop(at) if at < len(free) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        bisect.insort(free, (room - sizes[number], row))
    return rows


Rendered = tuple[Sequence[int], Sequence[int], *tuple[Any, ...]]
"""The ids of a conversation, and a weight for each, as a template gives them; and what more is known of it."""


def fits(rendered: Rendered, length: int) -> bool:
    """True for a conversation that a row of `length` predictions can hold."""
    return len(rendered[0]) <= length + 1


def is_answered(rendered: Rendered) -> bool:
    """True for a conversation with an answer to learn: its first token is predicted from nothing."""
    return any(rendered[1][1:])


class ConversationRows:
    """Rows of `length` predictions that hold whole conversations, in another order each epoch.

    Conversations that do not fit are left out and counted in `too_long`, those without an answer to learn in
    `unanswered`. Raises InputError where nothing is left.
    """

    num_images = 0
    """Images of each row of a batch."""
    mean_images = 0.0
    """Mean of the images that a row has."""
    said_of_long = ""
    """What is known of the first conversation that does not fit, for the end of a line."""

    def __init__(self, rendered: Sequence[Rendered], length: int, seed: int = 0):
        short = [one for one in rendered if fits(one, length)]
        kept = [one for one in short if is_answered(one)]
        self.length, self.seed = length, seed
        self.too_long, self.unanswered = len(rendered) - len(short), len(short) - len(kept)
        if not kept:
            raise InputError(
                f"none of {len(rendered)} conversations can be learned: {self.too_long} have more than "
                f"data.length + 1 = {length + 1} tokens{self.said_of_long}, {self.unanswered} no answer; raise "
                "--data.length"
            )
        self._weights = MemorySplit.of([one[1] for one in kept])
        self._rows = self._laid_out(kept)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    def batch(self, first: int, count: int, part: RowSlice = ALL_ROWS) -> Batch:
        """Rows [first, first + count) of all epochs' rows, or some of them, one epoch after the other: see `_cut`."""
        numbers = np.array(shuffled(first, count, self.num_rows, self.seed))[part]
        return self._cut([self._rows[row] for row in numbers])

    def batches(self, batch_size: int, step: int = 0) -> Iterator[tuple[Batch, dict[str, int]]]:
        """Yields (batch, {"rows": rows read}) without end, from behind `step` batches."""
        while True:
            yield self.batch(step * batch_size, batch_size), {"rows": (step + 1) * batch_size}
            step += 1

    def in_order(self, batch_size: int, max_rows: int = 0, part: RowSlice = ALL_ROWS) -> Iterator[Batch]:
        """Yields each row once, or the first max_rows (0: all), in batches of which the last one is padded."""
        rows = self._rows[: max_rows or None]
        for first in range(0, len(rows), batch_size):
            some = rows[first : first + batch_size]
            padded = [*some, *([[]] * (batch_size - len(some)))]
            yield self._cut([padded[row] for row in np.arange(batch_size)[part]])

    def example(self, num_rows: int) -> Batch:
        """Names, shapes and types of the batches, with nothing read and nothing allocated."""
        return example_batch(num_rows, self.length)

    def _laid_out(self, kept: Sequence[Any]) -> list[Any]:
        """Rows of conversations, each as `_cut` takes it."""
        self._tokens = MemorySplit.of([ids for ids, *_ in kept])
        self._counts = [len(ids) - 1 for ids, *_ in kept]
        return pack_best_fit(self._counts, self.length)

    def _cut(self, rows: Sequence[Sequence[int]]) -> Batch:
        """A batch of rows, each as the numbers of its conversations: see `packing.cut`.

        weights_BL is 1 where the target is the assistant's, and 0 elsewhere.
        """
        numbers = [number for row in rows for number in row]
        counts = [np.array([self._counts[number] for number in row], np.int64) for row in rows]
        spans = Spans(
            np.repeat(np.arange(len(rows)), [len(row) for row in rows]),
            np.concatenate([np.cumsum(row) - row for row in counts]),
            self._tokens.starts[numbers],
            np.concatenate(counts),
        )
        batch = cut(self._tokens, spans, len(rows), self.length)
        for row, column, start, n in zip(*(x.tolist() for x in spans)):
            batch["weights_BL"][row, column : column + n] *= self._weights.tokens(start + 1, start + n + 1)
        return batch
