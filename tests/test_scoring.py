"""Laws of rewards: functions of the user called by name and checked, weights, the rule of the end of text, identity."""

import textwrap

import numpy as np
import pytest

from gptjax.align.scoring import Answer, Rewards
from gptjax.config import MeshConfig, RewardsConfig
from gptjax.config.plugins import register
from gptjax.config.section import InputError
from gptjax.tokenizer import BytesTokenizer

ANSWERS = [
    Answer({"prompt": "2 + 2", "solution": "4"}, "it is 4", True, [1, 2], "sums.jsonl:1"),
    Answer({"prompt": "2 + 3", "solution": "5", "level": 3}, "it is 6!", True, [1, 2], "sums.jsonl:2"),
    Answer({"prompt": "2 + 4", "solution": "6"}, "it is 6", False, [1, 2], "sums.jsonl:3"),
]


def solved(prompt, answer, solution):
    return solution in answer


def lengths(prompts, answers, **record):
    assert prompts == ["2 + 2", "2 + 3", "2 + 4"] and record["level"] == [None, 3, None]
    return np.array([len(answer) for answer in answers])


def opened(*sources, **more) -> Rewards:
    return Rewards(RewardsConfig(sources=sources, **more), MeshConfig(), BytesTokenizer())


def score(function, **more):
    return opened(register(function), **more)(ANSWERS)[0]


def test_a_function_gets_the_fields_that_it_names_and_a_batched_one_lists_of_them():
    assert score(solved, unfinished="scored").tolist() == [1, 0, 1]
    assert score(lengths, unfinished="scored").tolist() == [7, 8, 7]
    seen = []
    score(lambda answer, **rest: seen.append(rest) or 0.0)
    assert seen[1] == {"prompt": "2 + 3", "solution": "5", "level": 3, "ended": True}
    assert score(lambda answer, level=2: level).tolist() == [2, 3, -1]


def test_sources_are_added_with_their_weights_and_given_apart_and_a_cut_off_answer_has_a_fixed_reward():
    sources = f"right={register(solved)}", f"long={register(lengths)}"
    reward_B, by_source = opened(*sources, weights=(1, -0.5), fixed=-9)(ANSWERS)
    assert reward_B.tolist() == [-2.5, -4, -9] and reward_B.dtype == np.float32
    assert {name: x.tolist() for name, x in by_source.items()} == {
        "reward_right": [1, 0, 1], "reward_long": [7, 8, 7]
    }  # fmt: skip
    assert opened(*sources)(ANSWERS)[0].tolist() == [8, 8, -1]


def test_a_function_that_gives_no_number_or_fails_is_one_line():
    wrong = {
        "returned None for sums.jsonl:1, answer 'it is 4'; wanted a finite number": lambda answer: None,
        "returned nan for sums.jsonl:1": lambda answer: np.float32("nan"),
        "returned '1' for sums.jsonl:1": lambda answer: "1",
        "returned 2 numbers; wanted 3, one for each answer": lambda prompts, answers: [1.0, 2],
        "returned 3; wanted a list of 3 numbers": lambda prompts, answers: 3,
        "returned inf for sums.jsonl:3": lambda prompts, answers: [0, 0, float("inf")],
        "failed for sums.jsonl:2: ValueError: substring not found (": lambda answer: answer.index("4"),
        "takes (text); wanted reward(prompt, answer, **record) -> float": lambda text: 1.0,
        "wants 'gold', which sums.jsonl:1 does not have; it has prompt, solution": lambda answer, gold: 1.0,
    }
    for said, function in wrong.items():
        with pytest.raises(InputError) as e:
            score(function)
        assert said in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(InputError, match="x:1 has a field 'answer', which is what a reward gets of the answer"):
        opened(register(solved))([ANSWERS[0]._replace(record={"prompt": "a", "answer": "b"}, origin="x:1")])


def test_settings_of_rewards_that_can_not_be_are_refused():
    for sources, more in {
        ("a:b", "c:d"): {},
        ("x=a:b", "x=c:d"): {},
        ("x=",): {},
        ("a:b",): {"weights": (1, 2)},
        ("c:d",): {"weights": (0,)},
        ("d:e",): {"fixed": float("nan")},
    }.items():
        with pytest.raises(InputError, match="rewards.(sources|weights|fixed)="):
            RewardsConfig(sources=sources, **more)
    assert RewardsConfig(sources=("/a=b/c",)).by_name == {"": "/a=b/c"}
    for sources in ((), ("nowhere_at_all:f",), ("json:nope",), ("runs/none",)):
        with pytest.raises(InputError, match="rewards.sources"):
            opened(*sources)


def test_a_source_whose_content_changed_is_not_the_one_that_a_run_began_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = textwrap.dedent("""
        def one(answer): return 1
        def two(answer): return 2
    """)
    (tmp_path / "first_rewards.py").write_text(text)
    (tmp_path / "second_rewards.py").write_text(text)
    (tmp_path / "third_rewards.py").write_text(text + "\n")
    began = opened("first_rewards:one").marks
    opened("second_rewards:one").check(began)  # a file may be moved
    for other in ("first_rewards:two", "third_rewards:one", "x=first_rewards:one"):
        with pytest.raises(InputError, match="is not what this run began with"):
            opened(other).check(began)
    both = opened("a=first_rewards:one", "b=first_rewards:two")
    with pytest.raises(InputError, match="'b' is missing"):
        opened("a=first_rewards:one").check(both.marks)
