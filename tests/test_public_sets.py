"""Public sets from tiny files of their official shapes: exact rows, what is positive, and what is refused."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from onerec_hf.data import DataArguments, DataError, evaluation_cases, load_feed, positive_mask, split_feed
from onerec_hf.data.data_arguments import FOLDER_SETS
from onerec_hf.data.readers import FOLDER_READERS, SOURCE_PATTERNS
from onerec_hf.stages import parse_recipe_arguments, run_data
from onerec_hf.stages.data_stage import EVALUATION_CASES, prepared_data

AMAZON_HEADER = "user_id,parent_asin,rating,timestamp\n"
AMAZON_TRAIN = "UB,0001,5.0,1000\nUA,0001,4.0,2500\nUA,0002,1.0,1658002729836\nUB,0003,3.0,2001\n"


def write_files(folder: Path, files: dict[str, str | bytes | pd.DataFrame]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pd.DataFrame):
            content.to_parquet(path)
        else:
            content = content.encode() if isinstance(content, str) else content
            path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def amazon_reviews() -> dict:
    meta = [
        {"parent_asin": "0003", "title": "Three", "categories": ["Books", "Maps"], "store": None, "price": 1},
        {"parent_asin": "0001", "title": "", "categories": [], "store": "Shop"},
        {"parent_asin": "0002", "title": "Two", "categories": ["Books"], "store": "Shop"},
        {"parent_asin": "9999", "title": "Never reviewed", "categories": ["Books"], "store": "Shop"},
    ]
    meta[0]["images"] = [{"thumb": "t.jpg", "large": "https://example.org/3.jpg"}, {"large": "other.jpg"}]
    meta[1]["images"] = []
    return {
        "Books.train.csv": AMAZON_HEADER + AMAZON_TRAIN,
        "Books.valid.csv.gz": AMAZON_HEADER + "UA,0003,5.0,1658002729837\nUB,0002,2.0,1658002729837\n",
        "Books.test.csv": AMAZON_HEADER + "UA,0004,2.0,1658002729837\n",
        "meta_Books.jsonl.gz": lines(*meta, {"parent_asin": "0004", "title": "Four"}),
    }


def movielens_dat() -> dict:
    return {
        "ratings.dat": "2::10::5::978300760\n1::11::3::978302109\n1::10::4::978301968\n2::12::2::978300761\n",
        "movies.dat": "10::Misérables, Les (1995)::Drama|Musical\n11::Alien: Again (1997)::Action\n"
        "12::Und (2000)::(no genres listed)\n13::Unrated (2000)::Drama\n".encode("latin-1"),
        "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
    }


def movielens_csv() -> dict:
    return {
        "ratings.csv": "userId,movieId,rating,timestamp\n2,10,4.5,20\n1,11,0.5,40\n1,10,4.0,30\n2,12,3.0,21\n",
        "movies.csv": 'movieId,title,genres\n12,"Und (2000)",(no genres listed)\n10,"Rose, The (1979)",Drama|Musical\n'
        "11,Alien (1979),Action\n",
    }


def yambda() -> dict:
    listens = pd.DataFrame(
        {
            "uid": np.array([10, 10, 20, 20], dtype=np.uint32),
            "timestamp": np.array([50, 45, 5, 5], dtype=np.uint32),
            "item_id": np.array([7, 8, 7, 9], dtype=np.uint32),
            "is_organic": np.array([1, 0, 1, 1], dtype=np.uint8),
            "played_ratio_pct": np.array([49, 100, 50, 0], dtype=np.uint16),
            "track_length_seconds": np.array([200, 100, 200, 300], dtype=np.uint32),
        }
    )
    likes = listens[["uid", "timestamp", "item_id", "is_organic"]].iloc[[1]].assign(timestamp=np.uint32(60))
    artists = pd.DataFrame({"artist_id": [3, 4, 3, 5], "item_id": [7, 7, 8, 100]}, dtype="uint32")
    return {"listens.parquet": listens, "likes.parquet": likes, "artist_item_mapping.parquet": artists}


def mind() -> dict:
    def news(*ids: str) -> str:
        return "".join(f'{name}\tnews\tworld\tA "quoted title\tAbstract\thttps://x\t[]\t[]\n' for name in ids)

    return {
        "MINDsmall_train/behaviors.tsv": "1\tU1\t11/11/2019 1:00:00 PM\tN9 N8\tN1-0 N2-1\n"
        "2\tU2\t11/11/2019 9:05:58 AM\t\tN1-1\n",
        "MINDsmall_train/news.tsv": news("N1", "N2", "N8", "N9", "N100"),
        "MINDsmall_dev/behaviors.tsv": "1\tU1\t11/15/2019 12:00:00 AM\tN9 N8 N2\tN3-1 N1-0\n",
        "MINDsmall_dev/news.tsv": news("N1", "N3"),
    }


def eb_nerd() -> dict:
    def times(*texts: str) -> list:
        return [pd.Timestamp(text) for text in texts]

    log = {"impression_id": [71, 72], "user_id": [1, 2], "impression_time": times("1970-01-01 00:01", "1970-01-01")}
    log |= {"article_ids_inview": [[5, 6], [5]], "article_ids_clicked": [[6], [5]]}
    later = {"impression_id": [80], "user_id": [1], "impression_time": times("1970-01-01 01:00")}
    later |= {"article_ids_inview": [[6, 5]], "article_ids_clicked": [[5]]}
    history = {"user_id": [1], "impression_time_fixed": [times("1969-12-31 23:59")], "article_id_fixed": [[4]]}
    unread = {"user_id": [1], "impression_time_fixed": [times("1970-01-01 00:01")], "article_id_fixed": [[6]]}
    articles = {"article_id": [4, 5, 6, 7], "title": list("abcd"), "category_str": "krimi"}
    articles["topics"] = [["a"], [], ["a", "b"], []]
    return {
        "train/behaviors.parquet": pd.DataFrame(log).astype({"impression_time": "datetime64[us]"}),
        "train/history.parquet": pd.DataFrame(history),
        "validation/behaviors.parquet": pd.DataFrame(later).astype({"impression_time": "datetime64[us]"}),
        "validation/history.parquet": pd.DataFrame(unread),
        "articles.parquet": pd.DataFrame(articles),
    }


def kuairec() -> dict:
    header = "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n"
    return {
        "big_matrix.csv": header + '0,3649,13838,10867,"2020-07-05 00:08:23.438",20200705,1593878903.438,1.273397\n'
        '1,5,30000,10000,"2020-07-05 00:00:00.500",20200705,1593878400.5,3.0\n'
        '0,5,20000,10000,"2020-07-05 00:00:00.000",20200705,1593878400.0,2.0\n',
        "small_matrix.csv": header + "1,5,1000,10000,,,,0.1\n1,3649,1000,10000,,,,0.2\n"
        '1,9,1000,10000,"2020-07-05 00:00:00.500",20200705,1593878400.5,2.5\n'
        '14,9,1000,10000,"2020-07-05 00:00:00.500",20200705,1593878400.5,2.5\n',
        "item_categories.csv": 'video_id,feat\n5,[8]\n9,[1]\n3649,"[27, 9]"\n',
    }


def otto() -> dict:
    def event(item: int, time: int, kind: str) -> dict:
        return {"aid": item, "ts": time, "type": kind}

    return {
        "otto-recsys-train.jsonl": lines(
            {"session": 42, "events": [event(2, 1661200010001, "clicks"), event(2, 1661200040000, "carts")]},
            {"session": 7, "events": [event(3, 1661200050000, "clicks"), event(2, 1661200080000, "orders")]},
        ),
        "otto-recsys-test.jsonl.gz": lines({"session": 50, "events": [event(9, 1661200090500, "clicks")]}),
        "test_labels.jsonl": lines({"session": 50, "labels": {"clicks": 1}}),
    }


# By case: the set, its files, rows (user, item, time, whether positive) and what is known of each item.
CASES = {
    "amazon_reviews": (
        "amazon_reviews",
        amazon_reviews,
        [("UA", "0001", 2.5, True), ("UA", "0002", 1658002729.836, True), ("UA", "0003", 1658002729.837, True)]
        + [("UA", "0004", 1658002729.837, True), ("UB", "0001", 1.0, True), ("UB", "0003", 2.001, True)]
        + [("UB", "0002", 1658002729.837, True)],
        {"0003": ["Three", None, "Books,Maps", "https://example.org/3.jpg"], "0001": [None, "Shop", "", None]}
        | {"0002": ["Two", "Shop", "Books", None], "0004": ["Four", None, "", None]},
    ),
    "movielens_dat": (
        "movielens",
        movielens_dat,
        [(1, 10, 978301968, True), (1, 11, 978302109, True), (2, 10, 978300760, True), (2, 12, 978300761, True)],
        {10: ["Misérables, Les (1995)", "Drama,Musical"], 11: ["Alien: Again (1997)", "Action"]}
        | {12: ["Und (2000)", ""]},
    ),
    "movielens_csv": (
        "movielens",
        movielens_csv,
        [(1, 10, 30, True), (1, 11, 40, True), (2, 10, 20, True), (2, 12, 21, True)],
        {12: ["Und (2000)", ""], 10: ["Rose, The (1979)", "Drama,Musical"], 11: ["Alien (1979)", "Action"]},
    ),
    "yambda": (
        "yambda",
        yambda,
        [(10, 8, 45, True), (10, 7, 50, False), (10, 8, 60, False), (20, 7, 5, True), (20, 9, 5, False)],
        {7: ["3,4"], 8: ["3"], 9: [""]},
    ),
    "mind": (
        "mind",
        mind,
        [("U1", "N9", None, True), ("U1", "N8", None, True), ("U1", "N1", 1573477200, False)]
        + [("U1", "N2", 1573477200, True), ("U1", "N3", 1573776000, True), ("U1", "N1", 1573776000, False)]
        + [("U2", "N1", 1573463158, True)],
        {name: ['A "quoted title', "news", "world"] for name in ("N1", "N3", "N2", "N8", "N9")},
    ),
    "eb_nerd": (
        "eb_nerd",
        eb_nerd,
        [(1, 4, -60, True), (1, 5, 60, False), (1, 6, 60, True), (1, 6, 3600, False), (1, 5, 3600, True)]
        + [(2, 5, 0, True)],
        {4: ["a", "krimi", "a"], 5: ["b", "krimi", ""], 6: ["c", "krimi", "a,b"]},
    ),
    "kuairec": (
        "kuairec",
        kuairec,
        [(0, 5, 1593878400, False), (0, 3649, 1593878903.438, False), (1, 5, 1593878400.5, True)],
        {5: ["8"], 3649: ["27,9"]},
    ),
    "otto": (
        "otto",
        otto,
        [(7, 3, 1661200050, True), (7, 2, 1661200080, True), (42, 2, 1661200010.001, True)]
        + [(42, 2, 1661200040, True), (50, 9, 1661200090.5, True)],
        {2: [], 3: [], 9: []},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_times_positives_and_items(case, tmp_path):
    dataset, files, expected, items = CASES[case]
    write_files(tmp_path, files())
    feed = load_feed(DataArguments(dataset=dataset, data_dir=str(tmp_path)))
    rows = feed.interactions.assign(positive=positive_mask(feed.interactions, feed.positive_feedback))
    rows["timestamp"] = rows["timestamp"].astype(object).where(rows["timestamp"].notna(), None)
    columns = ["user_id", "item_id", "timestamp", "positive"]
    assert list(rows[columns].itertuples(index=False, name=None)) == expected
    assert set(feed.items["item_id"]) == set(items)
    for item in feed.items.itertuples(index=False):
        values = [",".join(value) if isinstance(value, list) else value for value in item[1:]]
        assert [None if pd.isna(value) else value for value in values] == items[item.item_id]


def test_every_folder_set_has_a_reader_and_says_what_it_reads():
    assert set(FOLDER_SETS) == FOLDER_READERS.keys() == SOURCE_PATTERNS.keys()


def test_the_documented_blocks_are_options_of_the_recipes(tmp_path):
    text = (Path(__file__).parents[1] / "recipes" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    section = text.split("## Sets\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == ["dataset", *FOLDER_SETS]
    blocks = section.split("```yaml\n")[1].split("```")[0].split("---\n")
    for number, block in enumerate(blocks):
        config = tmp_path / f"{number}.yaml"
        config.write_text(block, encoding="utf-8")
        args = parse_recipe_arguments(["--config", str(config), "--output_dir", str(tmp_path)])
        assert args.group(DataArguments).dataset in block
    assert len(blocks) == 8


def read(dataset: str, folder: Path, **options):
    args = DataArguments(dataset=dataset, data_dir=str(folder), **options)
    return load_feed(args), args


def test_feedback_of_the_sets(tmp_path):
    for dataset, (_, files, _, _) in CASES.items():
        write_files(tmp_path / dataset, files())
    rows = read("yambda", tmp_path / "yambda")[0].interactions
    assert rows["watch_time"].tolist()[:2] == [100, 98] and rows["duration"].tolist()[:2] == [100, 200]
    assert rows["played_ratio"].tolist()[:2] == pytest.approx([1, 0.49]) and rows["organic"].tolist()[:2] == [0, 1]
    assert rows["like"].isna().tolist() == [True, True, False, True, True]
    rows = read("kuairec", tmp_path / "kuairec")[0].interactions
    assert rows["watch_time"].tolist() == pytest.approx([20, 13.838, 30])
    assert rows["duration"].tolist() == pytest.approx([10, 10.867, 10])
    rows = read("mind", tmp_path / "mind")[0].interactions
    # Impression 1 of the second folder comes after impression 1 of the first.
    assert rows["session_id"].isna().tolist()[:3] == [True, True, False]
    assert rows["session_id"].tolist()[2:] == [2, 2, 1, 1, 3]
    feed, _ = read("otto", tmp_path / "otto", positive_feedback=["cart", "order"])
    assert positive_mask(feed.interactions, feed.positive_feedback).tolist() == [False, True, False, True, False]
    feed, _ = read("movielens", tmp_path / "movielens_dat", positive_feedback=["rating>=4"])
    assert positive_mask(feed.interactions, feed.positive_feedback).tolist() == [True, False, True, False]
    assert feed.users.columns.tolist() == ["user_id", "gender", "age", "occupation"]
    assert feed.users.iloc[1].tolist() == [2, "M", "56", "16"]


def test_likes_alone_are_positive(tmp_path):
    files = yambda()
    likes = pd.concat([files["likes.parquet"], files["likes.parquet"].assign(uid=np.uint32(20))])
    write_files(tmp_path, {"likes.parquet": likes})
    feed, _ = read("yambda", tmp_path)
    assert feed.positive_feedback == ["like"] and positive_mask(feed.interactions, ["like"]).all()
    assert feed.interactions["timestamp"].tolist() == [60, 60]


def test_rows_of_the_small_matrix_without_a_time_come_first(tmp_path):
    files = kuairec()
    write_files(tmp_path, {"small_matrix.csv": files["small_matrix.csv"]})
    rows = read("kuairec", tmp_path)[0].interactions
    assert rows["item_id"].tolist() == [5, 3649, 9, 9] and rows["user_id"].tolist() == [1, 1, 1, 14]
    assert rows["timestamp"].isna().tolist() == [True, True, False, False]


@pytest.mark.filterwarnings("ignore:leave-one-out")
def test_the_splits_of_amazon_reviews_come_back(tmp_path):
    write_files(tmp_path, amazon_reviews())
    feed, args = read("amazon_reviews", tmp_path, split_method="leave_one_out")
    cases = evaluation_cases(split_feed(feed, args), feed, args)
    # Three reviews of one millisecond: the files' order tells which of them is the last.
    assert cases["user_id"][:] == ["UA", "UB"] and cases["next_item_id"][:] == ["0004", "0002"]
    assert cases["history_item_ids"][:] == [["0001", "0002", "0003"], ["0001", "0003"]]
    feed, args = read("amazon_reviews", tmp_path, test_start="2022-07-16T20:18:49.837+00:00")
    cases = evaluation_cases(split_feed(feed, args), feed, args)
    assert cases["history_item_ids"][:] == [["0001", "0002"], ["0001", "0003"]]
    assert cases["next_item_id"][:] == ["0003", "0002"]


def test_amazon_reviews_before_the_split_without_metadata(tmp_path):
    write_files(tmp_path, {"Books.csv.gz": AMAZON_HEADER + AMAZON_TRAIN})
    feed, _ = read("amazon_reviews", tmp_path)
    assert feed.items["item_id"].tolist() == ["0001", "0002", "0003"] and feed.text_column is None


def test_items_without_metadata_are_named(tmp_path):
    files = movielens_csv()
    write_files(tmp_path, files | {"movies.csv": files["movies.csv"].replace("11,Alien (1979),Action", "")})
    with pytest.warns(UserWarning, match=r"movies.csv: 1 of the 3 items .* e.g. 11"):
        feed, _ = read("movielens", tmp_path)
    assert feed.items["item_id"].tolist() == [12, 10, 11] and feed.items["genres"][2] == []


def test_repeated_positives(tmp_path):
    ratings = "".join(f"{user}::{item}::{stars}::{time}\n" for user, item, stars, time in REPEATS)
    movies = "1::One::Drama\n2::Two::Drama\n"
    write_files(tmp_path, {"ratings.dat": ratings, "movies.dat": movies})
    for kept, expected in (
        ("keep", [1, 1, 2, 1, 1, 1]),
        ("first", [1, 2, 1, 1]),
        ("first_in_a_row", [1, 2, 1, 1, 1]),
    ):
        feed, _ = read("movielens", tmp_path, positive_feedback=["rating>=4"], repeated_positives=kept)
        assert feed.interactions["item_id"].tolist() == expected, kept
        assert feed.interactions["position"].tolist() == [*range(len(expected) - 1), 0]
    with pytest.raises(ValueError, match="first_in_a_row"):
        read("movielens", tmp_path, repeated_positives="once")


# The fourth of the first user is no positive behaviour, and stays.
REPEATS = [(7, 1, 5, 10), (7, 1, 5, 20), (7, 2, 5, 30), (7, 1, 1, 40), (7, 1, 4, 50), (8, 1, 5, 10)]

# By set: a file and what is wrong in it, and what the message names.
BAD_FILES = {
    "amazon_reviews": ("Books.train.csv", lambda text: text.replace("2500", "soon"), ["Books.train.csv", "timestamp"]),
    "amazon_reviews part": ("Books.test.csv", None, ["Books.test.csv is missing", "Books.train.csv"]),
    "amazon_reviews meta": ("meta_Books.jsonl.gz", lambda text: text.replace("parent_asin", "asin"), ["parent_asin"]),
    "movielens": ("ratings.csv", lambda text: text.replace("movieId", "movie"), ["ratings.csv", "'movieId'"]),
    "movielens rating": (
        "ratings.csv",
        lambda text: text.replace("4.5", "four"),
        ["ratings.csv", "'rating'", "row 0"],
    ),
    "movielens items": ("movies.csv", lambda text: "movieId,title,genres\n1,One,Drama\n", ["movies.csv", "'movieId'"]),
    "yambda": ("listens.parquet", lambda frame: frame.drop(columns="uid"), ["listens.parquet", "'uid'"]),
    "mind": (
        "MINDsmall_train/behaviors.tsv",
        lambda text: text.replace("N1-1", "N1"),
        ["MINDsmall_train/behaviors.tsv", "'impressions'", "row 1", "test set"],
    ),
    "mind time": (
        "MINDsmall_dev/behaviors.tsv",
        lambda text: text.replace("11/15", "31/15"),
        ["MINDsmall_dev/behaviors.tsv", "'time'", "31/15/2019"],
    ),
    "mind columns": ("MINDsmall_dev/news.tsv", lambda text: text.replace("\t[]", ""), ["news.tsv", "title_entities"]),
    "eb_nerd": (
        "validation/behaviors.parquet",
        lambda frame: frame.drop(columns="article_ids_clicked"),
        ["behaviors.parquet", "'article_ids_clicked'"],
    ),
    "kuairec": (
        "item_categories.csv",
        lambda text: text.replace("[8]", "8"),
        ["item_categories.csv", "'feat'", "row 0"],
    ),
    "otto": (
        "otto-recsys-train.jsonl",
        lambda text: text.replace("orders", "wishes"),
        ["otto-recsys-train.jsonl", "'type'", "row 1", "wishes"],
    ),
    "otto time": (
        "otto-recsys-train.jsonl",
        lambda text: text.replace('"ts"', '"time"'),
        ["train.jsonl", "'ts'", "row 0"],
    ),
    "otto line": ("otto-recsys-train.jsonl", lambda text: text + "{", ["otto-recsys-train.jsonl", "row 2", "JSON"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_by_name_and_column(case, tmp_path):
    dataset = case.split()[0]
    files = CASES[dataset if dataset in CASES else f"{dataset}_csv"][1]()
    name, change, expected = BAD_FILES[case]
    content = files.pop(name)
    write_files(tmp_path, files | ({name: change(content)} if change else {}))
    with pytest.raises(DataError) as error:
        read(dataset, tmp_path)
    for part in expected:
        assert part in str(error.value)


@pytest.mark.parametrize("dataset", [name for name in FOLDER_SETS if name != "amazon"])
def test_an_empty_folder_is_refused_with_the_files_that_are_needed(dataset, tmp_path):
    with pytest.raises(DataError, match=r"no [\w-]+ (data|reviews): .* Give data_dir"):
        read(dataset, tmp_path)


def test_a_log_of_impressions_goes_through_the_data_stage(tmp_path):
    write_files(tmp_path / "mind", mind())
    flags = ["--dataset", "mind", "--data_dir", str(tmp_path / "mind"), "--output_dir", str(tmp_path / "run")]
    flags += ["--test_start", "2019-11-15T00:00+00:00", "--session_cut", "session_id", "--threads", "1"]
    args = parse_recipe_arguments(flags)
    folder = run_data(args)
    about = json.loads((folder / "stage.json").read_text())["dataset"]
    assert (about["name"], about["positive_feedback"], about["num_items"]) == ("mind", ["click"], 5)
    cases = prepared_data(args, "the test").read(EVALUATION_CASES)
    assert cases["user_id"][:] == ["U1"] and cases["next_item_id"][:] == ["N3"]
    assert cases["history_item_ids"][:] == [["N9", "N8", "N2"]]
