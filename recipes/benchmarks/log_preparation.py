"""Seconds, memory and disk from a large raw log to the sessions that training reads.

    python recipes/benchmarks/large_log.py --rows 50_000_000 --output_dir logs/50m
    python recipes/benchmarks/log_preparation.py --log logs/50m --num_partitions 25 --json log_preparation.json

Runs the stage `data` in a process of its own. Memory is what this process and its workers hold together at most
(`peak GiB`, looked at every 0.3 s, shared pages counted for each) and the most of any one of them (`ru_maxrss`).
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import time
from pathlib import Path

import psutil

from onerec_hf.stages.data_stage import run_data
from onerec_hf.stages.recipe_arguments import RecipeArguments


def prepare(options: dict) -> None:
    run_data(RecipeArguments(**options))


def held(process: psutil.Process) -> int:
    """Bytes that a process and its children hold; pages that they share count for each."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def measure(log: Path, output_dir: Path, num_partitions: int | None, workers: int) -> dict:
    """What preparing the log took."""
    options = {"dataset": "table", "data_dir": str(log), "column_mapping": str(log / "mapping.yaml")}
    options |= {"session_cut": "gap", "session_source": "exposed", "history_items": 64, "output_dir": str(output_dir)}
    options |= {"num_partitions": num_partitions, "partition_workers": workers}
    child = multiprocessing.get_context("spawn").Process(target=prepare, args=(options,))
    started, peak = time.perf_counter(), 0
    child.start()
    process = psutil.Process(child.pid)
    while child.is_alive():
        try:
            peak = max(peak, held(process))
        except psutil.NoSuchProcess:
            break
        child.join(0.3)
    child.join()
    if child.exitcode:
        raise SystemExit(child.exitcode)
    seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    stage = json.loads((output_dir / "data" / "stage.json").read_text(encoding="utf-8"))
    disk = {
        name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
        for name, folder in (("raw_gb", log / "log"), ("prepared_gb", output_dir / "data"))
    }
    rows, sessions = (stage["dataset"][name] for name in ("num_interactions", "num_pretraining_sessions"))
    return {
        "rows": rows,
        "sessions": sessions,
        "partitions": num_partitions,
        "workers": workers,
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "cpu_us_per_row": (used.ru_utime + used.ru_stime) / rows * 1e6,
        "peak_gib": peak / 2**30,
        "max_process_gib": used.ru_maxrss / 2**20,
        **disk,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="what large_log.py wrote")
    parser.add_argument("--output_dir", type=Path, help="by default beside the log, and removed afterwards")
    parser.add_argument("--num_partitions", type=int, help="by default the log is in memory")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    output_dir = args.output_dir or args.log / "prepared"
    row = measure(args.log, output_dir, args.num_partitions, args.workers)
    figures = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()]
    print("| " + " | ".join(row) + " |\n|" + "---|" * len(row) + "\n| " + " | ".join(figures) + " |")
    if args.json:
        args.json.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    if args.output_dir is None:
        shutil.rmtree(output_dir)


if __name__ == "__main__":
    main()
