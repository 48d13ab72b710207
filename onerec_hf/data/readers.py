"""Readers: from files or tables in memory to a Feed.

KuaiRand (the official CSV download, or the Parquet folder of this project), Amazon-style sequences, other public sets
(see public_sets.py), a person's own tables and `datasets` repositories by a column mapping, tables in memory, and the
simulated feed; and a saved Feed.

A column mapping is a YAML file:

```yaml
name: my_feed                          # optional
timezone: Europe/Berlin                # optional, default UTC: whose midnight separates user days
interactions:
  file: log/*.csv                      # CSV, TSV, JSON lines or Parquet below data_dir, a pattern or a list; on the
                                       # Hub: {config: ..., split: train} in the place of `file`
  header: [uid, time, video]           # optional: all columns of text files whose first line is a row already
  delimiter: "\\t"                      # optional: what parts the columns of text files, by default what they say
  columns:                             # schema column: your column
    user_id: uid                       # or {column: uid, type: string}; types are string and integer,
    item_id: video                     # by default what the column holds
    timestamp: time                    # or `position: rank` where there are no times, or both
    session_id: request                # optional
    propensity: chance                 # optional, of exposures that were drawn by known chances
                                       # where there is neither: `order: file` beside columns, for rows that stand
                                       # in the order of time
  timestamp_unit: ms                   # s, ms, us, ns or iso; by default what the values say, or else s; or how dates
                                       # are written, such as "%d.%m.%Y %H:%M"
  feedback:                            # optional; name: column, or {column: ..., scale: factor}
    watch_time: {column: play_ms, scale: 0.001}
    duration: {column: length_ms, scale: 0.001}
    view: is_view
    rating: stars
    purchase: {column: event, equals: [buy, order]}  # 1 where the column has one of these values, else 0
items:                                 # optional: without it the items are those that the interactions name
  file: videos.parquet
  columns: {item_id: video}
  text: title                          # each optional: columns of your items
  categorical: [author]
  multi_categorical: [tags]            # lists, also as text: ["a", "b"], a|b, a;b or a,b
  numeric: [age]
  embedding: vector
  image: cover                         # the pictures' URLs, for the demo
  unlisted: add                        # optional: items that only the interactions name, without features
users:                                 # optional: categories that the encoder may read (user_features)
  file: users.csv
  columns: {user_id: uid}
  categorical: [country, age_group]
positive_feedback: [view, "rating>=4"] # optional, default: every interaction is positive
```
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from glob import glob
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError

from ..staged_files import staged_directory, staged_file
from ..yaml_files import read_yaml
from .data_arguments import DataArguments
from .data_files import (
    CSV_OPTIONS,
    UNREADABLE,
    Tables,
    data_folder,
    frame_of_table,
    is_table,
    joined,
    memory_frame,
    read_columns,
    typed_columns,
)
from .feed import Feed, WholeLog
from .public_sets import (
    read_amazon_reviews,
    read_eb_nerd,
    read_kuairec,
    read_mind,
    read_movielens,
    read_otto,
    read_yambda,
)
from .schema import (
    CATEGORY,
    ID,
    KEY_COLUMNS,
    NUMBER,
    PROBABILITY_COLUMNS,
    PROPENSITY,
    SECONDS_COLUMNS,
    TEXT,
    DataError,
    canonical_categories,
    canonical_ids,
    id_type,
    interaction_features,
    refuse,
    require_columns,
    same_kind,
)
from .simulated_feed import SimulatedFeed
from .timestamps import TIMESTAMP_UNITS, unix_seconds

KUAIRAND_POSITIVE = ["view", "like", "follow", "comment", "forward"]
KUAIRAND_FEEDBACK = {"view": "long_view"} | {
    name: f"is_{name}" for name in ("like", "follow", "comment", "forward", "click", "profile_enter", "hate")
}
KUAIRAND_USER_COLUMNS = [
    *("user_active_degree", "is_live_streamer", "is_video_author"),
    *("follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range"),
    *(f"onehot_feat{number}" for number in range(18)),
]
KUAIRAND_TIMEZONE = "Asia/Shanghai"
DURATION_COLUMN = "video_duration"
SOURCE_PATTERNS = {
    "kuairand": ("log_*.csv", "video_features_basic_*.csv", "user_features_*.csv", "*.parquet"),
    "amazon": ("interactions.parquet", "items.parquet"),
    "amazon_reviews": ("*.csv", "*.csv.gz", "meta_*.jsonl", "meta_*.jsonl.gz"),
    "movielens": ("ratings.*", "movies.*", "users.dat"),
    "yambda": ("listens.parquet", "likes.parquet", "*_item_mapping.parquet"),
    "mind": ("behaviors.tsv", "news.tsv", "*/behaviors.tsv", "*/news.tsv"),
    "eb_nerd": ("articles.parquet", "*/behaviors.parquet", "*/history.parquet"),
    "kuairec": ("*_matrix.csv", "item_categories.csv"),
    "otto": ("*train.jsonl", "*train.jsonl.gz", "*test.jsonl", "*test.jsonl.gz"),
}


def load_feed(args: DataArguments) -> Feed:
    """The feed that the arguments name, checked and in the canonical schema.

    Raises:
        DataError: files or columns are missing or hold what they must not (see schema.py).
    """
    if args.dataset == "simulated":
        feed = SimulatedFeed.generate(args.simulated_users, args.simulated_items, args.data_seed).feed()
    elif args.dataset == "table":
        feed = read_table(args.data_dir, args.column_mapping)
    elif args.dataset == "hub":
        feed = read_hub_dataset(args.hub_dataset, args.column_mapping)
    else:
        feed = FOLDER_READERS[args.dataset](args.data_dir)
    if args.positive_feedback is not None:
        feed = feed.with_positive_feedback(args.positive_feedback)
    if args.repeated_positives != "keep":
        feed = feed.without_repeats(in_a_row=args.repeated_positives == "first_in_a_row")
    return feed


def source_files(args: DataArguments) -> list[Path | str]:
    """The files that [`load_feed`] reads: the column mapping and what lies below data_dir, as text where it has a
    protocol."""
    if args.dataset == "table":
        mapping = read_mapping(args.column_mapping, "file")
        sections = [mapping[name] for name in ("interactions", "items", "users") if name in mapping]
        data = [path for section in sections for path in source_paths(section, args.data_dir, args.column_mapping)]
    else:
        patterns = SOURCE_PATTERNS.get(args.dataset, ())
        data = [path for pattern in patterns for path in sorted(data_folder(args.data_dir).glob(pattern))]
    return data + ([Path(args.column_mapping)] if args.dataset in ("table", "hub") else [])


def read_kuairand(data_dir: str | Path) -> Feed:
    """KuaiRand (Gao et al., CIKM 2022), from either of two folders.

    Parquet: interactions.parquet, items.parquet and optionally history.parquet (behaviours before the log, in order
    but without times, with long_view and is_like only) and users.parquet. Official download, of any size:
    log_standard_*.csv, video_features_basic_*.csv and optionally user_features_*.csv and log_random_*.csv, exposures
    in place of which any of that log's videos could have been drawn: their `propensity` is one over the number of
    these. `view` is long_view. Times are time_ms; the columns date and hourmin run some minutes ahead, so that by
    them the last behaviours of a day belong to the next. Days end at Beijing's midnight.

    Raises:
        DataError: files or columns are missing.
    """
    folder = data_folder(data_dir)
    logs, catalogue = sorted(folder.glob("log_standard_*.csv")), sorted(folder.glob("video_features_basic_*.csv"))
    if logs and catalogue:
        item_column = "video_id"
    elif (folder / "interactions.parquet").is_file():
        logs, catalogue, item_column = [folder / "interactions.parquet"], [folder / "items.parquet"], "item_id"
    else:
        raise DataError(
            f"{folder}: no KuaiRand data: neither interactions.parquet and items.parquet, nor log_standard_*.csv and "
            "video_features_basic_*.csv. Give data_dir the folder that holds these files."
        )
    parts, ids = [], dict.fromkeys(("user_id", item_column), ID)
    if item_column == "item_id" and (folder / "history.parquet").is_file():
        history = read_columns(folder / "history.parquet", ["user_id", "position", "item_id", "long_view", "is_like"])
        parts.append((history.rename(columns={"long_view": "view", "is_like": "like"}), "history.parquet"))
    columns = ["user_id", item_column, "time_ms", "play_time_ms", "duration_ms", *KUAIRAND_FEEDBACK.values()]
    random_logs = sorted(folder.glob("log_random_*.csv")) if item_column == "video_id" else []
    randomised = {path: read_columns(path, columns, ids) for path in random_logs}
    drawn_from = set().union(*(raw[item_column] for raw in randomised.values()))
    for path in [*logs, *randomised]:
        raw = randomised[path] if path in randomised else read_columns(path, columns, ids)
        frame = {"user_id": raw["user_id"], "item_id": raw[item_column], "timestamp": raw["time_ms"] / 1000}
        frame |= {"watch_time": raw["play_time_ms"] / 1000, "duration": raw["duration_ms"] / 1000}
        frame |= {name: raw[column] for name, column in KUAIRAND_FEEDBACK.items()}
        if randomised:
            frame[PROPENSITY] = 1 / max(len(drawn_from), 1) if path in randomised else np.nan
        parts.append((pd.DataFrame(frame), path.name))
    # Music is unique to nearly every video, so it says nothing of what videos share.
    categorical = ["author_id", "video_type", "upload_type", "music_type"]
    columns = [item_column, *categorical, "tag", DURATION_COLUMN]
    items, items_source = joined([(read_columns(path, columns, ids), path.name) for path in catalogue])
    items = items.rename(columns={item_column: "item_id"})
    items[DURATION_COLUMN] = items[DURATION_COLUMN] / 1000
    tables = sorted(folder.glob("user_features_*.csv" if item_column == "video_id" else "users.parquet"))
    users = [(read_columns(path, ["user_id", *KUAIRAND_USER_COLUMNS], ids), path.name) for path in tables]
    return Feed.from_frames(
        "kuairand",
        parts,
        (items, items_source),
        KUAIRAND_POSITIVE,
        users=joined(users) if users else None,
        categorical_columns=categorical,
        multi_categorical_columns=["tag"],
        numeric_columns=[DURATION_COLUMN],
        timezone=KUAIRAND_TIMEZONE,
    )


def read_amazon(data_dir: str | Path) -> Feed:
    """Amazon-style sequences: interactions.parquet (user_id, item_id, position, timestamp) and items.parquet (item_id,
    title, attribute_ids). There is no feedback: every interaction is positive.

    Raises:
        DataError: files or columns are missing.
    """
    folder = data_folder(data_dir)
    interactions = read_columns(folder / "interactions.parquet", ["user_id", "item_id", "position", "timestamp"])
    items = read_columns(folder / "items.parquet", ["item_id", "title", "attribute_ids"])
    return Feed.from_frames(
        "amazon",
        [(interactions, "interactions.parquet")],
        (items, "items.parquet"),
        [],
        text_column="title",
        multi_categorical_columns=["attribute_ids"],
    )


FOLDER_READERS = {
    "kuairand": read_kuairand,
    "amazon": read_amazon,
    "amazon_reviews": read_amazon_reviews,
    "movielens": read_movielens,
    "yambda": read_yambda,
    "mind": read_mind,
    "eb_nerd": read_eb_nerd,
    "kuairec": read_kuairec,
    "otto": read_otto,
}


def read_table(data_dir: str | Path, column_mapping: str | Path) -> Feed:
    """A person's own CSV or Parquet files by a column mapping (see the module's docstring).

    Raises:
        DataError: a mapping that cannot be read, files or columns that are missing, values that cannot be used.
    """
    folder = data_folder(data_dir)
    mapping = read_mapping(column_mapping, "file")

    def read(section: dict, kinds: dict[str, str]) -> Tables:
        paths = mapped_files(section, data_dir, column_mapping)
        layout = {key: section.get(key) for key in LAYOUT_KEYS}
        tables = [(read_columns(path, list(kinds), kinds, **layout), _name_below(path, folder)) for path in paths]
        # Spark writes parts without rows.
        return [(frame, source) for frame, source in tables if len(frame)] or tables[:1]

    return _map_feed(mapping, read, default_name=folder.name)


def source_paths(section: dict, data_dir: str, column_mapping: str) -> list[str]:
    """The files of a section of the column mapping, below a local `data_dir` or one with a protocol that fsspec
    knows, such as `s3://`.

    Raises:
        DataError: no file matches.
    """
    if "://" not in data_dir:
        return [str(path) for path in mapped_files(section, data_dir, column_mapping)]
    system, found = file_system(data_dir), []
    for pattern in section["file"] if isinstance(section["file"], list) else [section["file"]]:
        named = f"{data_dir.rstrip('/')}/{pattern}"
        matches = system.find(named) if system.isdir(named) else sorted(system.glob(named))
        _require_plain_files(named, matches)
        tables = [path for path in matches if not any(part[:1] in "_." for part in Path(path).parts[1:])]
        if not tables:
            raise DataError(f"{column_mapping}: no file matches '{pattern}' below {data_dir}. Correct 'file'.")
        found += [system.unstrip_protocol(path) for path in tables]
    return list(dict.fromkeys(found))


def file_system(path: str) -> fsspec.AbstractFileSystem:
    """Of a path with or without a protocol."""
    return fsspec.core.url_to_fs(path)[0]


def mapped_files(section: dict, data_dir: str | Path, column_mapping: str | Path) -> list[Path]:
    """Files of a mapping's section, in the order of its patterns, each once; of a folder all tables below it.

    Raises:
        DataError: no file matches a pattern.
    """
    folder, paths = data_folder(data_dir), []
    for pattern in section["file"] if isinstance(section["file"], list) else [section["file"]]:
        named = folder / Path(str(pattern or "")).expanduser()
        # A name is taken as it is before it is a pattern: it may have brackets.
        matches = [named] if pattern and named.exists() else map(Path, sorted(glob(str(named), recursive=True)))
        found = [path for one in matches for path in (_tables_below(one) if one.is_dir() else [one])]
        if not pattern or not found:
            raise DataError(f"{column_mapping}: no file matches '{pattern or ''}' below {folder}. Correct 'file'.")
        paths += found
    return list({path.resolve(): path for path in reversed(paths)}.values())[::-1]


def _tables_below(folder: Path) -> list[Path]:
    """Spark and Dask write a table as a folder of parts, and beside them files that are none."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    _require_plain_files(folder, files)
    below = [path for path in files if is_table(path)]
    return [path for path in below if not any(part[0] in "_." for part in path.relative_to(folder).parts)]


