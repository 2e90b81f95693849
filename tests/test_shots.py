"""Laws of few-shot prompts: the prompt stands behind the examples, as one more, and the answer ends before the next."""

from pathlib import Path

import pytest
from commands import refused
from test_chat import run as run  # a fixture

from gptjax.cli import main
from gptjax.config.section import InputError
from gptjax.generation import engine
from gptjax.generation.shots import SHIPPED, read_shots
from gptjax.generation.text_stream import TextStream
from gptjax.tokenizer import BytesTokenizer

pytestmark = pytest.mark.usefixtures("compile_cache")
HEADER = '{"instruction": "Add one.", "labels": ["In", "Out"]}\n'


def test_a_prompt_stands_behind_the_examples_and_the_answer_ends_where_the_next_begins(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(HEADER + '{"input": "1", "output": "2"}\n\n{"input": " 3", "output": "4\\n"}\n')
    shots = read_shots(str(file))
    assert shots.prompt(" 5\n") == "Add one.\n\nIn: 1\nOut: 2\n\nIn: 3\nOut: 4\n\nIn: 5\nOut:"
    tokenizer = BytesTokenizer()
    said = TextStream(tokenizer, (shots.stop,)).push(tokenizer.encode(" 6\n\nIn: 7\nOut: 8"), final=True)
    assert said == " 6"


def test_the_shipped_files_are_read_by_name():
    folder = next(folder for folder in SHIPPED if folder.is_dir())
    assert {path.stem for path in folder.glob("*.jsonl")} == {"translation", "questions", "sentiment", "summary"}
    for path in folder.glob("*.jsonl"):
        shots = read_shots(path.stem)
        assert shots == read_shots(str(path)) and len(shots.examples) >= 3 and shots.instruction
    assert {said for _, said in read_shots("sentiment").examples} == {"positive", "negative"}
    assert Path(folder).parent.name == "configs", "which the wheel holds"


def test_generate_prints_the_answers_alone(run, tmp_path, capsys, monkeypatch):
    asked = []

    def stream(decoder, params, tokenizer, cfg, **more):
        asked.append(cfg)
        yield from ((row, piece) for row in range(len(cfg.prompt)) for piece in (" ", f" {row}", "!"))

    monkeypatch.setattr(engine, "stream", stream)
    file = tmp_path / "mine.jsonl"
    file.write_text(HEADER + '{"input": "1", "output": "2"}\n')
    assert main(["generate", str(run), "--shots", str(file), "--prompt", "5"]) == 0
    assert capsys.readouterr().out == "0!\n"
    assert asked[0].prompt == ("Add one.\n\nIn: 1\nOut: 2\n\nIn: 5\nOut:",) and asked[0].stop == ("\n\nIn:",)
    assert main(["generate", str(run), "--shots", str(file), "--prompt", "5", "6"]) == 0
    assert capsys.readouterr().out == "0!\n1!\n"


def test_a_wrong_file_is_one_line(run, capsys, tmp_path):
    file = tmp_path / "x.jsonl"
    for content, says in (
        ("", ":1: wanted"), ("[]\n", ":1: wanted"), ('{"labels": ["a"]}\n', ":1: wanted"), ("{", "can't be read as"),
        (HEADER + '{"input": "a"}\n', ":2: wanted"), (HEADER + '{"input": "a", "output": " "}\n', ":2: wanted"),
    ):  # fmt: skip
        file.write_text(content)
        with pytest.raises(InputError) as e:
            read_shots(str(file))
        assert says in str(e.value) and "\n" not in str(e.value)
    assert "wanted one, or one of questions, sentiment" in refused(
        capsys, "generate", run, "--shots", "nothing", "--prompt", "a"
    )
    assert "none with --chat" in refused(capsys, "generate", run, "--shots", "summary", "--chat", "--prompt", "a")
