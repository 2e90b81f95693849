"""Tools in conversations: calls in a model's text, and the forms in which templates write tools, calls and results.

A form's marks are special tokens where the tokenizer has them, and text elsewhere; names, arguments and results are
text and become no special token.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gptjax.config.section import InputError, one_line

ToolSpec = Mapping[str, Any]
"""A tool as OpenAI's API has it: {"type": "function", "function": {"name", "description", "parameters"}}."""
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_LLAMA_MARK = "<|python_tag|>"


class ToolCall(NamedTuple):
    """A call of a tool: its arguments are a JSON object, as text."""

    id: str
    name: str
    arguments: str

    def as_openai(self) -> dict[str, Any]:
        """The call in a message of the assistant, as OpenAI's API has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, kw_only=True)
class ToolForm:
    """The texts by which a template tells a model of tools, writes its calls and reads their results.

    The tools stand, each as JSON within the texts `each`, between `intro` and `outro`: at the end of the system
    message, or with `in_user` at the beginning of the user's first one.
    """

    marks: tuple[str, ...] = ()
    intro: str
    each: tuple[str, str]
    outro: str = ""
    indent: int | None = None
    in_user: bool = False
    system: str = ""
    """Opens the system message where there are tools, in place of the template's; empty: the template's."""
    arguments: str = "arguments"
    call: tuple[str, str]
    several: bool = True
    """An answer may have more than one call."""
    result: tuple[str, str]
    turn: tuple[str, str] | None = None
    """Opens and ends the turn of a result; None: results that follow each other are one turn of the user, in lines."""
    quoted: bool = False
    """A result is written as a JSON string."""

    def described(self, tools: Sequence[ToolSpec]) -> list[tuple[str, bool]]:
        """The tools as (text, True for one of the form's own) pairs."""
        before, after = self.each
        each = [part for tool in tools for part in ((before, True), (self._json(tool), False), (after, True))]
        return [(self.intro, True), *each, (self.outro, True)]

    def written(self, call: ToolCall) -> list[tuple[str, bool]]:
        """The call as a model writes it, as (text, True for one of the form's own) pairs."""
        name = json.dumps(call.name, ensure_ascii=False)
        arguments = json.dumps(json.loads(call.arguments), ensure_ascii=False)
        text = f'{{"name": {name}, "{self.arguments}": {arguments}}}'
        return [(self.call[0], True), (text, False), (self.call[1], True)]

    def read(self, result: str) -> list[tuple[str, bool]]:
        """The result of a call as the model reads it, as (text, True for one of the form's own) pairs."""
        text = json.dumps(result, ensure_ascii=False) if self.quoted else result
        return [(self.result[0], True), (text, False), (self.result[1], True)]

    def _json(self, tool: ToolSpec) -> str:
        return json.dumps(tool, ensure_ascii=False, indent=self.indent)


# The form of Hermes 2 Pro and Qwen 2.5, in the words of Qwen's template.
HERMES = ToolForm(
    marks=(OPEN, CLOSE, "<tool_response>", "</tool_response>"),
    intro=(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
        "function signatures within <tools></tools> XML tags:\n<tools>"
    ),
    each=("\n", ""),
    outro=(
        "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        f"{OPEN}{CLOSE} XML tags:\n{OPEN}\n"
        f'{{"name": <function-name>, "arguments": <args-json-object>}}\n{CLOSE}'
    ),
    call=(f"{OPEN}\n", f"\n{CLOSE}"),
    result=("<tool_response>\n", "\n</tool_response>"),
)
LLAMA = ToolForm(
    intro=(
        "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
        'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
        "argument name and its value}.Do not use variables.\n\n"
    ),
    each=("", "\n\n"),
    indent=4,
    in_user=True,
    arguments="parameters",
    call=("", ""),
    several=False,
    result=("", ""),
    turn=("<|start_header_id|>ipython<|end_header_id|>\n\n", "<|eot_id|>"),
    quoted=True,
)


def parse_calls(text: str) -> tuple[str, list[ToolCall]]:
    """The text of an answer without the calls in it, and the calls.

    A call is {"name": ..., "arguments": {...}} between <tool_call> and </tool_call> (Hermes, Qwen), or the whole answer
    is {"name": ..., "parameters": {...}} (Llama 3.1). Between the marks, what is no such object stays in the text.
    """
    calls, kept, rest = [], [], text
    while OPEN in rest:
        before, _, behind = rest.partition(OPEN)
        inside, _, after = behind.partition(CLOSE)
        if (call := _call_of(inside, "arguments")) is None:
            kept.append(before + OPEN)
            rest = behind
            continue
        calls.append(call)
        kept.append(before)
        rest = after.lstrip() if after.lstrip().startswith(OPEN) else after
    if not calls and (call := _call_of(text.strip().removeprefix(_LLAMA_MARK), "parameters")):
        return "", [call]
    kept.append(rest)
    return ("".join(kept).strip() if calls else text), calls


def begins_call(text: str) -> int:
    """Characters at the start of a text that can be no part of a call, whatever follows it."""
    if (stripped := text.lstrip())[:1] == "{" or _LLAMA_MARK.startswith(stripped[: len(_LLAMA_MARK)]):
        return 0
    if (at := text.find(OPEN)) >= 0:
        return at
    return len(text) - max((n for n in range(1, len(OPEN)) if text.endswith(OPEN[:n])), default=0)


def _call_of(text: str, key: str) -> ToolCall | None:
    """The call that a JSON object makes; None where the text is none."""
    try:
        found = json.loads(text, parse_constant=_refuse)
        name, arguments = found["name"], found.get(key, {})
        arguments = json.loads(arguments, parse_constant=_refuse) if isinstance(arguments, str) else arguments
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    if key == "parameters" and key not in found:
        return None  # any object with a name, which a user may have asked for
    try:
        written = json.dumps(arguments, ensure_ascii=False)
        (name + written).encode()  # half a surrogate pair, as \ud800 gives it, is no text
    except UnicodeEncodeError:
        return None
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", name, written)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def checked_calls(value: Any, where: str) -> list[ToolCall]:
    """The `tool_calls` of a message, in OpenAI's form; arguments may be an object. Raises InputError for others."""
    wanted = 'a list of {"id": ..., "type": "function", "function": {"name": ..., "arguments": a JSON object}}'
    calls = []
    for call in value if isinstance(value, list) and value else [None]:
        call = call if isinstance(call, Mapping) else {}
        function = call.get("function")
        name, given = (function.get(k) for k in ("name", "arguments")) if isinstance(function, Mapping) else (None,) * 2
        try:
            arguments = json.loads(given, parse_constant=_refuse) if isinstance(given, str) else given
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
            raise InputError(f"{where} has tool_calls {one_line(repr(value), 80)}; wanted {wanted}")
        written = given if isinstance(given, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(ToolCall(str(call.get("id") or ""), name, written))
    return calls


def checked_tools(value: Any, where: str) -> list[ToolSpec]:
    """The tools of a conversation, in OpenAI's form; raises InputError for others."""
    for tool in value if isinstance(value, list) else [None]:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise InputError(
                f"{where} has tools {one_line(repr(value), 80)}; wanted a list of "
                '{"type": "function", "function": {"name": ..., "description": ..., "parameters": a JSON schema}}'
            )
    return list(value)
