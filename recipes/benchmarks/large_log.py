"""Writes a large log of generated behaviour, part by part, in a folder that `dataset: table` reads.

    python recipes/benchmarks/large_log.py --rows 50_000_000 --output_dir logs/50m

Rows stand in the order of time, a day in a folder of its own (`log/date=.../part-0000.parquet`). A few users and items
have most of them. `mapping.yaml` beside them is the column mapping.
"""

import argparse
import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

START = datetime.date(2024, 1, 1)
DAYS = 30
DAY_MS = 86_400_000
PART_ROWS = 2_000_000  # at once in memory, about 300 MB
MAPPING = """name: large_log
interactions:
  file: log
  columns: {user_id: user, item_id: video, timestamp: time_ms}
  timestamp_unit: ms
  feedback:
    watch_time: {column: play_ms, scale: 0.001}
    duration: {column: length_ms, scale: 0.001}
    view: is_view
    like: is_like
positive_feedback: [view, like]
"""


def part(rows: int, users: int, items: int, start_ms: int, span_ms: int, seed: list[int]) -> pa.Table:
    """Rows of one stretch of time, by time; ids are spread over all 40-bit integers."""
    generator = np.random.default_rng(seed)
    user = (users * generator.random(rows) ** 2).astype(np.int64)
    item = (items * generator.random(rows) ** 3).astype(np.int64)
    length = generator.integers(5_000, 120_000, rows)
    play = (length * generator.random(rows)).astype(np.int64)
    return pa.table(
        {
            "user": user * 1_000_003 % 2**40,
            "video": item * 999_983 % 2**40,
            "time_ms": np.sort(generator.integers(start_ms, start_ms + span_ms, rows)),
            "play_ms": play,
            "length_ms": length,
            "is_view": (play > 0.7 * length).astype(np.int8),
            "is_like": (generator.random(rows) < 0.03).astype(np.int8),
        }
    )


def write_log(folder: Path, rows: int, users: int, items: int, seed: int) -> None:
    """Writes the log and its mapping below `folder`."""
    start = int(datetime.datetime.combine(START, datetime.time(), datetime.UTC).timestamp()) * 1000
    for day in range(DAYS):
        day_rows = rows * (day + 1) // DAYS - rows * day // DAYS
        directory = folder / "log" / f"date={START + datetime.timedelta(day)}"
        directory.mkdir(parents=True, exist_ok=True)
        parts = max(1, -(-day_rows // PART_ROWS))
        for index in range(parts):
            part_rows = day_rows * (index + 1) // parts - day_rows * index // parts
            span = DAY_MS // parts
            table = part(part_rows, users, items, start + day * DAY_MS + index * span, span, [seed, day, index])
            pq.write_table(table, directory / f"part-{index:04d}.parquet", compression="zstd")
    (folder / "mapping.yaml").write_text(MAPPING, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--users", type=int, help="at most; by default one for every 100 rows")
    parser.add_argument("--items", type=int, help="at most; by default one for every 500 rows, and 2 million")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    users, items = args.users or max(2, args.rows // 100), args.items or min(max(2, args.rows // 500), 2_000_000)
    write_log(args.output_dir, args.rows, users, items, args.seed)
    size = sum(path.stat().st_size for path in args.output_dir.rglob("*.parquet"))
    print(f"{args.rows:,} rows, at most {users:,} users and {items:,} items, {size / 1e9:.2f} GB: {args.output_dir}")


if __name__ == "__main__":
    main()
