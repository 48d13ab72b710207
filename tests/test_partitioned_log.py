"""A log in partitions gives what it gives in memory, row for row; kills and several processes change nothing."""

import json
import multiprocessing
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import TrainerCallback, TrainingArguments, set_seed

from onerec_hf import OneRecTokenizer, index_sessions
from onerec_hf.data import DataArguments, DataError, exposure_runs
from onerec_hf.reward import (
    ItemTotals,
    OneRecRewardTrainer,
    create_reward_model,
    user_half,
    without_calibration_users,
)
from onerec_hf.stages import data_stage, recommend_stage
from onerec_hf.stages.data_stage import EVALUATION_CASES, PRETRAINING_SESSIONS, USER_HISTORIES, PreparedData
from onerec_hf.stages.recipe_arguments import RecommendArguments
from onerec_hf.stages.reward_stage import sharded_runs
from onerec_hf.training_checkpoints import train_from_latest

duckdb = pytest.importorskip("duckdb", reason="partitions need DuckDB")
TABLES = (PRETRAINING_SESSIONS, USER_HISTORIES, EVALUATION_CASES)
MAPPING = {
    "name": "tiny",
    "timezone": "Europe/Berlin",
    "interactions": {
        "file": "log",
        "columns": {"user_id": "user", "item_id": "video", "timestamp": "time", "session_id": "request"},
        "feedback": {
            "watch_time": {"column": "ms", "scale": 0.001},
            "like": {"column": "event", "equals": ["like", 7]},
        },
    },
    "users": {"file": "users.csv", "columns": {"user_id": "user"}, "categorical": ["country"]},
    "positive_feedback": ["like", "watch_time>=3"],
}


def log_frame(rows=600, users=23, seed=0):
    generator = np.random.default_rng(seed)
    times = 1_700_000_000_000 + np.sort(generator.integers(0, 30 * 86_400_000, rows)) // 10 * 10
    return pd.DataFrame(
        {
            "user": generator.integers(0, users, rows) * 7 + 3,
            "video": generator.integers(0, 40, rows),
            "time": times,
            "request": pd.array(np.where(generator.random(rows) < 0.8, generator.integers(0, 60, rows), -1)).astype(
                "Int64"
            ),
            "ms": generator.integers(0, 6000, rows),
            "event": generator.choice(["like", "see", "7"], rows, p=[0.3, 0.6, 0.1]),
        }
    ).replace({"request": {-1: pd.NA}})


@pytest.fixture
def remote():
    """Copies a folder to a file system that is not the local one; gives its address there."""
    memory = fsspec.filesystem("memory")

    def copied(folder: Path) -> str:
        memory.put(str(folder), "/bucket", recursive=True)
        return "memory://bucket"

    yield copied
    memory.rm("/bucket", recursive=True)


@pytest.fixture
def log(tmp_path):
    """Writes a log of several files below a folder; gives the arguments that read it."""

    def write(frame=None, ending="parquet", mapping=None, hive=False, **options):
        frame = log_frame() if frame is None else frame
        for number, start in enumerate(range(0, len(frame), 250)):
            part = frame.iloc[start : start + 250]
            folder = tmp_path / "source" / "log" / (f"day={number}" if hive else "")
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{number}.{ending}"
            if ending == "parquet":
                part.to_parquet(path)
            else:
                compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
                with pa.output_stream(path, compression=compression) as file:
                    file.write(part.to_csv(index=False).encode())
        users = frame["user"].drop_duplicates()
        countries = pd.DataFrame({"user": users, "country": [f"c{index % 3}" for index in range(len(users))]})
        countries.to_csv(tmp_path / "source" / "users.csv", index=False)
        (tmp_path / "mapping.yaml").write_text(yaml.safe_dump(mapping or MAPPING))
        options = {"data_dir": str(tmp_path / "source"), "history_items": 8, "session_items": 3, **options}
        return DataArguments(dataset="table", column_mapping=str(tmp_path / "mapping.yaml"), **options)

    return write


