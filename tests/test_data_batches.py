"""Laws of rows and batches: every target once an epoch, the same batch for everybody, documents kept apart."""

import contextlib
import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.config.section import InputError
from gptjax.data.batches import RowSampler, batches, validation_batches
from gptjax.data.mixture import Mixture
from gptjax.data.packing import MemorySplit, batch_hash, example_batch, pack_documents, pad_documents
from gptjax.data.permutation import permute
from gptjax.data.show import show
from gptjax.tokenizer import BytesTokenizer

BOS, EOS = 256, 257


def split_of(sizes: list[int]) -> MemorySplit:
    """A split whose token at p is p itself, so that a batch shows what it was cut from."""
    return MemorySplit.of(np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]))


sizes = st.lists(st.integers(2, 30), min_size=1, max_size=12)
both_packings = pytest.mark.parametrize("packing", ["packed", "padded"])


def real(batch):
    """Where a batch is not padding."""
    return batch["segments_BL"] > 0


@pytest.fixture
def rows() -> RowSampler:
    return RowSampler(split_of([30, 50]), DataConfig(batch_size=2, length=10), 0)


def document_ends(split: MemorySplit) -> set[int]:
    """Places whose next token begins another document."""
    return {int(s) - 1 for s in split.starts[1:]}


def epoch(rows: RowSampler, number: int) -> list[dict]:
    """The rows of an epoch, one to a batch; data.batch_size must be 1."""
    n = rows.rows_per_epoch
    return [rows.batch(step) for step in range(number * n, (number + 1) * n)]


@both_packings
@settings(max_examples=60, deadline=None)
@given(sizes=sizes, length=st.integers(1, 20), seed=st.integers(0, 2**31 - 1), number=st.integers(0, 5))
def test_every_target_is_predicted_exactly_once_an_epoch(packing, sizes, length, seed, number):
    split = split_of(sizes)
    length = min(length, split.num_tokens - 1)
    rows = RowSampler(split, DataConfig(batch_size=1, length=length, packing=packing), seed)
    seen = []
    for batch in epoch(rows, number):
        seen += batch["inputs_BL"][batch["weights_BL"] > 0].tolist()
        np.testing.assert_array_equal(batch["targets_BL"][real(batch)], batch["inputs_BL"][real(batch)] + 1)
    assert sorted(seen) == sorted(set(range(split.num_tokens - 1)) - document_ends(split))


@both_packings
@settings(max_examples=60, deadline=None)
@given(sizes=sizes, length=st.integers(1, 20), batch_size=st.integers(1, 5))
def test_validation_predicts_every_target_once_and_in_order(packing, sizes, length, batch_size):
    split = split_of(sizes)
    cfg = DataConfig(batch_size=batch_size, length=length, packing=packing)
    made = list(validation_batches(split, cfg))
    seen = [i for batch in made for i in batch["inputs_BL"][batch["weights_BL"] > 0].tolist()]
    assert seen == sorted(set(range(split.num_tokens - 1)) - document_ends(split))
    assert {batch["inputs_BL"].shape for batch in made} == {(batch_size, length)}
    every, first = (
        np.concatenate([batch["inputs_BL"][real(batch)[:, 0]] for batch in some])
        for some in (made, validation_batches(split, cfg, max_rows=3))
    )
    np.testing.assert_array_equal(first, every[:3])


@both_packings
@settings(max_examples=60, deadline=None)
@given(sizes=sizes, length=st.integers(2, 20), step=st.integers(0, 50))
def test_segments_positions_and_weights_say_which_document_a_token_is_from(packing, sizes, length, step):
    split = split_of(sizes)
    length = min(length, split.num_tokens - 1)
    batch = RowSampler(split, DataConfig(batch_size=3, length=length, packing=packing), 7).batch(3 * step)
    starts, ends = set(split.starts.tolist()), document_ends(split)
    for i in range(3):
        segment = position = 0
        for j in range(length):
            token = int(batch["inputs_BL"][i, j])
            if not batch["segments_BL"][i, j]:
                assert not any(batch[name][i, j:].any() for name in batch)  # padding is 0, up to the row's end
                break
            if j == 0 or token in starts:
                segment, position = segment + 1, 0
            assert batch["segments_BL"][i, j] == segment
            assert batch["positions_BL"][i, j] == position
            assert batch["weights_BL"][i, j] == (token not in ends)
            position += 1


