"""Public data sets from their official files, each by one reader from a folder to a Feed.

Where a set does not say what is positive, the default is the habit of those who evaluate the next item on it, and
`positive_feedback` of the arguments overrides it. Repeated consumption is read as it is (see `repeated_positives`).
The catalogue is the items that the interactions name; a table of items adds what it knows of these.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .data_files import Tables, data_folder, joined, json_lines, read_columns, read_headless, read_json_columns
from .feed import Feed
from .schema import ID, TEXT, DataError, refuse

AMAZON_REVIEWS_SPLITS = (".train.csv", ".valid.csv", ".test.csv")
MOVIELENS_USER_COLUMNS = ["gender", "age", "occupation"]
YAMBDA_VIEW_PERCENT = 50  # of a track's length: what the set's authors count as listened to
MIND_TIME_FORMAT = "%m/%d/%Y %I:%M:%S %p"
MIND_LOG_COLUMNS = ["impression_id", "user_id", "time", "history", "impressions"]
MIND_NEWS_COLUMNS = [
    *("news_id", "category", "subcategory", "title", "abstract"),
    *("url", "title_entities", "abstract_entities"),
]
KUAIREC_TIMEZONE = "Asia/Shanghai"
OTTO_EVENTS = {"clicks": "click", "carts": "cart", "orders": "order"}


def read_amazon_reviews(data_dir: str | Path) -> Feed:
    """Amazon Reviews 2023 (Hou et al., 2024), the CSV files of `benchmark/` and the metadata, gzipped or not.

    CATEGORY.train.csv, .valid.csv and .test.csv of a split (last_out, timestamp and those with histories) are read as
    one log, which `split_method` parts again; without them every other CSV is read (rating_only). Optional:
    meta_CATEGORY.jsonl. Every review is a positive interaction, whatever its `rating`. Times are milliseconds.

    Raises:
        DataError: files or columns are missing, or a part of a split is.
    """
    folder = data_folder(data_dir)
    parts = []
    for path in _amazon_logs(folder):
        # ASINs of books are often digits alone, with zeros in front.
        ids = ["user_id", "parent_asin"]
        raw = read_columns(path, [*ids, "rating", "timestamp"], dict.fromkeys(ids, TEXT))
        frame = {"user_id": raw["user_id"], "item_id": raw["parent_asin"]}
        frame |= {"timestamp": _divided(raw["timestamp"], 1000), "rating": raw["rating"]}
        parts.append((pd.DataFrame(frame), path.name))
    metadata = _unpacked(folder, "meta_*.jsonl")
    if not metadata:
        return Feed.from_frames("amazon_reviews", parts, _catalogue(parts), [])
    columns = ["parent_asin", "title", "categories", "store"]
    items = joined([(read_json_columns(path, columns, ["images"]), path.name) for path in metadata])
    items[0]["image"] = items[0].pop("images").map(_first_picture)
    return Feed.from_frames(
        "amazon_reviews",
        parts,
        _catalogue(parts, items, "parent_asin"),
        [],
        text_column="title",
        categorical_columns=["store"],
        multi_categorical_columns=["categories"],
        image_column="image",
    )


def _first_picture(images: object) -> str | None:
    """The URL of the first of a product's pictures; None where there is none."""
    first = images[0] if isinstance(images, list) and images else None
    return first.get("large") if isinstance(first, dict) else None