class Run:
    """The arguments of a run, as `run_data` takes them."""

    previous_run = None

    def __init__(self, options: DataArguments, output_dir: Path):
        self.options, self.output_dir = options, output_dir

    def group(self, _):
        return self.options


def prepared(options, folder, **changed):
    options = replace(options, **changed)
    return PreparedData(data_stage.run_data(Run(options, folder)), options)


def judged_runs(prepared: PreparedData) -> list[dict]:
    """The runs of exposures, the sessions of each numbered from 0."""
    runs = prepared.later_runs().to_list()
    for run in runs:
        numbers = {number: index for index, number in enumerate(dict.fromkeys(run["exposed_sessions"]))}
        run["exposed_sessions"] = [number if number < 0 else numbers[number] for number in run["exposed_sessions"]]
    return runs


def assert_same(first: PreparedData, second: PreparedData):
    for name in TABLES:
        assert first.read(name).to_list() == second.read(name).to_list(), name
    pd.testing.assert_frame_equal(first.feed.interactions, second.feed.interactions)
    pd.testing.assert_frame_equal(first.feed.items, second.feed.items)
    about = [json.loads((one.folder / "stage.json").read_text())["dataset"] for one in (first, second)]
    assert about[0] == about[1]


@pytest.mark.parametrize(
    "options",
    [
        {"session_cut": "consecutive", "session_stride": 1, "history_feedback": ["like"]},
        {"session_cut": "gap", "history_timestamps": True, "fit_validation": False},
        {"session_cut": "user_day", "session_source": "exposed", "user_features": ["country"]},
        {"session_cut": "session_id", "repeated_positives": "first", "quality_predicates": ["watch_time>=4"]},
        {"split_method": "leave_one_out", "history_timestamps": True},
    ],
    ids=lambda options: next(iter(options.values())),
)
@pytest.mark.filterwarnings("ignore:leave-one-out")
def test_the_partitions_together_are_the_log_in_memory(log, tmp_path, options):
    args = log(**options)
    whole, parts = prepared(args, tmp_path / "a"), prepared(args, tmp_path / "b", num_partitions=4)
    assert_same(whole, parts)
    for name in TABLES:
        files = sorted((parts.folder / Path(name).stem).iterdir())
        assert [file.name for file in files] == [f"part-{index:05d}.parquet" for index in range(4)]
        assert len({str(pq.read_schema(file).remove_metadata()) for file in files}) == 1
    # One after the other they have the same rows, with what the reward model reads, and no user is in two of them.
    rows = [row for part in parts.by_partition() for row in part.read(USER_HISTORIES).to_list()]
    assert sorted(rows, key=lambda row: row["user_id"]) == whole.read(USER_HISTORIES).to_list()
    before = [row for part in parts.by_partition() for row in part.histories_before_evaluation().to_list()]
    assert sorted(before, key=lambda row: row["user_id"]) == whole.histories_before_evaluation().to_list()
    runs = [run for part in parts.by_partition() for run in judged_runs(part)]
    assert sorted(runs, key=lambda run: run["user_id"]) == judged_runs(whole)
    assert len(list(whole.by_partition())) == 1


def test_a_sample_is_what_the_whole_log_says_of_some_users(log, tmp_path):
    args = log(session_cut="gap", history_timestamps=True, fit_validation=False)
    whole = prepared(args, tmp_path / "b", num_partitions=4)
    rows = [len(part.feed.interactions) for part in whole.by_partition()]
    sample = whole.sampled(rows[0] + 1)
    users = set(sample.feed.interactions["user_id"])
    assert sample.partitions == (0, 1) and len(sample.feed.interactions) == rows[0] + rows[1] and len(users) < 23
    for name in TABLES:
        of_users = [row for row in whole.read(name).to_list() if row["user_id"] in users]
        assert of_users and sample.read(name).to_list() == of_users
    assert judged_runs(sample) == [run for run in judged_runs(whole) if run["user_id"] in users]
    before = [row for row in whole.histories_before_evaluation().to_list() if row["user_id"] in users]
    assert sample.histories_before_evaluation().to_list() == before
    assert sample.feed.items.equals(whole.feed.items)  # the catalogue is whole
    assert whole.sampled(sum(rows)) is whole and whole.sampled(1).partitions == (0,)


