"""Constraints on text that a model writes: the token ids that may come next, and a way to the end within a budget."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from gptjax.config.section import InputError
from gptjax.generation.grammar import INFINITE, Grammar, Node, choices_grammar
from gptjax.generation.json_schema import json_grammar
from gptjax.tokenizer import Tokenizer

KEPT = 256  # states whose ids are kept
MOST_BYTES = 20_000  # of the shortest text of a grammar


class _Level(NamedTuple):
    """The beginnings of tokens of one length: each is a beginning one shorter (by its place there) and a byte."""

    parent: np.ndarray
    byte: np.ndarray
    tokens: np.ndarray
    """Ids of the tokens of this length, and their places in the level."""
    places: np.ndarray


class Vocabulary:
    """The bytes of a tokenizer's first `size` ids as a trie, by levels; ids without a text are in none."""

    def __init__(self, tokenizer: Tokenizer, size: int):
        self.texts = [tokenizer.decode_bytes([i]) for i in range(min(size, tokenizer.vocab_size))]
        self.ids: dict[bytes, int] = {}
        """The first id of each text."""
        for i, text in enumerate(self.texts):
            self.ids.setdefault(text, i)
        self.ids.pop(b"", None)
        self.longest = max(map(len, self.texts))
        self.alphabet = frozenset(text[0] for text in self.ids if len(text) == 1)
        self.levels = list(self._made())

    def _made(self):
        above = {b"": 0}
        for length in range(1, self.longest + 1):
            begun = [text[:length] for text in self.ids if len(text) >= length]
            here = {text: place for place, text in enumerate(dict.fromkeys(begun))}
            tokens = [i for i, text in enumerate(self.texts) if len(text) == length]
            yield _Level(
                np.array([above[text[:-1]] for text in here], np.int32),
                np.array([text[-1] for text in here], np.uint8),
                np.array(tokens, np.int64),
                np.array([here[self.texts[i]] for i in tokens], np.int64),
            )
            above = here


_VOCABULARIES: "WeakKeyDictionary[Tokenizer, dict[int, Vocabulary]]" = WeakKeyDictionary()