def _require_plain_files(named: str | Path, files: Iterable[str | Path]) -> None:
    """Raises DataError for a folder of a table format whose files hold rows that are not in the table any more."""
    for path in map(Path, files):
        delta, iceberg = "_delta_log" in path.parts, path.name.endswith(".metadata.json")
        if delta or iceberg:
            raise DataError(
                f"{named}: is a table of {'Delta Lake' if delta else 'Iceberg'}, of which some files may hold rows "
                "that were deleted or replaced since. Write the table out as plain Parquet files and name these."
            )


def _name_below(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def read_hub_dataset(hub_dataset: str, column_mapping: str | Path) -> Feed:
    """A `datasets` repository (or anything else that `datasets.load_dataset` takes) by a column mapping.

    Each section of the mapping has `config` (optional) and `split` (default train) in the place of `file`.

    Raises:
        DataError: a mapping that cannot be read, columns that are missing, values that cannot be used.
    """
    mapping = read_mapping(column_mapping, None)

    def read(section: dict, kinds: dict[str, str]) -> Tables:
        split, config = section.get("split", "train"), section.get("config")
        options = {}
        # A CSV file has no types: its values are read as the text that they are.
        is_csv = datasets.load_dataset_builder(hub_dataset, config).name == "csv"
        if is_csv:
            first = next(iter(datasets.load_dataset(hub_dataset, config, split=split, streaming=True)), {})
            options = {"features": datasets.Features(dict.fromkeys(first, datasets.Value("string"))), **CSV_OPTIONS}
        part = datasets.load_dataset(hub_dataset, config, split=split, **options)
        source = f"{hub_dataset} ({config or 'default'}/{split})"
        require_columns(part.column_names, list(kinds), source)
        table = part.select_columns(list(kinds)).with_format("arrow")[:]
        return [(typed_columns(table, kinds) if is_csv else frame_of_table(table, kinds, source), source)]

    return _map_feed(mapping, read, default_name=hub_dataset.split("/")[-1])


def feed_from_log(
    log,
    items=None,
    users=None,
    *,
    user_id: str = "user_id",
    item_id: str = "item_id",
    timestamp: str = "timestamp",
    feedback: Mapping | Sequence[str] | None = None,
    positive_feedback: Sequence[str] = (),
    item_columns: Mapping | None = None,
) -> Feed:
    """A feed of tables in memory: data frames of pandas or polars, `datasets.Dataset` or Arrow tables.

    >>> import pandas as pd
    >>> rows = [("ann", "tea", 10, 1), ("ann", "milk", 20, 0), ("bob", "milk", 15, 1)]
    >>> log = pd.DataFrame(rows, columns=["who", "what", "time", "liked"])
    >>> feed = feed_from_log(
    ...     log,
    ...     user_id="who",
    ...     item_id="what",
    ...     timestamp="time",
    ...     feedback={"like": "liked"},
    ...     positive_feedback=["like"],
    ... )
    >>> feed.items["item_id"].tolist(), [history.tolist() for history in feed.positive_histories()]
    (['tea', 'milk'], [[0], [1]])

    Args:
        log: A row by behaviour. Columns `position`, `session_id` and `propensity` are read where it has them (see
            schema.py); without times it needs `position`.
        items: The catalogue, a row by item. By default the items that the log names, in its order.
        users: A row by user, all of whose other columns are categories.
        user_id, item_id, timestamp: Columns, in `items` and `users` too.
        feedback: Columns of the log, or columns by the name that their feedback has here, as in a column mapping
            (`{"watch_time": {"column": "play_ms", "scale": 0.001}}`). By default those that the log has of watch_time,
            duration, view, follow and like.
        positive_feedback: Conditions, any of which makes a behaviour positive: a column (more than 0) or a comparison
            such as `"watch_time>=60"`. By default every behaviour is positive.
        item_columns: What the columns of `items` are, as in a column mapping: `text`, `embedding` (a column each),
            `categorical`, `multi_categorical`, `numeric` (lists of columns).

    Raises:
        DataError: a table of another kind, a column that is missing, or what a reader of files refuses too.
    """
    frame = memory_frame(log, "log")
    for name, given in (("feedback", feedback), ("positive_feedback", positive_feedback)):
        if isinstance(given, str):
            raise DataError(f"{name} is {given!r}, where a list is needed. Pass [{given!r}].")
    if feedback is None:
        feedback = [name for name in (*SECONDS_COLUMNS, *PROBABILITY_COLUMNS) if name in frame]
    feedback = dict(feedback) if isinstance(feedback, Mapping) else {name: name for name in feedback}
    columns = {name: name for name in ("position", "session_id", PROPENSITY) if name in frame}
    if timestamp in frame or "position" not in columns:
        columns["timestamp"] = timestamp
    mapping = {
        "interactions": {"columns": {"user_id": user_id, "item_id": item_id, **columns}, "feedback": feedback},
        "positive_feedback": list(positive_feedback),
    }
    tables = {"interactions": (frame, "log")}
    if items is not None:
        tables["items"] = memory_frame(items, "items"), "items"
        mapping["items"] = {"columns": {"item_id": item_id}, **(item_columns or {})}
    elif item_columns:
        raise DataError("item_columns are columns of items, which is not given. Pass the table of items.")
    if users is not None:
        tables["users"] = memory_frame(users, "users"), "users"
        others = [name for name in tables["users"][0].columns if name != user_id]
        mapping["users"] = {"columns": {"user_id": user_id}, "categorical": others}
    mapping = _checked_mapping(copy.deepcopy(mapping), "log", None)
    arguments = {user_id: "user_id", item_id: "item_id", timestamp: "timestamp"}

    def read(section: dict, kinds: dict[str, str]) -> Tables:
        name = next(name for name in tables if mapping[name] is section)
        table, source = tables[name]
        for column in kinds:
            if column not in table:
                argument = arguments.get(column, "feedback" if name == "interactions" else "item_columns")
                raise DataError(
                    f"{source}: column '{column}' is missing; the columns are {', '.join(map(str, table.columns))}. "
                    f"Pass its name there to feed_from_log as {argument}=."
                )
        return [(table[list(kinds)], source)]

    return _map_feed(mapping, read, default_name="log")


def as_feed(log) -> Feed:
    """A feed as it is, and of a table in memory [`feed_from_log`], by the schema's names of columns."""
    return log if isinstance(log, Feed) else feed_from_log(log)


ID_COLUMNS = ("user_id", "item_id", "session_id")
LAYOUT_KEYS = ("header", "delimiter")  # of text files
LIST_KEYS = ("file", "header", "categorical", "multi_categorical", "numeric")
MAPPING_KEYS = ("interactions", "items", "name", "positive_feedback", "timezone", "users")
# Of each section: the schema's columns, of which the first two are needed, and the other keys.
MAPPING_SECTIONS = {
    "interactions": (KEY_COLUMNS, {"columns", "timestamp_unit", "feedback", "order"}),
    "items": (
        ("item_id",),
        {"columns", "text", "categorical", "multi_categorical", "numeric", "embedding", "image", "unlisted"},
    ),
    "users": (("user_id",), {"columns", "categorical"}),
}


def read_mapping(path: str | Path, file_key: str | None) -> dict:
    """The mapping, with its shape checked."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such column mapping. Give column_mapping the path of a YAML file.")
    try:
        mapping = read_yaml(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    return _checked_mapping(mapping, path, file_key)


def _checked_mapping(mapping: object, path: str | Path, file_key: str | None) -> dict:
    """The mapping, whose name is `path`, with the types of its ids stated apart."""
    if not isinstance(mapping, dict) or not isinstance(mapping.get("interactions"), dict):
        raise DataError(f"{path}: a column mapping needs a section 'interactions' with 'columns' in it.")
    for key in mapping:
        if key not in MAPPING_KEYS:
            raise DataError(f"{path}: unknown key '{key}'; use {', '.join(MAPPING_KEYS)}.")
    for section, (columns, keys) in MAPPING_SECTIONS.items():
        if section not in mapping:
            continue
        part = mapping[section]
        keys = keys | ({file_key, *LAYOUT_KEYS} if file_key else {"config", "split"})
        if not isinstance(part, dict):
            raise DataError(f"{path}: '{section}' must be a mapping with {', '.join(sorted(keys))}.")
        for key in part:
            if key not in keys:
                raise DataError(f"{path}: unknown key '{key}' in '{section}'; use {', '.join(sorted(keys))}.")
        for key in filter(None, (file_key, "columns")):
            if key not in part:
                raise DataError(f"{path}: '{section}' needs '{key}'.")
        if not isinstance(part["columns"], dict):
            raise DataError(f"{path}: '{section}.columns' must map schema columns to yours, e.g. item_id: video.")
        for name, column in part["columns"].items():
            if name not in columns:
                raise DataError(f"{path}: unknown column '{name}' in '{section}.columns'; use {', '.join(columns)}.")
            if isinstance(column, dict) and not _states_type(name, column):
                raise DataError(
                    f"{path}: '{section}.columns.{name}' must be a column, or for an id "
                    "{column: ..., type: string} or {column: ..., type: integer}."
                )
        for name in columns[:2]:
            if name not in part["columns"]:
                raise DataError(f"{path}: '{section}.columns' needs '{name}'.")
        if not isinstance(part.get("header", []), list):
            raise DataError(f"{path}: '{section}.header' must be a list of the names of all columns.")
        if not re.fullmatch(r"[^\w\"]", str(part.get("delimiter", ","))):
            raise DataError(f"{path}: '{section}.delimiter' must be one sign, such as \"\\t\" or ';'.")
        given = {name: value for name, value in part["columns"].items() if isinstance(value, dict)}
        part["types"] = {name: value["type"] for name, value in given.items()}
        part["columns"] = part["columns"] | {name: value["column"] for name, value in given.items()}
    unit = mapping["interactions"].get("timestamp_unit", "s")
    if unit not in TIMESTAMP_UNITS and not (isinstance(unit, str) and "%" in unit):
        shown = unit if isinstance(unit, str) else reprlib.repr(unit)
        raise DataError(f"{path}: timestamp_unit '{shown}' is not known; use {', '.join(TIMESTAMP_UNITS)}.")
    for section, key, only in (("interactions", "order", "file"), ("items", "unlisted", "add")):
        if mapping.get(section, {}).get(key, only) != only:
            raise DataError(f"{path}: '{section}.{key}' must be {only}, or left out.")
    for section in ("items", "users"):
        for key in ("categorical", "multi_categorical", "numeric"):
            if not isinstance(mapping.get(section, {}).get(key, []), list):
                raise DataError(f"{path}: '{section}.{key}' must be a list of columns, e.g. [author].")
    feedback = mapping["interactions"].get("feedback", {})
    if not isinstance(feedback, dict):
        raise DataError(f"{path}: 'interactions.feedback' must map names to columns, e.g. view: is_view.")
    for name, column in feedback.items():
        if name in KEY_COLUMNS:
            raise DataError(f"{path}: feedback cannot be called '{name}'; that is a column of the schema.")
        if isinstance(column, dict) and set(column) not in ({"column"}, {"column", "scale"}, {"column", "equals"}):
            raise DataError(f"{path}: feedback '{name}' needs 'column', and at most 'scale' or 'equals' beside it.")
        if isinstance(column, dict) and "scale" in column:
            column["scale"] = _factor(column["scale"], f"{path}: scale of feedback '{name}'")
    if not isinstance(mapping.get("positive_feedback", []), list):
        raise DataError(f"{path}: 'positive_feedback' must be a list, e.g. [view, 'rating>=4'].")
    _require_plain(path, mapping)
    return mapping


def _require_plain(path: str | Path, value: object, place: tuple = ()) -> None:
    """Raises DataError for a value below `place` of a mapping that is neither text nor a number, such as a list in the
    place of a column's name."""
    if isinstance(value, dict) and len(place) < 4:
        for key, inner in value.items():
            _require_plain(path, inner, (*place, key))
        return
    lists = isinstance(value, list) and (
        place == ("positive_feedback",) or len(place) == 2 and place[1] in LIST_KEYS or place[3:] == ("equals",)
    )
    for one in value if lists else [value]:
        if not (one is None or isinstance(one, (str, int, float))) or isinstance(one, str) and "\0" in one:
            name = ".".join(map(str, place))
            raise DataError(f"{path}: '{name}' must be text or a number, got {reprlib.repr(one)}. Correct it.")


def _factor(value: object, name: str) -> float:
    """A number; YAML reads 1e-3 as text."""
    try:
        factor = np.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        factor = np.nan
    if not np.isfinite(factor):
        raise DataError(f"{name} must be a number such as 0.001, got {reprlib.repr(value)}.")
    return factor


def _states_type(name: str, column: dict) -> bool:
    types = {"string", "integer"} if name in ID_COLUMNS else set()
    return set(column) == {"column", "type"} and str(column["type"]) in types


Read = Callable[[dict, dict[str, str]], Tables]  # of a section and the kinds of its columns


def _map_feed(mapping: dict, read: Read, default_name: str) -> Feed:
    """A feed of the mapped columns; `read(section, kinds)` gives the frames of a section and their names."""
    parts = interaction_frames(mapping["interactions"], read)
    items = item_table(mapping, read)
    if items is None or mapping["items"].get("unlisted") == "add":
        ids = [canonical_ids(frame["item_id"], "item_id", source) for frame, source in parts]
        items = with_unlisted(items, ids, parts[0][1])
    return Feed.from_frames(
        str(mapping.get("name", default_name)),
        parts,
        items,
        [str(condition) for condition in mapping.get("positive_feedback", [])],
        users=user_table(mapping, read),
        timezone=str(mapping.get("timezone", "UTC")),
        **item_roles(mapping),
    )


def feedback_parts(section: dict) -> dict[str, dict]:
    """Of the section of the interactions, by the name of a feedback: its `column`, and `scale` or `equals`."""
    feedback = section.get("feedback", {})
    return {name: part if isinstance(part, dict) else {"column": part} for name, part in feedback.items()}


def interaction_kinds(section: dict) -> dict[str, str]:
    """What each column that the section of the interactions names holds."""
    feedback = feedback_parts(section).values()
    return {part["column"]: CATEGORY if "equals" in part else NUMBER for part in feedback} | _kinds_of_columns(section)


def interaction_frames(section: dict, read: Read) -> Tables:
    """The interactions under the schema's names, as `Feed.from_frames` takes them."""
    parts, rows = [], 0
    for raw, source in read(section, interaction_kinds(section)):
        frame = {name: _mapped(raw, section, name, source) for name in section["columns"]}
        if "timestamp" in frame:
            frame["timestamp"] = unix_seconds(frame["timestamp"], section.get("timestamp_unit"), source)
        if "order" in section:
            frame["position"] = np.arange(rows, rows + len(raw), dtype="float64")
            rows += len(raw)
        feedback = feedback_parts(section).items()
        frame |= {name: _feedback(raw[part["column"]], part, source) for name, part in feedback}
        parts.append((pd.DataFrame(frame), source))
    return parts


def item_roles(mapping: dict) -> dict:
    """The roles of the item columns, as keyword arguments of `Feed.from_frames`."""
    section = mapping.get("items", {})
    lists = ("categorical", "multi_categorical", "numeric")
    roles = {f"{key}_columns": section.get(key, []) for key in lists}
    return roles | {f"{key}_column": section.get(key) for key in ("text", "embedding", "image")}


def item_table(mapping: dict, read: Read) -> tuple[pd.DataFrame, str] | None:
    """The table of items and its name, if there is one."""
    if "items" not in mapping:
        return None
    section, roles = mapping["items"], item_roles(mapping)
    kinds = dict.fromkeys(roles["multi_categorical_columns"], TEXT)
    kinds |= dict.fromkeys(roles["numeric_columns"], NUMBER)
    kinds |= dict.fromkeys(roles["categorical_columns"], CATEGORY)
    kinds |= {section[key]: TEXT for key in ("text", "embedding", "image") if section.get(key)}
    return _joined_table("item_id", section, read(section, kinds | _kinds_of_columns(section)))


def user_table(mapping: dict, read: Read) -> tuple[pd.DataFrame, str] | None:
    """The table of users and its name, if there is one."""
    if "users" not in mapping:
        return None
    section = mapping["users"]
    kinds = dict.fromkeys(section.get("categorical", []), CATEGORY) | _kinds_of_columns(section)
    return _joined_table("user_id", section, read(section, kinds))


def _feedback(values: pd.Series, part: dict, source: str) -> pd.Series:
    """A column of feedback by its part of the mapping."""
    if "equals" in part:
        wanted = part["equals"] if isinstance(part["equals"], list) else [part["equals"]]
        text = canonical_categories(values, str(values.name), source)
        return text.isin([str(value) for value in wanted]).astype("float32").where(text.notna())
    scale = part.get("scale", 1)
    return values * scale if pd.api.types.is_numeric_dtype(values.dtype) and scale != 1 else values


def with_unlisted(
    items: tuple[pd.DataFrame, str] | None, ids: list[pd.Series], source: str
) -> tuple[pd.DataFrame, str]:
    """A table of items with those that only the interactions name, which have no features.

    Args:
        items: the table and its name; None where there are only those that the interactions name.
        ids: canonical ids of the interactions' items, several times too.
        source: the interactions' name.
    """
    if items is None:
        return pd.concat(same_kind(ids)).drop_duplicates().to_frame("item_id"), source
    table, source = items
    listed, *named = same_kind([canonical_ids(table["item_id"], "item_id", source), *ids])
    named = pd.concat(named).drop_duplicates()
    unlisted = named[~named.isin(listed)]
    return pd.concat([table.assign(item_id=listed), unlisted.to_frame("item_id")], ignore_index=True), source


def _kinds_of_columns(section: dict) -> dict[str, str]:
    types = section["types"]
    return {
        column: (TEXT if types.get(name) == "string" else ID) if name in ID_COLUMNS else NUMBER
        for name, column in section["columns"].items()
    }


def _mapped(raw: pd.DataFrame, section: dict, name: str, source: str) -> pd.Series:
    """A column under the schema's name, its ids of the type that the mapping states."""
    column, stated = section["columns"][name], section["types"].get(name)
    if stated is None:
        return raw[column]
    ids = canonical_ids(raw[column], column, source, nullable=name == "session_id")
    if stated == "integer" and id_type(ids) == "string":
        lossy = np.array([not pd.isna(v) and not _is_integer(v) for v in ids], dtype=bool)
        remedy = f"State type: string of '{name}' in the column mapping, or correct these ids."
        refuse(source, column, lossy, raw[column], "is no integer as it is written", remedy)
    return ids.astype("string" if ids.isna().any() else "str") if stated == "string" else ids


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"0|-?[1-9]\d*", text) is not None and -(2**63) <= int(text) < 2**63


