"""Golden numbers and laws of the alignment objectives: each formula against numbers computed by hand or published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.align import advantages, objectives, rewards
from gptjax.align.estimators import GROUP_ESTIMATORS, ActorCritic, GroupEstimator, aggregate

close = np.testing.assert_allclose


def test_gae_of_a_row_worked_out_by_hand():
    reward, value = jnp.array([[0.1, -0.2, 0, 1]]), jnp.array([[0.5, 0.4, 0.3, 0.2]])
    advantage, returns = advantages.gae(reward, value, jnp.ones((1, 4)))
    close(advantage, [[0.31065, 0.327, 0.66, 0.8]], rtol=1e-6)
    close(returns, [[0.81065, 0.727, 0.96, 1.0]], rtol=1e-6)


def gae_of_list(reward, value, gamma, lam):
    """GAE of a row without gaps, by its definition as a sum: A_t = sum over l of (gamma lam)^l delta_(t + l)."""
    following = np.append(value[1:], 0)
    delta = reward + gamma * following - value
    return np.array([sum((gamma * lam) ** i * d for i, d in enumerate(delta[t:])) for t in range(len(delta))])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_skips_gaps_in_the_mask_as_if_they_were_not_there(gamma):
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(4, 10)), rng.normal(size=(4, 10))
    mask = np.array([[1] * 5 + [0] * 5, [1] * 10, [1, 1, 0, 0, 1, 1, 0, 1, 0, 0], [0] * 10])
    got, returns = advantages.gae(*map(jnp.asarray, (reward, value, mask)), gamma, 0.7)
    for row in range(4):
        here = mask[row] == 1
        want = gae_of_list(reward[row][here], value[row][here], gamma, 0.7)
        close(got[row][here], want, rtol=1e-5, atol=1e-6)
        close(returns[row][here], want + value[row][here], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got[row][~here], 0)
        np.testing.assert_array_equal(returns[row][~here], 0)


def test_masked_means_and_variances_are_those_that_tunix_and_trl_publish():
    one, here = jnp.arange(1.0, 6), jnp.array([1.0, 1, 0, 0, 1])
    both, mask = jnp.arange(1.0, 11).reshape(2, 5), jnp.stack([here, jnp.ones(5)])
    close([advantages.masked_mean(one, here), advantages.masked_mean(both, mask)], [2.666667, 6.0], rtol=1e-6)
    close(advantages.masked_mean(both, mask, 1), [2.666667, 8.0], rtol=1e-6)
    close([advantages.masked_var(one, here), advantages.masked_var(both, mask)], [4.333333, 10.285715], rtol=1e-6)
    four, middle = jnp.array([1.0, 2, 3, 4]), jnp.array([0.0, 1, 1, 0])
    assert advantages.masked_mean(four, middle) == 2.5 and advantages.masked_var(four, middle) == 0.5
    close(advantages.whiten(four, middle), [0, -(0.5**0.5), 0.5**0.5, 0], rtol=1e-6)
    close(advantages.whiten(four, middle, shift_mean=False), [0, 2.5 - 0.5**0.5, 2.5 + 0.5**0.5, 0], rtol=1e-6)


def test_baselines_of_groups():
    reward = jnp.array([[1.0, 2, 3], [4, 5, 9]])
    close(advantages.leave_one_out(reward), [[-1.5, 0, 1.5], [-3, -1.5, 4.5]])
    close(advantages.leave_one_out(jnp.arange(1.0, 7).reshape(2, 3)), [[-1.5, 0, 1.5]] * 2)  # as Tunix publishes
    close(advantages.group_mean(reward), [[-1, 0, 1], [-2, -1, 3]])
    close(advantages.group_mean(reward), advantages.leave_one_out(reward) * 2 / 3, rtol=1e-6)
    close(advantages.z_score(reward), [[-1, 0, 1], np.array([-2, -1, 3]) / 7**0.5], rtol=2e-4, atol=1e-6)
    np.testing.assert_array_equal(advantages.z_score(jnp.full((1, 4), 0.7)), 0)


def test_the_pairwise_loss_of_four_ranked_answers():
    score, rank = jnp.array([[1.2, 0.3, -0.5, 0.9]]), jnp.array([[0, 2, 3, 1]])  # 0 > 3 > 1 > 2
    loss, pairs = objectives.pairwise(score, rank, jnp.ones((1, 4)))
    close(loss, [0.34871686], rtol=1e-6)
    assert pairs == 6
    # An answer that is not there changes nothing, nor do others' order in the array; equal ranks make no pair.
    padded = jnp.array([[9.0, 0.9, 1.2, -0.5, 0.3]]), jnp.array([[0, 1, 0, 3, 2]])
    close(objectives.pairwise(*padded, jnp.array([[0.0, 1, 1, 1, 1]]))[0], loss, rtol=1e-6)
    two = objectives.pairwise(jnp.array([[2.0, 2.0, 1.0]]), jnp.array([[0, 0, 1]]), jnp.ones((1, 3)))
    close(two[0], np.log1p(np.exp(-1.0)), rtol=1e-6)
    assert objectives.pairwise(score, jnp.zeros((1, 4)), jnp.ones((1, 4)))[0] == 0


def test_dpo_and_ipo_of_a_pair():
    margin = jnp.array([(-10 - -11) - (-12 - -11.5)])
    close(objectives.dpo_loss(margin, 0.1), [0.62095705], rtol=1e-6)
    close(objectives.ipo_loss(margin, 0.1), [12.25], rtol=1e-6)
    assert objectives.ipo_loss(jnp.array([5.0]), 0.1) == 0


def test_clipping_bounds_the_gain_and_not_the_loss():
    ratio = jnp.array([0.5, 1.0, 1.1, 1.5, 0.5, 1.5])
    sign = jnp.array([1.0, 1, 1, 1, -1, -1])
    close(objectives.clipped(jnp.log(ratio), sign, 0.2), [-0.5, -1, -1.1, -1.2, 0.8, 1.5], rtol=1e-6)
    close(objectives.clipped(jnp.log(ratio), sign, 0.2, 0.3), [-0.5, -1, -1.1, -1.3, 0.8, 1.5], rtol=1e-6)
    value, old, target = jnp.array([1.0, 1.0, 0.1]), jnp.array([0.0, 0.0, 0.0]), jnp.array([2.0, 0.0, 1.0])
    close(objectives.clipped_value(value, old, target, 0.2), [0.5 * 1.8**2, 0.5, 0.5 * 0.9**2], rtol=1e-6)


def test_kl_estimates_are_those_that_tunix_publishes():
    k1 = [0.38486493, 0.7469206, -0.4474684, -0.13095665]
    k2, k3 = [0.07406051, 0.27894518, 0.10011399, 0.00857482], [0.0654075, 0.220744, 0.1168784, 0.0089617]
    for kind, want in {"k1": k1, "k2": k2, "k3": k3, "k3+": k3}.items():
        close(objectives.kl_estimate(jnp.array(k1), kind), want, rtol=1e-5)  # pyright: ignore


def test_expected_gradients_of_kl_estimates_are_those_of_the_kl_that_the_docstring_names():
    logits, ref = jnp.array([0.3, -0.2, 1.0]), jnp.log(jnp.array([0.2, 0.5, 0.3]))

    def expected(kind):
        def loss(logits):
            log_p = jax.nn.log_softmax(logits)
            return (jax.lax.stop_gradient(jnp.exp(log_p)) * objectives.kl_estimate(log_p - ref, kind)).sum()

        return jax.grad(loss)(logits)

    def kl(logits):  # of pi to ref
        log_p = jax.nn.log_softmax(logits)
        return (jnp.exp(log_p) * (log_p - ref)).sum()

    reverse = lambda logits: (jnp.exp(ref) * (ref - jax.nn.log_softmax(logits))).sum()  # noqa: E731
    close(expected("k1"), 0, atol=1e-7)
    close(expected("k2"), jax.grad(kl)(logits), atol=1e-6)
    close(expected("k3+"), jax.grad(kl)(logits), atol=1e-6)
    close(expected("k3"), jax.grad(reverse)(logits), atol=1e-6)
    assert not np.allclose(expected("k2"), expected("k3"), atol=1e-2)


def test_rewards_of_tokens_hold_the_kl_and_the_score_at_the_last_real_token():
    mask = jnp.array([[1.0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    ratio, score = jnp.array([[0.5, -1, 0.25, 7]] * 3), jnp.array([2.0, 3.0, 4.0])
    token = rewards.token_rewards(score, ratio, mask, 0.1)
    close(token, [[-0.05, 0.1, 1.975, 0], [0, 0.1, 0, 2.3], [0, 0, 0, 0]], rtol=1e-5, atol=1e-7)
    close(rewards.penalised_scores(score, ratio, mask, 0.1), token.sum(1), rtol=1e-6)
    ended = jnp.array([True, False, True])
    np.testing.assert_array_equal(rewards.end_of_text_rule(score, ended), [2, -1, 4])
    assert rewards.adapted_beta(0.1, 12.0, 6.0, 100) == pytest.approx(0.1 * (1 + 0.2 * 0.01))
    assert rewards.adapted_beta(0.1, 5.7, 6.0, 100) == pytest.approx(0.1 * (1 - 0.05 * 0.01))
    assert rewards.adapted_beta(0.1, 6.0, 6.0, 100) == 0.1


def test_aggregations_differ_in_how_they_weigh_long_answers():
    loss, mask = jnp.array([[-1.5, -1.5, -1.5], [-3, 9, 9], [9, 9, 9]]), jnp.array([[1.0, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert aggregate(loss, mask, "row_mean") == (-2.25, 2)  # as Tunix publishes for one answer of 3 tokens and one of 1
    assert aggregate(loss, mask, "row_sum") == (-3.75, 2)
    assert aggregate(loss, mask, "token") == (-1.875, 4)


def test_advantages_of_an_answer_stand_at_its_tokens_alone():
    mask = jnp.array([[1.0, 1], [1, 0], [1, 1], [0, 1]])
    score, ratio = jnp.array([1.0, 2.0, 3.0, 5.0]), jnp.full((4, 2), 0.5)
    got = GROUP_ESTIMATORS["rloo"].advantages(score, ratio, mask, 2, beta=0.2)
    close(got, [[-1.1, -1.1], [1.1, 0], [-2.1, -2.1], [0, 2.1]], rtol=1e-5)
    got = GroupEstimator(kl="k2").advantages(score, ratio, mask, 2, beta=0.2)
    close(got, [[-1, -1], [1, 0], [-2, -2], [0, 2]])


def test_whitened_advantages_of_ppo_have_mean_0_and_variance_1_and_returns_are_not_whitened():
    rng = np.random.default_rng(1)
    mask = jnp.asarray(rng.random((8, 5)) < 0.7, jnp.float32)
    ratio, value = (jnp.asarray(rng.normal(size=(8, 5)), jnp.float32) for _ in range(2))
    score = jnp.asarray(rng.normal(size=8), jnp.float32)
    advantage, returns = ActorCritic().advantages(score, ratio, value, mask, 0.1)
    close([advantages.masked_mean(advantage, mask), advantages.masked_var(advantage, mask)], [0, 1], atol=1e-5)
    plain, same = ActorCritic(whiten_advantages=False).advantages(score, ratio, value, mask, 0.1)
    close(returns, same)
    close(advantages.explained_variance(returns, returns, mask), 1)
    assert advantages.explained_variance(jnp.zeros_like(returns), returns, mask) == 0
