"""Laws of files of token ids: every id is taken over, documents are those of the file, nothing hostile gets through."""

import struct
from pathlib import Path

import numpy as np
import pytest
from corpora import prepared, texts_of

from gptjax.cli import main
from gptjax.config import TokenizerConfig
from gptjax.config.section import InputError
from gptjax.data import tokens
from gptjax.data.corpus import Corpus
from gptjax.data.prepare import report

EOS = 257
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Copies so few ids at a time that a file has many chunks."""
    monkeypatch.setattr(tokens, "_TOKENS", 100)


def some_documents(count: int = 40, most: int = 60) -> list[np.ndarray]:
    return [np.append(RNG.integers(0, 256, RNG.integers(1, most)), EOS) for _ in range(count)]


def write_nanogpt(path: Path, documents: list[np.ndarray]) -> Path:
    """nanoGPT's prepare.py: the ids of all documents end to end, as uint16."""
    np.concatenate(documents).astype("<u2").tofile(path)
    return path


def write_megatron(path: Path, documents: list[list[np.ndarray]], kind: str = "<u2", code: int = 8) -> Path:
    """Megatron's IndexedDatasetBuilder: sequences end to end in .bin, their table and that of the documents in .idx."""
    sequences = [s for document in documents for s in document]
    np.concatenate(sequences).astype(kind).tofile(path)
    sizes = np.array([len(s) for s in sequences], "<i4")
    offsets = (np.cumsum([0, *sizes[:-1]]) * np.dtype(kind).itemsize).astype("<i8")
    entries = np.cumsum([0, *map(len, documents)]).astype("<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(entries))
    path.with_suffix(".idx").write_bytes(header + sizes.tobytes() + offsets.tobytes() + entries.tobytes())
    return path


def ids(corpus: Corpus, name: str) -> list[list[int]]:
    split = corpus.split(name)
    return [row.tolist() for row in np.split(split.tokens(0, split.num_tokens), split.starts[1:])]


def test_nanogpts_two_files_are_the_two_splits(tmp_path):
    train, held = some_documents(), some_documents(5)
    write_nanogpt(tmp_path / "train.bin", train)
    write_nanogpt(tmp_path / "val.bin", held)
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path).encode() + b"/unpickled'\ntR.")
    corpus = prepared(tmp_path / "train.bin", tmp_path / "out")
    assert ids(corpus, "train") == [d.tolist() for d in train]
    assert ids(corpus, "validation") == [d.tolist() for d in held]
    assert corpus.manifest.splits["train"].bytes == sum(len(d) - 1 for d in train)  # the bytes of the text alone
    assert not (tmp_path / "unpickled").exists()
    said = report(corpus)
    assert "held out is val.bin" in said and "meta.pkl is not read" in said and "the first ids mean" in said
    corpus.verify()
    assert prepared(tmp_path / "train.bin", tmp_path / "out").sha256 == corpus.sha256  # used again
    write_nanogpt(tmp_path / "val.bin", held[1:])
    with pytest.raises(InputError, match="the text of .*train.bin' is another one"):
        prepared(tmp_path / "train.bin", tmp_path / "out")


def test_one_file_without_documents_is_cut_at_its_tail(tmp_path):
    (whole,) = [RNG.integers(0, 256, 5000)]
    corpus = prepared(write_nanogpt(tmp_path / "a.bin", [whole]), tmp_path / "out", validation_fraction=0.1)
    (head,), (tail,) = ids(corpus, "train"), ids(corpus, "validation")
    assert head + tail == whole.tolist() and len(tail) == 500


@pytest.mark.parametrize(("kind", "code"), [("<u2", 8), ("<i4", 4), ("<i8", 5), ("<i2", 3)])
def test_megatrons_documents_are_taken_over_and_held_out_as_texts_are(tmp_path, kind, code):
    documents = [[d[:3], d[3:]] if len(d) > 8 else [d] for d in some_documents(400)]
    path = write_megatron(tmp_path / "text_document.bin", documents, kind, code)
    corpus = prepared(path, tmp_path / "out", validation_fraction=0.1)
    found = {name: ids(corpus, name) for name in ("train", "validation")}
    whole = [np.concatenate(d).tolist() for d in documents]
    assert sorted(found["train"] + found["validation"]) == sorted(whole)
    for rows in found.values():
        assert rows == [d for d in whole if d in rows]  # in the order of the file
    assert 0.05 < sum(map(len, found["validation"])) / sum(map(len, whole)) < 0.2
    again = prepared(path.with_suffix(".idx"), tmp_path / "again", validation_fraction=0.1)
    assert again.sha256 == corpus.sha256
    nano = write_nanogpt(tmp_path / "nano.bin", [np.concatenate(d) for d in documents])
    if code == 8:  # the same ids, cut after the same ends
        assert prepared(nano, tmp_path / "nano", validation_fraction=0.1).sha256 == corpus.sha256


