"""Laws of prepared data: fixed proportions of a mixture, the same batches for any number of threads, exact resuming."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from corpora import BYTES, damage, prepared, take, take_counted, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import DataConfig, TokenizerConfig, TrainConfig, TrainTokenizerConfig
from gptjax.config.section import InputError
from gptjax.data.mixture import Mixture, SourceSchedule, rows_of_a_pass
from gptjax.data.packing import MemorySplit, batch_hash
from gptjax.data.pipeline import open_pipeline
from gptjax.data.prepare import train_tokenizer
from gptjax.data.show import show

WORDS = {"abc": "abc abcabc", "xyz": "xyz xyyz zzxy", "pqr": "pq qr rp"}


def split(size: int, first: int = 0) -> MemorySplit:
    """A split of one document whose token at p is first + p, so that a batch shows what it was cut from."""
    return MemorySplit.of([np.arange(first, first + size)])


def write_words(path: Path, letters: str, count: int) -> Path:
    rng = random.Random(0)
    return write_jsonl(path, ["".join(rng.choices(letters + " ", k=rng.randint(20, 200))) for _ in range(count)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three texts whose letters tell them apart, the first two of them prepared too."""
    folder = tmp_path_factory.mktemp("texts")
    for count, letters in zip((120, 60, 30), WORDS):
        write_words(folder / f"{letters}.jsonl", letters, count)
    for letters in list(WORDS)[:2]:
        prepared(folder / f"{letters}.jsonl", folder / letters, validation_fraction=0.2, deduplicate=False)
    return folder


def mixed(folder: Path, *names: str, tokenizer: TokenizerConfig = BYTES, steps: int = 100, **data) -> TrainConfig:
    sources = tuple(f"{name.split('.')[0]}={folder / name}" for name in names)
    settings = {"batch_size": 4, "length": 32, "validation_fraction": 0.2} | data
    cfg = DataConfig(source="mixture", mixture=sources, **settings)
    return TrainConfig(data=cfg, tokenizer=tokenizer, steps=steps)


def letters_of(row: np.ndarray) -> str:
    """Which text a row of bytes is from."""
    seen = {chr(i) for i in row.tolist() if i < 256} - {" "}
    (found,) = [letters for letters in WORDS if seen and seen <= set(letters)]
    return found


# One draw decides between sources of the same size (the hardest to spread) and of any size.
some_counts = st.one_of(
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
    st.builds(lambda count, k: [count] * k, st.integers(1, 20), st.integers(1, 8)),
)


@settings(max_examples=150, deadline=None)
@given(counts=some_counts)
def test_every_prefix_of_a_mixture_has_each_source_in_its_proportion(counts):
    schedule, k = SourceSchedule(counts), len(counts)
    number = np.arange(2 * sum(counts))
    source, index = schedule.assign(number)
    bound = (1 + sum(1 / j for j in range(1, k - 1))) / 2
    for i, count in enumerate(counts):
        np.testing.assert_array_equal(index[source == i], np.arange(2 * count))  # none left out, in order
        off = np.cumsum(source == i) - (number + 1) * count / sum(counts)
        assert np.abs(off).max() <= bound + 1e-9


def test_a_mixture_never_changes_between_versions():
    # A resumed run must read what it would have read; a change here breaks every unfinished run.
    assert "".join(map(str, SourceSchedule([5, 3, 2]).assign(np.arange(20))[0])) == "0102010201" * 2
    mixture = Mixture({"a": split(301), "b": split(101, 1000)}, DataConfig(batch_size=4, length=10), 7)
    assert batch_hash(mixture.batch(20 * mixture.cfg.batch_size))[:16] == "5b36204efc80d797"


def test_rows_of_a_pass_follow_weights():
    sizes = [(100, 1000), (50, 1000), (10, 100)]

    def of(**settings):
        return rows_of_a_pass(DataConfig(source="mixture", mixture=("a=a", "b=b", "c=c"), **settings), sizes)

    assert of() == [100, 50, 10]  # each is passed once
    assert of(weights=(1.0, 2.0, 0.55)) == [100, 100, 6]
    shares = of(weights=(5.0, 3.0, 2.0), weights_are="shares")
    tokens = [rows * t / r for rows, (r, t) in zip(shares, sizes)]
    np.testing.assert_allclose(np.array(tokens) / sum(tokens), [0.5, 0.3, 0.2], rtol=1e-6)
    huge = rows_of_a_pass(DataConfig(), [(1 << 40, 1 << 50)])
    assert SourceSchedule(huge).total <= 1 << 30


