"""Laws of preferences: read in every form, rendered so that the answer alone counts, no prompt cut or split."""

import gzip
import json
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gptjax.config.section import InputError
from gptjax.data.dialogue import read_conversations
from gptjax.data.preferences import (
    AnswerTrees,
    PreferenceRows,
    RankedAnswers,
    Rendered,
    preference_of,
    read_preferences,
    render_answers,
)
from gptjax.ops.reference import causal, dense_mask, tree
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
    assert preference_of(record, "a:1") == ([USER], [[GOOD], [BAD]], [0, 1])


def test_whole_conversations_have_what_they_begin_with_as_their_prompt():
    found = preference_of({"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]}, "a:1")
    assert found == ([*EARLIER, USER], [[GOOD], [BAD]], [0, 1])


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


def ranked(*answers: Sequence[int], given: int = 5, ranks: list[int] | None = None) -> RankedAnswers:
    """Answers of which the first `given` ids are the prompt's."""
    rendered: list[Rendered] = [(ids, [0] * given + [1] * (len(ids) - given)) for ids in answers]
    return RankedAnswers(rendered, ranks or [*range(len(answers))])


def test_a_prompt_keeps_its_answers_together_and_comes_once_an_epoch():
    given = [ranked(*([k] * 5 + [100 * k + answer] * 3 for answer in range(2 + k % 2))) for k in range(1, 8)]
    rows = PreferenceRows([*given, ranked([9] * 30, [9] * 4)], length=10)
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
    with pytest.raises(
        InputError, match="none of 1 preferences fits into rows of data.length = 5 tokens; raise --data.length"
    ):
        PreferenceRows(given[:1], length=5)


def test_answers_of_equal_rank_are_kept_and_stand_in_the_order_of_their_ranks():
    found = preference_of({"prompt": "Hi", "answers": ["a", "b", "c", "d"], "ranks": [7, 0, 2.5, 0]}, "a:1")
    assert [answer[0]["content"] for answer in found.answers] == ["b", "d", "c", "a"] and found.ranks == [0, 0, 1, 2]
    for ranks in ([1, 1], [0], [0, 1, 2], "01", [0, True], [0, float("nan")], 3):
        with pytest.raises(InputError, match="a:1: ranks is .*; wanted 2 numbers, one an answer"):
            preference_of({"prompt": "Hi", "answers": ["a", "b"], "ranks": ranks}, "a:1")


@pytest.mark.parametrize("share", [True, False])
def test_a_row_of_answers_holds_a_shared_prompt_once_and_every_path_is_prompt_and_answer(share):
    prompts = [
        ranked([1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4, 6], given=2, ranks=[0, 0, 1]),
        ranked([7, 8], [7, 9], given=1),
        ranked([*range(20)], [*range(1, 20)], given=1),
    ]
    prompts[1].answers[0] = ([7, 8, 0], [0, 1, 0])  # what follows the end of an answer is none of it
    rows = AnswerTrees(prompts, length=12, seed=0, share=share)
    assert (rows.num_rows, rows.too_long, rows.num_answers) == (2, 1, 3)
    assert [rows.size(p) for p in rows.prompts] == ([(8, 12), (3, 4)] if share else [(12, 12), (4, 4)])
    batch = next(rows.in_order(3))
    assert ("until_BL" in batch) == share and batch["mask_BS"].tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert batch["rank_BS"][:2].tolist() == [[0, 0, 1], [0, 1, 0]]
    mask = tree(jnp.asarray(batch["until_BL"])) if share else causal(jnp.asarray(batch["segments_BL"]))
    seen_BLM = np.asarray(dense_mask(mask, 12))
    for row, prompt in enumerate(rows.prompts):
        for (ids, weights), end in zip(prompt.answers, batch["ends_BS"][row]):
            path = np.flatnonzero(seen_BLM[row, end])
            wanted = ids[: max(i for i, w in enumerate(weights) if w) + 1]
            assert batch["inputs_BL"][row, path].tolist() == wanted
            assert batch["positions_BL"][row, path].tolist() == [*range(len(wanted))]
    assert [x.tolist() for x in rows.best(1)] in ([[1, 2, 3, 4], [1, 2, 5]], [[7, 8]])
    whole, part = rows.batch(1, 3), rows.batch(2, 1)
    assert all(np.array_equal(whole[name][1:2], part[name]) for name in whole), "resumable by rows"
