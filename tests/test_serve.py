"""Laws of the server: OpenAI's forms, refusals that say why, clients that are slow, hostile or gone. No model runs."""

import asyncio
import base64
import contextlib
import http.client
import json
import os
import random
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fake_scheduler import CONTEXT, FakeScheduler, fake_service
from serving import serving

MIXED = "Hé, 你好 🙂: the end"
USER = [{"role": "user", "content": "hi"}]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def api():
    """A client of a server that answers everybody MIXED."""
    with serving(fake_service(MIXED)) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client


def post(client, path, status=200, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def events(client, path, **body) -> list[dict]:
    """The objects of a stream, which must end with [DONE]."""
    answer = client.post(path, json=body | {"stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_an_answer_has_openais_form(api):
    said = post(api, "/v1/chat/completions", model="fake", messages=USER, seed=5)
    [choice] = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": MIXED, "refusal": None}
    assert choice["index"] == 0 and choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert said["object"] == "chat.completion" and said["id"].startswith("chatcmpl-") and said["model"] == "fake"
    assert said["seed"] == 5 and said["system_fingerprint"] == "step-7"
    used = said["usage"]
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
    assert used["prompt_tokens_details"] == {"cached_tokens": 2}
    given = {post(api, "/v1/chat/completions", messages=USER)["seed"] for _ in range(3)}
    assert len(given) == 3, "a seed that is not given is random, and is said"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_joined_is_the_answer_and_has_one_id(api, path):
    asked = {"messages": USER} if "chat" in path else {"prompt": "hi", "max_tokens": 40}
    asked |= {"seed": 3, "logprobs": True if "chat" in path else 2}
    whole = post(api, path, **asked)
    got = events(api, path, **asked, stream_options={"include_usage": True})
    *chunks, usage = got
    assert len({(c["id"], c["created"], c["model"], c["seed"]) for c in got}) == 1
    assert usage["choices"] == [] and usage["usage"] == whole["usage"] and all(c["usage"] is None for c in chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]
    if "chat" in path:
        assert whole["object"] == "chat.completion" and {c["object"] for c in got} == {"chat.completion.chunk"}
        assert choices[0]["delta"] == {"role": "assistant", "content": ""} and choices[-1]["delta"] == {}
        assert "".join(c["delta"].get("content", "") for c in choices) == MIXED
        scores = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert scores == whole["choices"][0]["logprobs"]["content"]
    else:
        assert "".join(c["text"] for c in choices) == MIXED == whole["choices"][0]["text"]
        for name, values in whole["choices"][0]["logprobs"].items():
            assert [v for c in choices for v in c["logprobs"][name]] == values
    assert "usage" not in events(api, path, **asked)[-1]


def test_no_piece_of_a_stream_splits_a_character(api):
    """The fake model's tokens are bytes, three at a time."""
    got = events(api, "/v1/chat/completions", messages=USER)
    pieces = [c["choices"][0]["delta"].get("content", "") for c in got]
    assert "".join(pieces) == MIXED and not any("\ufffd" in piece for piece in pieces) and len(pieces) > 6


def test_several_answers_and_several_prompts_are_told_apart(api):
    said = post(api, "/v1/chat/completions", messages=USER, n=3)
    assert [c["message"]["content"] for c in said["choices"]] == [MIXED, MIXED[1:], MIXED[2:]]
    assert said["usage"]["prompt_tokens"] == post(api, "/v1/chat/completions", messages=USER)["usage"]["prompt_tokens"]
    streamed = ["", "", ""]
    for event in events(api, "/v1/chat/completions", messages=USER, n=3):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == [MIXED, MIXED[1:], MIXED[2:]]
    said = post(api, "/v1/completions", prompt=["a", "b", "a"], n=2, max_tokens=40)
    copies = [MIXED[:40], MIXED[1:]]
    assert [c["index"] for c in said["choices"]] == list(range(6))
    texts = [c["text"] for c in said["choices"]]
    assert texts[:4] == copies * 2 and texts[4:] == [MIXED[2:], MIXED[3:]], "equal prompts get different samples"
    assert said["usage"]["prompt_tokens"] == 6


def test_tokens_and_their_bytes_join_to_the_text(api):
    asked = {"messages": USER, "logprobs": True, "top_logprobs": 3}
    for stop in (None, ["end"], [" 🙂"]):
        choice = post(api, "/v1/chat/completions", **asked, stop=stop)["choices"][0]
        text, scores = choice["message"]["content"], choice["logprobs"]["content"]
        assert text == (MIXED.split(stop[0])[0] if stop else MIXED)
        assert b"".join(bytes(entry["bytes"]) for entry in scores).decode() == text, "no end token, nothing cut off"
        assert [len(entry["top_logprobs"]) for entry in scores] == [3] * len(scores)
        assert scores[0]["top_logprobs"][2] == {"token": "\\xce", "logprob": -0.3, "bytes": [206]}
    assert post(api, "/v1/chat/completions", messages=USER, logprobs=True)["choices"][0]["logprobs"]["content"]


@pytest.mark.parametrize("prompt", ["né你", [256, *"né你".encode()]], ids=["text", "ids"])
def test_echo_scores_the_prompt_and_offsets_are_characters(api, prompt):
    asked = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 6}
    [choice] = post(api, "/v1/completions", **asked)["choices"]
    scores, text = choice["logprobs"], choice["text"]
    assert text.startswith("né你Hé") and choice["finish_reason"] == "length"
    assert len({len(values) for values in scores.values()}) == 1 and len(scores["tokens"]) == 1 + 6 + 6
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    assert scores["token_logprobs"][1:7] == [-1.0] * 6, "the prompt's own, with the first token's unknown"
    assert scores["tokens"][:4] == ["<s>", "n", "bytes:\\xc3", "bytes:\\xa9"]
    assert scores["text_offset"][:8] == [0, 0, 1, 1, 2, 2, 2, 3]
    whole = [(at, token) for at, token in zip(scores["text_offset"], scores["tokens"]) if len(token) == 1]
    assert all(text[at] == token for at, token in whole) and len(whole) >= 3
    alone = post(api, "/v1/completions", **asked | {"max_tokens": 0})["choices"][0]
    assert alone["text"] == "né你" and alone["logprobs"]["token_logprobs"] == scores["token_logprobs"][:7]


def test_the_one_token_of_a_scored_text_is_there_also_where_it_ends_the_text():
    """lm-eval takes the last log-probability away unseen."""
    with serving(fake_service("")) as url, httpx.Client(base_url=url) as client:
        [choice] = post(client, "/v1/completions", prompt="ab", echo=True, logprobs=1, max_tokens=1)["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == 4 and choice["text"] == "ab"
    assert choice["finish_reason"] == "stop"


def test_prompts_come_in_all_four_forms_and_settings_arrive(api):
    service = fake_service("x")
    with serving(service) as url, httpx.Client(base_url=url) as client:
        ids = [256, 104, 105]
        for prompt in ("hi", ["hi"], ids, [ids]):
            post(client, "/v1/completions", prompt=prompt)
        post(client, "/v1/completions", prompt="", max_tokens=3, temperature=0, top_p=0.5, top_k=-1, min_p=0.1, seed=9,
             presence_penalty=1, frequency_penalty=-2, repetition_penalty=1.5, logit_bias={"65": -100}, ignore_eos=True,
             stop="q", user="u", metadata={"a": 1}, store=True)  # fmt: skip
        submitted = service.scheduler.submitted
    assert [s.ids for s in submitted[:4]] == [ids] * 4 and {s.max_new_tokens for s in submitted[:4]} == {16}
    last, drawn = submitted[4], submitted[4].sampling
    assert last.ids == [256] and last.max_new_tokens == 3 and not last.stop_ids
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.min_p, drawn.seed) == (0, 0.5, 0, 0.1, 9)
    assert (drawn.presence_penalty, drawn.frequency_penalty, drawn.repetition_penalty) == (1, -2, 1.5)
    assert drawn.logit_bias == {65: -100}


def test_messages_of_every_form_are_read_and_the_servers_system_message_stands_before_them():
    service = fake_service("x", template="chatml", system="be brief")
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    with serving(service) as url, httpx.Client(base_url=url) as client:
        for content in ("hi", parts):
            message = {"role": "user", "content": content, "name": "me", "type": "text"}  # as lm-eval sends it
            post(client, "/v1/chat/completions", messages=[message])
        post(client, "/v1/chat/completions", messages=[{"role": "developer", "content": "own"}, *USER])
        back = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "tool_calls": None}
        post(client, "/v1/chat/completions", messages=[*USER, back, *USER])
        texts = [service.tokenizer.decode(s.ids) for s in service.scheduler.submitted]
        asked = post(client, "/tokenize", messages=USER)["tokens"]
        assert asked == service.scheduler.submitted[0].ids
    assert texts[0] == texts[1] == "system\nbe brief\nuser\nhi\nassistant\n" and texts[2].startswith("system\nown\n")


def test_a_base_model_answers_through_a_transcript():
    service = fake_service("Paris.\nUser: and", template="")
    with serving(service) as url, httpx.Client(base_url=url) as client:
        said = post(client, "/v1/chat/completions", messages=USER)
        assert said["choices"][0]["message"]["content"] == "Paris." and said["choices"][0]["finish_reason"] == "stop"
        for roles in ("ut", "ua", "us", "t"):
            names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
            messages = [{"role": names[r], "content": "x", "tool_call_id": "c"} for r in roles]
            assert post(client, "/v1/chat/completions", 400, messages=messages)["type"] == "invalid_request_error"
        tools = [{"type": "function", "function": {"name": "f"}}]
        assert "template" in post(client, "/v1/chat/completions", 400, messages=USER, tools=tools)["message"]
    assert service.tokenizer.decode(service.scheduler.submitted[0].ids).endswith("\nUser: hi\nAssistant:")


CALL = '{"name": "add", "arguments": {"a": 1, "b": "é"}}'


@pytest.mark.parametrize("text", [f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>", "No <tool_call at all <b>."])
def test_calls_of_tools_are_returned_and_never_shown_as_text(text):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    asked = {"messages": USER, "tools": tools}
    service = fake_service(text, template="chatml", context=2048)
    with serving(service) as url, httpx.Client(base_url=url) as client:
        choice = post(client, "/v1/chat/completions", **asked)["choices"][0]
        deltas = [event["choices"][0] for event in events(client, "/v1/chat/completions", **asked)]
        plain = post(client, "/v1/chat/completions", **asked | {"tool_choice": "none"})["choices"][0]
        told = [service.tokenizer.decode(s.ids) for s in service.scheduler.submitted]
    streamed = "".join(d["delta"].get("content", "") for d in deltas)
    called = [call for d in deltas for call in d["delta"].get("tool_calls", [])]
    assert plain["message"]["content"] == text and "add" in told[0] and "add" not in told[2]
    if "</tool_call>" not in text:
        assert streamed == choice["message"]["content"] == text and not called
        assert deltas[-1]["finish_reason"] == choice["finish_reason"] == "stop"
        return
    assert streamed == choice["message"]["content"] == "Let me see."
    [call], [one] = choice["message"]["tool_calls"], called
    assert call["function"] == one["function"] and call["type"] == "function" and one["index"] == 0
    assert json.loads(call["function"]["arguments"]) == {"a": 1, "b": "é"} and call["function"]["name"] == "add"
    assert deltas[-1]["finish_reason"] == choice["finish_reason"] == "tool_calls"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def test_answers_of_a_form_have_it():
    """The fake writes the first id that may come, over and over."""
    with serving(fake_service("x", context=2048)) as url, httpx.Client(base_url=url) as client:
        for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}):
            asked = {"messages": USER, "response_format": form, "max_tokens": 30}
            choice = post(client, "/v1/chat/completions", **asked)["choices"][0]
            text = choice["message"]["content"]
            assert choice["finish_reason"] == "stop", "it is whole, also with its last token"
            assert isinstance(json.loads(text), dict) and ("a" in text) == ("json_schema" in form)
        said = post(client, "/v1/completions", prompt="x", guided_choice=["yes", "yesterday"])["choices"][0]
        assert said["text"] == "yes"
        tools = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("f", "g")]
        asked = {"messages": USER, "tools": tools, "max_tokens": 60}
        named = {"type": "function", "function": {"name": "g"}}
        for choice, names in (("required", "fg"), (named, "g")):
            said = post(client, "/v1/chat/completions", **asked, tool_choice=choice)["choices"][0]
            got = events(client, "/v1/chat/completions", **asked, tool_choice=choice)
            [call] = said["message"]["tool_calls"]
            [streamed] = [c for e in got for c in e["choices"][0]["delta"].get("tool_calls", [])]
            assert call["function"]["name"] in names and call["function"] == streamed["function"]
            assert set(json.loads(call["function"]["arguments"])) == {"a"} and said["message"]["content"] is None
            assert said["finish_reason"] == got[-1]["choices"][0]["finish_reason"] == "tool_calls"
            assert not any(e["choices"][0]["delta"].get("content") for e in got)
        refused = {
            "tool_choice": {"tool_choice": {"type": "function", "function": {"name": "h"}}, "tools": tools},
            "response_format": {"response_format": {"type": "json_schema"}},
            "ignore_eos": {"response_format": {"type": "json_object"}, "ignore_eos": True},
        }  # fmt: skip
        for param, body in refused.items():
            assert post(client, "/v1/chat/completions", 400, messages=USER, **body)["param"] == param
        both = {"response_format": {"type": "json_object"}, "tools": tools}
        assert "one form" in post(client, "/v1/chat/completions", 400, messages=USER, **both)["message"]
        short = {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}, "max_tokens": 3}
        assert "at least" in post(client, "/v1/chat/completions", 400, messages=USER, **short)["message"]
        odd = {"type": "json_schema", "json_schema": {"schema": {"type": "colour"}}}
        assert (
            post(client, "/v1/chat/completions", 400, messages=USER, response_format=odd)["param"] == "response_format"
        )


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers_and_an_answer_is_cut_only_where_it_may(api):
    error = post(api, "/v1/completions", 400, prompt="x" * 300)
    assert error["code"] == "context_length_exceeded" and "256" in error["message"] and "301" in error["message"]
    error = post(api, "/v1/completions", 400, prompt="x" * 250, max_tokens=10)
    assert error["code"] == "context_length_exceeded" and "261" in error["message"] and error["param"] == "prompt"
    assert post(api, "/v1/completions", prompt="x" * 250)["usage"]["completion_tokens"] == CONTEXT - 251
    error = post(api, "/v1/chat/completions", 400, messages=[{"role": "user", "content": "x" * 300}])
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"


