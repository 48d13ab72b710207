"""The one schema of interactions, items and sessions, and the checks that stand at its door.

Interactions (one row per exposure of an item to a user, sorted by user and then by position)

| column | type | meaning |
|---|---|---|
| user_id | int64 or string | |
| item_id | int64 or string | one of the items |
| timestamp | float64 [s] | Unix time, NaN where unknown |
| position | int64 | 0, 1, 2, ... within the user, over all of the user's rows; rows without a time come first |
| session_id | int64 or string, optional | the request that exposed the item, null where unknown |
| propensity | float64 in (0, 1], optional | the chance by which this item was drawn, NaN where it is not known |
| watch_time, duration | float32 [s], optional | seconds watched, length of the video |
| view, follow, like | float32 in [0, 1], optional | effective view, follow, like |
| any other | float32, optional | any other named feedback (comment, rating, ...) |

Feedback is NaN where it is unknown, which is not the same as 0.

Items (one row per item; the row number is the item's catalogue index)

| column | type | meaning |
|---|---|---|
| item_id | int64 or string | unique, first column |
| text | string, optional | null where missing |
| categorical | string, optional | null where missing |
| multi-categorical | list of string, optional | empty where missing |
| numeric | float32, optional | NaN where missing |
| embedding | list of float32, optional | the same length for every item, finite |
| image | string, optional | the picture's URL, null where missing |

Users (one row per user, optional)

| column | type | meaning |
|---|---|---|
| user_id | int64 or string | unique, first column |
| any other | string | a category, null where missing |

Sessions (one row per training example)

| column | type | meaning |
|---|---|---|
| user_id | | |
| timestamp | float64 [s] | of the session's first behaviour, NaN where unknown |
| history_item_ids | list of item ids | positive behaviours strictly before the session, oldest first |
| session_item_ids | list of item ids | in the order of exposure |

Features of histories, beside history_item_ids where they are asked for

| column | type | meaning |
|---|---|---|
| history_feedback | list of lists of int8 | per behaviour and condition: 1 holds, 0 does not, null unknown |
| history_timestamps | list of float64 [s] | of each behaviour, null where unknown |
| timestamp | float64 [s] | of the session or evaluated behaviour, or the end of the data |
| user_features | struct of string | the user's categories by column, null where missing |

What the reward model reads of a user (a run has the same columns, see exposures.py)

| column | type | meaning |
|---|---|---|
| exposed_item_ids | list of item ids | latest items that the user was exposed to, negatives included, oldest first |
| exposed_feedback | list of float32 | all feedback columns of each, one exposure after the other, NaN where unknown |
| feedback_totals | list of float32 | of all exposures before these: the signals' sums, then how many are known |
| user_profile | struct of string | all categories of the user by column, null where missing |
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from datasets import Features, List, Value

SECONDS_COLUMNS = ("watch_time", "duration")
PROBABILITY_COLUMNS = ("view", "follow", "like")
PROPENSITY = "propensity"
# What a file's column holds: what may be read of it.
ID, CATEGORY, TEXT, NUMBER = "id", "category", "text", "number"
# Whole numbers up to here are exact as floats.
EXACT_FLOAT = 2**53
WHOLE_NUMBER = re.compile(r"-?\d+(\.0+)?")
KEY_COLUMNS = ("user_id", "item_id", "timestamp", "position", "session_id", PROPENSITY)


class DataError(ValueError):
    """Input data that cannot be used: the message names the file, column, first offending row and remedy.

    Attributes:
        row: that row's number, where there is one.
    """

    def __init__(self, message: str, row: int | None = None):
        super().__init__(message)
        self.row = row


def feedback_columns(interactions: pd.DataFrame) -> list[str]:
    """Names of the feedback columns of canonical interactions, in their order."""
    return [column for column in interactions.columns if column not in KEY_COLUMNS]


def id_type(ids: pd.Series) -> str:
    """The type ("int64" or "string") that these canonical ids keep in `datasets.Features`."""
    return "int64" if pd.api.types.is_integer_dtype(ids.dtype) else "string"


def interaction_features(interactions: pd.DataFrame) -> Features:
    """`datasets.Features` of canonical interactions."""
    features = {"user_id": Value(id_type(interactions["user_id"])), "item_id": Value(id_type(interactions["item_id"]))}
    features |= {"timestamp": Value("float64"), "position": Value("int64")}
    if "session_id" in interactions:
        features["session_id"] = Value(id_type(interactions["session_id"]))
    if PROPENSITY in interactions:
        features[PROPENSITY] = Value("float64")
    return Features(features | {column: Value("float32") for column in feedback_columns(interactions)})


def item_features(
    items: pd.DataFrame,
    text_column: str | None = None,
    categorical_columns: Iterable[str] = (),
    multi_categorical_columns: Iterable[str] = (),
    numeric_columns: Iterable[str] = (),
    embedding_column: str | None = None,
    image_column: str | None = None,
) -> Features:
    """`datasets.Features` of canonical items."""
    features = {"item_id": Value(id_type(items["item_id"]))}
    if text_column is not None:
        features[text_column] = Value("string")
    features |= {column: Value("string") for column in categorical_columns}
    features |= {column: List(Value("string")) for column in multi_categorical_columns}
    features |= {column: Value("float32") for column in numeric_columns}
    if embedding_column is not None:
        features[embedding_column] = List(Value("float32"))
    if image_column is not None:
        features[image_column] = Value("string")
    return Features(features)


def user_features(users: pd.DataFrame) -> Features:
    """`datasets.Features` of canonical users."""
    features = {column: Value("string") for column in users.columns}
    return Features(features | {"user_id": Value(id_type(users["user_id"]))})


def refuse(source: str, column: str, bad: np.ndarray, values: pd.Series, problem: str, remedy: str) -> None:
    """Raises DataError for the first of the `bad` rows, if there is any."""
    if not bad.any():
        return
    row = int(np.flatnonzero(bad)[0])
    value = values.iloc[row]
    value = value.item() if isinstance(value, np.generic) else value
    raise DataError(
        f"{source}: column '{column}' {problem}, first at row {row} (rows counted from 0, without a header): "
        f"{value!r} ({int(bad.sum())} of {len(bad)} rows). {remedy}",
        row,
    )


def require_columns(names: Sequence[str], columns: Iterable[str], source: str, hint: str = "") -> None:
    """Raises DataError if one of `columns` is not among `names`."""
    for column in columns:
        if column not in names:
            raise DataError(
                f"{source}: column '{column}' is missing; the columns are {', '.join(map(str, names))}. "
                f"Rename the column or name it in the column mapping. {hint}".rstrip()
            )


def _unique_ids(frame: pd.DataFrame, column: str, source: str) -> pd.Series:
    """`canonical_ids` of a table's key. Raises DataError for an id that repeats, too."""
    ids = canonical_ids(frame[column], column, source)
    remedy = f"Keep one row per {column.removesuffix('_id')}."
    refuse(source, column, ids.duplicated().to_numpy(), ids, "repeats an id", remedy)
    return ids


