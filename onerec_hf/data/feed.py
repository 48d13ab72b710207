"""A feed: the interactions of users with a catalogue of items, and what its columns mean."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import pandas as pd
from datasets import Features

from .schema import (
    DataError,
    canonical_interactions,
    canonical_items,
    canonical_users,
    check_known_items,
    feedback_columns,
    id_type,
    interaction_features,
    item_features,
    order_interactions,
    require_users,
    same_kind,
    user_features,
)

PREDICATE = re.compile(r"^\s*([A-Za-z_]\w*)\s*(?:(>=|<=|==|>|<)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?))?\s*$")
COMPARISONS = {">=": np.greater_equal, "<=": np.less_equal, "==": np.equal, ">": np.greater, "<": np.less}


@dataclass(frozen=True)
class FeedbackPredicate:
    """A condition on one feedback column: "like" (more than 0) or a comparison such as "watch_time>=60"."""

    column: str
    comparison: str
    threshold: float

    @classmethod
    def parse(cls, text: str, columns: list[str]) -> FeedbackPredicate:
        """Reads `text`. Raises DataError if it is not such a condition or its column is not among `columns`."""
        match = PREDICATE.match(text)
        if match is None:
            raise DataError(
                f"'{text}' is not a feedback condition: write a column, or a comparison like watch_time>=60."
            )
        column, comparison, threshold = match.groups()
        if column not in columns:
            raise DataError(
                f"'{text}': there is no feedback column '{column}'; there are {', '.join(columns) or 'none'}."
            )
        return cls(column, comparison or ">", float(threshold or 0))

    def holds(self, values: np.ndarray) -> np.ndarray:
        """Elementwise, bool; an unknown (NaN) value does not satisfy any condition."""
        return COMPARISONS[self.comparison](values, self.threshold) & ~np.isnan(values)


@runtime_checkable
class SessionSimulator(Protocol):
    """A world that answers what a feed's users would do with any session, and so judges policies by truth."""

    def expected_feedback(self, user_ids: np.ndarray, session_item_ids: np.ndarray) -> dict[str, np.ndarray]:
        """What these users are expected to do with these sessions.

        Args:
            user_ids: (B,), ids of the feed.
            session_item_ids: (B, C, m) or (B, m) ids of the feed in the order of exposure, -1 where there is no item.

        Returns:
            By the objective's name (the paper's are swt, vtr, wtr and ltr, of which any may be left out), float64
            (B, C) or (B,) in [0, 1], NaN for a session with a place of no item.
        """


@dataclass(frozen=True)
class WholeLog:
    """What is known of a whole log, for a feed that holds a part of its users.

    Args:
        first_time, last_time: of all rows [s], None where no row has a time.
        quantiles: of the times [s], where the periods "validation" and "test" begin by default.
        has_session_ids: whether any row has one.
        latest_before: the last time [s] before each of the periods that a split names, where histories need it.
    """

    first_time: float | None
    last_time: float | None
    quantiles: dict[str, float]
    has_session_ids: bool
    latest_before: dict[str, float | None] = field(default_factory=dict)

    @property
    def is_timed(self) -> bool:
        return self.last_time is not None


