"""The statistics against published examples, brute force and simulation."""

import doctest
from itertools import combinations
from math import comb

import numpy as np
import pytest

from slm.runs import stats


def pairs(both, only_a, only_b, neither):
    """Two lists of right/wrong with this table."""
    return ([1] * (both + only_a) + [0] * (only_b + neither),
            [1] * both + [0] * only_a + [1] * only_b + [0] * neither)


def test_the_worked_examples_in_the_docstrings_hold():
    assert doctest.testmod(stats).failed == 0


@pytest.mark.parametrize("k, n, low, high", [
    (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718)])
def test_wilson_gives_the_published_intervals(k, n, low, high):
    assert stats.wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_are_the_roots_of_the_score_test_and_stay_in_0_1():
    for n in (1, 7, 50):
        for k in range(n + 1):
            low, high = stats.wilson(k, n)
            assert 0 <= low <= k / n <= high <= 1
            for end in {low, high} - {0.0, 1.0}:
                assert abs(k / n - end) / (end * (1 - end) / n) ** 0.5 == pytest.approx(1.959964, abs=1e-5)
    assert stats.wilson(0, 0) == (0.0, 1.0)


def test_wilson_covers_95_percent():
    for n in (30, 500):
        k = np.arange(n + 1)
        ends = np.array([stats.wilson(int(i), n) for i in k])
        coverage = []
        for p in np.linspace(0.05, 0.95, 91):
            mass = np.array([comb(n, int(i)) * p ** i * (1 - p) ** (n - i) for i in k.tolist()])
            coverage.append(mass[(ends[:, 0] <= p) & (p <= ends[:, 1])].sum())
        assert np.mean(coverage) == pytest.approx(0.95, abs=0.01) and min(coverage) > 0.91


def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample():
    for n in range(1, 9):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                exact = np.mean([any(s) for s in combinations(samples, k)])
                assert stats.pass_at_k(n, c, k) == pytest.approx(exact)
    with pytest.raises(ValueError, match="n=2, c=1, k=3"):
        stats.pass_at_k(2, 1, 3)


def test_pass_at_k_is_unbiased_however_many_samples_are_drawn():
    rng = np.random.default_rng(0)
    p, k = 0.3, 4
    for n in (4, 8, 32):
        draws = [stats.pass_at_k(n, int(c), k) for c in rng.binomial(n, p, 20_000)]
        assert np.mean(draws) == pytest.approx(1 - (1 - p) ** k, abs=0.008)


@pytest.mark.parametrize("table, expected", [
    ((20, 12, 2, 16), (0.2, 0.0562, 0.3292)),       # Newcombe 1998, 2635-2650, method 10
    ((1, 1, 7, 12), (-0.2857, -0.5069, -0.0256))])  # Bentur 2009, in Fagerland et al. 2017, chapter 8
def test_the_paired_interval_gives_the_published_examples(table, expected):
    first, second = pairs(*table)
    assert stats.paired(second, first) == pytest.approx(expected, abs=2e-4)
    d, low, high = stats.paired(first, second)  # the other way round: mirrored
    assert (d, low, high) == pytest.approx((-expected[0], -expected[2], -expected[1]), abs=2e-4)


def test_the_paired_interval_covers_95_percent_and_uses_the_pairing():
    rng = np.random.default_rng(1)
    for cells in ((0.4, 0.05, 0.1, 0.45), (0.05, 0.02, 0.02, 0.91), (0.6, 0.1, 0.1, 0.2)):
        for n in (40, 500):
            truth = cells[2] - cells[1]
            inside = []
            for table in rng.multinomial(n, cells, 1500):
                _, low, high = stats.paired(*pairs(*table.tolist()))
                inside.append(low <= truth <= high)
            assert np.mean(inside) >= 0.935 and (n < 100 or np.mean(inside) <= 0.985)
    together, apart = stats.paired(*pairs(250, 5, 10, 235)), stats.paired(*pairs(130, 125, 130, 115))
    assert together[2] - together[1] < (apart[2] - apart[1]) / 3


def test_identical_runs_differ_by_zero_within_a_finite_interval():
    assert stats.paired([1] * 9, [1] * 9)[0] == 0
    assert stats.paired([1] * 9, [1] * 9)[1] < 0 < stats.paired([1] * 9, [1] * 9)[2]
    with pytest.raises(ValueError):
        stats.paired([1], [1, 0])


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs():
    for b, c in ((0, 0), (0, 5), (3, 9), (29, 29), (33, 62), (41, 71)):
        weights = [comb(b + c, i) / 2 ** (b + c) for i in range(b + c + 1)]
        exact = sum(w for w in weights if w <= weights[b] * (1 + 1e-9))  # everything at least as rare
        assert stats.mcnemar(*pairs(3, b, c, 4)) == pytest.approx(exact)
    assert stats.mcnemar(*pairs(1, 33, 62, 1)) == pytest.approx(0.004, abs=5e-4)


def test_the_bootstrap_over_problems_covers_95_percent_for_several_samples():
    rng = np.random.default_rng(2)
    inside = []
    for _ in range(400):
        skill = rng.beta(0.6, 0.9, size=120)  # problems differ, samples of one are alike
        values = rng.binomial(8, skill) / 8
        low, high = stats.bootstrap(values.tolist(), rounds=1000)
        inside.append(low <= 0.6 / 1.5 <= high)
    assert 0.92 <= np.mean(inside) <= 0.98


def test_the_intervals_of_pass_at_4_and_of_a_difference_of_means_cover_95_percent():
    rng = np.random.default_rng(3)
    start = np.arange(120) / 119
    inside = {"pass@4": [], "difference": []}
    for _ in range(300):
        skill = rng.beta(0.6, 0.9, size=(2, 120))  # drawn anew: problems of one kind
        skill[1] = (skill[0] + 0.2 * start) / 1.2  # better by 0.2 * (start - skill) / 1.2
        right = rng.binomial(4, skill)
        passed = [stats.pass_at_k(4, int(c), 4) for c in right[0]]
        _, low, high = stats.estimate(passed)
        inside["pass@4"].append(low <= PASS_AT_4 <= high)
        d, low, high = stats.difference((right[0] / 4).tolist(), (right[1] / 4).tolist())
        assert d == pytest.approx((right[1] - right[0]).mean() / 4)
        inside["difference"].append(low <= 0.2 * (0.5 - 0.4) / 1.2 <= high)
    for covered in inside.values():
        assert 0.91 <= np.mean(covered) <= 0.985


# 1 - E[(1 - p)^4] for p of Beta(0.6, 0.9): rising factorials of 0.9 over those of 1.5
PASS_AT_4 = 1 - np.prod([(0.9 + i) / (1.5 + i) for i in range(4)])


@pytest.mark.parametrize("p, text", [
    (0.0, "< 0.001"), (0.00099, "< 0.001"), (0.001, "0.001"), (1.0, "1.000")])
def test_a_p_value_is_never_printed_as_zero(p, text):
    assert stats.p_value(p) == text


def test_the_bootstrap_is_reproducible_and_close_to_wilson_for_one_sample():
    values = [1.0] * 120 + [0.0] * 380
    assert stats.bootstrap(values) == stats.bootstrap(values)
    assert stats.bootstrap(values) == pytest.approx(stats.wilson(120, 500), abs=0.005)
    assert stats.bootstrap([1.0, 1.0]) == (1.0, 1.0) and stats.bootstrap([]) == (0.0, 1.0)