def canonical_ids(values: pd.Series, column: str, source: str, nullable: bool = False) -> pd.Series:
    """Ids as int64 or str, keeping their own kind; integers beyond 64 bits and a sign are text.

    Raises:
        DataError: a missing id (unless `nullable`), values that are neither all integers nor all strings, or integers
            that were read as floats and lost digits by it.
    """
    missing = values.isna().to_numpy()
    if not nullable:
        refuse(source, column, missing, values, "has no id", "Drop these rows or give them an id.")
    if missing.all() and len(values):
        return pd.Series(pd.array([pd.NA] * len(values), dtype="Int64"), index=values.index)
    known = values[~missing] if missing.any() else values
    if pd.api.types.is_integer_dtype(known.dtype):
        return _integer_ids(values, known, missing.any())
    if nullable and pd.api.types.is_float_dtype(known.dtype) and bool((known % 1 == 0).all()):
        _refuse_rounded(values, column, source)
        return values.astype("Int64")  # integers with gaps, as most readers give them
    if isinstance(known.dtype, pd.StringDtype):
        return values.astype("string") if missing.any() else values.astype("str")
    text = np.array([isinstance(v, str) for v in values], dtype=bool)
    number = np.array([isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values], dtype=bool)
    kind = text if (text & ~missing).any() else number
    problem = f"has dtype {values.dtype} where ids, all integers or all strings, are needed"
    refuse(source, column, ~kind & ~missing, values, problem, "Convert the column to one of the two.")
    if kind is text:
        return values.astype("string") if missing.any() else values.astype("str")
    return _integer_ids(values, known, missing.any())


