"""Laws of the kinds of files: each gives the same texts, and damage is named, never read past."""

import json
import os
from functools import partial
from pathlib import Path

import pyarrow
import pytest
from corpora import texts_of, write_jsonl

from gptjax.config.section import InputError
from gptjax.data.sources import documents

TEXTS = ["first\nline", "", "\u4e2d\u6587 \U0001f600", "\u2028 end "] + [f"text {i} " + "word " * i for i in range(600)]


def write_zst(path: Path, texts: list[str], field: str = "text") -> None:
    """Three frames, cut inside of lines."""
    data = "".join(json.dumps({field: text}) + "\n" for text in texts).encode()
    third = len(data) // 3
    pack = partial(pyarrow.compress, codec="zstd", asbytes=True)
    path.write_bytes(pack(data[:third]) + pack(data[third : 2 * third]) + pack(data[2 * third :]))


def write_parquet(path: Path, texts: list, field: str = "text") -> None:
    """Row groups of 100, and a column more."""
    from pyarrow import parquet

    noise = [os.urandom(100) for _ in texts]
    table = pyarrow.table({"noise": noise, field: texts})
    parquet.write_table(
        table, path, row_group_size=100, write_page_checksum=True, use_dictionary=False, compression="none"
    )


def text_page(path: Path) -> int:
    """A place in the middle of a page of the text column."""
    from pyarrow import parquet

    column = parquet.ParquetFile(path).metadata.row_group(3).column(1)
    return column.data_page_offset + column.total_compressed_size // 2


WRITERS = {"jsonl.gz": write_jsonl, "jsonl.zst": write_zst, "parquet": write_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_texts_in_order(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, TEXTS, "body")
    assert texts_of(path, text_field="body") == TEXTS
    assert [d.origin for d in documents(str(path), "body")][300] == f"{path}:301"


def test_a_folder_gives_every_text_of_any_kind_below_it_in_sorted_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("second")
    (tmp_path / "a.txt").write_text("first\r\n", newline="")
    (tmp_path / "image.png").write_bytes(b"\xff")
    write_jsonl(tmp_path / "c.jsonl", ["third", ""])
    wanted = ["first\r\n", "second", "third", ""]
    for kind in sorted(WRITERS):
        WRITERS[kind](tmp_path / f"d.{kind}", [f"of {kind}", "\u2028\u4e2d"])
        wanted += [f"of {kind}", "\u2028\u4e2d"]
    assert texts_of(tmp_path) == wanted
    origins = [Path(document.origin).name for document in documents(str(tmp_path))]
    assert origins[:6] == ["a.txt", "two.md", "c.jsonl:1", "c.jsonl:2", "d.jsonl.gz:1", "d.jsonl.gz:2"]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
def test_a_truncated_file_is_named_and_can_be_left_out(tmp_path, kind, part):
    good, bad = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    WRITERS[kind](good, TEXTS)
    bad.write_bytes(good.read_bytes()[: int(part * good.stat().st_size)])
    with pytest.raises(InputError, match=f"b.{kind}: (line|row) \\d+ cannot be") as error:
        texts_of(bad)
    assert "\n" not in str(error.value)
    (tmp_path / f"c.{kind}").write_bytes(good.read_bytes())
    read = texts_of(tmp_path, max_corrupt=1)
    assert read[: len(TEXTS)] == TEXTS and read[-len(TEXTS) :] == TEXTS
    between = read[len(TEXTS) : -len(TEXTS)]
    assert between == TEXTS[: len(between)]  # what was read before the damage


@pytest.mark.parametrize("kind", WRITERS)
def test_flipped_bytes_are_named(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, TEXTS)
    good = path.read_bytes()
    places = [text_page(path)] if kind == "parquet" else [200, len(good) // 2]
    for at in places + ([len(good) - 6] if kind == "jsonl.gz" else []):  # where gzip has its checksum
        path.write_bytes(good[:at] + bytes(30) + good[at + 30 :])
        with pytest.raises(InputError, match=f"a.{kind}:"):
            texts_of(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=f"a.{kind}: (line|row) 1 cannot be"):
        texts_of(path)


def test_one_corrupt_file_more_than_allowed_stops_with_all_names(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "good"}\n{"text": "bro')
    with pytest.raises(InputError, match="a.jsonl:2: found no JSON"):
        texts_of(tmp_path)
    with pytest.raises(InputError, match=r"3 corrupt files, max_corrupt=2: .*a.jsonl.*b.jsonl.*c.jsonl"):
        texts_of(tmp_path, max_corrupt=2)
    assert texts_of(tmp_path, max_corrupt=3) == ["good"] * 3


def test_text_that_is_not_utf8_counts_as_corrupt_before_any_of_it_is_given(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x\n" * 200_000 + b"caf\xe9")
    (tmp_path / "b.txt").write_text("good")
    assert texts_of(tmp_path, max_corrupt=1) == ["good"]


def test_only_the_text_column_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS)
    from pyarrow import parquet

    column = parquet.ParquetFile(path).metadata.row_group(2).column(0)
    assert column.path_in_schema == "noise"
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 200] = bytes(200)
    path.write_bytes(data)
    assert texts_of(path) == TEXTS
    with pytest.raises(InputError, match="cannot be read"):
        texts_of(path, text_field="noise")


def test_a_table_without_the_text_says_what_it_has(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["x"], "body")
    with pytest.raises(
        InputError, match=r"a.parquet: found no \"text\" among \['body', 'noise'\]; .* --text-field .*--data.text-field"
    ):
        texts_of(path)
    write_parquet(path, [1, 2])
    with pytest.raises(InputError, match='a.parquet: column "text" holds int64; wanted text'):
        texts_of(path)
    write_parquet(path, ["x"] * 300 + [None])
    with pytest.raises(InputError, match='a.parquet:301: "text" is null'):
        texts_of(path, max_corrupt=9)  # a wrong table is not a corrupt one
    for kind in ("large_string", "binary", "string_view"):
        write_parquet(path, pyarrow.array(TEXTS).cast(getattr(pyarrow, kind)()))
        assert texts_of(path) == TEXTS
    write_parquet(path, pyarrow.array(["a", "b", "a"]).dictionary_encode())
    assert texts_of(path) == ["a", "b", "a"]