REFUSED = [
    ({"temprature": 1}, "temprature", "did you mean temperature"),
    ({"temperature": "1"}, "temperature", "valid number"),
    ({"temperature": True}, "temperature", "valid number"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_k": 1.5}, "top_k", "integer"),
    ({"seed": -1}, "seed", "greater than or equal"),
    ({"seed": 2**32}, "seed", "less than"),
    ({"seed": 10**30}, "seed", ""),
    ({"max_tokens": -1}, "max_tokens", "greater than or equal"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 50}, "n", "wanted at most 8"),
    ({"stop": ["a", ""]}, "stop", "none of them empty"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token id"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
    ({"logit_bias": {"5000": 1}}, None, "0 to 257"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream true"),
    ({"best_of": 2}, "best_of", "n answers"),
    ({"suffix": "x"}, "suffix", "continue"),
    ({"model": "gpt-4"}, "model", "'fake'"),
    ({"prompt": []}, "prompt", "wanted a text"),
    ({"prompt": [[]]}, "prompt", "wanted a text"),
    ({"prompt": ["a", 5]}, "prompt", "wanted a text"),
    ({"prompt": [True]}, "prompt", "wanted a text"),
    ({"prompt": [5, 258]}, None, "0 to 257"),
    ({"prompt": [-1]}, None, "0 to 257"),
    ({"prompt": ["a"] * 9}, "prompt", "at most 8"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"logprobs": True}, "logprobs", "integer"),
]


@pytest.mark.parametrize("body, param, says", REFUSED, ids=[str(body)[:40] for body, _, _ in REFUSED])
def test_what_is_wrong_is_said_by_its_field(api, body, param, says):
    error = post(api, "/v1/completions", 404 if "model" in body else 400, **({"prompt": "x"} | body))
    assert error["param"] == param and says in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "messages[0].colour"),
    ({"messages": USER, "top_logprobs": 2}, "top_logprobs"),
    ({"messages": USER, "max_tokens": 0}, "max_tokens"),
    ({"messages": USER, "functions": [{}]}, "functions"),
    ({"messages": USER, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"messages": USER, "tool_choice": "sometimes"}, "tool_choice"),
    ({"messages": USER, "response_format": {"type": "xml"}}, "response_format.type"),
    ({"messages": [*USER, {"role": "assistant", "content": "x"}]}, None),
]


