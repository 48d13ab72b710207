"""Policies, rankings and a log are evaluated on data that a test made, without a run's folder."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from alignment_cases import CODEBOOK_SIZES, NUM_ITEMS, tiny_generator, tiny_tokenizer
from datasets import Dataset

from onerec_hf.evaluation import EvaluationOptions, LoggedExposures, PolicyEvaluator, popular_items
from onerec_hf.item_trie import ItemTrie
from onerec_hf.pretraining import index_sessions
from onerec_hf.reporting import comparison_table
from onerec_hf.reward import OneRecRewardConfig, OneRecRewardModel, SessionScorer

USERS = 24
OPTIONS = EvaluationOptions(ranking_beams=30, judged_users=10, judged_sessions=6, session_items=2, seed=3)


def make_cases() -> Dataset:
    random = np.random.default_rng(0)
    histories = [random.choice(NUM_ITEMS, random.integers(1, 9), replace=False) + 100 for _ in range(USERS)]
    rest = [np.setdiff1d(np.arange(100, 100 + NUM_ITEMS), history) for history in histories]
    return Dataset.from_dict(
        {
            "user_id": [f"u{row}" for row in range(USERS)],
            "history_item_ids": [history.tolist() for history in histories],
            "next_item_id": [int(random.choice(items)) for items in rest],
        }
    )


def make_scorer(*objectives, seed: int = 0, **settings) -> SessionScorer:
    torch.manual_seed(seed)
    settings |= {"objectives": objectives} if objectives else {}
    config = OneRecRewardConfig(
        codebook_sizes=CODEBOOK_SIZES, hidden_size=16, tower_hidden_size=16, session_items=2, **settings
    )
    return SessionScorer(OneRecRewardModel(config).eval(), tiny_tokenizer())


def make_evaluator(options=OPTIONS, **judges) -> PolicyEvaluator:
    tokenizer = tiny_tokenizer()
    embeddings = torch.randn(NUM_ITEMS, 4, generator=torch.manual_seed(2))
    popular = popular_items(np.array([3, 3, 7]), NUM_ITEMS, share=0.1)
    trie = ItemTrie.from_tokenizer(tokenizer)
    return PolicyEvaluator(tokenizer, trie, make_cases(), embeddings, popular, **judges, options=options)


def test_a_model_is_evaluated_from_data_alone():
    world = SimpleNamespace(expected_feedback=lambda users, items: {"swt": np.full(items.shape[:2], 0.25)})
    judges = {"one": make_scorer("swt"), "other": make_scorer(seed=1)}
    evaluator = make_evaluator(scorers=judges, world=world)
    seed_model, model = tiny_generator(), tiny_generator(seed=1)
    before = evaluator.generator(seed_model, seed_model)
    after = evaluator.generator(model, seed_model)
    assert model.training and seed_model.training  # evaluated without dropout, and given back as they were
    assert (before.by_user["kl_to_seed"] == 0).all() and (after.by_user["kl_to_seed"] > 0).all()
    summary = after.summary(before)
    assert summary["illegal_rate"] == 0 and summary["recall@50"] == 1  # 30 items, none twice
    assert set(summary["judges"]) == {"one", "other", "truth"}
    assert summary["judges"]["truth"]["swt_mean"] == 0.25 and "reward_mean" in summary["judges"]["truth"]
    assert len(after.by_user["one/reward_max"]) == OPTIONS.judged_users and "kl_to_seed" not in summary["change"]
    rows = [{"name": "seed", "rounds": None, **before.summary()}, {"name": "mine", "rounds": 1, **summary}]
    table = comparison_table("Mine", "Beside the seed model.", rows)
    assert "| mine " in table and "| Simulated truth " in table


def test_without_judges_and_seed_model_the_ranking_and_the_sessions_are_measured():
    evaluator, model = make_evaluator(), tiny_generator().eval()
    results = evaluator.generator(model)
    summary = results.summary()
    assert summary["judges"] == {} and "kl_to_seed" not in summary and summary["popular_item_share"] >= 0
    ranked, scores = evaluator.rank(model, OPTIONS.ranked_items)
    for row, history in enumerate(evaluator.histories):
        assert not set(history) & set(ranked[row].tolist())
    method = evaluator.ranking_method(ranked, scores)
    np.testing.assert_array_equal(method.by_user["recall@10"], results.by_user["recall@10"])
    assert method.facts["session_coverage"] > 0 and "illegal_rate" not in method.facts


def make_log(scorer: SessionScorer, shown: pd.DataFrame, **options) -> LoggedExposures:
    users = index_sessions(make_cases(), scorer.tokenizer)
    return LoggedExposures(users, shown, np.array([0, 0, 1, 5]), scorer, **options)


@pytest.fixture
def shown() -> pd.DataFrame:
    random = np.random.default_rng(1)
    rows = 60
    return pd.DataFrame(
        {
            "user_id": np.repeat([f"u{row}" for row in range(6)], 10),
            "item_id": random.integers(NUM_ITEMS, size=rows) + 100,
            "watch_time": random.uniform(0, 20, rows),
            "duration": np.full(rows, 10.0),
            "view": (random.random(rows) < 0.5).astype(float),
            "click": (random.random(rows) < 0.5).astype(float),
        }
    )


def test_logged_labels_are_those_of_the_objectives_whatever_they_are_called(shown):
    scorer = make_scorer({"name": "vtr", "source": "click", "kind": "binary"})
    log = make_log(scorer, shown)
    assert set(log.feedback.labels) == {"reward", "vtr"}
    first = shown.groupby("user_id").head(8)
    np.testing.assert_array_equal(log.feedback.labels["vtr"].ravel(), first["click"])
    assert (first["click"] != first["view"]).any()


def test_the_scalar_is_there_with_objectives_of_every_kind(shown):
    long = {"name": "long", "source": "watch_time", "kind": "quantile", "quantiles": [5.0, 10.0, 15.0]}
    log = make_log(make_scorer("swt", "vtr", long), shown)
    labels = log.feedback.labels
    assert list(labels) == ["reward", "swt", "vtr", "long"]
    assert set(np.round(3 * np.unique(labels["long"]))) == {0, 1, 2, 3}
    np.testing.assert_allclose(labels["reward"], labels["swt"] + labels["vtr"] + labels["long"], rtol=1e-6)
    evaluator = make_evaluator()
    result = log.feedback.estimates(evaluator.on_log(tiny_generator(), log))
    assert list(result["heads"]) == ["reward", "swt", "vtr", "long"] and result["exposures"] == 48


def test_an_objective_without_labels_leaves_the_scalar_out_only_if_it_counts(shown):
    unknown = {"name": "wtr", "source": "follow", "kind": "binary", "weight": 0.0}
    labels = make_log(make_scorer("vtr", unknown), shown).feedback.labels
    assert np.isnan(labels["wtr"]).all() and not np.isnan(labels["reward"]).any()
    labels = make_log(make_scorer("vtr", {**unknown, "weight": 1.0}), shown).feedback.labels
    assert np.isnan(labels["reward"]).all()


def test_exposures_drawn_by_known_chances_are_the_log_where_there_are_any(shown):
    chances = np.full(len(shown), np.nan)
    chances[[3, 14, 15]] = [0.25, 0.5, 0.125]
    log = make_log(make_scorer("vtr"), shown.assign(propensity=chances))
    np.testing.assert_array_equal(log.feedback.propensities[:, :3], [[0.25, np.nan, np.nan], [0.5, 0.125, np.nan]])
    assert log.feedback.known_propensities and not make_log(make_scorer("vtr"), shown).feedback.known_propensities
    assert (log.items[:, 0] == shown["item_id"].to_numpy()[[3, 14]] - 100).all()


def test_a_logs_users_are_drawn_by_seed(shown):
    few = make_log(make_scorer("vtr"), shown, max_users=3, seed=5)
    assert few.items.shape == (3, 8) and len(few.rows) == 3
    again = make_log(make_scorer("vtr"), shown, max_users=3, seed=5)
    np.testing.assert_array_equal(few.items, again.items)