def test_an_empty_document_is_counted(tmp_path):
    documents = [[d] for d in some_documents(60)] + [[np.zeros(0, int)]]
    corpus = prepared(write_megatron(tmp_path / "a.bin", documents), tmp_path / "out")
    assert (corpus.manifest.report.documents, corpus.manifest.report.too_short) == (61, 1)


def spoil(path: Path, at: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)


HOSTILE = {
    "a magic": (lambda p: spoil(p.with_suffix(".idx"), 0, b"PK"), "does not begin with MMIDIDX"),
    "a version": (lambda p: spoil(p.with_suffix(".idx"), 9, b"\x02"), "version 2 and type code 8; wanted version 1"),
    "a type": (lambda p: spoil(p.with_suffix(".idx"), 17, b"\x07"), "type code 7; wanted version 1 and a code of"),
    "sequences": (lambda p: spoil(p.with_suffix(".idx"), 18, b"\xff" * 8), "too few for its 18446744073709551615"),
    "documents": (lambda p: spoil(p.with_suffix(".idx"), 26, b"\xff" * 4), "too few for its 30 sequences"),
    "no documents": (lambda p: spoil(p.with_suffix(".idx"), 26, bytes(8)), "do not follow one another"),
    "a size": (lambda p: spoil(p.with_suffix(".idx"), 34, b"\xff" * 4), "do not follow one another"),
    "an offset": (lambda p: spoil(p.with_suffix(".idx"), 34 + 4 * 30 + 8, b"\x01"), "do not follow one another"),
    "an entry": (lambda p: spoil(p.with_suffix(".idx"), 34 + 12 * 30 + 15, b"\x80"), "do not follow one another"),
    "a short index": (lambda p: p.with_suffix(".idx").write_bytes(b"MMIDIDX"), "does not begin with MMIDIDX"),
    "a cut index": (lambda p: p.with_suffix(".idx").write_bytes(p.with_suffix(".idx").read_bytes()[:-9]), "too few"),
    "a cut file": (lambda p: p.write_bytes(p.read_bytes()[:-2]), "but its .idx describes"),
    "no file": (lambda p: p.unlink(), "cannot be read"),
    "an id": (lambda p: spoil(p, 40, b"\x02\x01"), "id 258 at place 20, but the bytes tokenizer has ids 0 to 257"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_damaged_or_hostile_file_is_one_line(tmp_path, capsys, what):
    path = write_megatron(tmp_path / "a.bin", [[d] for d in some_documents(30)])
    change, says = HOSTILE[what]
    change(path)
    name = path.with_suffix(".idx") if what == "no file" else path
    flags = ["--tokenizer.kind", "bytes", "--tokenizer.vocab-size", "258"]
    assert main(["prepare", "--source", str(name), "--out", str(tmp_path / "out"), *flags]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and len(said) < 500
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bytes_that_are_no_ids_are_one_line(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"abc")
    with pytest.raises(InputError, match="a.bin has 3 bytes, which is no whole number of ids of 16 bits"):
        prepared(tmp_path / "a.bin", tmp_path / "out")
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(InputError, match="a.bin is empty; wanted token ids"):
        prepared(tmp_path / "a.bin", tmp_path / "out")
    write_megatron(tmp_path / "b.bin", [[np.array([5, -1, 7])]], "<i4", 4)
    with pytest.raises(InputError, match="id -1 at place 1, but"):
        prepared(tmp_path / "b.bin", tmp_path / "out")


def test_settings_that_ids_can_not_have_are_refused(tmp_path):
    source = write_nanogpt(tmp_path / "train.bin", some_documents())
    with pytest.raises(InputError, match="no tokenizer can be trained; give the one that made them: --tokenizer.kind"):
        prepared(source, tmp_path / "out", tokenizer=TokenizerConfig())
    with pytest.raises(InputError, match="min_bytes and max_bytes are of text"):
        prepared(source, tmp_path / "out", max_bytes=5)
    with pytest.raises(InputError, match="holds token ids and no text; run `gptjax prepare --source .*train.bin --out"):
        texts_of(source)
    with pytest.raises(InputError, match="has no text in it.*not read: .bin 1; its ids are source .*train.bin"):
        texts_of(tmp_path)
