"""Clients of others, unmodified, against the server: the openai package, and lm-eval.

pip install 'gptjax[peers]' && pytest tests/test_serve_peers.py -m peers
"""

import base64
import json
import shutil
from pathlib import Path

import jax
import pytest
from fake_scheduler import fake_service
from hostile_images import picture, saved
from serving import serving
from test_lm_eval import answers, numbers_of, write_tasks, write_tokenizer

from gptjax.config import ImportConfig, VisionConfig
from gptjax.config.serving import ServeConfig
from gptjax.interop.importing import import_run
from gptjax.runs.load import load_model
from gptjax.serve.service import Service

pytestmark = pytest.mark.peers
FIXTURES = Path(__file__).parent / "fixtures"
USER = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def client_of(openai, url: str):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)


def test_the_openai_client_chats_completes_streams_and_embeds():
    openai = pytest.importorskip("openai")
    with serving(fake_service("Hé, 你好 🙂: the end", api_key="secret")) as url:
        client = client_of(openai, url)
        assert [model.id for model in client.models.list()] == ["fake"] and client.models.retrieve("fake").id == "fake"
        chat = client.chat.completions.create(model="fake", messages=USER, n=2, logprobs=True, top_logprobs=2, stop=":")
        assert [c.message.content for c in chat.choices] == ["Hé, 你好 🙂", "é, 你好 🙂"]
        assert {c.finish_reason for c in chat.choices} == {"stop"}
        entries = chat.choices[0].logprobs.content
        assert b"".join(bytes(e.bytes) for e in entries).decode() == "Hé, 你好 🙂" and len(entries[0].top_logprobs) == 2
        stream = client.chat.completions.create(
            model="fake", messages=USER, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant" and len({c.id for c in chunks}) == 1
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "Hé, 你好 🙂: the end" and chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage.completion_tokens == len(text.encode()), "without the id that ends it"
        with client.chat.completions.stream(model="fake", messages=USER) as helper:
            helper.until_done()
            assert helper.get_final_completion().choices[0].message.content == text
        done = client.completions.create(model="fake", prompt=["né", "x"], echo=True, logprobs=1, max_tokens=4)
        assert [c.text for c in done.choices] == ["néHé,", "xHé,"]
        scores = done.choices[0].logprobs
        assert scores.token_logprobs[0] is None and len(scores.tokens) == len(scores.text_offset) == 8
        parts = [c.choices[0].text for c in client.completions.create(model="fake", prompt="x", stream=True)]
        assert "".join(parts) == "Hé, 你好 🙂", "16 tokens where nothing is said, as OpenAI has it"
        vectors = client.embeddings.create(model="fake", input=["a", "b"])
        assert [list(map(float, d.embedding)) for d in vectors.data] == [pytest.approx([0.6, 0.8], abs=1e-6)] * 2


def test_the_openai_client_gets_calls_of_tools_and_parsed_answers():
    openai = pytest.importorskip("openai")
    pydantic = pytest.importorskip("pydantic")
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    with serving(fake_service(CALL, template="chatml", context=2048)) as url:
        client = client_of(openai, url)
        [choice] = client.chat.completions.create(model="fake", messages=USER, tools=[tool]).choices
        [call] = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and json.loads(call.function.arguments) == {"a": 1}
        back = [*USER, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "2"}]
        again = client.chat.completions.create(model="fake", messages=back, tools=[tool])
        assert again.choices[0].message.tool_calls[0].function.name == "add"
        with client.chat.completions.stream(model="fake", messages=USER, tools=[tool]) as helper:
            helper.until_done()
            assert helper.get_final_completion().choices[0].message.tool_calls[0].function.name == "add"

        class Point(pydantic.BaseModel):
            x: bool

        parsed = client.chat.completions.parse(model="fake", messages=USER, response_format=Point, max_tokens=40)
        assert isinstance(parsed.choices[0].message.parsed, Point)