@settings(max_examples=40, deadline=None)
@given(sizes=sizes, length=st.integers(2, 20), step=st.integers(0, 20))
def test_crossing_documents_makes_a_row_one_segment(sizes, length, step):
    split = split_of(sizes)
    length = min(length, split.num_tokens - 1)
    apart = RowSampler(split, DataConfig(batch_size=2, length=length), 0).batch(2 * step)
    crossing = RowSampler(split, DataConfig(batch_size=2, length=length, cross_documents=True), 0).batch(2 * step)
    for name in ("inputs_BL", "targets_BL"):
        np.testing.assert_array_equal(crossing[name], apart[name])
    np.testing.assert_array_equal(crossing["segments_BL"], real(apart).astype(int))
    np.testing.assert_array_equal(crossing["weights_BL"], real(apart).astype(float))
    np.testing.assert_array_equal(crossing["positions_BL"], np.arange(length) * real(apart))


@both_packings
def test_batch_size_does_not_change_the_order_of_rows(packing):
    split = split_of([30, 50, 7, 11])
    ones = RowSampler(split, DataConfig(batch_size=1, length=10, packing=packing), 3)
    fours = RowSampler(split, DataConfig(batch_size=4, length=10, packing=packing), 3)
    single = np.concatenate([ones.batch(step)["inputs_BL"] for step in range(40)])
    np.testing.assert_array_equal(single, np.concatenate([fours.batch(4 * step)["inputs_BL"] for step in range(10)]))


def test_seeds_and_epochs_have_orders_and_cuts_of_their_own():
    split, cfg = split_of([400]), DataConfig(batch_size=1, length=10)
    orders = set()
    for seed in (0, 1):
        rows = RowSampler(split, cfg, seed)
        for number in range(3):
            firsts = tuple(int(batch["inputs_BL"][0, 0]) for batch in epoch(rows, number))
            assert firsts != tuple(sorted(firsts))
            orders.add(firsts)
    assert len(orders) == 6
    assert len({min(order) % 10 for order in orders}) > 2  # rows are cut at other places too


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 2**40))
def test_permuted_places_are_a_permutation(size, seed, epoch):
    places = permute(np.arange(size), size, seed, epoch)
    np.testing.assert_array_equal(np.sort(places), np.arange(size))


def test_permutations_prefer_no_place():
    size, trials = 7, 1000
    counts = np.zeros((size, size))
    for number in range(trials):
        counts[np.arange(size), permute(np.arange(size), size, 1, number)] += 1
    expected = trials / size
    assert ((counts - expected) ** 2 / expected).sum() < 36 + 6 * np.sqrt(2 * 36)  # chi squared, 36 degrees of freedom


def test_an_order_of_rows_never_changes_between_versions():
    # A resumed run must read what it would have read; a change here breaks every unfinished run.
    assert permute(np.arange(10), 10, 0, 0).tolist() == [7, 1, 4, 6, 2, 5, 0, 3, 8, 9]
    rows = RowSampler(split_of([20, 31]), DataConfig(batch_size=2, length=8), 5)
    assert batch_hash(rows.batch(6))[:16] == "f3530bf651edd648"


@both_packings
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_go_on_from_any_step_and_threads_change_none(packing, workers):
    cfg = DataConfig(batch_size=2, length=10, packing=packing)
    alone, rows = RowSampler(split_of([30, 50]), cfg, 0), Mixture({"": split_of([30, 50])}, cfg, 0)
    want = [(batch_hash(alone.batch(2 * step)), {"rows": 2 * step + 2}) for step in range(12)]
    for start in (0, 4):
        with contextlib.closing(batches(rows, 2 * start, workers=workers)) as made:
            assert [(batch_hash(batch), state) for batch, state in itertools.islice(made, 8)] == want[start : start + 8]
    with contextlib.closing(batches(rows, 10, slice(1, 2), workers)) as part:
        np.testing.assert_array_equal(next(part)[0]["inputs_BL"], rows.batch(10)["inputs_BL"][1:])


@both_packings
@pytest.mark.parametrize(("before", "after"), [(2, 5), (5, 2), (3, 3)])
def test_another_batch_size_goes_on_with_the_next_row_and_leaves_none_out(packing, before, after):
    def made(batch_size: int, start: int, count: int) -> tuple[list[np.ndarray], int]:
        rows = Mixture({"": split_of([30, 50])}, DataConfig(batch_size=batch_size, length=10, packing=packing), 0)
        with contextlib.closing(batches(rows, start)) as made:
            taken = list(itertools.islice(made, count))
        return [row for batch, _ in taken for row in batch["inputs_BL"]], taken[-1][1]["rows"]

    first, rows = made(before, 0, 7)
    then, end = made(after, rows, 6)
    whole, _ = made(1, 0, end)
    np.testing.assert_array_equal(first + then, whole)


def test_closing_the_iterator_ends_its_thread(rows):
    before = threading.active_count()
    iterator = batches(rows, 0)
    next(iterator)
    assert threading.active_count() == before + 1
    time.sleep(0.05)  # let it run into the full queue
    iterator.close()
    assert threading.active_count() == before