def _amazon_logs(folder: Path) -> list[Path]:
    """The parts of the splits, in the order of time within a user, or else all reviews."""
    logs = _unpacked(folder, "*.csv")
    splits: dict[str, dict[str, Path]] = {}
    for path in logs:
        name = path.name.removesuffix(".gz")
        for ending in AMAZON_REVIEWS_SPLITS:
            if name.endswith(ending):
                splits.setdefault(name.removesuffix(ending), {})[ending] = path
    for category, files in splits.items():
        for ending in AMAZON_REVIEWS_SPLITS:
            if ending not in files:
                raise DataError(
                    f"{folder}: {category}{ending} is missing beside {next(iter(files.values())).name}. Put all three "
                    "parts of the split there: the log is parted again by split_method."
                )
    if not logs:
        raise DataError(
            f"{folder}: no Amazon reviews: neither CATEGORY.train.csv, CATEGORY.valid.csv and CATEGORY.test.csv nor "
            "CATEGORY.csv, gzipped or not. Give data_dir the folder that holds these files."
        )
    return [files[ending] for ending in AMAZON_REVIEWS_SPLITS for files in splits.values()] or logs


def read_movielens(data_dir: str | Path) -> Feed:
    """MovieLens (Harper and Konstan, 2015): ratings.dat and movies.dat (1M, 10M) or ratings.csv and movies.csv (20M,
    25M, 32M); with the first also users.dat, where there is one.

    Every rating is a positive interaction, as in next-item evaluations since SASRec; `rating` is 0.5 to 5 stars.

    Raises:
        DataError: files or columns are missing.
    """
    folder = data_folder(data_dir)
    users = None
    if (folder / "ratings.dat").is_file():
        log, catalogue, item_column = "ratings.dat", "movies.dat", "movie_id"
        ratings = read_headless(folder / log, ["user_id", item_column, "rating", "timestamp"], "::")
        columns = [item_column, "title", "genres"]
        movies = read_headless(folder / catalogue, columns, "::", encodings=("utf-8", "latin-1"))
        if (folder / "users.dat").is_file():
            columns = ["user_id", *MOVIELENS_USER_COLUMNS, "zip_code"]
            users = (read_headless(folder / "users.dat", columns, "::").drop(columns="zip_code"), "users.dat")
    elif (folder / "ratings.csv").is_file():
        log, catalogue, item_column = "ratings.csv", "movies.csv", "movieId"
        kinds = {"userId": ID, item_column: ID, "title": TEXT, "genres": TEXT}
        ratings = read_columns(folder / log, ["userId", item_column, "rating", "timestamp"], kinds)
        movies = read_columns(folder / catalogue, [item_column, "title", "genres"], kinds)
    else:
        raise DataError(
            f"{folder}: no MovieLens data: neither ratings.dat and movies.dat, nor ratings.csv and movies.csv. Give "
            "data_dir the folder that holds these files."
        )
    parts = [(ratings.rename(columns={"userId": "user_id", item_column: "item_id"}), log)]
    genres = movies["genres"].astype("str").replace("(no genres listed)", "")
    movies["genres"] = genres.fillna("").str.split("|").map(lambda names: [name for name in names if name])
    return Feed.from_frames(
        "movielens",
        parts,
        _catalogue(parts, (movies, catalogue), item_column),
        [],
        users=users,
        text_column="title",
        multi_categorical_columns=["genres"],
    )


