"""Laws of streams: the source's text once a pass and in order, exact resuming, the same rows for any workers."""

import dataclasses
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import BYTES, prepared, take, take_counted, write_jsonl

from gptjax.config import DataConfig, EvaluateConfig, TokenizerConfig, TrainConfig
from gptjax.config.section import InputError
from gptjax.data import chunks, streamed
from gptjax.data.chunks import Cursor, StreamSpec
from gptjax.data.holdout import unit_hash
from gptjax.data.packing import MemorySplit, Spans, batch_hash, cut
from gptjax.data.pipeline import open_pipeline
from gptjax.data.sources import documents
from gptjax.data.stream import StreamRows, start_state
from gptjax.tokenizer import BytesTokenizer

BOS, EOS = 256, 257
FRACTION = 0.1

both_packings = pytest.mark.parametrize("packing", ["packed", "padded"])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Two files of short documents, among them empty ones, and a long one."""
    rng = random.Random(1)
    folder = tmp_path_factory.mktemp("source")
    texts = ["".join(rng.choices("abcdefgh \n", k=rng.choice([0, 1, 5, 40, 200]))) for _ in range(60)]
    texts[20] = "".join(rng.choices("abcd \n", k=3000))
    write_jsonl(folder / "1.jsonl.gz", texts[:35])
    write_jsonl(folder / "2.jsonl.gz", texts[35:])
    return folder


@pytest.fixture(scope="module")
def even(tmp_path_factory) -> Path:
    """So many short documents that the share held out by hash is near to the one asked for."""
    rng = random.Random(2)
    texts = ["".join(rng.choices("abcdefgh \n", k=rng.randint(1, 40))) for _ in range(600)]
    return write_jsonl(tmp_path_factory.mktemp("even") / "a.jsonl.gz", texts)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks so small that the text has many of them."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 300)


def config(source: Path | str, tokenizer: TokenizerConfig = BYTES, **data) -> TrainConfig:
    settings = {"batch_size": 3, "length": 20, "validation_fraction": FRACTION, "loading": "stream"} | data
    return TrainConfig(data=DataConfig(source=str(source), **settings), tokenizer=tokenizer)


def trained_on(source: Path) -> list[list[int]]:
    """The tokens of each document that is not held out, in the order of the source."""
    tokenizer = BytesTokenizer()
    kept = [d for d in documents(str(source)) if unit_hash(d.digest) > FRACTION]
    return [[BOS, *tokenizer.encode(d.text), EOS] for d in kept]


def test_packed_rows_are_the_documents_end_to_end_pass_after_pass(source):
    docs = trained_on(source) * 3
    whole, length = MemorySplit.of(docs), 20
    pipeline = open_pipeline(config(source), Path("none"))
    for step, (batch, _) in enumerate(itertools.islice(pipeline.batches(pipeline.start), 110)):
        start = (step * 3 + np.arange(3)) * length
        spans = Spans(np.arange(3), np.zeros(3, np.int64), start, np.full(3, length))
        assert batch_hash(batch) == batch_hash(cut(whole, spans, 3, length))
    assert 110 * 60 > sum(map(len, docs)) / 3  # the second pass has begun


def test_padded_rows_hold_each_target_once_a_pass(source):
    pipeline = open_pipeline(config(source, packing="padded"), Path("none"))
    wanted = [(a, b) for doc in trained_on(source) * 2 for a, b in zip(doc, doc[1:])]
    found: list[tuple[int, int]] = []
    for batch, _ in pipeline.batches(pipeline.start):
        for row in range(3):
            used = batch["weights_BL"][row] > 0
            assert batch["segments_BL"][row].max() == 1 and used[0]
            found += zip(batch["inputs_BL"][row][used].tolist(), batch["targets_BL"][row][used].tolist())
        if len(found) >= len(wanted):
            break
    assert found[: len(wanted)] == wanted


@both_packings
def test_a_stream_goes_on_exactly_from_any_state(source, packing):
    pipeline = open_pipeline(config(source, packing=packing), Path("none"))
    straight = take(pipeline, pipeline.start, 120)
    assert any(state["sources"][""]["epoch"] == 1 for _, state in straight)
    assert len({state["sources"][""]["segment"] for _, state in straight}) == 1  # a document of one piece is never cut
    for step in range(0, 115, 9):
        again = open_pipeline(config(source, packing=packing), Path("none"))
        again.check(straight[step][1])
        assert take(again, straight[step][1], 4) == straight[step + 1 : step + 5]
    assert batch_hash(pipeline.batch(straight[29][1]["rows"])) == straight[30][0]


@both_packings
def test_a_stream_goes_on_with_another_batch_size_and_leaves_no_row_out(source, packing):
    def rows(batch_size: int, state=None, count: int = 12) -> tuple[list[np.ndarray], dict]:
        pipeline = open_pipeline(config(source, packing=packing, batch_size=batch_size), Path("none"))
        made = pipeline.batches(state or pipeline.start)
        taken = list(itertools.islice(made, count))
        made.close()
        return [row for batch, _ in taken for row in batch["inputs_BL"]], taken[-1][1]

    first, state = rows(3)
    then, end = rows(5, state)
    np.testing.assert_array_equal(first + then, rows(1, None, end["rows"])[0])
    pipeline = open_pipeline(config(source, packing=packing, batch_size=5), Path("none"))
    np.testing.assert_array_equal(pipeline.batch(state["rows"])["inputs_BL"], then[:5])


def test_a_stream_goes_on_exactly_inside_a_long_document(tmp_path):
    text = "".join(random.Random(0).choices("abc \n", k=1 << 18))
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "short.txt").write_text("short")
    cfg = config(tmp_path, batch_size=40, length=100)
    pipeline = open_pipeline(cfg, Path("none"))
    straight = take(pipeline, pipeline.start, 70)
    pieces = [state["sources"][""]["segment"] for _, state in straight]
    assert max(pieces) >= 2
    at = pieces.index(2)
    assert take(open_pipeline(cfg, Path("none")), straight[at][1], 3) == straight[at + 1 : at + 4]


def test_rows_do_not_depend_on_how_many_are_taken_at_a_time(source):
    cfg = DataConfig(length=20)
    text = StreamSpec(str(source), "text", FRACTION, 0, BYTES)
    ones, fives = (StreamRows(text.chunks(Cursor()), start_state(), cfg) for _ in range(2))
    single = np.concatenate([ones.take(1)["inputs_BL"] for _ in range(50)])
    np.testing.assert_array_equal(single, np.concatenate([fives.take(5)["inputs_BL"] for _ in range(10)]))
    assert ones.state == fives.state


def test_workers_make_every_chunk_between_them(source):
    text = StreamSpec(str(source), "text", FRACTION, 0, BYTES)
    alone = list(itertools.islice(text.chunks(Cursor()), 40))
    assert len({chunk.cursor for chunk in alone}) == 40
    for workers in (2, 3):
        shares = [text.chunks(alone[5].cursor, i, workers) for i in range(workers)]
        for i, want in enumerate(alone[5:30]):
            got = next(shares[i % workers])
            assert got.cursor == want.cursor
            np.testing.assert_array_equal(got.tokens, want.tokens)


def test_held_out_documents_are_those_of_a_prepared_corpus_and_never_trained_on(even, tmp_path):
    corpus = prepared(even, tmp_path / "corpus", validation_fraction=FRACTION, deduplicate=False, min_bytes=0)
    pipeline = open_pipeline(config(even), Path("none"), training=True)
    (own,) = pipeline.validation
    held = corpus.split("validation")
    np.testing.assert_array_equal(own.split.tokens(0, 10**6), held.tokens(0, held.num_tokens))
    assert (own.name, own.own, own.split.num_bytes) == ("", True, held.num_bytes)
    assert own.split.num_documents == held.num_documents > 0
    tokens = sum(map(len, trained_on(even)))
    assert tokens == corpus.split("train").num_tokens


def test_validation_takes_as_many_rows_as_are_evaluated(source):
    cfg = config(source, length=5)
    few = TrainConfig(data=cfg.data, tokenizer=BYTES, evaluate=type(cfg.evaluate)(max_rows=2))
    (own,) = open_pipeline(few, Path("none"), training=True).validation
    (every,) = open_pipeline(cfg, Path("none"), training=True).validation
    some, full = (next(iter(v.batches(2))) for v in (own, every))
    assert batch_hash(some) == batch_hash(full)


def test_a_small_stream_says_where_the_share_held_out_is_far_off(source, even):
    for text, told in ((source, 1), (even, 0)):
        said: list[str] = []
        pipeline = open_pipeline(config(text), Path("none"), training=True, say=said.append)
        assert pipeline.validation and len(said) == told
        assert all("HELD OUT IS 1.0% OF THE TEXT, though validation_fraction asks for 10.0%" in line for line in said)


def test_a_stream_that_holds_out_more_than_is_evaluated_says_so_once(even, monkeypatch):
    for most, rows, told in ((2, 0, 1), (2, 1, 0), (10**4, 0, 0)):  # of the last nothing is left out
        monkeypatch.setattr(streamed, "VALIDATION_ROWS", most)
        said: list[str] = []
        cfg = dataclasses.replace(config(even), evaluate=EvaluateConfig(max_rows=rows))
        pipeline = open_pipeline(cfg, Path("none"), training=True, say=said.append)
        assert pipeline.validation and len(said) == told
        assert all(f"of what {even} holds out, the first 2 rows are evaluated" in line for line in said)


def test_a_mixture_of_streams_keeps_shares_and_resumes(source, tmp_path):
    write_jsonl(tmp_path / "digits.jsonl.gz", ["0123456789" * i for i in range(30)])
    cfg = config(
        "mixture", mixture=(f"letters={source}", f"digits={tmp_path / 'digits.jsonl.gz'}"), weights=(3.0, 1.0),
        weights_are="shares", batch_size=8,
    )  # fmt: skip
    pipeline = open_pipeline(cfg, Path("none"), training=True)
    assert [v.name for v in pipeline.validation] == ["letters", "digits"]
    straight = take_counted(pipeline, 20, lambda row: "digits" if ((row >= 48) & (row < 58)).any() else "letters")
    tokens = straight[-1][1]["tokens"]
    assert tokens["digits"] / sum(tokens.values()) == pytest.approx(0.25, abs=0.02)
    assert take(pipeline, straight[9][1], 5) == straight[10:15]


def test_a_stream_wants_a_tokenizer_that_exists(source):
    with pytest.raises(InputError, match="gptjax tokenizer train --source .* --tokenizer.path"):
        open_pipeline(config(source, TokenizerConfig()), Path("none"))


def test_a_prepared_folder_is_no_stream(source, tmp_path):
    corpus = prepared(source, tmp_path / "corpus", validation_fraction=FRACTION)
    with pytest.raises(InputError, match="prepared folder.*--data.loading prepared"):
        open_pipeline(config(corpus.folder), Path("none"))


def test_a_stream_needs_text_on_both_sides(tmp_path):
    (tmp_path / "only.txt").write_text("one document")
    with pytest.raises(InputError, match="no document that is held out"):
        open_pipeline(config(tmp_path), Path("none"), training=True)
    with pytest.raises(InputError, match="all of its documents are held out"):
        open_pipeline(config(tmp_path, validation_fraction=0.999999), Path("none")).batch(0)


def test_a_changed_source_is_refused_or_gone_on_with_inexactly(source, tmp_path):
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pipeline = open_pipeline(config(tmp_path), Path("none"))
    _, state = take(pipeline, pipeline.start, 8)[-1]
    write_jsonl(tmp_path / "2.jsonl.gz", ["something else"] * 30)
    with pytest.raises(InputError, match="is not what it was when this run.*--no-data.exact-resume"):
        open_pipeline(config(tmp_path), Path("none"), training=True).check(state)
    with pytest.raises(InputError, match="is not what it was when this run.*restore it$"):
        open_pipeline(config(tmp_path), Path("none")).check(state)  # as the verbs that read a run do
    said: list[str] = []
    anyway = open_pipeline(config(tmp_path, exact_resume=False), Path("none"), training=True, say=said.append)
    anyway.check(state)
    (line,) = (line for line in said if "changed: going on at document" in line)
    after = take(anyway, state, 2)
    assert after[-1][1]["rows"] == 10 * 3
    open_pipeline(config(tmp_path), Path("none")).check(after[-1][1])  # from here on it is exact again


def some_texts():
    """A source that is code."""
    yield from (f"text {i}" for i in range(100))


def test_verbs_that_read_a_run_import_no_source(source):
    name = f"{__name__}:some_texts"
    training = open_pipeline(config(name), Path("none"), training=True)
    assert training.validation[0].split.num_documents > 0
    with pytest.raises(InputError, match="imports no code that the run names"):
        open_pipeline(config(name), Path("none"))
    with pytest.raises(InputError, match="imports no code that the run names"):
        _ = open_pipeline(config(source, validation=(f"more={name}",)), Path("none")).validation


def test_another_tokenizer_is_refused(source):
    for training, then in ((False, ""), (True, ", or begin another run with its weights: --init .* --run-dir OTHER")):
        pipeline = open_pipeline(config(source), Path("none"), training=training)
        with pytest.raises(InputError, match=f"is not the tokenizer that this run was trained with; restore it{then}$"):
            pipeline.check({**pipeline.start, "tokenizer": "0"})


def test_a_corrupt_file_stops_a_stream_or_is_counted(source, tmp_path):
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    second = tmp_path / "2.jsonl.gz"
    second.write_bytes(second.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"2\.jsonl\.gz.*cannot be unpacked"):
        pipeline = open_pipeline(config(tmp_path), Path("none"))
        take(pipeline, pipeline.start, 120)
    said: list[str] = []
    pipeline = open_pipeline(config(tmp_path, max_corrupt=1), Path("none"), training=True, say=said.append)
    states = [state for _, state in take(pipeline, pipeline.start, 200)]
    (what,) = states[-1]["corrupt"]  # once, though two passes came by
    assert states[-1]["sources"][""]["epoch"] >= 1 and "2.jsonl.gz" in what
    assert "corrupt" not in states[0]
    assert sum("left out 1 of at most data.max_corrupt=1" in line for line in said) == 1


TRAINER = """
import sys, time
from pathlib import Path
from gptjax.config import DataConfig, TokenizerConfig, TrainConfig
from gptjax.data.pipeline import open_pipeline
from gptjax.data.packing import batch_hash
from gptjax.config.section import InputError

