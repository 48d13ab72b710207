"""A look at the tables of a folder: how each is written, and its columns in a sample of the rows."""

from __future__ import annotations

import csv
import io
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .data_files import CSV_OPTIONS, UNREADABLE, data_folder, is_json, is_table, json_lines, opened

SAMPLE_ROWS, SAMPLE_BYTES = 50_000, 2**23  # of each file, from its start
TEXT_SUFFIXES = (".txt", ".dat", ".data", ".tab")
SEPARATORS = ("::", "\t", ";", "|", ",")
# Files that were published without a header.
KNOWN_HEADERS = {
    "userid-timestamp-artid-artname-traid-traname.tsv": [
        *("user_id", "timestamp", "artist_id", "artist_name", "track_id", "track_name"),
    ],
    "u.data": ["user_id", "item_id", "rating", "timestamp"],
    "behaviors.tsv": ["impression_id", "user_id", "time", "history", "impressions"],
    "UserBehavior.csv": ["user_id", "item_id", "category_id", "behavior_type", "timestamp"],
}


@dataclass
class TableSample:
    """Files of the same columns, and rows of them.

    Args:
        files: below the folder, as a column mapping names them.
        frame: the first rows; of text files all columns are text, or numbers where every value is one.
        size: of the files [bytes].
        header: names of the columns where the files have none.
        delimiter: of text files.
        whole: whether these are all rows.
    """

    files: list[str]
    frame: pd.DataFrame
    size: int
    header: list[str] | None = None
    delimiter: str | None = None
    whole: bool = True
    numbers: dict[str, pd.Series] = field(init=False)

    def __post_init__(self):
        found = {name: _as_numbers(self.frame[name]) for name in self.frame}
        self.numbers = {name: values for name, values in found.items() if values is not None}

    @property
    def name(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}"


def sampled_tables(data_dir: str | Path) -> tuple[list[TableSample], list[str]]:
    """The tables below a folder, and of each file that is none or cannot be read a line that says why.

    Raises:
        DataError: there is no such folder.
    """
    folder = data_folder(data_dir)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path, folder)]
    wanted = [path for path in paths if is_table(path) or path.suffix.lower() in TEXT_SUFFIXES]
    others = [str(path.relative_to(folder)) for path in paths if path not in wanted]
    unread = [f"no tables by their endings: {', '.join(others[:5])}{', ...' * (len(others) > 5)}"] if others else []
    tables = []
    # Parts of one table have names that differ in their numbers alone.
    for _, group in itertools.groupby(wanted, lambda path: (path.parent, re.sub(r"\d+", "#", path.name))):
        parts: dict[tuple, list[tuple[Path, TableSample]]] = {}
        for path in group:
            try:
                sample = sampled_table(path, str(path.relative_to(folder)))
            except (*UNREADABLE, ValueError) as error:
                unread.append(f"{path.relative_to(folder)}: cannot be read as a table ({str(error).splitlines()[0]})")
                continue
            parts.setdefault((*sample.frame.columns, sample.delimiter), []).append((path, sample))
        tables += [_joined_parts([sample for _, sample in same]) for same in parts.values()]
    return tables, unread


def sampled_table(path: Path, name: str) -> TableSample:
    """One file's sample. Raises ValueError where it is no table of two columns and a row."""
    size = path.stat().st_size
    if path.suffix.lower() == ".parquet":
        file = pq.ParquetFile(path)
        batch = next(file.iter_batches(SAMPLE_ROWS), None)
        frame = pa.Table.from_batches([batch] if batch else [], schema=file.schema_arrow).to_pandas()
        sample = TableSample([name], frame, size, whole=file.metadata.num_rows <= SAMPLE_ROWS)
    elif is_json(path):
        records = list(itertools.islice(json_lines(path), SAMPLE_ROWS))
        sample = TableSample([name], pd.DataFrame(records), size, whole=len(records) < SAMPLE_ROWS)
    else:
        sample = _sampled_text(path, name, size)
    if sample.frame.shape[1] < 2 or not len(sample.frame):
        raise ValueError("it has no rows, or one column")
    return sample


