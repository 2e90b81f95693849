"""Grammars over bytes, as expressions whose derivative by a byte is what may follow it (Brzozowski 1964).

An expression is a node that is made once; derivatives are made when they are asked for, so that a grammar is an
automaton of the states that were reached, with recursion where references name each other.
"""

from collections.abc import Sequence
from typing import Any

from gptjax.config.section import InputError

INFINITE = 1 << 60
MOST_TEXT = 4096  # bytes of a text that stands in a grammar as it is


class Node:
    """An expression; `nullable` where it holds the empty text, `least` the bytes of its shortest one."""

    __slots__ = ("derived", "kind", "least", "nullable", "parts")

    def __init__(self, kind: str, parts: tuple[Any, ...], nullable: bool):
        self.kind, self.parts, self.nullable = kind, parts, nullable
        self.least = INFINITE
        self.derived: dict[int, Node] = {}


class Grammar:
    """Maker of expressions, of which `start` is the one that a text must fit. Call `close` when it is complete."""

    def __init__(self):
        self._made: dict[Any, Node] = {}
        self._references: dict[str, Node | None] = {}
        self._closed = False
        self.nothing = self._node("alt", ())
        self.empty = self._node("text", (b"",))
        self.start = self.nothing

    def text(self, text: str | bytes) -> Node:
        """These bytes; raises InputError for more than MOST_TEXT, since each of their ends is kept."""
        found = text.encode() if isinstance(text, str) else text
        if len(found) > MOST_TEXT:
            raise InputError(f"a text of {len(found):,} bytes: wanted at most {MOST_TEXT:,}")
        return self._node("text", (found,))

    def one_of(self, characters: str | bytes | range) -> Node:
        """One byte of these."""
        found = characters.encode() if isinstance(characters, str) else bytes(characters)
        return self._node("byte", (frozenset(found),))

    def sequence(self, *parts: Node) -> Node:
        """One behind the other."""
        result = parts[-1] if parts else self.empty
        for part in reversed(parts[:-1]):
            result = self._pair(part, result)
        return result

    def _pair(self, first: Node, rest: Node) -> Node:
        if first is self.nothing or rest is self.nothing:
            return self.nothing
        if first is self.empty or rest is self.empty:
            return rest if first is self.empty else first
        heads = []
        while first.kind == "pair":  # to the right, so that a derivative finds its byte at the head
            heads.append(first.parts[0])
            first = first.parts[1]
        result = self._node("pair", (first, rest))
        for head in reversed(heads):
            result = self._node("pair", (head, result))
        return result

    def any_of(self, *parts: Node) -> Node:
        """One of these."""
        flat: dict[Node, None] = {}
        for part in parts:
            flat |= dict.fromkeys(part.parts if part.kind == "alt" else (part,))
        found = sorted(flat, key=id)
        return found[0] if len(found) == 1 else self._node("alt", tuple(found))

    def optional(self, part: Node) -> Node:
        """This, or nothing."""
        return self.any_of(part, self.empty)

    def repeated(self, part: Node, least: int = 0, most: int | None = None) -> Node:
        """This, which is not empty, from `least` to `most` times; without a bound where that is None."""
        if most is not None and most < least:
            return self.nothing
        return self.empty if most == 0 else self._node("repeat", (part, least, most))

    def reference(self, name: str) -> Node:
        """The expression that `define` gives the name, then or later; it must not be empty."""
        self._references.setdefault(name, None)
        return self._node("reference", (name,))

    def defines(self, name: str) -> bool:
        """True where the name has an expression, or is referred to."""
        return name in self._references

    def define(self, name: str, node: Node) -> None:
        """Gives the name its expression."""
        self._references[name] = node

    def close(self, start: Node, alphabet: frozenset[int] = frozenset(range(256))) -> "Grammar":
        """Ends the making; of the texts those without bytes outside of the alphabet count."""
        self.start, self.alphabet, self._closed = start, alphabet, True
        nodes, changed = list(self._made.values()), True
        while changed:  # parts are made before what they are parts of, but for what references name
            changed = False
            for node in nodes:
                if (least := self._least(node)) < node.least:
                    node.least, changed = least, True
        sets = {node.parts[0] for node in nodes if node.kind == "byte"}
        single = {byte for node in nodes if node.kind == "text" for byte in node.parts[0]}
        kinds: dict[Any, int] = {}
        self.classes = [
            kinds.setdefault((byte if byte in single else None, byte in alphabet, *(byte in s for s in sets)), byte)
            for byte in range(256)
        ]
        """For each byte the first one that no part of the grammar tells from it."""
        return self

    def derivative(self, node: Node, byte: int) -> Node:
        """The texts that may follow the byte, one of `classes`; `nothing` where it does not fit."""
        if (known := node.derived.get(byte)) is None:
            known = node.derived[byte] = self._derivative(node, byte)
        return known

    def _derivative(self, node: Node, byte: int) -> Node:
        parts = node.parts
        if node.kind == "text":
            return self.text(parts[0][1:]) if parts[0][:1] == bytes([byte]) else self.nothing
        if node.kind == "byte":
            return self.empty if byte in parts[0] else self.nothing
        if node.kind == "alt":
            return self.any_of(*(self.derivative(part, byte) for part in parts))
        if node.kind == "reference":
            target = self._references[parts[0]]
            assert target is not None, f"{parts[0]} was never defined"
            return self.derivative(target, byte)
        if node.kind == "repeat":
            part, least, most = parts
            rest = self.repeated(part, max(least - 1, 0), None if most is None else most - 1)
            return self._pair(self.derivative(part, byte), rest)
        first, rest = parts
        found = self._pair(self.derivative(first, byte), rest)
        return self.any_of(found, self.derivative(rest, byte)) if first.nullable else found

    def _node(self, kind: str, parts: tuple[Any, ...]) -> Node:
        key = (kind, *parts)
        if (node := self._made.get(key)) is None:
            nullable = {
                "text": lambda: not parts[0],
                "byte": lambda: False,
                "reference": lambda: False,
                "alt": lambda: any(part.nullable for part in parts),
                "repeat": lambda: parts[1] == 0,
                "pair": lambda: parts[0].nullable and parts[1].nullable,
            }[kind]()
            node = self._made[key] = Node(kind, parts, nullable)
            if self._closed:
                node.least = self._least(node)
        return node

    def _least(self, node: Node) -> int:
        parts = node.parts
        if node.kind == "text":
            return len(parts[0]) if self.alphabet.issuperset(parts[0]) else INFINITE
        if node.kind == "byte":
            return 1 if parts[0] & self.alphabet else INFINITE
        if node.kind == "alt":
            return min((part.least for part in parts), default=INFINITE)
        if node.kind == "reference":
            target = self._references[parts[0]]
            return INFINITE if target is None else target.least
        if node.kind == "repeat":
            return 0 if parts[1] == 0 else min(parts[0].least * parts[1], INFINITE)
        return min(parts[0].least + parts[1].least, INFINITE)


def choices_grammar(choices: Sequence[str]) -> tuple[Grammar, Node]:
    """One of the texts; raises InputError where there is none, or an empty one."""
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise InputError(f"choices={list(choices)!r:.80}: wanted at least one text, and none that is empty")
    grammar = Grammar()
    return grammar, grammar.any_of(*(grammar.text(choice) for choice in choices))