@dataclass
class Feed:
    """Interactions and items in the canonical schema (see schema.py).

    Args:
        name: of the data set.
        interactions: sorted by user, then position.
        items: in catalogue order; `item_id` is the first column.
        positive_feedback: conditions (see FeedbackPredicate), any of which makes a behaviour positive; none: every
            interaction is positive.
        text_column, categorical_columns, multi_categorical_columns, numeric_columns, embedding_column: of the items.
        image_column: of the items, the pictures' URLs, for readers alone.
        timezone: IANA name of the time zone whose midnight separates the days of a user.
        world: knows the truth, for simulated data: a SimulatedFeed, or any other SessionSimulator.
        users: categories of the users, where the data has them; `user_id` is the first column.
        whole: what is known of the log where `interactions` are those of some users alone, who may be none.
    """

    name: str
    interactions: pd.DataFrame
    items: pd.DataFrame
    positive_feedback: list[str]
    text_column: str | None = None
    categorical_columns: list[str] = field(default_factory=list)
    multi_categorical_columns: list[str] = field(default_factory=list)
    numeric_columns: list[str] = field(default_factory=list)
    embedding_column: str | None = None
    image_column: str | None = None
    timezone: str = "UTC"
    world: SessionSimulator | None = None
    users: pd.DataFrame | None = None
    whole: WholeLog | None = None

    def __post_init__(self):
        positive_mask(self.interactions[:0], self.positive_feedback)
        if self.world is not None and not isinstance(self.world, SessionSimulator):
            raise DataError(
                f"{self.name}: a {type(self.world).__name__} cannot be the feed's world: it has no method "
                "expected_feedback(user_ids, session_item_ids)."
            )
        try:
            ZoneInfo(self.timezone)
        except (ValueError, ZoneInfoNotFoundError):
            raise DataError(
                f"{self.name}: timezone '{self.timezone}' is not known; give an IANA name such as Europe/Berlin "
                "(the package tzdata brings them where the system has none)."
            ) from None

    @classmethod
    def from_frames(
        cls,
        name: str,
        interactions: list[tuple[pd.DataFrame, str]],
        items: tuple[pd.DataFrame, str],
        positive_feedback: list[str],
        users: tuple[pd.DataFrame, str] | None = None,
        **columns,
    ) -> Feed:
        """Checks and joins frames that already carry the schema's column names.

        Args:
            interactions: (frame, the file's name for errors), in an order that breaks ties of time.
            items: (frame, the file's name).
            users: the same, if there is a table of users.
            columns: the roles of item columns, `timezone` and `world`, as in the class.

        Raises:
            DataError: see schema.py.
        """
        roles = {key: value for key, value in columns.items() if key not in ("timezone", "world")}
        sources = [source for _, source in interactions]
        parts = [canonical_interactions(frame, source) for frame, source in interactions]
        catalogue = canonical_items(*items, **roles)
        users = None if users is None else canonical_users(*users)
        # Of files without types, one may hold integers alone where another does not.
        for column, others in (("user_id", [users]), ("item_id", [catalogue]), ("session_id", [])):
            tables = [table for table in [*parts, *others] if table is not None and column in table]
            for table, ids in zip(tables, same_kind([table[column] for table in tables]), strict=True):
                table[column] = ids
        for part, source in zip(parts, sources, strict=True):
            check_known_items(part, catalogue, source, items[1])
        joined = parts[0] if len(parts) == 1 else pd.concat(parts, ignore_index=True)
        require_users(joined["user_id"].unique(), ", ".join(sources))
        ordered = order_interactions(joined)
        return cls(name, ordered, catalogue, list(positive_feedback), users=users, **columns)

    def item_roles(self) -> dict:
        """The roles of the item columns, as keyword arguments of `item_features` and `canonical_items`."""
        names = ("text_column", "categorical_columns", "multi_categorical_columns", "numeric_columns")
        return {name: getattr(self, name) for name in (*names, "embedding_column", "image_column")}

    def interaction_features(self) -> Features:
        return interaction_features(self.interactions)

    def item_features(self) -> Features:
        return item_features(self.items, **self.item_roles())

    def user_features(self) -> Features:
        return user_features(self.users)

    def item_name(self, index: int) -> str:
        """What a reader knows an item by, given its catalogue index: its text, what its feature columns say, or its
        id."""
        row = self.items.iloc[int(index)]
        if self.text_column is not None and not pd.isna(row[self.text_column]):
            return str(row[self.text_column])
        columns = [*self.multi_categorical_columns, *self.categorical_columns][:2]
        values = [", ".join(row[column]) if isinstance(row[column], list) else row[column] for column in columns]
        known = [
            (column, value) for column, value in zip(columns, values, strict=True) if not pd.isna(value) and value
        ]
        return "; ".join(f"{column} {value}" for column, value in known) or f"item {row['item_id']}"

    def positive_histories(self) -> list[np.ndarray]:
        """Catalogue indices of the positive behaviours of each user that has any, oldest first."""
        positive = self.interactions[positive_mask(self.interactions, self.positive_feedback)]
        users = positive["user_id"].to_numpy()
        items = pd.Index(self.items["item_id"]).get_indexer(positive["item_id"])
        return np.split(items, np.flatnonzero(users[1:] != users[:-1]) + 1) if len(items) else []

    def with_positive_feedback(self, positive_feedback: list[str]) -> Feed:
        """A copy with other conditions of a positive behaviour. Raises DataError for an unknown column."""
        return dataclasses.replace(self, positive_feedback=list(positive_feedback))

    def with_earlier_items(self, items: pd.DataFrame) -> Feed:
        """A copy whose catalogue begins with an earlier one, in its order; items of which the feed no longer knows
        anything are as they were.

        Raises:
            DataError: the ids are of another type than the feed's.
        """
        if id_type(items["item_id"]) != id_type(self.items["item_id"]):
            raise DataError(
                f"{self.name}: the ids of the items are {id_type(self.items['item_id'])}, and were "
                f"{id_type(items['item_id'])} in the earlier catalogue."
            )
        gone = items[~items["item_id"].isin(self.items["item_id"])].reindex(columns=self.items.columns)
        known = pd.concat([self.items, gone]) if len(gone) else self.items
        new = self.items["item_id"][~self.items["item_id"].isin(items["item_id"])]
        places = pd.Index(known["item_id"]).get_indexer([*items["item_id"], *new])
        return dataclasses.replace(self, items=known.iloc[places].reset_index(drop=True))

    def without_repeats(self, in_a_row: bool = False) -> Feed:
        """A copy in which a user's later positive behaviours with the same item are left out.

        Args:
            in_a_row: only those that follow one another, with no positive behaviour with another item between them.
        """
        positive = np.flatnonzero(positive_mask(self.interactions, self.positive_feedback))
        pairs = self.interactions[["user_id", "item_id"]].iloc[positive]
        if in_a_row:
            numbers = pairs.groupby(["user_id", "item_id"], sort=False).ngroup().to_numpy()
            repeats = np.diff(numbers, prepend=-1) == 0
        else:
            repeats = pairs.duplicated().to_numpy()
        kept = np.ones(len(self.interactions), dtype=bool)
        kept[positive[repeats]] = False
        interactions = self.interactions[kept].reset_index(drop=True)
        interactions["position"] = interactions.groupby("user_id").cumcount()
        return dataclasses.replace(self, interactions=interactions)


def positive_mask(interactions: pd.DataFrame, positive_feedback: list[str]) -> np.ndarray:
    """Bool, one a row: any of the conditions holds; every row if there are no conditions."""
    if not positive_feedback:
        return np.ones(len(interactions), dtype=bool)
    mask = np.zeros(len(interactions), dtype=bool)
    for text in positive_feedback:
        predicate = FeedbackPredicate.parse(text, feedback_columns(interactions))
        mask |= predicate.holds(interactions[predicate.column].to_numpy())
    return mask
