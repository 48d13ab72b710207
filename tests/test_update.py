"""Going on from the run of an earlier period: its catalogue, semantic IDs, sessions and models."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from onerec_hf import stages
from onerec_hf.data import DataArguments, DataError, Feed, exposure_runs, load_saved_feed, pretraining_sessions
from onerec_hf.data.sessions import trained_on
from onerec_hf.item_embeddings import in_earlier_space
from onerec_hf.reward import OneRecRewardModel, create_reward_model
from onerec_hf.reward.exposure_encoding import ItemFeatures
from onerec_hf.stages import parse_recipe_arguments, run_data, run_pretrain, run_reward, run_tokenize, run_update
from onerec_hf.stages.data_stage import EVALUATION_CASES, PRETRAINING_SESSIONS, USER_HISTORIES, PreparedData
from onerec_hf.stages.stage_runner import read_json
from onerec_hf.tokenization_onerec import OneRecTokenizer

DAY, START = 86400.0, 1.7e9  # 2023-11-14T22:13:20Z
SINCE = "2023-11-20T22:13:20+00:00"  # the sixth day
CONFIG = Path(__file__).parents[1] / "recipes" / "quickstart" / "debug.yaml"
MAPPING = """
name: daily
interactions:
  file: log.csv
  columns: {user_id: user, item_id: item, timestamp: time}
  feedback: {watch_time: seen, duration: length, like: like}
items:
  file: items.csv
  columns: {item_id: item}
  categorical: [genre]
"""


def daily_log() -> tuple[pd.DataFrame, pd.DataFrame]:
    """10 days of 60 items and 10 that come later; of the genres two are first seen then."""
    random = np.random.default_rng(0)
    time = np.sort(random.uniform(0, 10, 1500))
    born = np.r_[np.zeros(60), np.linspace(6.0, 9.0, 10)]
    items = [random.choice(np.flatnonzero(born <= now)) for now in time]
    log = {"user": random.integers(0, 40, len(time)), "item": [f"i{item:02d}" for item in items]}
    log |= {"time": (START + time * DAY).astype(int), "seen": random.integers(1, 60, len(time)), "length": 60}
    genres = [f"g{item % 4}" if item < 60 else f"a{item % 2}" for item in range(70)]
    catalogue = pd.DataFrame({"item": [f"i{item:02d}" for item in range(70)], "genre": genres})
    return pd.DataFrame(log | {"like": random.integers(0, 2, len(time))}), catalogue


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The log as of the end of the seventh day in `before`, the whole one in `now`, of which one old item is gone."""
    folder = tmp_path_factory.mktemp("daily")
    log, items = daily_log()
    (folder / "mapping.yaml").write_text(MAPPING)
    for name, days in (("before", 7), ("now", 11)):
        (folder / name).mkdir()
        part = log[log["time"] < START + days * DAY]
        part.to_csv(folder / name / "log.csv", index=False)
        items[items["item"].isin(part["item"])].to_csv(folder / name / "items.csv", index=False)
    return folder


def arguments(folder: Path, data: str, run: str, *flags: str):
    objectives = '{"objectives": ["swt", "ltr"], "hidden_size": 16, "tower_hidden_size": 16}'
    model = '{"encoder_attention": "causal", "encoder_positions": "distance", "item_head": "encoder"}'
    options = {"config": CONFIG, "dataset": "table", "data_dir": folder / data, "output_dir": folder / run}
    options |= {"column_mapping": folder / "mapping.yaml", "session_cut": "consecutive", "model": model}
    options |= {"reward_model": objectives, "judge_model": objectives, "behaviour_dim": 4}
    training = '{"max_steps": 2, "per_device_train_batch_size": 16, "learning_rate": 0.01}'
    options |= {"pretrain": training, "reward": training, "pretrain_recent": '{"max_steps": 1}'}
    return parse_recipe_arguments([*(str(part) for name in options for part in (f"--{name}", options[name])), *flags])


def updated(folder: Path, run: str = "monday", *flags: str):
    """Options of the second run, in which models stay as they were."""
    still = ("--pretrain_update", '{"learning_rate": 0, "max_steps": 1}', "--reward_update", '{"learning_rate": 0}')
    since = ("--previous_run", str(folder / "sunday"), "--test_start", "2023-11-23T00:00+00:00")
    return arguments(folder, "now", run, *since, *still, *flags)


