"""Tools that a model may call: a calculator, search in a folder, and functions of the user's."""

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gptjax.config.plugins import is_name, resolve
from gptjax.config.section import InputError, one_line
from gptjax.serve.calculator import calculate
from gptjax.serve.search import Index
from gptjax.tokenizer import Tokenizer
from gptjax.tokenizer.tool_calls import ToolSpec

MOST_RESULT = 4_000  # characters of a result that the model is given
KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
ACCEPTED: dict[str, Any] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict
}  # fmt: skip


class Tool(NamedTuple):
    """A function with what a model is told of it: parameters are a JSON schema."""

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[..., Any]

    def spec(self) -> ToolSpec:
        """The tool as OpenAI's API has it."""
        told = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": told}


class Toolbox:
    """Tools by name. `call` gives a text in every case: what went wrong is told to the model."""

    def __init__(self, tools: Sequence[Tool]):
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) < len(tools):
            names = ", ".join(tool.name for tool in tools)
            raise InputError(f"tools: {names}; wanted different names, rename a function")

    @property
    def specs(self) -> list[ToolSpec]:
        """The tools as OpenAI's API has them."""
        return [tool.spec() for tool in self._tools.values()]

    def call(self, name: str, arguments_json: str) -> str:
        """The result of a call as text, or "error: " and a line for wrong names and arguments, and where it fails."""
        try:
            tool = self._tools.get(name)
            if tool is None:
                raise InputError(f"there is no tool {one_line(name, 40)!r}; wanted one of {', '.join(self._tools)}")
            result = tool.function(**_arguments(tool, arguments_json))
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except InputError as e:
            return f"error: {one_line(e)}"
        except Exception as e:  # of the user's own function
            return f"error: {type(e).__name__}: {one_line(e)}"
        if len(text) > MOST_RESULT:
            return f"{text[:MOST_RESULT]}\n(the first {MOST_RESULT:,} of {len(text):,} characters)"
        return text


def _arguments(tool: Tool, text: str) -> dict[str, Any]:
    """The arguments of a call, of the names and kinds that the tool has; raises InputError for others."""
    try:
        given = json.loads(text or "{}")
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise InputError(f"arguments {one_line(text, 60)!r}: wanted a JSON object")
    known, needed = tool.parameters["properties"], tool.parameters["required"]
    if wrong := [*(n for n in given if n not in known), *(n for n in needed if n not in given)]:
        kind = "unknown" if wrong[0] in given else "missing"
        raise InputError(f"argument {one_line(wrong[0], 40)!r} is {kind}; {tool.name} takes {', '.join(known)}")
    for name, value in given.items():
        kind = known[name].get("type", "")
        accepted = ACCEPTED.get(kind, object)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind in ("integer", "number")):
            raise InputError(f"argument {name}={one_line(repr(value), 40)}: wanted {kind}")
        if "enum" in known[name] and value not in known[name]["enum"]:
            raise InputError(f"argument {name}={one_line(repr(value), 40)}: wanted one of {known[name]['enum']}")
    return given


def open_tools(names: str) -> Toolbox:
    """The tools of a setting, divided by commas: calculator, search:FOLDER, and module:function of the user's own.

    Raises InputError for others. A module is imported, so the names must be the user's, never those of a data folder.
    """
    return Toolbox([_open(name.strip()) for name in names.split(",") if name.strip()])


def check_template(tokenizer: Tokenizer) -> None:
    """Raises InputError for a tokenizer without a chat template, in which alone a model is told of tools."""
    if not tokenizer.template:
        raise InputError(
            "tools: this run has no chat template, in which a model is told of them; name one with --template"
        )


def _open(name: str) -> Tool:
    if name == "calculator":
        return calculator_tool()
    if name.startswith("search:"):
        return search_tool(Index(name.removeprefix("search:")))
    if is_name(name):
        return function_tool(resolve(name, "tools"))
    raise InputError(f"tools={name!r}: wanted calculator, search:FOLDER or module:function, divided by commas")


def calculator_tool() -> Tool:
    """The calculator as a tool: see `calculate`."""
    described = "An expression of numbers, + - * / // % ** and parentheses, such as (12 + 3) * 4.5"
    return Tool(
        "calculator",
        "Computes the exact value of an arithmetic expression.",
        _schema({"expression": {"type": "string", "description": described}}, ["expression"]),
        calculate,
    )


def search_tool(index: Index) -> Tool:
    """Search in a folder as a tool: passages, each behind its file and line."""

    def search(query: str, results: int = 3) -> str:
        found = index.search(query, max(1, min(results, 10)))
        return "\n\n".join(f"[{p.file}:{p.line}]\n{p.text}" for p in found) or "nothing was found"

    properties = {
        "query": {"type": "string", "description": "Words to look for"},
        "results": {"type": "integer", "description": "Passages to return, 1 to 10; 3 if not given"},
    }
    return Tool("search", "Finds passages in the user's files.", _schema(properties, ["query"]), search)


def function_tool(function: Callable[..., Any]) -> Tool:
    """A function of the user's as a tool: its name, its docstring, and the types and defaults of its parameters.

    Raises InputError for one without a docstring, and for parameters that JSON can't give by name.
    """
    name, doc = function.__name__, inspect.getdoc(function)
    if not doc:
        raise InputError(f"tool {name}: the function has no docstring; wanted one, by which the model knows its use")
    try:
        hints = typing.get_type_hints(function)
    except Exception as e:
        raise InputError(f"tool {name}: its annotations can't be read ({one_line(e)})") from e
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise InputError(f"tool {name}: parameter {parameter} has no name of its own; wanted plain parameters")
        properties[parameter.name] = _kind(hints.get(parameter.name, str), f"tool {name}: {parameter.name}")
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    return Tool(name, doc, _schema(properties, required), function)


def _schema(properties: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(required)}


def _kind(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type; raises InputError where there is none."""
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        kind = KINDS.get(type(of[0])) if len({type(value) for value in of}) == 1 else None
        return {**({"type": kind} if kind else {}), "enum": list(of)}
    if origin in (typing.Union, types.UnionType) and len(rest := [t for t in of if t is not type(None)]) == 1:
        return _kind(rest[0], where)  # what may be None may be left out
    kind = KINDS.get(origin or hint)
    if kind is None:
        raise InputError(f"{where} has the type {hint}; wanted str, int, float, bool, list, dict or Literal")
    return {"type": kind, **({"items": _kind(of[0], where)} if origin is list and of else {})}