def read_yambda(data_dir: str | Path) -> Feed:
    """Yambda (Ploshkin et al., 2025), the flat files: listens.parquet, likes.parquet or both, and optionally
    artist_item_mapping.parquet and album_item_mapping.parquet beside them.

    A listen has `played_ratio` (1: the whole track), `watch_time`, `duration` and `view`, which is 1 from half of the
    track on and is what counts as positive, as in the set's own benchmark. A like is a behaviour of its own, with
    `like`; it is positive where there are no listens. `organic` is 0 for what was recommended. Times are seconds
    since the set's own start, in steps of 5 s.

    Raises:
        DataError: files or columns are missing.
    """
    folder = data_folder(data_dir)
    parts = []
    columns = {"uid": "user_id", "item_id": "item_id", "timestamp": "timestamp", "is_organic": "organic"}
    path = folder / "listens.parquet"
    has_listens = path.is_file()
    if has_listens:
        played = ["played_ratio_pct", "track_length_seconds"]
        raw = read_columns(path, [*columns, *played])
        frame = raw[list(columns)].rename(columns=columns)
        percent, length = (_numbers(raw[name], path.name) for name in played)
        frame["watch_time"], frame["duration"] = percent / 100 * length, length
        frame["view"] = (percent >= YAMBDA_VIEW_PERCENT).astype("float32").where(percent.notna())
        frame["played_ratio"] = percent / 100
        parts.append((frame, path.name))
    path = folder / "likes.parquet"
    if path.is_file():
        parts.append((read_columns(path, list(columns)).rename(columns=columns).assign(like=1.0), path.name))
    if not parts:
        raise DataError(
            f"{folder}: no Yambda data: neither listens.parquet nor likes.parquet. Give data_dir the folder of one "
            "size of the flat files, e.g. flat/50m."
        )
    items, source = _catalogue(parts)
    kinds = [kind for kind in ("artist", "album") if (folder / f"{kind}_item_mapping.parquet").is_file()]
    for kind in kinds:
        path = folder / f"{kind}_item_mapping.parquet"
        pairs = read_columns(path, [f"{kind}_id", "item_id"])
        pairs = pairs[pairs["item_id"].isin(items["item_id"])]
        items[kind] = items["item_id"].map(pairs.groupby("item_id")[f"{kind}_id"].agg(list))
        source = f"{source}, {path.name}"
    positive = ["view"] if has_listens else ["like"]
    return Feed.from_frames("yambda", parts, (items, source), positive, multi_categorical_columns=kinds)


def read_mind(data_dir: str | Path) -> Feed:
    """MIND (Wu et al., ACL 2020): behaviors.tsv and news.tsv of the folder, or of each folder in it (MINDsmall_train
    and MINDsmall_dev).

    Every news item of an impression is an exposure, with `click`, which is what counts as positive; the impression is
    its session_id, numbered on from one file to the next. A user's history comes first, as clicks without times; the
    history of the user's first impression is read, as the log holds what follows. Times are read as UTC.

    Raises:
        DataError: files or columns are missing, a time or an impression is not written as published, or an impression
            says nothing of clicks (the test set).
    """
    folder = data_folder(data_dir)
    logs = sorted({*folder.glob("behaviors.tsv"), *folder.glob("*/behaviors.tsv")})
    if not logs:
        raise DataError(
            f"{folder}: no MIND data: no behaviors.tsv in it or in a folder of it. Give data_dir the folder that "
            "holds this file and news.tsv, or one that holds MINDsmall_train and MINDsmall_dev."
        )
    parts, histories, last_impression = [], [], 0
    for path in logs:
        source = str(path.relative_to(folder))
        raw = read_headless(path, MIND_LOG_COLUMNS, "\t")
        raw["timestamp"] = _mind_times(raw["time"], source)
        raw["impression_id"] = _numbers(raw["impression_id"], source) + last_impression
        last_impression = int(raw["impression_id"].max())
        parts.append((_mind_exposures(raw, source), source))
        histories.append(raw[["user_id", "timestamp", "history"]])
    first = pd.concat(histories).sort_values("timestamp", kind="stable").drop_duplicates("user_id")
    history = _clicks(_exploded(first[["user_id"]].assign(item_id=_words(first["history"]))))
    if len(history):
        history["position"] = history.groupby("user_id").cumcount()
        parts.insert(0, (history, "history of " + ", ".join(source for _, source in parts)))
    columns = ["news_id", "category", "subcategory", "title"]
    news = [read_headless(path.with_name("news.tsv"), MIND_NEWS_COLUMNS, "\t")[columns] for path in logs]
    items = pd.concat(news, ignore_index=True).drop_duplicates("news_id")
    return Feed.from_frames(
        "mind",
        parts,
        _catalogue(parts, (items, "news.tsv"), "news_id"),
        ["click"],
        text_column="title",
        categorical_columns=["category", "subcategory"],
    )


