"""Sessions and histories by catalogue index: the rows that training, the reward model and evaluation read."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .tokenization_onerec import OneRecTokenizer


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


def user_feature_values(sessions: Dataset) -> dict[str, list[str]]:
    """`OneRecConfig.user_features` of sessions with a column `user_features`: the values that occur, by column."""
    if "user_features" not in sessions.column_names:
        return {}
    column = sessions.with_format("arrow")[:]["user_features"]
    return {
        name: sorted(pc.unique(pc.struct_field(column, name)).drop_null().to_pylist())
        for name in sessions.features["user_features"]
    }


__all__ = ["catalogue_index_lists", "index_sessions", "user_feature_values"]
