"""Requests whose answer must have a form: JSON, one of several texts, or a call of a tool."""

from collections.abc import Sequence
from typing import Any

from gptjax.config.section import InputError, one_line
from gptjax.generation.constraint import Constraint, choices_constraint, json_constraint
from gptjax.serve.protocol import ApiError, ChatRequest, SampledRequest
from gptjax.serve.service import Service
from gptjax.tokenizer.templates import Template


def constraint_of(service: Service, asked: SampledRequest, *, chat: bool, spaced: bool) -> Constraint | None:
    """The constraint of a request's answers, None where they may be any text; raises ApiError for one that can't be."""
    wanted = asked.response_format
    forms: dict[str, Any] = {}
    if wanted and wanted.type != "text":
        forms["response_format"] = {"type": "object"}
        if wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise ApiError(400, "response_format: json_schema is missing", param="response_format")
            forms["response_format"] = wanted.json_schema.schema_
    if asked.guided_choice:
        forms["guided_choice"] = asked.guided_choice
    if isinstance(asked, ChatRequest) and asked.offered:
        forms["tools"] = forced_call(service, asked)
    if len(forms) > 1:
        raise ApiError(400, f"{' and '.join(forms)}: wanted one of them, an answer has one form", param=[*forms][0])
    [(param, form)] = forms.items() or [("", None)]
    if form is None:
        return None
    if asked.ignore_eos:
        raise ApiError(400, f"ignore_eos: wanted none with {param}, whose text ends", param="ignore_eos")
    make = choices_constraint if param == "guided_choice" else json_constraint
    ends: Sequence[int] = service.stop_ids(chat=chat)
    try:
        return make(service.tokenizer, form, ends, spaced=spaced, size=service.vocab_size)
    except InputError as e:
        raise ApiError(400, f"{param}: {one_line(e)}", param=param, code="invalid_value") from None


def forced_call(service: Service, asked: ChatRequest) -> dict[str, Any] | None:
    """The JSON schema of the call that tool_choice asks for; None where the model may choose."""
    choice, tools = asked.tool_choice or "auto", [tool["function"] for tool in asked.offered]
    if choice == "auto":
        return None
    named = [tool for tool in tools if choice in ("required", f"={tool['name']}")]
    if not named:
        names = ", ".join(tool["name"] for tool in tools)
        raise ApiError(
            400, f"tool_choice: there is no tool {choice[1:41]!r}; wanted one of {names}", param="tool_choice"
        )
    key = service.renderer.tool_form.arguments if isinstance(service.renderer, Template) else "arguments"
    calls = [
        {
            "type": "object", "required": ["name", key], "additionalProperties": False,
            "properties": {"name": {"const": tool["name"]}, key: tool.get("parameters") or {"type": "object"}},
        }
        for tool in named
    ]  # fmt: skip
    return calls[0] if len(calls) == 1 else {"anyOf": calls}