def test_reward_models_are_trained_on_the_runs_of_all_partitions(log, tmp_path):
    data = prepared(log(session_cut="gap", history_feedback=["like"]), tmp_path, num_partitions=4)
    items = data.feed.items["item_id"].tolist()
    codes = [[index // 8, index % 8] for index in range(len(items))]
    tokenizer = OneRecTokenizer.from_semantic_ids(items, codes, codebook_sizes=[8, 8])
    feed = data.fitted_feed
    runs = index_sessions(exposure_runs(feed.interactions, feed, data.args), tokenizer)
    runs, _ = without_calibration_users(runs.select(np.flatnonzero(user_half(runs["user_id"][:], 5) == 1)), seed=6)
    rows = sharded_runs(data.sampled(1), tokenizer, half=1, half_seed=5, seed=6)
    found = [rows[number] for number in range(len(rows))]
    assert rows.stream.num_shards == 4 and len(runs) > 4

    def exposed(rows) -> list:
        return sorted(
            (row["user_id"], row["exposed_timestamps"], row["exposed"], row["feedback_totals"]) for row in rows
        )

    assert exposed(found) == exposed(runs)

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    def train(name: str, rows, stop: TrainerCallback | None = None):
        sizes = {"hidden_size": 8, "tower_hidden_size": 8, "history_items": 8, "session_items": 3}
        sizes["objectives"] = [{"name": "ltr", "source": "like", "kind": "binary", "weight": 1.0}]
        set_seed(0)
        model = create_reward_model(sizes, feed, tokenizer)
        options = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "save_steps": 3, "report_to": "none"}
        args = TrainingArguments(str(tmp_path / name), save_strategy="steps", use_cpu=True, **options)
        totals = ItemTotals.of_feed(feed, tokenizer)
        callbacks = [stop] if stop else []
        trainer = OneRecRewardTrainer(model, args, rows, tokenizer, totals, callbacks=callbacks)
        train_from_latest(trainer)
        return trainer.state.global_step, model.state_dict()

    for way, data in {"shards": rows, "memory": runs}.items():
        steps, once = train(f"{way}, once", data)
        assert steps == 3 * -(-len(runs) // 2) and train(way, data, Stop())[0] == 3
        for name, tensor in train(way, data)[1].items():
            assert torch.equal(tensor, once[name]), (way, name)


def test_users_are_recommended_to_partition_by_partition(log, tmp_path, monkeypatch):
    data = prepared(log(session_cut="gap"), tmp_path, num_partitions=4)
    sample = data.sampled(1)
    monkeypatch.setattr(recommend_stage, "prepared_data", lambda *_: sample)
    options = RecommendArguments()
    histories = recommend_stage.Histories(None, options)
    parts = [part for part in histories.parts()]
    cases = data.read(EVALUATION_CASES).to_list()
    assert len(parts) >= 3 and histories.num_users == len(cases) == sum(map(len, parts))
    found = sorted((row for part in parts for row in part.to_pylist()), key=lambda row: row["user_id"])
    assert found == [{name: row[name] for name in found[0]} for row in cases]
    some = recommend_stage.Histories(None, replace(options, evaluation_users=2))
    assert some.num_users == 2 and sum(map(len, some.parts())) == 2


@pytest.mark.parametrize("num_partitions", [1, 26])
def test_few_and_empty_partitions(log, tmp_path, num_partitions):
    args = log(session_cut="gap")
    assert_same(prepared(args, tmp_path / "a"), prepared(args, tmp_path / "b", num_partitions=num_partitions))


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "csv.zst"])
def test_csv_files_have_the_types_that_all_of_them_say(log, remote, tmp_path, ending):
    frame = log_frame().astype({"user": "str"})
    frame.loc[len(frame) - 1, "user"] = "007"  # one user whose id is no integer, in the last file
    args = log(frame, ending, session_cut="session_id")
    frame[:0].to_csv(tmp_path / "source" / "log" / "[1] no 'rows'.csv", index=False)
    near = prepared(args, tmp_path / "a")
    assert_same(near, prepared(args, tmp_path / "b", num_partitions=5))
    (tmp_path / "source" / "log" / "[1] no 'rows'.csv").unlink()  # a pattern to a file system that has protocols
    assert_same(near, prepared(args, tmp_path / "c", num_partitions=3, data_dir=remote(tmp_path / "source")))


