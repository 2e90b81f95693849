"""Laws of preparing: no kill loses or doubles a document, no worker changes a byte, nothing goes uncounted."""

import gzip
import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from corpora import damage, prepared, run_python, splits, stored, write_jsonl

from gptjax.cli import main
from gptjax.config import TokenizerConfig
from gptjax.config.section import InputError
from gptjax.data import encode, scan
from gptjax.data.corpus import open_corpus
from gptjax.data.prepare import WORK
from gptjax.data.worker import Worker


def files(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def text(tmp_path) -> Path:
    """Two hundred documents in three files, one of them longer than several parts."""
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [f"document {i}\n" + f"line {i} \u4e2d\n" * (i % 17) for i in range(199)]
    write_jsonl(folder / "a.jsonl", lines[:100])
    (folder / "b.txt").write_text("".join(f"the long one, line {i}\n" for i in range(9000)))
    write_jsonl(folder / "c.jsonl", lines[100:])
    return folder


PROGRAM = """
import os, signal, sys
from gptjax.config import PrepareConfig, TokenizerConfig
from gptjax.data import encode, shards, worker
from gptjax.data.prepare import prepare

encode.PART_BYTES, shards.PAGE, shards.SHARD_BYTES = 50_000, 64, 1 << 16
source, out, workers, kind, vocab_size, when = sys.argv[1:]
tokenizer = TokenizerConfig(kind=kind, vocab_size=int(vocab_size))
cfg = PrepareConfig(source=source, out=out, workers=int(workers), tokenizer=tokenizer)
"""

# Dies just before the n-th file would get its name; says which parts did.
KILLED_AT_A_COMMIT = """
replace, left = os.replace, [int(when)]

def commit(old, new):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(old, new)
    if str(new).endswith(".npz"):
        print(new, flush=True)

os.replace = commit
prepare(cfg)
"""

# Dies when some parts are done, and its workers are at others; says who these are.
KILLED_AT_WORK = """
init = worker.Worker.__init__

def remembered(self, *args):
    init(self, *args)
    print(self.process.pid, flush=True)

worker.Worker.__init__ = remembered

def progress(what, done, total):
    if what == "tokens" and int(when) and done > total * int(when) / 100:
        os.kill(os.getpid(), signal.SIGKILL)

prepare(cfg, progress)
"""


def run(program: str, *words) -> tuple[int, list[str]]:
    done = run_python(PROGRAM + program, *words, codes=(0, -signal.SIGKILL))
    return done.returncode, done.stdout.split()


@pytest.mark.slow
def test_a_kill_at_any_commit_changes_nothing_and_no_finished_part_is_redone(tmp_path, text):
    tokenizer = ("sentencepiece", 300)
    assert run(KILLED_AT_A_COMMIT, text, tmp_path / "whole", 1, *tokenizer, 0)[0] == 0
    parts, kills, code = [], 0, -signal.SIGKILL
    while code:
        # One later each time: the files of the last phase are made anew by every run.
        code, done = run(KILLED_AT_A_COMMIT, text, tmp_path / "killed", 1, *tokenizer, 2 + kills)
        parts += done
        kills += 1
    assert kills > 8
    assert len(parts) == len(set(parts)) == 4
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_kill_at_work_leaves_no_worker_and_changes_nothing(tmp_path, text):
    args = "bytes", 258
    for percent in (1, 60):
        code, workers = run(KILLED_AT_WORK, text, tmp_path / "killed", 2, *args, percent)
        assert code == -signal.SIGKILL and len(workers) == 2
        assert list((tmp_path / "killed" / WORK).glob("part-*.npz"))
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline, "the workers outlived their parent"
            time.sleep(0.05)
    assert run(KILLED_AT_WORK, text, tmp_path / "killed", 3, *args, 0)[0] == 0
    assert run(KILLED_AT_WORK, text, tmp_path / "whole", 1, *args, 0) == (0, [])
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, text, monkeypatch):
    monkeypatch.setattr(encode, "PART_BYTES", 30_000)
    tokenizer = TokenizerConfig(vocab_size=300)
    one = prepared(text, tmp_path / "one", tokenizer=tokenizer)
    two = prepared(text, tmp_path / "two", tokenizer=tokenizer, workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    monkeypatch.setattr(encode, "PART_BYTES", 1 << 30)
    prepared(text, tmp_path / "whole", tokenizer=tokenizer)
    assert files(tmp_path / "one") == files(tmp_path / "whole")  # where parts end is not seen either
    long = (text / "b.txt").read_text()
    (head,), (tail,) = ([t for t in texts if t in long] for texts in stored(two).values())
    assert head + tail == long
    assert one.sha256 == two.sha256


def test_the_bytes_of_a_page_are_the_same_in_every_process(tmp_path, text):
    prepared(text, tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("corpus-train.array_record-*")
    data = shard.read_bytes()
    # Left to itself, protobuf orders a map by a hash that is another one in each process.
    assert 0 < data.index(b"\x06starts") < data.index(b"\x06tokens")


def test_a_lost_worker_is_one_line_and_the_next_run_goes_on(tmp_path, text, monkeypatch):
    monkeypatch.setattr(encode, "PART_BYTES", 30_000)
    send = Worker.send

    def kill_at_the_third(worker, message):
        send(worker, message)
        if getattr(message[1], "name", "") == "part-000002.npz":
            worker.process.kill()

    monkeypatch.setattr(Worker, "send", kill_at_the_third)
    with pytest.raises(InputError, match="a worker process was killed by signal 9 .*run the same command again"):
        prepared(text, tmp_path / "out", workers=2)
    monkeypatch.setattr(Worker, "send", send)
    prepared(text, tmp_path / "out", workers=2)
    prepared(text, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_damaged_part_is_made_anew(tmp_path, text):
    assert run(KILLED_AT_WORK, text, tmp_path / "out", 2, "bytes", 258, 50)[0] == -signal.SIGKILL
    part = sorted((tmp_path / "out" / WORK).glob("part-*.npz"))[0]
    damage(part, part.stat().st_size // 2)
    with pytest.raises(AssertionError, match=f"{part.name} was damaged and is deleted; run the same command again"):
        run(KILLED_AT_WORK, text, tmp_path / "out", 2, "bytes", 258, 0)
    assert run(KILLED_AT_WORK, text, tmp_path / "out", 2, "bytes", 258, 0)[0] == 0
    open_corpus(tmp_path / "out").verify()


@pytest.mark.parametrize("bucket", [1 << 20, 7])
def test_of_equal_documents_the_first_is_kept_and_the_others_are_counted(tmp_path, monkeypatch, bucket):
    monkeypatch.setattr(scan, "_BUCKET", bucket)
    monkeypatch.setattr(scan, "_CHUNK", 10)
    texts = [f"text {i % 40}" for i in range(100)] + ["once", "text 3 "]
    (tmp_path / "text").mkdir()
    write_jsonl(tmp_path / "text" / "a.jsonl", texts[:50])
    write_jsonl(tmp_path / "text" / "b.jsonl", texts[50:])
    corpus = prepared(tmp_path / "text", tmp_path / "out", validation_fraction=0.2)
    found = stored(corpus)
    assert sorted(found["train"] + found["validation"]) == sorted(set(texts))
    for split in found.values():
        assert split == sorted(split, key=texts.index)  # of the first place, in the order of the source
    left = corpus.manifest.report
    assert (left.documents, left.duplicates, left.too_short, left.too_long) == (102, 60, 0, 0)
    everything = stored(prepared(tmp_path / "text", tmp_path / "all", validation_fraction=0.2, deduplicate=False))
    assert sorted(everything["train"] + everything["validation"]) == sorted(texts)
    assert {name: set(split) for name, split in everything.items()} == {n: set(s) for n, s in found.items()}


def test_documents_are_left_out_by_their_bytes_and_counted(tmp_path):
    texts = ["", "\u4e2d", "ab", "abc", "abcd", "abcde", "", "\u4e2d\u4e2d"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    by_default = prepared(tmp_path / "a.jsonl", tmp_path / "out", validation_fraction=0.3)
    assert by_default.manifest.report.too_short == 2  # the empty ones
    found = stored(by_default)
    assert sorted(found["train"] + found["validation"]) == sorted(t for t in texts if t)
    corpus = prepared(tmp_path / "a.jsonl", tmp_path / "few", validation_fraction=0.3, min_bytes=3, max_bytes=4)
    left = corpus.manifest.report
    assert (left.documents, left.too_short, left.too_long, left.duplicates) == (8, 3, 2, 0)
    found = stored(corpus)
    assert sorted(found["train"] + found["validation"]) == ["abc", "abcd", "\u4e2d"]


def test_a_single_text_that_is_kept_is_split_by_its_tail(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["", "0123456789", "x"])
    found = stored(prepared(tmp_path / "a.jsonl", tmp_path / "out", validation_fraction=0.3, min_bytes=2))
    assert found == {"train": ["0123456"], "validation": ["789"]}


def test_a_document_is_held_out_as_the_holdout_says(tmp_path):
    texts = [f"text {i}" for i in range(200)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    wanted = splits(tmp_path / "a.jsonl", 0.2)
    assert stored(prepared(tmp_path / "a.jsonl", tmp_path / "out", validation_fraction=0.2)) == wanted


def test_nothing_left_is_an_error(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["", "a"])
    with pytest.raises(InputError, match="has no text in it"):
        prepared(tmp_path / "a.jsonl", tmp_path / "out", min_bytes=2)
    write_jsonl(tmp_path / "a.jsonl", ["same", "same"])
    with pytest.raises(InputError, match="its 4 bytes of text can't be split in two; wanted two different texts"):
        prepared(tmp_path / "a.jsonl", tmp_path / "out")


def test_a_corrupt_file_leaves_nothing_behind_but_its_name(tmp_path, capsys):
    source = tmp_path / "text"
    source.mkdir()
    write_jsonl(source / "a.jsonl", [f"a {i}" for i in range(50)])
    lines = "".join(json.dumps({"text": f"b {i} " + os.urandom(500).hex()}) + "\n" for i in range(400))
    (source / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-1000])
    write_jsonl(source / "c.jsonl", [f"c {i}" for i in range(50)])
    with pytest.raises(InputError, match=r"b.jsonl.gz: line \d+ cannot be unpacked"):
        prepared(source, tmp_path / "out")
    corpus = prepared(source, tmp_path / "out", max_corrupt=1)
    (source / "b.jsonl.gz").rename(tmp_path / "b.jsonl.gz")
    without = prepared(source, tmp_path / "without")
    assert stored(corpus) == stored(without) and corpus.sha256 == without.sha256
    (tmp_path / "b.jsonl.gz").rename(source / "b.jsonl.gz")
    assert len(corpus.manifest.report.corrupt) == 1 and "b.jsonl.gz" in corpus.manifest.report.corrupt[0]
    with pytest.raises(InputError, match="out was prepared without 1 corrupt files, max_corrupt=0: .*b.jsonl.gz"):
        prepared(source, tmp_path / "out")
    assert main(["data", "verify", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert "left out of 100 documents: none, and 1 corrupt file\n" in told
    assert "corrupt: " in told and "b.jsonl.gz: line" in told


def test_the_files_of_any_tokenizer_are_part_of_the_corpus(tmp_path):
    pytest.importorskip("tokenizers")
    from gptjax.tokenizer.huggingface import BYTE_CHARACTERS

    folder = tmp_path / "gpt2"
    folder.mkdir()
    vocab = {character: i for i, character in enumerate(BYTE_CHARACTERS)} | {"in": 256, "<|endoftext|>": 257}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\ni n\n")
    write_jsonl(tmp_path / "a.jsonl", [f"in line {i}" for i in range(50)])
    tokenizer = TokenizerConfig(kind="huggingface", vocab_size=258, path=str(folder))
    corpus = prepared(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tokenizer)
    assert {"vocab.json", "merges.txt"} <= {entry.name for entry in corpus.manifest.files}
    corpus.verify()
    again = prepared(tmp_path, tmp_path / "inside", tokenizer=tokenizer)
    assert prepared(tmp_path, tmp_path / "inside", tokenizer=tokenizer).sha256 == again.sha256
    (tmp_path / "out" / "merges.txt").write_text("#version: 0.2\nn e\n")
    with pytest.raises(InputError, match="merges.txt is damaged"):
        corpus.verify()
