"""Laws of the pages in a browser: a conversation is never lost, the inspector's numbers are the model's, what labellers
do is kept, and all of it works with a keyboard, on a phone and with a screen reader."""

import base64
import io
import itertools
import json
import re

import jax
import numpy as np
import pytest
from chromium import axe, chromium
from fake_scheduler import FakeScheduler, fake_service
from PIL import Image
from serving import serving
from stage_runs import make_run
from test_labels import write_prompts

from gptjax.cli import main
from gptjax.config import ModelConfig, VisionConfig
from gptjax.config.serving import ServeConfig
from gptjax.data.dialogue import read_conversations
from gptjax.data.images import Picture
from gptjax.data.preferences import read_preferences
from gptjax.generation.sampling import filter_logits
from gptjax.runs.load import load_model
from gptjax.serve.inspection import TEMPERATURES, inspect, inspection_json, inspection_prompt
from gptjax.serve.service import Service

MARKDOWN = """# Heading
**bold** *italic* `code` [link](https://example.com/) [no](javascript:alert(1)) <img src=x onerror=1>
- one
1. first

|a|b|
|-|-|
|1|2|

```python
print("<b>")
```
你好，世界。"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser, request):
    """A page of its own; a script that fails, or is forbidden, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    context.set_default_timeout(15_000)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    yield page
    context.close()
    refused = [text for text in wrong if "Failed to load resource" not in text]  # an error that a test asks for
    assert not refused


@pytest.fixture
def service(request):
    return fake_service(**getattr(request, "param", {"text": "Hello there. " * 3}))


@pytest.fixture
def url(service):
    with serving(service) as address:
        yield address


def shown(page, selector: str, text: str, **more) -> None:
    from playwright.sync_api import expect

    expect(page.locator(selector).last).to_contain_text(re.compile(text), **more)


def say(page, text: str) -> None:
    page.locator("#input").fill(text)
    page.keyboard.press("Enter")


def ended(page) -> None:
    page.locator("#send").wait_for()


def texts(page) -> list[str]:
    return page.locator(".message .text").all_inner_texts()


def test_a_conversation_streams_and_a_reload_keeps_it(page, service, url):
    service.scheduler.seconds = 0.05
    page.goto(url)
    shown(page, "#model", "fake")
    say(page, "Hi")
    shown(page, ".message.assistant .text", "^Hello")
    assert page.locator("#stop").is_visible() and len(texts(page)[1]) < 38, "it is drawn while it comes"
    ended(page)
    assert texts(page) == ["Hi", ("Hello there. " * 3).strip()]
    page.reload()
    assert texts(page) == ["Hi", ("Hello there. " * 3).strip()]
    say(page, "More")
    ended(page)
    assert len(texts(page)) == 4
    roles = [s.ids for s in service.scheduler.submitted][-1]
    assert "Hi" in service.tokenizer.decode(roles), "the whole conversation is sent"


CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 * 12"}}\n</tool_call>'


@pytest.mark.browser
@pytest.mark.parametrize(
    "service", [{"text": CALL, "tools": "calculator", "max_calls": 2, "context": 8192}], indirect=True
)
def test_the_servers_tools_are_run_and_the_model_goes_on_with_their_results(page, service, url):
    page.goto(url)
    shown(page, "#model", "fake")
    say(page, "What is 12 * 12?")
    shown(page, ".note", "no further calls, of 2")
    kept = page.evaluate("Object.values(localStorage).find(v => v.includes('12 * 12'))")
    roles = [(m["role"], m["content"]) for m in json.loads(kept)["messages"]]
    assert [r for r, _ in roles] == ["user", *["assistant", "tool"] * 2, "assistant"]
    assert [c for r, c in roles if r == "tool"] == ["144", "144"]
    assert "144" in service.tokenizer.decode([s.ids for s in service.scheduler.submitted][-1])


