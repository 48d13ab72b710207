"""What the columns of a person's own files are, by their names and their values: from samples to a column mapping.

Every choice has its reason, and what was not understood or left out is said. The choices are written as the mapping
that [`read_table`] reads, for a person to correct.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from .column_names import (
    EVENT_NAMES,
    ITEM_NAMES,
    LENGTH_WORDS,
    NEGATIVE_WORDS,
    PLAY_WORDS,
    POSITION_NAMES,
    POSITIVE_WORDS,
    RATING_WORDS,
    RATIO_WORDS,
    SECONDS_BY_WORD,
    SESSION_NAMES,
    SPAN_WORDS,
    TIME_NAMES,
    TITLE_WORDS,
    TOTAL_WORDS,
    UNUSED_WORDS,
    USER_NAMES,
    joined_words,
    words,
)
from .schema import DataError, canonical_categories, canonical_lists
from .table_samples import TableSample
from .timestamps import likely_unit

ROLES = ("user_id", "item_id", "timestamp", "position", "session_id")
DATE_FORMATS = (
    *("%Y-%m-%d %H:%M:%S UTC", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y/%m/%d", "%Y%m%d"),
    *("%m/%d/%Y %I:%M:%S %p", "%m/%d/%Y %H:%M:%S", "%m/%d/%Y %H:%M", "%m/%d/%Y", "%m %d, %Y", "%b %d, %Y"),
    *("%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M", "%d.%m.%Y", "%d/%m/%Y %H:%M:%S", "%d/%m/%Y %H:%M", "%d/%m/%Y"),
)
ID_WORDS = {"id", "hash", "key", "no", "code", "uuid", "guid", "anon", "anonymous", "pseudo", "external", "internal"}
USER_WORDS = {"user", "customer", "visitor", "member", "client", "reviewer", "buyer", "viewer", "listener", "reader"}
ITEM_WORDS = {"item", "product", "video", "movie", "track", "song", "article", "news", "book", "game", "post", "clip"}
GUESSED = "ids that repeat"
FLAG_WORDS = {"is", "has", "was", "did", "flag", "long", "effective", "user", "item"}
MAX_EVENTS = 16  # values of a column of event types
RATING_SHARE = 0.7  # of a scale: from here on a rating is positive
MAX_CATEGORIES = 1000


@dataclass
class Choice:
    """What a column was taken for, and why; `value` is what the mapping says of it."""

    role: str
    value: Any
    reason: str


@dataclass
class InferredMapping:
    """A column mapping with the reason of every line.

    Args:
        name: of the data set.
        log, items, users: the tables that were taken for these, None where there is no such table.
        columns, feedback, positive, item_columns, user_columns: the choices.
        unit: of the times, as `timestamp_unit` has it, with its reason.
        notes: what was left out or not understood, a line each.
    """

    name: str
    log: TableSample
    columns: list[Choice]
    unit: Choice | None = None
    feedback: list[Choice] = field(default_factory=list)
    positive: Choice | None = None
    items: TableSample | None = None
    item_columns: list[Choice] = field(default_factory=list)
    users: TableSample | None = None
    user_columns: list[Choice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def column(self, role: str) -> str | None:
        """The log's column of a role."""
        return next((choice.value for choice in self.columns if choice.role == role), None)