def _joined_table(id_name: str, section: dict, tables: Tables) -> tuple[pd.DataFrame, str]:
    """The files of a table of items or users as one, with the schema's name of its id."""
    column = section["columns"][id_name]
    ids = [canonical_ids(_mapped(frame, section, id_name, source), id_name, source) for frame, source in tables]
    others = [frame.drop(columns=column) for frame, _ in tables]
    frames = [
        pd.concat([own.rename(id_name), other], axis=1) for own, other in zip(same_kind(ids), others, strict=True)
    ]
    return joined([(frame, source) for frame, (_, source) in zip(frames, tables, strict=True)])


def save_feed(feed: Feed, directory: str | Path) -> None:
    """Writes interactions.parquet, items.parquet, feed.json and, if there are any, users.parquet and world/.

    The folder `directory` appears whole or not at all, and replaces one of the same name. Only a SimulatedFeed is
    saved with its feed: any other world is left out, with a warning, and is to be set again on the loaded feed.
    """
    with staged_directory(directory) as folder:
        write_interactions(feed.interactions, folder / "interactions.parquet")
        save_feed_tables(feed, folder)


def write_interactions(interactions: pd.DataFrame, path: Path) -> None:
    """Writes canonical interactions."""
    _write_table(interactions, interaction_features(interactions), path)


