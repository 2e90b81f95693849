"""Laws of preferences: read in every form, rendered so that the answer alone counts, no prompt cut or split."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gptjax.config.section import InputError
from gptjax.data.dialogue import read_conversations
from gptjax.data.preferences import PreferenceRows, preference_of, read_preferences, render_answers
from gptjax.tokenizer import BytesTokenizer
from gptjax.tokenizer.templates import Template

PLAIN = Template(name="plain", tokens=("{eos}",), user=("Q: ", "\n"), header="A: ", end="{eos}\n")
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Yes"), ("assistant", "No"))
)
EARLIER = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "So."}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        {"prompt": [USER], "chosen": "Yes", "rejected": [BAD]},
        {"prompt": [USER], "answers": ["Yes", [BAD]], "score": 3},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [GOOD], "rejected": [BAD]},
    ],
)
def test_every_usual_form_is_the_same_preference(record):
    assert preference_of(record, "a:1") == ([USER], [[GOOD], [BAD]])


def test_whole_conversations_have_what_they_begin_with_as_their_prompt():
    found = preference_of({"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]}, "a:1")
    assert found == ([*EARLIER, USER], [[GOOD], [BAD]])


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "Hi", "chosen": "Yes"}, "a:1 has prompt, chosen; wanted"),
        ([], "a:1 has list; wanted"),
        ({"prompt": "Hi", "answers": ["Yes"]}, "wanted at least two, from the best to the worst"),
        ({"prompt": "Hi", "chosen": "Yes", "rejected": 5}, "a:1: answer 2 "),
        (
            {"prompt": "Hi", "chosen": "Yes", "rejected": [{"role": "judge", "content": "No"}]},
            "a:1: answer 2: .*one of",
        ),
        ({"prompt": [USER, GOOD], "chosen": "Yes", "rejected": "No"}, "the prompt ends with assistant"),
        ({"prompt": "Hi", "chosen": [USER], "rejected": "No"}, "answer 1 is not the assistant's"),
        ({"prompt": "Hi", "answers": ["a", "b", "a"]}, "answers 1 and 3 are equal"),
        ({"chosen": "Yes", "rejected": "No"}, "the prompt ends with nothing"),
    ],
)
def test_what_is_no_preference_is_one_line_that_names_the_record(record, said):
    with pytest.raises(InputError, match=said) as e:
        preference_of(record, "a:1")
    assert "\n" not in str(e.value) and str(e.value).startswith("a:1")


def test_files_of_every_kind_give_the_same_and_name_their_rows(tmp_path):
    records = [{"prompt": [USER], "chosen": "Yes", "rejected": text} for text in ("No", "Never")]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    first, *others = ([*read_preferences(tmp_path / f"a.{kind}")] for kind in ("jsonl", "jsonl.gz", "parquet"))
    assert len(first) == 2 and all(other == first for other in others)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": [USER, GOOD]}]), tmp_path / "b.parquet")
    assert [*read_conversations(tmp_path / "b.parquet")] == [[USER, GOOD]]
    with pytest.raises(InputError, match=r"b.parquet:1 has messages; wanted"):
        list(read_preferences(tmp_path / "b.parquet"))
    (tmp_path / "c.jsonl").write_text(lines + "\n")
    with pytest.raises(InputError, match=r"c.jsonl:3: found a blank line"):
        list(read_preferences(tmp_path / "c.jsonl"))
    (tmp_path / "d.txt").write_text("text")
    with pytest.raises(InputError, match=r"d.txt holds no records; wanted .jsonl"):
        list(read_preferences(tmp_path / "d.txt"))


def test_the_answer_alone_counts_and_every_answer_stands_behind_the_same_prompt():
    tokenizer = BytesTokenizer()
    preference = preference_of({"prompt": [*EARLIER, USER], "chosen": "Yes", "rejected": "No"}, "a:1")
    (good, weights), (bad, _) = render_answers(PLAIN, tokenizer, preference)
    counted = [i for i, weight in zip(good, weights, strict=True) if weight]
    assert counted == [*tokenizer.encode("Yes"), tokenizer.eos_id], "not the assistant's earlier turn"
    before = good[: weights.index(1)]
    assert bad[: len(before)] == before


def test_a_prompt_keeps_its_answers_together_and_comes_once_an_epoch():
    given = [
        [([k] * 5 + [100 * k + answer] * 3, [0] * 5 + [1] * 3) for answer in range(2 + k % 2)] for k in range(1, 8)
    ]
    rows = PreferenceRows([*given, [([9] * 30, [1] * 30), ([9] * 4, [1] * 4)]], length=10)
    assert (rows.num_rows, rows.too_long, rows.num_answers) == (7, 1, 3)
    batch = rows.batch(0, 7)
    assert batch["inputs_BSL"].shape == (7, 3, 10) and batch["answers_BS"].dtype == np.float32
    assert sorted(batch["inputs_BSL"][:, 0, 0]) == list(range(1, 8))
    for inputs, targets, weights, answers in zip(
        *(batch[n] for n in ("inputs_BSL", "targets_BSL", "weights_BSL", "answers_BS"))
    ):
        k = inputs[0, 0]
        assert answers.tolist() == [1.0, 1.0, float(k % 2)]
        for s in range(2 + k % 2):
            assert targets[s][weights[s] > 0].tolist() == [100 * k + s] * 3
        assert weights[2].sum() == 3 * (k % 2)
    again = rows.batch(7, 7)["inputs_BSL"][:, 0, 0]
    assert sorted(again) == list(range(1, 8)) and again.tolist() != batch["inputs_BSL"][:, 0, 0].tolist()
    whole = rows.batch(2, 5)
    assert all(np.array_equal(whole[name][1:3], rows.batch(3, 2)[name]) for name in whole), "resumable by rows"
    with pytest.raises(InputError, match="none of 1 preferences fits.*tokens with its prompt; raise --data.length"):
        PreferenceRows(given[:1], length=5)