@pytest.mark.browser
def test_stop_retry_and_edit(page, service, url):
    service.scheduler.seconds = 0.1
    page.goto(url)
    say(page, "First")
    shown(page, ".message.assistant .text", "Hel")
    page.keyboard.press("Escape")
    ended(page)
    shown(page, ".note", "stopped")
    part = texts(page)[1]
    assert part and len(part) < 38 and service.scheduler.stats.running == 0
    service.scheduler.seconds = 0
    page.get_by_role("button", name="Retry").click()
    shown(page, ".message.assistant .text", "there. Hello there. $")
    ended(page)
    say(page, "Second")
    ended(page)
    assert len(texts(page)) == 4
    page.locator(".message.user").first.get_by_role("button", name="Edit").click()
    page.locator("#edit").fill("Changed")
    page.keyboard.press("Escape")
    assert texts(page)[0] == "First" and len(texts(page)) == 4, "Escape changes nothing"
    page.locator(".message.user").first.get_by_role("button", name="Edit").click()
    page.locator("#edit").fill("Changed")
    page.keyboard.press("Enter")
    ended(page)
    assert texts(page) == ["Changed", ("Hello there. " * 3).strip()], "what followed is cut"
    page.reload()
    assert texts(page)[0] == "Changed"


@pytest.mark.browser
def test_a_page_that_is_left_in_the_middle_keeps_what_came(page, service, url):
    service.scheduler.seconds = 0.1
    page.goto(url)
    say(page, "Hi")
    shown(page, ".message.assistant .text", "Hello")
    page.wait_for_timeout(700)
    assert "Hello" in page.evaluate("Object.values(localStorage).join()"), "kept before the page ends, also by a crash"
    page.reload()
    assert texts(page)[0] == "Hi" and texts(page)[1].startswith("Hello")
    shown(page, ".note", "broke off")


@pytest.mark.browser
def test_several_conversations_and_files_that_sft_reads(page, service, url, tmp_path):
    service.scheduler.seconds = 0.03
    page.goto(url)
    page.get_by_role("button", name="Settings").click()
    page.locator("#system").fill("Be kind.")
    page.locator("#s-temperature").fill("0.5")
    page.locator("#s-stop").fill("xyz")
    page.keyboard.press("Control+Home")
    page.get_by_role("button", name="Done").click()
    say(page, "One")
    shown(page, ".message.assistant .text", "Hel")
    page.get_by_role("button", name="New conversation").first.click()  # while the first one is answered
    assert texts(page) == []
    say(page, "Two")
    ended(page)
    page.locator("#list button.open", has_text="One").click()
    ended(page)
    assert texts(page) == ["One", ("Hello there. " * 3).strip()]
    assert [s.sampling.temperature for s in service.scheduler.submitted] == [0.5, 0.5]
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    download.value.save_as(tmp_path / "all.jsonl")
    kept = list(read_conversations(tmp_path / "all.jsonl"))
    assert sorted(turns[1]["content"] for turns in kept) == ["One", "Two"]
    assert all([m["role"] for m in turns] == ["system", "user", "assistant"] for turns in kept)
    assert kept[0][2]["content"] == "Hello there. " * 3
    page.on("dialog", lambda dialog: dialog.accept())
    for _ in range(2):
        page.locator("#list .remove").first.click()
    assert texts(page) == []
    page.locator("#file").set_input_files(tmp_path / "all.jsonl")
    assert page.locator("#list li").count() >= 2 and len(texts(page)) == 2
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n{"x": 1}\n')
    page.locator("#file").set_input_files(tmp_path / "bad.jsonl")
    shown(page, "#error", r"bad.jsonl can't be imported: line 2 has no messages")


DROP = """([type, files]) => {
    const data = new DataTransfer();
    for (const [name, text, more] of files)
        data.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), new Uint8Array(more)], name));
    const [Kind, field] = type === "paste" ? [ClipboardEvent, "clipboardData"] : [DragEvent, "dataTransfer"];
    const event = new Kind(type, {[field]: data, bubbles: true, cancelable: true});
    document.activeElement.dispatchEvent(event);
    return event.defaultPrevented;
}"""


