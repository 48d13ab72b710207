"""Judged sessions by user, sessions of rankings, and summaries with paired changes."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.evaluation import (
    PolicyResults,
    judge_by_truth,
    mean_and_max,
    popular_item_share,
    popular_items,
    scalar_of,
    sessions_of_ranking,
)


class TestSessionsOfRanking:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 3))
    def test_are_the_best_sets_of_all(self, seed, num_sessions, session_items):
        random = np.random.default_rng(seed)
        length = num_sessions + session_items - 1
        scores = -np.sort(random.exponential(size=(2, length)))
        items = np.stack([random.permutation(50)[:length] for _ in range(2)])
        sessions, totals = sessions_of_ranking(items, scores, num_sessions, session_items)
        for row in range(2):
            every = sorted(
                (-sum(scores[row, list(places)]), places)
                for places in itertools.combinations(range(length), session_items)
            )[:num_sessions]
            np.testing.assert_allclose(totals[row, : len(every)], [-total for total, _ in every])
            place = {item: index for index, item in enumerate(items[row])}
            for session, total in zip(sessions[row, : len(every)], totals[row], strict=False):
                places = [place[item] for item in session]
                assert places == sorted(set(places)) and scores[row, places].sum() == pytest.approx(total)
            assert len({tuple(session) for session in sessions[row, : len(every)]}) == len(every)
            assert (sessions[row, len(every) :] == -1).all()

    def test_a_short_ranking_gives_fewer_sessions_and_wrong_ones_are_refused(self):
        items, scores = np.array([[4, 7, 9, -1]]), np.array([[0.0, -1.0, -5.0, -np.inf]])
        sessions, totals = sessions_of_ranking(items, scores, 3, 2)
        assert sessions.tolist() == [[[4, 7], [4, 9], [7, 9]]] and totals.tolist() == [[-1, -5, -6]]
        sessions, totals = sessions_of_ranking(items, scores, 2, 3)
        assert sessions.tolist() == [[[4, 7, 9], [-1, -1, -1]]] and totals[0, 1] == -np.inf
        with pytest.raises(ValueError, match="at least 5 ranked items"):
            sessions_of_ranking(items, scores, 4, 2)
        with pytest.raises(ValueError, match="row 0 rises"):
            sessions_of_ranking(items, scores[:, ::-1], 3, 2)


def test_mean_and_max_over_a_users_sessions():
    figures = mean_and_max({"vtr": np.array([[0.2, 0.6, np.nan], [np.nan, np.nan, np.nan]])})
    np.testing.assert_allclose(figures["vtr_mean"], [0.4, np.nan])
    np.testing.assert_allclose(figures["vtr_max"], [0.6, np.nan])


def scorer(weights, constant=0.0):
    weights = torch.tensor(weights)
    return SimpleNamespace(
        objectives=["swt", "vtr", "wtr"], scalar=lambda values: (values * weights.to(values.dtype)).sum(-1) + constant
    )


def test_the_scalar_needs_the_objectives_that_count_alone():
    values = {"swt": np.array([0.5, np.nan]), "vtr": np.array([0.25, 0.5])}
    np.testing.assert_allclose(scalar_of(scorer([1.0, 2.0, 0.0], constant=3.0), values), [4.0, np.nan])
    assert scalar_of(scorer([1.0, 2.0, 0.5]), values) is None


def test_the_truth_answers_for_whole_sessions():
    def expected_feedback(users, sessions):
        assert users.tolist() == [7, 8] and sessions.min() >= -1 and -1 not in sessions[0]
        value = np.where((sessions < 0).any(-1), np.nan, sessions.mean(-1) / 1000)
        return {"swt": value, "vtr": value, "wtr": value, "other": value}

    sessions = torch.tensor([[[0, 1], [-1, -1]], [[-1, -1], [-1, -1]]])
    world = SimpleNamespace(expected_feedback=expected_feedback)
    truth = judge_by_truth(world, scorer([1.0, 1.0, 0.0]), np.array([100, 200]), np.array([7, 8]), sessions)
    assert set(truth) == {"reward", "swt", "vtr", "wtr"}
    np.testing.assert_allclose(truth["reward"], [[0.3, np.nan], [np.nan, np.nan]])


def test_popular_items_and_their_share():
    popular = popular_items(np.array([3, 3, 1, 2, 2]), 200, share=0.01)
    assert np.flatnonzero(popular).tolist() == [2, 3]
    sessions = np.array([[[2, 5], [3, -1]], [[7, 8], [9, 1]], [[-1, -1], [-1, -1]]])
    np.testing.assert_allclose(popular_item_share(sessions, popular), [2 / 3, 0, np.nan])


class TestPolicyResults:
    @pytest.fixture
    def results(self):
        random = np.random.default_rng(0)
        by_user = {
            "recall@10": (random.random(200) < 0.3).astype(float),
            "kl_to_seed": np.zeros(50),
            "truth/reward_mean": random.uniform(0.5, 1.5, 50),
        }
        return PolicyResults({"illegal_rate": 0.0}, by_user, random.integers(0, 40, size=(200, 10)), 60)

    def test_summary_and_change(self, results):
        better = PolicyResults(
            results.facts,
            {**results.by_user, "truth/reward_mean": 1.1 * results.by_user["truth/reward_mean"]},
            results.top_items,
            60,
        )
        summary = better.summary(results)
        assert summary["illegal_rate"] == 0 and summary["coverage"] == pytest.approx(40 / 60)
        low, high = summary["recall@10_interval"]
        assert low < summary["recall@10"] == results.by_user["recall@10"].mean() < high
        change = summary["change"]
        assert change["judges"]["truth"]["reward_mean"]["relative"] == pytest.approx(0.1)
        assert change["judges"]["truth"]["reward_mean"]["interval"] == pytest.approx([0.1, 0.1])
        assert change["recall@10"] == {"relative": 0.0, "interval": [0.0, 0.0]}
        assert change["coverage"]["relative"] == 0 and "kl_to_seed" not in change
        assert "change" not in results.summary()

    def test_an_undefined_figure_is_missing(self, results):
        """Sessions of one item have no diversity within them."""
        undefined = PolicyResults({"intra_session_diversity": float("nan")}, results.by_user, results.top_items, 60)
        assert "intra_session_diversity" not in undefined.summary()

    def test_is_saved_whole(self, results, tmp_path):
        results.save(tmp_path / "round_0.safetensors")
        loaded = PolicyResults.load(tmp_path / "round_0.safetensors")
        assert loaded.facts == results.facts and loaded.num_items == 60
        assert [path.name for path in tmp_path.iterdir()] == ["round_0.safetensors"]
        np.testing.assert_array_equal(loaded.top_items, results.top_items)
        assert set(loaded.by_user) == set(results.by_user)
        assert loaded.summary(results) == results.summary(results)