def _integer_ids(values: pd.Series, known: pd.Series, gaps: bool) -> pd.Series:
    bounds = np.iinfo(np.int64)
    if len(known) and not (bounds.min <= int(known.min()) and int(known.max()) <= bounds.max):
        return values.astype("string") if gaps else values.astype("str")
    return values.astype("Int64") if gaps else values.astype(np.int64)


def _refuse_rounded(values: pd.Series, column: str, source: str) -> None:
    """Raises DataError for floats so large that neighbouring integers are one."""
    rounded = (values.abs() >= EXACT_FLOAT).fillna(False).to_numpy()
    remedy = "Write them as integers, or as text."
    refuse(source, column, rounded, values, "has ids that were rounded as floats", remedy)


def same_kind(columns: list[pd.Series]) -> list[pd.Series]:
    """Canonical ids of several tables as one kind: text where one of them is text, by which nothing is lost."""
    kinds = {id_type(ids) for ids in columns if ids.notna().any()}
    if len(kinds) < 2:
        kind = kinds.pop() if kinds else "int64"
        return [ids if id_type(ids) == kind else ids.astype("string") for ids in columns]
    return [ids.astype("string" if ids.isna().any() else "str") for ids in columns]


def canonical_numbers(values: pd.Series, column: str, source: str, dtype: str = "float32") -> pd.Series:
    """Numbers (or booleans) as floats, NaN where missing.

    Raises:
        DataError: a value that is not a number, or is infinite.
    """
    if pd.api.types.is_numeric_dtype(values.dtype) or pd.api.types.is_bool_dtype(values.dtype):
        numbers = pd.Series(values.to_numpy(dtype="float64", na_value=np.nan), index=values.index)
    else:
        refuse_text(values, column, source, "numbers", "Convert the column to numbers; leave unknown empty.")
        numbers = pd.Series([np.nan if pd.isna(v) else v for v in values], index=values.index, dtype="float64")
    remedy = "Replace these by numbers or leave them empty."
    refuse(source, column, np.isinf(numbers.to_numpy()), values, "is infinite", remedy)
    return numbers.astype(dtype)


def refuse_text(values: pd.Series, column: str, source: str, needed: str, remedy: str) -> None:
    """Raises DataError for a column that is text in part: for the first value that is no number, if there is one."""
    known = np.array([isinstance(v, (int, float, np.number)) or pd.isna(v) for v in values], dtype=bool)
    numbers = pd.to_numeric(values.where(~known), errors="coerce").notna().to_numpy()
    bad = ~known & ~numbers
    bad = bad if bad.any() else ~known
    refuse(source, column, bad, values, f"has dtype {values.dtype} where {needed} are needed", remedy)


