"""`onerec init`: logs in the shapes of public sets, and in no set's, to the column mapping that reads them."""

import json
import shlex
import sys

import numpy as np
import pandas as pd
import pytest
import yaml

from onerec_hf import command_line
from onerec_hf.data import DataError, read_movielens, read_table
from onerec_hf.data.mapping_writer import next_commands, objectives, public_set, write_mapping
from onerec_hf.data.table_samples import KNOWN_HEADERS
from onerec_hf.stages import parse_recipe_arguments
from onerec_hf.stages.reward_stage import require_sources

START = 1_600_000_000
RNG = np.random.default_rng(0)
USERS, ITEMS = np.repeat(np.arange(12), 20), RNG.permutation(np.arange(240) % 30)
TIMES = START + 86_400 * (np.arange(240) % 20) + USERS
NAMES = [f"The {word} of number {number}" for number, word in enumerate(["end", "art", "sea"] * 10)]


def inferred(folder, **given):
    """The mapping, as the reader and the tests read it, and the account."""
    path = folder / "mapping.yaml"
    mapping, text = write_mapping(folder, path, **given)
    return yaml.safe_load(path.read_text(encoding="utf-8")), text, mapping


def json_rows(frame):
    return "".join(json.dumps(row) + "\n" for row in frame.to_dict("records"))


def write_movielens(folder):
    rows = zip(USERS, ITEMS, TIMES, strict=True)
    lines = [f"{user + 1}::{item + 1}::{1 + item % 5}::{time}" for user, item, time in rows]
    (folder / "ratings.dat").write_text("\n".join(lines))
    (folder / "movies.dat").write_text("\n".join(f"{item + 1}::{NAMES[item]}::Drama|War" for item in range(30)))


def write_kuairec(folder):
    frame = pd.DataFrame({"user_id": USERS, "video_id": ITEMS, "play_duration": 9000, "video_duration": 8000})
    frame = frame.assign(time="2020-07-05 00:08:23.438", date=20200705, timestamp=TIMES, watch_ratio=1.1)
    frame.to_csv(folder / "big_matrix.csv", index=False)


def write_mind(folder):
    row = "1\tU1\t11/11/2019 9:05:58 AM\tN1 N2\tN3-1 N4-0\n"
    (folder / "behaviors.tsv").write_text(row * 3)
    (folder / "news.tsv").write_text("N1\tsports\tgolf\tA title\tAn abstract\turl\t[]\t[]\n")


def write_otto(folder):
    events = [{"aid": 1, "ts": START * 1000, "type": "clicks"}]
    (folder / "otto-recsys-train.jsonl").write_text(json.dumps({"session": 1, "events": events}) + "\n")


def write_amazon_csv(folder):
    for part in ("train", "valid", "test"):
        (folder / f"All_Beauty.{part}.csv").write_text("user_id,parent_asin,rating,timestamp\nA,B,5.0,1600000000000\n")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("movielens", write_movielens),
        ("kuairec", write_kuairec),
        ("mind", write_mind),
        ("otto", write_otto),
        ("amazon_reviews", write_amazon_csv),
    ],
)
def test_official_files_of_a_set_are_known_by_their_reader(name, write, tmp_path):
    write(tmp_path)
    assert public_set(tmp_path) == name
    assert f"--dataset {name} --data_dir {tmp_path}" in next_commands(None, tmp_path, "", name)
    if name == "movielens":
        assert len(read_movielens(tmp_path).interactions) == 240