def picture(kind: str = "PNG", side: int = 40, colour: str = "red") -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (side, side // 2), colour).save(written, kind)
    return written.getvalue()


def drop(page, *files: tuple[str, bytes], event: str = "drop", more: int = 0) -> None:
    """Drops files on the page, or pastes them, as a hand does: the page must not be left for them.

    `more` are zeros behind each file.
    """
    assert page.evaluate(DROP, [event, [[name, base64.b64encode(data).decode(), more] for name, data in files]])


def pictures(page, where: str = ".pictures") -> list[tuple[str, bytes]]:
    """The alt text and the bytes of the pictures that are drawn there."""
    drawn = page.locator(f"{where} img").evaluate_all("all => all.map((i) => [i.alt, i.src, i.naturalWidth > 0])")
    assert all(seen for *_, seen in drawn)
    return [(alt, base64.b64decode(src.partition("base64,")[2])) for alt, src, _ in drawn]


@pytest.fixture
def sent(page):
    """The bodies that the chat sends."""
    bodies = []

    def chat(route) -> None:
        bodies.append(route.request.post_data_json)
        route.continue_()

    page.route("**/v1/chat/completions", chat)
    return bodies


SEES = {"vision": VisionConfig(patch=8, side=32)}
seeing = pytest.mark.parametrize("service", [SEES], indirect=True)


@pytest.mark.browser
@seeing
def test_a_picture_is_dropped_asked_about_and_kept(page, url, sent):
    page.goto(url)
    page.locator("#attach").wait_for()
    red, blue = picture(), picture("JPEG", colour="blue")
    drop(page, ("red.png", red), ("blue", blue))
    shown(page, "#live", "red.png, blue added")
    assert pictures(page, ".tray") == [("red.png", red), ("blue", blue)]
    say(page, "Which is red?")
    ended(page)
    (content,) = [m["content"] for m in sent[0]["messages"]]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[2]["text"] == "Which is red?" and page.locator(".tray img").count() == 0
    urls = [part["image_url"]["url"] for part in content[:2]]
    assert urls == [f"data:image/{k};base64,{base64.b64encode(b).decode()}" for k, b in (("png", red), ("jpeg", blue))]
    for _ in range(2):
        assert pictures(page) == [("red.png", red), ("blue", blue)]
        page.reload()
        page.locator(".pictures img").nth(1).wait_for()
    assert "base64" not in page.evaluate("Object.values(localStorage).join()"), "they lie in the database"
    say(page, "And now?")
    ended(page)
    assert sent[1]["messages"][0]["content"] == content, "the whole conversation is sent"


@pytest.mark.browser
@seeing
def test_pictures_are_chosen_pasted_removed_edited_and_written_to_files(page, url, sent, tmp_path):
    page.on("filechooser", lambda _: None)  # so that dialogs are caught from now on
    page.goto(url)
    page.locator("#attach").wait_for()
    page.locator("#attach").focus()
    assert page.evaluate("document.activeElement.id") == "attach"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    assert chooser.value.is_multiple()
    made = {"a.png": picture(), "b.webp": picture("WEBP"), "c.gif": picture("GIF"), "d.png": picture(side=80)}
    chooser.value.set_files([{"name": n, "mimeType": "image/x", "buffer": made[n]} for n in ("a.png", "b.webp")])
    shown(page, "#live", "a.png, b.webp added")
    page.locator("#input").focus()
    drop(page, ("c.gif", made["c.gif"]), event="paste")
    shown(page, "#live", "c.gif added")
    page.get_by_role("button", name="Remove a.png").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.ariaLabel") == "Remove b.webp", "the focus goes to the next one"
    page.locator("#input").focus()
    page.keyboard.press("Enter")  # pictures alone are a message, too
    ended(page)
    assert [p["type"] for p in sent[0]["messages"][0]["content"]] == ["image_url"] * 2
    page.get_by_role("button", name="Retry").click()
    ended(page)
    assert sent[1]["messages"] == sent[0]["messages"]
    page.get_by_role("button", name="Edit").click()
    page.locator("#edit").fill("Well?")
    drop(page, ("d.png", made["d.png"]), event="paste")
    shown(page, "#live", "d.png added")
    page.locator(".tray").get_by_role("button", name="Remove b.webp").click()
    page.locator("#edit").press("Enter")
    ended(page)
    assert pictures(page) == [(name, made[name]) for name in ("c.gif", "d.png")]
    assert [p["type"] for p in sent[2]["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Export this").click()
    download.value.save_as(tmp_path / "one.jsonl")
    (line,) = (tmp_path / "one.jsonl").read_text().splitlines()
    kept = json.loads(line)["messages"]
    assert kept[0]["content"] == sent[2]["messages"][0]["content"]
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#list .remove").click()
    assert page.locator(".pictures").count() == 0
    page.locator("#file").set_input_files(tmp_path / "one.jsonl")
    page.locator(".pictures img").nth(1).wait_for()
    assert [data for _, data in pictures(page)] == [made["c.gif"], made["d.png"]] and texts(page)[0] == "Well?"
    count = """() => new Promise((done) => { indexedDB.open("gptjax").onsuccess = (e) => {
        const all = e.target.result.transaction("pictures").objectStore("pictures").count();
        all.onsuccess = () => done(all.result); }; })"""
    assert page.evaluate(count) == 4, "a and b were never asked about; those of the removed conversation are gone"
    part = {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}
    (tmp_path / "far.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": [part]}]}))
    page.locator("#file").set_input_files(tmp_path / "far.jsonl")
    shown(page, "#error", "line 1 names a picture that is not in it")


