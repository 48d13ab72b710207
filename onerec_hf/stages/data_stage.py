"""Stage `data`: from raw logs to the feed in the canonical schema, its split, sessions and evaluation cases.

Runs as the first step of `tokenize`. Everything that later stages fit comes from the files that it writes for the
period before the evaluated one.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset

from ..data import (
    DataArguments,
    Feed,
    FeedSplit,
    evaluation_cases,
    exposure_sessions,
    load_feed,
    load_saved_feed,
    positive_mask,
    pretraining_sessions,
    save_feed,
    split_feed,
    user_histories,
)
from .recipe_arguments import RecipeArguments
from .stage_runner import run_stage, stage_dir

PRETRAINING_SESSIONS = "pretraining_sessions.parquet"
REWARD_SESSIONS = "reward_sessions.parquet"
LATER_REWARD_SESSIONS = "later_reward_sessions.parquet"
USER_HISTORIES = "user_histories.parquet"
EVALUATION_CASES = "evaluation_cases.parquet"


@dataclass
class PreparedData:
    """What the `data` stage wrote, read on demand."""

    folder: Path

    def feed(self) -> Feed:
        return load_saved_feed(self.folder / "feed")

    def read(self, name: str) -> Dataset:
        """One of the tables named in this module, in memory."""
        return Dataset(pq.read_table(self.folder / name))


def prepare_data(args: RecipeArguments) -> Path:
    """Reads, checks, splits and cuts; returns the stage's folder."""

    def work(folder: Path) -> dict | None:
        if not PartialState().is_main_process:
            return None
        feed = load_feed(args.data)
        split = split_feed(feed, args.data)
        save_feed(feed, folder / "feed")
        # The reward model learns from every exposure once, good and bad, and reads items alone.
        no_features = {"history_feedback": None, "history_timestamps": False, "user_features": None}
        exposed = replace(args.data, quality_predicates=None, session_stride=None, **no_features)
        tables = {
            PRETRAINING_SESSIONS: pretraining_sessions(split.fit, feed, args.data),
            REWARD_SESSIONS: exposure_sessions(split.fit, feed, exposed),
            LATER_REWARD_SESSIONS: _later_sessions(split, feed, exposed),
            EVALUATION_CASES: evaluation_cases(split, feed, args.data),
            USER_HISTORIES: user_histories(split.fit, feed, args.data),
        }
        for name, table in tables.items():
            table.to_parquet(folder / name)
        return {
            "dataset": {
                "name": feed.name,
                "hub_dataset": args.data.hub_dataset,
                "num_users": int(feed.interactions["user_id"].nunique()),
                "num_items": len(feed.items),
                "num_interactions": len(feed.interactions),
                "num_fitted_positives": int(positive_mask(split.fit, feed.positive_feedback).sum()),
                "num_pretraining_sessions": len(tables[PRETRAINING_SESSIONS]),
                "num_reward_sessions": len(tables[REWARD_SESSIONS]),
                "num_evaluation_users": len(tables[EVALUATION_CASES]),
                "positive_feedback": feed.positive_feedback,
                "split": split.description,
            }
        }

    return run_stage("data", args.output_dir, args.settings("data"), [], work)


def _later_sessions(split: FeedSplit, feed: Feed, args: DataArguments) -> Dataset:
    """Exposed sessions that begin in the evaluated period, with the whole history before them.

    There are none where the split leaves one out, as no period separates what is fitted from what is evaluated.
    """
    if args.split_method == "leave_one_out":
        return exposure_sessions(split.fit, feed, args).select([])
    joined = pd.concat([split.fit, split.evaluation]).sort_values(["user_id", "position"], ignore_index=True)
    sessions = exposure_sessions(joined, feed, args)
    starts = np.asarray(sessions["timestamp"][:], dtype=float)
    return sessions.select(np.flatnonzero(starts >= split.evaluation["timestamp"].min()))


def prepared_data(args: RecipeArguments, needed_by: str) -> PreparedData:
    """The `data` stage's output, which must be complete."""
    return PreparedData(stage_dir(args.output_dir, "data", needed_by))
