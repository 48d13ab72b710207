import math

import numpy as np
import pytest

from onerec_hf.evaluation import bootstrap_interval, coverage_change, relative_change, resampled_means


def test_interval_has_the_normal_width_and_is_seeded():
    values = np.random.default_rng(1).normal(size=2000)
    low, high = bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(2000), rel=0.15)
    assert (low, high) == bootstrap_interval(values)
    assert bootstrap_interval(np.r_[values, np.nan])[0] == pytest.approx(low, abs=0.01)


def test_arrays_of_the_same_users_share_the_draws():
    values = np.random.default_rng(0).normal(size=(50, 2))
    draws = resampled_means(values, resamples=7)
    np.testing.assert_allclose(draws[:, 0] - draws[:, 1], resampled_means(values[:, 0] - values[:, 1], resamples=7))
    assert draws.std(axis=0).min() > 0


def test_many_users_are_drawn_in_pieces_with_the_same_result(monkeypatch):
    values = np.random.default_rng(0).normal(size=40)
    whole = resampled_means(values, resamples=9)
    monkeypatch.setattr("onerec_hf.evaluation.bootstrap._DRAWS_AT_ONCE", 80)
    np.testing.assert_allclose(resampled_means(values, resamples=9), whole, rtol=1e-12)


def test_a_change_common_to_all_users_is_certain_although_the_users_differ():
    before = np.random.default_rng(0).uniform(1, 100, size=300)
    change, (low, high) = relative_change(before, 1.05 * before)
    assert change == pytest.approx(0.05) and low == pytest.approx(0.05) and high == pytest.approx(0.05)
    change, (low, high) = relative_change(before, before + np.random.default_rng(1).normal(0, 30, size=300))
    assert low < change < high and high - low > 0.05
    assert math.isnan(relative_change(np.zeros(3), np.ones(3))[0])
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        relative_change(np.ones(3), np.ones(2))


def test_coverage_change():
    before = np.arange(40).reshape(20, 2)
    change, (low, high) = coverage_change(before, np.where(before < 20, before, -1))
    assert change == pytest.approx(-0.5) and low < -0.5 < high
    assert coverage_change(before, before) == (0.0, (0.0, 0.0))
    # Resamples miss a third of the items that only one user's list holds, and none of those that all lists hold.
    change, (low, high) = coverage_change(np.zeros((20, 2), dtype=int), before)
    assert change == pytest.approx(39) and low < 39 < high
    with pytest.raises(ValueError, match="nothing was ranked"):
        coverage_change(np.full((2, 2), -1), before[:2])
