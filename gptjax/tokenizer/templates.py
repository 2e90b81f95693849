"""Chat templates: how a conversation becomes token ids, from parts that are known by name.

A model's Jinja text is never run: known_templates.py names the template that renders as it does. Ids are built from the
template's parts: a special token of the parts is its id, the text between two of them is encoded as one, and the text
of a message can become no special token.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gptjax.config.section import InputError, one_line
from gptjax.tokenizer.interface import Tokenizer
from gptjax.tokenizer.tool_calls import HERMES, ToolForm, ToolSpec, checked_calls, checked_tools

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant")


class Piece(NamedTuple):
    """A special token by its name ({bos} and {eos} are the tokenizer's), or text; the loss counts it by its weight.

    `spaced` is True for a text whose first space is a part's: it stands for the one that some tokenizers put in front.
    `is_image` is True for the place of an image, which is a token that no tokenizer has.
    """

    text: str
    is_token: bool
    weight: int
    spaced: bool = False
    is_image: bool = False


IMAGE = Piece("{image}", True, 0, is_image=True)


@dataclass(frozen=True, kw_only=True)
class Template:
    """The parts of a template. In them {bos}, {eos} and `tokens` are special tokens, all else is text.

    A conversation is `begin`, a system message if there is one, and turns of the user and the assistant. An answer
    stands behind `header`, which is what a model is given to go on from; the model writes `lead`, its text, its calls
    of tools, and `end` up to its first token. Where system messages have no place of their own they open the first turn
    of the user. The results of calls stand in turns as `tool_form` has them.
    """

    name: str
    tokens: tuple[str, ...] = ()
    begin: str = ""
    system: tuple[str, str] = ("", "")
    default_system: str | None = None
    """The system message of a conversation without one; None: it has none."""
    system_in_user: bool = False
    user: tuple[str, str]
    header: str = ""
    lead: str = ""
    end: str
    trim: tuple[str, ...] = ()
    """Roles whose messages lose their white space at both ends."""
    trims_joined: bool = False
    """The first turn of the user is trimmed with the system message in it, not before."""
    alternate: bool = False
    """Turns must alternate, the user's first."""
    tool_form: ToolForm = HERMES

    @property
    def stop(self) -> str:
        """The special token that ends an answer."""
        return next(piece.text for piece in self._split(self.end, 1) if piece.is_token)

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an answer: of the template first, and those that end any text of the tokenizer."""
        return tuple(dict.fromkeys((self._id(tokenizer, self.stop), *tokenizer.end_ids)))

    def spaced(self, tokenizer: Tokenizer) -> bool:
        """True where an answer begins with a space that is no part of its text."""
        ids, _ = self.render(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}])
        begun, _ = self.render(tokenizer, [{"role": "user", "content": "x"}], add_generation_prompt=True)
        return tokenizer.decode_bytes(ids[len(begun) :]).startswith(b" ")

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises InputError where the tokenizer lacks a token of the template, or has one that is text in it."""
        for token in self.tokens:
            self._id(tokenizer, token)
        parts = [self.begin, *self.system, *self.user, self.header, self.lead, self.end]
        text = "\n".join(piece.text for part in parts for piece in self._split(part, 0) if not piece.is_token)
        if wrong := next((name for name in tokenizer.specials if name in text), ""):
            raise InputError(
                f"the template {self.name} writes {wrong!r} as text, which is a special token of this tokenizer; name "
                "another template with --template"
            )

    def marks(self, tokenizer: Tokenizer) -> dict[int, str]:
        """The special tokens of the tokenizer that a model writes around calls, by id, and their texts."""
        return {tokenizer.specials[name]: name for name in self.tool_form.marks if name in tokenizer.specials}

    def render(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[ToolSpec] = (),
    ) -> tuple[list[int], list[int]]:
        """The ids of a conversation, and for each id 1 where the assistant writes it, its end included, else 0.

        With `add_generation_prompt` the ids end where an answer begins. The ids of the first messages up to where an
        answer begins, and up to its end, are a prefix of those of all messages. `tools` are those that the model is
        told of. Where the user's content is a list of parts, {"type": "text", "text": ...} and {"type": "image"}, the
        ids of the images are -1, -2, ... in their order. Raises InputError where the messages are not of the form that
        the template has, or the tokenizer lacks a token of it.
        """
        names = (*self.tokens, "{bos}", "{eos}", *self.marks(tokenizer).values())
        given = self.pieces(messages, add_generation_prompt, tools)
        pieces = _joined([p if p.is_image or p.text in names else p._replace(is_token=False) for p in given])
        texts, starts = [], []
        for i, piece in enumerate(pieces):
            if piece.is_token:
                continue
            before, after = (
                tokenizer.strips.get(self._id(tokenizer, pieces[n].text), "")
                if 0 <= n < len(pieces) and pieces[n].is_token and not pieces[n].is_image
                else ""
                for n in (i - 1, i + 1)
            )
            text = piece.text.lstrip() if "r" in before else piece.text
            texts.append(text.rstrip() if "l" in after else text)
            begins = i == 0 or (pieces[i - 1].is_token and not tokenizer.adds_space_once)
            starts.append(begins and not piece.spaced)
        encoded, images = iter(tokenizer.encode_batch(texts, starts)), itertools.count(-1, -1)
        ids, weights = [], []
        for piece in pieces:
            if piece.is_image:
                new = [next(images)]
            else:
                new = [self._id(tokenizer, piece.text)] if piece.is_token else next(encoded)
            ids += new
            weights += [piece.weight] * len(new)
        return ids, weights

    def pieces(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[ToolSpec] = ()
    ) -> list[Piece]:
        """The conversation as special tokens and the texts between them.

        A text is cut where an answer begins, so that its ids are those that a model goes on from.
        """
        turns, form = self._checked(messages, add_generation_prompt), self.tool_form
        described = self._own(form.described(checked_tools(tools, "the conversation")), 0) if tools else []
        system = turns.pop(0)["content"] if turns[0]["role"] == "system" else self.default_system
        pieces, opening = self._split(self.begin, 0), []
        if system is not None or (described and not form.in_user):
            said = [Piece(self._trimmed("system", system or ""), False, 0)]
            if described and not form.in_user:
                said += [*([Piece("\n\n", False, 0)] if system else []), *described]
            before = form.system if described and form.system else self.system[0]
            said = [*self._split(before, 0), *said, *self._split(self.system[1], 0)]
            if self.system_in_user:
                opening = said
            else:
                pieces += said
        opening += described if form.in_user else []
        for i, message in enumerate(turns):
            role: str = message["role"]
            content: Any = message["content"] if role == "user" else self._trimmed(role, message["content"])
            if role == "assistant":
                end = self._split(self.end, 1)
                stop = next(i for i, piece in enumerate(end) if piece.is_token)
                end[stop + 1 :] = [piece._replace(weight=0) for piece in end[stop + 1 :]]
                answer = Piece(self.lead + content, False, 1, self.lead.startswith(" "))
                pieces += [*self._split(self.header, 0), answer]
                for n, call in enumerate(message["calls"]):
                    pieces += [Piece("\n", False, 1)] if content or n else []
                    pieces += self._own(form.written(call), 1)
                pieces += end
            elif role == "tool":
                before, after = form.turn or self.user
                first = form.turn is not None or i == 0 or turns[i - 1]["role"] != "tool"
                last = form.turn is not None or turns[i + 1 : i + 2] == [] or turns[i + 1]["role"] != "tool"
                pieces += self._split(before, 0) if first else [Piece("\n", False, 0)]
                pieces += [*self._own(form.read(content), 0), *(self._split(after, 0) if last else [])]
            else:
                trims = role in self.trim
                said = _joined([*opening, *(_stripped(content) if trims and not self.trims_joined else content)])
                said = _stripped(said) if trims and self.trims_joined else said
                pieces += [*self._split(self.user[0], 0), *said, *self._split(self.user[1], 0)]
                opening = []
        if opening:
            raise InputError(f"the tools stand in a message of the user, as template {self.name} has it; wanted one")
        if add_generation_prompt:
            pieces += self._split(self.header, 0)
        return _joined(pieces)

    def _trimmed(self, role: str, content: str) -> str:
        return content.strip() if role in self.trim else content

    def _own(self, texts: Sequence[tuple[str, bool]], weight: int) -> list[Piece]:
        """Pieces of (text, True for one of the template's or its form's own) pairs."""
        return [
            piece
            for text, own in texts
            for piece in (self._split(text, weight) if own else [Piece(text, False, weight)])
        ]

    def _checked(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[dict[str, Any]]:
        """The messages as role, content and calls; the content of a user as pieces, of others as a text."""
        turns: list[dict[str, Any]] = []
        if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
            raise InputError('a conversation has no messages; wanted a list of {"role": ..., "content": ...}')
        for i, message in enumerate(messages):
            got = message if isinstance(message, Mapping) else {}
            role, content, calls = got.get("role"), got.get("content"), got.get("tool_calls")
            if role not in (*ROLES, "tool") or (role == "system" and i):
                wanted = "user or assistant" if i else "system, user or assistant"
                raise InputError(f"message {i} has role {one_line(repr(role), 40)}; wanted {wanted}")
            if role == "tool" and not (turns and (turns[-1]["calls"] or turns[-1]["role"] == "tool")):
                raise InputError(f"message {i} has role 'tool'; wanted it behind an answer with tool_calls")
            calls = checked_calls(calls, f"message {i}") if role == "assistant" and calls else []
            if isinstance(content, list) or (role == "user" and isinstance(content, str)):
                content = _of_parts(content, i, str(role))
            elif not isinstance(content, str) and not (calls and content is None):
                raise InputError(f"message {i} has content {one_line(repr(content), 40)}; wanted a text")
            if len(calls) > 1 and not self.tool_form.several:
                raise InputError(f"message {i} has {len(calls)} tool_calls; wanted one, as template {self.name} has it")
            turns.append({"role": role, "content": content or "", "calls": calls})
        said = [turn["role"] for turn in turns if turn["role"] != "system"]
        as_read = [("user" if r == "tool" else r) for n, r in enumerate(said) if said[n - 1 : n + 1] != ["tool"] * 2]
        if self.alternate and any(role != ROLES[1 + i % 2] for i, role in enumerate(as_read)):
            raise InputError(
                f"messages have the roles {', '.join(said)}; wanted user and assistant in turns, as the template "
                f"{self.name} has them"
            )
        if self.system_in_user and turns[0]["role"] == "system" and said[:1] != ["user"]:
            raise InputError(
                f"a system message alone; wanted one of the user behind it, as template {self.name} has it"
            )
        if add_generation_prompt and turns[-1]["role"] == "assistant":
            raise InputError("the last message is an answer already; wanted one of the user, to be answered")
        return turns

    def _split(self, part: str, weight: int) -> list[Piece]:
        names = sorted((*self.tokens, *self.tool_form.marks, "{bos}", "{eos}"), key=len, reverse=True)
        split = re.split("(" + "|".join(map(re.escape, names)) + ")", part)
        return [Piece(text, i % 2 == 1, weight, text.startswith(" ")) for i, text in enumerate(split) if text]

    def _id(self, tokenizer: Tokenizer, name: str) -> int:
        if name in ("{bos}", "{eos}"):
            return tokenizer.bos_id if name == "{bos}" else tokenizer.eos_id
        if name not in tokenizer.specials:
            raise InputError(
                f"the template {self.name} needs the special token {name!r}, which this tokenizer lacks; name another "
                "template with --template, or give a tokenizer that has it"
            )
        return tokenizer.specials[name]


def _of_parts(content: Any, number: int, role: str) -> Any:
    """The pieces of a user's text or parts; the text of others' parts, which may hold no image."""
    pieces = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image" and role == "user":
            pieces.append(IMAGE)
        elif kind == "image":
            raise InputError(f"message {number}, of role {role!r}, holds an image; wanted images in the user's alone")
        elif kind == "text" and isinstance(part.get("text"), str):
            pieces.append(Piece(part["text"], False, 0))
        else:
            raise InputError(
                f"message {number} has content of which a part is {one_line(repr(part), 40)}; wanted a text, or parts "
                '{"type": "text", "text": ...} and {"type": "image", ...}'
            )
    return pieces if role == "user" else "".join(piece.text for piece in pieces)


def _stripped(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces without the white space that they begin and end with."""
    pieces = list(pieces)
    if pieces:
        pieces[0] = pieces[0]._replace(text=pieces[0].text.lstrip())
        pieces[-1] = pieces[-1]._replace(text=pieces[-1].text.rstrip())
    return pieces


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces without empty ones, texts that follow each other with the same weight as one."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and not piece.is_token and not joined[-1].is_token and joined[-1].weight == piece.weight:
            joined[-1] = joined[-1]._replace(text=joined[-1].text + piece.text)
        elif piece.text:
            joined.append(piece)
    return joined
