"""Split, histories and sessions, against a plain re-statement of the rules."""

import datetime
import math
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.data import (
    DataArguments,
    DataError,
    Feed,
    evaluation_cases,
    exposure_sessions,
    feedback_columns,
    pretraining_sessions,
    split_feed,
    user_exposures,
    user_histories,
)
from onerec_hf.data.sessions import list_array
from onerec_hf.reward.configuration_onerec_reward import DEFAULT_OBJECTIVES
from onerec_hf.reward.reward_objectives import session_label

HOUR = 3600.0
BERLIN = datetime.timezone(datetime.timedelta(hours=1))


def make_feed(rows, positive_feedback=("view", "like"), timezone="Europe/Berlin"):
    """Rows of (user, item, time in hours or None, session, view, like); the file order is the order of positions."""
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "session_id", "view", "like"])
    frame["timestamp"] = frame["timestamp"].astype(float) * HOUR
    frame["position"] = np.arange(len(frame))
    frame["follow"] = 0
    frame["duration"] = 10 + frame["item_id"] % 3
    frame["watch_time"] = np.where(frame["view"] > 0, 2.0, 0.5) * frame["duration"]
    items = pd.DataFrame({"item_id": np.unique(frame["item_id"])})
    return Feed.from_frames("tiny", [(frame, "log")], (items, "items"), list(positive_feedback), timezone=timezone)


@st.composite
def logs(draw):
    rows = []
    for user in range(1, draw(st.integers(2, 3)) + 1):
        for _ in range(draw(st.integers(0, 3))):
            rows.append((user, draw(st.integers(1, 6)), None, None, draw(st.integers(0, 1)), 0))
        hour = float(draw(st.integers(0, 30)))
        for _ in range(draw(st.integers(1, 12))):
            hour += draw(st.sampled_from([0.0, 0.5, 5.0, 7.0, 20.0]))
            session = draw(st.integers(1, 3)) + 10 * user
            feedback = draw(st.integers(0, 1)), draw(st.integers(0, 1))
            rows.append((user, draw(st.integers(1, 6)), hour, session, *feedback))
    return rows


def expected_sessions(feed, args, source):
    """The rules in plain Python: a list of (user, history, session)."""
    expected = []
    for user, rows in feed.interactions.groupby("user_id"):
        rows = rows.to_dict("records")
        liked = [row["view"] > 0 or row["like"] > 0 for row in rows]
        chosen = [i for i in range(len(rows)) if source == "exposed" or liked[i]]

        def history(i, rows=rows, liked=liked):
            return [rows[j]["item_id"] for j in range(i) if liked[j]]

        def key(i, rows=rows):
            time = rows[i]["timestamp"]
            if args.session_cut == "session_id":
                return None if pd.isna(rows[i]["session_id"]) else rows[i]["session_id"]
            if args.session_cut == "consecutive" or math.isnan(time):
                return None
            if args.session_cut == "user_day":
                return datetime.datetime.fromtimestamp(time, BERLIN).date()
            start = i
            while start and rows[start]["timestamp"] - rows[start - 1]["timestamp"] <= args.session_gap_hours * HOUR:
                start -= 1
            return start

        groups = {}
        for i in chosen:
            if key(i) is not None or len(history(i)) >= args.min_history_items:
                groups.setdefault(key(i), []).append(i)
        for cut, members in groups.items():
            stride = (args.session_stride or args.session_items) if cut is None else args.session_items
            for start in range(0, len(members), stride):
                session = members[start : start + args.session_items]
                before = history(session[0])
                if len(session) >= args.min_session_items and len(before) >= args.min_history_items:
                    expected.append((user, before[-args.history_items :], [rows[i]["item_id"] for i in session]))
    return expected


@settings(max_examples=60, deadline=None)
@given(
    logs(),
    st.sampled_from(["consecutive", "gap", "user_day", "session_id"]),
    st.sampled_from(["positive", "exposed"]),
    st.sampled_from([None, 1, 2]),
    st.integers(0, 2),
    st.integers(1, 2),
)
def test_sessions_follow_the_rules(rows, cut, source, stride, min_history, min_session):
    feed = make_feed(rows)
    args = DataArguments(
        session_cut=cut,
        session_source=source,
        session_stride=stride,
        session_items=3,
        history_items=4,
        min_history_items=min_history,
        min_session_items=min_session,
    )
    expected = expected_sessions(feed, args, source)
    if not expected:
        with pytest.raises(DataError, match="no sessions"):
            pretraining_sessions(feed.interactions, feed, args)
        return
    sessions = pretraining_sessions(feed.interactions, feed, args)
    columns = (sessions[name] for name in ("user_id", "history_item_ids", "session_item_ids"))
    assert sorted(zip(*columns, strict=True)) == sorted(expected)