def _mind_times(values: pd.Series, source: str) -> pd.Series:
    times = pd.to_datetime(values, format=MIND_TIME_FORMAT, errors="coerce")
    remedy = "Write it like 11/15/2019 8:55:22 AM."
    refuse(source, "time", times.isna(), values, "is no such time", remedy)
    return _unix_seconds(times)


def _mind_exposures(raw: pd.DataFrame, source: str) -> pd.DataFrame:
    columns = {"session_id": raw["impression_id"], "item_id": _words(raw["impressions"])}
    frame = _exploded(raw[["user_id", "timestamp"]].assign(**columns))
    shown = frame["item_id"].astype("str")
    labelled = shown.str[-2:].isin(["-0", "-1"]) & (shown.str.len() > 2)
    refuse(
        source,
        "impressions",
        (~labelled).groupby(frame["row"]).any().reindex(range(len(raw)), fill_value=False),
        raw["impressions"],
        "does not say of each item whether it was clicked",
        "Write it like N1-0 N2-1; leave out the test set, whose clicks were not published.",
    )
    return frame.drop(columns="row").assign(item_id=shown.str[:-2], click=(shown.str[-2:] == "-1").astype("float32"))


def read_eb_nerd(data_dir: str | Path) -> Feed:
    """EB-NeRD (Kruse et al., RecSys Challenge 2024): articles.parquet of the folder, and behaviors.parquet and
    history.parquet of its folders train and validation, either or both.

    Every article in view of an impression is an exposure, with `click`, which is what counts as positive; the
    impression is its session_id. The history is read as clicks at their times; it is the one of a user's first
    folder, as the log holds what follows. Times are read as UTC.

    Raises:
        DataError: files or columns are missing, as the clicks are in the test set.
    """
    folder = data_folder(data_dir)
    splits = [name for name in ("train", "validation") if (folder / name / "behaviors.parquet").is_file()]
    if not splits:
        raise DataError(
            f"{folder}: no EB-NeRD data: no behaviors.parquet in a folder train or validation. Give data_dir the "
            "folder that holds these and articles.parquet."
        )
    histories, logs, known = [], [], pd.Series(dtype="int64")
    for name in splits:
        columns = ["user_id", "article_id_fixed", "impression_time_fixed"]
        raw = read_columns(folder / name / "history.parquet", columns)
        raw.columns = ["user_id", "item_id", "timestamp"]
        history = raw[~raw["user_id"].isin(known)]
        known = pd.concat([known, raw["user_id"]])
        history = _clicks(_exploded(history, ["item_id", "timestamp"])).astype({"item_id": "int64"})
        history["timestamp"] = _unix_seconds(history["timestamp"])
        histories.append((history, f"{name}/history.parquet"))
        logs.append((_eb_nerd_exposures(folder / name / "behaviors.parquet"), f"{name}/behaviors.parquet"))
    parts = [(frame, source) for frame, source in histories + logs if len(frame)] or logs
    items = read_columns(folder / "articles.parquet", ["article_id", "title", "category_str", "topics"])
    return Feed.from_frames(
        "eb_nerd",
        parts,
        _catalogue(parts, (items, "articles.parquet"), "article_id"),
        ["click"],
        text_column="title",
        categorical_columns=["category_str"],
        multi_categorical_columns=["topics"],
    )


def _eb_nerd_exposures(path: Path) -> pd.DataFrame:
    columns = ["impression_id", "user_id", "impression_time", "article_ids_inview", "article_ids_clicked"]
    raw = read_columns(path, columns)
    raw["timestamp"] = _unix_seconds(raw["impression_time"])
    columns = {"session_id": raw["impression_id"], "item_id": raw["article_ids_inview"]}
    shown = _exploded(raw[["user_id", "timestamp"]].assign(**columns)).astype({"item_id": "int64"})
    clicked = _exploded(raw[["user_id"]].assign(item_id=raw["article_ids_clicked"])).astype({"item_id": "int64"})
    pairs = (pd.MultiIndex.from_frame(frame[["row", "item_id"]]) for frame in (shown, clicked))
    return shown.drop(columns="row").assign(click=next(pairs).isin(next(pairs)).astype("float32"))


