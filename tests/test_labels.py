"""Laws of labels: sft and reward read what is written, nothing acknowledged is lost, and nobody writes twice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gptjax.config.section import InputError
from gptjax.data.dialogue import read_conversations
from gptjax.data.preferences import read_preferences
from gptjax.serve import labels as module
from gptjax.serve.labels import LabelFolder

ANSWERS = ["a", "b", "c", "d"]


def write_prompts(folder: Path, count: int = 5, **more) -> Path:
    """A folder of labels with so many prompts."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": f"question {i}", **more}) for i in range(count)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def labels(tmp_path) -> LabelFolder:
    return LabelFolder(write_prompts(tmp_path / "labels", answers=ANSWERS))


def test_what_is_written_is_what_the_stages_read(labels):
    first, second, *_ = labels.prompts
    labels.demonstrate("anna", first, "because\n\u2028 it is 好的 </b>")
    labels.rank("anna", first, ["c", "a", "b", "d"], [2, 1, 2, 4])
    labels.rank("bob", second, ANSWERS, [1, 1, 1, 3])
    asked = {"role": "user", "content": "question 0"}
    told = {"role": "assistant", "content": "because\n\u2028 it is 好的 </b>"}
    assert list(read_conversations(labels.folder / "demonstrations" / "anna.jsonl")) == [[asked, told]]
    (of_anna,) = read_preferences(labels.folder / "rankings" / "anna.jsonl")
    (of_bob,) = read_preferences(labels.folder / "rankings" / "bob.jsonl")
    assert of_anna.prompt == [asked] and [m[0]["content"] for m in of_anna.answers] == ["a", "c", "b", "d"]
    assert of_anna.ranks == [0, 1, 1, 2] and of_bob.ranks == [0, 0, 0, 1], "a tie is a tie"


def test_each_labeller_answers_every_prompt_once(labels):
    first, second, third, *_ = labels.prompts
    assert labels.next("demonstrations", "anna").id == first
    labels.demonstrate("anna", first, "yes")
    labels.demonstrate("anna", first, "yes")  # sent again, since its acknowledgement was lost
    with pytest.raises(InputError, match="has answered this prompt already"):
        labels.demonstrate("anna", first, "no")
    labels.skip("demonstrations", "anna", second)
    assert labels.next("demonstrations", "anna").id == third and labels.next("demonstrations", "bob").id == first
    assert labels.next("rankings", "anna").id == first, "to skip what to write is not to skip what to rank"
    assert labels.next("demonstrations", "anna", behind=third).id not in (first, second, third)
    assert labels.progress("demonstrations", "anna") == (1, 1, 5) and labels.progress("rankings", "anna") == (0, 0, 5)
    assert len((labels.folder / "demonstrations" / "anna.jsonl").read_text().splitlines()) == 1
    assert labels.take_back("demonstrations", "anna") == first
    assert labels.next("demonstrations", "anna").id == first
    with pytest.raises(InputError, match="no answer to take back"):
        labels.take_back("demonstrations", "anna")
    again = LabelFolder(labels.folder)  # another server, later
    assert again.next("demonstrations", "anna").id == first and again.prompts.keys() == labels.prompts.keys()


def test_half_a_line_of_a_writer_that_died_is_cut_off(labels):
    first, second, *_ = labels.prompts
    labels.demonstrate("anna", first, "one")
    path = labels.folder / "demonstrations" / "anna.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "' + second.encode() + b'", "mess')
    assert labels.progress("demonstrations", "anna").done == 1
    labels.demonstrate("anna", second, "two")
    assert path.read_bytes().startswith(whole) and len(list(read_conversations(path))) == 2
    path.write_bytes(path.read_bytes() + b'{"torn')
    LabelFolder(labels.folder)
    assert len(list(read_conversations(path))) == 2, "a server that starts leaves files that can be read"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))  # as some editors do
    assert LabelFolder(labels.folder).progress("demonstrations", "anna").done == 2
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(InputError, match=r"anna.jsonl:3 is no line that was written here"):
        labels.progress("demonstrations", "anna")