def infer_mapping(name: str, tables: list[TableSample], given: dict[str, str] | None = None) -> InferredMapping:
    """The mapping of these tables.

    Args:
        name: of the data set.
        tables: all that were found.
        given: columns by role that a person told, which go before any guess.

    Raises:
        DataError: no table has a user and an item; says which columns there are and how to name them.
    """
    given = given or {}
    for role in given:
        if role not in ROLES:
            raise DataError(f"columns names the role '{role}'; there are {', '.join(ROLES)}.")
    found = [(keys, table) for table in tables if (keys := _keys(table, given)) is not None]
    if not found:
        seen = "\n".join(f"  {table.name}: {', '.join(map(str, table.frame.columns))}" for table in tables)
        raise DataError(
            "No table has a column of users and one of items that can be told by their names or values. There are\n"
            f"{seen or '  no tables'}\nSay which they are, e.g. "
            '--columns "{user_id: WHO, item_id: WHAT, timestamp: WHEN}", or write the mapping by hand: '
            "recipes/README.md, Your own data."
        )
    keys, log = max(found, key=lambda one: (_certainty(one[0]), one[1].size))
    mapping = InferredMapping(name, log, keys)
    rest = [table for table in tables if table is not log]
    for table in [table for table in rest if list(table.frame.columns) == list(log.frame.columns)]:
        rest.remove(table)
        log.files += table.files
        log.whole = False
        mapping.notes.append(f"{table.name}: has the same columns as {log.files[0]} and is read as one log with it")
    _take_order(mapping)
    _take_feedback(mapping)
    mapping.items, mapping.users = _tables_of_ids(mapping, rest)
    if mapping.items is not None:
        _take_items(mapping)
    if mapping.users is not None:
        _take_users(mapping)
    taken = [table for table in (mapping.items, mapping.users) if table is not None]
    for table in rest:
        if not any(table is one for one in taken):
            mapping.notes.append(
                f"{table.name}: left out, neither the log nor a table with one row for each of its ids"
            )
    return mapping


def _certainty(keys: list[Choice]) -> int:
    """How sure it is that a table is the log: what names tell counts more than what values do."""
    return sum(1 if choice.reason.startswith(GUESSED) else 3 for choice in keys)


def _keys(table: TableSample, given: dict[str, str]) -> list[Choice] | None:
    """User, item, time and session of a log. None where it has no user or no item."""
    columns = [name for name in table.frame if _is_plain(table.frame[name])]
    if given and not set(given.values()) <= set(map(str, columns)):
        return None
    told = {role: Choice(role, column, "as told by --columns") for role, column in given.items()}
    free = [name for name in columns if name not in given.values()]
    time = told.get("timestamp") or _time_column(table, free)
    free = [name for name in free if time is None or name != time.value]
    user = told.get("user_id") or _named(table, free, "user_id", USER_NAMES, USER_WORDS)
    free = [name for name in free if user is None or name != user.value]
    item = told.get("item_id") or _named(table, free, "item_id", ITEM_NAMES, ITEM_WORDS)
    free = [name for name in free if item is None or name != item.value]
    session = told.get("session_id") or _named(table, free, "session_id", SESSION_NAMES, set())
    if user is None and session is not None:
        user, session = Choice("user_id", session.value, "a session's name, and there is no user: its own user"), None
    ids = [name for name in free if (session is None or name != session.value) and _looks_like_ids(table, name)]
    if user is None and item is None and len(ids) >= 2:
        why = f"{GUESSED}, without a known name; the {{}} of these columns"
        user, item = Choice("user_id", ids[0], why.format("first")), Choice("item_id", ids[1], why.format("second"))
    elif (user is None) != (item is None) and len(ids) == 1:
        guess = Choice("user_id" if user is None else "item_id", ids[0], f"{GUESSED}, the only other such column")
        user, item = (guess, item) if user is None else (user, guess)
    if user is None or item is None or "user_id" not in given and not _repeats(table, user.value):
        return None
    if session is not None and table.frame[session.value].isna().mean() > 0.5:
        session = None
    return [choice for choice in (user, item, time, session, told.get("position")) if choice is not None]


