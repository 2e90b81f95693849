"""Laws of conversations: what is read of them, what is kept, what a terminal and a pipe show."""

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest
from byte_run import byte_run
from commands import GPTJAX, environment, refused

from gptjax.cli import main
from gptjax.config import GenerateConfig, ModelConfig
from gptjax.config.section import InputError
from gptjax.data.dialogue import read_conversations
from gptjax.generation.text_stream import TextStream
from gptjax.runs.load import load_model
from gptjax.serve.session import Session, Transcript
from gptjax.serve.terminal import finished, talk

pytestmark = pytest.mark.usefixtures("compile_cache")
CONTEXT = 256
GREEDY = GenerateConfig(max_new_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    model = ModelConfig(num_layers=1, width=16, num_heads=2, dtype="float32")
    return byte_run(tmp_path_factory.mktemp("chat") / "run", model, CONTEXT)


@pytest.fixture
def session(run) -> Session:
    model = load_model(run, None)
    return Session(model, model.tokenizer, GREEDY)


def piped(session: Session, text: str) -> list[str]:
    out = io.StringIO()
    assert talk(session, io.StringIO(text), out) == 0
    return out.getvalue().splitlines()


def test_a_first_answer_is_that_of_generate_and_later_ones_have_read_the_turns_before(run, session, capsys):
    first = "".join(session.ask("abc"))
    flags = ["--chat", "--prompt", "abc", "--max-new-tokens", "8", "--temperature", "0"]
    assert main(["generate", str(run), *flags]) == 0
    assert capsys.readouterr().out == f"{first}\n"
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": first}]
    list(session.ask("de"))
    assert session.messages[:3] == [*turns, {"role": "user", "content": "de"}]
    asked = session.renderer.render(session.tokenizer, session.messages[:3], add_generation_prompt=True)[0]
    session.messages.pop()
    assert session.prepare().ids == asked


def test_whole_turns_are_left_out_where_all_do_not_fit_and_the_system_message_stays(session):
    session.system = "be brief"
    session.messages = [
        {"role": role, "content": f"{i}" * 30} for i in range(5) for role in ("user", "assistant")
    ][:-1]  # fmt: skip
    prepared = session.prepare()
    text = session.tokenizer.decode(prepared.ids)
    assert 0 < prepared.left_out and prepared.left_out % 2 == 0, "a question goes with its answer"
    assert "be brief" in text and "4" * 30 in text and "0" * 30 not in text
    assert len(prepared.ids) + prepared.room <= CONTEXT
    fuller = dict(session.messages[prepared.left_out - 2])
    session.messages = [fuller, *session.messages[prepared.left_out - 1 :]]
    assert session.prepare().left_out == 2, "as few as can be"
    session.reset()
    with pytest.raises(
        InputError, match=r"the message has 3\d\d tokens with what stands around it; wanted at most 248"
    ):
        session.ask("x" * 300)
    assert not session.messages, "what was refused is no part of the conversation"


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(session):
    pieces = session.ask("abc")
    said = next(pieces)
    pieces.close()
    assert session.messages[-1] == {"role": "assistant", "content": said}


def test_retry_draws_another_answer_and_undo_takes_back_a_turn(session):
    session.settings = GenerateConfig(max_new_tokens=8, temperature=1.0)
    one = "".join(session.ask("abc"))
    other = "".join(session.retry())
    assert one != other and [m["content"] for m in session.messages] == ["abc", other]
    session.undo()
    assert "".join(session.ask("abc")) == one, "an answer is a function of the messages and the settings"
    assert session.undo() and not session.messages and not session.undo()


def test_a_conversation_is_saved_as_fine_tuning_reads_it_and_goes_on(session, tmp_path):
    file = tmp_path / "chats.jsonl"
    lines = piped(
        session, f"/system be brief\nabc\n/save {file}\n/reset\n/load {file}\n/undo\n/tokens\n/exit\nnever read\n"
    )
    assert lines[0] == "system: be brief" and "saved 2 messages" in lines and "2 messages" in lines
    assert lines[-1] == "no message yet; the model reads 256 tokens"
    (messages,) = read_conversations(file)
    assert [m["role"] for m in messages] == ["system", "user", "assistant"] and messages[0]["content"] == "be brief"


def test_a_model_without_a_template_goes_on_with_a_transcript(session):
    model, tokenizer = session.model, session.tokenizer
    tokenizer.template = ""
    plain = Session(model, tokenizer, GREEDY)
    plain.messages = [{"role": "user", "content": "a?"}]
    text = tokenizer.decode(Transcript().render(tokenizer, plain.messages)[0])
    assert text.endswith("Assistant: The capital of France is Paris.\nUser: a?\nAssistant:")
    assert plain.prepare().ids == tokenizer.prompt_ids(text)
    plain.reset()
    answer = "".join(plain.ask("b?"))
    assert plain.messages[1]["content"] == answer and plain.messages[0]["content"] == "b?"
    stream = TextStream(tokenizer, Transcript.STOP, drops_space=True)
    assert stream.push(tokenizer.encode(" It is.\nUser: and")) == "It is.", "it does not go on for the user"


def test_wrong_input_is_one_line(run, session, tmp_path, capsys, monkeypatch):
    for text, message in (
        ("/parms", "there is no setting /parms; did you mean /params?"),
        ("/params temperature=hot", "temperature: got 'hot', wanted a number"),
        ("/params temperature=-1", "temperature=-1"),
        ("/save", "/save: a file is missing; wanted /save FILE"),
        (f"/save {tmp_path}", "can't be written"),
        ("/load nowhere.jsonl", "nowhere.jsonl"),
        ("/retry", "there is no message to answer yet"),
    ):
        with pytest.raises(InputError) as e:
            piped(session, text)
        assert message in str(e.value) and "\n" not in str(e.value)
    assert session.settings == GREEDY
    assert "nowhere" in refused(capsys, "chat", tmp_path / "nowhere")
    assert "temperature=-1" in refused(capsys, "chat", run, "--temperature", "-1")
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 300 + "\n"))
    assert "the message has" in refused(capsys, "chat", run)


