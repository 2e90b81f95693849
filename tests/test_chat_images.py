"""Laws of pictures in conversations: one answer in the terminal, by generate, from Python and over HTTP."""

import base64
import io
from pathlib import Path

import httpx
import pytest
from byte_run import byte_run
from commands import refused
from serving import serving
from test_serve_model import alone

import gptjax
from gptjax.cli import main
from gptjax.config import GenerateConfig, ModelConfig, VisionConfig
from gptjax.config.section import InputError
from gptjax.config.serving import ServeConfig
from gptjax.data.dialogue import read_conversations
from gptjax.data.image_messages import pictures_of
from gptjax.generation.image_prompts import open_picture
from gptjax.runs.load import LoadedModel, load_model
from gptjax.serve.service import Service
from gptjax.serve.session import Session
from gptjax.serve.terminal import talk

pytestmark = pytest.mark.usefixtures("compile_cache")
VISION = VisionConfig(patch=4, side=16, merge=2)
T, CONTEXT = VISION.num_tokens, 128
GREEDY = GenerateConfig(max_new_tokens=8, temperature=0.0)


def make(folder: Path, vision: VisionConfig) -> Path:
    """A run with random weights that tell one picture from another."""
    model = ModelConfig(num_layers=1, width=16, num_heads=2, dtype="float32", init_std=1.0, tied=False, vision=vision)
    return byte_run(folder, model, CONTEXT)


@pytest.fixture(scope="module")
def run(tmp_path_factory, compile_cache) -> Path:
    return make(tmp_path_factory.mktemp("seeing") / "run", VISION)


@pytest.fixture(scope="module")
def model(run) -> LoadedModel:
    return alone(load_model(run, None))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    """A red PNG and a JPEG of two colours."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("pictures")
    paths = [str(folder / "red one.png"), str(folder / "two.jpg")]
    image.new("RGB", (20, 12), "red").save(paths[0])
    two = image.new("RGB", (12, 20), "white")
    two.paste("blue", (0, 0, 12, 9))
    two.save(paths[1])
    return paths


def piped(session: Session, text: str) -> list[str]:
    out = io.StringIO()
    assert talk(session, io.StringIO(text), out) == 0
    return out.getvalue().splitlines()


def test_terminal_generate_python_and_server_give_the_same_answer(run, model, pictures, capsys):
    session = Session(model, model.tokenizer, GREEDY)
    for path in pictures:
        session.add_picture(open_picture(path))
    said = "".join(session.ask("what?"))
    flags = ["--image", *pictures, "--max-new-tokens", "8", "--temperature", "0", "--prompt", "what?"]
    assert main(["generate", str(run), "--chat", *flags]) == 0
    assert capsys.readouterr().out == f"{said}\n"
    settings = {"max_new_tokens": 8, "temperature": 0.0}
    assert gptjax.chat(model, "what?", images=pictures, **settings) == said
    parts = [{"type": "image", "image": Path(path).read_bytes()} for path in pictures]
    spoken = [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]
    assert gptjax.chat(model, spoken, **settings) == said
    assert gptjax.chat(model, "what?", **settings) != said
    assert main(["generate", str(run), *flags]) == 0
    continued = gptjax.generate(model, "what?", images=pictures, **settings)
    assert capsys.readouterr().out == f"what?{continued}\n" and continued != gptjax.generate(model, "what?", **settings)
    service = Service(model, ServeConfig(slots=2))
    service.scheduler.start()
    with serving(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        urls = [f"data:image/{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
                for kind, path in zip(("png", "jpeg"), pictures)]  # fmt: skip
        content = [*({"type": "image_url", "image_url": {"url": u}} for u in urls), {"type": "text", "text": "what?"}]
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
        answer, again = (client.post("/v1/chat/completions", json=body).json() for _ in range(2))
    service.close()
    service.scheduler.stop()
    assert answer["choices"][0]["message"]["content"] == said == again["choices"][0]["message"]["content"]
    used = again["usage"]["prompt_tokens_details"]
    assert used["image_tokens"] == 2 * T and used["cached_tokens"] == again["usage"]["prompt_tokens"] - 1


def test_a_pipe_takes_pictures_counts_saves_and_reads_them_again(model, pictures, tmp_path):
    session, file = Session(model, model.tokenizer, GREEDY), tmp_path / "chats.jsonl"
    given = f"/image {pictures[0]}\n/image {pictures[1]}\nab\n"
    lines = piped(session, f"{given}/tokens\n/save {file}\n/reset\n/load {file}\n/tokens\n")
    assert lines[0] == f"{pictures[0]}: {T} tokens, before the next message"
    counts = [line for line in lines if "tokens in" in line]
    texts = Session(model, model.tokenizer, GREEDY)
    texts.messages = [{"role": "user", "content": "ab"}, *session.messages[1:]]
    assert counts == [f"{int(texts.describe().split()[0]) + 2 * T} of {CONTEXT} tokens in 2 messages"] * 2
    (messages,) = read_conversations(file)
    assert [picture.content for picture in pictures_of(messages)] == [Path(path).read_bytes() for path in pictures]
    assert messages[0]["content"][-1] == {"type": "text", "text": "ab"} and session.messages == messages
    first = "".join(session.retry())
    session.reset()
    for path in pictures:
        session.add_picture(open_picture(path))
    assert "".join(session.ask("ab")) == first, "of the same pictures"
    list(session.ask("cd"))
    assert session.messages[-2]["content"] == "cd", "the pictures stand before one message alone"


def test_whole_turns_are_left_out_with_their_pictures(model, pictures):
    session = Session(model, model.tokenizer, GREEDY)
    for turn in range(8):
        session.add_picture(open_picture(pictures[turn % 2]))
        list(session.ask("x" * 12))
    assert session.left_out > 0 and session.left_out % 2 == 0
    answer = session.messages.pop()
    prepared = session.prepare()
    assert sum(i < 0 for i in prepared.ids) % T == 0 and len(prepared.ids) + prepared.room <= CONTEXT
    session.messages.append(answer)
    session.add_picture(open_picture(pictures[0]))
    with pytest.raises(InputError, match="the message has"):
        session.ask("x" * CONTEXT)
    assert session.messages[-1] == answer and len(session._pictures) == 1, "all is as it was"


def test_wrong_pictures_are_one_line_and_exit_code_2(run, model, pictures, tmp_path, capsys):
    blind = make(tmp_path / "blind", VisionConfig())
    (tmp_path / "text.png").write_text("no picture")
    reads = "this model reads no images (model.vision.patch=0)"
    ask = ("--prompt", "x", "--image")
    for words in (("generate", blind, *ask, pictures[0]), ("generate", blind, "--chat", *ask, pictures[0]),
                  ("chat", blind, "--image", pictures[0])):  # fmt: skip
        assert reads in refused(capsys, *words)
    for verb in (("generate", run, *ask), ("generate", run, "--chat", *ask), ("chat", run, "--image")):
        assert "nowhere.png' can't be read" in refused(capsys, *verb, tmp_path / "nowhere.png")
        assert "is no file; wanted a picture" in refused(capsys, *verb, tmp_path)
        assert "text.png" in refused(capsys, *verb, tmp_path / "text.png")
    assert "a text with --image" in refused(capsys, "generate", run, "--image", pictures[0])
    session = Session(model, model.tokenizer, GREEDY)
    with pytest.raises(InputError, match="/image: a file is missing; wanted /image FILE"):
        piped(session, "/image")
    assert not session._pictures
