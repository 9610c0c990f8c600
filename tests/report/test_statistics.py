"""Held to SciPy and statsmodels, and to what chance does when nothing is better."""

import random

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests

from cakd_cli.report import statistics

DRAWS = [np.random.default_rng(seed) for seed in range(20)]


@pytest.mark.parametrize("draw", DRAWS, ids=range(20))
def test_interval(draw):
    # On a grid, so that sums are exact and ties are ties.
    values = (draw.normal(0.3, 1, size=draw.integers(3, 12)) * 64).round() / 64
    theirs = stats.bootstrap((values,), np.mean, n_resamples=500, method="BCa", rng=draw)

    ours = statistics.bca_of_resamples(values.tolist(), theirs.bootstrap_distribution.tolist())

    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=1e-9)


def test_interval_of_all_resamples_is_what_many_draws_tend_to():
    values = [0.4, 1.2, -0.3, 0.8, 0.5, 2.0]
    theirs = stats.bootstrap((values,), np.mean, n_resamples=50_000, method="BCa", rng=0).confidence_interval

    assert statistics.bca_interval(values) == pytest.approx(tuple(theirs), abs=0.02)
    assert statistics.bca_interval(values * 2) == statistics.bca_interval(values * 2)


def test_interval_of_equal_values():
    assert statistics.bca_interval([0.25] * 5) == (0.25, 0.25)
    assert statistics.bca_interval([0.25]) == (0.25, 0.25)


@pytest.mark.parametrize("draw", DRAWS, ids=range(20))
def test_sign_flip(draw):
    values = draw.normal(0.5, 1, size=draw.integers(2, 10))
    theirs = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)

    assert statistics.sign_flip(values.tolist()) == pytest.approx(theirs.pvalue, abs=1e-9)


def test_sign_flip_of_many_pairs():
    draw = random.Random(0)
    values = [draw.gauss(0.4, 1) for _ in range(17)]
    exact = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue

    assert statistics.sign_flip(values) == pytest.approx(exact, abs=0.01)


def test_sign_flip_of_nothing_but_zeros():
    assert statistics.sign_flip([0.0, 0.0, 0.0]) == 1


@pytest.mark.parametrize("draw", DRAWS, ids=range(20))
def test_holm(draw):
    p_values = draw.uniform(0, 0.2, size=draw.integers(1, 9))

    assert statistics.holm(p_values.tolist()) == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-12)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (3, 3), (10, 20), (400, 470), (900, 1000)])
def test_mcnemar(first, second):
    theirs = their_mcnemar([[10, first], [second, 10]], exact=True).pvalue if first + second else 1.0

    assert statistics.mcnemar(first, second) == pytest.approx(theirs, rel=1e-9)


def test_seeds_that_are_needed():
    assert [statistics.pairs_needed(comparisons) for comparisons in (1, 2, 3, 7)] == [6, 7, 7, 9]
    for comparisons in (1, 2, 5):
        needed = statistics.pairs_needed(comparisons)
        gains = [1.0 + i for i in range(needed)]
        corrected = statistics.holm([statistics.sign_flip(gains)] * comparisons)[0]
        assert statistics.verdict(gains, corrected, comparisons=comparisons) == "better"
        assert statistics.verdict([-gain for gain in gains], corrected, comparisons=comparisons) == "worse"
        fewer = gains[:-1]
        corrected = statistics.holm([statistics.sign_flip(fewer)] * comparisons)[0]
        assert statistics.verdict(fewer, corrected, comparisons=comparisons) == (
            f"inconclusive: {needed} seeds in common are needed"
        )


def test_nothing_is_called_better_where_nothing_is():
    """1,000 sweeps of five equal methods: in at most one of twenty is any called better or worse."""
    draw = random.Random(1)
    wrong = 0
    for _ in range(1000):
        baseline = [draw.gauss(0, 1) for _ in range(8)]
        pairs = [[draw.gauss(0, 1) - value for value in baseline] for _ in range(5)]
        corrected = statistics.holm([statistics.sign_flip(found) for found in pairs])
        verdicts = [statistics.verdict(f, p, comparisons=5) for f, p in zip(pairs, corrected, strict=True)]
        wrong += any(verdict in ("better", "worse") for verdict in verdicts)

    assert wrong <= 50
