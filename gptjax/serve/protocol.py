"""Requests in the form of OpenAI's API: their fields, their checks, and the errors by which one is refused.

Types are strict (no text for a number, no true for 1), numbers are finite. null is the default of every field. A field
that no answer could depend on (IGNORED) is not read; one of OpenAI's that is not had here is refused by name, and so is
one that is unknown: a setting that does nothing would be a wrong answer.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gptjax.config.section import InputError, one_line, unknown_name
from gptjax.data.images import Picture, from_data_url

R = TypeVar("R", bound="Request")

IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
IGNORED |= {"prompt_cache_retention"}
REFUSED = {
    "best_of": "ask for n answers instead",
    "suffix": "models here continue a prompt, they fill no gap",
    "functions": "they became tools",
    "function_call": "it became tool_choice",
    "audio": "models here write text",
    "modalities": "models here write text",
    "prediction": "every token is computed",
    "web_search_options": "no tool is run here",
    "reasoning_effort": "say it in a message",
    "verbosity": "say it in a message",
}
MOST_TOP = 20  # likeliest tokens of each place
MOST_STOPS = 16
MOST_CHOICES = 128


class ApiError(Exception):
    """A request that is refused: an HTTP status, and the fields of the API's error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Request(BaseModel):
    """The base of all requests."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = None


def parse_request(kind: type[R], body: bytes) -> R:
    """The request that a body holds; raises ApiError (400) for one that is no JSON, or not of this kind."""
    try:
        values = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as e:
        raise ApiError(400, f"the body is no JSON: {one_line(e, 120)}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body is {_kind(values)}; wanted an object", code="invalid_json")
    values = {name: value for name, value in values.items() if value is not None and name not in IGNORED}
    for name, why in REFUSED.items():
        if name in values and name not in kind.model_fields:
            raise ApiError(400, f"{name} is not had here: {why}", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(values)
    except ValidationError as e:
        raise _refusal(kind, e) from None


def _refusal(kind: type[Request], error: ValidationError) -> ApiError:
    """The first thing that is wrong, as one line."""
    first = error.errors(include_url=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    where = one_line(where, 80)
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        text = unknown_name(where, list(kind.model_fields)).replace("; see --help for all", "")
        return ApiError(400, text.replace("setting", "field"), param=where, code="unknown_parameter")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return ApiError(400, f"{where}: {cause}".removeprefix(": "), param=where or None, code="invalid_value")
    got = "" if first["type"] == "missing" else f" (got {_kind(first['input'])})"
    return ApiError(400, f"{where}: {first['msg']}{got}", param=where, code="invalid_value")


def _kind(value: Any) -> str:
    """A value of JSON for an error, cut where it is long."""
    names = {list: "a list", dict: "an object"}
    if type(value) in names:
        return names[type(value)]
    return one_line(repr(value[:40] if isinstance(value, str) else value), 60)


def _prompts(value: Any) -> list[str | list[int]]:
    """One prompt or several, each a text or ids, as a list; raises InputError for anything else."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(i) is int for i in value):
            return [value]
        if all(isinstance(text, str) for text in value):
            return value
        if all(isinstance(ids, list) and ids and all(type(i) is int for i in ids) for ids in value):
            return value
    raise InputError(f"got {_kind(value)}; wanted a text, texts, ids or lists of ids, none of the lists empty")


def _texts(value: Any) -> list[str]:
    """One text or several, none of them empty."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"got {_kind(value)}; wanted a text or texts, none of them empty")
    if len(texts) > MOST_STOPS:
        raise InputError(f"got {len(texts)} texts; wanted at most {MOST_STOPS}")
    return texts


def _content(value: Any) -> str | list[dict[str, Any]] | None:
    """The text of a message, its parts joined; where images are among these, the parts, each image with its URL."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InputError(f"got {_kind(value)}; wanted a text or a list of parts")
    parts = [_part(part, i) for i, part in enumerate(value)]
    return parts if any(part["type"] == "image" for part in parts) else "".join(part["text"] for part in parts)


def _part(part: Any, at: int) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else part
    if kind == "text" and isinstance(part, dict) and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind != "image_url" or not isinstance(part, dict):
        raise InputError(f"got a part {_kind(kind)}; models here read parts of type 'text', and some 'image_url'")
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        raise InputError(f'part {at} is an image_url with {_kind(url)}; wanted {{"url": "data:image/png;base64,..."}}')
    if isinstance(image, dict) and image.get("detail", "auto") not in ("auto", "low", "high"):
        raise InputError(f"part {at}: detail={_kind(image['detail'])}; wanted auto, low or high")
    return {"type": "image", "image": Picture.of(from_data_url(url, f"part {at}"), f"part {at}")}


