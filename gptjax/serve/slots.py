"""Rows of a server's cache: who has one, what can be used again of it, and which of them a step computes."""

from collections.abc import Sequence as Numbers

from gptjax.serve.sequence import Sequence


class Slot:
    """A row of the cache: the sequence that has it, and the ids whose keys and values a prefill wrote into it."""

    def __init__(self):
        self.sequence: Sequence | None = None
        self.ids: list[int] = []
        self.used = 0.0
        """When it was last given away or freed."""


def shared_prefix(there: list[int], ids: list[int], chunk: int) -> int:
    """Ids at the start of both whose keys and values are the same to the bit: whole chunks, or all of them."""
    if there == ids:
        return len(ids)
    same = 0
    while same + chunk <= min(len(there), len(ids)) and there[same : same + chunk] == ids[same : same + chunk]:
        same += chunk
    return same


def window(slots: Numbers[int], sizes: Numbers[int]) -> tuple[int, int]:
    """(first, rows) of the least that a step can compute for these slots: rows are one of `sizes`, the last one all."""
    wide = max(slots) - min(slots) + 1
    rows = next(size for size in sizes if size >= wide)
    return min(min(slots), sizes[-1] - rows), rows
