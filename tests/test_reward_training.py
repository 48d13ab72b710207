import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from onerec_hf.data import DataArguments, Feed, exposure_runs, user_exposures
from onerec_hf.pretraining import index_sessions
from onerec_hf.reward import (
    ExposureEncoder,
    ItemTotals,
    OneRecRewardModel,
    RewardCollator,
    RewardPredictions,
    SessionScorer,
    create_reward_model,
    fit_calibration,
    group_auc,
    label_means,
    objective_labels,
    objective_metrics,
    predict_rewards,
    reliability_plot,
    session_label,
    train_reward_model,
    user_fold,
    user_half,
)
from onerec_hf.reward.exposure_encoding import ItemFeatures
from onerec_hf.reward.reward_training import cut_sessions
from onerec_hf.tokenization_onerec import OneRecTokenizer

NUM_ITEMS = 30
SIZES = {"hidden_size": 16, "tower_hidden_size": 16, "num_attention_heads": 2, "history_items": 6, "session_items": 3}


def tiny_feed(users: int = 40, rows: int = 14) -> Feed:
    """Users watch what has their own parity; the first three of their rows have no time and no watch time."""
    rng = np.random.default_rng(0)
    frames = []
    for user in range(users):
        items = rng.integers(NUM_ITEMS, size=rows)
        view = (items % 2 == user % 2).astype(float)
        duration = np.full(rows, 10.0)
        times = 1e6 + np.arange(rows) * 100.0 + rng.uniform(0, 50, rows)
        times[:3] = duration[:3] = np.nan
        frames.append(
            pd.DataFrame(
                {
                    "user_id": user,
                    "item_id": 100 + items,
                    "timestamp": times,
                    "position": np.arange(rows),
                    "watch_time": np.where(np.isnan(times), np.nan, 2 + 7 * view),
                    "duration": duration,
                    "view": view,
                }
            )
        )
    items = pd.DataFrame({"item_id": 100 + np.arange(NUM_ITEMS)})
    items["parity"] = [str(item % 2) for item in range(NUM_ITEMS)]
    items["length"] = np.linspace(90, 1, NUM_ITEMS)
    profile = pd.DataFrame({"user_id": range(users), "group": [str(user % 2) for user in range(users)]})
    return Feed.from_frames(
        "tiny",
        [(pd.concat(frames), "log")],
        (items, "items"),
        ["view"],
        users=(profile, "users"),
        categorical_columns=["parity"],
        numeric_columns=["length"],
    )


@pytest.fixture(scope="module")
def feed() -> Feed:
    return tiny_feed()