@pytest.mark.parametrize("body, param", CHATS, ids=[str(body)[:60] for body, _ in CHATS])
def test_a_chat_that_is_none_is_refused(api, body, param):
    assert post(api, "/v1/chat/completions", 400, **body)["param"] == param


HOSTILE = {
    "empty": b"", "a list": b"[]", "a number": b"1", "brackets": b"[" * 100_000, "objects": b'{"a":' * 100_000,
    "NaN": b'{"prompt": "x", "temperature": NaN}', "infinity": b'{"prompt": "x", "temperature": 1e999}',
    "half a pair": b'{"prompt": "\\ud800"}', "half a pair in a name": b'{"\\udfff": 1}',
    "no UTF-8": b'{"prompt": "\xff"}',
    "a huge number": b'{"prompt": "x", "seed": ' + b"9" * 100_000 + b"}", "truncated": b'{"prompt": "x"',
    "a schema of brackets": b'{"messages":[{"role":"user","content":"x"}],"tools":' + b"[" * 500 + b"]" * 500 + b"}",
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"])
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_body_is_refused_with_a_reason(api, path, body):
    answer = api.post(path, content=body, headers=JSON)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert post(api, "/v1/completions", prompt="a\0b")["usage"]["prompt_tokens"] == 4, "the next one is answered"


def test_paths_methods_types_and_sizes(api):
    service = fake_service("x", max_body=1000)
    for method, path, status in (
        ("GET", "/v1/nope", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/", 404), ("GET", "/v1/models/gpt-4", 404), ("GET", "/v1/models/fake", 200),
    ):  # fmt: skip
        answer = api.request(method, path)
        assert answer.status_code == status and (status == 200 or answer.json()["error"]["message"]), path
    answer = api.post("/v1/completions", data={"prompt": "x"})
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]
    assert api.post("/v1/completions", content=b"{}", headers=JSON | {"Content-Encoding": "gzip"}).status_code == 415
    with serving(service) as url, httpx.Client(base_url=url) as client:
        for body in (b" " * 1001, iter([b" " * 600] * 2)):  # by its length, and by what comes
            answer = client.post("/v1/completions", content=body, headers=JSON)
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
        assert client.post("/v1/completions", content=b'{"prompt": "x"}', headers=JSON).status_code == 200


def test_only_known_hosts_and_origins_may_call():
    service = fake_service("x", hosts=("chat.example.org",), origins=("https://other.example.org",))
    with serving(service) as url, httpx.Client(base_url=url) as client:
        port = url.rpartition(":")[2]
        for host, status in (
            (f"127.0.0.1:{port}", 200), ("localhost", 200), ("[::1]:80", 200), ("chat.example.org", 200),
            ("10.0.0.1", 200), ("evil.example.org", 403), ("127.0.0.1.evil.org", 403), ("[", 403), ("", 403),
        ):  # fmt: skip
            assert client.get("/v1/models", headers={"Host": host}).status_code == status, host
        own = f"http://127.0.0.1:{port}"
        for origin, status in (
            (own, 200),
            ("https://other.example.org", 200),
            ("https://evil.org", 403),
            ("null", 403),
        ):
            answer = client.get("/v1/models", headers={"Origin": origin})
            assert answer.status_code == status, origin
            named = origin if "other" in origin else None
            assert answer.headers.get("access-control-allow-origin") == named
        ask = {"Origin": "https://other.example.org", "Access-Control-Request-Method": "POST"}
        allowed = client.options("/v1/completions", headers=ask)
        assert allowed.status_code == 204 and "POST" in allowed.headers["access-control-allow-methods"]
        assert client.options("/v1/completions", headers=ask | {"Origin": "https://evil.org"}).status_code == 403


def test_a_key_is_asked_for_everywhere_but_health():
    service = fake_service("x", api_key="secret")
    with serving(service) as url, httpx.Client(base_url=url) as client:
        for path in ("/v1/models", "/metrics", "/tokenizer_info", "/nope"):
            for given in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "secret"},
                {"Authorization": "Bearer"},
            ):
                answer = client.get(path, headers=given)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", path
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").json() == {"status": "ok", "model": "fake", "step": 7}