def test_folders_are_columns_and_protocols_are_read(log, remote, tmp_path):
    mapping = {**MAPPING, "interactions": {**MAPPING["interactions"], "file": "log", "timestamp_unit": "ms"}}
    mapping["interactions"]["feedback"] = {**mapping["interactions"]["feedback"], "day": "day"}
    args = log(hive=True, mapping=mapping)
    near = prepared(args, tmp_path / "a", num_partitions=3)
    assert near.feed.interactions["day"].value_counts().to_dict() == {0.0: 250, 1.0: 250, 2.0: 100}
    assert_same(near, prepared(args, tmp_path / "b", num_partitions=3, data_dir=remote(tmp_path / "source")))


def test_data_that_is_read_in_memory_is_parted_too(tmp_path):
    args = DataArguments(simulated_users=40, simulated_items=200, session_cut="session_id", history_items=8)
    assert_same(prepared(args, tmp_path / "a"), prepared(args, tmp_path / "b", num_partitions=3))


def bytes_of(folder: Path) -> dict:
    parts = [path for path in sorted(folder.rglob("part-*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in parts}


def worker(args, folder, index, kill_after):
    """A process of two; one that is to be killed dies in the midst of its work, between two files."""
    renamed = iter(range(10**6))

    class State:
        process_index, num_processes = index, 2
        is_main_process = index == 0

        def wait_for_everyone(self):
            barrier.wait(60)

    replaced = os.replace

    def killed(*paths):
        if next(renamed) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        replaced(*paths)

    barrier, data_stage.PartialState = args.barrier, State
    os.replace = killed
    data_stage.prepare_in_partitions(args.options, folder)


@pytest.mark.parametrize("kill_after", [1, 6])
def test_two_processes_of_which_one_is_killed_write_the_same_bytes(log, tmp_path, kill_after):
    args = replace(log(session_cut="gap", history_timestamps=True), num_partitions=5)
    one = prepared(args, tmp_path / "one").folder
    context, folder = multiprocessing.get_context("fork"), tmp_path / "two"
    folder.mkdir()
    for kills in ({1: kill_after}, {}):
        shared = Run(args, folder)
        shared.barrier = context.Barrier(2)
        processes = [
            context.Process(target=worker, args=(shared, folder, index, kills.get(index))) for index in range(2)
        ]
        for process in processes:
            process.start()
        processes[1].join(60)
        if kills:
            assert processes[1].exitcode == -signal.SIGKILL
            processes[0].kill()  # as a launcher does
        processes[0].join(60)
        if not kills:
            assert [process.exitcode for process in processes] == [0, 0]
    assert bytes_of(folder) == bytes_of(one)


def test_finished_partitions_are_not_done_again(log, tmp_path, monkeypatch):
    args = log(num_partitions=4, session_cut="gap")
    written = data_stage.write_tables

    def interrupted(options, folder, index):
        if index == 2:
            raise RuntimeError("stopped")
        written(options, folder, index)

    monkeypatch.setattr(data_stage, "write_tables", interrupted)
    with pytest.raises(RuntimeError, match="stopped"):
        prepared(args, tmp_path)
    files = [path for path in (tmp_path / "data.partial").rglob("part-*.parquet")]
    before = {path.relative_to(tmp_path / "data.partial"): path.stat().st_mtime_ns for path in files}
    assert len(before) == 4 + 2 * 3
    monkeypatch.setattr(data_stage, "write_tables", written)
    folder = prepared(args, tmp_path).folder
    assert {path: (folder / path).stat().st_mtime_ns for path in before} == before


def test_default_periods_are_the_quantiles_of_all_times(tmp_path, monkeypatch):
    from onerec_hf.data import partitioned_log

    monkeypatch.setattr(partitioned_log, "SMALL_COUNT", 10)
    generator = np.random.default_rng(0)
    for times in (
        generator.random(1001) * 1e9,
        np.full(50, 5.0),
        generator.integers(0, 9, 400) * 1e5,
        [0.0] * 99 + [9e8],
    ):
        values = pd.Series(times, dtype="float64")
        with partitioned_log.engine(tmp_path) as connection:
            connection.register("values_table", pd.DataFrame({"t": values}))
            shares, extent = (0.8, 0.9, 0.0, 1.0, 0.123), (values.min(), values.max(), len(values))
            extent = tuple(one.item() if hasattr(one, "item") else one for one in extent)
            found = partitioned_log.quantiles(connection, "values_table", extent, {str(q): q for q in shares})
            assert found == {str(q): values.quantile(q) for q in shares}


@pytest.mark.parametrize(
    "change, ending, message",
    [
        (lambda frame: frame.assign(ms=frame["ms"].where(frame.index != 255, -1)), "parquet", "row 5 of .*1.parquet"),
        (lambda frame: frame.assign(ms=frame["ms"].where(frame.index != 255, -1)), "csv", "row 5 of .*1.csv"),
        (lambda frame: frame.assign(time=frame["time"].astype("str") + "x"), "csv", "timestamp_unit"),
        (lambda frame: frame.assign(video=frame["video"] * 1.0), "parquet", "type DOUBLE.*64-bit"),
        (lambda frame: frame.assign(event=1.0), "parquet", "'event' of 'equals'"),
        (lambda frame: frame.drop(columns="ms"), "parquet", "ms"),
        (lambda frame: frame.assign(user=1), "parquet", "one user only"),
        (lambda frame: frame, "jsonl", "Convert the file to Parquet"),
    ],
)
def test_what_cannot_be_read_is_named(log, tmp_path, change, ending, message):
    with pytest.raises(DataError, match=message):
        prepared(log(change(log_frame()), ending, num_partitions=3), tmp_path)


def test_what_is_to_be_installed_is_said(log, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(ImportError, match=r"pip install 'onerec_hf\[large\]'"):
        prepared(log(num_partitions=3), tmp_path)


def test_an_unlisted_item_is_named_with_its_row(log, tmp_path):
    args = log(mapping={**MAPPING, "items": {"file": "items.csv", "columns": {"item_id": "video"}}}, num_partitions=3)
    frame = log_frame()
    listed = frame["video"].drop_duplicates()
    missing = listed.iloc[-1]
    listed[listed != missing].to_csv(tmp_path / "source" / "items.csv", index=False)
    place = frame.index[frame["video"] == missing][0]
    with pytest.raises(DataError, match=rf"{place // 250}.parquet.*first at row {place % 250} .*{missing}"):
        prepared(args, tmp_path)


def test_the_benchmark_of_engines_in_little(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "recipes" / "benchmarks")
    import data_engines
    import large_log

    large_log.write_log(tmp_path / "a", 3000, 30, 20, seed=1)
    large_log.write_log(tmp_path / "b", 3000, 30, 20, seed=1)
    frames = [pd.read_parquet(tmp_path / name / "log") for name in "ab"]
    pd.testing.assert_frame_equal(*frames)
    assert len(frames[0]) == 3000 and frames[0]["time_ms"].is_monotonic_increasing
    row = data_engines.measure("duckdb", "distinct", tmp_path / "a" / "log", tmp_path, 1, 1.0, 60)
    pairs = len(frames[0][["user", "video"]].drop_duplicates())
    assert row["counts"] == [frames[0]["user"].nunique(), frames[0]["video"].nunique(), pairs]