def test_sessions_have_the_columns_that_are_read():
    rows = [(user, item, item, 1, 1, 0) for user in (1, 2) for item in (1, 2, 3)]
    feed = make_feed(rows)
    feed.users = pd.DataFrame({"user_id": [1, 2], "age": ["20", "30"]})
    keys = ["user_id", "timestamp", "history_item_ids", "session_item_ids"]
    assert sorted(pretraining_sessions(feed.interactions, feed, DataArguments()).column_names) == sorted(keys)
    asked = {"history_feedback": ["like"], "history_timestamps": True, "user_features": ["age"]}
    sessions = pretraining_sessions(feed.interactions, feed, DataArguments(**asked))
    assert sorted(sessions.column_names) == sorted([*keys, *asked])


def test_labels():
    rows = [(1, 1, 0, 1, 1, 0), (1, 2, 1, 1, 0, 1), (1, 3, 2, 2, 1, 1), (2, 1, None, None, 1, 0), (2, 3, 3, 3, 0, 0)]
    feed = make_feed(rows)
    feed.interactions.loc[feed.interactions["timestamp"].isna(), ["watch_time", "like"]] = np.nan
    args = DataArguments(session_cut="session_id", min_history_items=0, session_items=2)
    sessions = exposure_sessions(feed.interactions, feed, args)
    assert sessions["session_item_ids"][:] == [[1, 2], [3], [1], [3]]
    columns, members = feedback_columns(feed.interactions), np.array([[0, 1], [2, -1], [3, -1], [4, -1]])
    feedback = feed.interactions[columns].to_numpy()
    labels = {each["name"]: session_label(each, feedback, columns, members) for each in DEFAULT_OBJECTIVES}
    sessions = sessions.to_pandas().assign(**labels).set_index(["user_id"])
    first = sessions.loc[1].iloc[0]
    # Item 1 lasts 11 s and is watched twice over, item 2 lasts 12 s and is watched by half.
    assert first["swt"] == pytest.approx((11 + 6) / 23)
    assert (first["vtr"], first["wtr"], first["ltr"]) == (0.5, 0.0, 0.5)
    assert first["timestamp"] == 0
    unknown = sessions.loc[2].iloc[0]
    assert unknown["vtr"] == 1 and np.isnan([unknown["swt"], unknown["ltr"], unknown["timestamp"]]).all()


@pytest.mark.parametrize(
    ("predicates", "join", "kept"),
    [(["watch_time>=28"], "any", 2), (["watch_time>30", "like"], "any", 2), (["watch_time>=30", "like"], "all", 1)],
)
def test_quality_predicates(predicates, join, kept):
    rows = [(1, 1, 0, 1, 1, 0), (1, 2, 1, 1, 0, 1), (1, 3, 2, 2, 1, 1), (1, 3, 2, 2, 1, 0), (2, 1, 3, 3, 0, 0)]
    args = DataArguments(
        session_cut="session_id", min_history_items=0, quality_predicates=predicates, quality_join=join
    )
    feed = make_feed(rows)
    assert len(exposure_sessions(feed.interactions, feed, args)) == kept


def test_split_by_time_never_fits_the_period():
    rows = [(1, 1, 0, 1, 1, 0), (1, 2, 5, 1, 1, 0), (1, 3, 9, 1, 1, 0), (2, 2, None, None, 1, 0), (2, 1, 6, 2, 1, 0)]
    feed = make_feed(rows)
    start = "1970-01-01T06:00:00"  # in the feed's zone, UTC+1: hour 5
    split = split_feed(feed, DataArguments(test_start=start))
    assert split.fit["item_id"].tolist() == [1, 2] and split.fit["timestamp"].max() < 5 * HOUR
    assert split.description["evaluation_start"] == "1970-01-01T06:00:00+01:00"
    cases = evaluation_cases(split, feed, DataArguments())
    assert cases[:] == {"user_id": [1, 2], "history_item_ids": [[1], [2]], "next_item_id": [2, 1]}

    periods = {"validation_start": start, "test_start": "1970-01-01T08:00:00+00:00"}
    split = split_feed(feed, DataArguments(evaluation_split="validation", **periods))
    assert split.evaluation["item_id"].tolist() == [2, 1]
    with pytest.raises(DataError, match="no interactions in the evaluated period"):
        split_feed(feed, DataArguments(test_start="2024-01-01"))
    with pytest.raises(DataError, match="not before the test period"):
        split_feed(feed, DataArguments(evaluation_split="validation", test_start=start, validation_start=start))


