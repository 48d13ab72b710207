"""Sessions and histories by catalogue index: the rows that training, the reward model and evaluation read."""

from collections.abc import Callable
from zlib import crc32

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .configuration_onerec import OneRecConfig
from .data import (
    DataArguments,
    Feed,
    as_feed,
    pretraining_sessions,
    user_exposures,
    user_histories,
    with_user_exposures,
)
from .tokenization_onerec import OneRecTokenizer

ROW_COLUMNS = frozenset(("history", "exposed", "rows"))  # one of which rows of every kind have


def catalogue_index_lists(column: pa.ChunkedArray, item_index: Callable[[pd.Series], np.ndarray]) -> pa.Array:
    """Lists of item ids as lists of catalogue indices, without a Python object per item.

    Args:
        item_index: catalogue indices of item ids, such as [`OneRecTokenizer.item_index`].
    """
    flat = pa.array(item_index(pc.list_flatten(column).to_pandas()))
    lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, flat)


def index_sessions(sessions: Dataset, tokenizer: OneRecTokenizer) -> Dataset:
    """Rows by catalogue index: `history`, `session` and `exposed` in place of those of `history_item_ids`,
    `session_item_ids` and `exposed_item_ids` that there are, and `length`, the items of the history. Other columns are
    kept.

    Raises:
        ValueError: an item is not in the tokenizer's catalogue.
    """
    table = sessions.with_format("arrow")[:]
    columns = {name: table[name] for name in table.column_names}
    for name in ("history", "session", "exposed"):
        if f"{name}_item_ids" in columns:
            columns[name] = catalogue_index_lists(columns.pop(f"{name}_item_ids"), tokenizer.item_index)
    if "history" in columns:
        columns["length"] = pc.list_value_length(columns["history"])
    return Dataset(pa.table(columns))


def drawn_with(items: np.ndarray) -> np.random.Generator:
    """A generator that follows from the items of a batch. Batches are made before they are trained on, so that with
    torch's own generator a training that is resumed within an epoch would draw otherwise than one that was not."""
    return np.random.default_rng(crc32(np.ascontiguousarray(items, dtype=np.int64)))


def rows_of(data, made: Callable[[Feed], Dataset]):
    """Rows by catalogue index, or anything else that is no table of a log, as it is; of a feed or a log, which
    [`feed_from_log`] reads by its default names, the rows that are `made` of it."""
    if isinstance(data, Dataset) and not ROW_COLUMNS.isdisjoint(data.column_names):
        return data
    is_table = isinstance(data, (Dataset, pd.DataFrame)) or hasattr(data, "__arrow_c_stream__")
    return made(as_feed(data)) if is_table or isinstance(data, Feed) else data


def generator_data_arguments(config: OneRecConfig) -> DataArguments:
    """How a feed is cut for a generator: into histories with what it reads, and sessions of as many items."""
    return DataArguments(
        history_items=config.history_items,
        session_items=config.session_items,
        history_feedback=config.history_feedback or None,
        history_timestamps=config.time_gap_buckets > 0,
        user_features=list(config.user_features) or None,
    )


def training_sessions(
    feed: Feed, tokenizer: OneRecTokenizer, config: OneRecConfig, args: DataArguments | None = None
) -> Dataset:
    """What a generator of this configuration is trained on: the feed's sessions, by catalogue index.

    Args:
        args: How they are cut. By default of consecutive positive behaviours, as long as `config` has them.
    """
    args = args or generator_data_arguments(config)
    return index_sessions(pretraining_sessions(feed.interactions, feed, args), tokenizer)


def users_of_feed(feed: Feed, config: OneRecConfig) -> Dataset:
    """Every user with a positive behaviour as of the end of the feed, by item id: what a generator of this
    configuration and a reward model read of them (see data/schema.py)."""
    args = generator_data_arguments(config)
    histories = user_histories(feed.interactions, feed, args)
    exposures = user_exposures(feed.interactions, feed, args.history_items)
    return Dataset(
        with_user_exposures(*(table.with_format("arrow")[:].combine_chunks() for table in (histories, exposures)))
    )


def user_feature_values(sessions: Dataset) -> dict[str, list[str]]:
    """`OneRecConfig.user_features` of sessions with a column `user_features`: the values that occur, by column."""
    if "user_features" not in sessions.column_names:
        return {}
    column = sessions.with_format("arrow")[:]["user_features"]
    return {
        name: sorted(pc.unique(pc.struct_field(column, name)).drop_null().to_pylist())
        for name in sessions.features["user_features"]
    }


__all__ = [
    "catalogue_index_lists",
    "drawn_with",
    "generator_data_arguments",
    "index_sessions",
    "rows_of",
    "training_sessions",
    "user_feature_values",
    "users_of_feed",
]