def _bias(value: Any) -> dict[int, float]:
    """Biases by token id, whose keys JSON makes texts."""
    if not isinstance(value, dict) or len(value) > 1024:
        raise InputError(f"got {_kind(value)}; wanted an object of at most 1,024 token ids and their biases")
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise InputError(f"got the key {_kind(key)}; wanted a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise InputError(f"got {_kind(bias)} for token {key}; wanted a number from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}


Prompts = Annotated[Any, BeforeValidator(_prompts)]
Stops = Annotated[list[str], BeforeValidator(_texts)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    """Settings of a stream."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class NamedSchema(BaseModel):
    """A JSON schema that an answer must have."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of an answer: text, any JSON object, or JSON of a schema."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class SampledRequest(Request):
    """The settings that completions and chats have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """-1 and 0: from all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stops | None = None
    ignore_eos: bool | None = None
    """Goes on behind the ids that end a text, up to max_tokens."""
    response_format: ResponseFormat | None = None
    guided_choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)] | None = (
        None
    )
    """Texts of which the answer is one."""


class CompletionRequest(SampledRequest):
    """POST /v1/completions: continue prompts."""

    prompt: Prompts = [""]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None


class CalledFunction(BaseModel):
    """A call that a model made: the name of a function, and its arguments as JSON."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    arguments: str


class CallOfTool(BaseModel):
    """A call in an answer, by the id that the tool's message names."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    """A message; what a client sends back of an answer beside its text (refusal, annotations) must be empty."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, BeforeValidator(_content)] = None
    name: str | None = None
    """Of who speaks; templates have no place for it."""
    type: Literal["text", "message"] | None = None
    """Of no use, and sent by lm-eval."""
    tool_calls: list[CallOfTool] | None = None
    tool_call_id: str | None = None

    def plain(self, at: int) -> dict[str, Any]:
        """The message as templates read it; raises ApiError where it lacks a text, or says more than they have."""
        where = f"messages[{at}]"
        if more := [name for name, value in (self.model_extra or {}).items() if value]:
            name = one_line(more[0], 40)
            raise ApiError(400, f"{where}.{name}: there is no such field", param=f"{where}.{name}"[:80])
        role = "system" if self.role == "developer" else self.role
        if role != "user" and not isinstance(self.content, str | None):
            text = f"{where}.content: a message of the {self.role} holds an image; wanted images in the user's alone"
            raise ApiError(400, text, param=f"{where}.content", code="invalid_value")
        if self.content is None and not (role == "assistant" and self.tool_calls):
            raise ApiError(400, f"{where}.content: a text is missing", param=f"{where}.content", code="invalid_value")
        plain: dict[str, Any] = {"role": role, "content": _named(self.content or "", where)}
        if self.tool_calls:
            plain["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return plain | ({"tool_call_id": self.tool_call_id} if self.tool_call_id else {})


def _named(content: Any, where: str) -> Any:
    """A message's content whose images say where in the request they stand."""
    if isinstance(content, str):
        return content
    return [
        part | {"image": part["image"]._replace(origin=f"{where}: part {i}")} if part["type"] == "image" else part
        for i, part in enumerate(content)
    ]


class FunctionSpec(BaseModel):
    """A function that a model may ask for: its name, what it is for, and a JSON schema of its arguments."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OfferedTool(BaseModel):
    """A tool that a model may call."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: FunctionSpec


def _tool_choice(value: Any) -> str:
    """none, auto, required, or =NAME for the function of that name."""
    if value in ("none", "auto", "required"):
        return value
    named = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if isinstance(named, dict) and isinstance(named.get("name"), str):
        return f"={named['name']}"
    raise InputError(f"got {_kind(value)}; wanted none, auto, required, or a function by its name")


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
Tools = Annotated[list[OfferedTool], Field(max_length=128)]


class ChatRequest(SampledRequest):
    """POST /v1/chat/completions: answer the last message."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    tools: Tools | None = None
    tool_choice: Annotated[str, BeforeValidator(_tool_choice)] | None = None
    parallel_tool_calls: bool | None = None
    """False: of several calls the first."""

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model is told of, as templates read them: none with tool_choice none."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        return [tool.model_dump(exclude_none=True) for tool in tools]


class EmbeddingRequest(Request):
    """POST /v1/embeddings: the mean of the last hidden states of each text, of length 1."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None


class TokenizeRequest(Request):
    """POST /tokenize: the ids of a text or of a conversation."""

    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = None
    """With the id that prompts begin with, where the model has one; True where it is not given."""
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Request):
    """POST /detokenize: the text of ids."""

    tokens: list[int]
