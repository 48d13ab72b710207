"""What users were exposed to and how they answered: the reward model's inputs and training examples.

Feedback is kept as it is in the log. What is counted of it are signals in [0, 1]: the watched share of the duration
and every other feedback column, cut off at 1. All totals are of strictly earlier exposures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset

from .data_arguments import DataArguments
from .feed import Feed
from .schema import SECONDS_COLUMNS, feedback_columns
from .sessions import (
    arrow_dataset,
    id_array,
    list_array,
    session_groups,
    trained_on,
    user_categories,
    user_codes,
)

WATCHED = "watched"
# Exposures of a run that are judged: as many as most users of a sparse log have; more would pad a batch's other rows.
TARGETS_PER_RUN = 16


def signal_names(columns: Sequence[str]) -> list[str]:
    """Names of the signals that feedback columns give."""
    watched = [WATCHED] if set(SECONDS_COLUMNS) <= set(columns) else []
    return watched + [column for column in columns if column not in SECONDS_COLUMNS]


def feedback_signals(feedback: np.ndarray, columns: Sequence[str]) -> np.ndarray:
    """Signals (..., S) in [0, 1] of feedback (..., F) in the order of `columns`; NaN where unknown."""
    place = {column: index for index, column in enumerate(columns)}
    signals = []
    for name in signal_names(columns):
        if name == WATCHED:
            watched, duration = (feedback[..., place[column]] for column in SECONDS_COLUMNS)
            with np.errstate(invalid="ignore", divide="ignore"):
                signals.append(np.where(duration > 0, np.minimum(watched, duration) / duration, np.nan))
        else:
            signals.append(np.clip(feedback[..., place[name]], 0, 1))
    return np.stack(signals, -1) if signals else np.zeros((*feedback.shape[:-1], 0))


class _Exposures:
    """Rows of canonical interactions as Arrow columns of slices; `feed` has the table of users."""

    def __init__(self, interactions: pd.DataFrame, feed: Feed):
        self.feed = feed
        self.users = user_codes(interactions)
        self.first = np.flatnonzero(np.diff(self.users, prepend=-1))
        self.user_ids = interactions["user_id"]
        self.items = id_array(interactions["item_id"])
        self.times = interactions["timestamp"].to_numpy(dtype=np.float64)
        columns = feedback_columns(interactions)
        self.feedback = interactions[columns].to_numpy(dtype=np.float32)
        signals = feedback_signals(self.feedback.astype(np.float64), columns)
        counted = np.concatenate([np.nan_to_num(signals), ~np.isnan(signals)], axis=1)
        self.totals = np.concatenate([np.zeros((1, counted.shape[1])), np.cumsum(counted, axis=0)])

    def columns(self, starts: np.ndarray, ends: np.ndarray) -> dict[str, pa.Array]:
        """What is known of the user after rows `starts` to `ends` (see schema.py); a slice is not empty."""
        width = self.feedback.shape[1]
        before = self.totals[starts] - self.totals[self.first[self.users[starts]]]
        users = self.user_ids.iloc[starts]
        columns = {"user_id": id_array(users), "exposed_item_ids": list_array(self.items, starts, ends - starts)}
        if width:
            # One exposure after the other: nested lists take several times as long to read.
            flat, totals = pa.array(self.feedback.ravel()), pa.array(before.astype(np.float32).ravel())
            columns["exposed_feedback"] = list_array(flat, starts * width, (ends - starts) * width)
            columns["feedback_totals"] = pa.FixedSizeListArray.from_arrays(totals, before.shape[1])
        if self.feed.users is not None and len(self.feed.users.columns) > 1:
            columns["user_profile"] = user_categories(self.feed.users, users, self.feed.users.columns[1:])
        return columns


def user_exposures(interactions: pd.DataFrame, feed: Feed, history_items: int) -> Dataset:
    """The latest `history_items` exposures of each user and what else the reward model reads of a user.

    Returns:
        Dataset of user_id and the reward features (see schema.py), a row for each user.
    """
    exposures = _Exposures(interactions, feed)
    ends = np.r_[exposures.first[1:], len(interactions)][: len(exposures.first)]
    return arrow_dataset(exposures.columns(np.maximum(exposures.first, ends - history_items), ends))


def with_user_exposures(table: pa.Table, exposures: pa.Table) -> pa.Table:
    """A table of users with the columns of [`user_exposures`], null for a user who was exposed to nothing."""
    found = pd.Index(exposures["user_id"].to_pandas()).get_indexer(table["user_id"].to_pandas())
    joined = exposures.take(pa.array(found, mask=found < 0))
    for column in joined.column_names:
        if column != "user_id":
            table = table.append_column(column, joined[column])
    return table


def exposure_runs(interactions: pd.DataFrame, feed: Feed, args: DataArguments, since: float | None = None) -> Dataset:
    """Runs of a user's consecutive exposures, the later of which are cut into sessions that the reward model judges.

    Every exposure with a time (every one at all, where the data has no times) is in one run as one to be judged, with
    the `args.history_items` exposures before the run's first as its context.

    Args:
        since: Unix time [s] before which nothing is to be judged. By default the runs are to be trained on, of an
            update those of [`trained_on`].

    Returns:
        Dataset of the reward features (see schema.py) over the run, `exposed_timestamps` [s] and `exposed_sessions`:
        for each exposure the number of its session, -1 where it is context. It is the request that showed it, if the
        log has a `session_id`, and otherwise what `args.session_cut` says.
    """
    exposures = _Exposures(interactions, feed)
    known = ~np.isnan(exposures.times)
    judged = known if (known.any() if feed.whole is None else feed.whole.is_timed) else ~known
    if since is not None:
        judged = judged & (exposures.times >= since)
    rows = np.flatnonzero(judged)
    users = exposures.users[rows]
    opens = (np.arange(len(rows)) - np.searchsorted(users, users)) % TARGETS_PER_RUN == 0
    first = rows[opens]
    last = rows[np.r_[np.flatnonzero(opens)[1:], len(rows)] - 1] if len(rows) else rows
    if since is None:
        chosen = trained_on(exposures.times[last], args, feed.timezone)
        first, last = first[chosen], last[chosen]
    starts, ends = np.maximum(first - args.history_items, exposures.first[exposures.users[first]]), last + 1
    if "session_id" in interactions:
        named = interactions["session_id"].notna().any() if feed.whole is None else feed.whole.has_session_ids
        args = replace(args, session_cut="session_id") if named else args
    groups, _ = session_groups(interactions, feed, args)
    columns = exposures.columns(starts, ends)
    columns["exposed_timestamps"] = list_array(pa.array(exposures.times), starts, ends - starts)
    lists = list_array(pa.array(np.arange(len(judged))), starts, ends - starts)
    rows = lists.flatten().to_numpy()
    # Context may hold exposures that the run before judges.
    own = judged[rows] & (rows >= np.repeat(first, ends - starts))
    columns["exposed_sessions"] = pa.ListArray.from_arrays(lists.offsets, pa.array(np.where(own, groups[rows], -1)))
    return arrow_dataset(columns)
