"""A log of more rows than memory holds, as a feed in partitions of whole users. DuckDB reads and parts the files.

Three steps, whose parts several processes may share; what is done of them is kept when a run is killed:

1. [`SourceLog.shuffle`] parts the rows of some source files by a hash of the user, as they are.
2. [`SourceLog.write_partition`] makes of the rows of a partition what [`read_table`] makes of a whole log.
3. [`SourceLog.write_feed`] adds what is known of the whole: the items, the users, the times.

A feed in partitions is a saved feed whose interactions are a folder `interactions/part-00000.parquet ...`.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..staged_files import staged_directory, staged_file
from .data_arguments import DataArguments
from .data_files import NULL_VALUES, Tables, frame_of_table, is_json, read_columns, text_layout, typed_columns
from .feed import Feed, WholeLog
from .readers import (
    ID_COLUMNS,
    LAYOUT_KEYS,
    feedback_parts,
    file_system,
    interaction_frames,
    interaction_kinds,
    item_roles,
    item_table,
    part_name,
    read_mapping,
    save_feed_tables,
    source_paths,
    user_table,
    with_unlisted,
    write_interactions,
)
from .schema import (
    DataError,
    canonical_ids,
    canonical_interactions,
    canonical_items,
    canonical_users,
    id_type,
    order_interactions,
    require_users,
    same_kind,
)
from .sessions import DEFAULT_QUANTILES, user_codes
from .timestamps import likely_unit

ENGINE_MEMORY = "2GiB"  # of DuckDB in a process; what needs more it keeps on disk
TASK_BYTES = 2**29  # of source files that are parted at once
ROW_BITS = 40  # a row's place in a log is its file's number and, in so many bits, its number within the file
SHUFFLE, FACTS, SEEN_ITEMS = "shuffle", "facts.json", "seen_items"
PLACE, PARTITION = "__place", "__partition"
SMALL_COUNT = 1_000_000  # times that are sorted in memory
INTEGER_TYPES = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")
# As an integer is written, for the types of text files: see `canonical_ids`.
WRITTEN_INTEGER = "0|-?[1-9][0-9]{0,18}"


def partition_feed(feed: Feed, directory: Path, num_partitions: int) -> None:
    """Saves a feed that is in memory as one in partitions; users are dealt out in their order."""
    codes = user_codes(feed.interactions)
    known = feed.interactions["timestamp"].dropna()
    whole = WholeLog(
        first_time=None if known.empty else float(known.min()),
        last_time=None if known.empty else float(known.max()),
        quantiles={} if known.empty else {name: float(known.quantile(q)) for name, q in DEFAULT_QUANTILES.items()},
        has_session_ids="session_id" in feed.interactions and bool(feed.interactions["session_id"].notna().any()),
    )
    for index in range(num_partitions):
        rows = feed.interactions[codes % num_partitions == index].reset_index(drop=True)
        write_interactions(rows, directory / part_name("interactions", index))
    save_feed_tables(dataclasses.replace(feed, whole=whole), directory)


class SourceLog:
    """The source files of `dataset: table`, on their way to a feed in `num_partitions` partitions.

    Args:
        args: of the data.
        folder: where the work is done; the feed is written to `<folder>/feed`.

    Raises:
        DataError: files are missing, or cannot be read without holding all of them in memory.
    """

    def __init__(self, args: DataArguments, folder: Path):
        self.args, self.folder = args, folder
        self.mapping = read_mapping(args.column_mapping, "file")
        self.section = self.mapping["interactions"]
        self.files = source_paths(self.section, args.data_dir, args.column_mapping)
        self.is_text = not self.files[0].lower().endswith(".parquet")
        self.kinds = interaction_kinds(self.section)
        self.id_columns = {
            self.section["columns"][name]: name for name in ID_COLUMNS if name in self.section["columns"]
        }
        self._require_supported()
        self.tasks = self._tasks()

    def _require_supported(self) -> None:
        for path in self.files:
            if path.lower().endswith(".parquet") == self.is_text:
                remedy = "Convert all to Parquet."
                raise DataError(f"{path}: num_partitions reads either text files or Parquet, not both. {remedy}")
            if is_json(Path(path)) or path.lower().endswith((".bz2", ".xz", ".zip")):
                raise DataError(
                    f"{path}: num_partitions reads Parquet and CSV, the latter also as .gz and .zst. Convert the file "
                    "to Parquet, or leave num_partitions out to read it in memory."
                )

    def _tasks(self) -> list[list[int]]:
        """Numbers of files that are parted together; of text files one, whose rows are numbered as they are read."""
        tasks, held = [[]], 0
        for number, path in enumerate(self.files):
            size = file_system(path).info(path)["size"]
            if tasks[-1] and (self.is_text or held + size > TASK_BYTES):
                tasks.append([])
                held = 0
            tasks[-1].append(number)
            held += size
        return tasks

    def shuffle(self, task: int) -> None:
        """Parts the rows of a task's files, unless that is done.

        Raises:
            DataError: a column is missing, a file cannot be read, or files do not have the same types.
        """
        target = self.folder / SHUFFLE / f"task-{task:05d}"
        if target.exists():
            return
        files = [self.files[number] for number in self.tasks[task]]
        user, columns = quoted(self.section["columns"]["user_id"]), ", ".join(map(quoted, self.kinds))
        with staged_directory(target) as out, engine(self.folder, files[0], ordered=self.is_text) as connection:
            scan = self._text_scan(files[0]) if self.is_text else "read_parquet($files, hive_types_autocast = false)"
            row = "row_number() OVER () - 1" if self.is_text else "file_row_number"
            place = f"((file_index + {self.tasks[task][0]})::BIGINT << {ROW_BITS}) + {row}"
            part = f"(hash({user}::VARCHAR) % {self.args.num_partitions})::INTEGER"
            selected = f"SELECT {columns}, {place} AS {PLACE}, {part} AS {PARTITION} FROM {scan}"
            options = f"FORMAT parquet, COMPRESSION lz4_raw, PARTITION_BY ({PARTITION}), ROW_GROUP_SIZE 30720"
            named = {"files": [glob.escape(path) for path in files]}
            try:
                connection.execute(f"COPY ({selected}) TO {literal(out / 'rows')} ({options})", named)
                # Spark writes parts without rows.
                facts = self._facts(connection, out / "rows") if any((out / "rows").glob("*/*")) else None
            except installed_duckdb().Error as error:
                raise DataError(
                    f"{', '.join(files[:3])}: cannot be parted: {error}. Correct the files or the column mapping; all "
                    "files need the mapped columns, of the same types."
                ) from None
            (out / FACTS).write_text(json.dumps(facts), encoding="utf-8")

    def _text_scan(self, path: str) -> str:
        header = self.section.get("header")
        names, delimiter = text_layout(path, list(self.kinds), header, self.section.get("delimiter"))
        # Without a header, tabs part what is written as it is: a quote is a sign as any other.
        quote = "" if header is not None and delimiter == "\t" else '"'
        return (
            f"read_csv($files, auto_detect = false, columns = {sql_struct(dict.fromkeys(names, 'VARCHAR'))}, "
            f"header = {header is None}, delim = {literal(delimiter)}, quote = '{quote}', escape = '{quote}', "
            f"nullstr = {NULL_VALUES}, max_line_size = {2**24})"
        )

    def _facts(self, connection, rows: Path) -> dict:
        """What the rows of some files say of the types of their columns and of the unit of their times."""
        scan = f"read_parquet({literal(rows / '*' / '*.parquet')}, hive_partitioning = false)"
        described = connection.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()
        types = {name: kind for name, kind, *_ in described if name != PLACE}
        engine_version = connection.execute("SELECT version()").fetchone()[0]
        facts: dict = {"engine": engine_version, "types": types, "integers": {}, "times": None}
        for column in self.id_columns:
            name = quoted(column)
            if types[column] == "VARCHAR" and (self.is_text or _is_hive(column, self.files[0])):
                written = f"regexp_full_match({name}, '{WRITTEN_INTEGER}') AND TRY_CAST({name} AS BIGINT) IS NOT NULL"
                facts["integers"][column] = connection.execute(
                    f"SELECT coalesce(bool_and({written}), true) FROM {scan} WHERE {name} IS NOT NULL"
                ).fetchone()[0]
            elif types[column] not in (*INTEGER_TYPES, "VARCHAR") and not types[column].startswith("ENUM"):
                raise DataError(
                    f"{self.files[0]}: column '{column}' has type {types[column]}, of which num_partitions makes no "
                    "ids. Store it as 64-bit integers or text."
                )
        time = self.section["columns"].get("timestamp")
        if time is not None and "timestamp_unit" not in self.section:
            number = f"TRY_CAST({quoted(time)} AS DOUBLE)"
            if not types[time].startswith(("TIMESTAMP", "DATE")):
                lowest = f"min({number}) FILTER ({number} > 0), max({number})"
                query = f"SELECT {lowest}, count({quoted(time)}) - count({number}) FROM {scan}"
                facts["times"] = connection.execute(query).fetchone()
        for part in feedback_parts(self.section).values():
            if "equals" not in part:
                continue
            column = part["column"]
            written = f"SELECT count(*) FROM {scan} WHERE {quoted(column)}::VARCHAR LIKE '%.0'"
            if types[column] in ("DOUBLE", "FLOAT") or connection.execute(written).fetchone()[0]:
                raise DataError(
                    f"{self.files[0]}: column '{column}' of 'equals' holds numbers with decimals, which "
                    "num_partitions does not compare. Store it as integers or text."
                )
        return facts

    def write_tables(self) -> None:
        """Notes the types of the ids in the tables of items and users, for [`write_partition`]."""
        target = self.folder / SHUFFLE / "tables.json"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            items, users = self._listed()
            kinds = {
                name: None if table is None else id_type(canonical_ids(table[0][name], name, table[1]))
                for name, table in (("item_id", items), ("user_id", users))
            }
            with staged_file(target) as partial:
                partial.write_text(json.dumps(kinds), encoding="utf-8")

    def _listed(self) -> tuple[tuple[pd.DataFrame, str] | None, ...]:
        """The tables of items and of users, each with its name."""

        def read(section: dict, kinds: dict[str, str]) -> Tables:
            layout = {key: section.get(key) for key in LAYOUT_KEYS}
            paths = source_paths(section, self.args.data_dir, self.args.column_mapping)
            tables = [(read_columns(self._local(path), list(kinds), kinds, **layout), path) for path in paths]
            return [(frame, source) for frame, source in tables if len(frame)] or tables[:1]

        return item_table(self.mapping, read), user_table(self.mapping, read)

    def _local(self, path: str) -> Path:
        if "://" not in path:
            return Path(path)
        copy = self.folder / SHUFFLE / "tables" / path.split("://")[1].strip("/")
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with staged_file(copy) as partial:
                file_system(path).get_file(path, str(partial))
        return copy

    def whole_facts(self) -> dict:
        """What all files say: `text`, the columns of ids that are text; `unit`, of the times.

        Raises:
            DataError: there are no rows, the unit of the times cannot be told, or another DuckDB, which may part users
                otherwise, parted some of the files.
        """
        facts = [json.loads(path.read_text(encoding="utf-8")) for path in self._of_tasks(FACTS)]
        facts = [one for one in facts if one is not None]
        if not facts:
            raise DataError(f"{self.files[0]}: no interactions (0 rows). Check the path and what wrote the files.")
        if len(versions := {one["engine"] for one in facts}) > 1:
            raise DataError(
                f"{self.folder / SHUFFLE}: written by DuckDB {' and '.join(sorted(versions))}. Delete this folder."
            )
        kinds = json.loads((self.folder / SHUFFLE / "tables.json").read_text(encoding="utf-8"))
        text = set()
        for column, name in self.id_columns.items():
            integers = [one["integers"].get(column, one["types"][column] in INTEGER_TYPES) for one in facts]
            if not all(integers) or "string" in (self.section["types"].get(name), kinds.get(name)):
                text.add(column)
        unit = self.section.get("timestamp_unit")
        times = [one["times"] for one in facts if one["times"] is not None]
        if unit is None and times:
            unit = self._unit(times)
        return {"text": text, "unit": unit}

    def _unit(self, times: list[list]) -> str:
        lowest = min((low for low, _, _ in times if low is not None), default=0)
        highest = max((high for _, high, _ in times if high is not None), default=0)
        units = {likely_unit(lowest), likely_unit(highest)}
        if any(unread for *_, unread in times) or len(units) > 1:
            raise DataError(
                f"{self.files[0]}: num_partitions cannot tell the unit of the times in column "
                f"'{self.section['columns']['timestamp']}', {lowest:.0f} to {highest:.0f}. Set timestamp_unit in the "
                "column mapping."
            )
        return units.pop() or "s"

    def _of_tasks(self, name: str) -> list[Path]:
        return [self.folder / SHUFFLE / f"task-{task:05d}" / name for task in range(len(self.tasks))]

    def write_partition(self, index: int) -> None:
        """Writes the canonical interactions of a partition, sorted, and which items they name, unless that is done.

        Raises:
            DataError: what a reader of files refuses too, with the row of the source file.
        """
        target = self.folder / "feed" / part_name("interactions", index)
        if target.exists():
            return
        facts = self.whole_facts()
        rows = self._rows(index, facts["text"])
        if len(rows):
            interactions = self._canonical(rows, facts)
        else:
            others = (self._rows(other, facts["text"], limit=1) for other in range(self.args.num_partitions))
            some = next(frame for frame in others if len(frame))
            interactions, rows = self._canonical(some, facts)[:0], some[:0]
        seen = pd.DataFrame({"item_id": interactions["item_id"], "place": rows[PLACE].to_numpy()})
        seen_items = self.folder / part_name(SEEN_ITEMS, index)
        seen_items.parent.mkdir(exist_ok=True)
        with staged_file(seen_items) as partial:
            seen.drop_duplicates("item_id").to_parquet(partial)
        interactions = order_interactions(interactions)
        feed = Feed(self.name, interactions, interactions[["item_id"]][:0], self.positive_feedback)
        if self.args.repeated_positives != "keep":
            feed = feed.without_repeats(in_a_row=self.args.repeated_positives == "first_in_a_row")
        write_interactions(feed.interactions, target)

    @property
    def name(self) -> str:
        return str(self.mapping.get("name", Path(self.args.data_dir).name))

    @property
    def positive_feedback(self) -> list[str]:
        given = self.args.positive_feedback
        return [str(one) for one in self.mapping.get("positive_feedback", [])] if given is None else given

    def _rows(self, index: int, text: set[str], limit: int | None = None) -> pd.DataFrame:
        """The rows of a partition as the files have them, in their order."""
        parts = [path for folder in self._of_tasks(f"rows/{PARTITION}={index}") for path in sorted(folder.glob("*"))]
        tables = [pq.ParquetFile(path).read() for path in parts]
        if not tables:
            return pd.DataFrame(columns=[*self.kinds, PLACE])
        columns = {column: pa.large_string() if column in text else pa.int64() for column in self.id_columns}
        tables = [self._cast(table, columns) for table in tables]
        table = pa.concat_tables(tables, promote_options="permissive").sort_by(PLACE)
        table = table if limit is None else table.slice(0, limit)
        written = [
            column
            for column in self.kinds
            if column not in columns and (self.is_text or _is_hive(column, self.files[0]))
        ]
        typed = frame_of_table(table.drop_columns(written), self.kinds, self.files[0])
        return typed.assign(**typed_columns(table.select(written), self.kinds)) if written else typed

    @staticmethod
    def _cast(table: pa.Table, columns: dict[str, pa.DataType]) -> pa.Table:
        for column, kind in columns.items():
            place = table.column_names.index(column)
            table = table.set_column(place, column, table[column].cast(kind))
        return table

    def _canonical(self, rows: pd.DataFrame, facts: dict) -> pd.DataFrame:
        section = dict(self.section)
        if facts["unit"] is not None:
            section["timestamp_unit"] = facts["unit"]
        source = f"{self.files[0]}{f' and {len(self.files) - 1} others' if len(self.files) > 1 else ''}"
        try:
            [(frame, _)] = interaction_frames(section, lambda *_: [(rows, source)])
            frame = canonical_interactions(frame, source)
        except DataError as error:
            if error.row is None:
                raise
            place = int(rows[PLACE].iloc[error.row])
            row, file = place % 2**ROW_BITS, self.files[place >> ROW_BITS]
            text = f"{error} Of the rows of one partition this is row {error.row}: it is row {row} of {file}."
            raise DataError(text, error.row) from None
        for column, name in self.id_columns.items():
            if column in facts["text"] and id_type(frame[name]) != "string":
                frame[name] = frame[name].astype("string" if frame[name].isna().any() else "str")
        return frame

    def write_feed(self) -> None:
        """Writes what is known of the whole log, when all partitions are written, and removes what was in between.

        Raises:
            DataError: an item of the interactions is not among the items, or there is one user only.
        """
        directory = self.folder / "feed"
        if (directory / "feed.json").exists():
            return
        seen = pq.read_table(self._seen_items()).to_pandas()
        source = f"{self.files[0]} and others" if len(self.files) > 1 else self.files[0]
        items, users = self._listed()
        unlisted = items is None or self.mapping["items"].get("unlisted") == "add"
        items = with_unlisted(items, [seen["item_id"]], source) if unlisted else items
        catalogue, users = canonical_items(*items, **item_roles(self.mapping)), users and canonical_users(*users)
        catalogue["item_id"], ids = same_kind([catalogue["item_id"], seen["item_id"]])
        unknown = np.flatnonzero(~ids.isin(catalogue["item_id"]).to_numpy())
        if len(unknown):
            place = int(seen["place"].iloc[unknown[0]])
            raise DataError(
                f"{self.files[place >> ROW_BITS]}: column 'item_id' names items that are not in {items[1]}, first at "
                f"row {place % 2**ROW_BITS} (rows counted from 0, without a header): {ids.iloc[unknown[0]]!r} "
                f"({len(unknown)} items). Add the items to {items[1]} or drop these interactions."
            )
        parts = [directory / part_name("interactions", index) for index in range(self.args.num_partitions)]
        interactions = pq.read_table(parts[0]).slice(0, 0).to_pandas()
        if users is not None and id_type(interactions["user_id"]) != id_type(users["user_id"]):
            users["user_id"] = users["user_id"].astype("str")
        with engine(self.folder) as connection:
            users_found = f"SELECT DISTINCT user_id FROM {partition_scan(directory / 'interactions')} LIMIT 2"
            require_users([user for (user,) in connection.execute(users_found).fetchall()], source)
            whole = whole_log(connection, directory / "interactions")
        feed = Feed(
            self.name,
            interactions,
            catalogue,
            self.positive_feedback,
            timezone=str(self.mapping.get("timezone", "UTC")),
            users=users,
            whole=whole,
            **item_roles(self.mapping),
        )
        save_feed_tables(feed, directory)

    def remove_work(self) -> None:
        """Removes what only the steps before needed."""
        for name in (SHUFFLE, SEEN_ITEMS):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _seen_items(self) -> Path:
        """All items that the interactions name, with the place of each one's first row, in that order."""
        target = self.folder / SEEN_ITEMS / "all.parquet"
        parts = [str(self.folder / part_name(SEEN_ITEMS, index)) for index in range(self.args.num_partitions)]
        with engine(self.folder) as connection, staged_file(target) as partial:
            query = "SELECT item_id, min(place) AS place FROM read_parquet($parts) GROUP BY item_id ORDER BY place"
            connection.execute(f"COPY ({query}) TO {literal(partial)} (FORMAT parquet)", {"parts": parts})
        return target


