import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.evaluation import (
    duplicate_rate,
    illegal_rate,
    intra_session_diversity,
    rank_items,
    ranking_metrics,
    user_metrics,
)


class TestRankItems:
    @given(st.integers(0, 10**6), st.integers(1, 12))
    @settings(max_examples=60, deadline=None)
    def test_equals_a_stable_sort(self, seed, k):
        generator = np.random.default_rng(seed)
        values = np.array([-np.inf, -2.5, -1e-30, -0.0, 0.0, 1e-30, 3.0, 3.5, np.inf], dtype=np.float32)
        scores = generator.choice(values, size=(3, 9))
        excluded = [generator.integers(0, 9, size=generator.integers(0, 5)) for _ in range(3)]
        ranked = rank_items(torch.from_numpy(scores), excluded, k)
        for row in range(3):
            allowed = [i for i in range(9) if i not in excluded[row] and scores[row, i] > -np.inf]
            expected = sorted(allowed, key=lambda i: (-scores[row, i], i))[:k]
            assert ranked[row].tolist() == expected + [-1] * (k - len(expected))

    def test_mask_and_lists_exclude_alike(self):
        scores = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
        mask = torch.tensor([[False, False, True], [True, True, False]])
        lists = [np.array([2]), np.array([1, 0, 0])]
        assert rank_items(scores, mask, 2).tolist() == [[1, 0], [2, -1]]
        assert rank_items(scores, lists, 2).tolist() == [[1, 0], [2, -1]]

    def test_says_what_is_wrong(self):
        with pytest.raises(ValueError, match="row 1 holds NaN"):
            rank_items(torch.tensor([[0.0, 1.0], [0.0, math.nan]]), None, 1)
        with pytest.raises(ValueError, match=r"history 0 holds the catalogue index 7, outside 0\.\.1"):
            rank_items(torch.zeros(1, 2), [np.array([7])], 1)
        with pytest.raises(ValueError, match="mask must be bool"):
            rank_items(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.long), 1)


class TestRankingMetrics:
    def test_values_by_hand(self):
        ranked = np.array([[4, 0, 1], [2, 3, -1], [1, 2, 0]])
        metrics = ranking_metrics(ranked, np.array([4, 3, 3]), num_items=10, cutoffs=(1, 3))
        assert metrics["recall@1"] == pytest.approx(1 / 3)
        assert metrics["recall@3"] == pytest.approx(2 / 3)
        assert metrics["ndcg@3"] == pytest.approx((1 + 1 / math.log2(3)) / 3)
        assert metrics["coverage"] == pytest.approx(0.5)

    def test_coverage_counts_the_top_ten_only(self):
        metrics = ranking_metrics(np.arange(50)[None], np.array([30]), num_items=100)
        assert metrics["coverage"] == pytest.approx(0.1)
        assert metrics["recall@10"] == 0 and metrics["recall@50"] == 1

    def test_intervals_hold_the_mean(self):
        ranked = np.random.default_rng(0).permuted(np.tile(np.arange(20), (200, 1)), axis=1)
        metrics = ranking_metrics(ranked, np.zeros(200, int), 20, cutoffs=(10,), interval_resamples=200)
        low, high = metrics["recall@10_interval"]
        assert low < metrics["recall@10"] < high

    def test_rejects_bad_rankings(self):
        with pytest.raises(ValueError, match="row 1 ranks an item twice"):
            user_metrics(np.array([[0, 1, -1], [2, 1, 2]]), np.array([0, 0]), cutoffs=(3,))
        with pytest.raises(ValueError, match="do not reach the cutoff 50"):
            ranking_metrics(np.zeros((1, 10), int), np.array([0]), 10)
        with pytest.raises(ValueError, match="beyond the catalogue"):
            ranking_metrics(np.array([[12]]), np.array([0]), 10, cutoffs=(1,))
        with pytest.raises(ValueError, match="no user"):
            ranking_metrics(np.zeros((0, 5), int), np.zeros(0, int), 10, cutoffs=(5,))


class TestSessionMetrics:
    @given(st.integers(0, 10**6))
    @settings(max_examples=30, deadline=None)
    def test_diversity_equals_the_mean_over_pairs(self, seed):
        generator = np.random.default_rng(seed)
        embeddings = generator.normal(size=(6, 4))
        sessions = generator.integers(-1, 6, size=(2, 3, 4))
        expected = []
        for session in sessions.reshape(-1, 4):
            items = [i for i in session if i >= 0]
            unit = embeddings[items] / np.linalg.norm(embeddings[items], axis=1, keepdims=True)
            pairs = [1 - unit[i] @ unit[j] for i in range(len(items)) for j in range(i)]
            if pairs:
                expected.append(np.mean(pairs))
        result = intra_session_diversity(torch.from_numpy(sessions), embeddings)
        if expected:
            assert result == pytest.approx(np.mean(expected), abs=1e-5)
        else:
            assert math.isnan(result)

    def test_diversity_names_an_item_without_direction(self):
        with pytest.raises(ValueError, match="row 1 is zero"):
            intra_session_diversity(np.array([[0, 1]]), np.array([[1.0, 0.0], [0.0, 0.0]]))

    def test_duplicates(self):
        sessions = np.array([[[0, 1, 2], [3, 3, 1]], [[-1, -1, 5], [-1, -1, -1]]])
        assert duplicate_rate(sessions) == pytest.approx(1 / 3)
        assert duplicate_rate(torch.full((2, 3), -1)) == 0

    def test_illegal_items(self):
        legal = np.array([[0, 1, 2], [3, 0, 0]])
        generated = np.array([[[0, 1, 2], [2, 1, 0]], [[3, 0, 0], [-1, 0, 0]]])
        assert illegal_rate(generated, legal) == pytest.approx(0.5)
        assert illegal_rate(torch.from_numpy(legal), torch.from_numpy(legal)) == 0
        with pytest.raises(ValueError, match="levels"):
            illegal_rate(generated[..., :2], legal)
