"""The simulated feed: reproducible, within its own rules, true to its stated expectations. A world of one's own."""

import dataclasses
import types

import numpy as np
import pytest
import torch

from onerec_hf.data import (
    DataArguments,
    DataError,
    SessionSimulator,
    SimulatedFeed,
    evaluation_cases,
    exposure_sessions,
    load_saved_feed,
    save_feed,
    split_feed,
)
from onerec_hf.data.simulated_feed import topic_fatigue
from onerec_hf.evaluation import judge_by_truth


@pytest.fixture(scope="module")
def world():
    return SimulatedFeed.generate(users=300, items=600, seed=1)


def test_the_seed_gives_the_world(world):
    again = SimulatedFeed.generate(users=300, items=600, seed=1)
    other = SimulatedFeed.generate(users=300, items=600, seed=2)
    assert all(np.array_equal(world.log[name], again.log[name]) for name in world.log)
    assert not np.array_equal(world.truth["item_quality"], other.truth["item_quality"])


def test_the_log_keeps_the_rules(world):
    rows = world.feed().interactions
    assert not rows.duplicated(["user_id", "item_id"]).any()
    sizes = rows.groupby("session_id").size()
    assert sizes.between(5, 10).all() and rows.groupby("session_id")["user_id"].nunique().eq(1).all()
    assert rows["session_id"].is_monotonic_increasing
    assert (rows["watch_time"] <= rows["duration"]).all()
    assert (rows["view"] >= rows[["like", "follow"]].max(axis=1)).all()
    assert rows.groupby("user_id")["timestamp"].is_monotonic_increasing.all()
    assert 0.3 < rows["view"].mean() < 0.48 and 0.03 < rows["like"].mean() < 0.08
    assert 0.004 < rows["follow"].mean() < 0.02


def test_fatigue_counts_earlier_items_of_the_topic():
    assert topic_fatigue(np.array([[3, 1, 3, 3, 1]])).tolist() == [[0, 0, 1, 2, 1]]


def test_expectation_is_the_mean_of_the_draws(world):
    rng = np.random.default_rng(0)
    users = np.array([3, 3, 40])
    sessions = rng.choice(world.parameters.items, size=(3, 5), replace=False)
    topic = world.truth["item_topics"]
    sessions[0] = np.flatnonzero(topic == 0)[:5]  # a session of one topic: fatigue at its strongest
    expected = world.expected_feedback(world.user_ids[users], world.item_ids[sessions][:, None])
    draws = 20_000
    end = np.full(len(users) * draws, world.parameters.days * 86400.0)
    kept = np.ones((len(users) * draws, 5), dtype=bool)
    drawn = world._draw_feedback(np.repeat(users, draws), np.repeat(sessions, draws, axis=0), kept, end, rng)
    drawn = {name: values.reshape(len(users), draws, 5) for name, values in drawn.items()}
    swt = drawn["watch_time"].sum(axis=-1) / drawn["duration"].sum(axis=-1)
    assert expected["swt"][:, 0] == pytest.approx(swt.mean(axis=1), abs=0.005)
    for label, column in (("vtr", "view"), ("wtr", "follow"), ("ltr", "like")):
        assert expected[label][:, 0] == pytest.approx(drawn[column].mean(axis=(1, 2)), abs=0.006)


def test_a_session_is_more_than_its_items(world):
    user = world.user_ids[:1]
    topic = world.truth["item_topics"]
    same, others = np.flatnonzero(topic == 0)[:5], np.array([np.flatnonzero(topic == t)[0] for t in range(1, 5)])

    def view(items):
        return world.expected_feedback(user, world.item_ids[items][None])["vtr"][0] * len(items)

    alone = sum(view(same[i : i + 1]) for i in range(5))
    assert view(same) < 0.85 * alone
    assert view(others) == pytest.approx(sum(view(others[i : i + 1]) for i in range(4)))