@pytest.fixture(scope="module")
def runs(folder) -> tuple[Path, Path]:
    """Two runs up to their reward models, the second of which goes on from the first."""
    threads = torch.get_num_threads()
    for begin in (lambda: arguments(folder, "before", "sunday", "--test_start", SINCE), lambda: updated(folder)):
        args = begin()  # reads what the run before has written
        for stage in (run_tokenize, run_pretrain, run_reward):
            stage(args)
    torch.set_num_threads(threads)
    return folder / "sunday", folder / "monday"


def test_items_keep_their_places_and_semantic_ids_and_new_ones_follow(runs):
    before, now = (OneRecTokenizer.from_pretrained(run / "tokenize") for run in runs)
    known = before.num_items
    assert now.num_items > known
    assert now.item_ids[:known].tolist() == before.item_ids.tolist()
    np.testing.assert_array_equal(now.codes[:known], before.codes)
    assert len(np.unique(now.codes, axis=0)) == now.num_items
    assert load_saved_feed(runs[1] / "data" / "feed").items["item_id"].tolist() == now.item_ids.tolist()
    former, current = (load_file(run / "tokenize" / "item_embeddings.safetensors") for run in runs)
    for name in ("embeddings", "content"):
        assert len(current[name]) == now.num_items
        torch.testing.assert_close(current[name][:known], former[name])
    assert read_json(runs[1] / "tokenize" / "stage.json")["refit_reasons"] == []


def test_the_generator_goes_on_with_a_vector_for_every_new_item(runs):
    before, now = (load_file(run / "pretrain" / "model" / "model.safetensors") for run in runs)
    known, num_items = (len(OneRecTokenizer.from_pretrained(run / "tokenize").item_ids) for run in runs)
    grown = {name for name in before if len(before[name]) != len(now[name])}
    assert grown and all(len(now[name]) == num_items and len(before[name]) == known for name in grown)
    for name, weights in before.items():
        if name.endswith("expert_bias"):  # moves with the experts' load, whatever the rate
            continue
        torch.testing.assert_close(now[name][: len(weights)], weights, msg=name)
    # And trains on what came since: with a rate of 0 it sees no more than that and as much of before.
    sessions = read_json(runs[1] / "data" / "stage.json")["dataset"]["num_pretraining_sessions"]
    assert 0 < sessions < read_json(runs[0] / "data" / "stage.json")["dataset"]["num_pretraining_sessions"] * 2


def test_the_reward_models_go_on_too(runs):
    for name in ("reward_model", "independent_judge"):
        before, now = (OneRecRewardModel.from_pretrained(run / "reward" / name) for run in runs)
        kept = {key: value for key, value in before.state_dict().items() if key.startswith(("towers", "layers"))}
        for key, value in kept.items():
            torch.testing.assert_close(now.state_dict()[key], value)
        assert now.config.num_items > before.config.num_items
        assert now.config.num_item_values > before.config.num_item_values  # of genres


def test_an_update_in_partitions_is_the_one_in_memory(folder, runs):
    pytest.importorskip("duckdb", reason="partitions need DuckDB")
    replay = ("--replay_share", "1", "--replay_days", "3")
    memory, parts = updated(folder, "memory", *replay), updated(folder, "parts", *replay, "--num_partitions", "3")
    run_data(memory)
    for stage in (run_tokenize, run_pretrain, run_reward):
        stage(parts)
    whole, parted = (PreparedData(args.output_dir / "data", args.group(DataArguments)) for args in (memory, parts))
    rows = {name: whole.read(name).to_list() for name in (PRETRAINING_SESSIONS, USER_HISTORIES, EVALUATION_CASES)}
    assert all(rows.values()) and {name: parted.read(name).to_list() for name in rows} == rows
    assert parted.feed.items.equals(whole.feed.items)
    tokenizer = OneRecTokenizer.from_pretrained(runs[0] / "tokenize")
    assert parted.feed.items["item_id"].tolist()[: tokenizer.num_items] == tokenizer.item_ids.tolist()
    trained = read_json(parts.output_dir / "pretrain" / "stage.json")["num_sessions"]
    assert 0 < trained <= len(rows[PRETRAINING_SESSIONS])
    drawn = arguments(folder, "now", "drawn", "--num_partitions", "3", "--update_since", SINCE, "--replay_share", "1")
    with pytest.raises(ValueError, match="num_partitions=3 does not go with replay_share=0.5, which is drawn"):
        replace(drawn, replay_share=0.5)


