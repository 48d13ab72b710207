"""Stage `data`: from raw logs to the feed in the canonical schema, its split, sessions and evaluation cases.

Runs as the first step of `tokenize`. Everything that later stages fit comes from the files that it writes for the
fitted period; the evaluated users' histories reach to the evaluated one.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset

from ..data import (
    DataArguments,
    DataError,
    Feed,
    FeedSplit,
    evaluation_cases,
    exposure_runs,
    load_feed,
    load_saved_feed,
    positive_mask,
    pretraining_sessions,
    save_feed,
    source_files,
    split_feed,
    user_exposures,
    user_histories,
    with_user_exposures,
)
from ..data.partitioned_log import SourceLog, partition_feed
from ..data.readers import part_name, read_partitions, save_feed_tables, saved_partitions
from ..data.sessions import joined_descriptions
from ..staged_files import staged_file
from .previous_run import PreviousRun
from .recipe_arguments import RecipeArguments
from .stage_runner import OutsideInput, Stage, read_json, run_stage, stage_dir, write_json

FEED = "feed"
PRETRAINING_SESSIONS = "pretraining_sessions.parquet"
USER_HISTORIES = "user_histories.parquet"
EVALUATION_CASES = "evaluation_cases.parquet"
COUNTS = "counts"  # of each partition, written when its tables are

logger = get_logger(__name__)


@dataclass
class PreparedData:
    """What the `data` stage wrote, read on demand.

    Args:
        folder: of the stage.
        args: of the data.
        partitions: those whose users these are, of a log in partitions; by default all users.
    """

    folder: Path
    args: DataArguments
    partitions: tuple[int, ...] | None = None

    def sampled(self, interactions: int) -> "PreparedData":
        """The same of so many interactions about, by whole partitions, each of which is a random part of the users;
        of a log that is not in partitions, and of one that has not more, all of it."""
        folder = self.folder / FEED
        parts = [folder / part_name("interactions", index) for index in range(saved_partitions(folder))]
        rows = np.cumsum([pq.read_metadata(part).num_rows for part in parts])
        count = int(np.searchsorted(rows, interactions)) + 1
        if count >= len(parts):
            return self
        logger.info(
            f"{rows[count - 1]:,} of {rows[-1]:,} interactions are read, those of {count} of {len(parts)} partitions "
            "(sampled_interactions)."
        )
        return replace(self, partitions=tuple(range(count)))

    @cached_property
    def feed(self) -> Feed:
        return load_saved_feed(self.folder / FEED, self.partitions)

    def by_partition(self) -> Iterator["PreparedData"]:
        """The same of some users after others: of each partition, or of all of them where the log is in memory."""
        count = saved_partitions(self.folder / FEED)
        for index in range(count) if count else [None]:
            yield replace(self, partitions=self.partitions if index is None else (index,))

    def read(self, name: str) -> Dataset:
        """One of the tables named in this module, in memory; the users' histories and the evaluated cases with what
        the reward model reads of each user as of the end of their histories, where they were exposed to anything."""
        table = self._table(name)
        if name == USER_HISTORIES:
            table = with_user_exposures(table, self._fitted_exposures)
        elif name == EVALUATION_CASES:
            table = with_user_exposures(table, self._exposures_before_evaluation)
        return Dataset(table)

    def _table(self, name: str) -> pa.Table:
        if saved_partitions(self.folder / FEED):
            return read_partitions(self.folder, Path(name).stem, self.partitions)
        return pq.read_table(self.folder / name)

    def histories_before_evaluation(self) -> Dataset:
        """The users' histories, as `read(USER_HISTORIES)`, with what is not fitted before the evaluated period."""
        if self.args.fitted_until == self.args.evaluation_split:
            return self.read(USER_HISTORIES)
        until = self.feed.whole and self.feed.whole.latest_before.get(self.args.evaluation_split)
        table = user_histories(self.split.history, self.feed, self.args, until).with_format("arrow")[:]
        return Dataset(with_user_exposures(table, self._exposures_before_evaluation))

    @cached_property
    def split(self) -> FeedSplit:
        return split_feed(self.feed, self.args)

    @cached_property
    def fitted_feed(self) -> Feed:
        """The feed with those of its interactions that may be fitted."""
        return replace(self.feed, interactions=self.split.fit)

    @cached_property
    def _fitted_exposures(self) -> pa.Table:
        exposures = user_exposures(self.split.fit, self.feed, self.args.history_items)
        return exposures.with_format("arrow")[:].combine_chunks()

    @cached_property
    def _exposures_before_evaluation(self) -> pa.Table:
        if self.args.fitted_until == self.args.evaluation_split:
            return self._fitted_exposures
        exposures = user_exposures(self.split.history, self.feed, self.args.history_items)
        return exposures.with_format("arrow")[:].combine_chunks()

    def later_runs(self) -> Dataset:
        """Runs of exposures (see [`exposure_runs`]) of which those in the evaluated period are judged.

        There are none where the split leaves one out, as no period separates what is fitted from what is evaluated.
        """
        split, feed = self.split, self.feed
        if self.args.split_method == "leave_one_out":
            return exposure_runs(split.fit, feed, self.args).select([])
        joined = pd.concat([split.history, split.evaluation]).sort_values(["user_id", "position"], ignore_index=True)
        return exposure_runs(joined, feed, self.args, since=split.evaluation["timestamp"].min())


