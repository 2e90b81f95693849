"""Published laws give their published numbers; optima are optima; recipes say what their papers say."""

import dataclasses

import numpy as np
import pytest

from gptjax.config.section import InputError
from gptjax.scaling.laws import HOFFMANN, KAPLAN_ND, MUENNIGHOFF, Chinchilla, OverTraining
from gptjax.scaling.recipes import BATCH_RULES, batch_rule, critical_batch

OVERTRAINING = OverTraining(1.8366, 166.2, 366.7, -0.2729)


@pytest.mark.parametrize(
    ("sizes", "published"), [((6.34e9, 242e9, 25e9), 2.2256440889984477), ((8.67e9, 178e9, 25e9), 2.2269634075087867)]
)
def test_the_data_constrained_law_gives_the_losses_of_its_released_code(sizes, published):
    assert float(MUENNIGHOFF.loss(*sizes)) == pytest.approx(published, rel=1e-14)


def test_the_best_epochs_for_scarce_data_are_those_of_the_released_code():
    N, D = MUENNIGHOFF.optimal(6 * 8.67e9 * 178e9, U=25e9)
    assert (N, D) == (pytest.approx(6.8e9, rel=0.01), pytest.approx(227e9, rel=0.01))


def test_one_epoch_of_unique_tokens_is_chinchillas_law_up_to_the_optimal_size():
    N, D = Chinchilla.optimal(MUENNIGHOFF, 1e21)
    assert MUENNIGHOFF.loss(N / 2, D, D) == pytest.approx(Chinchilla.loss(MUENNIGHOFF, N / 2, D), rel=1e-12)
    assert MUENNIGHOFF.loss(N, 4 * D, D) > MUENNIGHOFF.loss(N, 4 * D, 4 * D)


def test_unique_tokens_that_a_run_does_not_come_to_change_nothing():
    assert MUENNIGHOFF.loss(1e9, 1e9, 2e9) == MUENNIGHOFF.loss(1e9, 1e9, 1e9) == MUENNIGHOFF.loss(1e9, 1e9)
    assert MUENNIGHOFF.optimal(1e21, U=1e12) == MUENNIGHOFF.optimal(1e21) == Chinchilla.optimal(MUENNIGHOFF, 1e21)


@pytest.mark.parametrize("law", [HOFFMANN, OVERTRAINING, KAPLAN_ND, MUENNIGHOFF])
def test_no_other_size_of_a_budget_has_less_loss_than_the_optimum(law):
    N, D = law.optimal(1e21)
    assert 6 * N * D == pytest.approx(1e21)
    for factor in (0.97, 1.03):
        assert law.loss(N * factor, D / factor) > law.loss(N, D)


def test_no_other_size_of_a_budget_makes_more_of_scarce_tokens():
    flops, law = np.array([1e20, 1e21, 1e22]), dataclasses.replace(MUENNIGHOFF, R_D=np.array([[5.0], [15.0]]))
    N, D = law.optimal(flops, U=2e9)
    assert N.shape == (2, 3) and np.all(D > 2e9)
    np.testing.assert_allclose(6 * N * D, np.tile(flops, (2, 1)))
    for factor in (0.97, 1.03):
        assert np.all(law.loss(N * factor, D / factor, 2e9) > law.loss(N, D, 2e9))
    assert law.optimal(1e21, U=2e9)[1][1, 0] == D[1, 1]


def test_the_exponents_are_how_the_optimum_grows():
    (small, _), (large, _) = HOFFMANN.optimal(1e20), HOFFMANN.optimal(1e22)
    assert np.log10(large / small) / 2 == pytest.approx(HOFFMANN.exponents[0])
    assert HOFFMANN.exponents[1] == pytest.approx(0.548387, abs=1e-6)


def test_one_law_with_arrays_of_coefficients_is_many_laws():
    A = np.array([300.0, 400.0])
    many = Chinchilla(1.7, A[:, None], 400.0, 0.34, 0.28).loss([1e8, 1e9, 1e10], 1e11)
    assert many.shape == (2, 3)
    assert many[1, 2] == Chinchilla(1.7, 400.0, 400.0, 0.34, 0.28).loss(1e10, 1e11)


def test_the_over_training_law_says_the_same_in_compute_and_multiplier():
    law = OVERTRAINING
    N, M = 1.4e9, 640.0
    C, eta = 6 * N * N * M, -law.e / 2  # equation 4
    published = law.E + (law.a * 6**eta * M**eta + law.b * M**-eta) * C**-eta
    assert law.loss(N, M * N) == pytest.approx(published)


def test_kaplans_joint_law_becomes_its_power_law_of_parameters_with_endless_data():
    law = KAPLAN_ND
    assert law.loss(1e9, 1e30) == pytest.approx((law.N_c / 1e9) ** law.alpha_N, rel=1e-6)
    assert law.loss(1e9, 1e10) > law.loss(1e9, 1e11) > law.loss(1e10, 1e11)


def test_recipes_give_what_their_papers_do():
    deepseek = batch_rule("deepseek", 1e8, 2e9)
    assert deepseek["batch_tokens"] == pytest.approx(0.2920 * (6 * 1e8 * 2e9) ** 0.3271)
    # The paper's 7B model on 2T tokens: a batch of 2,304 rows of 4,096 (9.4M tokens) and a rate of 4.2e-4.
    seven = batch_rule("deepseek", 6.5e9, 2e12)
    assert seven["batch_tokens"] == pytest.approx(9.4e6, rel=0.2)
    assert seven["learning_rate"] == pytest.approx(4.2e-4, rel=0.2)
    step = batch_rule("steplaw", 1e9, 1e11)
    assert step["learning_rate"] == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    assert step["batch_tokens"] == pytest.approx(0.58 * 1e11**0.571)
    assert critical_batch(3.0) == pytest.approx(1.07e6, rel=0.01)
    assert all("arXiv" in r.source for r in BATCH_RULES.values())


@pytest.mark.parametrize(("name", "N"), [("chinchilla", 1e8), ("deepseek", -1.0), ("kaplan", 2e10)])
def test_a_recipe_that_cannot_be_had_is_one_line(name, N):
    with pytest.raises(InputError) as refusal:
        batch_rule(name, N, 1e9)
    assert "wanted" in str(refusal.value) and "\n" not in str(refusal.value)