def read_kuairec(data_dir: str | Path) -> Feed:
    """KuaiRec (Gao et al., CIKM 2022): big_matrix.csv, or small_matrix.csv where there is no other, and optionally
    item_categories.csv.

    A behaviour is positive where a video was watched for more than twice its length (`watch_ratio` > 2), as the
    authors propose. The small matrix has rows without a time; they come first in a user's log, in the file's order.
    Times are seconds, durations milliseconds. Days end at Beijing's midnight.

    Raises:
        DataError: files or columns are missing.
    """
    folder = data_folder(data_dir)
    found = [name for name in ("big_matrix.csv", "small_matrix.csv") if (folder / name).is_file()]
    if not found:
        raise DataError(
            f"{folder}: no KuaiRec data: neither big_matrix.csv nor small_matrix.csv. Give data_dir the folder that "
            "holds one of them."
        )
    columns = ["user_id", "video_id", "play_duration", "video_duration", "timestamp", "watch_ratio"]
    raw = read_columns(folder / found[0], columns, {"user_id": ID, "video_id": ID})
    frame = {"user_id": raw["user_id"], "item_id": raw["video_id"], "timestamp": raw["timestamp"]}
    frame["position"] = pd.Series(np.arange(len(raw)), dtype="float64").where(raw["timestamp"].isna())
    frame |= {"watch_time": _divided(raw["play_duration"], 1000), "duration": _divided(raw["video_duration"], 1000)}
    parts = [(pd.DataFrame(frame | {"watch_ratio": raw["watch_ratio"]}), found[0])]
    path, roles, catalogue = folder / "item_categories.csv", {}, _catalogue(parts)
    if path.is_file():
        items = read_columns(path, ["video_id", "feat"], {"video_id": ID, "feat": TEXT})
        lists = items["feat"].astype("str").str.extract(r"^\s*\[(.*)\]\s*$")[0]
        refuse(
            path.name, "feat", lists.isna() & items["feat"].notna(), items["feat"], "is not a list", "Write [1, 2]."
        )
        items["feat"] = lists
        catalogue, roles = _catalogue(parts, (items, path.name), "video_id"), {"multi_categorical_columns": ["feat"]}
    return Feed.from_frames("kuairec", parts, catalogue, ["watch_ratio>2"], timezone=KUAIREC_TIMEZONE, **roles)


def read_otto(data_dir: str | Path) -> Feed:
    """OTTO (Normann et al., 2022): *train.jsonl and *test.jsonl, gzipped or not, either or both.

    A session holds all events of one user, so that it is the feed's user. Every event is a positive interaction, as
    the task is the next event; `click`, `cart` and `order` say which it was. Times are milliseconds.

    Raises:
        DataError: no such file, or a session that lacks a key or has events of another type.
    """
    folder = data_folder(data_dir)
    paths = [path for name in ("*train.jsonl", "*test.jsonl") for path in _unpacked(folder, name)]
    if not paths:
        raise DataError(
            f"{folder}: no OTTO data: neither train.jsonl nor test.jsonl, gzipped or not. Give data_dir the folder "
            "that holds one of them."
        )
    parts = [(_otto_events(path), path.name) for path in paths]
    return Feed.from_frames("otto", parts, _catalogue(parts), [])