def run_data(args: RecipeArguments) -> Path:
    """Reads, checks, splits and cuts; returns the stage's folder."""
    options, previous = args.group(DataArguments), PreviousRun.of(args)

    def work(folder: Path) -> dict | None:
        earlier = None if previous is None else previous.stage("data") / FEED
        if options.num_partitions is not None:
            return prepare_in_partitions(options, folder, earlier)
        if not PartialState().is_main_process:
            return None
        feed = load_feed(options)
        if earlier is not None:
            feed = feed.with_earlier_items(_saved_items(earlier))
        split = split_feed(feed, options)
        save_feed(feed, folder / FEED)
        tables = _tables(feed, split, options)
        for name, table in tables.items():
            table.to_parquet(folder / name)
        return _summary(feed, options, _counts(feed, split, tables), split.description)

    outside = [OutsideInput(path) for path in source_files(options)]
    if options.hub_dataset is not None:
        outside.append(OutsideInput(options.hub_dataset, "dataset"))
    if previous is not None:
        outside += previous.input("data")
    # How many processes did the work changes nothing of what they write.
    described = replace(options, partition_workers=1)
    return run_stage(Stage("data", args.output_dir, described, outside=outside), work)


def _tables(feed: Feed, split: FeedSplit, options: DataArguments, until: float | None = None) -> dict[str, Dataset]:
    """What the stage writes beside the feed, by file; of `until` see [`user_histories`]."""
    return {
        PRETRAINING_SESSIONS: pretraining_sessions(split.fit, feed, options),
        EVALUATION_CASES: evaluation_cases(split, feed, options),
        USER_HISTORIES: user_histories(split.fit, feed, options, until),
    }


def _counts(feed: Feed, split: FeedSplit, tables: dict[str, Dataset]) -> dict[str, int]:
    return {
        "num_users": int(feed.interactions["user_id"].nunique()),
        "num_interactions": len(feed.interactions),
        "num_fitted_positives": int(positive_mask(split.fit, feed.positive_feedback).sum()),
        "num_pretraining_sessions": len(tables[PRETRAINING_SESSIONS]),
        "num_evaluation_users": len(tables[EVALUATION_CASES]),
    }


def _summary(feed: Feed, options: DataArguments, counts: dict[str, int], split: dict) -> dict:
    dataset = {"name": feed.name, "hub_dataset": options.hub_dataset, "num_users": counts["num_users"]}
    dataset |= {"num_items": len(feed.items), **counts, "positive_feedback": feed.positive_feedback, "split": split}
    return {"dataset": dataset}


def _saved_items(feed: Path) -> pd.DataFrame:
    """The items of a saved feed; of one in partitions no more than the first is read."""
    return load_saved_feed(feed, [0] if saved_partitions(feed) else None).items


def prepare_in_partitions(options: DataArguments, folder: Path, earlier: Path | None = None) -> dict | None:
    """The stage's work where the log is not in memory as a whole (see partitioned_log.py).

    Every process of a launch takes its share of each step, with `partition_workers` processes of its own. What a
    killed run has written it does not do again.

    Args:
        earlier: the saved feed whose catalogue this one's begins with.

    Raises:
        DataError: as without partitions; no session or no user to evaluate in any partition.
    """
    state = PartialState()
    with _workers(options.partition_workers) as map_indices:
        _write_feed(options, folder, map_indices)
        if state.is_main_process and earlier is not None:
            feed = load_saved_feed(folder / FEED, [0])
            save_feed_tables(feed.with_earlier_items(_saved_items(earlier)), folder / FEED)
        state.wait_for_everyone()
        _share(map_indices, partial(write_tables, options, folder), range(options.num_partitions))
        state.wait_for_everyone()
    return _joined_summary(options, folder) if state.is_main_process else None


