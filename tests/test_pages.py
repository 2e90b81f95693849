"""Laws of the server's pages: they load nothing from elsewhere, the inspector's numbers are those of the verb, and what
labellers do in the browser lies in the files."""

import base64
import json
import re

import httpx
import pytest
from fake_scheduler import FakeScheduler, fake_service
from serving import serving
from stage_runs import make_run
from test_labels import write_prompts

from gptjax.config import VisionConfig
from gptjax.config.section import InputError
from gptjax.config.serving import ServeConfig
from gptjax.data.preferences import read_preferences
from gptjax.runs.load import load_model
from gptjax.serve.inspection import inspect, inspection_json
from gptjax.serve.pages import WEB
from gptjax.serve.service import Service

PAGES = {"/": "chat.html", "/inspect": "inspect.html", "/label": "label.html"}
FILES = sorted(path.name for path in WEB.iterdir())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A server with all pages, and its folder of labels."""
    folder = write_prompts(tmp_path_factory.mktemp("pages") / "labels")
    with serving(fake_service("abcdefgh", label=str(folder))) as url, httpx.Client(base_url=url) as client:
        yield client, folder


@pytest.fixture(scope="module")
def looked(tmp_path_factory, compile_cache):
    """A server of a model with weights, and the model."""
    model = load_model(make_run(tmp_path_factory.mktemp("pages") / "run"), None)
    scheduler = FakeScheduler(model)
    service = Service(model, ServeConfig(template="llama2"), scheduler)  # pyright: ignore
    scheduler.start()
    with serving(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client, model


@pytest.mark.parametrize("path", PAGES)
def test_a_page_may_load_only_the_servers_own_files(site, path):
    client, _ = site
    answer = client.get(path)
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy.pop("default-src") == "'none'" and policy.pop("img-src") == "'self' data:"
    assert {policy.pop(name) for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert policy == dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*(src|application/json))|<style|\sstyle=|\son\w+=|https?:", answer.text)
    named = re.findall(r'(?:src|href)="(/web/[^"]+)"', answer.text)
    assert len(named) >= 3
    while named:  # and what these import
        name = named.pop()
        file = client.get(name)
        assert file.status_code == 200 and file.headers["x-content-type-options"] == "nosniff", name
        assert file.headers["content-type"].startswith("text/css" if name.endswith(".css") else "text/javascript")
        named += re.findall(r'from "(/web/[^"]+)"', file.text)


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_an_address_or_makes_html_of_text(name):
    text = (WEB / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(
        r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
    )
    assert not re.search(r"@import|url\(", text) and len(text.splitlines()) <= 400


def test_the_chat_is_told_of_the_servers_tools_and_has_it_make_their_calls(site):
    client, _ = site
    assert client.get("/page.json").json()["tools"] == []
    call = {"name": "calculator", "arguments": '{"expression": "12 * 12"}'}
    assert client.post("/tool", json=call).status_code == 404, "without --tools there is no such path"
    with serving(fake_service(tools="calculator", api_key="secret")) as url, httpx.Client(base_url=url) as other:
        facts = other.get("/page.json").json()
        assert [t["function"]["name"] for t in facts["tools"]] == ["calculator"] and facts["max_calls"] == 8
        assert other.post("/tool", json=call).status_code == 401
        other.headers["Authorization"] = "Bearer secret"
        assert other.post("/tool", json=call).json() == {"content": "144"}
        assert other.post("/tool", json=call | {"name": "rm"}).json()["content"].startswith("error: ")
        assert other.post("/tool", json={"name": 3}).status_code == 400
    with pytest.raises(InputError, match="--template"):
        fake_service(tools="calculator", template="")


def test_the_pages_are_told_of_images_and_the_inspector_reads_those_of_a_question(site):
    client, _ = site
    assert client.get("/page.json").json()["images"] is False
    with serving(fake_service(vision=VisionConfig(patch=8, side=32), max_images=3)) as url:
        facts = httpx.get(f"{url}/page.json").json()
        assert facts["images"] is True and facts["max_images"] == 3 and facts["chat"] is True
        for images, why in (
            (["https://example.com/x.png"], "never fetched"),
            (["x"] * 4, "data:"),
            ("x", "data: URLs"),
        ):
            answer = httpx.post(f"{url}/inspection", json={"text": "x", "images": images})
            assert answer.status_code == 400 and why in answer.text, images


def test_no_other_file_is_served(site):
    client, _ = site
    for path in (
        "/web/../pages.py",
        "/web/%2e%2e/pages.py",
        "/web/",
        "/web/pages.py",
        "/web/chat.html",
        "//etc/passwd",
    ):
        assert client.get(path).status_code == 404, path


def test_pages_want_no_key_and_what_they_ask_does(tmp_path):
    folder = write_prompts(tmp_path / "labels")
    with serving(fake_service(label=str(folder), api_key="secret")) as url, httpx.Client(base_url=url) as client:
        for path in (*PAGES, "/page.json", "/web/chat.js"):
            assert client.get(path).status_code == 200, path
        for path in ("/inspection", "/label/next", "/label/answer", "/v1/chat/completions"):
            assert client.post(path, json={}).status_code == 401, path


def test_without_a_folder_there_is_no_labelling():
    with serving(fake_service()) as url, httpx.Client(base_url=url) as client:
        assert client.get("/page.json").json()["label"] is False
        assert client.get("/label").status_code == client.post("/label/next", json={}).status_code == 404


def test_the_inspectors_numbers_are_those_of_the_verb(looked):
    client, model = looked
    answer = client.post("/inspection", json={"text": "To be </script> é"})
    wanted = json.loads(json.dumps(inspection_json(inspect(model, "To be </script> é"))))
    assert answer.json() == wanted and base64.b64decode(wanted["weights"])


@pytest.mark.parametrize(
    "body, message",
    [
        ({"text": ""}, "the text is empty; wanted 1 to 64"),
        ({"text": "x" * 64}, "the text has 65 tokens; wanted 1 to 64, which the page can show of 1 layers"),
        ({"text": 3}, "text=3; wanted the text"),
        ({}, "text=None; wanted the text"),
        ([], "the request is a JSON list"),
    ],
)
def test_what_cant_be_inspected_is_said_in_a_line(looked, body, message):
    answer = looked[0].post("/inspection", json=body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_forms_of_other_sites_are_refused(site):
    client, _ = site
    as_form = {"content": '{"kind": "demonstrations", "name": "x"}', "headers": {"Content-Type": "text/plain"}}
    assert client.post("/label/answer", **as_form).status_code == 415
    assert client.post("/label/next", json={}, headers={"Origin": "http://elsewhere.example"}).status_code == 403
    assert client.post("/inspection", content="{", headers={"Content-Type": "application/json"}).status_code == 400


def test_rankings_come_with_samples_that_stay(site):
    client, folder = site

    def next_of(name):
        return client.post("/label/next", json={"kind": "rankings", "name": name}).json()

    first = next_of("anna")
    assert (first["done"], first["of"]) == (0, 5) and len(first["task"]["answers"]) == 4
    assert next_of("anna") == first, "a page that is loaded again shows the same"
    assert sorted(next_of("bob")["task"]["answers"]) == sorted(first["task"]["answers"])
    answer = {"kind": "rankings", "name": "anna", "id": first["task"]["id"], "answers": first["task"]["answers"]}
    second = client.post("/label/answer", json=answer | {"ranks": [2, 1, 1, 4]}).json()
    assert second["done"] == 1 and second["task"]["id"] != first["task"]["id"]
    assert client.post("/label/answer", json=answer | {"ranks": [2, 1, 1, 4]}).json()["done"] == 1
    assert client.post("/label/answer", json=answer | {"ranks": [1, 2, 3, 4]}).status_code == 400
    (kept,) = read_preferences(folder / "rankings" / "anna.jsonl")
    best = sorted(first["task"]["answers"][i] for i in (1, 2))
    assert kept.ranks == [0, 0, 1, 2] and sorted(m[0]["content"] for m in kept.answers[:2]) == best
    back = client.post("/label/answer", json={"kind": "rankings", "name": "anna", "take_back": True}).json()
    assert back["done"] == 0 and back["task"]["id"] == first["task"]["id"]


@pytest.mark.parametrize("body", [
    {}, {"kind": "skipped", "name": "a"}, {"kind": "rankings", "name": "../a"}, {"kind": ["rankings"], "name": "a"},
    {"kind": "rankings", "name": "a", "id": "x", "answers": [1], "ranks": [1]},
    {"kind": "rankings", "name": "a", "id": "x", "answers": "ab", "ranks": [1, 2]},
    {"kind": "demonstrations", "name": "a", "id": {}, "answer": "x"}, {"kind": "rankings", "name": "a", "id": []},
    {"kind": "demonstrations", "name": "a", "id": "x", "skip": True},
    {"kind": "demonstrations", "name": "a\ud800", "take_back": True},
])  # fmt: skip
def test_bad_labels_are_refused(site, body):
    answer = site[0].post("/label/answer", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
