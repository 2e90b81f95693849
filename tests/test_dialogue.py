"""Laws of conversations: whole, each once an epoch, and the assistant's tokens alone count."""

import gzip
import itertools
import json

import numpy as np
import pytest

from gptjax.config.section import InputError
from gptjax.data.dialogue import ConversationRows, messages_of, pack_best_fit, read_conversations
from gptjax.data.packing import pack_documents

LENGTH = 24


def conversations(count: int = 200, seed: int = 0):
    """Conversations of numbered ids: question tokens are 1000 k + i, answers 1000 k + 500 + i."""
    rng, made = np.random.default_rng(seed), []
    for k in range(1, count + 1):
        q, a = rng.integers(1, 9), rng.integers(1, 12)
        made.append(([1000 * k + i for i in range(q)] + [1000 * k + 500 + i for i in range(a)], [0] * q + [1] * a))
    return made


def whole(batch):
    """(ids, weights of the targets) of each conversation in a batch, by its number."""
    found = []
    for row in range(len(batch["inputs_BL"])):
        for segment in range(1, batch["segments_BL"][row].max() + 1):
            here = batch["segments_BL"][row] == segment
            ids = [*batch["inputs_BL"][row][here], batch["targets_BL"][row][here][-1]]
            assert batch["positions_BL"][row][here].tolist() == list(range(here.sum()))
            found.append((ids, batch["weights_BL"][row][here].tolist()))
    return found


def test_every_conversation_is_whole_and_comes_once_an_epoch():
    given = conversations()
    rows = ConversationRows(given, LENGTH)
    found = whole(rows.batch(0, rows.num_rows))
    assert sorted(ids for ids, _ in found) == sorted(ids for ids, _ in given)
    weights = {ids[0]: weights for ids, weights in given}
    assert all(w == weights[ids[0]][1:] for ids, w in found), "the assistant's tokens count, and no others"
    again = whole(rows.batch(rows.num_rows, rows.num_rows))
    assert sorted(found) == sorted(again) and found != again, "in another order the next time"


def test_what_does_not_fit_or_has_no_answer_is_left_out_and_counted():
    given = [(list(range(25)), [0] * 20 + [1] * 5), (list(range(26)), [0] + [1] * 25), ([1, 2, 3], [0] * 3)]
    rows = ConversationRows(given, LENGTH)
    assert (rows.num_rows, rows.too_long, rows.unanswered) == (1, 1, 1)
    assert rows.batch(0, 1)["weights_BL"].sum() == 5
    with pytest.raises(
        InputError, match=r"none of 2 conversations .* 1 have more than data.length \+ 1 = 25 tokens, 1"
    ):
        ConversationRows(given[1:], LENGTH)


def test_best_fit_leaves_little_room():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, LENGTH + 1, 500).tolist()
    rows = pack_best_fit(sizes, LENGTH)
    assert sorted(itertools.chain(*rows)) == list(range(500))
    assert max(sum(sizes[i] for i in row) for row in rows) <= LENGTH
    halves = sum(size > LENGTH / 2 for size in sizes)  # no two of them share a row
    assert len(rows) <= 1.05 * max(halves, sum(sizes) / LENGTH)
    first_fit = pack_documents([[0] * (size + 1) for size in sizes], LENGTH)["inputs_BL"]
    assert len(rows) < len(first_fit)
    assert pack_best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_batches_go_on_where_they_were_and_do_not_depend_on_their_size():
    rows = ConversationRows(conversations(), LENGTH, seed=3)
    four = list(itertools.islice(rows.batches(4), 60))  # more than an epoch
    assert rows.num_rows < 240 and four[9][1] == {"rows": 40}
    for (a, place), (b, other) in zip(four[5:], rows.batches(4, step=5)):
        assert place == other
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    two = list(itertools.islice(rows.batches(2), 2))
    np.testing.assert_array_equal(np.concatenate([b["inputs_BL"] for b, _ in two]), four[0][0]["inputs_BL"])


def test_records_in_the_forms_of_hugging_face_are_read(tmp_path):
    said = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]
    records = [
        {"messages": said, "topic": "x"},
        {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b."}]},
        {"prompt": "a?", "completion": "b."},
    ]
    path = tmp_path / "chat.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    assert list(read_conversations(path)) == [said] * 3


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "a", "id": 3}, "has the fields text, id; wanted messages, conversations, or prompt and completion"),
        ({"messages": [{"role": "robot", "content": "a"}]}, r'messages\[0\] is .*; wanted {"role": one of human'),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] is"),
        ({"prompt": "a"}, "has a prompt and no completion"),
        (["a"], "has \\['a'\\]; wanted messages"),
    ],
)
def test_a_record_of_another_form_is_one_line(record, said):
    with pytest.raises(InputError, match=f"chat.jsonl:3:? ?{said}") as e:
        messages_of(record, "chat.jsonl:3")
    assert "\n" not in str(e.value)