def test_amazon_2023_reviews_and_metadata_as_published(tmp_path):
    ids = [f"{item:010d}" for item in ITEMS]  # ASINs of books are digits
    reviews = pd.DataFrame({"rating": 1.0 + ITEMS % 5, "title": "fine", "text": "a review", "asin": ids})
    reviews["images"] = [[] for _ in ids]
    reviews = reviews.assign(parent_asin=ids, user_id=[f"AE{user}" for user in USERS], timestamp=TIMES * 1000)
    reviews = reviews.assign(helpful_vote=USERS, verified_purchase=True)
    (tmp_path / "Books.jsonl").write_text(json_rows(reviews))
    meta = pd.DataFrame({"main_category": ["Books", "Toys"] * 15, "title": NAMES, "average_rating": 4.5})
    meta["rating_number"], meta["price"] = np.arange(30), np.arange(30) + 0.5
    meta["categories"] = [["Books", f"shelf {item % 3}"] for item in range(30)]
    meta["details"], meta["parent_asin"] = [{"pages": 3}] * 30, [f"{item:010d}" for item in range(30)]
    (tmp_path / "meta_Books.jsonl").write_text(json_rows(meta))

    mapping, text, _ = inferred(tmp_path)
    log, items = mapping["interactions"], mapping["items"]
    assert log["columns"] == {"user_id": "user_id", "item_id": "parent_asin", "timestamp": "timestamp"}
    assert log["file"] == "Books.jsonl" and log["timestamp_unit"] == "ms"
    assert log["feedback"] == {"rating": "rating"} and mapping["positive_feedback"] == ["rating>=4"]
    assert items["file"] == "meta_Books.jsonl" and items["columns"] == {"item_id": "parent_asin"}
    assert (items["text"], items["categorical"], items["multi_categorical"]) == (
        "title",
        ["main_category"],
        ["categories"],
    )
    assert "'average_rating' left out: a total of all times" in text and "'details' left out: objects" in text
    feed = read_table(tmp_path, tmp_path / "mapping.yaml")
    assert len(feed.interactions) == 240 and feed.interactions["timestamp"].min() == TIMES.min()
    assert set(feed.items["item_id"]) == set(ids)


def test_columns_that_are_told_make_a_public_set_a_table_like_any_other(tmp_path):
    write_kuairec(tmp_path)
    mapping, _, _ = inferred(tmp_path, given={"user_id": "user_id", "item_id": "video_id", "timestamp": "timestamp"})
    log = mapping["interactions"]
    assert log["feedback"]["watch_time"] == {"column": "play_duration", "scale": 0.001}
    assert log["feedback"]["duration"] == {"column": "video_duration", "scale": 0.001}
    assert mapping["positive_feedback"] == ["watch_ratio>=0.5"]
    feed = read_table(tmp_path, tmp_path / "mapping.yaml")
    assert feed.interactions["watch_time"].unique() == [9.0] and feed.interactions["watch_ratio"].notna().all()


def test_last_fm_without_a_header(tmp_path):
    [name] = [name for name in KNOWN_HEADERS if name.startswith("userid-timestamp")]
    dates = pd.to_datetime(TIMES, unit="s").strftime("%Y-%m-%dT%H:%M:%SZ")
    rows = [
        f'user_{user:06d}\t{date}\ta{item % 5}\tThe "Band\tt{item}\tSong {item}'
        for user, item, date in zip(USERS, ITEMS, dates, strict=True)
    ]
    (tmp_path / name).write_text("\n".join(rows) + "\n")
    mapping, text, _ = inferred(tmp_path)
    log = mapping["interactions"]
    assert log["columns"] == {"user_id": "user_id", "item_id": "track_id", "timestamp": "timestamp"}
    assert log["header"] == KNOWN_HEADERS[name] and log["delimiter"] == "\t" and log["timestamp_unit"] == "iso"
    assert mapping["positive_feedback"] == [] and "every row is positive" in text
    feed = read_table(tmp_path, tmp_path / "mapping.yaml")
    assert feed.interactions["user_id"].nunique() == 12 and feed.interactions["item_id"].nunique() == 30
    # Where some tracks have no id, what every row has is taken.
    (tmp_path / name).write_text("\n".join([*rows, f"user_000000\t{dates[0]}\ta1\tThe Band\t\tSong"]) + "\n")
    mapping, _, _ = inferred(tmp_path, overwrite=True)
    assert mapping["interactions"]["columns"]["item_id"] == "artist_id"


