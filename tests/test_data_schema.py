"""The schema's checks: each error names file, column, first offending row and the remedy."""

import numpy as np
import pandas as pd
import pytest

from onerec_hf.data import DataError, Feed, interaction_features
from onerec_hf.data.schema import canonical_interactions, order_interactions


def interactions(**changes):
    frame = {
        "user_id": [1, 1, 2, 2],
        "item_id": [10, 20, 10, 30],
        "timestamp": [5.0, 3.0, 1.0, 2.0],
        "watch_time": [1.0, 2.0, 3.0, 4.0],
        "view": [1, 0, 1, 1],
    }
    frame |= changes
    return pd.DataFrame({name: values for name, values in frame.items() if values is not None})


def items(**changes):
    return pd.DataFrame({"item_id": [10, 20, 30], "vector": [[0.0, 1.0]] * 3} | changes)


def feed(log=None, catalogue=None, **roles):
    log = interactions() if log is None else log
    catalogue = items() if catalogue is None else catalogue
    return Feed.from_frames("tiny", [(log, "log.csv")], (catalogue, "videos.csv"), ["view"], **roles)


BAD_INPUT = {
    "missing column": (lambda: feed(interactions(item_id=None)), ["log.csv", "'item_id'", "missing", "user_id"]),
    "no order": (lambda: feed(interactions(timestamp=None)), ["log.csv", "'timestamp'", "'position'"]),
    "float ids": (lambda: feed(interactions(user_id=[1.0, 1.5, 2, 2])), ["'user_id'", "float64", "row 0"]),
    "mixed ids": (
        lambda: feed(interactions(user_id=pd.Series(["a", "a", 7, "b"], dtype=object))),
        ["'user_id'", "row 2", "7"],
    ),
    "no id": (lambda: feed(interactions(item_id=["x", None, "y", "y"])), ["'item_id'", "row 1"]),
    "text feedback": (
        lambda: feed(interactions(view=["1", "yes", "0", "1"])),
        ["'view'", "row 1", "'yes'", "1 of 4", "numbers"],
    ),
    "view of 2": (lambda: feed(interactions(view=[1, 0, 2, 0])), ["'view'", "[0, 1]", "row 2"]),
    "negative watch time": (lambda: feed(interactions(watch_time=[1, 2, -3, -4])), ["log.csv", "row 2", "-3"]),
    "unknown item": (lambda: feed(interactions(item_id=[10, 20, 30, 99])), ["log.csv", "row 3", "99", "videos.csv"]),
    "ids of other items": (
        lambda: feed(interactions(item_id=list("abcd"))),
        ["log.csv", "videos.csv", "row 0", "'a'"],
    ),
    "one user": (lambda: feed(interactions(user_id=[4, 4, 4, 4])), ["log.csv", "'user_id'", "one user", "4"]),
    "no rows": (lambda: feed(interactions()[:0]), ["log.csv", "no interactions"]),
    "duplicate item": (lambda: feed(None, items(item_id=[10, 20, 10])), ["videos.csv", "'item_id'", "row 2", "10"]),
    "NaN in embedding": (
        lambda: feed(None, items(vector=[[0.0, 1.0], [0.0, np.nan], [1.0, 1.0]]), embedding_column="vector"),
        ["videos.csv", "'vector'", "row 1", "NaN"],
    ),
    "short embedding": (
        lambda: feed(None, items(vector=[[0.0, 1.0], [0.0], [1.0, 1.0]]), embedding_column="vector"),
        ["videos.csv", "'vector'", "row 1", "2 numbers"],
    ),
    "unknown feedback": (lambda: feed().with_positive_feedback(["likes"]), ["likes", "watch_time, view"]),
    "unknown time zone": (lambda: feed(timezone="Mars/Olympus"), ["Mars/Olympus", "IANA"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_says_where_and_what(case):
    build, expected = BAD_INPUT[case]
    with pytest.raises(DataError) as error:
        build()
    for part in expected:
        assert part in str(error.value)


def test_unsorted_time_is_sorted_and_numbered():
    log = feed().interactions
    assert log["item_id"].tolist() == [20, 10, 10, 30]
    assert log["position"].tolist() == [0, 1, 0, 1]
    assert log["view"].dtype == np.float32


@pytest.mark.parametrize("ids", [[7, 8, 7, 8], ["b", "a", "b", "a"]])
def test_ids_keep_their_type(ids):
    features = interaction_features(feed(interactions(user_id=ids)).interactions)
    assert features["user_id"].dtype == ("int64" if isinstance(ids[0], int) else "string")
    assert features["item_id"].dtype == "int64"


def test_rows_without_a_time():
    nan = np.nan
    frame = pd.DataFrame(
        {
            "user_id": [1, 1, 1, 2, 2, 2],
            "item_id": [1, 2, 3, 4, 5, 6],
            "timestamp": [9.0, nan, nan, 1.0, nan, 0.0],
            "position": [nan, 1, 0, 2, 1, 0],
        }
    )
    ordered = order_interactions(canonical_interactions(frame, "log.csv"))
    # User 1: the rows without a time come first, by position. User 2 has a position everywhere, which then rules.
    assert ordered["item_id"].tolist() == [3, 2, 1, 6, 5, 4]
    assert ordered["position"].tolist() == [0, 1, 2, 0, 1, 2]


def test_item_columns_are_cast():
    catalogue = items(author=[1.0, np.nan, 3.0], tags=["a, b", None, "c"], age=[1, 2, 3], title=["x", " ", None])
    roles = {"categorical_columns": ["author"], "multi_categorical_columns": ["tags"], "numeric_columns": ["age"]}
    tiny = feed(None, catalogue, text_column="title", embedding_column="vector", **roles)
    assert tiny.items["author"].fillna("-").tolist() == ["1", "-", "3"]
    assert tiny.items["tags"].tolist() == [["a", "b"], [], ["c"]]
    assert tiny.items["title"].isna().tolist() == [False, True, True]
    assert list(tiny.item_features()) == ["item_id", "title", "author", "tags", "age", "vector"]