def _is_hive(column: str, path: str) -> bool:
    """Whether the column is a folder's name, as in `date=2024-01-01/part.parquet`."""
    return any(part.startswith(f"{column}=") for part in Path(path).parts[:-1])


def quoted(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: object) -> str:
    """Text in SQL."""
    return "'" + str(text).replace("'", "''") + "'"


def sql_struct(values: dict[str, str]) -> str:
    """A struct of text in SQL."""
    return "{" + ", ".join(f"{quoted(name)}: {literal(value)}" for name, value in values.items()) + "}"


def installed_duckdb() -> ModuleType:
    """DuckDB. Raises ImportError with the remedy where it is not installed."""
    try:
        import duckdb
    except ImportError:
        raise ImportError("num_partitions needs DuckDB: pip install 'onerec_hf[large]'.") from None
    return duckdb


@contextmanager
def engine(folder: Path, path: str = "", ordered: bool = False) -> Iterator:
    """A connection to a DuckDB of this process.

    Args:
        folder: where it keeps what memory does not hold.
        path: of a file that it reads, whose file system is made known to it.
        ordered: whether rows stay in the order of the files.

    Raises:
        ImportError: DuckDB is not installed.
    """
    config = {"memory_limit": ENGINE_MEMORY, "temp_directory": str(folder / ".spill")}
    with installed_duckdb().connect(config=config) as connection:
        connection.execute(f"SET preserve_insertion_order = {ordered}")
        connection.execute("SET partitioned_write_max_open_files = 10000")
        connection.execute("SET enable_progress_bar = false")
        if "://" in path:
            connection.register_filesystem(file_system(path))
        yield connection