def test_an_error_while_reading_ahead_reaches_the_reader_in_its_place(rows):
    good = rows.rows

    def damaged(number):
        if {4, 5} & set(number.tolist()):  # of the third batch
            raise InputError("shard 7 is damaged")
        return good(number)

    rows.rows = damaged  # pyright: ignore[reportAttributeAccessIssue]
    iterator = batches(rows, 0)
    assert [next(iterator)[1]["rows"] for _ in range(2)] == [2, 4]
    with pytest.raises(InputError, match="shard 7 is damaged"):
        next(iterator)


def test_too_few_tokens_for_a_row_is_refused_with_numbers():
    with pytest.raises(InputError, match="data.length=10.* 10 tokens.*--data.length"):
        RowSampler(split_of([4, 6]), DataConfig(length=10), 0)
    assert RowSampler(split_of([4, 7]), DataConfig(length=10), 0).rows_per_epoch == 1
    assert RowSampler(split_of([4, 6]), DataConfig(length=10, packing="padded"), 0).rows_per_epoch == 2


docs_of_ids = st.lists(st.lists(st.integers(0, 99), min_size=2, max_size=9), min_size=1, max_size=10)


@settings(max_examples=80, deadline=None)
@given(docs=docs_of_ids)
def test_packed_and_padded_documents_predict_the_same(docs):
    def predictions(batch):
        """Each weighted prediction with everything that its document shows the model."""
        found = []
        for i, j in zip(*np.nonzero(batch["weights_BL"])):
            seen = (batch["segments_BL"][i] == batch["segments_BL"][i, j]) & (np.arange(8) <= j)
            context = zip(batch["inputs_BL"][i, seen].tolist(), batch["positions_BL"][i, seen].tolist())
            found.append((tuple(context), int(batch["targets_BL"][i, j])))
        return sorted(found)

    packed, padded = pack_documents(docs, 8), pad_documents(docs, 8)
    assert predictions(packed) == predictions(padded)
    assert len(predictions(padded)) == sum(len(doc) - 1 for doc in docs)
    assert len(packed["inputs_BL"]) <= len(padded["inputs_BL"])


def test_documents_share_a_row_where_they_fit():
    batch = pack_documents([[1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11, 12]], 6)
    assert batch["inputs_BL"].tolist() == [[1, 2, 4, 5, 6, 8], [10, 11, 0, 0, 0, 0]]
    assert batch["targets_BL"].tolist() == [[2, 3, 5, 6, 7, 9], [11, 12, 0, 0, 0, 0]]
    assert batch["segments_BL"].tolist() == [[1, 1, 2, 2, 2, 3], [1, 1, 0, 0, 0, 0]]
    assert batch["positions_BL"].tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 0, 0, 0, 0]]
    assert batch["weights_BL"].tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]


def test_documents_that_fit_no_row_are_refused():
    for docs in ([], [[1]], [[1, 2], list(range(8))]):
        with pytest.raises(InputError, match="wanted"):
            pack_documents(docs, 6)


def test_types_and_names_are_those_that_the_step_is_compiled_for(rows):
    batch, example = rows.batch(0), example_batch(2, 10)
    for some in (batch, example):
        assert {name: (str(x.dtype), x.shape) for name, x in some.items()} == {
            **dict.fromkeys(["inputs_BL", "targets_BL", "positions_BL", "segments_BL"], ("int32", (2, 10))),
            "weights_BL": ("float32", (2, 10)),
        }


def test_the_hash_of_a_batch_changes_with_every_part_of_it():
    batch = pack_documents([[1, 2, 3]], 4)
    hashes = {batch_hash(batch)}
    for name, value in batch.items():
        changed = value.copy()
        changed[0, 3] += 1
        hashes.add(batch_hash({**batch, name: changed}))
    assert len(hashes) == 6


def test_show_spells_out_what_the_model_sees():
    docs = [[BOS, *b"To be\nor", EOS], [BOS, *b"not", EOS]]
    text = show(pack_documents(docs, 16), BytesTokenizer(), rows=[0])
    assert text.splitlines()[1:] == [
        "row 0: 2 segments, 13 weighted targets",
        "  [0:9] segment 1, positions 0 to 8, 9 weighted targets",
        "    | <bos>To be",
        "    | or",
        "    last target: '<eos>'",
        "  [9:13] segment 2, positions 0 to 3, 4 weighted targets",
        "    | <bos>not",
        "    last target: '<eos>'",
        "  [13:16] padding",
    ]
    assert batch_hash(pack_documents(docs, 16)) in text.splitlines()[0]