# No `if __name__ == "__main__"`: the workers must not run the script again.
data = DataConfig(source=sys.argv[1], loading="stream", workers=2, batch_size=6, length=60, validation_fraction=0.1)
tokenizer = TokenizerConfig(kind="bytes", vocab_size=258)
pipeline = open_pipeline(TrainConfig(data=data, tokenizer=tokenizer), Path("none"))
batches = pipeline.batches(pipeline.start)
for _ in range(60):
    print(batch_hash(next(batches)[0]), flush=True)
if sys.argv[2] != "ends":
    input()
    try:
        while True:
            next(batches)
    except InputError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", ["ends", "killed", "loses a worker"])
def test_two_workers_make_the_same_rows_and_end_with_the_trainer(tmp_path, how):
    rng = random.Random(2)
    path, script = tmp_path / "text.jsonl.gz", tmp_path / "trainer.py"
    write_jsonl(path, ["".join(rng.choices("abcdefgh \n", k=rng.randint(1, 900))) for _ in range(200)])
    script.write_text(TRAINER)
    pipeline = open_pipeline(config(path, batch_size=6, length=60), Path("none"))
    want = [h for h, _ in take(pipeline, pipeline.start, 60)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script), str(path), how]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=env, text=True, **pipes)
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in range(60)] == want
    children = Path(f"/proc/{process.pid}/task").glob("*/children")  # of each of its threads
    workers = [int(pid) for path in children for pid in path.read_text().split()]
    if how != "ends":
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGTERM)  # as a terminal or a scheduler sends to all of a job: the trainer answers
    if how == "killed":
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < deadline, "workers outlive their trainer"
            time.sleep(0.1)
    else:  # though the stream was never closed
        if how == "loses a worker":
            os.kill(workers[1], signal.SIGKILL)
        said, errors = process.communicate("\n", timeout=60)
        assert process.returncode == 0 and errors == ""
        assert ("a worker process was killed by signal 9" in said) == (how == "loses a worker")
