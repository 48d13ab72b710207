"""The reward model's inputs: a user's exposures with their feedback and profile, features and totals of items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..data import Feed, feedback_columns, feedback_signals
from ..tokenization_onerec import OneRecTokenizer
from .configuration_onerec_reward import OneRecRewardConfig

# Columns that the reward model reads of a row; data/schema.py says what they hold. A row that has none of them is read
# by its history alone.
REWARD_FEATURES = ("exposed", "exposed_feedback", "feedback_totals", "user_profile")
NUMERIC_BINS = 32
MULTI_CATEGORICAL_PLACES = 3
# A rarer value of a user's feature would be learnt by heart.
MIN_USERS_PER_VALUE = 20


@dataclass
class ItemFeatures:
    """Features of N items.

    Args:
        values: (N, K) values counted from 1 over all columns, 0 where unknown.
        columns: Column of each of the K places.
        num_values: Number of values, 0 among them.
        ranks: (N, P) ranks by the numeric columns, from -1 to 1, 0 where unknown.
        numeric_columns: The P numeric columns.
    """

    values: np.ndarray
    columns: list[str]
    num_values: int
    ranks: np.ndarray
    numeric_columns: list[str]

    @classmethod
    def of_feed(cls, feed: Feed) -> "ItemFeatures":
        """In the order of the feed's items. Categories that only one item has are unknown. Of lists the first three
        entries are taken. Numbers become the number of one of 32 equally frequent bins, and a rank."""
        items = feed.items
        lists = {
            name: [[] if pd.isna(value) else [value] for value in items[name]] for name in feed.categorical_columns
        }
        lists |= {name: [list(values) for values in items[name]] for name in feed.multi_categorical_columns}
        numbers = {name: items[name].to_numpy(dtype=np.float64) for name in feed.numeric_columns}
        numbers = {name: values for name, values in numbers.items() if not np.isnan(values).all()}
        coded = [(name, *_categories(entries)) for name, entries in lists.items()]
        coded += [(name, *_bins(values)) for name, values in numbers.items()]
        places, columns, num_values = [], [], 1
        for name, codes, count in coded:
            places += [np.where(code >= 0, code + num_values, 0) for code in codes]
            columns += [name] * len(codes)
            num_values += count
        return cls(
            _columns(places, len(items), np.int64),
            columns,
            num_values,
            _columns([_ranks(values) for values in numbers.values()], len(items), np.float32),
            list(numbers),
        )

    def take(self, rows: np.ndarray) -> "ItemFeatures":
        """The same with row i moved to `rows[i]`."""
        order = np.argsort(rows)
        return replace(self, values=self.values[order], ranks=self.ranks[order])


def _categories(entries: list[list]) -> tuple[list[np.ndarray], int]:
    """The first entries of each item's list as numbers of categories, -1 where unknown, and the categories' number."""
    counts = pd.Series([entry for values in entries for entry in values], dtype=object).value_counts()
    known = pd.Index(sorted(counts.index[counts > 1]), dtype=object)
    width = min(MULTI_CATEGORICAL_PLACES, max(map(len, entries), default=0))
    places = [[values[place] if len(values) > place else None for values in entries] for place in range(width)]
    return [known.get_indexer(pd.Index(place, dtype=object)) for place in places], len(known)


def _bins(values: np.ndarray) -> tuple[list[np.ndarray], int]:
    """Each item's number of a bin, -1 where unknown, and the bins' number."""
    known = ~np.isnan(values)
    bounds = np.unique(np.quantile(values[known], np.arange(1, NUMERIC_BINS) / NUMERIC_BINS))
    return [np.where(known, np.searchsorted(bounds, values, side="right"), -1)], len(bounds) + 1


def _ranks(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    return np.where(known, 2 * np.searchsorted(np.sort(values[known]), values, side="right") / known.sum() - 1, 0)


def _columns(columns: list[np.ndarray], length: int, dtype: type) -> np.ndarray:
    return (np.stack(columns, 1) if columns else np.zeros((length, 0))).astype(dtype)


def known_user_values(users: pd.DataFrame | None) -> dict[str, list[str]]:
    """`OneRecRewardConfig.user_features`: by column the values of at least 20 users."""
    if users is None:
        return {}
    counts = {name: users[name].value_counts() for name in users.columns if name != "user_id"}
    found = {name: sorted(count.index[count >= MIN_USERS_PER_VALUE].tolist()) for name, count in counts.items()}
    return {name: values for name, values in found.items() if len(values) > 1}


class ItemTotals:
    """Sums of the signals on each of N items, and how many of them are known, as of any time.

    Attributes:
        feedback: Feedback columns that the signals come from.
        signal_means: (S,) means of the known signals.
    """

    def __init__(self, interactions: pd.DataFrame, items: np.ndarray, num_items: int):
        """Reads canonical `interactions`, whose items have the catalogue indices `items`."""
        self.feedback = columns = feedback_columns(interactions)
        signals = feedback_signals(interactions[columns].to_numpy(dtype=np.float64), columns)
        time = interactions["timestamp"].to_numpy(dtype=np.float64)
        self.signal_means = np.nanmean(np.concatenate([signals, np.full((1, signals.shape[1]), 0.5)]), axis=0)
        self._timed = bool((~np.isnan(time)).any())
        time = np.nan_to_num(time, nan=-np.inf)
        self._times = np.unique(time)
        # Exposures sorted by item and then by time, each with a key that says both, and the running totals: what an
        # item has before a time is a difference of two of these.
        keys = items * (len(self._times) + 1) + np.searchsorted(self._times, time)
        order = np.argsort(keys, kind="stable")
        counted = np.concatenate([np.nan_to_num(signals), ~np.isnan(signals)], axis=1)[order]
        self._totals = np.concatenate([np.zeros((1, counted.shape[1])), np.cumsum(counted, axis=0)])
        self._keys = keys[order]
        self._starts = np.searchsorted(self._keys, np.arange(num_items + 1) * (len(self._times) + 1))

    @classmethod
    def of_feed(cls, feed: Feed, tokenizer: OneRecTokenizer) -> "ItemTotals":
        """Of all interactions of a feed, for the items of a tokenizer."""
        items = tokenizer.item_index(feed.interactions["item_id"])
        return cls(feed.interactions, items, tokenizer.num_items)

    def before(self, items: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Totals `(..., 2 S)` of exposures of `items` strictly before `times` [s]; nothing before an unknown time."""
        rank = np.searchsorted(self._times, np.nan_to_num(times, nan=-np.inf))
        end = np.searchsorted(self._keys, items * (len(self._times) + 1) + rank)
        return (self._totals[end] - self._totals[self._starts[items]]).astype(np.float32)

    def all(self) -> np.ndarray:
        """Totals `(N, 2 S)` of all exposures; zeros where there are no times, as [`before`] then knows of none."""
        totals = self._totals[self._starts[1:]] - self._totals[self._starts[:-1]]
        return (totals if self._timed else np.zeros_like(totals)).astype(np.float32)


