"""Every law that can be fitted is found again, has intervals, and is what the report and the predictions say."""

import csv
import json
import re
import typing

import numpy as np
import pytest
from commands import refused

from gptjax.cli import main
from gptjax.config.scaling import FitConfig
from gptjax.config.section import InputError
from gptjax.scaling.families import DATA_CONSTRAINED, FAMILIES, POWER
from gptjax.scaling.fits import KINDS, fit_law
from gptjax.scaling.laws import KAPLAN_ND, MUENNIGHOFF
from gptjax.scaling.table import read_table

LAWS = {"kaplan": KAPLAN_ND, "data_constrained": MUENNIGHOFF}


def runs(epochs=(1, 4, 16)):
    """N, D and U of 5 sizes at each of 3 budgets, each with new tokens and with repeated ones."""
    flops = np.repeat(np.geomspace(1e18, 1e20, 3), 5)
    N = MUENNIGHOFF.optimal(flops)[0] * np.tile(np.geomspace(0.2, 5, 5), 3)
    N, D, E = (np.ravel(x) for x in np.broadcast_arrays(N, flops / 6 / N, np.array(epochs, float)[:, None]))
    return N, D, D / E


def of(name, noise=0.0, seed=0):
    """The inputs of a family and losses of the published law."""
    inputs = runs()[: len(FAMILIES[name].inputs)]
    return *inputs, LAWS[name].loss(*inputs) * np.exp(noise * np.random.default_rng(seed).normal(size=len(inputs[0])))