def vocabulary_of(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer's first ids, which is made once."""
    made = _VOCABULARIES.setdefault(tokenizer, {})
    return made[size] if size in made else made.setdefault(size, Vocabulary(tokenizer, size))


class Constraint:
    """Ids that keep a text on its way to one that a grammar has. States are numbers; -1 is none.

    `end_ids` end a text and are allowed exactly where it is complete. With `spaced` the text may begin with a space
    that is no part of it. `size` is the ids that a model has, and the length of the masks (0: the tokenizer's). Raises
    InputError where the tokenizer lacks bytes that every text of the grammar has, or no text fits the grammar.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        grammar: tuple[Grammar, Node],
        end_ids: Sequence[int],
        *,
        spaced: bool = False,
        size: int = 0,
    ):
        assert len(end_ids), "nothing would be allowed behind a complete text"
        self._size = size or tokenizer.vocab_size
        self._vocabulary = vocabulary_of(tokenizer, self._size)
        self._end_ids = np.array([i for i in end_ids if i < self._size], np.int64)
        made, node = grammar
        node = made.sequence(made.optional(made.text(" ")), node) if spaced else node
        self._grammar = made.close(node, self._vocabulary.alphabet)
        if node.least >= INFINITE:
            raise InputError(
                "no text that this tokenizer can write fits the schema or the choices; wanted one that does"
            )
        if node.least > MOST_BYTES:
            raise InputError(f"the shortest text has {node.least:,} bytes; wanted one of at most {MOST_BYTES:,}")
        self._class_bytes = sorted(set(self._grammar.classes))
        place = {byte: i for i, byte in enumerate(self._class_bytes)}
        self._class_of = np.array([place[byte] for byte in self._grammar.classes], np.int32)
        self._nodes: list[Node] = []
        self._numbers: dict[Node, int] = {}
        self._rows = np.full((64, 256), -1, np.int32)  # the state behind each byte; the last row stays that of -1
        self._filled = np.zeros(64, bool)
        self._needs: dict[int, int] = {}
        self._needs_more: dict[int, int] = {}
        self._next: OrderedDict[int, tuple[np.ndarray, list[int]]] = OrderedDict()
        self._start = self._number(node)

    def start(self) -> int:
        """The state before any id."""
        return self._start

    def finished(self, state: int) -> bool:
        """True where the text is complete; it may go on, where the grammar has longer ones."""
        return self._nodes[state].nullable

    def advance(self, state: int, token: int) -> int:
        """The state behind an id, -1 where it is not allowed; an end id of a complete text changes nothing."""
        if token in self._end_ids:
            return state if self.finished(state) else -1
        text = self._vocabulary.texts[token] if token < len(self._vocabulary.texts) else b""
        for byte in text:
            state = int(self._row(state)[byte])
            if state < 0:
                return -1
        return state if text else -1

    def allowed(self, state: int, left: int | None = None) -> np.ndarray:
        """allowed_V of the ids that may come next, at least one; do not write into it.

        With `left`, the tokens that may still be drawn, only ids from which so many are enough to complete the text;
        where it is less than `needed` already, those of the shortest way.
        """
        next_V, states = self._next_states(state)
        allowed_V = next_V >= 0
        if left is not None:
            late = [s for s in states if self._late(s, left)]
            if late:
                allowed_V = allowed_V & ~np.isin(next_V, late)
        if self.finished(state):
            allowed_V = allowed_V.copy()
            allowed_V[self._end_ids] = True
        elif not allowed_V.any():
            allowed_V[self._shortest(state)] = True
        return allowed_V

    def masks(self, states: Sequence[int], left_B: Sequence[int], size: int) -> np.ndarray:
        """allowed_BV of several states, each with the tokens that are left, of a vocabulary of that size."""
        allowed_BV = np.zeros((len(states), size), bool)
        for row, (state, left) in enumerate(zip(states, left_B, strict=True)):
            allowed_BV[row, : self._size] = self.allowed(state, max(left, 1))
        return allowed_BV

    def _late(self, state: int, left: int) -> bool:
        """True where a text can't be complete with fewer than `left` tokens."""
        least = self._nodes[state].least
        return least >= left and (least > left * self._vocabulary.longest or self.needed(state, left) >= left)

    def needed(self, state: int, most: int = INFINITE) -> int:
        """Tokens by which the text can be complete; 0 where it is. Those of the shortest text, the longest first.

        Where they are more than `most`, some number above it: the work is bounded, however long the text.
        """
        if self._needs_more.get(state, 0) > most:
            return self._needs_more[state]
        way, at = [], state
        while at not in self._needs and not self.finished(at):
            if len(way) > most:
                self._needs_more[state] = len(way)
                return len(way)
            way.append(at)
            at = self.advance(at, self._shortest(at))
        known = self._needs.setdefault(at, 0)
        self._needs |= {passed: known + count for count, passed in enumerate(reversed(way), 1)}
        return self._needs[state]

    def check(self, most: int, setting: str = "max_new_tokens") -> None:
        """Raises InputError where so many tokens are not enough for the shortest text."""
        if most < (needed := self.needed(self._start)):
            raise InputError(f"{setting}={most}: wanted at least {needed}, which the shortest text takes; raise it")

    def _shortest(self, state: int) -> int:
        """The longest id that begins the shortest text from a state."""
        text, ids = b"", self._vocabulary.ids
        while not self.finished(state) and len(text) < self._vocabulary.longest:
            row = self._row(state)
            usable = (b for b in self._class_bytes if b in self._vocabulary.alphabet)
            byte = min(usable, key=lambda b: (self._least(int(row[b])), b))
            text, state = text + bytes([byte]), int(row[byte])
        return next(ids[text[:n]] for n in range(len(text), 0, -1) if text[:n] in ids)

    def _least(self, state: int) -> int:
        return self._nodes[state].least if state >= 0 else INFINITE

    def _number(self, node: Node) -> int:
        """The state of an expression; -1 where no text fits it."""
        if node.least >= INFINITE:
            return -1
        if (number := self._numbers.get(node)) is None:
            number = self._numbers[node] = len(self._nodes)
            self._nodes.append(node)
        return number

    def _row(self, state: int) -> np.ndarray:
        if not self._filled[state]:
            grammar, node = self._grammar, self._nodes[state]
            found = np.array([self._number(grammar.derivative(node, byte)) for byte in self._class_bytes], np.int32)
            while len(self._nodes) >= len(self._filled):
                self._rows = np.concatenate([self._rows, np.full_like(self._rows, -1)])
                self._filled = np.concatenate([self._filled, np.zeros_like(self._filled)])
            self._rows[state], self._filled[state] = found[self._class_of], True
        return self._rows[state]

    def _next_states(self, state: int) -> tuple[np.ndarray, list[int]]:
        """next_V, the state behind each id, -1 where it is not allowed; and the states that occur."""
        if state in self._next:
            self._next.move_to_end(state)
            return self._next[state]
        next_V = np.full(self._size, -1, np.int32)
        at = np.array([state], np.int32)
        for level in self._vocabulary.levels:
            seen = np.zeros(len(self._nodes) + 1, bool)
            seen[at] = True
            seen[-1] = False  # of -1
            for number in np.flatnonzero(seen & ~self._filled[: len(seen)]).tolist():
                self._row(number)
            at = self._rows[at[level.parent], level.byte]
            if not (at >= 0).any():
                break
            next_V[level.tokens] = at[level.places]
        next_V[self._end_ids] = -1
        self._next[state] = next_V, np.unique(next_V[next_V >= 0]).tolist()
        if len(self._next) > KEPT:
            self._next.popitem(last=False)
        return self._next[state]


def choices_constraint(tokenizer: Tokenizer, choices: Sequence[str], end_ids: Sequence[int], **more: Any) -> Constraint:
    """One of the texts: see `Constraint`."""
    return Constraint(tokenizer, choices_grammar(choices), end_ids, **more)


def json_constraint(tokenizer: Tokenizer, schema: Any, end_ids: Sequence[int], **more: Any) -> Constraint:
    """JSON that fits a schema: see `json_grammar` and `Constraint`."""
    return Constraint(tokenizer, json_grammar(schema), end_ids, **more)