def test_a_full_queue_is_429_with_a_time_to_come_back():
    service = fake_service("x" * 200, max_waiting=2, slots=1)
    service.scheduler.seconds, service.scheduler.chunk = 0.1, 1
    with serving(service) as url, httpx.Client(base_url=url, timeout=20) as client:
        with client.stream("POST", "/v1/chat/completions", json={"messages": USER, "stream": True}):
            wait_for(lambda: service.scheduler.stats.running == 1)
            threads = [threading.Thread(target=post, args=(client, "/v1/completions"), kwargs={"prompt": "a"})
                       for _ in range(2)]  # fmt: skip
            for thread in threads:
                thread.start()
            wait_for(lambda: service.scheduler.stats.waiting == 2)
            answer = client.post("/v1/completions", json={"prompt": "b"})
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"
            assert "gptjax_waiting 2.0" in client.get("/metrics").text
            service.scheduler.seconds = 0
        for thread in threads:
            thread.join()
        assert post(client, "/v1/completions", prompt="b")["choices"][0]["text"] == "x" * 16


def wait_for(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(stream):
    service = fake_service("x" * 240)
    service.scheduler.seconds, stats = 0.05, service.scheduler.stats
    with serving(service) as url:
        with pytest.raises(httpx.TimeoutException), httpx.Client(base_url=url, timeout=0.4) as client:
            body = {"messages": USER, "stream": stream, "n": 3}
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                wait_for(lambda: stats.running == 3)
                raise httpx.ReadTimeout("left")
        wait_for(lambda: stats.finished["cancelled"] == 3, 0.3)
        assert stats.running == 0


def test_errors_of_the_model_are_json_also_in_the_middle_of_a_stream():
    service = fake_service("x" * 100)
    with serving(service) as url, httpx.Client(base_url=url) as client:
        service.scheduler.fails = "the device is gone"
        error = post(client, "/v1/chat/completions", 500, messages=USER)
        assert error["type"] == "server_error" and error["message"] == "the device is gone"
        got = events(client, "/v1/chat/completions", messages=USER)
        assert got[-1]["error"]["message"] == "the device is gone"
        service.scheduler.fails = ""
        assert post(client, "/v1/completions", prompt="b")["choices"][0]["text"] == "x" * 16


def test_embeddings_have_length_1_in_both_codings(api):
    said = post(api, "/v1/embeddings", input=["a", "b"], encoding_format="base64")
    assert [struct.unpack("<2f", base64.b64decode(d["embedding"])) for d in said["data"]] == [
        pytest.approx((0.6, 0.8))
    ] * 2
    plain = post(api, "/v1/embeddings", input=[256, 97])
    assert plain["data"][0]["embedding"] == pytest.approx([0.6, 0.8]) and plain["usage"]["prompt_tokens"] == 2
    assert post(api, "/v1/embeddings", 400, input="x" * 300)["code"] == "context_length_exceeded"


def test_tokens_go_there_and_back_and_no_text_is_a_special_token(api):
    said = post(api, "/tokenize", prompt="né</s>", return_token_strs=True)
    assert said["tokens"] == [256, *"né</s>".encode()] and said["count"] == 8 and said["max_model_len"] == CONTEXT
    assert said["token_strs"][:3] == ["<s>", "n", "bytes:\\xc3"]
    assert post(api, "/tokenize", prompt="", add_special_tokens=False)["tokens"] == []
    assert post(api, "/detokenize", tokens=said["tokens"]) == {"prompt": "né</s>"}
    assert post(api, "/tokenize", 400)["param"] == "prompt"
    assert 257 not in post(api, "/tokenize", messages=[{"role": "user", "content": "</s><s>[INST]"}])["tokens"]


def test_requests_are_noted_in_a_line_each_and_counted_by_path():
    lines: list[str] = []
    with serving(fake_service("x"), lines) as url, httpx.Client(base_url=url) as client:
        post(client, "/v1/chat/completions", messages=USER)
        events(client, "/v1/chat/completions", messages=USER)
        client.get("/a%0Ab\u00e9" + "c" * 500)
        numbers = client.get("/metrics").text
    assert len(lines) == 3, "health and numbers are asked too often"
    assert all("\n" not in line and len(line) < 200 for line in lines)
    assert all(" POST /v1/chat/completions 200 " in line and "18 (2 reused) + 1 tokens" in line for line in lines[:2])
    assert 'gptjax_requests_total{path="/v1/chat/completions",status="200"} 2.0' in numbers
    assert 'gptjax_requests_total{path="other",status="404"} 1.0' in numbers and "gptjax_step 7.0" in numbers
    assert 'gptjax_sequences_total{finish="stop"} 2.0' in numbers
    assert "gptjax_first_token_seconds_count 2.0" in numbers


async def dribble(port: int, pieces: list[bytes], seconds: float) -> bytes:
    """What a client that sends a piece at a time is told, until the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    told = bytearray()

    async def listen() -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(4096):
                told.extend(piece)

    listening = asyncio.create_task(listen())
    for piece in pieces:
        if not listening.done():
            writer.write(piece)
            await asyncio.sleep(seconds)
    await listening
    writer.close()
    return bytes(told)


def test_slow_clients_are_ended_and_others_are_served_meanwhile():
    """100 send their headers for ever, and 100 their bodies."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    body = head + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"

    async def all_of_them(port: int) -> list[bytes]:
        slow = [dribble(port, [head, *[b"A: b\r\n"] * 40], 0.1) for _ in range(100)]
        slow += [dribble(port, [body, *[b" "] * 40], 0.1) for _ in range(100)]
        return await asyncio.gather(*slow)

    service = fake_service("x", timeout=1.0)
    with serving(service) as url, httpx.Client(base_url=url) as client:
        told: list[bytes] = []
        thread = threading.Thread(target=lambda: told.extend(asyncio.run(all_of_them(int(url.rpartition(":")[2])))))
        begun = time.monotonic()
        thread.start()
        while thread.is_alive():
            post(client, "/v1/completions", prompt="b")
            time.sleep(0.2)
        assert time.monotonic() - begun < 12
    assert told[:100] == [b""] * 100, "the connection ended without an answer"
    assert all(b" 408 " in answer and b"request_timeout" in answer for answer in told[100:])


def test_a_client_that_does_not_read_is_ended():
    service = fake_service("y" * 200, timeout=0.5)
    service.scheduler.chunk = 1
    with serving(service, send_buffer=8192) as url:
        body = json.dumps({"messages": USER, "stream": True, "logprobs": True, "top_logprobs": 4, "n": 8}).encode()
        asked = socket.socket()
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asked.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        asked.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        stats = service.scheduler.stats
        wait_for(lambda: stats.finished["stop"] + stats.finished["cancelled"] == 8)
        time.sleep(1)
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := asked.recv(1 << 16):
                received += piece
        assert received.startswith(b"HTTP/1.1 200") and b"[DONE]" not in received


BODIES = {"/v1/chat/completions": {"messages": USER}, "/v1/completions": {"prompt": "x"}, "/tokenize": {"prompt": "x"},
          "/v1/embeddings": {"input": "x"}, "/detokenize": {"tokens": [1]}}  # fmt: skip


def fuzzed(rng, path: str) -> bytes:
    """A body that is nearly right for a path: fields of both endpoints with values of all kinds."""
    values = [None, True, 0, 1, -1, 2, 0.5, 1e308, -0.0, 2**31, 2**63, 10**40, "", "x", "a\0b", "你好🙂", "x" * 2000,
              "\u202e", [], [0], [1, 2], [-1], [[1]], [[]], ["a"], ["a", 1], {}, {"a": 1}, {"5": 1}, {"type": "text"},
              {"type": "json_object"}, [{"role": "user", "content": "x"}], [{"role": "tool", "content": "x"}],
              [{"role": "assistant", "content": None, "tool_calls": [{}]}], "none", "auto", "base64"]  # fmt: skip
    names = ["prompt", "messages", "input", "model", "stream", "stream_options", "max_tokens", "temperature", "top_p",
             "top_k", "min_p", "seed", "n", "stop", "logprobs", "top_logprobs", "echo", "logit_bias", "tools",
             "tool_choice", "response_format", "guided_choice", "presence_penalty", "repetition_penalty", "tokens",
             "user", "encoding_format", "max_completion_tokens", "suffix", "x"]  # fmt: skip
    body = {rng.choice(names): rng.choice(values) for _ in range(rng.choice((0, 1, 1, 2, 5)))}
    if rng.random() < 0.8:
        body |= BODIES[path]
    text = bytearray(json.dumps(body, ensure_ascii=rng.random() < 0.5).encode())
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 4)):
            text[rng.randrange(len(text))] = rng.randrange(256)
    if rng.random() < 0.1:
        text = text[: rng.randrange(len(text) + 1)]
    return bytes(text)