def _named(table: TableSample, columns: list[str], role: str, names: tuple, stems: set) -> Choice | None:
    """The column whose name is the likeliest of a role; one without gaps before one that has some."""
    ranked = []
    for column in columns:
        parts, joined = words(column), joined_words(column)
        if joined in names:
            ranked.append((names.index(joined), column))
        elif set(parts) & stems and set(parts) - stems <= ID_WORDS:
            ranked.append((len(names), column))
    gaps = table.frame.isna().any()
    ranked = [(gaps[column], rank, column) for rank, column in ranked if _may_be_ids(table, column)]
    if not ranked:
        return None
    _, _, column = min(ranked)
    reason = f"by its name; {table.frame[column].nunique()} different values in {len(table.frame)} rows"
    if gaps[column]:
        reason += f", MISSING in {int(table.frame[column].isna().sum())} rows, which the reader refuses: drop these"
    return Choice(role, column, reason)


def _is_plain(values: pd.Series) -> bool:
    """Whether values are neither lists nor mappings."""
    return not values.dropna().head(100).map(lambda value: isinstance(value, (list, dict, np.ndarray))).any()


def _may_be_ids(table: TableSample, column: str) -> bool:
    numbers = table.numbers.get(column)
    return numbers is None or bool((numbers.dropna() % 1 == 0).all())


def _looks_like_ids(table: TableSample, column: str) -> bool:
    """Whether values repeat, are many, and are whole numbers or short words."""
    values, numbers = table.frame[column], table.numbers.get(column)
    different = values.nunique()
    if values.isna().any() or not 10 <= different <= 0.8 * len(values) or not _may_be_ids(table, column):
        return False
    if set(words(column)) & (RATING_WORDS | PLAY_WORDS | SPAN_WORDS | RATIO_WORDS | {"price", "amount", "qty"}):
        return False
    return numbers is not None or bool(values.astype("str").str.len().mean() <= 40)


def _repeats(table: TableSample, column: str) -> bool:
    return table.frame[column].nunique() < len(table.frame)


def _time_column(table: TableSample, columns: list[str]) -> Choice | None:
    """The column of times: one with a known name whose values are times, or else one whose values are."""
    ranked = []
    for column in columns:
        joined, parts = joined_words(column), set(words(column))
        known = joined in TIME_NAMES
        if not known and parts & PLAY_WORDS and not parts & {"date", "timestamp", "at"}:
            continue
        rank = (
            TIME_NAMES.index(joined) if known else len(TIME_NAMES) + (not parts & {"time", "date", "timestamp", "ts"})
        )
        unit = _unit_of(table, column)
        if unit is not None:
            ranked.append((table.frame[column].isna().any(), rank, column, "its values are dates"))
        elif known and column in table.numbers and table.frame[column].nunique() > 2 and joined not in ("at", "day"):
            ranked.append((True, rank + len(TIME_NAMES), column, "numbers that are no dates: times since some start"))
    if not ranked:
        return None
    _, rank, column, reason = min(ranked)
    return Choice("timestamp", column, f"{'by its name; ' if rank < len(TIME_NAMES) else ''}{reason}")


def _unit_of(table: TableSample, column: str) -> Choice | None:
    """How a column's times are written, None where they are no dates."""
    values, numbers = table.frame[column].dropna(), table.numbers.get(column)
    if pd.api.types.is_datetime64_any_dtype(values.dtype):
        return Choice("timestamp_unit", None, f"date-times, from {values.min()} to {values.max()}")
    if values.empty or not _is_plain(values) or pd.api.types.is_bool_dtype(values.dtype):
        return None
    if numbers is not None:
        unit = likely_unit(numbers[numbers > 0].median())
        if unit is not None and (numbers.dropna() % 1 == 0).mean() < 1 and unit != "s":
            return None
        if unit is not None:
            span = [pd.to_datetime(value, unit=unit) for value in (numbers[numbers > 0].min(), numbers.max())]
            return Choice("timestamp_unit", unit, f"as {unit} they lie from {span[0]:%Y-%m-%d} to {span[1]:%Y-%m-%d}")
        if not ((numbers >= 19760101) & (numbers <= 21001231)).all():
            return None
        text = numbers.dropna().astype("int64").astype("str")
    else:
        text = values.head(2000).astype("str").str.strip()
    fitting = [form for form in ("ISO8601", *DATE_FORMATS) if _all_dates(text, form)]
    if numbers is not None:
        fitting = [form for form in fitting if form == "%Y%m%d"]
    if not fitting:
        return None
    form = fitting[0]
    unsure = f"; {fitting[1]} would fit too" if len(fitting) > 1 and form != "ISO8601" else ""
    return Choice("timestamp_unit", "iso" if form == "ISO8601" else form, f"text such as {text.iloc[0]}{unsure}")


