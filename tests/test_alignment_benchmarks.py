"""The parts of alignment's benchmarks that decide their numbers: the proxy, the gold's margins, paired gains, plots."""

import json
from pathlib import Path

import kl_frontier
import numpy as np
import pytest
import reward_gain
import reward_pairs

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_the_proxy_predicts_a_reward_that_letters_tell_and_is_judged_on_other_answers():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc.!\n"), 40)) for _ in range(300)]
    gold = np.array([text.count("!") / 40 for text in texts])
    found = kl_frontier.fit_proxy(texts, gold, 200)
    assert found["correlation"] > 0.7 and (found["labels"], found["answers"]) == (200, 100)
    assert np.corrcoef(kl_frontier.proxy([], texts), gold)[0, 1] > 0.7
    shuffled = kl_frontier.fit_proxy(texts, rng.permutation(gold), 200)
    assert abs(shuffled["correlation"]) < 0.4


def test_the_gold_of_answers_is_the_regression_of_the_pairs_benchmark():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((60, 2, 3, 11, 8)).astype(np.float32)
    x[:, 0, :, :, 0] += 1  # what people prefer
    whole = reward_pairs.by_states(x)(np.arange(40), np.arange(40, 60), reward_gain.GOLD)
    difference = np.moveaxis(x[:, 0] - x[:, 1], 0, 2)
    margins = reward_gain.gold_margins(difference[:, :, :40], difference[:, :, 40:])
    assert np.corrcoef(whole, margins)[0, 1] > 0.98  # scaled by 40 pairs, there by 60
    assert (margins > 0).mean() > 0.8
    np.testing.assert_allclose(reward_gain.gold_margins(difference[:, :, :40], -difference[:, :, 40:]), -margins)


def test_a_gain_is_that_of_pairs():
    found = reward_gain.gain(np.array([1.0, 3.0, 0.0, 0.0]))
    assert found == {"mean": 1.0, "paired_stderr": pytest.approx(0.5 * 2**0.5), "better": 0.75}


def test_the_report_of_the_frontier_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    (path,) = RESULTS.glob("*_kl_frontier.json")
    kl_frontier.plot(json.loads(path.read_text()), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"kl_frontier.svg", "overoptimisation.svg"}