def test_yelp_json_lines(tmp_path):
    dates = pd.to_datetime(TIMES, unit="s").strftime("%Y-%m-%d %H:%M:%S")
    log = pd.DataFrame({"review_id": [f"r{row}" for row in range(240)], "user_id": [f"u{user}" for user in USERS]})
    log = log.assign(
        business_id=[f"b{item}" for item in ITEMS], stars=1.0 + ITEMS % 5, useful=0, text="good", date=dates
    )
    (tmp_path / "yelp_academic_dataset_review.json").write_text(json_rows(log))
    tips = log[["user_id", "business_id", "text", "date"]].head(20).assign(compliment_count=0)
    (tmp_path / "yelp_academic_dataset_tip.json").write_text(json_rows(tips))
    places = pd.DataFrame(
        {"business_id": [f"b{item}" for item in range(30)], "name": NAMES, "city": ["Reno", "Tampa"] * 15}
    )
    places = places.assign(
        stars=3.5, review_count=9, is_open=[0, 1] * 15, categories=["Food, Bars", "Bars, Music"] * 15
    )
    places["attributes"] = [{"WiFi": "free"}] * 30
    (tmp_path / "yelp_academic_dataset_business.json").write_text(json_rows(places))
    users = pd.DataFrame({"user_id": [f"u{user}" for user in range(12)], "name": "Ann", "review_count": 20})
    (tmp_path / "yelp_academic_dataset_user.json").write_text(json_rows(users))

    mapping, text, _ = inferred(tmp_path)
    log, items = mapping["interactions"], mapping["items"]
    assert log["file"] == "yelp_academic_dataset_review.json" and log["timestamp_unit"] == "iso"
    assert log["columns"] == {"user_id": "user_id", "item_id": "business_id", "timestamp": "date"}
    assert mapping["positive_feedback"] == ["rating>=4"] and log["feedback"]["rating"] == "stars"
    assert (items["text"], items["multi_categorical"]) == ("name", ["categories"])
    assert items["categorical"] == ["city", "is_open"]
    assert mapping["users"]["file"] == "yelp_academic_dataset_user.json"
    assert "yelp_academic_dataset_tip.json: left out" in text and "'stars' left out: a total of all times" in text
    feed = read_table(tmp_path, tmp_path / "mapping.yaml")
    assert len(feed.interactions) == 240 and feed.items["categories"].iloc[0] == ["Food", "Bars"]


def test_a_web_shop_s_events(tmp_path):
    kinds = np.array(["view"] * 8 + ["addtocart", "transaction"])[np.arange(240) % 10]
    log = pd.DataFrame({"timestamp": TIMES * 1000, "visitorid": USERS, "event": kinds, "itemid": ITEMS})
    log["transactionid"] = pd.Series(np.arange(240), dtype="Int64").where(kinds == "transaction")
    log.to_csv(tmp_path / "events.csv", index=False)
    properties = pd.DataFrame({"timestamp": TIMES[:60] * 1000, "itemid": ITEMS[:60], "property": "p", "value": "n1"})
    properties.to_csv(tmp_path / "item_properties_part1.csv", index=False)

    mapping, text, choices = inferred(tmp_path)
    # Of view, cart and transaction, whose chances add up to 1, all but the most frequent are rewarded.
    assert {aim["name"] for aim in objectives(choices)} == {"addtocart", "transaction"}
    log = mapping["interactions"]
    assert log["columns"] == {"user_id": "visitorid", "item_id": "itemid", "timestamp": "timestamp"}
    assert log["feedback"]["transaction"] == {"column": "event", "equals": "transaction"}
    assert set(mapping["positive_feedback"]) == {"view", "addtocart", "transaction"} and "items" not in mapping
    assert "item_properties_part1.csv: left out" in text
    interactions = read_table(tmp_path, tmp_path / "mapping.yaml").interactions
    assert interactions[["view", "addtocart", "transaction"]].sum().tolist() == [192, 24, 24]


