"""Laws of prepared corpora: nothing lost, nothing leaked, nothing damaged unnoticed."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from corpora import BYTES, damage, prepared, run_python, stored, write_jsonl

from gptjax.config import DataConfig, TokenizerConfig, TrainTokenizerConfig
from gptjax.config.section import InputError
from gptjax.data import prepare as prepare_module
from gptjax.data import shards
from gptjax.data.batches import RowSampler
from gptjax.data.corpus import is_corpus, open_corpus
from gptjax.data.manifest import MANIFEST_FILE
from gptjax.data.prepare import report, train_tokenizer, training_texts
from gptjax.data.scan import Filters, scan
from gptjax.data.sources import CORPORA, open_source
from gptjax.tokenizer import load_tokenizer

PIECES = TokenizerConfig(vocab_size=400)
TEXT = (CORPORA / "shakespeare.txt").read_bytes()[:100_000].decode()


def prepare(source, out, tokenizer=BYTES, fraction=0.1, **more):
    return prepared(source, out, tokenizer=tokenizer, validation_fraction=fraction, **more)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """Pages of 64 tokens and shards of 1,024, so that small texts have several of each."""
    monkeypatch.setattr(shards, "PAGE", 64)
    monkeypatch.setattr(shards, "SHARD_BYTES", 2048)


@pytest.fixture
def many(tmp_path) -> str:
    """Fifty documents of one line each in JSONL, an empty one among them."""
    texts = [f"Document {i}\nsays {'so ' * i}\u4e2d\u2581" for i in range(49)] + [""]
    return str(write_jsonl(tmp_path / "many.jsonl", texts))


@pytest.fixture
def one(tmp_path) -> str:
    """A single text."""
    path = tmp_path / "one.txt"
    path.write_text(TEXT[:20_000], encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("cfg", [BYTES, PIECES], ids=["bytes", "sentencepiece"])
def test_every_document_is_stored_once_and_whole(tmp_path, many, cfg):
    many_text = tmp_path / "more.txt"
    many_text.write_text(TEXT)  # enough text for the pieces; longer than what is held out, so that it is cut
    corpus = prepare(str(tmp_path), tmp_path / "out", cfg, 0.2, min_bytes=0)  # 0 keeps the empty one
    texts, found = [json.loads(line)["text"] for line in Path(many).read_text().splitlines()], stored(corpus)
    (head,), (tail,) = (set(found[name]) - set(texts) for name in ("train", "validation"))
    assert head + tail == TEXT
    assert sorted({*itertools.chain(*found.values())} - {head, tail}) == sorted(texts)
    assert corpus.manifest.splits["train"].documents + corpus.manifest.splits["validation"].documents == 52
    assert corpus.vocab_size == cfg.vocab_size
    corpus.verify()


def test_a_single_text_is_its_head_and_its_tail(tmp_path, one):
    corpus = prepare(one, tmp_path / "out")
    (head,), (tail,) = stored(corpus).values()
    assert head + tail == TEXT[:20_000]
    assert len(corpus.manifest.splits["train"].shards) > 5


def test_random_reads_are_cuts_of_the_stream(tmp_path, one, monkeypatch):
    corpus = prepare(one, tmp_path / "out")
    split = corpus.split("train")
    whole = split.tokens(0, split.num_tokens)
    assert whole.dtype == np.int32
    again = open_corpus(tmp_path / "out").split("train")
    again._max_pages = 3
    rng = np.random.default_rng(0)
    for start in rng.integers(0, split.num_tokens - 300, 50).tolist():
        np.testing.assert_array_equal(again.tokens(start, start + 300), whole[start : start + 300])
        assert len(again._pages) <= 3  # memory stays bounded


def test_validation_text_is_in_no_training_row_and_never_trains_the_tokenizer(tmp_path, monkeypatch):
    lines = [f"{'w' * (i + 1)}{i:03d}." for i in range(60)]
    write_jsonl(tmp_path / "a.jsonl", lines)
    (tmp_path / "b.txt").write_text(TEXT[:30_000])
    seen_by_tokenizer = []
    make = prepare_module.make_tokenizer

    def spy(cfg, texts):
        seen_by_tokenizer.extend(texts)
        return make(cfg, iter(seen_by_tokenizer))

    monkeypatch.setattr(prepare_module, "make_tokenizer", spy)
    corpus = prepare(str(tmp_path), tmp_path / "out", PIECES, 0.3)
    held = stored(corpus)["validation"]
    assert len(held) > 8
    rows = RowSampler(corpus.split("train"), DataConfig(batch_size=4, length=64), 0)
    trained = ""
    for step in range(-(-rows.rows_per_epoch // 4)):
        batch = rows.batch(4 * step)
        for i in range(4):
            trained += corpus.tokenizer.decode(batch["inputs_BL"][i]) + "|"
    for text in held:
        assert text not in trained and text not in "".join(seen_by_tokenizer)
    kept = set(lines) - set(held)
    assert all(text in seen_by_tokenizer for text in kept)
    assert sum(text in trained for text in kept) > len(kept) / 2  # and the rest is seen at all


def test_tfds_reads_the_folder_without_tensorflow(tmp_path, many):
    # Each of these documents fills a page of 64 tokens, its beginning and end included.
    write_jsonl(tmp_path / "full.jsonl", [f"{i:02d}" + "x" * 60 for i in range(20)])
    corpus = prepare(tmp_path, tmp_path / "out", BYTES, 0.2)
    program = f"""
