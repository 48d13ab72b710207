"""Readers: KuaiRand in both forms, Amazon-style sequences, mapped tables, Hub data sets, saved feeds."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from onerec_hf.data import (
    DataArguments,
    DataError,
    evaluation_cases,
    load_feed,
    load_saved_feed,
    pretraining_sessions,
    read_amazon,
    read_hub_dataset,
    read_kuairand,
    read_table,
    save_feed,
    split_feed,
)
from onerec_hf.data.readers import KUAIRAND_USER_COLUMNS
from onerec_hf.data.schema import feedback_columns

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
KUAIRAND, AMAZON = SHARED_DATA / "kuairand_pure", SHARED_DATA / "amazon_beauty"
FLAGS = ["click", "like", "follow", "comment", "forward", "hate", "profile_enter"]


def assert_same_feed(one, other):
    pd.testing.assert_frame_equal(one.interactions, other.interactions)
    assert one.items.columns.tolist() == other.items.columns.tolist()
    for column in one.items:
        for left, right in zip(one.items[column], other.items[column], strict=True):
            assert np.array_equal(left, right) or (np.all(pd.isna(left)) and np.all(pd.isna(right)))
    assert (one.users is None) == (other.users is None)
    if one.users is not None:
        pd.testing.assert_frame_equal(one.users, other.users)
    assert one.item_roles() == other.item_roles() and one.positive_feedback == other.positive_feedback


@pytest.fixture
def kuairand_frames():
    rng = np.random.default_rng(0)
    rows = 40
    log = pd.DataFrame({"user_id": rng.integers(0, 4, rows), "item_id": rng.integers(0, 9, rows)})
    log["time_ms"] = 1650000000000 + rng.permutation(rows) * 3_600_500
    log = log.assign(**{f"is_{flag}": rng.integers(0, 2, rows) for flag in FLAGS})
    log["long_view"] = rng.integers(0, 2, rows)
    log["play_time_ms"], log["duration_ms"] = rng.integers(0, 9000, rows), 8000
    items = pd.DataFrame({"item_id": np.arange(9), "author_id": 5, "video_type": "NORMAL", "upload_type": "Web"})
    items["music_type"], items["tag"] = [4.0, np.nan, 9.0] * 3, ["1", "20,43", None] * 3
    items["video_duration"] = 8000.0
    return log, items


def test_kuairand_csv_and_parquet_give_the_same_feed(kuairand_frames, tmp_path):
    log, items = kuairand_frames
    parquet, csv = tmp_path / "parquet", tmp_path / "csv"
    parquet.mkdir(), csv.mkdir()
    log.to_parquet(parquet / "interactions.parquet")
    items.to_parquet(parquet / "items.parquet")
    official = log.rename(columns={"item_id": "video_id"})
    official[20:].to_csv(csv / "log_standard_4_08_to_4_21_pure.csv", index=False)
    official[:20].to_csv(csv / "log_standard_4_22_to_5_08_pure.csv", index=False)
    items.rename(columns={"item_id": "video_id"}).to_csv(csv / "video_features_basic_pure.csv", index=False)
    users = pd.DataFrame({"user_id": np.arange(4)}).assign(**{name: [1, 2, 2, 3] for name in KUAIRAND_USER_COLUMNS})
    users["onehot_feat4"] = [1.0, np.nan, 2.0, 1.0]
    users.to_parquet(parquet / "users.parquet")
    users.to_csv(csv / "user_features_pure.csv", index=False)
    feed = read_kuairand(csv)
    assert_same_feed(feed, read_kuairand(parquet))
    assert feed.interactions["duration"].eq(8).all() and feed.items["tag"].tolist()[:3] == [["1"], ["20", "43"], []]
    assert feed.items["music_type"].tolist()[0] == "4"
    assert feed.users["onehot_feat4"].isna().tolist() == [False, True, False, False]
    assert feed.users["onehot_feat4"][0] == "1" and feed.users["user_id"].tolist() == [0, 1, 2, 3]


def test_kuairand_knows_the_chances_of_its_random_exposures(kuairand_frames, tmp_path):
    log, items = kuairand_frames
    official = log.rename(columns={"item_id": "video_id"})
    official[10:].to_csv(tmp_path / "log_standard_4_22_to_5_08_pure.csv", index=False)
    drawn = official[:10].assign(video_id=[2, 4, 6, 8, 0] * 2)
    drawn.to_csv(tmp_path / "log_random_4_22_to_5_08_pure.csv", index=False)
    items.rename(columns={"item_id": "video_id"}).to_csv(tmp_path / "video_features_basic_pure.csv", index=False)
    feed = read_kuairand(tmp_path)
    random = feed.interactions[feed.interactions["propensity"].notna()]
    assert (random["propensity"] == 1 / 5).all() and sorted(random["timestamp"]) == sorted(drawn["time_ms"] / 1000)
    assert len(feed.interactions) == 40 and "propensity" not in feedback_columns(feed.interactions)
    save_feed(feed, tmp_path / "saved")
    assert_same_feed(load_saved_feed(tmp_path / "saved"), feed)


def test_a_mapped_propensity_is_checked(tmp_path):
    log = pd.DataFrame({"u": [1, 1, 2], "i": [1, 2, 1], "t": [1.0, 2.0, 3.0], "p": [0.5, None, 1.0]})
    log.to_csv(tmp_path / "log.csv", index=False)
    columns = {"user_id": "u", "item_id": "i", "timestamp": "t", "propensity": "p"}
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(yaml.safe_dump({"interactions": {"file": "log.csv", "columns": columns}}))
    np.testing.assert_array_equal(read_table(tmp_path, mapping).interactions["propensity"], [0.5, np.nan, 1.0])
    log.assign(p=[0.5, 0.0, 1.0]).to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(DataError, match=r"'propensity' is outside \(0, 1\], first at row 1"):
        read_table(tmp_path, mapping)


def test_kuairand_history_goes_before_the_log(kuairand_frames, tmp_path):
    log, items = kuairand_frames
    history = pd.DataFrame({"user_id": [1, 1, 8], "position": [1, 0, 0], "item_id": [3, 4, 5]})
    history = history.assign(long_view=[0, 1, 1], is_like=[1, 0, 0])
    for name, frame in (("interactions", log), ("items", items), ("history", history)):
        frame.to_parquet(tmp_path / f"{name}.parquet")
    rows = read_kuairand(tmp_path).interactions
    first = rows[rows["user_id"] == 1].head(3)
    assert first["item_id"].tolist()[:2] == [4, 3] and first["timestamp"].isna().tolist() == [True, True, False]
    assert first["like"].tolist()[:2] == [0, 1] and first["follow"].isna().tolist() == [True, True, False]


def test_kuairand_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="log_standard_"):
        read_kuairand(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read_kuairand(tmp_path / "absent")


@pytest.mark.skipif(not KUAIRAND.is_dir(), reason="KuaiRand is not beside this repository")
def test_kuairand_test_users():
    feed = read_kuairand(KUAIRAND)
    args = DataArguments(test_start="2022-05-07T00:00+08:00", min_history_items=3)
    split = split_feed(feed, args)
    # By the data's own `date`, which runs some minutes ahead of the times, there would be 5,378.
    assert len(evaluation_cases(split, feed, args)) == 5363
    assert len(pretraining_sessions(split.fit, feed, DataArguments(session_stride=1))) > 290_000


@pytest.mark.skipif(not AMAZON.is_dir(), reason="Amazon Beauty is not beside this repository")
@pytest.mark.filterwarnings("ignore:leave-one-out")
def test_amazon_leave_one_out():
    feed = read_amazon(AMAZON)
    assert feed.positive_feedback == [] and feed.items["title"].isna().sum() == 7
    args = DataArguments(split_method="leave_one_out")
    split = split_feed(feed, args)
    cases = evaluation_cases(split, feed, args)
    source = pd.read_parquet(AMAZON / "interactions.parquet").sort_values(["user_id", "position"])
    assert cases["next_item_id"][:] == source.groupby("user_id")["item_id"].last().tolist()


MAPPING = """
name: mine
timezone: Europe/Berlin
interactions:
  file: log/*.csv
  columns: {user_id: uid, item_id: video, timestamp: time, session_id: request}
  timestamp_unit: iso
  feedback:
    watch_time: {column: play_ms, scale: 0.001}
    stars: stars
items:
  file: videos.parquet
  columns: {item_id: video}
  text: title
  multi_categorical: [tags]
  embedding: vector
  image: cover
users:
  file: people.csv
  columns: {user_id: uid}
  categorical: [country]
positive_feedback: ["stars>=4"]
"""


@pytest.fixture
def table(tmp_path):
    log = pd.DataFrame({"uid": ["u1", "u2", "u1"], "video": [5, 7, 7], "play_ms": [1500, 0, 300], "stars": [5, 4, 1]})
    log["time"] = ["2024-03-01T12:00:00+01:00", "2024-03-01T11:00:01Z", "2024-03-01T10:00:00Z"]
    log["request"] = [3, None, 2]
    (tmp_path / "log").mkdir()
    log[:2].to_csv(tmp_path / "log" / "a.csv", index=False)
    log[2:].to_csv(tmp_path / "log" / "b.csv", index=False)
    videos = pd.DataFrame({"video": [7, 5], "title": ["x", None], "tags": ["a,b", ""], "vector": [[0.0, 1], [2, 3]]})
    videos["cover"] = ["https://example.org/7.png", None]
    videos.to_parquet(tmp_path / "videos.parquet")
    people = pd.DataFrame({"uid": ["u2", "u3"], "country": ["no", None], "name": "unread"})
    people.to_csv(tmp_path / "people.csv", index=False)
    (tmp_path / "mapping.yaml").write_text(MAPPING)
    return tmp_path


def test_table_by_mapping(table):
    feed = load_feed(DataArguments(dataset="table", data_dir=str(table), column_mapping=str(table / "mapping.yaml")))
    rows = feed.interactions
    assert rows["user_id"].tolist() == ["u1", "u1", "u2"] and rows["item_id"].tolist() == [7, 5, 7]
    assert rows["timestamp"].tolist() == [1709287200, 1709290800, 1709290801]
    assert rows["watch_time"].tolist() == pytest.approx([0.3, 1.5, 0])
    assert rows["session_id"].isna().tolist() == [False, False, True]
    assert feed.items["item_id"].tolist() == [7, 5] and feed.items["tags"].tolist() == [["a", "b"], []]
    assert feed.items["cover"].fillna("-").tolist() == ["https://example.org/7.png", "-"]
    assert feed.users.columns.tolist() == ["user_id", "country"] and feed.users["user_id"].tolist() == ["u2", "u3"]
    assert feed.users["country"][0] == "no" and feed.users["country"].isna()[1]
    assert (feed.name, feed.timezone, feed.positive_feedback) == ("mine", "Europe/Berlin", ["stars>=4"])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("timestamp: time", "timestamp: tme", ["a.csv", "'tme'", "play_ms"]),
        ("timestamp: time", "moment: time", ["mapping.yaml", "'moment'", "timestamp"]),
        ("timestamp_unit: iso", "timestamp_unit: weeks", ["mapping.yaml", "weeks", "iso"]),
        ("timestamp_unit: iso", "timestamp_unit: s", ["a.csv", "row 0", "iso"]),
        ("  text: title", "  texts: title", ["mapping.yaml", "'texts'", "text"]),
        ("log/*.csv", "logs/*.csv", ["mapping.yaml", "logs/*.csv"]),
        ("{item_id: video}", "{}", ["mapping.yaml", "'items.columns'", "'item_id'"]),
        ("name: mine", "name: [", ["mapping.yaml", "YAML"]),
        ("[tags]", "tags", ["mapping.yaml", "items.multi_categorical", "list"]),
        ("{user_id: uid}\n  categorical", "{id: uid}\n  categorical", ["mapping.yaml", "'users.columns'", "user_id"]),
        ("[country]", "country", ["mapping.yaml", "users.categorical", "list"]),
        ("[country]", "[land]", ["people.csv", "'land'", "country"]),
        ("columns: {user_id: uid}", "columns: {user_id: name}", ["people.csv", "'user_id'", "one row per user"]),
        ("stars>=4", "stars=>4", ["stars=>4", "watch_time>=60"]),
    ],
)
def test_mapping_errors(table, old, new, expected):
    assert old in MAPPING
    (table / "mapping.yaml").write_text(MAPPING.replace(old, new))
    with pytest.raises(DataError) as error:
        read_table(table, table / "mapping.yaml")
    for part in expected:
        assert part in str(error.value)


def test_hub_dataset_by_mapping(tmp_path):
    # A local folder takes the same way through `datasets.load_dataset` as a repository.
    (tmp_path / "data").mkdir()
    frame = pd.DataFrame({"who": [1, 2, 2], "what": ["a", "b", "a"], "rank": [0, 0, 1]})
    frame.to_csv(tmp_path / "data" / "train.csv", index=False)
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text("interactions:\n  columns: {user_id: who, item_id: what, position: rank}\n")
    feed = read_hub_dataset(str(tmp_path / "data"), mapping)
    assert feed.interactions["item_id"].tolist() == ["a", "b", "a"] and feed.items["item_id"].tolist() == ["a", "b"]
    mapping.write_text("interactions:\n  columns: {user_id: who, item_id: video, position: rank}\n")
    with pytest.raises(DataError, match="'video' is missing"):
        read_hub_dataset(str(tmp_path / "data"), mapping)


def test_saved_feed_comes_back(table, tmp_path):
    feed = read_table(table, table / "mapping.yaml")
    for _ in range(2):  # the second replaces the first
        save_feed(feed, tmp_path / "saved" / "feed")
    assert_same_feed(feed, load_saved_feed(tmp_path / "saved" / "feed"))
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["feed"]
    with pytest.raises(DataError, match="feed.json"):
        load_saved_feed(tmp_path)


def test_a_mapping_of_text_without_a_header_with_events_and_unlisted_items(tmp_path):
    rows = ["u1|a|buy|05.03.2024", "u2|b|see|06.03.2024", "u2|c|see|07.03.2024"]
    (tmp_path / "log.txt").write_text("\n".join(rows) + "\n")
    (tmp_path / "items.json").write_text('{"id": "a", "tags": ["x"]}\n{"id": "b", "tags": []}\n')
    mapping = {
        "interactions": {
            "file": "log.txt",
            "delimiter": "|",
            "header": ["who", "what", "event", "day"],
            "columns": {"user_id": "who", "item_id": "what", "timestamp": "day"},
            "timestamp_unit": "%d.%m.%Y",
            "feedback": {"bought": {"column": "event", "equals": ["buy", "order"]}},
        },
        "items": {"file": "items.json", "columns": {"item_id": "id"}, "multi_categorical": ["tags"]},
    }
    path = tmp_path / "mapping.yaml"
    path.write_text(yaml.safe_dump(mapping))
    with pytest.raises(DataError, match="names items that are not in items.json, first at row 2 .*'c'"):
        read_table(tmp_path, path)
    mapping["items"]["unlisted"] = "add"
    path.write_text(yaml.safe_dump(mapping))
    feed = read_table(tmp_path, path)
    assert feed.interactions["bought"].tolist() == [1, 0, 0]
    assert feed.interactions["timestamp"].iloc[0] == pd.Timestamp("2024-03-05").timestamp()
    assert feed.items["item_id"].tolist() == ["a", "b", "c"] and feed.items["tags"].tolist() == [["x"], [], []]
    for section, key, value, message in (
        ("interactions", "delimiter", "::", "'interactions.delimiter' must be one sign"),
        ("interactions", "header", "who", "'interactions.header' must be a list"),
        ("interactions", "order", "row", "'interactions.order' must be file"),
        ("items", "unlisted", "drop", "'items.unlisted' must be add"),
        ("interactions", "feedback", {"b": {"column": "event", "is": 1}}, "'scale' or 'equals'"),
    ):
        path.write_text(yaml.safe_dump({**mapping, section: {**mapping[section], key: value}}))
        with pytest.raises(DataError, match=message):
            read_table(tmp_path, path)