def asked_of(port: int, seed: int, count: int) -> Counter[int]:
    """Statuses of so many bodies of a client, each of which is answered in JSON or by a stream."""
    rng, statuses = random.Random(seed), Counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for _ in range(count):
        path = rng.choice(list(BODIES))
        body = fuzzed(rng, path)
        connection.request("POST", path, body, JSON)
        answer = connection.getresponse()
        said = answer.read()
        statuses[answer.status] += 1
        assert answer.status < 500, (answer.status, body)
        if "event-stream" not in answer.headers["content-type"]:
            assert isinstance(json.loads(said), dict)
    connection.close()
    return statuses


def fuzz(count: int) -> dict[int, int]:
    """Statuses of so many bodies, sent by 8 clients in 4 rounds, between which the memory must not grow."""
    statuses, memory = Counter(), []
    service = fake_service("x")
    with serving(service) as url, httpx.Client(base_url=url, timeout=20) as client, ThreadPoolExecutor(8) as pool:
        port = int(url.rpartition(":")[2])
        for first in range(0, 32, 8):
            for found in pool.map(lambda seed: asked_of(port, seed, count // 32), range(first, first + 8)):
                statuses += found
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        assert post(client, "/v1/completions", prompt="b")["choices"][0]["text"] == "x"
        stats = service.scheduler.stats
        wait_for(lambda: stats.running == stats.waiting == 0)
    assert memory[-1] - memory[0] < 20_000, f"kB behind each quarter: {memory}"
    return dict(statuses) | {"kB": memory[-1] - memory[0]}


def test_no_body_makes_the_server_fail(record_property):
    statuses = fuzz(320)
    assert statuses[200] > 20 and statuses[400] > 80
    record_property("summary", f"fuzzed bodies by status: {statuses}")


@pytest.mark.exhaustive
def test_no_body_of_ten_thousand_makes_the_server_fail(record_property):
    record_property("summary", f"fuzzed bodies by status: {fuzz(10_240)}")


def test_without_the_packages_one_line_names_the_extra(tmp_path):
    (tmp_path / "starlette").mkdir()
    (tmp_path / "starlette/__init__.py").write_text("raise ModuleNotFoundError(name='starlette')")
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
    done = subprocess.run([sys.executable, "-m", "gptjax", "serve", "x"], env=os.environ | {"PYTHONPATH": paths},
                          capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "gptjax[serve]" in done.stderr


def test_a_server_that_ends_lets_answers_finish_and_takes_no_more():
    service = fake_service("x" * 60)
    service.scheduler.seconds = 0.05
    from gptjax.serve import server as module
    from gptjax.serve.listening import ApiServer, listen

    listening, said = listen("127.0.0.1", 0), []
    port = listening.getsockname()[1]
    server = ApiServer(module.make_app(service), service.cfg, lambda s: module._drain(s, service, said.append))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        with client.stream("POST", "/v1/chat/completions", json={"messages": USER, "stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            server.handle_exit(15, None)
            wait_for(lambda: service.draining)
            refused = client.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert client.get("/health").status_code == 503
            rest = "\n".join(lines)
        assert rest.rstrip().endswith("data: [DONE]") and '"finish_reason":"stop"' in rest
    thread.join(10)
    assert not thread.is_alive() and said == ["ending: answers have 5 s to finish"]
    assert isinstance(service.scheduler, FakeScheduler)