def _all_dates(text: pd.Series, form: str) -> bool:
    if not text.str.contains(r"\d", regex=True).all():
        return False
    return bool(pd.to_datetime(text, format=form, errors="coerce", utc=True).notna().all())


def _take_order(mapping: InferredMapping) -> None:
    """The unit of the times, or what stands in the place of times."""
    log, time = mapping.log, mapping.column("timestamp")
    if time is not None:
        mapping.unit = _unit_of(log, time)
        return
    used = {choice.value for choice in mapping.columns}
    for column in log.frame:
        if joined_words(column) in POSITION_NAMES and column in log.numbers and column not in used:
            mapping.columns.append(Choice("position", column, "by its name; the order of a user's rows"))
            break
    else:
        if mapping.column("position") is None:
            mapping.columns.append(Choice("order", "file", "no column is a time: rows are taken to stand in order"))
    mapping.notes.append(
        "no column is a time: nothing can be split by it, so that each user's last items are evaluated "
        "(split_method: leave_one_out), and sessions are items in a row"
    )


def _take_feedback(mapping: InferredMapping) -> None:
    log = mapping.log
    used = {choice.value for choice in mapping.columns}
    positive: list[tuple[str, str]] = []  # condition, reason
    watched: list[tuple[str, pd.Series]] = []
    length = None
    for column in [column for column in log.frame if column not in used]:
        values, parts = log.frame[column], set(words(column))
        if joined_words(column) in EVENT_NAMES and _is_plain(values) and 2 <= values.nunique() <= MAX_EVENTS:
            positive += _take_events(mapping, column)
        elif column not in log.numbers:
            what = "text" if _is_plain(values) else "lists or objects"
            mapping.notes.append(f"{log.files[0]}: column '{column}' left out: {what}, no feedback")
        elif parts & RATIO_WORDS:
            name = _free_name(mapping, column)
            half = 50 if log.numbers[column].median() > 3 else 0.5
            mapping.feedback.append(Choice(name, column, f"a share that was watched, by its name; half is {half:g}"))
            positive.append((f"{name}>={half:g}", "at least half of it"))
        elif parts & SPAN_WORDS and (parts & PLAY_WORDS or parts & LENGTH_WORDS):
            is_length = not parts & PLAY_WORDS and _same_by_item(log, mapping.column("item_id"), column)
            name = "duration" if is_length else "watch_time"
            scale, why = _seconds_of(parts, log.numbers[column])
            if any(choice.role == name for choice in mapping.feedback) or (log.numbers[column] < 0).any():
                mapping.notes.append(f"{log.files[0]}: column '{column}' left out: a second {name}, or negative")
                continue
            value = column if scale == 1 else {"column": column, "scale": scale}
            what = "always the same for an item: its length" if is_length else "how long it was watched, by its name"
            mapping.feedback.append(Choice(name, value, f"{what}; {why}"))
            if is_length:
                length = log.numbers[column] * scale
            else:
                watched.append((name, log.numbers[column] * scale))
        elif log.numbers[column].nunique() < 2:
            mapping.notes.append(f"{log.files[0]}: column '{column}' left out: it has one value alone")
        elif set(log.numbers[column].dropna().unique()) <= {0, 1}:
            positive += _take_flag(mapping, column)
        elif parts & RATING_WORDS and log.numbers[column].max() <= 100:
            positive += _take_rating(mapping, column)
        else:
            low, high = log.numbers[column].min(), log.numbers[column].max()
            mapping.notes.append(
                f"{log.files[0]}: column '{column}' left out: numbers from {low:g} to {high:g}, no known feedback"
            )
    if not positive:
        for name, seconds in watched:
            half = length.median() / 2 if length is not None else seconds[seconds > 0].median()
            half = float(f"{half:.2g}") if half == half else 1
            what = "half of the median length" if length is not None else "the median of what was watched"
            positive.append((f"{name}>={half:g}", what))
    conditions = [condition for condition, _ in positive]
    if conditions:
        reason = "; ".join(f"{condition}: {why}" for condition, why in positive)
    else:
        reason = "every row is positive: no column says that one was not"
    mapping.positive = Choice("positive_feedback", conditions, reason)