@pytest.fixture(scope="module", params=LAWS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def noisy(name):
    return fit_law(FAMILIES[name], *of(name, 0.003), bootstraps=60)


def test_what_is_offered_can_be_fitted_and_read_again():
    assert typing.get_args(typing.get_type_hints(FitConfig)["law"]) == tuple(FAMILIES)
    for family in (*FAMILIES.values(), POWER):
        law = family.law(*family.starts[-1])
        assert type(law) is KINDS[type(law).__name__]


@pytest.mark.parametrize("family", [*FAMILIES.values(), POWER], ids=[*FAMILIES, "power"])
def test_what_descends_is_the_law_itself(family):
    inputs = runs()[: len(family.inputs)]
    problem = family.problem(*inputs, np.ones_like(inputs[0]), delta=1e-3)
    some = family.starts[:: max(1, len(family.starts) // 9)]
    some = some[np.isfinite(problem.predict(some)).all(axis=1)]
    assert len(some) > 5
    for theta, losses in zip(some, problem.predict(some)):
        np.testing.assert_allclose(losses, family.law(*theta).loss(*inputs), rtol=1e-9)


def test_the_fit_finds_the_published_law_that_made_the_points(name):
    found = fit_law(FAMILIES[name], *of(name))
    for coefficient, value in found.coefficients.items():
        assert value == pytest.approx(getattr(LAWS[name], coefficient), rel=1e-3), coefficient
    assert found.gradient < 1e-7 and found.agreed > 20 and found.notes == ()


def test_intervals_hold_what_was_fitted(noisy):
    for coefficient, value in noisy.coefficients.items():
        low, high = noisy.interval(coefficient)
        assert low < value < high, coefficient
    assert noisy.unconverged == 0 and noisy.notes == ()


@pytest.mark.exhaustive
def test_intervals_hold_the_truth_about_as_often_as_they_say(name):
    held = []
    for seed in range(1000, 1060):
        fitted = fit_law(FAMILIES[name], *of(name, 0.003, seed), bootstraps=80, seed=seed)
        edges = {k: fitted.interval(k) for k in fitted.coefficients}
        held.append([low <= getattr(LAWS[name], k) <= high for k, (low, high) in edges.items()])
    assert np.mean(held, axis=0).min() > 0.8  # 0.95 give or take 0.03 would be right; few runs a coefficient hold less


def test_repeated_tokens_are_worth_less_by_a_fitted_law_too():
    law = fit_law(DATA_CONSTRAINED, *of("data_constrained", 0.003)).law
    assert law.loss(1e9, 2e10, 2e10) < law.loss(1e9, 2e10, 5e9) < law.loss(1e9, 2e10, 1e9) < law.loss(1e9, 1e9)


def test_a_coefficient_that_no_loss_depends_on_is_refused():
    """R_N, where every run has fewer parameters than its unique tokens are best for."""
    axes = np.geomspace(1e6, 1e8, 4), np.geomspace(1e11, 1e13, 3), [1.0, 2.0, 8.0]
    N, D, epochs = (np.ravel(x) for x in np.meshgrid(*axes))
    with pytest.raises(InputError, match="depends on R_N"):
        fit_law(DATA_CONSTRAINED, N, D, D / epochs, MUENNIGHOFF.loss(N, D, D / epochs))


def write(path, name, third="Unique Tokens", keep=slice(None), noise=0.003):
    *inputs, loss = of(name, noise)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*("N", "D", third)[: len(inputs)], "loss"])
        rows.writerows(np.stack([*inputs, loss], axis=1)[keep].tolist())
    return path


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    """What the verb wrote, by a table whose third column is found by its name."""
    folder = tmp_path_factory.mktemp(name)
    table = write(folder / "t.csv", name)
    assert main(["fit", str(table), "--law", name, "--out", str(folder / "fit"), "--bootstraps", "20"]) == 0
    return folder


def test_the_report_says_which_law_and_shows_what_it_reads(name, folder):
    document = json.loads((folder / "fit" / "fit.json").read_text())
    assert document["law"] == name and document["formula"] == FAMILIES[name].formula
    assert set(document["coefficients"]) == set(vars(LAWS[name]))
    for way in ("isoflop", "parametric"):
        assert document["approaches"][way]["exponents"]["N"] == pytest.approx(LAWS[name].exponents[0], abs=0.05)
    for best in document["approaches"]["isoflop"]["minima"]:  # of new tokens, or they would lie 1.6 % high
        assert best["N"]["loss"] == pytest.approx(LAWS[name].loss(*LAWS[name].optimal(best["budget"])), rel=0.01)
    page = (folder / "fit" / "report.html").read_text()
    assert f"{name} law of t.csv" in page and bool(re.search(" D +U +FLOPs", page)) == (name == "data_constrained")
    assert any("30 runs that repeat" in note for note in document["notes"]) == (name == "data_constrained")


def predicted(folder, *args):
    assert main(["predict", str(folder / "fit"), *args, "--json", str(folder / "p.json")]) == 0
    return json.loads((folder / "p.json").read_text())


def test_a_saved_fit_predicts_budgets_runs_and_tables(name, folder):
    law, N = LAWS[name], 4e8
    best = predicted(folder, "--flops", "5e19")
    assert best["parameters"] == pytest.approx(law.optimal(5e19)[0], rel=0.1)
    made = predicted(folder, "--parameters", str(N), "--tokens", "1e10")
    assert made["loss"] == pytest.approx(law.loss(N, 1e10), rel=0.01)
    assert made["loss_interval"][0] < made["loss"] < made["loss_interval"][1]
    table = predicted(folder, "--against", str(folder / "t.csv"))
    assert all(row["fitted"] and abs(row["error"]) < 0.02 for row in table["rows"])


def test_scarce_tokens_are_planned_for_by_the_data_constrained_law(name, folder, capsys):
    args = ["--flops", "5e19", "--unique-tokens", "1e9"]
    if name == "kaplan":
        line = refused(capsys, "predict", folder / "fit", *args)
        assert "every token is unique; leave it out, or fit --law data_constrained" in line
        return
    made = predicted(folder, *args)
    N, D = MUENNIGHOFF.optimal(5e19, U=1e9)
    assert made["parameters"] == pytest.approx(N, rel=0.1) and made["tokens"] == pytest.approx(D, rel=0.1)
    assert made["parameters"] < 0.9 * predicted(folder, "--flops", "5e19")["parameters"]
    assert made["tokens_interval"][0] < made["tokens"] < made["tokens_interval"][1] and made["unique_tokens"] == 1e9
    run = predicted(folder, "--parameters", "4e8", "--tokens", "1e10", "--unique-tokens", "5e8")
    assert run["loss"] == pytest.approx(MUENNIGHOFF.loss(4e8, 1e10, 5e8), rel=0.01)
    args = ["--parameters", "4e8", "--tokens", "1e10", "--unique-tokens", "1e5"]
    assert "1e+05 unique tokens are" in refused(capsys, "predict", folder / "fit", *args)


# The name of the third column, the runs that the table has, and what the one line must say.
BAD = {
    "no column": ("other", slice(None), ["no column of unique_tokens", "--columns unique_tokens=COLUMN"]),
    "all new": ("U", slice(15), ["none of 15 runs repeats its tokens (D > U)", "wanted runs of several epochs too"]),
    "all repeat": ("U", slice(15, None), ["0 runs of one epoch or less", "wanted at least 5"]),
    "few new": ("U", [0, 6, 12, *range(15, 45)], ["3 runs of one epoch or less", "wanted at least 5"]),
    "one budget of new": ("U", slice(10, None), ["of the 5 runs of one epoch or less, all 5 points have one budget"]),
    "few points": ("U", [0, 6, 13, 20, 30, 41], ["6 point(s) for the 7 parameters of data_constrained", "add runs"]),
}


@pytest.mark.parametrize("column, keep, words", BAD.values(), ids=BAD)
def test_a_table_that_can_not_tell_the_law_gets_one_clear_line(column, keep, words, tmp_path, capsys):
    table = write(tmp_path / "t.csv", "data_constrained", column, keep)
    args = ["--law", "data_constrained", "--out", str(tmp_path / "out"), "--bootstraps", "0"]
    err = refused(capsys, "fit", table, *args)
    assert err.startswith(f"gptjax: {table}") and all(word in err for word in words), err
    assert not (tmp_path / "out").exists()


def test_a_column_of_unique_tokens_goes_by_any_name(tmp_path):
    table = write(tmp_path / "t.csv", "data_constrained", "pool")
    read = read_table([table], columns=["unique_tokens=pool"], inputs=DATA_CONSTRAINED.inputs)
    np.testing.assert_allclose(read.unique_tokens, runs()[2])
    assert read.new.sum() == 15 and any("30 of 45 runs repeat their tokens, for 16 epochs" in n for n in read.notes)
    assert read_table([table], columns=["unique_tokens=pool"]).new.all()