def _sampled_text(path: Path, name: str, size: int) -> TableSample:
    with opened(path) as file:
        data = file.read(SAMPLE_BYTES + 1)
    whole = len(data) <= SAMPLE_BYTES
    if not whole:
        data = data[: data.rfind(b"\n") + 1]
    text = data.decode("utf-8-sig")
    lines = text.splitlines()[:50]
    delimiter = _separator(lines)
    if delimiter is None:
        raise ValueError("its lines are not parted into the same columns")
    first = next(csv.reader(lines[:1], delimiter=delimiter), []) if len(delimiter) == 1 else lines[0].split(delimiter)
    known = KNOWN_HEADERS.get(Path(name).name)
    header = None
    if known is not None and len(known) == len(first) and known[0] != first[0]:
        header = known
    elif not _is_header(first):
        header = [f"column_{number}" for number in range(len(first))]
    frame = pd.read_csv(
        io.StringIO(text),
        sep=delimiter if len(delimiter) == 1 else re.escape(delimiter),
        engine="c" if len(delimiter) == 1 else "python",
        header=None if header else 0,
        names=header,
        dtype=str,
        index_col=False,
        nrows=SAMPLE_ROWS,
        on_bad_lines="skip",
        quoting=csv.QUOTE_NONE if header and delimiter == "\t" else csv.QUOTE_MINIMAL,
        **CSV_OPTIONS,
    )
    return TableSample([name], frame, size, header, delimiter, whole and len(frame) < SAMPLE_ROWS)


def _separator(lines: list[str]) -> str | None:
    """What parts every line into as many columns; of several the one with the most."""
    counts = {}
    for separator in SEPARATORS:
        if len(separator) == 1:
            rows = [len(row) for row in csv.reader(lines[:-1] or lines, delimiter=separator) if row]
        else:
            rows = [len(line.split(separator)) for line in lines]
        common = max(set(rows), key=rows.count, default=1)
        if common > 1 and rows.count(common) >= 0.9 * len(rows):
            counts[separator] = common
    # "::" is no empty column between two of ":".
    return "::" if "::" in counts else max(counts, key=counts.get, default=None)


def _is_header(fields: list[str]) -> bool:
    """Whether a first line holds names: each once, of which none is a number or a date."""
    named = [text.strip() for text in fields]
    if len(set(named)) < len(named) or not all(named[1:]):
        return False
    return not any(re.match(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?$|\d{4}-\d\d-\d\d|\d+/\d+/\d+", text) for text in named)


def _joined_parts(samples: list[TableSample]) -> TableSample:
    first = samples[0]
    if len(samples) == 1:
        return first
    frame = pd.concat([first.frame, samples[-1].frame], ignore_index=True)  # the first and the latest
    files, size = [name for one in samples for name in one.files], sum(one.size for one in samples)
    return TableSample(files, frame, size, first.header, first.delimiter, whole=False)


def _as_numbers(values: pd.Series) -> pd.Series | None:
    """The column as numbers, None where a value is none or nothing is known."""
    if pd.api.types.is_datetime64_any_dtype(values.dtype) or values.dropna().empty:
        return None
    if not pd.api.types.is_numeric_dtype(values.dtype):
        plain = values.dropna()
        if not plain.map(lambda value: isinstance(value, (str, int, float))).all():
            return None
        low = plain.astype("str").str.strip().str.lower()
        if low.isin(["true", "false"]).all():
            return (low == "true").astype(float).reindex(values.index)
        values = values.astype("str").str.strip() if not pd.api.types.is_bool_dtype(values.dtype) else values
    numbers = pd.to_numeric(values, errors="coerce").astype("float64")
    return numbers if numbers.notna().sum() == values.notna().sum() else None


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part[0] in "._" for part in path.relative_to(folder).parts)