def test_paragraphs_are_finished_at_blank_lines_outside_of_code():
    assert finished("one\n\ntwo") == len("one\n\n")
    assert finished("one\n```\na\n\nb") == 0
    assert finished("```\na\n\nb\n```\n\nrest") == len("```\na\n\nb\n```\n\n")
    assert finished("one\n") == 0 and finished("") == 0


@pytest.mark.slow
def test_a_terminal_shows_answers_goes_on_after_mistakes_and_stops_an_answer(run, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 90, 0, 0))
    command = [*GPTJAX, "chat", str(run), "--max-new-tokens", "40"]
    # A shell's job in the background ignores Ctrl-C, and so would what it starts.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    settings = {"env": environment(tmp_path, TERM="xterm-256color"), "start_new_session": True, "preexec_fn": heard}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, **settings)
    os.close(theirs)
    shown = b""

    def until(text: str, times: int = 1) -> None:
        nonlocal shown
        while len(re.findall(text, shown.decode(errors="replace"))) < times:
            shown += os.read(ours, 4096)

    until("/help lists commands")
    until("> ")
    for line, expected in (("abc", ""), ("/parms", "did you mean /params"), ("/tokens", "of 256 tokens in 2 messages")):
        os.write(ours, f"{line}\n".encode())
        until(expected)
    # What comes before readline listens may be lost, so it is pressed again where nothing follows.
    ends = time.monotonic() + 60
    while b"Ctrl-D or /exit ends" not in shown:
        assert time.monotonic() < ends, shown
        if select.select([ours], [], [], 0.5)[0]:
            shown += os.read(ours, 4096)
        else:
            os.kill(process.pid, signal.SIGINT)
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while process.poll() is None:
            if select.select([ours], [], [], 0.5)[0]:
                os.read(ours, 4096)
            else:
                os.write(ours, b"\x04")
    os.close(ours)
    assert process.wait(60) == 0