@pytest.mark.browser
@seeing
def test_what_is_no_picture_too_large_or_too_many_is_refused_in_a_line(page, url, sent):
    page.goto(url)
    page.locator("#attach").wait_for()
    for name, data, why in (
        ("x.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "x.svg is no picture that can be read here"),
        ("cut.png", picture()[:20], "cut.png is broken"),
        ("empty.png", b"", "empty.png is no picture"),
    ):
        drop(page, (name, data))
        shown(page, "#error", why)
    drop(page, ("big.png", picture()), more=20_000_000)
    shown(page, "#error", r"big.png has 20.0 MB; a picture may have 20 MB")
    drop(page, *[(f"{i}.png", picture()) for i in range(10)])
    shown(page, "#error", "The server takes no more pictures in a conversation: 2 left out")
    assert len(pictures(page, ".tray")) == 8
    noise = np.random.default_rng(0).integers(0, 256, (170, 2400, 3), np.uint8)
    written = io.BytesIO()
    Image.fromarray(noise).save(written, "PNG")
    page.get_by_role("button", name="Remove 0.png").click()
    drop(page, ("photo.png", written.getvalue()))
    shown(page, "#live", "photo.png added")
    alt, data = pictures(page, ".tray")[-1]
    assert alt == "photo.png (made smaller)" and Image.open(io.BytesIO(data)).size == (2048, 145)


@pytest.mark.browser
def test_a_model_that_reads_text_alone_is_sent_no_picture(page, service, url):
    page.goto(url)
    shown(page, "#model", "fake")
    drop(page, ("red.png", picture()))
    shown(page, "#error", "fake reads text alone")
    assert page.locator("#attach").is_hidden() and page.locator(".tray img").count() == 0


@pytest.mark.browser
@pytest.mark.parametrize("service", [{"text": MARKDOWN}], indirect=True)
def test_markdown_is_drawn_and_never_becomes_html(page, service, url):
    page.goto(url)
    say(page, "<b>I</b> & **me**")
    ended(page)
    answer = page.locator(".message.assistant .text")
    assert texts(page)[0] == "<b>I</b> & **me**"
    for selector, text in {"h3": "Heading", "strong": "bold", "em": "italic", "p code": "code", "ul li": "one",
                           "ol li": "first", "th": "a", "td": "1", ".code pre": 'print("<b>")'}.items():  # fmt: skip
        assert answer.locator(selector).first.inner_text() == text, selector
    assert answer.locator("img, script, b").count() == 0 and "<img src=x onerror=1>" in answer.inner_text()
    (link,) = answer.locator("a").all()
    assert link.get_attribute("href") == "https://example.com/" and "noopener" in link.get_attribute("rel")
    assert "你好，世界。" in answer.inner_text()


@pytest.mark.browser
def test_what_a_retry_or_an_edit_cuts_comes_back_where_no_answer_does(page, service, url):
    page.goto(url)
    for text in ("one", "two"):
        say(page, text)
        ended(page)
    before = texts(page)
    service.scheduler.fails = "the model broke"
    page.get_by_role("button", name="Retry").first.click()
    ended(page)
    shown(page, "#error", "the model broke")
    assert texts(page) == before
    page.get_by_role("button", name="Edit").first.click()
    page.locator("#edit").fill("three")
    page.keyboard.press("Enter")
    ended(page)
    shown(page, "#error", "the model broke")
    assert texts(page) == before and page.locator("#input").input_value() == "three"
    page.reload()
    assert texts(page) == before


@pytest.mark.browser
def test_errors_are_said_in_words_and_nothing_is_lost(page, service, url):
    page.goto(url)
    shown(page, "#model", "fake")
    service.scheduler.max_waiting = -99
    say(page, "Hi")
    shown(page, "#error", "The server is busy. It asks to wait 2 s")
    assert page.locator("#again").is_disabled() and texts(page) == ["Hi"]
    service.scheduler.max_waiting = 8
    shown(page, "#again", "^Try again$")
    page.locator("#again").click()
    ended(page)
    assert len(texts(page)) == 2 and page.locator("#error").is_hidden()
    say(page, "x" * 999)
    shown(page, "#error", "maximum context length is 256 tokens")
    page.reload()
    assert texts(page)[2] == "x" * 999
    page.locator(".message.user").last.get_by_role("button", name="Edit").click()
    service.scheduler.fails = "the model broke"
    page.locator("#edit").fill("short")
    page.keyboard.press("Enter")
    shown(page, "#error", "The server says: the model broke")
    service.scheduler.fails = ""
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_role("button", name="Try again").click()
    shown(page, "#error", "can't be reached")
    assert texts(page)[2] == "short"


@pytest.mark.browser
@pytest.mark.parametrize("service", [{"api_key": "secret"}], indirect=True)
def test_a_server_that_wants_a_key_is_given_it(page, service, url):
    page.goto(url)
    page.locator("#key").wait_for()
    assert "wants an API key" in page.locator("#error").inner_text()
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    shown(page, "#model", "fake")
    say(page, "Hi")
    ended(page)
    assert texts(page) == ["Hi", "Hello"]
    page.goto(f"{url}/inspect")
    assert page.locator("#key").input_value() == "secret"


@pytest.mark.browser
def test_all_of_the_chat_works_with_the_keyboard_alone(page, service, url):
    page.goto(url)
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    ended(page)
    assert texts(page)[0] == "one\ntwo" and page.evaluate("document.activeElement.id") == "input"

    def tab_to(name: str, key: str = "Shift+Tab") -> None:
        for _ in range(40):
            page.keyboard.press(key)
            if page.evaluate("document.activeElement.textContent || document.activeElement.id") == name:
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline == "solid", f"the focus on {name} is seen"
                return
        raise AssertionError(f"no way to {name} with {key}")

    tab_to("Retry")
    page.keyboard.press("Enter")
    ended(page)
    tab_to("Edit")
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.id") == "edit"
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.value") == "one\ntwo"
    page.keyboard.press("Escape")
    tab_to("Settings")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "system"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "open-settings"
    tab_to("New conversation", "Tab")
    page.keyboard.press("Enter")
    assert texts(page) == []


@pytest.mark.browser
def test_input_methods_send_only_what_is_composed(page, service, url):
    page.goto(url)
    keys = page.context.new_cdp_session(page)
    page.locator("#input").focus()
    keys.send("Input.imeSetComposition", {"text": "ni hao", "selectionStart": 6, "selectionEnd": 6})
    composing = """more => document.activeElement.dispatchEvent(
        new KeyboardEvent("keydown", {key: "Enter", bubbles: true, cancelable: true, ...more}))"""
    assert page.evaluate(composing, {"isComposing": True}) and page.evaluate(composing, {"keyCode": 229})
    assert texts(page) == [] and page.locator("#input").input_value() == "ni hao"
    keys.send("Input.insertText", {"text": "你好"})
    page.keyboard.press("Enter")
    ended(page)
    assert texts(page)[0] == "你好"


@pytest.mark.browser
def test_characters_that_come_in_pieces_are_never_split(page, url):
    page.goto(url)
    text = "你好，𠮷野家。🙂 é" * 5
    came = page.evaluate(
        """async (text) => {
            const event = (content) => `data: ${JSON.stringify({choices: [{index: 0, delta: {content}}]})}\\r\\n\\r\\n`;
            const bytes = new TextEncoder().encode([...text].map(event).join("") + "data: [DONE]\\n\\n");
            const real = window.fetch;
            window.fetch = async () => new Response(new ReadableStream({start(to) {
                for (const byte of bytes) to.enqueue(Uint8Array.of(byte));
                to.close();
            }}));
            const {stream} = await import("/web/api.js"), pieces = [];
            for await (const chunk of stream("/x", {})) pieces.push(chunk.choices[0].delta.content);
            window.fetch = real;
            return pieces;
        }""",
        text,
    )
    assert came == list(text)


@pytest.mark.browser
def test_a_screen_reader_is_told_sentences(page, service, url):
    service.scheduler.seconds = 0.02
    page.goto(url)
    say(page, "Hi")
    ended(page)
    told = page.locator("#live p").all_inner_texts()
    assert told == ["Hello there."] * 3, "whole sentences, each once"


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.mark.browser
def test_a_phone_shows_all_without_scrolling_sideways(browser, url, service):
    context = browser.new_context(**PHONE)
    page = context.new_page()
    page.goto(url)
    page.locator("#input").tap()
    page.keyboard.type("line")
    page.keyboard.press("Enter")
    assert page.locator("#input").input_value() == "line\n", "a phone's keyboard has no Shift+Enter"
    page.locator("#send").tap()
    ended(page)
    assert texts(page)[0].startswith("line") and not page.locator("#side").is_visible()
    page.locator("#menu").tap()
    assert page.locator("#side").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#side").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    context.close()


@pytest.fixture(scope="module")
def looked(tmp_path_factory, compile_cache):
    """The address of a server of a model with weights and of labels, the model and the folder."""
    folder = tmp_path_factory.mktemp("browser")
    model = load_model(make_run(folder / "run"), None)
    labels = write_prompts(folder / "labels", 20)
    scheduler = FakeScheduler(model, text="abcdefgh")
    service = Service(model, ServeConfig(template="llama2", label=str(labels)), scheduler)  # pyright: ignore
    scheduler.start()
    with serving(service) as url:
        yield url, model, labels


@pytest.mark.browser
def test_the_inspector_shows_the_models_numbers(page, looked):
    url, model, _ = looked
    page.goto(f"{url}/inspect")
    page.locator("#text").fill("To be, or not")
    page.keyboard.press("Enter")
    page.locator("#found").wait_for(timeout=60_000)  # which compiles
    wanted = json.loads(json.dumps(inspection_json(inspect(model, "To be, or not"))))
    assert page.evaluate("D") == wanted
    at = len(wanted["ids"]) - 1
    assert f"{wanted['loss'][at]:.3f} nats" in page.locator("#chosen").inner_text()
    cells = page.locator("#next tr td:nth-child(2)").all_inner_texts()
    assert [float(c.removesuffix(" %")) for c in cells] == pytest.approx(
        100 * np.exp(wanted["next_log_p"][at][:12]), abs=0.006
    )
    page.locator("#tokens button").nth(at).focus()
    page.keyboard.press("ArrowLeft")
    assert f"{wanted['loss'][at - 1]:.3f} nats" in page.locator("#chosen").inner_text()
    weights = np.frombuffer(base64.b64decode(wanted["weights"]), np.uint8)
    page.locator("#heads button").nth(1).click()
    triangle = weights.reshape(1, 2, -1)[0, 1]
    row = triangle[(at - 1) * at // 2 :][:at] / 255
    titles = page.locator("#attended span").evaluate_all("spans => spans.map((s) => s.title)")
    assert [float(t.removesuffix(" %")) for t in titles] == pytest.approx(100 * row, abs=0.06)
    page.locator("#text").fill("x" * 99)
    page.keyboard.press("Enter")
    shown(page, "#error", "the text has 100 tokens; wanted 1 to 64")


@pytest.mark.browser
def test_the_inspector_shows_where_a_head_looks_in_a_picture(page, tmp_path, compile_cache):
    shape = ModelConfig(num_layers=2, width=16, num_heads=2, dtype="float32", init_std=0.3, vision=SEES["vision"])
    model = load_model(make_run(tmp_path / "run", model=shape, template="llama2"), None)
    scheduler = FakeScheduler(model)
    service = Service(model, ServeConfig(), scheduler)  # pyright: ignore
    scheduler.start()
    prompt = inspection_prompt(model, "Red?", [Picture.of(picture(), "")], chat=True)
    found = inspect(model, prompt)
    with serving(service) as url:
        page.goto(f"{url}/inspect")
        page.locator("#attach").wait_for()
        drop(page, ("red.png", picture()))
        page.locator(".tray img").wait_for()
        page.locator("#text").fill("Red?")
        page.keyboard.press("Enter")
        page.locator("#found").wait_for(timeout=60_000)
        assert page.evaluate("D") == json.loads(json.dumps(inspection_json(found)))
        first, last = found.images[0]["start"], len(found.ids) - 1
        assert page.locator("#tokens button").count() == len(found.ids) - 15, "an image is one block"
        cells = page.locator(".sight button")

        def shares() -> list[float]:
            titles = cells.evaluate_all("all => all.map((b) => b.title)")
            return [float(title.split(": ")[1].removesuffix(" %")) for title in titles]

        page.locator("#heads button").nth(1).click()
        assert shares() == pytest.approx(100 * found.weights[1, 1, last, first : first + 16], abs=0.26)
        page.locator("#layer").press("ArrowLeft")
        assert shares() == pytest.approx(100 * found.weights[0, 1, last, first : first + 16], abs=0.26)
        cells.nth(5).click()
        page.keyboard.press("ArrowDown")
        shown(page, "#chosen", "image 1, row 3, column 2. Nothing predicts")
        assert shares() == pytest.approx(100 * found.weights[0, 1, first + 9, first : first + 16], abs=0.26)
        assert cells.nth(15).get_attribute("title") != "row 4, column 4: 0.0 %", "it sees what stands behind it"
        page.locator("#tokens .image").focus()
        page.keyboard.press("ArrowLeft")
        shown(page, ".sight + figcaption", "image 1 stands behind the chosen place")
        assert not any(shares())


@pytest.mark.browser
def test_the_sliders_filter_as_sampling_does(page, looked):
    page.goto(f"{looked[0]}/inspect")
    flat = np.linspace(0, -6, 60)  # most sets of it do not fit into the 50 likeliest
    steep = np.concatenate([np.linspace(0, -9, 20), np.full(5, -9.0), np.linspace(-10, -14, 35)])  # with ties
    rows = [x - np.log(np.exp(x).sum()) for x in (flat, steep)]
    cases = list(itertools.product((0, 1), (0.05, 0.5, 1.0, 2.0), (0, 1, 22, 50), (0.05, 0.5, 0.95, 1), (0, 0.01, 0.3)))
    scale = [[float(np.log(np.exp(x / T).sum())) for T in TEMPERATURES] for x in rows]
    asked = [[rows[r][:50].tolist(), scale[r], *settings] for r, *settings in cases]
    found = page.evaluate("cases => cases.map((c) => distribution(...c))", asked)
    _, T, k, p, m = (np.array(column) for column in zip(*cases))
    settings = {"temperature": T[:, None], "top_k": np.where(k == 0, 60, k), "top_p": p, "min_p": m[:, None]}
    kept = jax.jit(filter_logits)(np.stack([rows[r] for r, *_ in cases]).astype(np.float32), settings)
    for case, got, wanted in zip(cases, found, np.asarray(jax.nn.softmax(kept))[:, :50], strict=True):
        bound = got["most"] / got["least"] - 1
        np.testing.assert_allclose(got["p"], wanted, rtol=bound + 2e-4, atol=1e-7, err_msg=f"{case}")
        assert bound < 0.2 and (bound == 0 or (wanted > 0).all()), f"{case}: exact where the set is known"
    assert page.evaluate("distribution([-1, -2], [], 0, 0, 1, 0).p") == [1, 0]


def labels_written(page, url: str, name: str, kind: str, count: int) -> None:
    """Answers so many prompts as a labeller with a keyboard."""
    page.goto(f"{url}/label")
    if page.locator("#name").input_value() != name:
        page.locator("#name").fill(name)
        page.get_by_role("button", name="Rank answers" if kind == "rankings" else "Write answers").click()
    shown(page, "#progress", r"\d+ of 20 (ranked|written)")
    for _ in range(count):
        done = int(page.locator("#progress").inner_text().split()[0])
        if kind == "rankings":
            for i, key in enumerate("1223" if done % 2 else "3142"):
                page.locator(".card").nth(i).focus()
                page.keyboard.press(key)
        else:
            page.locator("#answer").fill(f"Answer {done} 好")
        page.keyboard.press("Control+Enter")
        shown(page, "#progress", f"^{done + 1} of 20")


@pytest.mark.browser
def test_labels_of_the_browser_train_a_model(page, looked, tmp_path, compile_cache):
    url, model, folder = looked
    for kind in ("demonstrations", "rankings"):
        labels_written(page, url, "anna", kind, 9)
        if kind == "rankings":
            page.locator(".card").first.focus()
            page.keyboard.press("2")
            page.reload()  # in the middle of an answer, which is kept
            shown(page, "#progress", "^9 of 20")
            assert page.locator(".card").first.locator("[aria-pressed=true]").inner_text() == "2"
        else:
            page.locator("#answer").fill("half of")
            page.reload()
            shown(page, "#progress", "^9 of 20")
            assert page.locator("#answer").input_value() == "half of"
        labels_written(page, url, "anna", kind, 11)
        page.locator("#done").wait_for()
        page.evaluate("sessionStorage.clear()")
    labels_written(page, url, "bob", "demonstrations", 1)
    chats = list(read_conversations(folder / "demonstrations" / "anna.jsonl"))
    assert [m[-1]["content"] for m in chats] == [f"Answer {i} 好" for i in range(20)]
    ranked = list(read_preferences(folder / "rankings" / "anna.jsonl"))
    assert len(ranked) == 20 and [p.ranks for p in ranked[:2]] == [[0, 1, 2, 3], [0, 1, 1, 2]]
    assert len(list(read_conversations(folder / "demonstrations" / "bob.jsonl"))) == 1
    common = """--tokenizer.template llama2 --model.dtype float32 --data.length 64 --data.batch-size 8 --steps 3 --sinks
        --checkpoint.every 3 --evaluate.every 3 --data.validation-fraction 0.2""".split()
    common += ["--mesh.data", str(jax.device_count())]
    for stage, source in (("sft", "demonstrations"), ("reward", "rankings")):
        run = tmp_path / stage
        flags = ["--init", model.run.folder, "--data.source", folder / source / "anna.jsonl", "--run-dir", run]
        assert main([stage, "chat", *map(str, flags), *common]) == 0
        losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert np.isfinite([loss for loss in losses if loss is not None]).all() and any(losses)


@pytest.mark.browser
def test_answers_are_ranked_by_dragging(page, looked):
    url, _, folder = looked
    page.goto(f"{url}/label")
    page.locator("#name").fill("drag")
    page.get_by_role("button", name="Rank answers").click()
    page.locator(".card").first.wait_for()
    assert page.locator("#save").is_disabled()
    for i, place in enumerate((1, 0, 0, 3)):
        page.locator(".card").nth(i).drag_to(page.locator(".place").nth(place))
    assert page.locator(".place").nth(0).locator(".chip").all_inner_texts() == ["B", "C"], "two in a place are a tie"
    page.locator(".place").nth(3).locator(".chip").drag_to(page.locator(".place").nth(2))
    page.get_by_role("button", name="Save and go on").click()
    shown(page, "#progress", "^1 of 20")
    page.get_by_role("button", name="Skip this prompt").click()
    shown(page, "#progress", "^1 of 20 ranked, 1 skipped")
    page.get_by_role("button", name="Take back").first.click()
    shown(page, "#progress", "^0 of 20 ranked, 1 skipped")
    assert (folder / "rankings" / "drag.jsonl").read_text() == ""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious(browser, looked, width, scheme):
    source = axe()
    url, _, _ = looked
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()

    def check(place: str) -> None:
        page.evaluate(source)
        found = page.evaluate("axe.run()")["violations"]
        serious = [
            (v["id"], n["html"][:200]) for v in found if v["impact"] in ("serious", "critical") for n in v["nodes"]
        ]
        assert not serious, (place, serious)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, place

    page.goto(url)
    check("an empty chat")
    drawn = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"
    call = {"function": {"name": "f", "arguments": "1"}}
    said = {"role": "assistant", "content": MARKDOWN, "note": "stopped", "tool_calls": [call]}
    images = [{"id": "p", "name": "red.png", "url": drawn}, {"id": "q", "name": "gone.png"}]
    messages = [{"role": "user", "content": "Hi", "images": images}, said, {"role": "tool", "content": "2"}]
    kept = json.dumps({"id": "a", "changed": 1, "system": "", "messages": messages})
    page.evaluate("kept => localStorage.setItem('gptjax.chat.a', kept)", kept)
    page.evaluate("sessionStorage.setItem('gptjax.current', 'a')")
    page.reload()
    assert page.locator(".message").count() == 3
    check("a chat")
    page.locator(".message.user").get_by_role("button", name="Edit").click()
    check("an edit")
    page.get_by_role("button", name="Settings").click()
    check("the settings")
    if width == 390:
        page.keyboard.press("Escape")
        page.locator("#menu").click()
        check("the conversations")
    page.goto(f"{url}/inspect")
    page.locator("#look").click()
    page.locator("#found").wait_for(timeout=60_000)  # which compiles
    check("the inspector")
    page.goto(f"{url}/label")
    check("a labeller's name")
    page.locator("#name").fill(f"axe{width}{scheme}")
    page.get_by_role("button", name="Rank answers").click()
    page.locator(".card").first.wait_for()
    page.locator(".card").first.focus()
    page.keyboard.press("1")
    check("a ranking")
    page.get_by_role("button", name="Write answers").click()
    page.locator("#answer").wait_for()
    check("a demonstration")
    context.close()