def canonical_interactions(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """Checks one file's interactions, whose columns already carry the schema's names, and casts them.

    The file's order is kept; `order_interactions` sorts. Columns `timestamp` and `position` may be missing, but not
    both: they are then NaN.

    Raises:
        DataError: missing column, wrong dtype, missing id, negative watch time or duration, a view, follow, like or
            propensity out of range, no rows.
    """
    require_columns(frame.columns, ("user_id", "item_id"), source)
    if not len(frame):
        raise DataError(f"{source}: no interactions (0 rows). Check the path and the filters that wrote the file.")
    if "timestamp" not in frame and "position" not in frame:
        raise DataError(
            f"{source}: columns 'timestamp' and 'position' are both missing; the columns are "
            f"{', '.join(map(str, frame.columns))}. Map one of them: it gives the order of a user's behaviour; "
            "or, where the rows stand in that order, set `order: file` beside `columns`."
        )
    frame = frame.reset_index(drop=True)
    columns = {name: canonical_ids(frame[name], name, source) for name in ("user_id", "item_id")}
    for name in ("timestamp", "position"):
        unknown = pd.Series(np.full(len(frame), np.nan))
        columns[name] = canonical_numbers(frame[name], name, source, "float64") if name in frame else unknown
    unordered = (columns["timestamp"].isna() & columns["position"].isna()).to_numpy()
    remedy = "Give these rows a time or a position."
    refuse(source, "timestamp", unordered, columns["timestamp"], "and 'position' are both empty", remedy)
    if "session_id" in frame:
        columns["session_id"] = canonical_ids(frame["session_id"], "session_id", source, nullable=True)
    if PROPENSITY in frame:
        columns[PROPENSITY] = canonical_numbers(frame[PROPENSITY], PROPENSITY, source, "float64")
        values, remedy = columns[PROPENSITY].to_numpy(), "Leave it empty where the chance is not known."
        refuse(source, PROPENSITY, (values <= 0) | (values > 1), frame[PROPENSITY], "is outside (0, 1]", remedy)
    for name in frame.columns:
        if name in KEY_COLUMNS:
            continue
        columns[name] = canonical_numbers(frame[name], name, source)
        values = columns[name].to_numpy()
        if name in SECONDS_COLUMNS:
            remedy = "Drop these rows or leave the value empty; the unit is seconds."
            refuse(source, name, values < 0, frame[name], "is negative", remedy)
        if name in PROBABILITY_COLUMNS:
            remedy = "Use 0 for no and 1 for yes; give other feedback a name of its own."
            refuse(source, name, (values < 0) | (values > 1), frame[name], "is outside [0, 1]", remedy)
    return pd.DataFrame(columns)


def check_known_items(interactions: pd.DataFrame, items: pd.DataFrame, source: str, items_source: str) -> None:
    """Raises DataError if an interaction's item is not among the items."""
    unknown = ~interactions["item_id"].isin(items["item_id"]).to_numpy()
    remedy = f"Add the items to {items_source} or drop these interactions."
    problem = f"names items that are not in {items_source}"
    refuse(source, "item_id", unknown, interactions["item_id"], problem, remedy)


def require_users(ids: Sequence, source: str) -> None:
    """Raises DataError where these are the ids of one user only."""
    if len(ids) < 2:
        raise DataError(
            f"{source}: column 'user_id' holds one user only (first at row 0: {ids[0]}). Recommending from the "
            "behaviour of others needs at least two users."
        )


def order_interactions(interactions: pd.DataFrame) -> pd.DataFrame:
    """Sorts canonical interactions by user and time and numbers the positions from 0 within each user.

    A user's rows are ordered by time (ties by position, then by the file's order). Where some of a user's rows have no
    time they are ordered by position if every one of them has one; otherwise the rows without a time come first, by
    position, and the others follow by time.
    """
    users, _ = pd.factorize(interactions["user_id"], sort=True)
    time, position = interactions["timestamp"].to_numpy(), interactions["position"].to_numpy()
    timeless, position_given = np.bincount(users, np.isnan(time)) > 0, not np.isnan(position).all()
    by_position = (timeless & (np.bincount(users, np.isnan(position)) == 0))[users]
    primary = np.where(by_position, 0.0, np.where(np.isnan(time), -np.inf, time))
    order = np.lexsort((np.nan_to_num(position), primary)) if position_given else np.argsort(primary, kind="stable")
    for low_bits in (0, 16):  # of 16 bits a stable sort counts: half the time of a sort by comparison
        order = order[np.argsort((users[order] >> low_bits).astype(np.uint16), kind="stable")]
    interactions = interactions.iloc[order].reset_index(drop=True)
    users = users[order]
    interactions["position"] = np.arange(len(users)) - np.searchsorted(users, users)
    return interactions


def canonical_lists(values: pd.Series, column: str, source: str) -> pd.Series:
    """Lists of categories as lists of str, without what is missing in them.

    Of text, lists are what is written as one of JSON, Python, numpy or Postgres (`["a", "b"]`, `['a', 'b']`, `[1 2]`,
    `{a,b}`), and otherwise what the column parts by `|`, by `;` or by `,`, the first of these that it has.

    Raises:
        DataError: a value that is no list, such as a JSON object.
    """
    plain = [value for value in values if isinstance(value, str) and not _bracketed(value)]
    separator = next((sign for sign in "|;" if any(sign in value for value in plain)), ",")
    lists = [_value_list(value, separator) for value in values]
    bad = np.array([found is None for found in lists], dtype=bool)
    refuse(source, column, bad, values, "holds what is no list", 'Write it like ["a", "b"], or a|b.')
    names = _without_decimals({value for found in lists for value in found})
    lists = [[names.get(value, value) for value in found] for found in lists] if names else lists
    return pd.Series(lists, dtype=object, index=values.index)


def _bracketed(text: str) -> bool:
    return text.strip()[:1] + text.strip()[-1:] in ("[]", "()", "{}")


def _value_list(value: object, separator: str) -> list[str] | None:
    if isinstance(value, str):
        text = value.strip()
        parts = _parsed_list(text) if _bracketed(text) else text.split(separator)
        if parts is None:
            return None
        parts = [part.strip() if isinstance(part, str) else part for part in parts]
    elif isinstance(value, (list, tuple, set, frozenset, np.ndarray)):
        parts = list(value)
    elif isinstance(value, dict):
        return None
    else:
        parts = [value]
    if any(isinstance(part, (list, tuple, dict, set, np.ndarray)) for part in parts):
        return None
    return [_category(part) for part in parts if not pd.isna(part) and part != ""]


def _parsed_list(text: str) -> list | None:
    """The elements of a list in brackets. None where the text is something else, such as a JSON object."""
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(parsed, (list, tuple, set)):
            return list(parsed)
        return [] if parsed == {} else None if isinstance(parsed, dict) else [parsed]
    inner = text[1:-1].strip()
    return next(csv.reader([inner], skipinitialspace=True), []) if "," in inner else inner.split()


def _category(value: object) -> str:
    """A category as text; whole numbers carry no decimals."""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        value = int(value)
    return str(value)


def canonical_items(
    frame: pd.DataFrame,
    source: str,
    text_column: str | None = None,
    categorical_columns: Iterable[str] = (),
    multi_categorical_columns: Iterable[str] = (),
    numeric_columns: Iterable[str] = (),
    embedding_column: str | None = None,
    image_column: str | None = None,
) -> pd.DataFrame:
    """Checks a table of items and casts it; columns that are not named are left out.

    Multi-categorical values may be lists, or text as [`canonical_lists`] reads it.

    Raises:
        DataError: missing column, wrong dtype, missing or duplicate id, an embedding that is missing, of another
            length than the first, or not finite, no rows.
    """
    named = [name for name in (text_column, embedding_column, image_column) if name is not None]
    named += [*categorical_columns, *multi_categorical_columns, *numeric_columns]
    require_columns(frame.columns, ["item_id", *named], source)
    if not len(frame):
        raise DataError(f"{source}: no items (0 rows). Check the path and the filters that wrote the file.")
    frame = frame.reset_index(drop=True)
    columns = {"item_id": _unique_ids(frame, "item_id", source)}
    if text_column is not None:
        columns[text_column] = canonical_text(frame[text_column], text_column, source)
    for name in categorical_columns:
        columns[name] = canonical_categories(frame[name], name, source)
    for name in multi_categorical_columns:
        columns[name] = canonical_lists(frame[name], name, source)
    for name in numeric_columns:
        columns[name] = canonical_numbers(frame[name], name, source)
    if embedding_column is not None:
        columns[embedding_column] = canonical_embeddings(frame[embedding_column], embedding_column, source)
    if image_column is not None:
        columns[image_column] = canonical_text(frame[image_column], image_column, source)
    return pd.DataFrame(columns)


def canonical_users(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """Checks a table of users, all of whose columns but `user_id` are categories, and casts it.

    Raises:
        DataError: missing column, missing or duplicate id.
    """
    require_columns(frame.columns, ["user_id"], source)
    frame = frame.reset_index(drop=True)
    columns = {"user_id": _unique_ids(frame, "user_id", source)}
    names = [name for name in frame.columns if name != "user_id"]
    columns |= {name: canonical_categories(frame[name], name, source) for name in names}
    return pd.DataFrame(columns)


def canonical_text(values: pd.Series, column: str, source: str) -> pd.Series:
    """Text as str, null where missing or blank. Raises DataError where a value is not a string."""
    bad = np.array([not isinstance(v, str) and not pd.isna(v) for v in values], dtype=bool)
    refuse(source, column, bad, values, f"has dtype {values.dtype} where text is needed", "Convert to text.")
    return pd.Series([v if isinstance(v, str) and v.strip() else None for v in values], dtype="str")


def canonical_categories(values: pd.Series, column: str, source: str) -> pd.Series:
    """Categories as str, null where missing; whole numbers carry no decimals, unless the column has others too.

    Raises:
        DataError: lists, or whole numbers that were read as floats and lost digits by it.
    """
    if pd.api.types.is_float_dtype(values.dtype):
        if bool((values.dropna() % 1 == 0).all()):
            _refuse_rounded(values, column, source)
            values = values.astype("Int64")
    elif values.dtype == object:
        lists = np.array([isinstance(value, (list, tuple, dict, set, np.ndarray)) for value in values], dtype=bool)
        refuse(source, column, lists, values, "holds lists where categories are needed", "Name it multi_categorical.")
        values = pd.Series([None if pd.isna(value) else _category(value) for value in values], index=values.index)
    text = values.astype("string").astype("str")
    names = _without_decimals(set(text.dropna().unique()))
    return text.map(names).astype("str") if names else text


def _without_decimals(written: set[str]) -> dict[str, str]:
    """Where all that a column holds are whole numbers and some have decimals, as integers with gaps are written after
    they were read as floats: what each is called. Otherwise nothing."""
    if not any(value.endswith(".0") for value in written) or not all(map(WHOLE_NUMBER.fullmatch, written)):
        return {}
    return {value: value.partition(".")[0] for value in written}


def canonical_embeddings(values: pd.Series, column: str, source: str) -> pd.Series:
    """One float32 vector per item, all finite and of one length; of text, numbers in brackets. Raises DataError
    otherwise."""
    rows = [_vector(value) for value in values]
    width = next((len(row) for row in rows if row is not None), 0)
    bad = np.array([row is None or row.ndim != 1 or len(row) != width for row in rows], dtype=bool)
    bad = bad if bad.any() else np.full(len(rows), not width)
    remedy = "Give every item an embedding of the same length, or leave the column out."
    refuse(source, column, bad, values, f"is not a list of {width} numbers", remedy)
    remedy = "Compute these embeddings again, or leave the column out."
    refuse(source, column, ~np.isfinite(np.stack(rows)).all(axis=1), values, "holds NaN or infinite values", remedy)
    return pd.Series(rows, dtype=object)


def _vector(value: object) -> np.ndarray | None:
    if isinstance(value, str) and _bracketed(value):
        value = _parsed_list(value.strip())
    try:
        return np.asarray(value, dtype=np.float32) if isinstance(value, (list, tuple, np.ndarray)) else None
    except (TypeError, ValueError):
        return None