def test_odd_names_of_feedback_units_and_dates(tmp_path):
    frame = pd.DataFrame({"who": [f"u{user}" for user in USERS], "clip": ITEMS})
    frame["moment"] = pd.to_datetime(TIMES, unit="s").strftime("%d.%m.%Y %H:%M")
    frame = frame.assign(secs_seen=ITEMS + 0.5, hearted=ITEMS % 2, stars_given=1 + ITEMS % 10, mystery=USERS % 2)
    frame.assign(skipped=ITEMS % 3 == 0, empty=0, price=ITEMS * 1.5).to_csv(
        tmp_path / "export.csv", index=False, sep=";"
    )
    mapping, text, choices = inferred(tmp_path)
    log = mapping["interactions"]
    assert log["columns"] == {"user_id": "who", "item_id": "clip", "timestamp": "moment"}
    assert log["delimiter"] == ";" and log["timestamp_unit"] == "%d.%m.%Y %H:%M"
    named = {"watch_time": "secs_seen", "like": "hearted", "rating": "stars_given", "mystery": "mystery"}
    assert log["feedback"] == named | {"skipped": "skipped"}
    assert mapping["positive_feedback"] == ["like", "rating>=7"]
    assert "'price' left out: numbers from 0 to 43.5" in text and "'empty' left out: it has one value" in text
    assert "not a known name: not counted as positive" in text
    times = read_table(tmp_path, tmp_path / "mapping.yaml").interactions["timestamp"]
    assert times.min() == TIMES.min() // 60 * 60
    # The second command takes the feedback for the reward model's objectives.
    command = shlex.split(next_commands(choices, tmp_path, tmp_path / "mapping.yaml", "odd").splitlines()[-1])
    args = parse_recipe_arguments([*command[2:], "--threads", "1"])
    kinds = {"watch_time": "quantile", "like": "binary", "rating": "quantile"}
    assert {aim["name"]: aim["kind"] for aim in args.reward_model["objectives"]} == kinds
    require_sources(args, ["watch_time", "like", "rating"])


def test_without_a_time_the_rows_are_in_order_and_the_command_says_so(tmp_path):
    pd.DataFrame({"user": USERS, "item": ITEMS}).to_csv(tmp_path / "log.csv", index=False)
    mapping, text, choices = inferred(tmp_path)
    assert mapping["interactions"]["order"] == "file" and "nothing can be split by it" in text
    assert "--split_method leave_one_out" in next_commands(choices, tmp_path, "m.yaml", "mine")
    interactions = read_table(tmp_path, tmp_path / "mapping.yaml").interactions
    assert interactions["item_id"].tolist() == ITEMS.tolist() and interactions["timestamp"].isna().all()


def test_what_cannot_be_told_is_refused_until_it_is_said(tmp_path):
    frame = pd.DataFrame({"a": USERS, "b": ITEMS, "c": ITEMS[::-1] + 100, "d": TIMES})
    frame["b"] += 0.5
    frame.to_csv(tmp_path / "log.csv", index=False)
    frame.drop(columns="c").to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(DataError, match=r"No table(.|\n)*other.csv: a, b, d(.|\n)*--columns"):
        (tmp_path / "log.csv").rename(tmp_path / "log.gone")
        inferred(tmp_path)
    (tmp_path / "log.gone").rename(tmp_path / "log.csv")
    mapping, text, _ = inferred(tmp_path, given={"user_id": "c", "item_id": "a"})
    assert mapping["interactions"]["columns"] == {"user_id": "c", "item_id": "a", "timestamp": "d"}
    assert "as told by --columns" in text
    with pytest.raises(DataError, match="mapping.yaml: is there already. Give --overwrite"):
        inferred(tmp_path)
    with pytest.raises(DataError, match="role 'who'"):
        inferred(tmp_path, given={"who": "a"}, overwrite=True)


def test_the_command_prints_the_account_and_what_to_run_next(tmp_path, monkeypatch, capsys):
    pd.DataFrame({"user": USERS, "item": ITEMS, "time": TIMES}).to_csv(tmp_path / "log.csv", index=False)
    for status in (0, 1):  # the second time it is there
        monkeypatch.setattr(sys, "argv", ["onerec", "init", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        assert ended.value.code == status
    printed = capsys.readouterr()
    assert "user_id: user  # by its name; 12 different values in 240 rows" in printed.out
    assert "240 rows of 12 users with 30 items; 100% of the rows are positive" in printed.out
    assert f"onerec pipeline --config recall --dataset table --data_dir {tmp_path} --column_mapping" in printed.out
    assert "is there already" in printed.err