class ExposureEncoder:
    """Rows as the tensors that a [`OneRecRewardModel`] of `config` reads of a user; `item_token_ids` (N, L) are the
    tokenizer's code token ids of each item."""

    def __init__(self, config: OneRecRewardConfig, item_token_ids: torch.LongTensor):
        self.config = config
        self.item_token_ids = item_token_ids.cpu()
        self._user_values, offset = [], 1
        for name, values in config.user_features.items():
            self._user_values.append((name, {value: offset + index for index, value in enumerate(values)}))
            offset += len(values)

    def codes(self, indices: np.ndarray) -> torch.LongTensor:
        """Code token ids `(..., L)` of catalogue indices, `pad_token_id` where they are -1.

        Raises:
            ValueError: if an index is not in the catalogue.
        """
        size = len(self.item_token_ids)
        if indices.size and (indices.max() >= size or indices.min() < -1):
            raise ValueError(
                f"Catalogue indices must lie in 0..{size - 1}, got {int(indices.min())}..{int(indices.max())}: the "
                "sessions come from another catalogue than the tokenizer."
            )
        found = torch.from_numpy(indices)
        return self.item_token_ids[found.clamp(min=0)].masked_fill((found < 0)[..., None], self.config.pad_token_id)

    def __call__(self, rows: Sequence[Mapping[str, Any]], latest: int | None = None) -> dict[str, torch.Tensor]:
        """`history_ids`, `history_indices`, `history_signals`, `user_totals` and `user_values` of B rows, padded at
        the end.

        Args:
            rows: Each has `exposed` and further columns of `REWARD_FEATURES`, or else `history`.
            latest: Behaviours that are kept; all by default.

        Raises:
            ValueError: if a row's feedback does not fit its exposures or the model.
        """
        num_signals = len(self.config.signals)
        width = max([1, *(len(_exposed(row)) for row in rows)])
        kept = width if latest is None else min(width, latest)
        indices = np.full((len(rows), kept), -1, dtype=np.int64)
        signals = np.full((len(rows), kept, num_signals), np.nan, dtype=np.float32)
        totals = np.zeros((len(rows), 2 * num_signals), dtype=np.float32)
        values = np.zeros((len(rows), len(self._user_values)), dtype=np.int64)
        for index, row in enumerate(rows):
            items = _exposed(row)
            length = min(len(items), kept)
            indices[index, :length] = items[-kept:]
            if num_signals and len(items) and row.get("exposed_feedback") is not None:
                known = self._signals(row["exposed_feedback"], len(items), index)
                signals[index, :length] = known[-kept:]
                totals[index] = np.r_[np.nansum(known[:-kept], axis=0), (~np.isnan(known[:-kept])).sum(0)]
            if num_signals and row.get("feedback_totals") is not None:
                totals[index] += np.asarray(row["feedback_totals"], dtype=np.float32)
            profile = row.get("user_profile") or {}
            values[index] = [known.get(profile.get(name), 0) for name, known in self._user_values]
        encoded = {"history_ids": self.codes(indices), "history_indices": torch.from_numpy(indices)}
        if num_signals:
            encoded |= {"history_signals": torch.from_numpy(signals), "user_totals": torch.from_numpy(totals)}
        if self._user_values:
            encoded["user_values"] = torch.from_numpy(values)
        return encoded

    def _signals(self, feedback: Sequence[float], count: int, row: int) -> np.ndarray:
        """Signals `(count, S)` of a row's exposures, from their feedback columns' values side by side."""
        columns = self.config.feedback
        feedback = np.asarray(feedback, dtype=np.float64).reshape(count, -1)
        if feedback.shape[1] != len(columns):
            raise ValueError(
                f"row {row}: exposed_feedback has {feedback.shape[1]} values an exposure, and the reward model reads "
                f"{len(columns)} ({', '.join(columns)}): give these columns in this order."
            )
        return feedback_signals(feedback, columns)


def _exposed(row: Mapping[str, Any]) -> Sequence[int]:
    exposed = row.get("exposed")
    return row["history"] if exposed is None else exposed