def _free_name(mapping: InferredMapping, text: str) -> str:
    """A name of feedback that conditions can be written with, and that no other has."""
    name = "_".join(words(text)) or "feedback"
    name = name if name[0].isalpha() else f"feedback_{name}"
    taken = {choice.role for choice in mapping.feedback} | set(ROLES) | {"propensity", "watch_time", "duration"}
    return name if name not in taken else _free_name(mapping, f"{name}_2")


def _take_events(mapping: InferredMapping, column: str) -> list[tuple[str, str]]:
    """Each type of event as feedback of its own; all but those of dislike, or of being shown alone, are positive."""
    values = mapping.log.frame[column].dropna()
    numbered = mapping.log.numbers.get(column)
    if numbered is not None:
        values = canonical_categories(numbered.dropna(), column, mapping.log.name)
    positive = []
    for value, count in values.astype("str").value_counts().items():
        name = _free_name(mapping, value if numbered is None else f"{column}_{value}")
        bad = set(words(value)) & NEGATIVE_WORDS
        reason = f"{count} of {len(values)} rows" + (f", not positive: {', '.join(sorted(bad))}" if bad else "")
        mapping.feedback.append(Choice(name, {"column": column, "equals": value}, reason))
        if not bad:
            positive.append((name, f"{column} {value}"))
    return positive


def _take_flag(mapping: InferredMapping, column: str) -> list[tuple[str, str]]:
    parts = [word for word in words(column) if word not in FLAG_WORDS]
    share = mapping.log.numbers[column].mean()
    seen = f"0 or 1, {share:.1%} are 1"
    # A verified purchase is no purchase.
    known = next((name for name, known in POSITIVE_WORDS.items() if parts and set(parts) <= known), None)
    if set(parts) & NEGATIVE_WORDS:
        mapping.feedback.append(Choice(_free_name(mapping, "_".join(parts)), column, f"{seen}; a dislike by its name"))
        return []
    name = _free_name(mapping, known or column)
    if known is None:
        mapping.feedback.append(Choice(name, column, f"{seen}; not a known name: not counted as positive"))
        return []
    mapping.feedback.append(Choice(name, column, f"{seen}; by its name"))
    return [(name, "by its name")]


def _take_rating(mapping: InferredMapping, column: str) -> list[tuple[str, str]]:
    numbers = mapping.log.numbers[column].dropna()
    scale = next((top for top in (1, 5, 10, 20, 100) if numbers.max() <= top), 100)
    steps = np.unique(numbers)
    least = next((step for step in steps if step >= RATING_SHARE * scale), steps[-1])
    name = _free_name(mapping, "rating")
    mapping.feedback.append(
        Choice(name, column, f"{numbers.min():g} to {numbers.max():g} in {len(steps)} steps; by its name")
    )
    return [(f"{name}>={least:g}", f"the upper {1 - RATING_SHARE:.0%} of a scale to {scale}")]