def test_a_source_is_visited_as_if_it_were_alone():
    cfg = DataConfig(source="mixture", mixture=("a=a", "b=b"), weights=(0.5, 3.0), batch_size=4, length=10)
    mixture = Mixture({"a": split(301), "b": split(101, 1000)}, cfg, 7)
    made = np.concatenate([mixture.batch(4 * step)["inputs_BL"] for step in range(60)])
    # 15 rows of a and 30 of b in a pass: half a pass over a's 30 rows, three over b's 10.
    assert mixture.schedule.counts == [15, 30]
    for rows, low, count in zip(mixture.samplers, (0, 1000), (80, 160)):
        own = made[(made.max(axis=1) >= 1000) == (low == 1000)]
        alone = np.concatenate([rows.rows(np.array([n]))["inputs_BL"] for n in range(len(own))])
        np.testing.assert_array_equal(own, alone)
        assert len(own) == count


def test_a_resumed_mixture_goes_on_and_counts_its_tokens(folder):
    pipeline = open_pipeline(mixed(folder, "xyz", "abc", weights=(2.0, 1.0), workers=2), folder / "none", training=True)
    straight = take_counted(pipeline, 30, letters_of)
    pipeline.check(straight[16][1])
    assert take(pipeline, straight[16][1], 6) == straight[17:23]


def test_a_mixture_is_measured_source_by_source(folder):
    held = mixed(folder, "abc", "xyz", validation=(f"both={folder / 'xyz'}", f"text={folder / 'pqr.jsonl'}"))
    pipeline = open_pipeline(held, folder / "none", training=True)
    assert [(v.name, v.own) for v in pipeline.validation] == [
        ("abc", True), ("xyz", True), ("both", False), ("text", False),
    ]  # fmt: skip
    own, same, text = (pipeline.validation[i] for i in (1, 2, 3))
    for a, b in zip(own.batches(0), same.batches(0), strict=True):
        assert batch_hash(a) == batch_hash(b)
    size = sum(len(json.loads(line)["text"]) for line in (folder / "pqr.jsonl").read_text().splitlines())
    assert (text.split.num_documents, text.split.num_bytes) == (30, size)
    weights = sum(batch["weights_BL"].sum() for batch in text.batches(0))
    assert weights == size + 30  # each byte, and each end
    assert text.bytes_per_target * weights == pytest.approx(size)


def test_a_mixtures_texts_share_one_trained_tokenizer(folder, tmp_path):
    trained = TokenizerConfig(vocab_size=310)
    said: list[str] = []
    cfg = mixed(folder, "abc.jsonl", "pqr.jsonl", tokenizer=trained)
    pipeline = open_pipeline(cfg, tmp_path, training=True, say=said.append)
    assert sum("training one tokenizer" in line for line in said) == 1
    assert pipeline.tokenizer.encode("abcpqr") and {"abc", "pqr", "shared-tokenizer"} <= {
        p.name for p in tmp_path.iterdir()
    }
    pieces = {pipeline.tokenizer.decode([i]) for i in range(310)}
    assert any({"a", "b"} & set(p) and len(p) > 1 for p in pieces) and any("q" in p and len(p) > 1 for p in pieces)
    again = open_pipeline(cfg, tmp_path)  # opened to read: nothing is made
    assert batch_hash(again.batch(3)) == batch_hash(pipeline.batch(3))
    assert len(said) == 3
    with pytest.raises(InputError, match="abc.* and .*other.* different tokenizers"):
        prepared(folder / "xyz.jsonl", tmp_path / "other", tokenizer=trained, validation_fraction=0.2)
        open_pipeline(mixed(tmp_path, "abc", "other", tokenizer=trained), tmp_path, training=True)


def test_a_text_beside_a_prepared_folder_is_prepared_with_its_tokenizer(folder, tmp_path):
    pipeline = open_pipeline(mixed(folder, "abc", "pqr.jsonl"), tmp_path, training=True)
    rows = {letters_of(row) for row in pipeline.batch(0)["inputs_BL"]}
    assert rows == {"abc", "pqr"} and pipeline.tokenizer.kind == "bytes"


