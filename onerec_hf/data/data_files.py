"""Files of tables, by the columns that are wanted: CSV, TSV, Parquet, JSON lines and text without a header.

A CSV file has no types: its columns are read as text, and a column is numbers where every value is one. Ids are
integers only where nothing is lost by it: `0108775015`, `12e3` and what 64 bits do not hold stay text.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from datasets import Dataset

from .schema import CATEGORY, ID, NUMBER, DataError, canonical_categories, require_columns

# Ids such as "NA" or "null" are ids.
NULL_VALUES = ["", "nan", "NaN"]
CSV_OPTIONS = {"keep_default_na": False, "na_values": NULL_VALUES}
UNREADABLE = (
    *(pa.ArrowException, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeError, OSError, EOFError),
    *(zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError),  # the last of an encrypted archive
)
# The first by which a CSV file's header has the columns parts them.
DELIMITERS = (",", ";", "\t")
TEXT_ENDINGS, JSON_ENDINGS = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")
_BLOCK_BYTES = 2**24  # no row is longer
# Stands in a line for a separator of several characters, which pandas' fast parser does not take.
UNIT_SEPARATOR = "\x1f"

Tables = list[tuple[pd.DataFrame, str]]  # frames, each with its file's name for errors


def joined(tables: Tables) -> tuple[pd.DataFrame, str]:
    """One frame of several, and all their names."""
    return pd.concat([frame for frame, _ in tables], ignore_index=True), ", ".join(source for _, source in tables)


def data_folder(data_dir: str | Path) -> Path:
    """`data_dir` as a path. Raises DataError if there is no such folder."""
    if "://" in str(data_dir):
        raise DataError(f"{data_dir}: is read of dataset table with num_partitions alone. Set it, or copy the files.")
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder. Give data_dir the folder that holds the data files.")
    return folder


def is_table(path: Path) -> bool:
    """Whether [`read_columns`] reads files of this name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-1:] == [".parquet"] or any(ending in suffixes for ending in (*TEXT_ENDINGS, *JSON_ENDINGS))


def is_json(path: Path) -> bool:
    """Whether a file of this name is read as JSON lines."""
    return path.suffix.lower() != ".parquet" and any(suffix.lower() in JSON_ENDINGS for suffix in path.suffixes)