def _seconds_of(parts: set[str], numbers: pd.Series) -> tuple[float, str]:
    """What a span is multiplied with for seconds, and why."""
    for word, scale in SECONDS_BY_WORD.items():
        if word in parts:
            return scale, f"in {word}, by its name"
    median = numbers[numbers > 0].median()
    if median >= 2000:
        return 0.001, f"half are above {median:g}: milliseconds"
    return 1, f"half are above {median:g}: seconds"


def _same_by_item(log: TableSample, item: str, column: str) -> bool:
    return bool((log.numbers[column].groupby(log.frame[item]).nunique() <= 1).mean() > 0.95) and _repeats(log, item)


def _tables_of_ids(mapping: InferredMapping, rest: list[TableSample]) -> tuple[TableSample | None, TableSample | None]:
    """The table of items and that of users: one row for each id, and most of the log's ids are in it."""
    found: list[TableSample | None] = []
    sections = (("item_id", mapping.item_columns, USER_NAMES), ("user_id", mapping.user_columns, ITEM_NAMES))
    for role, choices, other in sections:
        column = mapping.column(role)
        wanted = set(_plain_ids(mapping.log, column))
        candidates = []
        for table in rest:
            for name in [name for name in table.frame if _is_plain(table.frame[name]) and not _is_of(other, name)]:
                same_name, ids = joined_words(name) == joined_words(column), _plain_ids(table, name)
                if ids.duplicated().any() or len(ids) < len(table.frame):
                    if same_name:
                        mapping.notes.append(f"{table.name}: column '{name}' repeats or has gaps: no table of its ids")
                    continue
                overlap = len(wanted & set(ids)) / max(len(wanted), 1)
                # The sample of a large table holds a part of its ids; and small numbers are ids of everything.
                least = 0.9 if name in table.numbers and not same_name else 0.5
                if overlap >= least or same_name and overlap > 0 and not table.whole:
                    candidates.append((same_name, overlap, table, name))
        best = max(candidates, key=lambda one: one[:2], default=None)
        found.append(best and best[2])
        if best is not None:
            choices.append(Choice(role, best[3], f"one row each; {best[1]:.0%} of the ids that were seen are in it"))
            rest = [table for table in rest if table is not best[2]]
    return found[0], found[1]


def _is_of(names: tuple[str, ...], column: str) -> bool:
    return joined_words(column) in names


def _plain_ids(table: TableSample, column: str) -> pd.Series:
    """Ids as text; whole numbers alike in files with and without types."""
    values = table.frame[column].dropna()
    if pd.api.types.is_float_dtype(values.dtype) and bool((values % 1 == 0).all()):
        values = values.astype("int64")
    return values.astype("str")


def _take_items(mapping: InferredMapping) -> None:
    table, key = mapping.items, mapping.item_columns[0].value
    text: list[tuple[int, str]] = []
    for column in [column for column in table.frame if column != key]:
        kind, reason = _item_kind(table, column)
        if kind == "text":
            parts = words(column)
            text.append((next((rank for rank, word in enumerate(TITLE_WORDS) if word in parts), 99), column))
        elif kind is None:
            mapping.notes.append(f"{table.name}: column '{column}' left out: {reason}")
        else:
            mapping.item_columns.append(Choice(kind, column, reason))
    for rank, (_, column) in enumerate(sorted(text, key=lambda one: one[0])):
        if rank == 0:
            mapping.item_columns.append(Choice("text", column, "different for nearly every item: read by its words"))
        else:
            mapping.notes.append(f"{table.name}: column '{column}' left out: a second text")
    embeddings = [choice for choice in mapping.item_columns if choice.role == "embedding"]
    for choice in embeddings[1:]:
        mapping.item_columns.remove(choice)
        mapping.notes.append(f"{table.name}: column '{choice.value}' left out: a second embedding")


