"""Laws of the sources: every text is read or named, and held-out text is held out."""

import gzip
import itertools
import json
import random

import numpy as np
import pytest
from corpora import holdout, prepared, splits, texts_of, write_jsonl
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gptjax.config.section import InputError
from gptjax.data.holdout import CUT, VALIDATION, choose_holdout
from gptjax.data.prepare import report
from gptjax.data.sources import Document, documents, open_source, source_sha256


def test_the_built_in_corpus_is_one_text_of_five_megabytes():
    (document,) = documents("builtin:shakespeare")
    assert document.num_bytes == 5_052_230
    assert document.text.startswith("ALL'S WELL THAT ENDS WELL")


def test_names_that_are_no_source_are_named(tmp_path):
    (tmp_path / "notes.rst").write_text("text")
    (tmp_path / "table.arrow").write_text("text")
    cases = {
        "builtin:shakespear": "wanted one of builtin:shakespeare",
        str(tmp_path / "absent.txt"): "absent.txt' does not exist",
        str(tmp_path): "no text in it; wanted files .txt",
        str(tmp_path / "table.arrow"): "this kind is not read",
    }
    for source, says in cases.items():
        with pytest.raises(InputError, match=says):
            texts_of(source)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a"', "found no JSON"),
        ("", "found a blank line"),
        ("[1]", "found a JSON list"),
        ('"text"', "found a JSON str"),
        ('{"txt": "a"}', r"found no \"text\" among \['txt'\]"),
        ('{"text": null}', '"text" is a NoneType'),
        ('{"text": ["a"]}', '"text" is a list'),
        ('{"text": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "found no JSON"),
    ],
)
def test_a_broken_line_is_named_with_file_and_line(tmp_path, name, line, says):
    good = json.dumps({"text": "good"})
    source = tmp_path / name
    data = f"{good}\n{line}\n{good}\n".encode()
    source.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(InputError, match=f"{name}:2: .*{says}.*; wanted") as error:
        texts_of(source)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x\n" * 40_000 + b"caf\xe9 ole")
    with pytest.raises(InputError, match=r"a.txt: byte 0xe9 at offset 80003 "):
        for document in documents(str(tmp_path)):
            list(document.pieces())
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"b.jsonl:2: byte 0xff at offset 24 "):
        texts_of(tmp_path)


def test_an_empty_text_is_a_document_and_an_empty_file_of_records_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    assert texts_of(tmp_path) == [""]
    with pytest.raises(InputError, match="has no text in it"):
        holdout(str(tmp_path), 0.5)
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match="a.jsonl is empty"):
        texts_of(tmp_path)
    with pytest.raises(InputError, match="has no text in it"):
        holdout(write_jsonl(tmp_path / "b.jsonl", ["", ""]), 0.5)


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab \n\u00e9\u4e2d\U0001f600", min_size=1, max_size=40), size=st.integers(4, 9))
def test_pieces_join_to_the_text_and_are_small(text, size):
    data = text.encode()
    pieces = list(Document("memory", data, 0, len(data)).pieces(size))
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= size for piece in pieces)


def test_pieces_end_behind_newlines_where_they_can():
    data = b"one two\nthree four\nfive"
    assert list(Document("memory", data, 0, len(data)).pieces(12)) == ["one two\n", "three four\n", "five"]


@settings(max_examples=200, deadline=None)
@given(text=st.text("a\u00e9\u4e2d\U0001f600", min_size=2, max_size=20), fraction=st.floats(0.001, 0.999))
def test_a_single_text_is_held_out_by_its_tail(text, fraction):
    data = text.encode()
    head, tail = Document("memory", data, 0, len(data)).split_tail(fraction)
    assert head.text + tail.text == text  # both decode, so no character was cut
    assert head.text and tail.text
    assert abs(tail.num_bytes - fraction * len(data)) <= 5


