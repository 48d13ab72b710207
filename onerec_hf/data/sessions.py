"""From a feed to training examples: split, histories, sessions, evaluation cases (paper, 3.1 and 3.2).

A history holds the positive behaviours strictly before the session's first behaviour. A session is cut from the
positive behaviours or from all exposures; what is cut from them is never looked at when the history is made.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features
from datasets.table import InMemoryTable

from .data_arguments import DataArguments
from .feed import Feed, FeedbackPredicate, positive_mask
from .schema import DataError, feedback_columns, id_type

DEFAULT_QUANTILES = {"validation": 0.8, "test": 0.9}
# A user with fewer positive behaviours has no history left once the test and the validation item are taken away.
LEAVE_ONE_OUT_MIN_POSITIVES = 3


@dataclass
class FeedSplit:
    """The parts of a feed.

    Args:
        fit: interactions that may be fitted.
        history: all before the evaluated period, which an evaluated user's history may hold: those of `fit`, and the
            validation period's where it is not fitted and test is evaluated.
        evaluation: those of the evaluated period.
        description: how they were parted, for the record.
    """

    fit: pd.DataFrame
    history: pd.DataFrame
    evaluation: pd.DataFrame
    description: dict


def split_feed(feed: Feed, args: DataArguments) -> FeedSplit:
    """Parts the feed into what may be fitted and what is evaluated.

    Of a feed that is a part of a log, the parts may be empty, and the description is of this part (see
    [`joined_descriptions`]).

    By time: everything before the evaluated period is fitted; behaviours without a time count as before those that
    follow them. Leave-one-out: each user's last (test) or last but one (validation) positive behaviour is evaluated,
    all rows before it are fitted, and users with fewer than 3 positive behaviours are only fitted. Where
    `args.fitted_until` is validation and test is evaluated, only what is before the validation period, or before a
    user's last but one positive behaviour, is fitted.

    Raises:
        DataError: no times in the data, periods in the wrong order, an empty part.
    """
    split = _leave_one_out if args.split_method == "leave_one_out" else _split_by_time
    fit, history, evaluation, description = split(feed, args)
    periods = {"evaluation_split": args.evaluation_split, "fitted_until": args.fitted_until}
    description = {"method": args.split_method, **periods, **description}
    for name, part in (("fit", fit), ("evaluation", evaluation)):
        description |= {f"{name}_interactions": len(part), f"{name}_users": int(part["user_id"].nunique())}
    if feed.whole is None:
        _require_parts(feed.name, description)
    parts = (fit, history, evaluation)
    return FeedSplit(*(part.reset_index(drop=True) for part in parts), description)


def _require_parts(name: str, description: dict) -> None:
    for part, where in (("fit", "to fit"), ("evaluation", "in the evaluated period")):
        if not description[f"{part}_interactions"]:
            raise DataError(
                f"{name}: no interactions {where} ({description}). Move validation_start and test_start into the "
                "time that the data covers."
            )


def joined_descriptions(name: str, descriptions: Sequence[dict]) -> dict:
    """The description of a log's split, from those of its parts.

    Raises:
        DataError: an empty part.
    """
    joined = dict(descriptions[0])
    for count in [key for key in joined if key.endswith(("_interactions", "_users"))]:
        joined[count] = sum(description[count] for description in descriptions)
    if "latest_fitted" in joined:
        latest = [description["latest_fitted"] for description in descriptions]
        joined["latest_fitted"] = max(filter(None, latest), key=datetime.datetime.fromisoformat, default=None)
    _require_parts(name, joined)
    return joined


def _split_by_time(feed: Feed, args: DataArguments):
    known = feed.interactions["timestamp"].dropna()
    if not feed.whole.is_timed if feed.whole else known.empty:
        raise DataError(
            f"{feed.name}: column 'timestamp' is empty, so there is no split by time. Map the column that holds the "
            "time, or use split_method: leave_one_out."
        )
    starts = {}
    for name, text in (("validation", args.validation_start), ("test", args.test_start)):
        if text is not None:
            starts[name] = _timestamp(text, feed.timezone)
        elif feed.whole is not None:
            starts[name] = feed.whole.quantiles[name]
        else:
            starts[name] = float(known.quantile(DEFAULT_QUANTILES[name]))
    # When each row has surely happened: never falls within a user, -inf before the first known time.
    time = feed.interactions["timestamp"].fillna(-np.inf).groupby(user_codes(feed.interactions)).cummax().to_numpy()
    start, end = starts[args.evaluation_split], np.inf
    if args.evaluation_split == "validation":
        end = starts["test"]
    if args.fitted_until == "validation" and starts["validation"] >= starts["test"]:
        raise DataError(
            f"{feed.name}: the validation period starts at {_iso(starts['validation'], feed)}, not before the test "
            f"period, {_iso(starts['test'], feed)}. Give validation_start and test_start in that order."
        )
    fit, history = (feed.interactions[time < before] for before in (starts[args.fitted_until], start))
    evaluation = feed.interactions[(time >= start) & (time < end)]
    latest = fit["timestamp"].max()
    first, last = (known.min(), known.max()) if feed.whole is None else (feed.whole.first_time, feed.whole.last_time)
    description = {
        "evaluation_start": _iso(start, feed),
        "evaluation_end": _iso(end, feed) if np.isfinite(end) else None,
        "latest_fitted": None if pd.isna(latest) else _iso(latest, feed),
        "data_start": _iso(first, feed),
        "data_end": _iso(last, feed),
    }
    return fit, history, evaluation, description


def _timestamp(text: str, timezone: str) -> float:
    moment = datetime.datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=ZoneInfo(timezone))
    return moment.timestamp()


def _iso(timestamp: float, feed: Feed) -> str:
    return datetime.datetime.fromtimestamp(timestamp, ZoneInfo(feed.timezone)).isoformat(timespec="seconds")


def _leave_one_out(feed: Feed, args: DataArguments):
    warnings.warn(
        "leave-one-out leaks the future: what other users did after a user's held-out item is fitted. Its figures "
        "compare with published ones only; split_method: time says how well a running service would do.",
        stacklevel=3,
    )
    interactions = feed.interactions
    users = user_codes(interactions)
    positive = positive_mask(interactions, feed.positive_feedback)
    later = pd.Series(positive[::-1].astype(np.int64)).groupby(users[::-1]).cumsum().to_numpy()[::-1]
    later = later - positive  # positive behaviours of the user after this row
    held_out = {"test": 0, "validation": 1}
    left_out = np.bincount(users, positive)[users] >= LEAVE_ONE_OUT_MIN_POSITIVES
    evaluated = left_out & positive & (later == held_out[args.evaluation_split])
    periods = args.fitted_until, args.evaluation_split
    fit, history = (interactions[~left_out | (later > held_out[period])] for period in periods)
    return fit, history, interactions[evaluated], {"leaks_future": True}


def user_codes(interactions: pd.DataFrame) -> np.ndarray:
    """0, 1, 2, ... by runs of the same user; interactions are sorted by user."""
    ids = interactions["user_id"].to_numpy()
    changes = np.zeros(len(ids), dtype=np.int64)
    changes[1:] = ids[1:] != ids[:-1]
    return np.cumsum(changes)


class _Histories:
    """Positive behaviours of `fit`, user after user, of which histories are slices [start : start + length].

    Attributes:
        positive: int64 (P,), rows of `fit`.
        users, starts, lengths: (U,), id and slice of each user that has any.
    """

    def __init__(self, fit: pd.DataFrame, feed: Feed, args: DataArguments):
        self.fit, self.feed, self.args = fit, feed, args
        self.positive = np.flatnonzero(positive_mask(fit, feed.positive_feedback))
        self.starts = np.flatnonzero(np.diff(user_codes(fit)[self.positive], prepend=-1))
        self.lengths = np.diff(np.r_[self.starts, len(self.positive)])
        self.users = fit["user_id"].iloc[self.positive[self.starts]]

    def columns(self, starts: np.ndarray, lengths: np.ndarray, users: pd.Series) -> dict[str, pa.Array]:
        """`history_item_ids` of the slices, and the features that are asked for of them and of `users`."""
        args, rows = self.args, self.fit.iloc[self.positive]
        columns = {"history_item_ids": list_array(id_array(rows["item_id"]), starts, lengths)}
        if args.history_feedback:
            predicates = [FeedbackPredicate.parse(text, feedback_columns(rows)) for text in args.history_feedback]
            values = [rows[predicate.column].to_numpy() for predicate in predicates]
            held = np.stack([predicate.holds(column) for predicate, column in zip(predicates, values, strict=True)], 1)
            flat = pa.array(held.astype(np.int8).ravel(), mask=np.isnan(np.stack(values, 1)).ravel())
            behaviours = pa.FixedSizeListArray.from_arrays(flat, len(predicates))
            columns["history_feedback"] = list_array(behaviours, starts, lengths)
        if args.history_timestamps:
            columns["history_timestamps"] = list_array(pa.array(rows["timestamp"]), starts, lengths)
        known = [] if self.feed.users is None else list(self.feed.users.columns[1:])
        for name in args.user_features or []:
            if name not in known:
                raise DataError(
                    f"user_features: {self.feed.name} has no user column '{name}'; there are "
                    f"{', '.join(known) or 'none'}. Map a table of users that has it, or leave it out."
                )
        if args.user_features:
            columns["user_features"] = user_categories(self.feed.users, users, args.user_features)
        return columns


def user_histories(fit: pd.DataFrame, feed: Feed, args: DataArguments, until: float | None = None) -> Dataset:
    """All positive behaviours of each user that has any, as of the end of `fit`.

    Args:
        until: Unix time [s] of that end, by default the last time in `fit`, which may be a part of a log.

    Returns:
        Dataset of user_id, history_item_ids (not truncated) and the features of histories (see schema.py).
    """
    histories = _Histories(fit, feed, args)
    columns = {"user_id": id_array(histories.users)}
    columns |= histories.columns(histories.starts, histories.lengths, histories.users)
    if args.history_timestamps:
        until = fit["timestamp"].max() if until is None else until
        columns["timestamp"] = pa.array(np.full(len(histories.users), until))
    return arrow_dataset(columns)


def pretraining_sessions(fit: pd.DataFrame, feed: Feed, args: DataArguments) -> Dataset:
    """Sessions to be generated, with their histories (see schema.py).

    `args.session_source` says whether they are cut from positive behaviours or from all exposures; of an update see
    [`trained_on`].

    Raises:
        DataError: no session is left, which of a part of a log may be, or a cut or predicate needs a column that is
            missing.
    """
    histories = _Histories(fit, feed, args)
    positive = histories.positive
    rows = positive if args.session_source == "positive" else np.arange(len(fit))
    users = user_codes(fit)
    user_start = np.searchsorted(positive, np.searchsorted(users, np.arange(users[-1] + 1 if len(users) else 0)))

    groups, timed = session_groups(fit, feed, args)
    if len(rows):
        # Windows of consecutive behaviours begin where the history is long enough, not before.
        enough = np.searchsorted(positive, rows) - user_start[users[rows]] >= args.min_history_items
        rows = rows[timed[rows] | enough]
    members, lengths = _cut(rows, groups, timed, args)
    first = members[:, 0]
    history_end = np.searchsorted(positive, first)
    history_length = history_end - user_start[users[first]]
    kept = (history_length >= args.min_history_items) & (lengths >= args.min_session_items)
    long_enough = int(kept.sum())
    kept &= _quality(fit, members, args)
    kept[kept] = trained_on(fit["timestamp"].to_numpy()[members[kept, lengths[kept] - 1]], args, feed.timezone)
    if not kept.any() and feed.whole is None:
        raise DataError(
            f"{feed.name}: no sessions: of {len(fit)} interactions, {len(rows)} were cut into "
            f"{len(members)} candidates, {long_enough} of them with min_session_items={args.min_session_items} and "
            f"min_history_items={args.min_history_items}, none of those by "
            f"quality_predicates={args.quality_predicates} and update_since={args.update_since}. Lower these, or "
            "choose another session_cut than "
            f"{args.session_cut} or another positive_feedback than {feed.positive_feedback}."
        )
    members, lengths, first = members[kept], lengths[kept], first[kept]
    history_length, history_end = np.minimum(history_length[kept], args.history_items), history_end[kept]

    user_ids = fit["user_id"].iloc[first]
    columns = {
        "user_id": id_array(user_ids),
        "timestamp": pa.array(fit["timestamp"].to_numpy()[first]),
        **histories.columns(history_end - history_length, history_length, user_ids),
        "session_item_ids": _lists_by_index(id_array(fit["item_id"]), members[members >= 0], lengths),
    }
    return arrow_dataset(columns)


def trained_on(times: np.ndarray, args: DataArguments, timezone: str) -> np.ndarray:
    """Which of N sessions or runs are trained on, bool (N,): all, or those of an update.

    An update has all since `args.update_since`, and of the earlier ones, drawn by `args.data_seed`, as many as make
    `args.replay_share` of it, where there are so many; with `args.replay_days`, of those of so many days before alone.

    Args:
        times: (N,) of each one's last behaviour [s]; one without a time is an earlier one, of no day.
    """
    if args.update_since is None:
        return np.ones(len(times), dtype=bool)
    since = _timestamp(args.update_since, timezone)
    chosen = times >= since
    replayable = ~chosen if args.replay_days is None else ~chosen & (times >= since - args.replay_days * 86400)
    earlier = np.flatnonzero(replayable)
    replayed = len(earlier)
    if args.replay_share < 1:
        replayed = min(round(chosen.sum() * args.replay_share / (1 - args.replay_share)), len(earlier))
    chosen[np.random.default_rng(args.data_seed).choice(earlier, replayed, replace=False)] = True
    return chosen


def exposure_sessions(fit: pd.DataFrame, feed: Feed, args: DataArguments) -> Dataset:
    """[`pretraining_sessions`] of all exposures, negatives included, whatever `args.session_source` says."""
    return pretraining_sessions(fit, feed, replace(args, session_source="exposed"))


def session_groups(fit: pd.DataFrame, feed: Feed, args: DataArguments) -> tuple[np.ndarray, np.ndarray]:
    """For each row: the session that the cut puts it in, numbered by first row, and whether the cut applies to it.

    Rows to which it does not apply (no time, no session_id, or the cut is `consecutive`) form one group per user.
    """
    users = user_codes(fit)
    time = fit["timestamp"].to_numpy()
    timed = ~np.isnan(time)
    if args.session_cut == "consecutive":
        return users, np.zeros(len(fit), dtype=bool)
    if args.session_cut == "session_id":
        if "session_id" not in fit:
            raise DataError(
                "session_cut: session_id needs a column 'session_id' in the interactions, which is missing. Map it, "
                "or cut by gap, user_day or consecutive."
            )
        timed = fit["session_id"].notna().to_numpy()
        keys = pd.factorize(fit["session_id"])[0]
    elif not (timed.any() if feed.whole is None else feed.whole.is_timed):
        raise DataError(
            f"session_cut: {args.session_cut} needs times, and column 'timestamp' is empty. Cut by consecutive."
        )
    elif args.session_cut == "gap":
        opens = np.zeros(len(fit), dtype=np.int64)
        opens[1:] = (np.diff(time) > args.session_gap_hours * 3600) | (timed[1:] != timed[:-1])
        keys = np.cumsum(opens)
    else:
        local = pd.to_datetime(np.nan_to_num(time), unit="s", utc=True).tz_convert(feed.timezone).tz_localize(None)
        keys = local.values.astype("datetime64[D]").astype(np.int64)
    keys = np.where(timed, keys - keys.min(initial=0), 0)
    groups, _ = pd.factorize((2 * users + timed) * (keys.max(initial=0) + 1) + keys)
    return groups, timed


def _cut(rows: np.ndarray, groups: np.ndarray, timed: np.ndarray, args: DataArguments) -> tuple[np.ndarray, ...]:
    """Chunks of at most session_items rows of one group: (rows (S, m) padded with -1, lengths (S,))."""
    m = args.session_items
    # Groups are numbered by their first row, so a session that is interleaved with another is gathered again.
    rows = rows[np.argsort(groups[rows], kind="stable")]
    opens = np.flatnonzero(np.diff(groups[rows], prepend=-1)) if len(rows) else np.zeros(0, dtype=np.int64)
    sizes = np.diff(np.r_[opens, len(rows)])
    within = np.arange(len(rows)) - np.repeat(opens, sizes)
    left = np.repeat(sizes, sizes) - within
    starts = np.flatnonzero(within % np.where(timed[rows], m, args.session_stride or m) == 0)
    lengths = np.minimum(left[starts], m)
    offsets = np.arange(m)
    inside_row = offsets < lengths[:, None]
    members = np.where(inside_row, rows[np.where(inside_row, starts[:, None] + offsets, 0)] if len(rows) else 0, -1)
    return members.reshape(len(starts), m), lengths


def _quality(fit: pd.DataFrame, members: np.ndarray, args: DataArguments) -> np.ndarray:
    """Whether each session satisfies the quality predicates on its totals (unknown values count as 0)."""
    if not args.quality_predicates:
        return np.ones(len(members), dtype=bool)
    held = []
    for text in args.quality_predicates:
        predicate = FeedbackPredicate.parse(text, feedback_columns(fit))
        values = fit[predicate.column].to_numpy(dtype=np.float64)[members]
        held.append(predicate.holds(np.nansum(np.where(members >= 0, values, 0.0), axis=1)))
    return np.logical_and.reduce(held) if args.quality_join == "all" else np.logical_or.reduce(held)


def evaluation_cases(split: FeedSplit, feed: Feed, args: DataArguments) -> Dataset:
    """One case a user: given all positive behaviours before the evaluated period, fitted or not, the first one in it.

    Returns:
        Dataset of user_id, history_item_ids (in order, not truncated), next_item_id and the features of histories
        (see schema.py); users with a positive behaviour in the period and at least `args.min_history_items` before it.

    Raises:
        DataError: there is no such user, as of a part of a log there may be.
    """
    histories = _Histories(split.history, feed, args)
    later = split.evaluation[positive_mask(split.evaluation, feed.positive_feedback)].drop_duplicates("user_id")
    # Users without a history are found at -1, where the empty slice stands.
    found = pd.Index(histories.users).get_indexer(later["user_id"])
    starts, lengths = np.r_[histories.starts, 0][found], np.r_[histories.lengths, 0][found]
    enough = lengths >= args.min_history_items
    if not enough.any() and feed.whole is None:
        raise DataError(
            f"{feed.name}: nobody to evaluate: {len(later)} users have a positive behaviour in the evaluated period, "
            f"none of them {args.min_history_items} (min_history_items) before it. Lower min_history_items, or move "
            "the period."
        )
    later = later[enough]
    columns = {
        "user_id": id_array(later["user_id"]),
        **histories.columns(starts[enough], lengths[enough], later["user_id"]),
        "next_item_id": id_array(later["item_id"]),
    }
    if args.history_timestamps:
        columns["timestamp"] = pa.array(later["timestamp"])
    return arrow_dataset(columns)


def id_array(ids: pd.Series) -> pa.Array:
    """Ids as int64 or large_string."""
    return pa.array(ids.to_numpy(), type=pa.int64() if id_type(ids) == "int64" else pa.large_string())


def user_categories(table: pd.DataFrame, user_ids: pd.Series, names: Sequence[str]) -> pa.Array:
    """Struct array of users' categories in the named columns of the table of users."""
    found = table.set_index("user_id").reindex(user_ids)
    return pa.StructArray.from_arrays([pa.array(found[name], type=pa.large_string()) for name in names], list(names))


def list_array(values: pa.Array, starts: np.ndarray, lengths: np.ndarray) -> pa.Array:
    """A list of values[start : start + length] for each pair."""
    index = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths - starts, lengths)
    return _lists_by_index(values, index, lengths)


def _lists_by_index(values: pa.Array, index: np.ndarray, lengths: np.ndarray) -> pa.Array:
    offsets = np.r_[0, np.cumsum(lengths)]
    if offsets[-1] > np.iinfo(np.int32).max:
        raise DataError(
            f"the lists hold {offsets[-1]} items, more than Arrow's 32-bit offsets reach. Raise session_stride or "
            "lower history_items."
        )
    if pa.types.is_string(values.type):
        # The offsets of a string array have 32 bits, which `take` overflows without a word beyond 2 GiB of text.
        values = values.cast(pa.large_string())
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values.take(pa.array(index)))


def arrow_dataset(columns: dict[str, pa.Array]) -> Dataset:
    table = pa.table(columns)
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=Features.from_arrow_schema(table.schema)))