def _write_table(frame: pd.DataFrame, features: datasets.Features, path: Path) -> None:
    table = pa.Table.from_pandas(frame, schema=features.arrow_schema, preserve_index=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as partial:
        pq.write_table(table.replace_schema_metadata(None), partial, compression="zstd")


def save_feed_tables(feed: Feed, folder: Path) -> None:
    """Writes what [`save_feed`] does beside the interactions; feed.json is the last."""
    _write_table(feed.items, feed.item_features(), folder / "items.parquet")
    if feed.users is not None:
        _write_table(feed.users, feed.user_features(), folder / "users.parquet")
    if isinstance(feed.world, SimulatedFeed):
        feed.world.save(folder / "world")
    elif feed.world is not None:
        kind = type(feed.world).__name__
        text = f"{feed.name}: its world, a {kind}, is not saved; set `world` of the loaded feed again."
        warnings.warn(text, stacklevel=3)
    elsewhere = ("interactions", "items", "users", "world", "whole")
    names = [field.name for field in dataclasses.fields(feed) if field.name not in elsewhere]
    fields = {name: getattr(feed, name) for name in names}
    if feed.whole is not None:
        fields["whole"] = dataclasses.asdict(feed.whole)
    with staged_file(folder / "feed.json") as partial:
        partial.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def part_name(table: str, index: int) -> str:
    """The file of a partition of a table, below the table's folder."""
    return f"{table}/part-{index:05d}.parquet"


def saved_partitions(directory: str | Path, table: str = "interactions") -> int:
    """How many partitions a table of a folder has; 0 where it is whole."""
    return len(list((Path(directory) / table).glob("part-*.parquet")))


def load_saved_feed(directory: str | Path, partitions: Sequence[int] | None = None) -> Feed:
    """Reads what `save_feed` wrote.

    Args:
        directory: of the saved feed.
        partitions: of one that is saved in partitions, those that are read; by default all of them.

    Raises:
        DataError: `directory` holds no saved feed, or a damaged one.
    """
    folder = Path(directory)
    if not (folder / "feed.json").is_file():
        raise DataError(f"{folder}: holds no saved feed (feed.json is missing). Run the stage that writes it first.")
    try:
        return _saved_feed(folder, partitions)
    except (*UNREADABLE, SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{folder}: holds no saved feed that can be read ({problem}). Delete the folder, and run the stage that "
            "writes it again."
        ) from error


def _saved_feed(folder: Path, partitions: Sequence[int] | None) -> Feed:
    fields = json.loads((folder / "feed.json").read_text(encoding="utf-8"))
    whole = fields.pop("whole", None)
    world = SimulatedFeed.load(folder / "world") if (folder / "world").is_dir() else None
    if whole is None:
        interactions = pd.read_parquet(folder / "interactions.parquet")
    else:
        interactions = read_partitions(folder, "interactions", partitions).to_pandas()
        if partitions is not None:
            fields["whole"] = WholeLog(**whole)
    items = pd.read_parquet(folder / "items.parquet")
    for column in fields["multi_categorical_columns"]:
        items[column] = pd.Series([list(values) for values in items[column]], dtype=object)
    if "session_id" in interactions and interactions["session_id"].isna().any():
        text = not pd.api.types.is_numeric_dtype(interactions["session_id"].dtype)
        interactions["session_id"] = interactions["session_id"].astype("string" if text else "Int64")
    users = pd.read_parquet(folder / "users.parquet") if (folder / "users.parquet").is_file() else None
    return Feed(interactions=interactions, items=items, world=world, users=users, **fields)


def read_partitions(directory: Path, table: str, partitions: Sequence[int] | None = None) -> pa.Table:
    """The rows of these partitions of a table, by default of all, as they stand in a whole one: users in the order of
    their ids."""
    partitions = range(saved_partitions(directory, table)) if partitions is None else partitions
    parts = [pq.read_table(directory / part_name(table, index)) for index in partitions]
    joined = pa.concat_tables(parts)
    return joined.take(pc.sort_indices(joined["user_id"])).combine_chunks() if len(parts) > 1 else joined