def test_what_cannot_go_on_is_refused(folder, runs):
    with pytest.raises(FileNotFoundError, match="previous_run is .*nowhere, which has no complete stage 'data'"):
        updated(folder, "tuesday", "--previous_run", str(folder / "nowhere"))
    with pytest.raises(ValueError, match="codebook_sizes is .*16.*, and .*8.* in .*sunday"):
        run_tokenize(updated(folder, "tuesday", "--codebook_sizes", "16", "16", "16"))
    with pytest.raises(ValueError, match="preset is 'small', and 'debug' in .*sunday"):
        run_pretrain(updated(folder, "monday", "--preset", "small"))
    with pytest.raises(ValueError, match="update needs previous_run"):
        run_update(arguments(folder, "now", "tuesday"))
    with pytest.raises(ValueError, match="update_starts must be in order, got 2023-11-22, 2023-11-21"):
        run_update(arguments(folder, "now", "week", "--update_starts", "2023-11-22", "2023-11-21"))


def test_a_run_for_each_period_goes_on_from_the_one_before(folder, runs, monkeypatch):
    started = []
    monkeypatch.setattr(stages, "run_pipeline", lambda args: (started.append(args), run_data(args)))
    run_update(arguments(folder, "now", "week", "--update_starts", "2023-11-21T00:00", "2023-11-22", "2023-11-23"))
    names = ["2023-11-21T0000", "2023-11-22", "2023-11-23"]
    assert [args.output_dir for args in started] == [folder / "week" / name for name in names]
    assert [args.previous_run for args in started] == [None, *(str(args.output_dir) for args in started[:2])]
    splits = [read_json(args.output_dir / "data" / "stage.json")["dataset"]["split"] for args in started]
    bounds = [(split["evaluation_start"][:10], (split["evaluation_end"] or "")[:10]) for split in splits]
    assert bounds == [("2023-11-21", "2023-11-22"), ("2023-11-22", "2023-11-23"), ("2023-11-23", "")]
    assert [args.update_since for args in started] == [None, *(split["evaluation_start"] for split in splits[:2])]
    assert started[0].recent_days and [args.replay_days for args in started[1:]] == [started[0].recent_days] * 2


def test_sessions_and_runs_of_an_update(folder):
    feed = load_saved_feed(folder / "sunday" / "data" / "feed")
    log, args = feed.interactions, DataArguments(min_history_items=1, session_items=3, history_items=6)
    since = "2023-11-20T00:00+00:00"
    boundary = pd.Timestamp(since).timestamp()

    def ends(update: DataArguments) -> tuple[list, list]:
        """Latest times of sessions, in which a user's behaviours follow one another, and of runs."""
        by_user = log.groupby("user_id")["timestamp"].apply(np.array)
        sessions = pretraining_sessions(log, feed, update).to_list()
        runs = exposure_runs(log, feed, update).to_list()
        places = [by_user[row["user_id"]].searchsorted(row["timestamp"]) for row in sessions]
        latest = [place + len(row["session_item_ids"]) - 1 for place, row in zip(places, sessions, strict=True)]
        return (
            [by_user[row["user_id"]][place] for place, row in zip(latest, sessions, strict=True)],
            [row["exposed_timestamps"][-1] for row in runs],
        )

    everything = ends(args)
    for share, parts in ((0.0, 1), (0.5, 2)):
        update = replace(args, update_since=since, replay_share=share)
        for all_of, chosen in zip(everything, ends(update), strict=True):
            new = [end for end in all_of if end >= boundary]
            assert 0 < len(chosen) == min(parts * len(new), len(all_of))
            assert len(new) < len(all_of)
            assert sorted(end for end in chosen if end >= boundary) == sorted(new)
    none_later = replace(args, update_since="2024-11-20")
    with pytest.raises(DataError, match="update_since=2024-11-20"):
        pretraining_sessions(log, feed, none_later)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 100) | st.just(math.nan), max_size=30),
    st.floats(0, 0.9) | st.just(1.0),
    st.none() | st.floats(1, 120),
    st.integers(0, 5),
)
def test_all_that_came_since_is_trained_on_with_a_share_of_before(times, share, seconds, seed):
    times = np.array(times)
    days = None if seconds is None else seconds / DAY
    args = DataArguments(
        update_since="1970-01-01T00:00:50+00:00", replay_share=share, replay_days=days, data_seed=seed
    )
    chosen = trained_on(times, args, "UTC")
    new = times >= 50
    assert chosen[new].all()
    earlier = ~new if days is None else ~new & (times >= 50 - days * DAY)
    wanted = len(times) if share == 1 else round(new.sum() * share / (1 - share))
    assert (chosen & earlier).sum() == min(wanted, earlier.sum())
    assert not (chosen & ~new & ~earlier).any()
    assert trained_on(times, replace(args, update_since=None), "UTC").all()