def test_nothing_that_was_acknowledged_is_lost_when_the_server_is_killed(tmp_path):
    folder = write_prompts(tmp_path / "labels", 3000)
    code = """
import sys
from gptjax.serve import labels as module
from gptjax.serve.labels import LabelFolder
labels = LabelFolder(sys.argv[1])
for i, prompt in enumerate(labels.prompts):
    labels.demonstrate("anna", prompt, f"answer {i} " + "x" * 3000)
    print(i, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    acknowledged = 1 + len(process.communicate()[0].splitlines())
    kept = [m[1]["content"].split()[1] for m in read_conversations(LabelFolder(folder).path("demonstrations", "anna"))]
    assert kept[:acknowledged] == [str(i) for i in range(acknowledged)]
    assert len(kept) in (acknowledged, acknowledged + 1)


def test_labellers_who_write_at_once_lose_nothing_and_write_nothing_twice(tmp_path, monkeypatch):
    folder = write_prompts(tmp_path / "labels", 20)
    many = [LabelFolder(folder) for _ in range(5)]  # five servers; anna has four windows
    together, append = threading.Barrier(len(many)), module._append_line

    def slowly(*args) -> None:
        time.sleep(0.002)
        append(*args)

    monkeypatch.setattr(module, "_append_line", slowly)

    def write(labels: LabelFolder, name: str) -> None:
        for prompt in labels.prompts:
            together.wait(30)
            labels.demonstrate(name, prompt, f"{name} answers")

    threads = [threading.Thread(target=write, args=pair) for pair in zip(many, ["anna"] * 4 + ["bob"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("anna", "bob"):
        assert many[0].progress("demonstrations", name).done == 20
        assert len(list(read_conversations(many[0].path("demonstrations", name)))) == 20


def test_samples_are_drawn_once_and_shown_to_each_in_an_order_of_their_own(tmp_path):
    labels = LabelFolder(write_prompts(tmp_path / "labels", 8))
    prompts = list(labels.prompts.values())
    assert labels.samples(prompts[0]) is None
    assert labels.keep_samples(prompts[0], ["x", "y", "x", "z"], "m, step 1") == ["x", "y", "z"]
    assert labels.keep_samples(prompts[0], ["other"], "m, step 2") == ["x", "y", "z"], "all rank the same ones"
    for prompt in prompts[1:]:
        labels.keep_samples(prompt, ANSWERS, "m, step 1")
    orders = {name: [labels.shown(prompt, name) for prompt in prompts] for name in ("anna", "bob")}
    assert orders["anna"] != orders["bob"] and orders["anna"] == [labels.shown(p, "anna") for p in prompts]
    assert all(sorted(shown) == ANSWERS for shown in orders["anna"][1:])
    with pytest.raises(InputError, match="not the answers of this prompt"):
        labels.rank("anna", prompts[0].id, ["x", "y", "w"], [1, 2, 3])


@pytest.mark.parametrize("name", ["", "../anna", "a/b", "a\\b", ".", "a.jsonl", "x" * 41, "a\0", "a\n", 3, None])
def test_a_name_is_no_path(labels, name):
    with pytest.raises(InputError, match="wanted 1 to 40 letters"):
        labels.demonstrate(name, next(iter(labels.prompts)), "yes")
    assert not list(labels.folder.glob("*/*")), "nothing was written"
    with pytest.raises(InputError, match="wanted one of demonstrations, rankings"):
        labels.path("../demonstrations", "anna")


@pytest.mark.parametrize(
    "ranks", [[1, 2, 3], [1, 1, 1, 1], [0, 1, 2, 3], [1, 2, 3, 5], [1, 2, 3, 2.5], [1, 2, 3, True]]
)
def test_ranks_that_say_nothing_are_refused(labels, ranks):
    with pytest.raises(InputError, match="wanted 4 numbers from 1"):
        labels.rank("anna", next(iter(labels.prompts)), ANSWERS, ranks)


def test_bad_answers_are_refused_and_leave_no_trace(labels):
    first = next(iter(labels.prompts))
    for text in ("", "  \n", "x" * 100_001, None, ["a"]):
        with pytest.raises(InputError, match="wanted a text of 1 to 100,000 characters"):
            labels.demonstrate("anna", first, text)
    with pytest.raises(InputError, match="half a surrogate pair"):
        labels.demonstrate("anna", first, "\ud800")
    for prompt_id in ("nothing", ["x"], None):
        with pytest.raises(InputError, match="is no prompt of prompts.jsonl"):
            labels.demonstrate("anna", prompt_id, "yes")
    assert not labels.progress("demonstrations", "anna").done


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "x"}', 'wanted {"prompt": a text'),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}', 'wanted {"prompt": a text'),
        ('{"prompt": ""}\n{"prompt": ""}', "stands in the file before"),
        ('{"prompt": "x", "answers": ["a", "a"]}', "two or more different texts"),
        ('{"prompt": "x", "answers": ["a"]}', "two or more different texts"),
        ("{", "found no JSON"),
    ],
)
def test_prompts_of_another_form_are_refused(tmp_path, line, message):
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        LabelFolder(tmp_path)


def test_a_folder_without_prompts_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no prompts.jsonl"):
        LabelFolder(tmp_path)
    assert os.listdir(tmp_path) == []