def _otto_events(path: Path) -> pd.DataFrame:
    # Arrays hold 8 bytes an event where lists of the 200 million would hold 36.
    sessions, items, times, kinds = array("q"), array("q"), array("q"), array("b")
    numbers = {name: number for number, name in enumerate(OTTO_EVENTS)}
    for row, record in enumerate(json_lines(path)):
        column = "session"
        try:
            session, column = record["session"], "events"
            events, column = record["events"], "aid"
            items.extend([event["aid"] for event in events])
            column = "ts"
            times.extend([event["ts"] for event in events])
            column = "type"
            kinds.extend([numbers[event["type"]] for event in events])
            column = "session"
            sessions.extend([session] * len(events))
        except (KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"{path.name}: column '{column}' cannot be used, first at row {row} (rows counted from 0): "
                f"{type(error).__name__} {error}. A session needs 'session' and 'events', an event whole numbers as "
                f"'aid' and 'ts' and one of {', '.join(OTTO_EVENTS)} as 'type'."
            ) from None
    columns = {"user_id": sessions, "item_id": items, "timestamp": times}
    frame = pd.DataFrame({name: np.frombuffer(values, dtype=np.int64) for name, values in columns.items()})
    frame["timestamp"] = frame["timestamp"] / 1000
    found = np.frombuffer(kinds, dtype=np.int8)
    return frame.assign(
        **{OTTO_EVENTS[name]: (found == number).astype(np.float32) for name, number in numbers.items()}
    )


def _catalogue(
    parts: Tables, items: tuple[pd.DataFrame, str] | None = None, id_column: str = "item_id"
) -> tuple[pd.DataFrame, str]:
    """The items that the interactions name: in the order of the table of items, then those that it lacks."""
    named = pd.concat([frame["item_id"] for frame, _ in parts], ignore_index=True).dropna().drop_duplicates()
    if items is None:
        return named.to_frame("item_id"), ", ".join(source for _, source in parts)
    table, source = items
    table = table.rename(columns={id_column: "item_id"})
    unlisted = named[~named.isin(table["item_id"])]
    listed = table[table["item_id"].isin(named)]
    if not len(listed):
        raise DataError(
            f"{source}: column '{id_column}' holds none of the items that {parts[0][1]} names, e.g. "
            f"{named.iloc[0] if len(named) else None}. Put the files of one set together."
        )
    if len(unlisted):
        warnings.warn(
            f"{source}: {len(unlisted)} of the {len(named)} items that the interactions name are not in it, e.g. "
            f"{unlisted.iloc[0]}; they have no features.",
            stacklevel=3,
        )
        listed = pd.concat([listed, unlisted.to_frame("item_id")], ignore_index=True)
    return listed, source


def _unpacked(folder: Path, pattern: str) -> list[Path]:
    """Files of the pattern, gzipped or not, by name; of a file that is there in both forms the one that is not."""
    found = {path.name.removesuffix(".gz"): path for path in folder.glob(f"{pattern}.gz")}
    found |= {path.name: path for path in folder.glob(pattern)}
    return [found[name] for name in sorted(found)]


def _words(values: pd.Series) -> pd.Series:
    """Lists of the words between spaces, none where there is nothing."""
    return values.astype("str").fillna("").str.split()


def _unix_seconds(times: pd.Series) -> pd.Series:
    return times.astype("datetime64[us]").astype("int64") / 1e6


def _exploded(frame: pd.DataFrame, columns: Sequence[str] = ("item_id",)) -> pd.DataFrame:
    """A row for each element of the lists in `columns`, in their order, and in `row` the number of the lists' row."""
    frame = frame.reset_index(drop=True).explode(list(columns)).reset_index(names="row")
    return frame.dropna(subset="item_id").reset_index(drop=True)


def _clicks(history: pd.DataFrame) -> pd.DataFrame:
    """Clicks of an exploded history, of no known impression."""
    unknown = pd.array([pd.NA] * len(history), dtype="Int64")
    return history.drop(columns="row").assign(session_id=unknown, click=1.0)


def _divided(values: pd.Series, divisor: float) -> pd.Series:
    """Quotients, or what is not a number as it is, which the schema refuses by its row."""
    return values / divisor if pd.api.types.is_numeric_dtype(values.dtype) else values


def _numbers(values: pd.Series, source: str) -> pd.Series:
    numbers = pd.to_numeric(values, errors="coerce")
    refuse(source, values.name, numbers.isna() & values.notna(), values, "is not a number", "Correct the file.")
    return numbers
