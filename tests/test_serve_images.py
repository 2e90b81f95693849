"""Laws of images over HTTP: they are read by their content alone, counted, limited, and nothing is ever fetched."""

import base64
import socket
import time

import httpx
import numpy as np
import pytest
from fake_scheduler import CONTEXT, fake_service
from hostile_images import READ, REFUSED, picture, png, saved
from serving import serving

from gptjax.config import VisionConfig
from gptjax.data.image_rows import place_id
from gptjax.data.images import Picture, image_patches
from gptjax.serve.service import Service

VISION = VisionConfig(patch=4, side=16, merge=2, begin=(60,), end=(62,))
T, CHAT = VISION.num_tokens, "/v1/chat/completions"
RED = saved(picture().resize((9, 5)), "PNG")
GREY = saved(picture("L"), "JPEG")
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"


def image(content: bytes, kind: str = "png", **more) -> dict:
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(said: str) -> dict:
    return {"type": "text", "text": said}


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


@pytest.fixture(scope="module")
def seeing():
    """A client of a server whose model reads images, and the service."""
    service = fake_service("It is red.", vision=VISION, max_images=4, max_image_body=8_000_000)
    with serving(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client, service
    service.close()


def post(client: httpx.Client, status: int = 200, path: str = CHAT, **body) -> dict:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def last(service: Service):
    return service.scheduler.submitted[-1]  # pyright: ignore[reportAttributeAccessIssue]


def test_a_conversation_with_images_reaches_the_model_in_its_order(seeing):
    client, service = seeing
    more = [{"role": "assistant", "content": "Red."}, user(image(RED, detail="low"), text("again?"))]
    said = post(client, messages=[user(image(RED), text("which?"), image(GREY, "jpeg"), text("and?")), *more])
    ids, pictures = last(service).ids, last(service).pictures
    red, grey = (place_id(Picture.of(content, "").key) for content in (RED, GREY))
    assert [i for n, i in enumerate(ids) if i < 0 and ids[n - 1] != i] == [red, grey, red]
    assert sum(i < 0 for i in ids) == 3 * T and ids.count(60) == ids.count(62) == 3
    words = bytes(i for i in ids if 0 <= i < 256 and i not in (60, 62)).decode()
    assert words == "[INST] which?and? [/INST] Red. [INST] again? [/INST]", words
    assert pictures.keys() == {red, grey}
    for content, place in ((RED, red), (GREY, grey)):
        np.testing.assert_array_equal(pictures[place], image_patches(content, "", VISION))
    assert said["usage"]["prompt_tokens"] == len(ids)
    assert said["usage"]["prompt_tokens_details"] == {"cached_tokens": 2, "image_tokens": 3 * T}


def test_tokens_models_and_the_page_know_of_images(seeing):
    client, service = seeing
    messages = [user(image(RED), text("which?"))]
    asked = post(client, path="/tokenize", messages=messages, return_token_strs=True)
    post(client, messages=messages)
    assert asked["tokens"] == last(service).ids and asked["token_strs"].count("") >= T
    assert client.get("/v1/models").json()["data"][0]["input_modalities"] == ["text", "image"]
    assert client.get("/page.json").json()["images"] is True


def test_a_text_that_spells_an_image_stays_text(seeing):
    client, service = seeing
    for said in ("<image>", "{image}", str(place_id("f" * 64)), image(RED)["image_url"]["url"]):
        post(client, messages=[{"role": "user", "content": said[:100]}])
        assert min(last(service).ids) >= 0 and not last(service).pictures


WRONG = {
    "http": ({"url": "http://127.0.0.1:9/cat.png"}, "[0].content: part 0: a URL of http:, which is never fetched"),
    "https": ({"url": "https://example.org/cat.png"}, "a URL of https:, which is never fetched"),
    "file": ({"url": "file:///etc/passwd"}, "a URL of file:, which is never fetched"),
    "a path": ({"url": "/etc/passwd"}, "'/etc/passwd'; wanted data:image/png;base64,..."),
    "svg": ({"url": "data:image/svg+xml;base64," + base64.b64encode(SVG).decode()}, "wanted image/png, image/jpeg"),
    "no base64": ({"url": "data:image/png,abc"}, ";base64"),
    "broken": ({"url": "data:image/png;base64,@@@"}, "broken base64"),
    "empty": ({"url": "data:image/png;base64,"}, "an empty data: URL"),
    "a number": ({"url": 5}, "part 0 is an image_url with 5"),
    "nothing": ({}, "part 0 is an image_url with None"),
    "detail": ({"url": image(RED)["image_url"]["url"], "detail": "most"}, "detail='most'; wanted auto, low or high"),
    "a lie": ({"url": image(SVG)["image_url"]["url"]}, "messages[0]: part 0: "),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_image_is_refused_before_anything_is_fetched(seeing, name, monkeypatch):
    client, service = seeing
    url, says = WRONG[name]
    known, connect = client.base_url.port, socket.socket.connect

    def guarded(self, address):
        assert address[1] == known, f"a connection to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    before = len(service.scheduler.submitted)
    error = post(client, 400, messages=[user({"type": "image_url", "image_url": url}, text("what?"))])
    assert says in error["message"] and "\n" not in error["message"] and len(error["message"]) < 400
    assert len(service.scheduler.submitted) == before


def test_images_have_limits_and_places(seeing):
    client, _ = seeing
    many = post(client, 400, messages=[user(*[image(RED)] * 3, text("a")), user(*[image(RED)] * 2, text("b"))])
    assert many["message"] == "the conversation has 5 images; wanted at most 4"
    for role in ("system", "assistant"):
        error = post(client, 400, messages=[{"role": role, "content": [image(RED)]}, user(text("x"))])
        assert f"a message of the {role} holds an image" in error["message"]
    full = post(client, 400, messages=[user(image(RED), text("x" * (CONTEXT - 20)))])
    assert full["code"] == "context_length_exceeded", "image tokens count"
    large = client.post(CHAT, json={"messages": [user(image(bytes(7_000_000)), text("x"))]})
    assert large.status_code == 413 and "at most 8,000,000 bytes" in large.json()["error"]["message"]
    text_alone = client.post("/v1/completions", json={"prompt": "x" * 5_000_000})
    assert text_alone.status_code == 413, "which no prompt of text needs"


def test_a_model_of_text_alone_refuses_images():
    with serving(fake_service()) as url, httpx.Client(base_url=url) as client:
        assert "this model reads no images" in post(client, 400, messages=[user(image(RED), text("x"))])["message"]
        assert client.get("/v1/models").json()["data"][0]["input_modalities"] == ["text"]
        assert client.get("/page.json").json()["images"] is False
    blind = fake_service(template="", vision=VISION)
    with serving(blind) as url, httpx.Client(base_url=url) as client:
        assert "without a chat template" in post(client, 400, messages=[user(image(RED), text("x"))])["message"]
    blind.close()


def test_every_hostile_file_gets_a_line_or_an_answer_and_the_server_goes_on(seeing, record_property):
    client, _ = seeing
    slowest, refused = 0.0, 0
    for made in [*REFUSED.values(), *READ.values()]:
        content = made[0]()
        body = {"messages": [user(image(content), text("what?"))]}
        if len(content) > 5_000_000:
            continue
        begun = time.perf_counter()
        answer = client.post(CHAT, json=body)
        slowest = max(slowest, time.perf_counter() - begun)
        assert answer.status_code == (400 if made in REFUSED.values() else 200), (made, answer.text[:300])
        refused += answer.status_code == 400
        if answer.status_code == 400:
            message = answer.json()["error"]["message"]
            assert message.startswith("messages[0]") and "\n" not in message and len(message) < 400
    assert client.get("/health").status_code == 200
    assert post(client, messages=[user(image(RED), text("which?"))])["choices"][0]["message"]["content"] == "It is red."
    record_property("summary", f"{refused} hostile files refused over HTTP, the slowest within {slowest:.2f} s")


def test_a_picture_that_is_sent_again_is_not_decoded_again(seeing, monkeypatch):
    client, service = seeing
    once = png(5, 5)
    read, count = service._reader.patches, []
    monkeypatch.setattr(service._reader, "patches", lambda *asked: count.append(1) or read(*asked))
    for _ in range(2):
        post(client, messages=[user(image(once), text("which?"))])
    assert len(count) == 1