def test_expected_feedback_of_bad_sessions(world):
    users, sessions = world.user_ids[:1], world.item_ids[None, None, :5].copy()
    sessions = np.repeat(sessions, 2, axis=1)
    sessions[0, 1, 4] = -1
    assert np.isnan(world.expected_feedback(users, sessions)["vtr"]).tolist() == [[False, True]]
    with pytest.raises(DataError, match="no item 7"):
        world.expected_feedback(users, np.full((1, 1, 5), 7))
    with pytest.raises(DataError, match="too few"):
        SimulatedFeed.generate(users=10, items=50)


def test_the_truth_outranks_popularity_and_the_log(world):
    feed = world.feed()
    args = DataArguments()
    split = split_feed(feed, args)
    cases = evaluation_cases(split, feed, args)
    users = np.array(cases["user_id"]) - world.user_ids[0]
    targets = np.array(cases["next_item_id"]) - world.item_ids[0]
    everything = np.broadcast_to(np.arange(world.parameters.items), (len(users), world.parameters.items))
    viewed = split.fit.loc[split.fit["view"] > 0, "item_id"].to_numpy() - world.item_ids[0]
    popularity = np.bincount(viewed, minlength=world.parameters.items)
    scores = {
        "truth": world.affinities(users, everything, 0.95),
        "popularity": np.broadcast_to(popularity.astype(float), everything.shape),
    }
    recall = {}
    for name, score in scores.items():
        score = score.copy()
        for row, history in enumerate(cases["history_item_ids"]):
            score[row, np.array(history) - world.item_ids[0]] = -np.inf
        rank = (score > score[np.arange(len(users)), targets][:, None]).sum(axis=1)
        recall[name] = (rank < 10).mean()
    assert recall["truth"] > 2 * recall["popularity"]

    shown = exposure_sessions(split.fit, feed, DataArguments(session_cut="session_id", min_session_items=5))
    logged = world.expected_feedback(np.array(shown["user_id"]), np.array(shown["session_item_ids"]))
    best = world.item_ids[np.argsort(-scores["truth"], axis=1)[:, :5]]
    ideal = world.expected_feedback(world.user_ids[users], best)
    for label in ("swt", "vtr", "wtr", "ltr"):
        assert ideal[label].mean() > 1.2 * logged[label].mean()


def test_world_and_feed_come_back(world, tmp_path):
    feed = world.feed()
    save_feed(feed, tmp_path / "feed")
    loaded = load_saved_feed(tmp_path / "feed")
    assert loaded.interactions.equals(feed.interactions)
    users, sessions = world.user_ids[:4], world.item_ids[:20].reshape(4, 5)
    one, other = (w.expected_feedback(users, sessions) for w in (world, loaded.world))
    assert all(np.array_equal(one[label], other[label]) for label in one)


class LikesLongSessions:
    """A world of one's own, which answers for likes alone: their share grows with the session."""

    def expected_feedback(self, user_ids, session_item_ids):
        whole = (session_item_ids >= 0).all(-1)
        return {"ltr": np.where(whole, session_item_ids.shape[-1] / 10, np.nan)}


def test_a_world_of_ones_own_judges(world, tmp_path):
    feed = dataclasses.replace(world.feed(), world=LikesLongSessions())
    assert isinstance(feed.world, SessionSimulator) and isinstance(world, SessionSimulator)
    scorer = types.SimpleNamespace(objectives=["vtr", "ltr"], scalar=lambda values: values.sum(-1))
    sessions = torch.tensor([[[0, 1, 2], [0, 1, -1]]])
    judged = judge_by_truth(feed.world, scorer, world.item_ids, world.user_ids[:1], sessions)
    assert list(judged) == ["ltr"] and judged["ltr"].tolist() == [[0.3, pytest.approx(np.nan, nan_ok=True)]]

    with pytest.warns(UserWarning, match="its world, a LikesLongSessions, is not saved; set `world`"):
        save_feed(feed, tmp_path / "feed")
    loaded = load_saved_feed(tmp_path / "feed")
    assert loaded.world is None and loaded.interactions.equals(feed.interactions)
    with pytest.raises(DataError, match="simulated: a dict cannot be the feed's world.*expected_feedback"):
        dataclasses.replace(feed, world={})
