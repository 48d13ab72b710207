"""`onerec init`: from a folder of files to the column mapping that reads them, with the reason beside every line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..staged_files import staged_file
from .column_inference import Choice, InferredMapping, infer_mapping
from .data_files import UNREADABLE, data_folder, is_table, opened
from .feed import Feed, positive_mask
from .readers import read_table
from .schema import DataError
from .table_samples import TableSample, sampled_tables

MAPPING = "mapping.yaml"
READ_BACK_BYTES = 2**28  # of files in all: so many are read whole to try the mapping
FEW_ROWS = 1000
PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
# Of each public set that has a reader of its own: the files that make it, and what the first one's start names.
PUBLIC_SETS = (
    ("movielens", ("ratings.dat", "movies.dat"), ("::",)),
    ("movielens", ("ratings.csv", "movies.csv"), ("userId", "movieId", "rating", "timestamp")),
    ("mind", ("behaviors.tsv", "news.tsv"), ()),
    ("mind", ("*/behaviors.tsv", "*/news.tsv"), ()),
    ("kuairec", ("*_matrix.csv",), ("user_id", "video_id", "watch_ratio", "play_duration")),
    ("kuairand", ("log_standard_*.csv", "video_features_basic_*.csv"), ("user_id", "video_id", "long_view")),
    ("otto", ("*train.jsonl*",), ('"session"', '"events"', '"aid"')),
    ("otto", ("*test.jsonl*",), ('"session"', '"events"', '"aid"')),
    ("yambda", ("listens.parquet",), ("uid", "item_id", "played_ratio_pct")),
    ("eb_nerd", ("*/behaviors.parquet", "*/history.parquet", "articles.parquet"), ("article_ids_inview",)),
    ("amazon_reviews", ("*.train.csv*", "*.valid.csv*", "*.test.csv*"), ("user_id", "parent_asin", "rating")),
    ("amazon_reviews", ("*.csv*", "meta_*.jsonl*"), ("user_id", "parent_asin", "rating", "timestamp")),
)


def public_set(data_dir: str | Path) -> str | None:
    """The name of the set whose official files the folder holds, None where there is no reader of their own."""
    folder = data_folder(data_dir)
    for name, patterns, named in PUBLIC_SETS:
        matches = [sorted(folder.glob(pattern)) for pattern in patterns]
        if all(matches) and all(word in _start(matches[0][0]) for word in named):
            return name
    return None


def _start(path: Path) -> str:
    """The names of a file's columns, or its first line."""
    try:
        if path.suffix.lower() == ".parquet":
            return " ".join(pq.read_schema(path).names)
        with opened(path) as file:
            return file.readline(2**16).decode("utf-8", errors="replace")
    except UNREADABLE:
        return ""


def write_mapping(
    data_dir: str | Path, column_mapping: str | Path, given: dict[str, str] | None = None, overwrite: bool = False
) -> tuple[InferredMapping, str]:
    """Looks at the tables below a folder and writes their column mapping.

    Args:
        data_dir, column_mapping: what is looked at, and the file that is written whole or not at all.
        given: columns by role (see [`infer_mapping`]) that go before any guess.
        overwrite: whether a file of that name is replaced.

    Returns:
        The choices and the text that was written.

    Raises:
        DataError: the file is there already, or users or items cannot be told.
    """
    path = Path(column_mapping)
    if path.exists() and not overwrite:
        raise DataError(f"{path}: is there already. Give --overwrite to replace it, or another --column_mapping.")
    tables, unread = sampled_tables(data_dir)
    mapping = infer_mapping(data_folder(data_dir).resolve().name or "mine", tables, given)
    mapping.notes += unread
    text = mapping_text(mapping)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return mapping, text


def mapping_text(mapping: InferredMapping) -> str:
    """The column mapping as YAML, each line with its reason, and what was left out."""
    lines = [f"name: {_written(mapping.name)}", "interactions:", *_file_lines(mapping.log, "the log")]
    roles = [choice for choice in mapping.columns if choice.role != "order"]
    lines += ["  columns:", *(_line(4, choice.role, choice) for choice in roles)]
    lines += [_line(2, "order", choice) for choice in mapping.columns if choice.role == "order"]
    if mapping.unit is not None and mapping.unit.value is not None:
        lines.append(_line(2, "timestamp_unit", mapping.unit))
    if mapping.feedback:
        lines += ["  feedback:", *(_line(4, choice.role, choice) for choice in mapping.feedback)]
    for section, table, choices in (
        ("items", mapping.items, mapping.item_columns),
        ("users", mapping.users, mapping.user_columns),
    ):
        if table is not None:
            lines += [f"{section}:", *_file_lines(table, section), "  columns:", _line(4, choices[0].role, choices[0])]
            lines += _feature_lines(choices[1:])
            if section == "items" and not any(choice.role == "embedding" for choice in choices):
                lines.append("  unlisted: add  # items that the log names and this table lacks, without features")
    lines += [f"# {part}" for part in ["", *mapping.positive.reason.split("; ")] if part]
    lines.append(f"positive_feedback: {_written(mapping.positive.value)}")
    if mapping.notes:
        lines += ["# Left out, or not understood:", *(f"#   {note}" for note in mapping.notes)]
    return "\n".join(lines) + "\n"