def test_another_corpus_is_refused_by_name(folder, tmp_path):
    pipeline = open_pipeline(mixed(folder, "abc", "xyz"), tmp_path, training=True)
    state = pipeline.start
    pipeline.check(state)
    with pytest.raises(InputError, match="data.mixture was xyz, abc, got abc, xyz; restore it, or .*--init"):
        pipeline.check({**state, "names": dict(reversed(state["names"].items()))})
    state["corpus"]["xyz"] = "0"
    with pytest.raises(InputError, match="xyz' is not what it was .*: its content was changed; .*--init runs/unnamed"):
        pipeline.check(state)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mixture": ("a=x", "a=y")}, "names that differ"),
        ({"mixture": ("a=x",), "weights": (1.0, 2.0)}, "one for each of the 1 sources"),
        ({"mixture": ("a=x",), "validation": ("a=z",)}, "names that no source"),
        ({"mixture": ("a=x",), "loading": "stream"}, "data.weights_are.*for a stream"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        DataConfig(source="mixture", **wrong)


def test_a_damaged_page_stops_training_or_becomes_padding(tmp_path):
    out = tmp_path / "corpus"
    corpus = prepared(write_words(tmp_path / "abc.jsonl", "abc", 300), out, validation_fraction=0.1)
    (shard,) = out.glob("*train*array_record*")
    page, split = corpus.manifest.page, corpus.split("train")
    assert split.num_tokens > 3 * page

    def place_of(at: int) -> int:
        """The place of a token in the shard, by the tokens from there on."""
        return shard.read_bytes().index(split.tokens(at, at + 50).astype("<u2").tobytes())

    def opened(max_corrupt: int, say=lambda line: None):
        data = DataConfig(source=str(out), batch_size=4, length=32, max_corrupt=max_corrupt)
        return open_pipeline(TrainConfig(data=data, tokenizer=BYTES), tmp_path / "none", training=True, say=say)

    whole = opened(0)
    sound = [whole.batch(4 * step) for step in range(300)]
    damage(shard, place_of(page + 100))

    with pytest.raises(InputError, match=r"train.*is damaged at page 1 "):
        take(opened(0), whole.start, 300)

    said: list[str] = []
    pipeline = opened(1, said.append)
    damaged = 0
    made, state = pipeline.batches(pipeline.start), {}
    for want in sound:
        batch, state = next(made)
        hole = (batch["inputs_BL"] == 0) & (want["inputs_BL"] != 0)
        damaged += int(hole.sum())
        for name in ("inputs_BL", "positions_BL", "segments_BL"):
            np.testing.assert_array_equal(batch[name], np.where(hole, 0, want[name]))
        assert not batch["weights_BL"][hole].any() and not batch["segments_BL"][hole].any()
        unknown = (batch["targets_BL"] == 0) & (want["targets_BL"] != 0)
        assert not batch["weights_BL"][unknown].any()
        lost = want["weights_BL"] != batch["weights_BL"]
        assert (hole | np.roll(hole, -1, axis=1) | (np.arange(32) == 31))[lost].all()  # or its neighbour's target
        np.testing.assert_array_equal(batch["targets_BL"][~lost], np.where(hole, 0, want["targets_BL"])[~lost])
    made.close()
    assert damaged >= page  # an epoch and more
    assert len(state["corrupt"]) == 1 and shard.name in state["corrupt"][0]
    assert any("left out page 1 of at most data.max_corrupt=1" in line for line in said)

    damage(shard, place_of(100))
    with pytest.raises(InputError, match="data.max_corrupt=1 damaged pages were skipped before, and now"):
        take(opened(1), state, 300)


def test_show_names_the_source_of_each_row(folder):
    pipeline = open_pipeline(mixed(folder, "abc", "xyz"), folder / "none", training=True)
    lines = show(pipeline.batch(1), pipeline.tokenizer, range(4), pipeline.sources(1)).splitlines()
    rows = [line for line in lines if line.startswith("row ")]
    for row, inputs in zip(rows, pipeline.batch(1)["inputs_BL"], strict=True):
        assert f" of {letters_of(inputs)}: " in row


def test_a_tokenizer_that_did_not_prepare_the_folder_is_refused(folder, tmp_path):
    def trained(name: str, letters: str) -> TokenizerConfig:
        cfg = TrainTokenizerConfig(source=str(folder / f"{letters}.jsonl"), out=str(tmp_path / name), vocab_size=300)
        shas[name] = train_tokenizer(cfg).sha256[:12]
        return TokenizerConfig(vocab_size=300, path=cfg.out)

    shas: dict[str, str] = {}
    own, other, out = trained("own", "abc"), trained("other", "xyz"), tmp_path / "corpus"
    prepared(folder / "abc.jsonl", out, validation_fraction=0.2, tokenizer=own)
    data = DataConfig(source=str(out), batch_size=2, length=16)
    wanted = f"tokenizer.path=.*other' holds the tokenizer {shas['other']}, but {out} was prepared with {shas['own']}"
    with pytest.raises(InputError, match=wanted):
        open_pipeline(TrainConfig(data=data, tokenizer=other), Path("none"), training=True)
    for tokenizer in (own, TokenizerConfig(vocab_size=300)):
        pipeline = open_pipeline(TrainConfig(data=data, tokenizer=tokenizer), Path("none"), training=True)
        assert pipeline.tokenizer.vocab_size == 300


def test_a_corpus_that_is_not_where_its_run_was_trained_is_told_by_its_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    run = TrainConfig(data=DataConfig(source="abc", length=32), tokenizer=BYTES)
    open_pipeline(run, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="source 'abc' is no prepared folder here, .*; go to the folder in which"):
        open_pipeline(run, tmp_path / "data")