import sys, numpy as np, tensorflow_datasets as tfds
builder = tfds.builder_from_directory({str(tmp_path / "out")!r})
for split in ("train", "validation"):
    pages = list(builder.as_data_source(split))
    assert all((page["starts"] < len(page["tokens"])).all() for page in pages)
    np.save(f"{tmp_path}/{{split}}.npy", np.concatenate([page["tokens"] for page in pages]))
    firsts = np.cumsum([0] + [len(page["tokens"]) for page in pages[:-1]])
    np.save(f"{tmp_path}/{{split}}_starts.npy", np.concatenate([f + page["starts"] for f, page in zip(firsts, pages)]))
assert "tensorflow" not in sys.modules
"""
    run_python(program)
    for name in ("train", "validation"):
        split = corpus.split(name)
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), split.tokens(0, split.num_tokens))
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}_starts.npy"), split.starts)


def test_reading_needs_no_tfds_grain_tensorflow_or_jax(tmp_path, one):
    prepare(one, tmp_path / "out")
    program = f"""
import sys
from gptjax.config import DataConfig
from gptjax.data.corpus import open_corpus
from gptjax.data.batches import RowSampler
RowSampler(open_corpus({str(tmp_path / "out")!r}).split("train"), DataConfig(), 0).batch(3)
assert not {{"tensorflow_datasets", "grain", "tensorflow", "jax", "sentencepiece"}} & set(sys.modules)
"""
    run_python(program)


def test_preparing_twice_gives_the_same_bytes_and_reuses_the_folder(tmp_path, one):
    first = prepare(one, tmp_path / "a", PIECES)
    second = prepare(one, tmp_path / "b", PIECES)
    assert first.manifest == second.manifest
    assert first.sha256 == second.sha256
    before = (tmp_path / "a" / MANIFEST_FILE).stat().st_mtime_ns
    assert prepare(one, tmp_path / "a", PIECES).sha256 == first.sha256
    assert (tmp_path / "a" / MANIFEST_FILE).stat().st_mtime_ns == before


def test_a_folder_made_from_something_else_is_refused_by_name(tmp_path, one, many):
    prepare(one, tmp_path / "out", PIECES)
    with pytest.raises(InputError, match="validation_fraction=0.1, got 0.2"):
        prepare(one, tmp_path / "out", PIECES, 0.2)
    with pytest.raises(InputError, match="vocab_size=400, got 300"):
        prepare(one, tmp_path / "out", TokenizerConfig(vocab_size=300))
    with pytest.raises(InputError, match="tokenizer.kind='sentencepiece', got 'bytes'"):
        prepare(one, tmp_path / "out")
    with pytest.raises(
        InputError, match="was prepared from '.*one.txt', and the text of '.*many.jsonl' is another one"
    ):
        prepare(many, tmp_path / "out", PIECES)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "corpus-1.txt", "features.json"])
def test_preparing_into_a_folder_with_files_of_the_users_leaves_them(tmp_path, one, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name} would be overwritten; delete it, or prepare into another folder"):
        prepare(one, tmp_path / "mine")
    assert (tmp_path / "mine" / name).read_text() == "mine"


def test_an_unfinished_folder_is_begun_afresh(tmp_path, one, many):
    whole = prepare(one, tmp_path / "a")
    prepare(many, tmp_path / "b", TokenizerConfig(vocab_size=300))
    (tmp_path / "b" / MANIFEST_FILE).unlink()  # a kill just before the manifest was written
    work = tmp_path / "b" / prepare_module.WORK
    work.mkdir()
    (work / "inputs.json").write_text("{}")
    (work / "part-000000.npz").write_text("of other text")
    (tmp_path / "b" / "notes").write_text("of the user")
    assert not is_corpus(tmp_path / "b")
    with pytest.raises(InputError, match="no finished corpus"):
        open_corpus(tmp_path / "b")
    again = prepare(one, tmp_path / "b")
    assert again.sha256 == whole.sha256
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {path.name for path in (tmp_path / "a").iterdir()} | {"notes"}
    work.mkdir()  # what a kill just after the manifest was written leaves
    assert prepare(one, tmp_path / "b").sha256 == whole.sha256 and not work.exists()


def test_a_given_tokenizer_is_used_and_belongs_to_the_inputs(tmp_path, one):
    settings = TrainTokenizerConfig(source=one, out=str(tmp_path / "tok"), vocab_size=400, validation_fraction=0.1)
    trained = train_tokenizer(settings)
    assert load_tokenizer(tmp_path / "tok").sha256 == trained.sha256
    assert train_tokenizer(settings).sha256 == trained.sha256  # the same command again changes nothing
    model = TokenizerConfig(vocab_size=400, path=str(tmp_path / "tok" / "tokenizer.model"))
    corpus = prepare(one, tmp_path / "a", model)
    assert corpus.tokenizer.sha256 == trained.sha256
    assert corpus.sha256 == prepare(one, tmp_path / "b", PIECES).sha256  # prepare would train the same
    with pytest.raises(InputError, match="tokenizer.path"):
        prepare(one, tmp_path / "a", PIECES)
    other = TrainTokenizerConfig(source=one, out=str(tmp_path / "tok"), vocab_size=350)
    with pytest.raises(InputError, match="is another tokenizer"):
        train_tokenizer(other)


def test_a_damaged_shard_is_named(tmp_path, one):
    corpus = prepare(one, tmp_path / "out")
    shard = corpus.manifest.splits["train"].shards[2]
    path = tmp_path / "out" / shard.name
    good = path.read_bytes()
    # Somewhere in the middle of a stored page.
    damage(path, good.index(b"FRANCE") if b"FRANCE" in good else good.index(b"tokens") + 40)
    split = open_corpus(tmp_path / "out").split("train")
    with pytest.raises(InputError, match=f"{shard.name} is damaged at page"):
        split.tokens(0, split.num_tokens)
    with pytest.raises(InputError, match=f"{shard.name} is damaged: its sha256"):
        open_corpus(tmp_path / "out").verify()
    path.write_bytes(bytes(len(good)))
    with pytest.raises(InputError, match=f"{shard.name} is damaged at page"):
        open_corpus(tmp_path / "out").split("train").tokens(0, split.num_tokens)
    path.write_bytes(good[:-1])
    with pytest.raises(InputError, match=f"{shard.name} has {len(good) - 1} bytes; wanted {len(good)}"):
        open_corpus(tmp_path / "out")
    path.unlink()
    with pytest.raises(InputError, match=f"{shard.name} is missing"):
        open_corpus(tmp_path / "out")


def test_damage_to_any_other_file_is_named_too(tmp_path, one):
    corpus = prepare(one, tmp_path / "out", PIECES)
    for entry in corpus.manifest.all_files:
        path = tmp_path / "out" / entry.name
        good = path.read_bytes()
        damage(path, len(good) // 2)
        with pytest.raises(InputError, match=entry.name):
            open_corpus(tmp_path / "out").verify()
        path.write_bytes(good)
    damage(tmp_path / "out" / corpus.manifest.splits["train"].starts.name, 0)
    with pytest.raises(InputError, match="starts.int64 is damaged"):
        RowSampler(open_corpus(tmp_path / "out").split("train"), DataConfig(length=8), 0).batch(0)


def test_token_ids_outside_the_vocabulary_are_an_error_that_names_the_file(tmp_path, one):
    corpus = prepare(one, tmp_path / "out")
    manifest = tmp_path / "out" / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace('"vocab_size": 258', '"vocab_size": 120'))
    split = open_corpus(tmp_path / "out").split("train")
    shard = corpus.manifest.splits["train"].shards[0].name
    with pytest.raises(InputError, match=f"{shard}: token id 256 .* below 120"):
        split.tokens(0, split.num_tokens)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[:-10], "not JSON"),
        (lambda text: text.replace('"schema": 1', '"schema": 3'), "schema 3; wanted 1"),
        (lambda text: text.replace('"corrupt": []', '"corrupt": [1]'), "does not describe a corpus"),
        (lambda text: text.replace('"name": "', '"name": "../'), "does not describe a corpus"),
        (lambda text: text.replace('"pages"', '"leaves"'), "does not describe a corpus"),
        (lambda text: "[]", "does not describe a corpus"),
        (lambda text: text.replace("uint16", "object"), "does not describe a corpus"),
        (lambda text: re.sub(r'"tokens": \d+', '"tokens": "many"', text), "does not describe a corpus"),
        (lambda text: re.sub(r'"tokens": (\d+)', r'"tokens": \g<1>00000', text), "does not describe a corpus"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, one, change, says):
    prepare(one, tmp_path / "out")
    path = tmp_path / "out" / MANIFEST_FILE
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=says):
        open_corpus(tmp_path / "out")


def test_a_source_that_changes_while_it_is_read_leaves_no_manifest(tmp_path, one):
    def meddle(what, done, total):
        if what == "tokens":
            Path(one).write_text(TEXT[:10_000] + "!" + TEXT[10_001:20_000])

    with pytest.raises(InputError, match="changed while it was being read"):
        prepare(one, tmp_path / "out", progress=meddle)
    assert not is_corpus(tmp_path / "out")


def test_progress_ends_at_all_of_the_text(tmp_path, many):
    calls = []
    corpus = prepare(many, tmp_path / "out", progress=lambda *call: calls.append(call))
    total = sum(split.bytes for split in corpus.manifest.splits.values())
    assert calls[0] == ("tokenizer", 0, total)
    assert calls[-1] == ("tokens", total, total)


def test_a_full_disk_or_a_file_in_the_way_is_one_line(tmp_path, one):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        prepare(one, tmp_path / "file")
    program = f"""