def test_a_missing_time_after_the_start_is_not_fitted():
    frame = pd.DataFrame({"user_id": [1, 1, 1, 2], "item_id": [1, 2, 3, 1], "timestamp": [0.0, 9.0, np.nan, 1.0]})
    frame["position"] = [0, 1, 2, 0]
    feed = Feed.from_frames("tiny", [(frame, "log")], (pd.DataFrame({"item_id": [1, 2, 3]}), "items"), [])
    split = split_feed(feed, DataArguments(test_start="1970-01-01T00:00:05+00:00"))
    assert split.fit["item_id"].tolist() == [1, 1] and split.evaluation["item_id"].tolist() == [2, 3]


def test_leave_one_out_warns_and_holds_out_the_last_positive():
    rows = [(1, i, i, 1, int(i != 4), 0) for i in range(1, 6)] + [(2, 1, 0, 2, 1, 0), (2, 2, 1, 2, 1, 0)]
    feed = make_feed(rows)
    with pytest.warns(UserWarning, match="leaks the future"):
        split = split_feed(feed, DataArguments(split_method="leave_one_out", fit_validation=True))
    assert split.fit["item_id"].tolist() == [1, 2, 3, 4, 1, 2] and split.evaluation["item_id"].tolist() == [5]
    assert split.history.equals(split.fit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = DataArguments(split_method="leave_one_out", evaluation_split="validation")
        split = split_feed(feed, args)
    assert split.fit["item_id"].tolist() == [1, 2, 1, 2] and split.evaluation["item_id"].tolist() == [3]


@pytest.mark.parametrize("method", ["leave_one_out", "time"])
@pytest.mark.filterwarnings("ignore:leave-one-out")
def test_an_unfitted_validation_item_stands_in_the_evaluated_histories_alone(method):
    """Two users in turn; of each the last item is the test's, the one before it the validation's."""
    items = {1: [1, 2, 3, 4, 5], 2: [6, 7, 8, 9, 1]}
    feed = make_feed([(user, item, hour, None, 1, 0) for user in items for hour, item in enumerate(items[user])])
    periods = {"validation_start": "1970-01-01T03:00+00:00", "test_start": "1970-01-01T04:00+00:00"}
    shared = {"split_method": method, "session_items": 1, "history_items": 5, **periods}
    literature = {} if method == "leave_one_out" else {"fit_validation": False}

    def cut(**changes):
        args = DataArguments(**shared, **changes)
        split = split_feed(feed, args)
        sessions = pretraining_sessions(split.fit, feed, args)
        fitted = user_histories(split.fit, feed, args)
        cases = evaluation_cases(split, feed, args)
        assert fitted["user_id"][:] == cases["user_id"][:] == [1, 2]
        return (
            split.description["fitted_until"],
            [item for session in sessions["session_item_ids"][:] for item in session],
            fitted["history_item_ids"][:],
            [[*cases["history_item_ids"][row], cases["next_item_id"][row]] for row in range(2)],
        )

    until_validation = [[1, 2, 3], [6, 7, 8]], [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert cut(**literature) == ("validation", [2, 3, 7, 8], until_validation[0], [items[1], items[2]])
    assert cut(fit_validation=True) == ("test", [2, 3, 4, 7, 8, 9], until_validation[1], [items[1], items[2]])
    for fit_validation in (None, False, True):  # of no matter where validation is evaluated
        searched = cut(evaluation_split="validation", fit_validation=fit_validation)
        assert searched == ("validation", [2, 3, 7, 8], *until_validation)
    assert DataArguments().fitted_until == "test"


def test_user_histories_and_thresholds():
    rows = [(1, 1, 0, 1, 1, 0), (1, 2, 1, 1, 0, 0), (1, 3, 2, 1, 0, 1), (2, 2, 3, 2, 0, 0)]
    feed = make_feed(rows)
    histories = user_histories(feed.interactions, feed, DataArguments())
    assert histories[:] == {"user_id": [1], "history_item_ids": [[1, 3]]}
    feed = make_feed(rows, ["watch_time>=20"])
    histories = user_histories(feed.interactions, feed, DataArguments())
    assert histories[:] == {"user_id": [1], "history_item_ids": [[1]]}
    feed = make_feed(rows, [])
    assert len(user_histories(feed.interactions, feed, DataArguments())) == 2


def test_features_of_histories():
    rows = [(1, 1, None, None, 1, 0), (1, 2, 1, 1, 0, 1), (1, 3, 2, 1, 1, 0), (1, 4, 5, 2, 1, 0), (2, 2, 3, 2, 1, 0)]
    feed = make_feed(rows)
    feed.interactions.loc[0, "like"] = np.nan
    feed.users = pd.DataFrame({"user_id": [2, 1], "sex": ["f", None], "age": ["20", "30"]})
    asked = {
        "history_feedback": ["like", "watch_time>=21"],
        "history_timestamps": True,
        "user_features": ["age", "sex"],
    }
    args = DataArguments(session_items=1, test_start="1970-01-01T05:00:00+00:00", **asked)
    split = split_feed(feed, args)
    # Item 1 lasts 11 s, 2 12 s, 3 10 s; a view is watched twice over, else half.
    feedback, times, user = [[None, 1], [1, 0], [0, 0]], [None, 1 * HOUR, 2 * HOUR], {"age": "30", "sex": None}
    sessions = pretraining_sessions(split.fit, feed, args)
    assert sessions["session_item_ids"][:] == [[2], [3]]
    assert sessions["history_feedback"][:] == [feedback[:1], feedback[:2]]
    assert sessions["history_timestamps"][:] == [times[:1], times[:2]]
    assert sessions["timestamp"][:] == [1 * HOUR, 2 * HOUR] and sessions["user_features"][:] == [user, user]
    cases = evaluation_cases(split, feed, args)
    expected = {"user_id": [1], "history_item_ids": [[1, 2, 3]], "history_feedback": [feedback]}
    expected |= {"history_timestamps": [times], "user_features": [user], "next_item_id": [4], "timestamp": [5 * HOUR]}
    assert cases[:] == expected
    users = user_histories(split.fit, feed, args)
    assert users["timestamp"][:] == [3 * HOUR] * 2 and users["history_timestamps"][:] == [times, [3 * HOUR]]
    assert users["user_features"][1] == {"age": "20", "sex": "f"}
    with pytest.raises(DataError, match="no user column 'city'; there are sex, age"):
        pretraining_sessions(split.fit, feed, DataArguments(user_features=["city"]))
    with pytest.raises(DataError, match="no feedback column 'share'"):
        pretraining_sessions(split.fit, feed, DataArguments(history_feedback=["share"]))


def test_string_ids():
    frame = pd.DataFrame({"user_id": list("aabb"), "item_id": ["x", "y", "y", "x"], "timestamp": [0, 1, 2, 3]})
    feed = Feed.from_frames("tiny", [(frame, "log")], (pd.DataFrame({"item_id": ["x", "y"]}), "items"), [])
    sessions = pretraining_sessions(feed.interactions, feed, DataArguments())
    assert sessions["history_item_ids"][:] == [["x"], ["y"]] and sessions["user_id"][:] == ["a", "b"]


def test_text_may_be_longer_than_32_bits_count():
    frame = pd.DataFrame({"user_id": list("aabb"), "item_id": ["x", "y", "y", "x"], "timestamp": [0, 1, 2, 3]})
    feed = Feed.from_frames("tiny", [(frame, "log")], (pd.DataFrame({"item_id": ["x", "y"]}), "items"), [])
    feed.users = pd.DataFrame({"user_id": ["a", "b"], "sex": ["f", "m"]})
    args = DataArguments(user_features=["sex"], test_start="1970-01-01T00:00:03+00:00", min_history_items=1)
    split = split_feed(feed, args)
    for table in (
        pretraining_sessions(feed.interactions, feed, args),
        user_histories(feed.interactions, feed, args),
        evaluation_cases(split, feed, args),
        user_exposures(feed.interactions, feed, 2),
    ):
        schema = str(table.features.arrow_schema.remove_metadata())
        assert "large_string" in schema and "string" not in schema.replace("large_string", "")
    lists = list_array(pa.array(["x", "y"]), np.array([0, 1]), np.array([2, 1]))
    assert lists.to_pylist() == [["x", "y"], ["y"]] and lists.type.value_type == pa.large_string()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("dataset", "kuairnd", "kuairand"),
        ("session_cut", "day", "user_day"),
        ("quality_join", "or", "any, all"),
        ("session_items", 0, "at least 1"),
        ("min_session_items", 9, "session_items=5"),
        ("test_start", "yesterday", "ISO"),
    ],
)
def test_arguments_name_what_is_allowed(field, value, expected):
    with pytest.raises(ValueError, match=expected):
        DataArguments(**{field: value})


def test_arguments_need_what_the_data_set_needs():
    with pytest.raises(ValueError, match="needs column_mapping"):
        DataArguments(dataset="table", data_dir="somewhere")
    moment = datetime.datetime(2022, 5, 7, tzinfo=datetime.timezone(datetime.timedelta(hours=8)))
    assert DataArguments(test_start=moment).test_start == "2022-05-07T00:00:00+08:00"
