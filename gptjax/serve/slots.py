"""Rows of a server's cache: who has one, what can be used again of it, and which of them a step computes."""

from collections.abc import Sequence as Numbers

from gptjax.serve.sequence import Sequence


class Slot:
    """A row of the cache: the sequence that has it, and the ids whose keys and values a prefill wrote into it."""

    def __init__(self):
        self.sequence: Sequence | None = None
        self.ids: list[int] = []
        self.ends: list[int] = []
        """Where the chunks end in which its prompt was read, or will be."""
        self.used = 0.0
        """When it was last given away or freed."""


def chunk_ends(size: int, chunk: int, whole: Numbers[tuple[int, int]] = ()) -> list[int]:
    """The ends of the parts in which a prompt of `size` ids is read: `chunk` ids each; none splits a span of `whole`.

    So an end depends on the ids before it alone. No span is longer than a chunk.
    """
    ends, end, spans = [], 0, list(reversed(whole))
    while end < size:
        wanted = min(end + chunk, size)
        while spans and spans[-1][1] <= wanted:
            spans.pop()
        end = spans[-1][0] if spans and spans[-1][0] < wanted else wanted
        ends.append(end)
    return ends


def shared_prefix(there: list[int], ids: list[int], there_ends: Numbers[int], ends: Numbers[int]) -> int:
    """Ids at the start of both whose keys and values are the same to the bit: those of chunks that are the same."""
    same = 0
    for there_end, end in zip(there_ends, ends):
        if there_end != end or end > len(there) or there[same:end] != ids[same:end]:
            break
        same = end
    return same


def window(slots: Numbers[int], sizes: Numbers[int]) -> tuple[int, int]:
    """(first, rows) of the least that a step can compute for these slots: rows are one of `sizes`, the last one all."""
    wide = max(slots) - min(slots) + 1
    rows = next(size for size in sizes if size >= wide)
    return min(min(slots), sizes[-1] - rows), rows
