"""Files of tables, by the columns that are wanted: CSV, Parquet, text without a header and JSON lines."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .schema import DataError, require_columns

# Ids such as "NA" or "null" are ids. low_memory would infer a column's type again from each block.
CSV_OPTIONS = {"keep_default_na": False, "na_values": ["", "nan", "NaN"], "low_memory": False}
UNREADABLE = (pa.ArrowInvalid, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError)
# Stands in a line for a separator of several characters, which pandas' fast parser does not take.
UNIT_SEPARATOR = "\x1f"


def data_folder(data_dir: str | Path) -> Path:
    """`data_dir` as a path. Raises DataError if there is no such folder."""
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder. Give data_dir the folder that holds the data files.")
    return folder


def read_columns(path: Path, columns: list[str], text: Sequence[str] = ()) -> pd.DataFrame:
    """The named columns of a CSV (also compressed) or Parquet file.

    Args:
        path, columns: what is read.
        text: columns of a CSV file that are text even if every value looks like a number.

    Raises:
        DataError: the file or a column is missing, or the file cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file. Put it there, or give another data_dir.")
    try:
        if path.suffix == ".parquet":
            require_columns(pd.DataFrame(columns=pq.read_schema(path).names), columns, path.name)
            return pd.read_parquet(path, columns=columns)
        if ".csv" not in path.suffixes:
            raise DataError(f"{path}: only .csv and .parquet files are read. Convert it to one of these.")
        require_columns(pd.read_csv(path, nrows=0), columns, path.name)
        return pd.read_csv(path, usecols=columns, dtype=dict.fromkeys(text, "str"), **CSV_OPTIONS)
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def read_headless(
    path: Path, columns: list[str], separator: str, encodings: Sequence[str] = ("utf-8",)
) -> pd.DataFrame:
    """All columns of a text file that has no header and no quotes.

    Args:
        path: of the file.
        columns: names of all columns, in order.
        separator: of one character or more.
        encodings: of which the first that fits the file is taken.

    Raises:
        DataError: the file is missing or cannot be read, or its lines do not have these columns.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file. Put it there, or give another data_dir.")
    try:
        encoding = _fitting_encoding(path, encodings)
        with path.open(encoding=encoding) as file:
            fields = file.readline().rstrip("\r\n").split(separator)
        if len(fields) != len(columns):
            raise DataError(
                f"{path.name}: row 0 has {len(fields)} columns, parted by {separator!r}, where there should be "
                f"{len(columns)} ({', '.join(columns)}): {fields[:3]}. Give the file as it was published."
            )
        source: Path | io.StringIO = path
        if len(separator) > 1:
            source = io.StringIO(path.read_text(encoding=encoding).replace(separator, UNIT_SEPARATOR))
            separator = UNIT_SEPARATOR
        options = {"header": None, "names": columns, "quoting": csv.QUOTE_NONE, "encoding": encoding}
        return pd.read_csv(source, sep=separator, index_col=False, **options, **CSV_OPTIONS)
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def _fitting_encoding(path: Path, encodings: Sequence[str]) -> str:
    for encoding in encodings[:-1]:
        try:
            with path.open(encoding=encoding) as file:
                for _ in file:
                    pass
            return encoding
        except UnicodeDecodeError:
            continue
    return encodings[-1]


def json_lines(path: Path) -> Iterator[dict]:
    """The objects of a file of JSON lines, also compressed by gzip. Raises DataError for a line that is none."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for row, line in enumerate(lines):
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path.name}: row {row} is not JSON: {error}. Correct the file, or write it again."
                    ) from None
                if not isinstance(record, dict):
                    raise DataError(
                        f"{path.name}: row {row} is not a JSON object but {line[:40]!r}. Give one object a line."
                    )
                yield record
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def read_json_columns(path: Path, columns: list[str]) -> pd.DataFrame:
    """The named keys of a file of JSON lines as columns, null where a line has no such key.

    Raises:
        DataError: a line that is not JSON, or a key that no line has.
    """
    found: dict[str, list] = {column: [] for column in columns}
    present: set[str] = set()
    for record in json_lines(path):
        present |= record.keys()
        for column, values in found.items():
            values.append(record.get(column))
    require_columns(pd.DataFrame(columns=sorted(present)), columns, path.name)
    return pd.DataFrame({column: pd.Series(values, dtype=object) for column, values in found.items()})


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: cannot be read: {error}. Correct the file, or write it again.")