import resource, signal
from gptjax.config import PrepareConfig, TokenizerConfig
from gptjax.config.section import InputError
from gptjax.data.prepare import prepare
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    bytes_tokenizer = TokenizerConfig(kind="bytes", vocab_size=258)
    prepare(PrepareConfig(source={one!r}, out={str(tmp_path / "out")!r}, tokenizer=bytes_tokenizer))
except InputError as error:
    print(error)
"""
    said = run_python(program).stdout
    assert "cannot be written" in said and said.count("\n") == 1
    assert not is_corpus(tmp_path / "out")


def test_a_large_source_trains_the_tokenizer_on_an_even_sample(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [f"line {i:04d} " + "x" * 90 for i in range(1000)])
    monkeypatch.setattr(prepare_module, "TRAINING_BYTES", 10_000)
    source = open_source(str(tmp_path))
    result = scan(source, 0.1, Filters(), tmp_path, lambda what, done, total: None)
    sample = list(training_texts(source, result))
    assert 70 < len(sample) < 110
    assert len({text[5:7] for text in sample}) == 10  # from every hundred lines
    assert sample == list(training_texts(source, result))


def test_the_report_states_both_splits(tmp_path, one):
    lines = report(prepare(one, tmp_path / "out")).splitlines()
    assert "bytes tokenizer of 258 ids" in lines[0]
    assert lines[1].strip().startswith("train: 18,002 tokens in 1 document, 18,000 bytes")
    assert lines[2].strip().startswith("validation: 2,002 tokens in 1 document, 2,000 bytes")