def _item_kind(table: TableSample, column: str) -> tuple[str | None, str]:
    """The role of an item's column, None where it is left out, and why."""
    values, parts = table.frame[column].dropna(), set(words(column))
    if values.empty:
        return None, "it is empty"
    if parts & UNUSED_WORDS:
        return None, "a link, a picture or a row number, by its name"
    if not _is_plain(values):
        return _kind_of_lists(values)
    different, numbers = values.nunique(), table.numbers.get(column)
    if numbers is not None and parts & TOTAL_WORDS:
        return None, "a total of all times, by its name, which would tell of the evaluated period"
    if numbers is not None and _unit_of(table, column) is None:
        if different > 50 and (different > 0.05 * len(values) or (numbers.dropna() % 1 != 0).any()):
            return "numeric", f"{different} different numbers, from {numbers.min():g} to {numbers.max():g}"
        return _category_or_none(different, len(values))
    if numbers is None and _unit_of(table, column) is None:
        lists = _kind_of_written_lists(values.astype("str"))
        if lists is not None:
            return lists
        if different > 0.5 * len(values) or different > MAX_CATEGORIES:
            spaced = values.astype("str").str.contains(" ").mean() > 0.3 or parts & set(TITLE_WORDS)
            return ("text", "") if spaced and isinstance(values.iloc[0], str) else (None, "nearly all differ: ids")
        return _category_or_none(different, len(values))
    return None, "a date"


def _category_or_none(different: int, rows: int) -> tuple[str | None, str]:
    if different < 2:
        return None, "it has one value alone"
    if different > 0.5 * rows and rows > 20:
        return None, "nearly all differ: ids"
    return "categorical", f"{different} different values in {rows} rows"


def _kind_of_lists(values: pd.Series) -> tuple[str | None, str]:
    if values.map(lambda value: isinstance(value, dict)).any():
        return None, "objects with fields of their own"
    rows = [list(value) for value in values if isinstance(value, (list, np.ndarray))]
    lengths = {len(row) for row in rows}
    inner = [part for row in rows[:1000] for part in row]
    if any(isinstance(part, (dict, list, np.ndarray)) for part in inner) or not inner:
        return None, "lists of lists or of objects, or all empty"
    if len(lengths) == 1 and len(rows[0]) > 1 and all(isinstance(part, (float, np.floating)) for part in inner):
        return "embedding", f"lists of {len(rows[0])} numbers"
    return _tags_or_none(inner, len(rows), "lists")


def _kind_of_written_lists(text: pd.Series) -> tuple[str | None, str] | None:
    """Of text that is written as lists, None of other text."""
    bracketed = text.str.match(r"^\s*[\[({].*[\])}]\s*$").mean() > 0.9
    separated = next((sign for sign in "|;," if text.str.contains(re.escape(sign)).mean() > 0.2), None)
    if not bracketed and separated is None:
        return None
    try:
        rows = canonical_lists(text.head(2000), "lists", "sample").to_list()
    except DataError:
        return (None, "objects written as text") if bracketed else None
    kind, reason = _tags_or_none(
        [part for row in rows for part in row], len(rows), f"written with '{separated or '['}'"
    )
    return (kind, reason) if kind is not None else None


def _tags_or_none(tags: Iterable[str], rows: int, how: str) -> tuple[str | None, str]:
    tags = list(map(str, tags))
    different = len(set(tags))
    if different > 0.5 * len(tags) and len(tags) > 20:
        return None, "lists whose parts hardly repeat"
    return "multi_categorical", f"{how}; {different} different ones in {rows} rows"


def _take_users(mapping: InferredMapping) -> None:
    table, key = mapping.users, mapping.user_columns[0].value
    for column in [column for column in table.frame if column != key]:
        values = table.frame[column]
        different = values.nunique() if _is_plain(values) else 0
        if 2 <= different <= 100 and not set(words(column)) & TOTAL_WORDS and different <= 0.5 * len(values):
            mapping.user_columns.append(Choice("categorical", column, f"{different} different values"))
        else:
            mapping.notes.append(f"{table.name}: column '{column}' left out: not a category of 2 to 100 values")
