"""The encoder's inputs of histories: their tokens and, where the model's configuration asks for them, what is known of
each behaviour (its feedback, its time) and of the user (categorical columns)."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import BatchEncoding

from .configuration_onerec import OneRecConfig
from .tokenization_onerec import OneRecTokenizer

# Columns beside the history that rows may have; data/schema.py says what they hold.
HISTORY_FEATURES = ("history_feedback", "history_timestamps", "timestamp", "user_features")


def encode_history_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: OneRecTokenizer, config: OneRecConfig
) -> BatchEncoding:
    """The latest `config.history_items` behaviours of B rows as the encoder's inputs, left padded.

    Args:
        rows: Each has `history` (catalogue indices, oldest first) or else `history_item_ids`; with
            `config.history_feedback` also `history_feedback`, per behaviour one value per condition (1 holds, 0 does
            not, None unknown); with `config.time_gap_buckets` `history_timestamps`, per behaviour [s] or None, and
            `timestamp`, the moment of recommendation [s]; with `config.user_features` `user_features`, value by
            column. Other columns are passed over.

    Returns:
        `input_ids` and `attention_mask` of [`OneRecTokenizer.encode_histories`] and those of `history_item_indices`,
        `history_feedback`, `history_time_gaps` and `user_features` that [`OneRecEncoder`] needs.

    Raises:
        ValueError: An unknown item, a column that is missing or does not fit its history; names the row.
    """
    name = "history" if "history" in rows[0] else "history_item_ids"
    histories = [row[name] for row in rows]
    batch = tokenizer.encode_histories(histories, max_items=config.history_items, catalogue_indices=name == "history")
    lengths = np.array([len(history) for history in histories])
    if config.item_head != "none":
        if name == "history_item_ids":
            histories = np.split(tokenizer.item_index(list(itertools.chain(*histories))), np.cumsum(lengths)[:-1])
        indices = _left_padded(histories, name, lengths, config.history_items, 1)[..., 0]
        # Items that came after the head was made, and have no vector yet, are read by their codes alone.
        known = np.where(indices < config.num_items, indices, -1)
        batch["history_item_indices"] = torch.from_numpy(known.astype(np.int64))
    if config.history_feedback:
        values = _column(rows, "history_feedback", "config.history_feedback")
        held = _left_padded(values, "history_feedback", lengths, config.history_items, len(config.history_feedback))
        batch["history_feedback"] = torch.from_numpy(np.sign(np.nan_to_num(2 * held - 1)).astype(np.int64))
    if config.time_gap_buckets:
        values = _column(rows, "history_timestamps", "config.time_gap_buckets")
        times = _left_padded(values, "history_timestamps", lengths, config.history_items, 1)[..., 0]
        moments = np.array(_column(rows, "timestamp", "config.time_gap_buckets"), dtype=np.float64)
        batch["history_time_gaps"] = torch.from_numpy(time_gaps(moments[:, None] - times, config.time_gap_buckets))
    if config.user_features:
        values = _column(rows, "user_features", "config.user_features")
        batch["user_features"] = torch.from_numpy(user_feature_ids(values, config.user_features))
    return batch


def _column(rows: Sequence[Mapping[str, Any]], name: str, needed_by: str) -> list:
    for index, row in enumerate(rows):
        if name not in row:
            raise ValueError(f"row {index} has no {name!r}, which this model needs ({needed_by}): add it.")
    return [row[name] for row in rows]


def _left_padded(columns: list[Sequence], name: str, lengths: np.ndarray, max_items: int, width: int) -> np.ndarray:
    """The latest `max_items` entries of B lists as float64 [B, longest, width], NaN where unknown and in front.

    Laid out like the item slots of [`OneRecTokenizer.encode_histories`], which have one slot even if all are empty.
    """
    arrays = []
    for index, (values, length) in enumerate(zip(columns, lengths.tolist(), strict=True)):
        values = np.asarray(values, dtype=np.float64)
        if values.size != length * width or len(values) != length:
            raise ValueError(
                f"row {index}: {name} has shape {list(values.shape)}, where the history of {length} items needs "
                f"{[length] if width == 1 else [length, width]}."
            )
        arrays.append(values.reshape(length, width)[-max_items:])
    lengths = lengths.clip(max=max_items)
    longest = max(int(lengths.max()), 1)
    padded = np.full((len(arrays), longest, width), np.nan)
    padded[np.arange(longest) >= longest - lengths[:, None]] = np.concatenate(arrays)
    return padded


def time_gaps(seconds: np.ndarray, num_buckets: int) -> np.ndarray:
    """Buckets of gaps [s], int64 of the same shape: octaves of minutes, 1 to `num_buckets`; 0 where the gap is NaN.

    Bucket k holds the gaps of at least 2^(k-1) - 1 and less than 2^k - 1 minutes, the last one all longer ones too; a
    gap below 0 counts as none.
    """
    octave = np.floor(np.log2(1 + np.maximum(seconds, 0) / 60))
    return np.nan_to_num(np.minimum(octave + 1, num_buckets)).astype(np.int64)


def user_feature_ids(users: Sequence[Mapping[str, Any]], user_features: Mapping[str, list[str]]) -> np.ndarray:
    """Ids int64 [B, columns] of the users' values, counted from 1 over the values of all columns; 0 where unknown."""
    ids, offset = np.zeros((len(users), len(user_features)), dtype=np.int64), 1
    for column, (name, values) in enumerate(user_features.items()):
        for index, user in enumerate(users):
            if name not in user:
                raise ValueError(f"row {index}: user_features has no {name!r}; give None where the value is unknown.")
        found = pd.Index(values, dtype=object).get_indexer([str(user[name]) for user in users])
        ids[:, column] = np.where(found >= 0, found + offset, 0)
        offset += len(values)
    return ids
