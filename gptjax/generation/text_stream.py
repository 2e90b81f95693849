"""From one row's token ids to pieces of text."""

import codecs
from collections.abc import Mapping, Sequence

from gptjax.tokenizer import Tokenizer


class TextStream:
    """Turns one row's token ids into pieces of text that never have to be taken back.

    Held back are the bytes of an unfinished character, and an ending that may grow into a stop text. Of several stop
    texts the one that is completed first counts, so where the text was cut into pushes makes no difference.
    `drops_space` leaves out a space that the text begins with. `marks` are special tokens that are shown, by their
    texts: those around calls of tools.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        drops_space: bool = False,
        marks: Mapping[int, str] | None = None,
    ):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._drop_space = drops_space
        self._marks = {i: text.encode() for i, text in (marks or {}).items()}

    @property
    def vocab_size(self) -> int:
        """Ids that have a text: the tokenizer's."""
        return self._tokenizer.vocab_size

    def push(self, ids: Sequence[int], final: bool = False) -> str:
        """The text that the ids make certain; `final` lets go of all that is held. Nothing follows a stop text."""
        if self.stopped:
            return ""
        new = b"".join(self._marks.get(i) or self._tokenizer.decode_bytes([i]) for i in ids)
        if new and self._drop_space:
            new, self._drop_space = new.removeprefix(b" "), False
        self._held += self._utf8.decode(new, final)
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)[1]]
        keep = 0 if final else _unfinished_stop(self._held, self._stop)
        piece, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return piece


def _unfinished_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest ending of the text that is the beginning of a stop text."""
    sizes = [n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])]
    return max(sizes, default=0)