def test_the_openai_client_raises_its_own_errors():
    openai = pytest.importorskip("openai")
    service = fake_service("x", api_key="secret")
    with serving(service) as url:
        client = client_of(openai, url)
        ask = client.chat.completions.create
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            ask(model="gpt-4", messages=USER)
        with pytest.raises(openai.BadRequestError) as refused:
            ask(model="fake", messages=[{"role": "user", "content": "x" * 300}])
        assert refused.value.code == "context_length_exceeded" and refused.value.param == "messages"
        with pytest.raises(openai.BadRequestError, match="temperature"):
            ask(model="fake", messages=USER, temperature=-1)
        service.scheduler.fails = "gone"
        with pytest.raises(openai.InternalServerError, match="gone"):
            ask(model="fake", messages=USER)
        with pytest.raises(openai.APIError, match="gone"):
            list(ask(model="fake", messages=USER, stream=True))
        service.scheduler.fails = ""
        service.draining = True
        with pytest.raises(openai.InternalServerError, match="ending"):
            ask(model="fake", messages=USER)


def test_lm_eval_over_http_has_the_answers_of_the_run_in_process(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    api = pytest.importorskip("lm_eval.models.openai_completions", exc_type=ImportError)
    from gptjax.interop.lm_eval import GptjaxLM

    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "tiny_random_llama", folder)
    write_tokenizer(folder, 512, False, True)
    import_run(folder, tmp_path / "run", ImportConfig(template="chatml"))
    # Texts that fit: lm-eval cuts the beginning of longer ones off, over HTTP a token earlier.
    tasks = [task for task in write_tasks(tmp_path) if task["task"] in ("choices", "word", "words")]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    short = [row | {"question": row["question"][:24], "choices": [c[:24] for c in row["choices"]]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    service = Service(load_model(tmp_path / "run", None), ServeConfig(slots=4))
    service.scheduler.start()
    with serving(service) as url, jax.default_matmul_precision("highest"):
        settings = {"tokenizer": str(folder), "max_length": service.context, "batch_size": 4, "num_concurrent": 4}
        theirs = api.LocalCompletionsAPI(
            model=service.name, base_url=f"{url}/v1/completions", tokenizer_backend="huggingface", **settings
        )
        over_http = answers(theirs, tasks, False)
        run, words = GptjaxLM(str(tmp_path / "run"), batch_size=4), [t for t in tasks if t["task"] == "words"]
        words[0] = words[0] | {"generation_kwargs": words[0]["generation_kwargs"] | {"max_gen_toks": 4}}  # which fit
        ours, spoken = answers(run, tasks, False), answers(run, words, True)
        chats = api.LocalChatCompletion(model=service.name, base_url=f"{url}/v1/chat/completions", num_concurrent=4)
        talked = answers(chats, words, True)
    service.scheduler.stop()
    assert over_http.keys() == ours.keys() == {"choices", "word", "words"}
    assert over_http["words"] == ours["words"] and any(text for [[text]] in ours["words"])
    assert talked == spoken
    for name in ("choices", "word"):
        numbers = [[x for one in resps for x in numbers_of(one)] for resps in over_http[name]]
        wanted = [[x for one in resps for x in numbers_of(one)] for resps in ours[name]]
        assert numbers == [pytest.approx(row, abs=1e-4) for row in wanted], name


def test_the_openai_client_sends_two_images_and_goes_on_with_them():
    openai = pytest.importorskip("openai")
    vision = VisionConfig(patch=4, side=16, merge=2)
    service = fake_service("The first one.", api_key="secret", vision=vision)
    files = [saved(picture(mode), kind) for mode, kind in (("RGB", "PNG"), ("L", "JPEG"))]
    parts = [{"type": "text", "text": "Which is red?"}]
    for content, kind in zip(files, ("png", "jpeg")):
        url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url, "detail": "high"}})
    with serving(service) as url:
        client = client_of(openai, url)
        chat = [{"role": "user", "content": parts}]
        said = client.chat.completions.create(model="fake", messages=chat)
        assert said.choices[0].message.content == "The first one."
        assert said.usage.prompt_tokens_details.image_tokens == 2 * vision.num_tokens
        chat += [said.choices[0].message, {"role": "user", "content": "And the other?"}]
        stream = client.chat.completions.create(model="fake", messages=chat, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in stream) == "The first one."
        ids = service.scheduler.submitted[-1].ids  # pyright: ignore[reportAttributeAccessIssue]
        assert len({i for i in ids if i < 0}) == 2 and sum(i < 0 for i in ids) == 2 * vision.num_tokens
        parts[1]["image_url"]["url"] = "http://169.254.169.254/latest/meta-data"
        with pytest.raises(openai.BadRequestError, match="which is never fetched"):
            client.chat.completions.create(model="fake", messages=chat[:1])
    service.close()