def read_columns(
    path: Path,
    columns: list[str],
    kinds: Mapping[str, str] | None = None,
    header: list[str] | None = None,
    delimiter: str | None = None,
) -> pd.DataFrame:
    """The named columns of a CSV or TSV file, of JSON lines (all also compressed) or of a Parquet file.

    Args:
        path, columns: what is read.
        kinds: What a column holds, `NUMBER` where it is not said. An `ID` is an integer or text, and never goes
            through a float; `CATEGORY` and, of a CSV file, `TEXT` are text even if every value looks like a number.
        header: Names of all columns of a text file whose first line is a row.
        delimiter: What parts the columns of a text file. By default what its header tells, or with `header` a comma.
            Where one of these two is given the file may have any ending.

    Raises:
        DataError: the file or a column is missing, or the file cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file. Put it there, or give another data_dir.")
    if not is_table(path) and header is None and delimiter is None:
        endings = ", ".join((*TEXT_ENDINGS, *JSON_ENDINGS))
        raise DataError(f"{path}: only {endings} and .parquet files are read. Convert it to one of these.")
    try:
        if path.suffix.lower() == ".parquet":
            require_columns(pq.read_schema(path).names, columns, path.name)
            table = pq.ParquetFile(path, pre_buffer=True).read(columns=columns)
            table.validate(full=True)  # text of a damaged page need not be any
            return frame_of_table(table, kinds or {}, path.name)
        if is_json(path):
            return _typed_objects(read_json_columns(path, columns), kinds or {}, path.name)
        return _read_csv(path, columns, kinds or {}, header, delimiter)
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def frame_of_table(table: pa.Table, kinds: Mapping[str, str], source: str) -> pd.DataFrame:
    """A frame of columns that have types, in which integers of ids and categories stay integers where some are
    missing."""
    frame = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = kinds.get(name, NUMBER)
        exact = pa.types.is_integer(column.type) and column.null_count and kind != NUMBER
        if exact:
            dtype = pd.UInt64Dtype() if pa.types.is_unsigned_integer(column.type) else pd.Int64Dtype()
            values = column.to_pandas(types_mapper=lambda _, dtype=dtype: dtype)
        else:
            values = column.to_pandas()
        values.name = name
        frame[name] = canonical_categories(values, name, source) if kind == CATEGORY else values
    return pd.DataFrame(frame, columns=table.column_names)


def memory_frame(table, source: str) -> pd.DataFrame:
    """A frame of a table in memory: a pandas frame, a `datasets.Dataset`, or what gives an Arrow stream, as frames of
    polars do.

    Raises:
        DataError: it is none of these, or two of its columns have one name.
    """
    if isinstance(table, Dataset):
        table = table.with_format("arrow")[:]
    elif hasattr(table, "__arrow_c_stream__") and not isinstance(table, pd.DataFrame):
        table = pa.table(table)
    if not isinstance(table, (pd.DataFrame, pa.Table)):
        raise DataError(
            f"{source}: a {type(table).__name__} is no table in memory. Give a data frame of pandas or polars, a "
            "datasets.Dataset or an Arrow table."
        )
    names = pd.Index(table.columns if isinstance(table, pd.DataFrame) else table.column_names)
    if names.has_duplicates:
        name = names[names.duplicated()][0]
        raise DataError(f"{source}: column '{name}' stands there several times. Rename the others.")
    if isinstance(table, pd.DataFrame):
        frame = table.reset_index(drop=True)
    else:
        table = pa.table({name: _without_views(table[name]) for name in names})
        frame = frame_of_table(table, dict.fromkeys(names, ID), source)
    for name in names:
        if isinstance(frame[name].dtype, pd.CategoricalDtype):
            frame[name] = frame[name].astype(object).infer_objects()
    return frame


def _without_views(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists of text as polars has it, which Arrow does not give to pandas, as lists of text."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_list and pa.types.is_string_view(kind.value_type):
        return column.cast(pa.large_list(pa.large_string()))
    return column


def _typed_objects(frame: pd.DataFrame, kinds: Mapping[str, str], source: str) -> pd.DataFrame:
    """Values of JSON, which have types, as those of a table that has them; numbers may be text too."""
    columns = {}
    for name in frame:
        try:
            values = pa.chunked_array([pa.array(frame[name].to_list())])
        except pa.ArrowException:  # of several types, which the schema refuses by its row
            columns[name] = frame[name]
            continue
        if pa.types.is_string(values.type) and kinds.get(name, NUMBER) == NUMBER:
            columns[name] = _typed(values, NUMBER)
        else:
            columns[name] = frame_of_table(pa.table({name: values}), kinds, source)[name]
    return pd.DataFrame(columns, columns=frame.columns)


def _read_csv(
    path: Path, columns: list[str], kinds: Mapping[str, str], header: list[str] | None, delimiter: str | None
) -> pd.DataFrame:
    if header is not None:
        require_columns(header, columns, path.name)
        delimiter = delimiter or ","
    delimiter = delimiter or text_layout(str(path), columns, None, None)[1]
    numbers = [name for name in columns if kinds.get(name, NUMBER) == NUMBER]
    with suppress(pa.ArrowInvalid):
        # The usual case, in which the parser itself makes the numbers, on all cores.
        types = dict.fromkeys(numbers, pa.float64())
        return typed_columns(_csv_table(path, columns, delimiter, types, header, use_threads=True), kinds)
    # One block after the other, so that an error names the row.
    return typed_columns(_csv_table(path, columns, delimiter, {}, header, use_threads=False), kinds)


def text_layout(
    path: str, columns: list[str], header: list[str] | None, delimiter: str | None
) -> tuple[list[str], str]:
    """The names of all columns of a CSV file, local or remote, and what parts them, as [`read_columns`] takes it.

    Raises:
        DataError: a column is missing, or is there twice.
    """
    if header is not None:
        require_columns(header, columns, path)
        return header, delimiter or ","
    with opened(path) as file:
        return _delimiter_of(file.readline(), Path(path), columns, delimiter)


def _delimiter_of(first: bytes, path: Path, columns: list[str], delimiter: str | None = None) -> tuple[list[str], str]:
    if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: is written in UTF-16, only utf-8 is read. Save it as CSV in utf-8.")
    line = first.decode("utf-8-sig")
    # A header of one column whose name holds other separators is parted by these.
    headers = {delimiter: next(csv.reader([line], delimiter=delimiter), []) for delimiter in (delimiter or DELIMITERS)}
    delimiter = next((one for one, names in headers.items() if set(columns) <= set(names)), next(iter(headers)))
    names = headers[delimiter]
    require_columns(names, columns, path.name, "The first line is read as the header: write one if the file has none.")
    for name in columns:
        if names.count(name) > 1:
            raise DataError(f"{path.name}: column '{name}' stands there {names.count(name)} times. Rename the others.")
    return names, delimiter


def _csv_table(
    path: Path,
    columns: list[str],
    delimiter: str,
    types: dict[str, pa.DataType],
    header: list[str] | None,
    use_threads: bool,
) -> pa.Table:
    """The named columns, as text where there is no other type."""
    # Without a header, tabs part what is written as it is: a quote is a sign as any other.
    quoted = header is None or delimiter != "\t"
    with opened(path) as packed:
        file = _QuotesCounted(packed)
        try:
            return pyarrow.csv.read_csv(
                file,
                read_options=pyarrow.csv.ReadOptions(
                    use_threads=use_threads, block_size=_BLOCK_BYTES, column_names=header
                ),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=delimiter, newlines_in_values=quoted, quote_char='"' if quoted else False
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=columns,
                    column_types=dict.fromkeys(columns, pa.string()) | types,
                    null_values=NULL_VALUES,
                    strings_can_be_null=True,
                ),
            )
        finally:
            if quoted and file.quotes % 2:
                _require_closed_quotes(path, delimiter)


class _QuotesCounted(io.RawIOBase):
    """A file that counts the quotes that are read from it."""

    def __init__(self, file: BinaryIO):
        self.file, self.quotes = file, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size)
        self.quotes += block.count(b'"')
        return block


def _require_closed_quotes(path: Path, delimiter: str) -> None:
    """Raises DataError if a quote is not closed, which would make one value of the rest of the file."""
    with opened(path) as file:
        rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        complete = -1  # the header is the first
        try:
            for _ in rows:
                complete += 1
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise DataError(
                    f"{path.name}: a quote is opened in row {complete} (rows counted from 0, without a header) and "
                    'never closed. Close it, or double the quotes within values ("").'
                ) from None


@contextmanager
def opened(path: Path | str) -> Iterator[BinaryIO]:
    """The bytes of a file, local or of a protocol such as `s3://`, unpacked by its ending."""
    with fsspec.open(path, "rb") if "://" in str(path) else open(path, "rb") as packed:
        suffix = Path(path).suffix.lower()
        if suffix == ".zip":
            with zipfile.ZipFile(packed) as archive:
                # What macOS packs beside the files.
                names = [name for name in archive.namelist() if not name.startswith("__MACOSX/") and name[-1] != "/"]
                if len(names) != 1:
                    raise DataError(f"{path}: holds {len(names)} files ({', '.join(names[:5])}). Pack one file alone.")
                with archive.open(names[0]) as file:
                    yield file
        elif suffix == ".zst":
            with pa.input_stream(packed, compression="zstd") as file, io.BufferedReader(file) as lines:
                yield lines
        elif suffix in (openers := {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}):
            with openers[suffix](packed, "rb") as file:
                yield file
        else:
            yield packed


def typed_columns(table: pa.Table, kinds: Mapping[str, str]) -> pd.DataFrame:
    """Columns of text as what they are of."""
    columns = {name: _typed(table[name], kinds.get(name, NUMBER)) for name in table.column_names}
    return pd.DataFrame(columns, columns=table.column_names)


def _typed(column: pa.ChunkedArray, kind: str) -> pd.Series:
    if kind == NUMBER and pa.types.is_string(column.type):
        numbers = _converted(pc.utf8_trim_whitespace(column), pa.float64())
        if numbers is not None:
            return numbers.to_pandas()
        return (pc.cast(pc.utf8_lower(column), pa.bool_()) if _are_booleans(column) else column).to_pandas()
    integers = _converted(column, pa.int64()) if kind == ID else None
    if integers is None or _has_leading_zeros(column):
        return column.to_pandas()
    return integers.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get if integers.null_count else None)


def _has_leading_zeros(column: pa.ChunkedArray) -> bool:
    """Whether an integer is written as no integer is, by which two ids would become one. Includes 0x10 and -0."""
    for sign in ("0", "-0"):
        zeros = pc.starts_with(column, sign)
        if pc.any(zeros).as_py() and pc.any(pc.and_(zeros, pc.greater(pc.binary_length(column), 1))).as_py():
            return True
    return False


def _converted(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray | None:
    try:
        return pc.cast(column, kind)
    except pa.ArrowInvalid:
        return None


def _are_booleans(column: pa.ChunkedArray) -> bool:
    words = pc.unique(pc.utf8_lower(pc.drop_null(column))).slice(0, 3).to_pylist()
    return bool(words) and set(words) <= {"true", "false"}


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
        return pd.read_csv(source, sep=separator, index_col=False, **options, low_memory=False, **CSV_OPTIONS)
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
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def read_json_columns(path: Path, columns: list[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """The named keys of a file of JSON lines as columns, null where a line has no such key.

    Raises:
        DataError: a line that is not JSON, or a key that no line has, unless it is optional.
    """
    found: dict[str, list] = {column: [] for column in (*columns, *optional)}
    present: set[str] = set()
    for record in json_lines(path):
        present |= record.keys()
        for column, values in found.items():
            values.append(record.get(column))
    require_columns(sorted(present), columns, path.name)
    return pd.DataFrame({column: pd.Series(values, dtype=object) for column, values in found.items()})


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, UnicodeError) or "invalid utf8" in str(error).lower():
        return DataError(f"{path}: is not written in utf-8: {error}. Save it in this encoding.")
    return DataError(f"{path}: cannot be read: {error or type(error).__name__}. Correct the file, or write it again.")