def test_a_text_of_one_character_cannot_be_split(tmp_path):
    (tmp_path / "a.txt").write_text("\u4e2d", encoding="utf-8")
    with pytest.raises(InputError, match="its 3 bytes of text can't be split"):
        holdout(str(tmp_path), 0.5)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.integers(0, 9), min_size=2, max_size=12),
    fraction=st.sampled_from([0.001, 0.05, 0.3, 0.5, 0.95]),
    order=st.randoms(use_true_random=False),
)
def test_held_out_text_depends_on_the_documents_alone(tmp_path_factory, values, fraction, order):
    folder = tmp_path_factory.mktemp("split")
    texts = [f"{value} " * 6 * (1 + value**2) for value in values]  # 12 bytes and up: longer than a character
    assume(len(set(texts)) > 1)
    found = splits(write_jsonl(folder / "a.jsonl", texts), fraction)
    assert found["train"] and found["validation"]
    whole = {name: set(parts) & set(texts) for name, parts in found.items()}
    assert not whole["train"] & whole["validation"]  # equal texts stay together
    assert sum(map(len, itertools.chain(*found.values()))) == sum(map(len, texts))
    order.shuffle(texts)
    again = splits(write_jsonl(folder / "b.jsonl", texts), fraction)
    assert {name: sorted(v) for name, v in again.items()} == {name: sorted(v) for name, v in found.items()}


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.one_of(
        st.lists(st.integers(400, 600), min_size=20, max_size=60),  # each smaller than what is held out
        st.lists(st.integers(400, 10**7), min_size=1, max_size=20),
    ),
    fraction=st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.3, 0.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_bytes_held_out_are_near_the_fraction(sizes, fraction, seed):
    hashes, sizes = np.random.default_rng(seed).random(len(sizes)), np.array(sizes)
    holdout = choose_holdout("text", fraction, lambda: [(hashes, sizes)])
    status = holdout.status(hashes, sizes)
    held = sizes[status == VALIDATION].sum() + np.rint(fraction * sizes[status == CUT]).sum()
    assert fraction / 2 - 1e-3 <= held / sizes.sum() <= 2 * fraction + 1e-3
    assert 0 < held < sizes.sum()
    in_parts = choose_holdout("text", fraction, lambda: zip(np.split(hashes, [3]), np.split(sizes, [3])))
    assert in_parts == holdout  # however many documents are looked at at a time


def test_more_documents_change_no_others_split():
    hashes, sizes = np.random.default_rng(0).random(4000), np.random.default_rng(1).integers(10, 2000, 4000)
    few, many = (choose_holdout("text", 0.05, lambda n=n: [(hashes[:n], sizes[:n])]) for n in (2000, 4000))
    assert few.threshold == many.threshold == 0.05
    np.testing.assert_array_equal(few.status(hashes[:2000], sizes[:2000]), many.status(hashes, sizes)[:2000])


@pytest.mark.parametrize("fraction", [0.01, 0.05])
def test_of_nine_books_the_share_asked_for_is_held_out(tmp_path, fraction):
    rng = random.Random(0)
    for i, size in enumerate((1_204_460, 700_000, 420_000, 300_000, 150_000, 90_000, 60_000, 40_000, 15_540)):
        (tmp_path / f"book {i}.txt").write_text("".join(rng.choices("abc \n", k=size // 10)))
    corpus = prepared(tmp_path, tmp_path / "out", validation_fraction=fraction)
    train, held = (corpus.manifest.splits[name] for name in ("train", "validation"))
    share = held.bytes / (held.bytes + train.bytes)
    assert fraction / 2 < share < 2 * fraction and held.documents >= (8 if fraction == 0.01 else 5)
    assert f"({share:.2%})" in report(corpus) and "HELD OUT" not in report(corpus)


def test_eight_documents_hold_out_the_share_asked_for(tmp_path):
    rng = random.Random(1)
    texts = ["".join(rng.choices("abc ", k=rng.randint(500, 3000))) for _ in range(8)]
    corpus = prepared(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out", validation_fraction=0.05)
    sizes = {name: split.bytes for name, split in corpus.manifest.splits.items()}
    assert 0.04 < sizes["validation"] / sum(sizes.values()) < 0.06


def test_a_share_that_is_far_off_is_a_loud_line(tmp_path):
    corpus = prepared(write_jsonl(tmp_path / "a.jsonl", ["first one", "second"]), tmp_path / "out")
    assert "HELD OUT IS 13.3% OF THE TEXT, though validation_fraction asks for 5.0%" in report(corpus)


def test_hidden_files_are_no_text_and_other_kinds_are_counted(tmp_path):
    for name in (
        "a.txt", "._a.txt", ".hidden.md", ".git/b.txt", ".DS_Store", "book.pdf", "x/page.html", "x/Y.PDF", "LICENSE",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    source = open_source(str(tmp_path))
    assert [text.text for text in documents(source)] == ["text of a.txt"]
    line = "7 files of other kinds not read: hidden 3, .pdf 2, .html 1, without suffix 1"
    assert source.notes == (line,)
    corpus = prepared(tmp_path, tmp_path / "out")
    assert line in report(corpus)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError, match="has no text in it; wanted files .txt, .*; 7 files of other kinds not read"):
        open_source(str(tmp_path))


def test_the_share_held_out_is_the_one_asked_for(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(4000)])
    assert 160 < len(splits(source, 0.05)["validation"]) < 240


def test_a_sources_identity_is_its_content_not_its_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("alpha")
        (tmp_path / name / "b.txt").write_text("beta")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert source_sha256(one) == source_sha256(two)
    (tmp_path / "two" / "b.txt").write_text("gamma")
    assert source_sha256(one) != source_sha256(two)
