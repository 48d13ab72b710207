"""From tables in memory to trained models: the same rows as the recipes' files give."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from onerec_hf import (
    DataArguments,
    DataError,
    Feed,
    ItemTrie,
    OneRecConfig,
    OneRecDPOConfig,
    OneRecDPOTrainer,
    OneRecForConditionalGeneration,
    OneRecPretrainer,
    OneRecRewardTrainer,
    OneRecTokenizer,
    PreferenceSampling,
    Recommender,
    SessionScorer,
    create_reward_model,
    feed_from_log,
    index_sessions,
    sample_preferences,
    share_histories,
)
from onerec_hf.data import pretraining_sessions, read_table

USERS, ITEMS, SIZES = 40, 12, {"history_items": 6, "session_items": 2}
COLUMNS = {"user_id": "who", "item_id": "what", "timestamp": "when"}


class ArrowStream:
    """All that is asked of a table of polars."""

    def __init__(self, frame: pd.DataFrame):
        self.table = pa.Table.from_pandas(frame, preserve_index=False)

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


KINDS = {
    "pandas": lambda frame: frame,
    "polars": ArrowStream,
    "datasets": lambda frame: Dataset.from_pandas(frame, preserve_index=False),
}


@pytest.fixture(scope="module")
def log() -> pd.DataFrame:
    """Rows in no order; a request is not always known."""
    random = np.random.default_rng(0)
    users = np.repeat(np.arange(USERS), 10)
    frame = pd.DataFrame(
        {
            "who": users,
            "what": [f"item {item}" for item in random.integers(0, ITEMS, len(users))],
            "when": pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(len(users)), "min"),
            "liked": random.random(len(users)) < 0.7,
            "ms": random.integers(1, 9, len(users)) * 1000,
            "session_id": pd.array([None if place % 7 == 0 else place // 5 for place in range(len(users))], "Int64"),
        }
    )
    return frame.sample(frac=1.0, random_state=0)


@pytest.fixture(scope="module")
def items() -> pd.DataFrame:
    return pd.DataFrame({"what": [f"item {item}" for item in range(ITEMS)], "shelf": np.arange(ITEMS) % 3})


def feed_of(log, items) -> Feed:
    feedback = {"like": "liked", "watch_time": {"column": "ms", "scale": 0.001}}
    options = {"feedback": feedback, "positive_feedback": ["like"], "item_columns": {"categorical": ["shelf"]}}
    return feed_from_log(log, items, **COLUMNS, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_gives_the_feed_that_its_file_gives(kind, log, items, tmp_path):
    log.to_parquet(tmp_path / "log.parquet")
    items.to_parquet(tmp_path / "items.parquet")
    (tmp_path / "mapping.yaml").write_text(
        "interactions:\n  file: log.parquet\n"
        "  columns: {user_id: who, item_id: what, timestamp: when, session_id: session_id}\n"
        "  feedback: {like: liked, watch_time: {column: ms, scale: 0.001}}\n"
        "items: {file: items.parquet, columns: {item_id: what}, categorical: [shelf]}\n"
        "positive_feedback: [like]\n"
    )
    wanted = read_table(tmp_path, tmp_path / "mapping.yaml")
    found = feed_of(KINDS[kind](log), KINDS[kind](items))
    assert found.interactions["session_id"].isna().sum() == (log["session_id"].isna()).sum() > 0
    pd.testing.assert_frame_equal(found.interactions, wanted.interactions)
    pd.testing.assert_frame_equal(found.items, wanted.items)
    assert found.positive_feedback == wanted.positive_feedback and found.item_roles() == wanted.item_roles()


def test_what_a_log_has_by_the_names_of_the_schema_is_read(log, items):
    renamed = log.rename(columns={"who": "user_id", "what": "item_id", "when": "timestamp", "liked": "like"})
    feed = feed_from_log(renamed, users=pd.DataFrame({"user_id": range(USERS), "group": [1, 2] * (USERS // 2)}))
    assert feed.interactions.columns.tolist() == [
        *("user_id", "item_id", "timestamp", "position", "session_id", "like")
    ]
    assert feed.users["group"].tolist() == ["1", "2"] * (USERS // 2)
    assert feed.items["item_id"].tolist() == log["what"].drop_duplicates().tolist()
    # Without times the rows have places.
    placed = feed_from_log(renamed.drop(columns="timestamp").assign(position=range(len(log))))
    first = log["who"] == 7
    assert placed.interactions.query("user_id == 7")["item_id"].tolist() == log["what"][first].tolist()


def test_positive_histories():
    rows = [(2, "a", 3, 1), (2, "b", 1, 1), (2, "c", 2, 0), (1, "c", 1, 0), (3, "c", 1, 1)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "like"])
    feed = feed_from_log(log, positive_feedback=["like"])
    assert [history.tolist() for history in feed.positive_histories()] == [[1, 0], [2]]
    assert feed_from_log(log, positive_feedback=["like>=2"]).positive_histories() == []


def test_columns_as_frames_have_them():
    """Codes of categories, and text that Arrow has as views, in lists too."""
    log = pd.DataFrame({"user_id": [1, 2], "item_id": ["a", "b"], "timestamp": [1, 2]}, index=[7, 7])
    tags = pa.array([["x", "y"], None], pa.large_list(pa.string_view()))
    items = pa.table({"item_id": pa.array(["a", "b"], pa.string_view()), "tags": tags})
    feed = feed_from_log(log.astype("category"), items, item_columns={"multi_categorical": ["tags"]})
    pd.testing.assert_frame_equal(feed.interactions, feed_from_log(log).interactions)
    arrow = pa.Table.from_pandas(log.astype("category"), preserve_index=False)
    pd.testing.assert_frame_equal(feed_from_log(arrow).interactions, feed.interactions)
    assert feed.items["tags"].tolist() == [["x", "y"], []]
    twice = log[["user_id", "item_id", "timestamp", "user_id"]]
    for table in (twice, pa.Table.from_arrays([pa.array([1])] * 2, ["user_id"] * 2)):
        with pytest.raises(DataError, match="log: column 'user_id' stands there several times"):
            feed_from_log(table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "log: column 'user_id' is missing; the columns are who, what, .* to feed_from_log as user_id="),
        ({**COLUMNS, "timestamp": "day"}, "log: column 'day' is missing; .* as timestamp="),
        ({**COLUMNS, "feedback": ["stars"]}, "log: column 'stars' is missing; .* as feedback="),
        ({**COLUMNS, "feedback": "liked"}, r"feedback is 'liked', where a list is needed. Pass \['liked'\]"),
        ({**COLUMNS, "positive_feedback": ["like"]}, "there is no feedback column 'like'"),
        ({**COLUMNS, "item_columns": {"text": "title"}}, "item_columns are columns of items, which is not given"),
        ({**COLUMNS, "items": pd.DataFrame({"id": ["a"]})}, "items: column 'what' is missing; .* as item_id="),
        ({**COLUMNS, "item_columns": {"titel": "a"}, "items": pd.DataFrame({"what": []})}, "unknown key 'titel'"),
        ({**COLUMNS, "users": [1]}, "users: a list is no table in memory"),
    ],
)
def test_wrong_tables_are_refused_with_what_to_pass(log, options, message):
    with pytest.raises(DataError, match=message):
        feed_from_log(log, **options)


def test_every_stage_takes_the_log(log, items, tmp_path):
    quiet = {"output_dir": str(tmp_path), "max_steps": 2, "save_strategy": "no", "report_to": "none"}
    quiet |= {"disable_tqdm": True, "dataloader_pin_memory": False}
    feed = feed_of(log, items)
    tokenizer = OneRecTokenizer.fit(feed)
    assert tokenizer.item_ids.tolist() == items["what"].tolist() and tokenizer.codebook_sizes == (4, 4, 4)
    torch.manual_seed(0)
    config = OneRecConfig.from_preset("debug", codebook_sizes=tokenizer.codebook_sizes, **SIZES)
    model = OneRecForConditionalGeneration(config)
    sessions = index_sessions(pretraining_sessions(feed.interactions, feed, DataArguments(**SIZES)), tokenizer)
    trainer = OneRecPretrainer(model, Seq2SeqTrainingArguments(**quiet), feed, tokenizer, eval_dataset=feed)
    assert trainer.train_dataset.to_list() == trainer.eval_dataset.to_list() == sessions.to_list()
    trainer.train()
    assert config.catalogue_fingerprint == tokenizer.catalogue_fingerprint()
    # A causal encoder reads a history once for all of its sessions.
    causal = {"encoder_attention": "causal", "history_positions": "item", "item_head": "encoder", "num_items": ITEMS}
    config = OneRecConfig.from_preset("debug", codebook_sizes=tokenizer.codebook_sizes, **causal, **SIZES)
    args = Seq2SeqTrainingArguments(**quiet, per_device_train_batch_size=8)
    trainer = OneRecPretrainer(OneRecForConditionalGeneration(config), args, feed, tokenizer)
    assert trainer.train_dataset.to_list() == share_histories(sessions, 6, targets_per_row=8).to_list()
    assert (trainer.args.per_device_train_batch_size, args.per_device_train_batch_size) == (1, 8)
    trainer.train()
    # A raw table's names are the schema's, and all of its rows are positive.
    raw = ArrowStream(log.rename(columns={"who": "user_id", "what": "item_id", "when": "timestamp"}))
    trainer = OneRecPretrainer(model, Seq2SeqTrainingArguments(**quiet), raw, tokenizer)
    whole = feed_from_log(log, **COLUMNS)
    every = index_sessions(pretraining_sessions(whole.interactions, whole, DataArguments(**SIZES)), tokenizer)
    assert len(every) > len(sessions) and trainer.train_dataset.to_list() == every.to_list()

    with pytest.raises(ValueError, match="'swt' .* needs the feedback column 'duration'.*Give the model `objectives`"):
        create_reward_model(SIZES, feed, tokenizer)
    reward_model = create_reward_model({**SIZES, "hidden_size": 16, "objectives": ["ltr"]}, feed, tokenizer)
    trainer = OneRecRewardTrainer(reward_model, TrainingArguments(**quiet), feed, tokenizer)
    parts = [set(part["user_id"][:]) for part in (trainer.train_dataset, trainer.calibration_dataset)]
    assert parts[0] | parts[1] == set(range(USERS)) and not parts[0] & parts[1] and len(parts[1]) < len(parts[0]) / 3
    trainer.train()
    scorer = SessionScorer(reward_model, tokenizer)
    # Which untrained towers have from their base rates and the calibration.
    assert reward_model.config.objective_means[0] == pytest.approx(0.7, abs=0.15)

    trie, sampling = ItemTrie.from_tokenizer(tokenizer), PreferenceSampling(r_dpo=0.2, num_candidates=4)
    pairs = sample_preferences(model, trie, scorer, feed, sampling, show_progress=False)
    assert 0 < len(pairs) <= 0.2 * USERS
    liked = log[log["liked"]].sort_values("when").groupby("who")["what"].agg(list)
    row = pairs[0]
    assert tokenizer.item_ids[row["history"]].tolist() == liked[row["user_id"]]
    args = OneRecDPOConfig(**quiet)
    trainer = OneRecDPOTrainer(model, args, pairs, tokenizer, ntp_dataset=feed)
    assert trainer.data_collator.ntp_dataset.to_list() == sessions.to_list()
    trainer.train()

    # Of a feed the positive behaviours are read, and with them what the reward model knows.
    table = Recommender(model, tokenizer).predict_df(feed, top_k=3, exclude_consumed=False)
    of_rows = Recommender(model, tokenizer).predict_df(
        ArrowStream(log[log["liked"]]), top_k=3, exclude_consumed=False, **COLUMNS
    )
    pd.testing.assert_frame_equal(table, of_rows.rename(columns={"who": "user_id", "what": "item_id"}))
    guided = Recommender(model, tokenizer, scorer).predict_df(feed, search="guided_beam", exclude_consumed=False)
    assert guided["user_id"].nunique() == len(liked)


def test_a_model_of_other_codes_is_not_trained(log, items, tmp_path):
    tokenizer = OneRecTokenizer.fit(feed_of(log, items))
    model = OneRecForConditionalGeneration(OneRecConfig.from_preset("debug"))
    with pytest.raises(ValueError, match=r"codebook_sizes are \[8, 8, 8\] and the tokenizer's \[4, 4, 4\]"):
        OneRecPretrainer(model, Seq2SeqTrainingArguments(str(tmp_path), report_to="none"), None, tokenizer)
