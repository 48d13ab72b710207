"""Engines that could prepare a large log, on what preparing it takes: seconds and peak memory of each.

    python recipes/benchmarks/large_log.py --rows 50_000_000 --output_dir logs/50m
    python recipes/benchmarks/data_engines.py --log logs/50m/log --memory_gib 4 --json data_engines.json

The tasks: `read` (sums of a column by day), `partition` (rewrite the log as files of whole users, by a hash of the
user), `sort` (rewrite it by user and time) and `distinct` (count its users, its items and its pairs of both). Each
task of each engine runs in a process of its own with `--threads` threads; what it needs at most is the child's
`ru_maxrss`, Ray's and Spark's own processes included. An engine whose process holds more than `--memory_gib` is told
so where it has a setting for it (DuckDB, Spark and Ray), and is ended at four times that. One that is not installed
is left out. Debug size: `--rows 100_000` writes such a log by itself.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import psutil

PARTITIONS = 32
TASKS = ("read", "partition", "sort", "distinct")


def duckdb_task(task: str, log: str, output: str, threads: int, memory_gib: float) -> object:
    import duckdb

    engine = duckdb.connect(
        config={"threads": threads, "memory_limit": f"{memory_gib}GiB", "temp_directory": f"{output}.spill"}
    )
    engine.execute("SET preserve_insertion_order = false")
    engine.execute(f"CREATE VIEW log AS SELECT * FROM read_parquet('{log}/*/*.parquet', hive_partitioning = true)")
    if task == "read":
        return engine.sql("SELECT date, sum(play_ms) FROM log GROUP BY date").fetchall()
    if task == "partition":
        engine.execute("SET partitioned_write_max_open_files = 1000")
        parts = f'(SELECT *, hash("user") % {PARTITIONS} AS part FROM log)'
        return engine.execute(f"COPY {parts} TO '{output}' (FORMAT parquet, PARTITION_BY (part))").fetchall()
    if task == "sort":
        return engine.execute(f"COPY (FROM log ORDER BY \"user\", time_ms) TO '{output}' (FORMAT parquet)").fetchall()
    counts = ['count(DISTINCT "user") FROM log', "count(DISTINCT video) FROM log"]
    counts += ['count(*) FROM (SELECT DISTINCT "user", video FROM log)']
    return [engine.execute(f"SELECT {count}").fetchone()[0] for count in counts]


def polars_task(task: str, log: str, output: str, threads: int, memory_gib: float) -> object:
    os.environ["POLARS_MAX_THREADS"] = str(threads)
    import polars as pl

    rows = pl.scan_parquet(f"{log}/*/*.parquet", hive_partitioning=True)
    if task == "read":
        return rows.group_by("date").agg(pl.col("play_ms").sum()).collect(engine="streaming").height
    if task == "partition":
        by = pl.PartitionBy(output, key={"part": pl.col("user").hash() % PARTITIONS})
        return rows.sink_parquet(by, mkdir=True, engine="streaming")
    if task == "sort":
        return rows.sort("user", "time_ms").sink_parquet(output, engine="streaming")
    counts = [rows.select(pl.col(name).n_unique()) for name in ("user", "video")]
    counts.append(rows.select("user", "video").unique().select(pl.len()))
    return [count.collect(engine="streaming").item() for count in counts]


def daft_task(task: str, log: str, output: str, threads: int, memory_gib: float) -> object:
    import daft

    daft.set_runner_native(num_threads=threads)
    rows = daft.read_parquet(f"{log}/*/*.parquet", hive_partitioning=True)
    if task == "read":
        return len(rows.groupby("date").agg(daft.col("play_ms").sum()).to_pydict()["date"])
    if task == "partition":
        part = (daft.col("user").hash() % PARTITIONS).alias("part")
        return len(rows.with_column("part", part).write_parquet(output, partition_cols=[part]).to_pydict())
    if task == "sort":
        return len(rows.sort(["user", "time_ms"]).write_parquet(output).to_pydict())
    counts = [rows.select(name).distinct().count_rows() for name in ("user", "video")]
    return [*counts, rows.select("user", "video").distinct().count_rows()]


def ray_task(task: str, log: str, output: str, threads: int, memory_gib: float) -> object:
    import ray

    memory = int(memory_gib * 2**30)
    ray.init(
        _node_ip_address="127.0.0.1",
        num_cpus=threads,
        object_store_memory=memory // 2,
        include_dashboard=False,
        log_to_driver=False,
    )
    rows = ray.data.read_parquet(log)
    if task == "read":
        return len(rows.groupby("date").sum("play_ms").take_all())
    if task == "partition":

        def with_part(batch):
            return batch.append_column("part", (batch["user"].to_numpy() // 7 % PARTITIONS,))

        return rows.map_batches(with_part, batch_format="pyarrow").write_parquet(output, partition_cols=["part"])
    if task == "sort":
        return rows.sort(["user", "time_ms"]).write_parquet(output)
    counts = [len(rows.unique(name)) for name in ("user", "video")]
    return [*counts, rows.groupby(["user", "video"]).count().count()]


def pyspark_task(task: str, log: str, output: str, threads: int, memory_gib: float) -> object:
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import col, pmod, xxhash64

    settings = {"spark.driver.memory": f"{int(memory_gib * 1024)}m", "spark.ui.enabled": "false"}
    settings |= {"spark.sql.shuffle.partitions": str(PARTITIONS), "spark.log.level": "ERROR"}
    settings |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    builder = SparkSession.builder.master(f"local[{threads}]")
    for name, value in settings.items():
        builder = builder.config(name, value)
    rows = builder.getOrCreate().read.parquet(log)
    if task == "read":
        return rows.groupBy("date").sum("play_ms").collect()
    if task == "partition":
        parts = rows.withColumn("part", pmod(xxhash64("user"), col("user") * 0 + PARTITIONS))
        return parts.repartition(PARTITIONS, "part").write.partitionBy("part").parquet(output)
    if task == "sort":
        return rows.sort("user", "time_ms").write.parquet(output)
    counts = [rows.select(name).distinct().count() for name in ("user", "video")]
    return [*counts, rows.select("user", "video").distinct().count()]


ENGINES = {
    "duckdb": duckdb_task,
    "polars": polars_task,
    "daft": daft_task,
    "ray": ray_task,
    "pyspark": pyspark_task,
}


def _child(engine: str, task: str, options: tuple, figures: multiprocessing.Queue) -> None:
    started = time.perf_counter()
    try:
        result = ENGINES[engine](task, *options)
    except Exception as error:  # one engine's failure is a row of the table
        figures.put({"failed": f"{type(error).__name__}: {str(error)[:200]}"})
        return
    seconds = time.perf_counter() - started
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF,)) / 2**20
    figures.put({"seconds": seconds, "peak_gib": peak, "counts": result if task == "distinct" else None})


def measure(engine: str, task: str, log: Path, folder: Path, threads: int, memory_gib: float, limit: float) -> dict:
    """Seconds, peak memory [GiB] and the counts of one task, or why it failed."""
    output = folder / f"{engine}-{task}"
    context = multiprocessing.get_context("spawn")
    figures = context.Queue()
    options = (task, (str(log), str(output), threads, memory_gib), figures)
    child = context.Process(target=_child, args=(engine, *options))
    child.start()
    peak, ended, deadline = 0.0, None, time.monotonic() + limit
    while child.is_alive() and figures.empty():
        tree = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
        held = 0
        for process in tree:
            try:
                held += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, held / 2**30)
        if peak > 4 * memory_gib or time.monotonic() > deadline:
            ended = "more than four times the memory" if peak > 4 * memory_gib else f"more than {limit:.0f} s"
            for process in tree:
                process.kill()
            break
        time.sleep(0.05)
    row = (
        {"failed": ended}
        if ended
        else figures.get(timeout=5)
        if not figures.empty() or child.exitcode == 0
        else {"failed": f"exit code {child.exitcode}"}
    )
    child.join(30)
    if len(ENGINES) and engine in ("ray", "pyspark") and "peak_gib" in row:
        row["peak_gib"] = peak  # of all its processes
    written = [path for path in output.rglob("*.parquet")] if output.is_dir() else [output] if output.exists() else []
    row["written_gb"] = sum(path.stat().st_size for path in written) / 1e9
    shutil.rmtree(output, ignore_errors=True)
    output.unlink(missing_ok=True)
    shutil.rmtree(f"{output}.spill", ignore_errors=True)
    return {"engine": engine, "task": task, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, help="folder of date=.../*.parquet that large_log.py wrote")
    parser.add_argument("--rows", type=int, default=100_000, help="of a log that is written where --log is not given")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory_gib", type=float, default=4)
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a task is ended")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.log.parent if args.log else None) as scratch:
        folder = Path(scratch)
        if args.log is None:
            from large_log import write_log

            write_log(folder, args.rows, max(2, args.rows // 100), max(2, args.rows // 500), seed=0)
            args.log = folder / "log"
        print("| engine | task | s | peak GiB | written GB | |\n|---|---|---|---|---|---|")
        for engine in args.engines:
            if importlib.util.find_spec(engine) is None:
                print(f"| {engine} | not installed | | | | |")
                continue
            for task in args.tasks:
                row = measure(engine, task, args.log, folder, args.threads, args.memory_gib, args.limit)
                rows.append(row)
                figures = [f"{row[name]:.2f}" if name in row else "" for name in ("seconds", "peak_gib", "written_gb")]
                note = row.get("failed") or row.get("counts") or ""
                print(f"| {engine} | {task} | {' | '.join(figures)} | {note} |", flush=True)
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