def test_a_catalogue_begins_with_the_earlier_one():
    def feed(items: list) -> Feed:
        log = pd.DataFrame({"user_id": [1, *[2] * (len(items) - 1)], "item_id": items, "timestamp": 1.0})
        catalogue = pd.DataFrame({"item_id": items, "kind": [f"now {item}" for item in items]})
        return Feed.from_frames("f", [(log, "log")], (catalogue, "items"), [], categorical_columns=["kind"])

    earlier = feed([7, 3, 5]).items.assign(kind=["then 7", "then 3", "then 5"])
    items = feed([1, 3, 7]).with_earlier_items(earlier).items
    assert items["item_id"].tolist() == [7, 3, 5, 1]
    assert items["kind"].tolist() == ["now 7", "now 3", "then 5", "now 1"]
    with pytest.raises(DataError, match="the ids of the items are string, and were int64"):
        feed(["a", "b"]).with_earlier_items(earlier)


def test_embeddings_that_were_turned_are_turned_back():
    random = np.random.default_rng(0)
    before = random.normal(size=(20, 3)).astype(np.float32)
    turn = np.linalg.qr(random.normal(size=(4, 4)))[0][:3]
    now = in_earlier_space(before[:15], before @ turn + 0.5)
    np.testing.assert_array_equal(now[:15], before[:15])
    np.testing.assert_allclose(now, before, atol=1e-5)
    assert in_earlier_space(before[:, :0], np.zeros((25, 0), np.float32)).shape == (25, 0)


def test_a_value_of_a_feature_keeps_what_was_learned_of_it(folder, runs):
    """Also under another number: the earlier catalogue has no item of some genres."""
    before, now = (OneRecRewardModel.from_pretrained(run / "reward" / "reward_model") for run in runs)
    name = next(name for name in before.state_dict() if name.endswith("feature_embeddings.embeddings.weight"))
    features = [ItemFeatures.of_feed(load_saved_feed(run / "data" / "feed")) for run in runs]
    embeddings = [model.state_dict()[name] for model in (before, now)]
    known = before.config.num_items
    old, new = (torch.from_numpy(found.values[:known, 0]) for found in features)
    assert (old[old > 0] > 0).any() and len(embeddings[1]) > len(embeddings[0])
    torch.testing.assert_close(embeddings[1][new[old > 0]], embeddings[0][old[old > 0]])


def test_a_reward_model_of_other_feedback_is_refused(runs):
    feed, tokenizer = load_saved_feed(runs[0] / "data" / "feed"), OneRecTokenizer.from_pretrained(runs[0] / "tokenize")
    former = OneRecRewardModel.from_pretrained(runs[0] / "reward" / "reward_model")
    other = replace(feed, interactions=feed.interactions.drop(columns="like"))
    fields = {"objectives": ["swt"], "hidden_size": 16, "tower_hidden_size": 16}
    with pytest.raises(ValueError, match="feedback is .* in this log, and .*like.* in the reward model"):
        create_reward_model(fields, other, tokenizer, former=former)