def _write_feed(options: DataArguments, folder: Path, map_indices: Callable) -> None:
    """Writes the feed in partitions, from files that are parted or from memory."""
    state = PartialState()
    if options.dataset == "table":
        log = SourceLog(options, folder)
        if state.is_main_process:
            log.write_tables()
        _share(map, log.shuffle, range(len(log.tasks)))
        state.wait_for_everyone()
        _share(map_indices, log.write_partition, range(options.num_partitions))
        state.wait_for_everyone()
        if state.is_main_process:
            log.write_feed()
            log.remove_work()
    elif state.is_main_process and not (folder / FEED / "feed.json").exists():
        partition_feed(load_feed(options), folder / FEED, options.num_partitions)
    if state.is_main_process and options.history_timestamps:
        _note_latest(options, folder)


def _joined_summary(options: DataArguments, folder: Path) -> dict:
    parts = [read_json(folder / COUNTS / f"part-{index:05d}.json") for index in range(options.num_partitions)]
    feed = load_saved_feed(folder / FEED, [0])
    split = joined_descriptions(feed.name, [part.pop("split") for part in parts])
    counts = {name: sum(part[name] for part in parts) for name in parts[0]}
    for name, lowered in (
        ("num_pretraining_sessions", "min_session_items, min_history_items or quality_predicates, or update_since"),
        ("num_evaluation_users", "min_history_items, or move the period"),
    ):
        if not counts[name]:
            raise DataError(f"{feed.name}: {name} is 0 in all partitions together ({counts}). Lower {lowered}.")
    return _summary(feed, options, counts, split)


@contextmanager
def _workers(count: int) -> Iterator[Callable]:
    """A `map` by so many processes."""
    if count == 1:
        yield map
    else:
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool.map


def _share(map_indices: Callable, work: Callable[[int], None], indices: range) -> None:
    """Calls `work` for this process's share of the indices."""
    state = PartialState()
    for _ in map_indices(work, indices[state.process_index :: state.num_processes]):
        pass


def write_tables(options: DataArguments, folder: Path, index: int) -> None:
    """Writes the sessions, evaluation cases and histories of a partition's users, unless that is done."""
    counted = folder / COUNTS / f"part-{index:05d}.json"
    if counted.exists():
        return
    feed = load_saved_feed(folder / FEED, [index])
    split = split_feed(feed, options)
    tables = _tables(feed, split, options, feed.whole.latest_before.get(options.fitted_until))
    for name, table in tables.items():
        path = folder / part_name(Path(name).stem, index)
        path.parent.mkdir(exist_ok=True)
        with staged_file(path) as partial_file:
            table.to_parquet(partial_file)
    counted.parent.mkdir(exist_ok=True)
    write_json(counted, {**_counts(feed, split, tables), "split": split.description})


def _note_latest(options: DataArguments, folder: Path) -> None:
    """Notes in the feed the last time before each period that the histories end at."""
    feed, latest = load_saved_feed(folder / FEED, [0]), {}
    if feed.whole.latest_before:
        return
    for index in range(options.num_partitions):
        split = split_feed(load_saved_feed(folder / FEED, [index]), options)
        for period, part in ((options.fitted_until, split.fit), (options.evaluation_split, split.history)):
            latest[period] = max(latest.get(period, -np.inf), np.nan_to_num(part["timestamp"].max(), nan=-np.inf))
    latest = {period: float(time) if np.isfinite(time) else None for period, time in latest.items()}
    save_feed_tables(replace(feed, whole=replace(feed.whole, latest_before=latest)), folder / FEED)


def prepared_data(args: RecipeArguments, needed_by: str) -> PreparedData:
    """The `data` stage's output, which must be complete, as far as it is read into memory."""
    prepared = PreparedData(stage_dir(args.output_dir, "data", needed_by), args.group(DataArguments))
    return prepared.sampled(args.sampled_interactions)