def partition_scan(folder: Path) -> str:
    """All partitions of a table, in SQL."""
    return f"read_parquet({literal(folder / 'part-*.parquet')})"


def whole_log(connection, interactions: Path) -> WholeLog:
    """What is known of a log in partitions.

    Args:
        connection: of [`engine`].
        interactions: folder of its partitions.
    """
    scan = partition_scan(interactions)
    known = f"(SELECT timestamp AS t FROM {scan} WHERE NOT isnan(timestamp) AND timestamp IS NOT NULL)"
    columns = [name for name, *_ in connection.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()]
    named = f"SELECT count(session_id) FROM {scan}"
    has_session_ids = "session_id" in columns and connection.execute(named).fetchone()[0] > 0
    first, last, _ = extent = connection.execute(f"SELECT min(t), max(t), count(*) FROM {known}").fetchone()
    return WholeLog(first, last, quantiles(connection, known, extent, DEFAULT_QUANTILES), has_session_ids)


def quantiles(connection, values: str, extent: tuple, shares: dict[str, float]) -> dict[str, float]:
    """As `pandas.Series.quantile` has them, by name.

    Args:
        connection: of [`engine`].
        values: a table or subquery of finite numbers `t`, of which a few are in memory at once.
        extent: their minimum, maximum and count.
        shares: by name, in [0, 1].
    """
    last = extent[2] - 1
    if last < 0:
        return {}
    places = {name: last * share for name, share in shares.items()}
    ranks = {rank for place in places.values() for rank in (int(place), min(int(place) + 1, last))}
    found, result = _ranked(connection, values, extent, sorted(ranks)), {}
    for name, place in places.items():
        low, high, share = found[int(place)], found[min(int(place) + 1, last)], place - int(place)
        # Exactly as numpy interpolates.
        result[name] = low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)
    return result


def _ranked(connection, values: str, extent: tuple, ranks: list[int]) -> dict[int, float]:
    """The values of these ranks, counted from 0: their neighbourhoods are narrowed by counts until they are small."""
    low, high, count = extent
    if low == high:
        return dict.fromkeys(ranks, low)
    if count <= SMALL_COUNT:
        ordered = np.sort(connection.execute(f"SELECT t FROM {values}").fetchnumpy()["t"])
        return {rank: float(ordered[rank]) for rank in ranks}
    bucket = f"floor((t - {low!r}::DOUBLE) / ({high!r}::DOUBLE - {low!r}::DOUBLE) * 4096)"
    found, start = {}, 0
    query = f"SELECT min(t), max(t), count(*) FROM {values} GROUP BY {bucket} ORDER BY 1"
    for low, high, count in connection.execute(query).fetchall():
        inside = [rank - start for rank in ranks if start <= rank < start + count]
        if inside:
            own = f"(SELECT t FROM {values} WHERE t BETWEEN {low!r}::DOUBLE AND {high!r}::DOUBLE)"
            own = _ranked(connection, own, (low, high, count), inside)
            found |= {rank + start: value for rank, value in own.items()}
        start += count
    return found
