"""Stage `data`: from raw logs to the feed in the canonical schema, its split, sessions and evaluation cases.

Runs as the first step of `tokenize`. Everything that later stages fit comes from the files that it writes for the
fitted period; the evaluated users' histories reach to the evaluated one.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset

from ..data import (
    DataArguments,
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
from .previous_run import PreviousRun
from .recipe_arguments import RecipeArguments
from .stage_runner import OutsideInput, Stage, run_stage, stage_dir

FEED = "feed"
PRETRAINING_SESSIONS = "pretraining_sessions.parquet"
USER_HISTORIES = "user_histories.parquet"
EVALUATION_CASES = "evaluation_cases.parquet"


@dataclass
class PreparedData:
    """What the `data` stage wrote, read on demand."""

    folder: Path
    args: DataArguments

    @cached_property
    def feed(self) -> Feed:
        return load_saved_feed(self.folder / FEED)

    def read(self, name: str) -> Dataset:
        """One of the tables named in this module, in memory; the users' histories and the evaluated cases with what
        the reward model reads of each user as of the end of their histories, where they were exposed to anything."""
        table = pq.read_table(self.folder / name)
        if name == USER_HISTORIES:
            table = with_user_exposures(table, self._fitted_exposures)
        elif name == EVALUATION_CASES:
            table = with_user_exposures(table, self._exposures_before_evaluation)
        return Dataset(table)

    def histories_before_evaluation(self) -> Dataset:
        """The users' histories, as `read(USER_HISTORIES)`, with what is not fitted before the evaluated period."""
        if self.args.fitted_until == self.args.evaluation_split:
            return self.read(USER_HISTORIES)
        table = user_histories(self.split.history, self.feed, self.args).with_format("arrow")[:]
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
        if not PartialState().is_main_process:
            return None
        feed = load_feed(options)
        if previous is not None:
            feed = feed.with_earlier_items(load_saved_feed(previous.stage("data") / FEED).items)
        split = split_feed(feed, options)
        save_feed(feed, folder / FEED)
        tables = {
            PRETRAINING_SESSIONS: pretraining_sessions(split.fit, feed, options),
            EVALUATION_CASES: evaluation_cases(split, feed, options),
            USER_HISTORIES: user_histories(split.fit, feed, options),
        }
        for name, table in tables.items():
            table.to_parquet(folder / name)
        return {
            "dataset": {
                "name": feed.name,
                "hub_dataset": options.hub_dataset,
                "num_users": int(feed.interactions["user_id"].nunique()),
                "num_items": len(feed.items),
                "num_interactions": len(feed.interactions),
                "num_fitted_positives": int(positive_mask(split.fit, feed.positive_feedback).sum()),
                "num_pretraining_sessions": len(tables[PRETRAINING_SESSIONS]),
                "num_evaluation_users": len(tables[EVALUATION_CASES]),
                "positive_feedback": feed.positive_feedback,
                "split": split.description,
            }
        }

    outside = [OutsideInput(path) for path in source_files(options)]
    if options.hub_dataset is not None:
        outside.append(OutsideInput(options.hub_dataset, "dataset"))
    if previous is not None:
        outside += previous.input("data")
    return run_stage(Stage("data", args.output_dir, options, outside=outside), work)


def prepared_data(args: RecipeArguments, needed_by: str) -> PreparedData:
    """The `data` stage's output, which must be complete."""
    return PreparedData(stage_dir(args.output_dir, "data", needed_by), args.group(DataArguments))