def _file_lines(table: TableSample, what: str) -> list[str]:
    rows = f"{what}: all {len(table.frame)} rows were looked at" if table.whole else ""
    rows = rows or f"{what}: {len(table.frame)} rows were looked at, not all"
    files = table.files[0] if len(table.files) == 1 else table.files
    lines = [f"  file: {_written(files)}  # {rows}"]
    if table.delimiter not in (None, ",") or table.delimiter and not is_table(Path(table.files[0])):
        lines.append(f"  delimiter: {json.dumps(table.delimiter)}")
    if table.header is not None:
        lines.append(f"  header: {_written(table.header)}  # the first line is a row already")
    return lines


def _feature_lines(choices: list[Choice]) -> list[str]:
    lines = []
    for role in ("text", "embedding", "categorical", "multi_categorical", "numeric"):
        same = [choice for choice in choices if choice.role == role]
        if same and role in ("text", "embedding"):
            lines.append(_line(2, role, same[0]))
        elif same:
            lines += [f"  {role}:", *(f"    - {_written(one.value)}  # {_plain(one.reason)}" for one in same)]
    return lines


def _line(indent: int, key: str, choice: Choice) -> str:
    return f"{' ' * indent}{_written(key)}: {_written(choice.value)}  # {_plain(choice.reason)}"


def _plain(text: str) -> str:
    """A reason on one line, whatever values it tells of."""
    return " ".join(str(text).split())


def _written(value: Any) -> str:
    """A name, number, list or mapping as YAML writes it on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_written(key)}: {_written(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    if isinstance(value, str):
        bare = PLAIN.fullmatch(value) and value.lower() not in YAML_WORDS
        return value if bare else json.dumps(value, ensure_ascii=False)
    return str(value)


def read_back(mapping: InferredMapping, data_dir: str | Path, column_mapping: str | Path) -> str:
    """What the written mapping gives, in words; of files too large to be read for it, that they were not.

    Raises:
        DataError: what the reader refuses.
    """
    tables = [table for table in (mapping.log, mapping.items, mapping.users) if table is not None]
    size = sum(table.size for table in tables)
    if size > READ_BACK_BYTES:
        return f"The files have {size / 2**30:.1f} GiB and were not read whole: the pipeline's first stage does it."
    feed = read_table(data_dir, column_mapping)
    return summary(feed)


def summary(feed: Feed) -> str:
    """Users, items, rows and positive rows of a feed, and what follows where they are few."""
    log = feed.interactions
    positive = positive_mask(log, feed.positive_feedback)
    lengths = log["user_id"][positive].value_counts()
    text = (
        f"Read with it: {len(log)} rows of {log['user_id'].nunique()} users with {len(feed.items)} items; "
        f"{positive.mean():.0%} of the rows are positive, and half of the users have "
        f"{lengths.median() if len(lengths) else 0:.0f} of these or more."
    )
    if positive.sum() < FEW_ROWS:
        text += f"\nFewer than {FEW_ROWS} positive rows are few to learn from: expect little more than popularity."
    return text


def objectives(mapping: InferredMapping) -> list[dict[str, str]]:
    """What a reward model of this log estimates: its positive feedback, and how much was watched.

    The most frequent type of event is left out: where every row is one of several, their chances add up to 1.
    """
    named = {condition.partition(">=")[0] for condition in mapping.positive.value} | {"watch_time"}
    roles = [choice.role for choice in mapping.feedback]
    found, columns = [], set()
    for choice in [choice for choice in mapping.feedback if choice.role in named]:
        column = choice.value["column"] if isinstance(choice.value, dict) else choice.value
        is_event = isinstance(choice.value, dict) and "equals" in choice.value
        if not is_event or column in columns:
            is_flag = is_event or set(mapping.log.numbers[column].dropna().unique()) <= {0, 1}
            kind = "binary" if is_flag else "quantile"
            kind = "share" if choice.role == "watch_time" and "duration" in roles else kind
            found.append({"name": choice.role, "source": choice.role, "kind": kind})
        columns.add(column)
    return found


def next_commands(mapping: InferredMapping | None, data_dir: str | Path, column_mapping: str | Path, name: str) -> str:
    """The pipeline's commands on what was found; `mapping` is None for the public set of that name."""
    options = ["--dataset", "table" if mapping else name, "--data_dir", str(data_folder(data_dir))]
    if mapping is not None:
        options += ["--column_mapping", str(column_mapping)]
        if mapping.column("timestamp") is None:
            options += ["--split_method", "leave_one_out"]
    folder = f"runs/{re.sub(r'[^A-Za-z0-9_-]+', '_', name)}"
    command = ["onerec", "pipeline", "--config"]
    text = f"Next, the next item:\n  {shlex.join([*command, 'recall', *options, '--output_dir', folder])}"
    aims = objectives(mapping) if mapping is not None else []
    if not aims:
        return text
    models = json.dumps({"objectives": aims})
    options += ["--reward_model", models, "--judge_model", models, "--output_dir", f"{folder}_sessions"]
    return f"{text}\nOr sessions too, aligned to the feedback:\n  {shlex.join([*command, 'own_log', *options])}"