@pytest.fixture(scope="module")
def tokenizer() -> OneRecTokenizer:
    items = np.random.default_rng(1).permutation(64)[:NUM_ITEMS]
    codes = np.stack([items // 16, items // 4 % 4, items % 4], axis=1)
    return OneRecTokenizer.from_semantic_ids(100 + np.arange(NUM_ITEMS), codes, codebook_sizes=[4, 4, 4])


@pytest.fixture(scope="module")
def runs(feed, tokenizer):
    return index_sessions(exposure_runs(feed.interactions, feed, DataArguments(history_items=6)), tokenizer)


@pytest.fixture(scope="module")
def totals(feed, tokenizer) -> ItemTotals:
    return ItemTotals(feed.interactions, tokenizer.item_index(feed.interactions["item_id"]), NUM_ITEMS)


class TestExposures:
    def test_runs_judge_every_timed_exposure_once_with_what_was_before_it(self, feed):
        many = replace(feed, interactions=tiny_feed(users=3, rows=40).interactions)
        rows = exposure_runs(many.interactions, many, DataArguments(history_items=6)).to_list()
        judged = []
        for row in rows:
            log = many.interactions[many.interactions["user_id"] == row["user_id"]].reset_index(drop=True)
            places = [place for place, group in enumerate(row["exposed_sessions"]) if group >= 0]
            # Times are distinct: they say where in the log the run ends.
            end = int(np.flatnonzero(log["timestamp"] == row["exposed_timestamps"][places[-1]])[0]) + 1
            start = end - len(row["exposed_item_ids"])
            assert row["exposed_item_ids"] == log["item_id"][start:end].tolist()
            feedback = np.array(row["exposed_feedback"], dtype=float).reshape(-1, 3)
            np.testing.assert_array_equal(feedback, log[["watch_time", "duration", "view"]][start:end])
            watched = (np.minimum(log["watch_time"], log["duration"]) / log["duration"])[:start]
            expected = [watched.sum(), log["view"][:start].sum(), watched.notna().sum(), start]
            assert row["feedback_totals"] == pytest.approx(expected, rel=1e-5)
            assert places[0] == min(6, start + places[0]) and row["user_profile"] == {"group": str(row["user_id"] % 2)}
            judged += [(row["user_id"], row["exposed_timestamps"][place]) for place in places]
        timed = many.interactions.dropna(subset="timestamp")
        assert judged == list(zip(timed["user_id"], timed["timestamp"], strict=True))

    def test_all_exposures_are_judged_where_none_has_a_time(self, feed):
        args = DataArguments(history_items=6)
        blank = replace(feed, interactions=feed.interactions.assign(timestamp=math.nan))
        every = exposure_runs(blank.interactions, blank, args)["exposed_sessions"][:]
        assert sum(group >= 0 for groups in every for group in groups) == len(feed.interactions)

    def test_requests_are_sessions_where_they_are_known(self, feed):
        requests = feed.interactions.assign(session_id=feed.interactions["position"] // 2)
        args = DataArguments(history_items=3, session_cut="consecutive")
        for row in exposure_runs(requests, feed, args).to_list():
            groups = np.array(row["exposed_sessions"])
            assert np.bincount(groups[groups >= 0]).max() <= 2 and len(np.unique(groups[groups >= 0])) > 2

    def test_nothing_before_since_is_judged(self, feed):
        since = feed.interactions["timestamp"].quantile(0.8)
        rows = exposure_runs(feed.interactions, feed, DataArguments(history_items=6), since).to_pandas()
        times = np.concatenate(rows["exposed_timestamps"])[np.concatenate(rows["exposed_sessions"]) >= 0]
        known = feed.interactions["timestamp"]
        assert sorted(times) == sorted(known[known >= since])

    def test_user_exposures_end_with_the_log(self, feed):
        rows = user_exposures(feed.interactions, feed, 6).to_list()
        assert [row["user_id"] for row in rows] == list(range(40))
        for row in rows:
            log = feed.interactions[feed.interactions["user_id"] == row["user_id"]]
            assert row["exposed_item_ids"] == log["item_id"].iloc[-6:].tolist()
            assert row["feedback_totals"][1] == log["view"].iloc[:-6].sum()

    def test_item_totals_are_strictly_earlier(self, feed, totals, tokenizer):
        log = feed.interactions
        signals = np.stack([np.minimum(log["watch_time"], log["duration"]) / log["duration"], log["view"]], 1)
        times = np.nan_to_num(log["timestamp"].to_numpy(), nan=-np.inf)
        items = tokenizer.item_index(log["item_id"])
        asked = np.random.default_rng(2).choice(len(log), 50)
        found = totals.before(items[asked], log["timestamp"].to_numpy()[asked])
        for row, actual in zip(asked, found, strict=True):
            earlier = signals[(items == items[row]) & (times < times[row])]
            np.testing.assert_allclose(actual, [*np.nansum(earlier, 0), *(~np.isnan(earlier)).sum(0)], rtol=1e-5)
        everything = np.stack([np.nansum(signals[items == item], 0) for item in range(NUM_ITEMS)])
        np.testing.assert_allclose(totals.all()[:, :2], everything, rtol=1e-5)
        assert not totals.before(np.arange(NUM_ITEMS), np.full(NUM_ITEMS, np.nan)).any()


def test_item_features(feed):
    frame = feed.items.assign(tag=[["a", "b"], ["b"], ["c"]] * 10, length=np.arange(30.0))
    frame.loc[[3, 4], "parity"] = ["only here", None]
    frame.loc[5, "length"] = math.nan
    features = ItemFeatures.of_feed(replace(feed, items=frame, multi_categorical_columns=["tag"]))
    assert features.columns == ["parity", "tag", "tag", "length"] and features.numeric_columns == ["length"]
    assert features.values[:6, 0].tolist() == [1, 2, 1, 0, 0, 2]
    assert features.values[:3, 1:3].tolist() == [[3, 4], [4, 0], [5, 0]]
    bins = features.values[:, 3]
    assert bins[5] == 0 and np.delete(bins, 5).min() == 6 and bins.max() == features.num_values - 1
    assert features.ranks[5] == 0 and features.ranks[29] == 1 and features.ranks[0] == pytest.approx(2 / 29 - 1)
    turned = features.take(np.arange(30)[::-1])
    assert np.array_equal(turned.values[::-1], features.values)


class TestLabels:
    FEEDBACK = np.array([[5.0, 10.0, 1.0], [30.0, 20.0, 0.0], [1.0, 5.0, np.nan], [np.nan, 5.0, 1.0]])
    COLUMNS = ("watch_time", "duration", "view")

    def label(self, kind, source, sessions, **fields):
        objective = {"name": "x", "source": source, "kind": kind, **fields}
        return session_label(objective, self.FEEDBACK, self.COLUMNS, np.array(sessions)).tolist()

    def test_by_hand(self):
        sessions = [[0, 1], [0, -1], [0, 2], [3, 0]]
        assert self.label("binary", "view", sessions) == pytest.approx([0.5, 1.0, math.nan, 1.0], nan_ok=True)
        shares = [25 / 30, 0.5, 6 / 15, math.nan]
        assert self.label("share", "watch_time", sessions) == pytest.approx(shares, nan_ok=True)
        quantiles = self.label("quantile", "watch_time", sessions, quantiles=[2.0, 10.0, 20.0, 40.0])
        assert quantiles == pytest.approx([(1 / 4 + 3 / 4) / 2, 1 / 4, 1 / 8, math.nan], nan_ok=True)

    def test_of_all_objectives(self):
        objectives = [
            {"name": "vtr", "source": "watch_time", "kind": "binary"},
            {"name": "swt", "source": "watch_time", "kind": "share"},
        ]
        labels = objective_labels(objectives, self.FEEDBACK, self.COLUMNS, np.array([[0, 1], [0, 3]]))
        assert labels.dtype == np.float64
        np.testing.assert_allclose(labels, [[1, 25 / 30], [np.nan, np.nan]])

    def test_missing_source_is_named(self):
        with pytest.raises(ValueError, match="needs the feedback column 'like'.*watch_time, duration, view"):
            self.label("binary", "like", [[0]])


def test_cut_sessions():
    groups = np.array([-1, -1, 4, 4, 4, 4, 7, -1, 7])
    assert cut_sessions(groups, 3) == [(2, 3), (5, 1), (6, 1), (8, 1)]
    assert cut_sessions(groups, 1) == [(place, 1) for place in (2, 3, 4, 5, 6, 8)]
    assert cut_sessions(groups[:2], 2) == []


class TestTraining:
    OBJECTIVES = [
        "swt",
        "vtr",
        {"name": "watched", "source": "watch_time", "kind": "quantile", "weight": 0.0},
        {"name": "ltr", "source": "view", "kind": "binary", "weight": 0.0},
    ]

    def model(self, feed, totals, tokenizer, **overrides):
        torch.manual_seed(0)
        config = SIZES | {"objectives": self.OBJECTIVES} | overrides
        return create_reward_model(config, feed, tokenizer, torch.eye(NUM_ITEMS)[:, :2], totals)

    def test_configuration_says_what_is_read(self, feed, totals, tokenizer):
        config = self.model(feed, totals, tokenizer).config
        assert config.feedback == ["watch_time", "duration", "view"] and config.signals == ["watched", "view"]
        assert config.item_features == ["parity", "length"] and config.numeric_features == ["length"]
        assert config.user_features == {"group": ["0", "1"]}
        other = OneRecTokenizer.from_semantic_ids(
            tokenizer.item_ids, tokenizer.codes[::-1], codebook_sizes=tokenizer.codebook_sizes
        )
        SessionScorer(OneRecRewardModel(config), tokenizer)
        with pytest.raises(ValueError, match="trained on other items or semantic IDs"):
            SessionScorer(OneRecRewardModel(config), other)
        watched = config.objectives[2]
        assert len(watched["quantiles"]) == 99 and watched["quantiles"][0] == 2.0
        assert config.taste_size and not self.model(feed, totals, tokenizer, taste_size=0).config.taste_size
        without_content = create_reward_model(SIZES | {"objectives": ["swt"]}, feed, tokenizer).config
        assert without_content.item_embedding_size == without_content.taste_size == 0

    def test_batches(self, feed, totals, tokenizer, runs):
        model = self.model(feed, totals, tokenizer)
        encoder = ExposureEncoder(model.config, tokenizer.item_token_ids)
        rows = runs.to_list()[:4]
        batch = RewardCollator(encoder, totals, session_items=2)(rows)
        assert batch["session_indices"].shape == (4, 6, 2)  # 11 exposures a run
        assert torch.equal(batch["session_ids"][batch["session_indices"] < 0], torch.zeros(4, 3, dtype=torch.long))
        for run, row in enumerate(rows):
            feedback = np.array(row["exposed_feedback"]).reshape(-1, 3)
            for place in range(6):
                first = 3 + 2 * place
                items = row["exposed"][first : first + 2]
                assert batch["session_indices"][run, place, : len(items)].tolist() == items
                assert batch["history_prefixes"][run, place] == first
                # Sessions have up to three items, from the first judged exposure on.
                assert batch["session_offsets"][run, place] == 2 * place % model.config.session_items
                swt = np.minimum(feedback[first : first + 2, 0], 10).mean() / 10
                assert batch["labels"][run, place, 0] == pytest.approx(swt)
                known = totals.before(np.array(items), np.full(len(items), row["exposed_timestamps"][first]))
                np.testing.assert_array_equal(batch["session_totals"][run, place, : len(items)], known)
        every = runs.to_list()
        batches = [every[first:] + every[:first] for first in range(min(len(every), 40))]
        lengths = [RewardCollator(encoder, totals)(batch)["session_ids"].shape[2] for batch in batches]
        assert set(lengths) == {1, 2, 3}
        # The same batch is cut alike whenever it is made.
        assert RewardCollator(encoder, totals)(batches[1])["session_ids"].shape[2] == lengths[1]

    def test_loss_is_a_mean_whatever_is_accumulated(self, feed, totals, tokenizer, runs, tmp_path):
        losses = []
        for accumulated in (1, 4):
            arguments = {"output_dir": tmp_path, "max_steps": 8 // accumulated, "learning_rate": 0.0}
            arguments |= {"gradient_accumulation_steps": accumulated, "train_sampling_strategy": "sequential"}
            arguments |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
            arguments |= {"logging_steps": 8 // accumulated}
            model = self.model(feed, totals, tokenizer, dropout=0.0)
            log = train_reward_model(model, tokenizer, totals, runs, arguments).state.log_history
            losses.append(log[0]["loss"])
        assert losses[1] == pytest.approx(losses[0], rel=0.01)  # an epoch's last step has fewer batches

    def test_learns_whom_an_item_suits(self, feed, totals, tokenizer, runs, tmp_path):
        model = self.model(feed, totals, tokenizer, dropout=0.0)
        arguments = {
            "output_dir": tmp_path,
            "max_steps": 60,
            "per_device_train_batch_size": 40,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "logging_steps": 30,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        collator = RewardCollator(ExposureEncoder(model.config, tokenizer.item_token_ids), totals, session_items=1)
        rates = label_means(runs, collator)
        timed = feed.interactions.dropna(subset="timestamp")
        assert rates["vtr"] == pytest.approx(timed["view"].mean())
        assert rates["swt"] == pytest.approx((timed["watch_time"] / 10).mean(), rel=1e-4)
        model.set_base_rates(rates)
        base = model.towers["vtr"].output.output_bias.flatten().tolist()
        assert base == pytest.approx([math.log(rates["vtr"] / (1 - rates["vtr"]))] * 4)
        log = train_reward_model(model, tokenizer, totals, runs, arguments).state.log_history
        assert [row["step"] for row in log] == [30, 60, 60]
        predictions = predict_rewards(model, runs, collator, batch_size=7)
        assert len(predictions.users) == len(timed)
        metrics = predictions.metrics(model.config)
        assert metrics["vtr_auc"] > 0.97 and metrics["vtr_gauc"] > 0.97 and metrics["watched_auc"] > 0.97
        assert not predictions.lengths.any()
        whole = predict_rewards(model, runs, replace(collator, session_items=3))
        assert whole.metrics(model.config)["swt_auc"] > 0.9
        assert whole.lengths.sum() == len(timed) and whole.lengths.min() > 0
        bias = torch.tensor([[1.0], [2.0], [3.0]]).expand(3, len(model.config.objectives))
        model.set_calibration(torch.ones(bias.shape[1]), torch.zeros(bias.shape[1]), bias)
        longer = predict_rewards(model, runs, replace(collator, session_items=3))
        np.testing.assert_allclose(
            longer.probabilities, 1 / (1 + np.exp(-longer.logits - longer.lengths[:, None])), atol=1e-5
        )
        lone = predict_rewards(model, runs, collator)
        np.testing.assert_allclose(lone.probabilities, 1 / (1 + np.exp(-lone.logits)), atol=1e-5)
        np.testing.assert_allclose(
            predict_rewards(model, runs, collator, batch_size=40).logits, predictions.logits, atol=1e-4
        )

    def test_weighted_objective_without_labels_is_an_error(self, feed, totals, tokenizer, runs):
        model = self.model(feed, totals, tokenizer)
        encoder = ExposureEncoder(model.config, tokenizer.item_token_ids)
        blank = runs.select([0]).map(lambda row: {"exposed_feedback": [math.nan] * len(row["exposed_feedback"])})
        with pytest.raises(ValueError, match="'swt' has no known label.*weight in the reward is 1"):
            label_means(blank, RewardCollator(encoder, totals, session_items=1))

    def test_calibration_finds_scale_and_bias(self, feed, totals, tokenizer):
        model = self.model(feed, totals, tokenizer)
        rng = np.random.default_rng(3)
        logits = rng.normal(0, 1.5, (60_000, 4)).astype(np.float32)
        labels = (rng.random(logits.shape) < 1 / (1 + np.exp(-(0.5 * logits - 1)))).astype(np.float32)
        labels[:, 3] = math.nan
        lengths = np.zeros(len(logits), dtype=np.int64)
        fit_calibration(model, RewardPredictions(logits, logits, labels, lengths, lengths))
        np.testing.assert_allclose(model.calibration.scale, [0.5, 0.5, 0.5, 1.0], atol=0.03)
        np.testing.assert_allclose(model.calibration.bias, [-1, -1, -1, 0], atol=0.03)
        assert not model.calibration.session_bias.any()
        assert model.config.objective_means[0] == pytest.approx(labels[:, 0].mean(), abs=1e-4)

    def test_whole_sessions_are_calibrated_by_length(self, feed, totals, tokenizer):
        """Beside lone exposures, whose probabilities stay as they are; the bias of a length without any stays 0."""
        model = self.model(feed, totals, tokenizer)
        rng = np.random.default_rng(4)
        logits = rng.normal(0, 1.5, (60_000, 4)).astype(np.float32)
        lengths = rng.choice([0, 1, 3], len(logits))
        bias = np.array([0.0, 0.8, 0.0, -0.5])[lengths, None]
        labels = (rng.random(logits.shape) < 1 / (1 + np.exp(-(logits + bias)))).astype(np.float32)
        fit_calibration(model, RewardPredictions(logits, logits, labels, lengths, lengths))
        np.testing.assert_allclose(model.calibration.bias, 0, atol=0.06)
        np.testing.assert_allclose(model.calibration.session_bias, np.outer([0.8, 0, -0.5], [1] * 4), atol=0.09)
        assert model.config.objective_means[0] == pytest.approx(labels[lengths > 0, 0].mean(), abs=1e-3)


class TestMetrics:
    def test_by_hand(self):
        labels = np.array([[0.0, 0.2, 0.0, math.nan], [0.0, 0.8, 0.0, math.nan], [1.0, 0.6, 0.0, math.nan]])
        probabilities = np.array([[0.1, 0.2, 0.5, 0.5], [0.3, 0.8, 0.5, 0.5], [0.2, 0.6, 0.5, 0.5]])
        metrics = objective_metrics(probabilities, labels, ["swt", "vtr", "wtr", "ltr"])
        assert metrics["swt_auc"] == 0.5
        assert metrics["vtr_auc"] == 1.0 and metrics["vtr_calibration_error"] == pytest.approx(0.0)
        assert metrics["swt_log_loss"] == pytest.approx(-(math.log(0.9) + math.log(0.7) + math.log(0.2)) / 3)
        assert metrics["swt_calibration_error"] == pytest.approx((0.1 + 0.3 + 0.8) / 3)
        assert "wtr_auc" not in metrics and not any(name.startswith("ltr") for name in metrics)

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans()), min_size=1, max_size=40))
    def test_group_auc_against_sklearn(self, cases):
        groups, scores, positive = (np.array(values) for values in zip(*cases, strict=True))
        parts = [(np.flatnonzero(groups == group)) for group in np.unique(groups)]
        parts = [part for part in parts if 0 < positive[part].sum() < len(part)]
        expected = [roc_auc_score(positive[part], scores[part]) for part in parts]
        actual = group_auc(scores, positive, groups)
        if not parts:
            assert actual is None
        else:
            assert actual == pytest.approx(np.average(expected, weights=[len(part) for part in parts]))

    def test_reliability_plot_is_a_png(self, tmp_path):
        rng = np.random.default_rng(0)
        labels = rng.random((50, 2))
        labels[:, 1] = math.nan
        reliability_plot(rng.random((50, 2)), labels, ["swt", "vtr"], tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_user_half():
    ids = list(range(1000)) * 2
    halves = user_half(ids, seed=3)
    assert 400 < halves[:1000].sum() < 600
    assert np.array_equal(halves[:1000], halves[1000:])
    assert np.array_equal(user_half(ids[:10], seed=3), halves[:10])
    assert np.array_equal(user_half([str(user) for user in ids], seed=3), halves)
    assert not np.array_equal(user_half(ids, seed=4), halves)
    assert set(user_fold(ids, 10)) == set(range(10))
