"""What a run reads and how it is cut into sessions: defined once, for every stage."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg

# Read from a folder by a reader of their own.
FOLDER_SETS = (
    *("kuairand", "amazon", "amazon_reviews", "movielens", "yambda"),
    *("mind", "eb_nerd", "kuairec", "otto"),
)
CHOICES = {
    "dataset": ("simulated", *FOLDER_SETS, "table", "hub"),
    "repeated_positives": ("keep", "first", "first_in_a_row"),
    "session_source": ("positive", "exposed"),
    "session_cut": ("consecutive", "gap", "user_day", "session_id"),
    "quality_join": ("any", "all"),
    "split_method": ("time", "leave_one_out"),
    "evaluation_split": ("test", "validation"),
}


def option(default: Any, text: str) -> Any:
    """Field of a class of arguments: its default, and its text in `--help`."""
    return HfArg(default=default, help=text)


@dataclass
class DataArguments:
    """Data, sessions and split. Fields are plain, for `transformers.HfArgumentParser` and `trl.TrlParser`.

    Raises:
        ValueError: a value that is not allowed; the message lists those that are.
    """

    dataset: str = option(
        "simulated",
        f"Where the data comes from: simulated, a public set ({', '.join(FOLDER_SETS)}), table (CSV or Parquet) or "
        "hub.",
    )
    data_dir: str | None = option(None, "Folder of the data files, for public sets and table.")
    column_mapping: str | None = option(None, "YAML file that maps your columns to the schema, for table and hub.")
    hub_dataset: str | None = option(None, "Hub dataset repository id, for hub.")
    simulated_users: int = option(2000, "Users of the simulated world.")
    simulated_items: int = option(2000, "Items of the simulated world.")
    data_seed: int = option(0, "Seed of the simulated world.")
    positive_feedback: list[str] | None = option(
        None,
        "Feedback that makes a behaviour positive, any of: a column (more than 0) or a comparison such as "
        "watch_time>=60. Default: the data set's own.",
    )
    repeated_positives: str = option(
        "keep",
        "What stays of a user's positive behaviours with the same item: all (keep), the first, or the first of those "
        "in a row (first_in_a_row). What is not positive stays.",
    )
    history_items: int = option(256, "n: latest positive behaviours that make a history (paper, 3.1: 256).")
    session_items: int = option(5, "m: items of a session (paper, 3.2: 5).")
    history_feedback: list[str] | None = option(
        None,
        "Feedback that the encoder reads with each behaviour, written like positive_feedback, e.g. like "
        "'watch_time>=60'. Default: none.",
    )
    history_timestamps: bool = option(
        False, "Whether the encoder reads how long before the recommendation each behaviour was."
    )
    user_features: list[str] | None = option(
        None, "Categorical columns of the users that the encoder reads. Default: none."
    )
    min_history_items: int = option(1, "Shortest history of a session or evaluated user.")
    min_session_items: int = option(1, "Shortest session that is kept.")
    session_source: str = option(
        "positive", "Cut target sessions from positive behaviours (positive) or from all exposures (exposed)."
    )
    session_cut: str = option(
        "consecutive",
        "What makes a session: consecutive (session_items in a row), gap (of session_gap_hours), user_day "
        "or session_id (given by the data). Sessions longer than session_items are cut into several. Behaviours "
        "without a time, or without a session_id, are cut by consecutive.",
    )
    session_gap_hours: float = option(6.0, "Inactivity [h] that ends a session, for gap.")
    session_stride: int | None = option(
        None, "For consecutive: behaviours from one session's start to the next. Default: session_items."
    )
    quality_predicates: list[str] | None = option(
        None,
        "Keep sessions whose totals satisfy these, e.g. 'watch_time>=60' like follow (paper, 3.2). Default: keep all.",
    )
    quality_join: str = option("any", "Whether any or all quality predicates must hold.")
    split_method: str = option(
        "time", "time, or leave_one_out (each user's last items; for benchmarks: the future leaks)."
    )
    validation_start: str | None = option(
        None, "ISO date-time, e.g. 2022-05-05T00:00+08:00. Default: the 0.8 quantile of the times."
    )
    test_start: str | None = option(None, "ISO date-time. Default: the 0.9 quantile of the times.")
    evaluation_split: str = option(
        "test", "Period that is evaluated, test or validation; everything before it is fitted, but see fit_validation."
    )
    fit_validation: bool | None = option(
        None,
        "Whether the validation period is fitted where test is evaluated. If not, the evaluated users' histories hold "
        "it all the same. Default: with time as a service would, with leave_one_out not, as the literature has it.",
    )

    num_partitions: int | None = option(
        None,
        "For logs that memory does not hold: prepare them in so many partitions of whole users, about 2 million rows "
        "each, with DuckDB (pip install 'onerec_hf[large]'). Of dataset table the log is never in memory; other data "
        "sets are read as ever. Default: the whole log in memory.",
    )
    partition_workers: int = option(1, "Processes that share the partitions, each with one of them in memory.")
    update_since: str | None = option(
        None,
        "ISO date-time: train on the sessions and exposures since then, and on replay_share of the earlier ones. "
        "Default: on all; with previous_run, the start of the period that it was evaluated on.",
    )
    replay_share: float = option(
        0.5, "Share of earlier sessions and exposures among those of an update, drawn by data_seed; 1: all of them."
    )
    replay_days: float | None = option(
        None,
        "Of the earlier sessions and exposures, those of so many days before update_since alone. Default: all; with "
        "previous_run, those of recent_days where that is given.",
    )

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; use one of {', '.join(allowed)}.")
        smallest = {"simulated_users": 2, "simulated_items": 2, "history_items": 1, "session_items": 1}
        smallest |= {"min_history_items": 0, "min_session_items": 1, "session_stride": 1, "data_seed": 0}
        smallest |= {"num_partitions": 1, "partition_workers": 1}
        for name, least in smallest.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be at least {least}.")
        if self.num_partitions is not None and self.update_since is not None and 0 < self.replay_share < 1:
            raise ValueError(
                f"num_partitions={self.num_partitions} does not go with replay_share={self.replay_share}, which is "
                "drawn from the whole log. Set replay_share to 1, with replay_days for all of so many days, or to 0."
            )
        if not self.session_gap_hours > 0:
            raise ValueError(f"session_gap_hours={self.session_gap_hours} is not allowed; it must be more than 0.")
        if not 0 <= self.replay_share <= 1:
            raise ValueError(f"replay_share={self.replay_share} is not allowed; it must lie in [0, 1].")
        if self.replay_days is not None and not self.replay_days > 0:
            raise ValueError(f"replay_days={self.replay_days} is not allowed; it must be more than 0.")
        if self.min_session_items > self.session_items:
            raise ValueError(
                f"min_session_items={self.min_session_items} is more than session_items={self.session_items}, the "
                "longest session: no session would be kept."
            )
        if self.min_history_items > self.history_items:
            raise ValueError(
                f"min_history_items={self.min_history_items} is more than history_items={self.history_items}."
            )
        needed = {name: ["data_dir"] for name in FOLDER_SETS}
        needed |= {"table": ["data_dir", "column_mapping"], "hub": ["hub_dataset", "column_mapping"]}
        for name in needed.get(self.dataset, []):
            if getattr(self, name) is None:
                raise ValueError(f"dataset={self.dataset!r} needs {name}: give --{name}.")
        for name in ("validation_start", "test_start", "update_since"):
            value = getattr(self, name)
            if isinstance(value, datetime.date):  # which an unquoted date in YAML is
                setattr(self, name, value.isoformat())
            elif value is not None:
                try:
                    datetime.datetime.fromisoformat(value)
                except (TypeError, ValueError):
                    text = f"{name}={value!r} is not an ISO date-time such as 2022-05-05T00:00+08:00."
                    raise ValueError(text) from None
        if self.positive_feedback is not None:
            self.positive_feedback = [str(condition) for condition in self.positive_feedback]

    @property
    def fitted_until(self) -> str:
        """The period, validation or test, before which everything is fitted."""
        fits_validation = self.split_method == "time" if self.fit_validation is None else self.fit_validation
        return self.evaluation_split if fits_validation else "validation"
