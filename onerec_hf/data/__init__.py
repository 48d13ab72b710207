"""Data: from raw logs to sessions with histories and labels (paper, 3.1 and 3.2)."""

from .data_arguments import DataArguments
from .exposures import exposure_runs, feedback_signals, signal_names, user_exposures
from .feed import Feed, FeedbackPredicate, positive_mask
from .readers import (
    load_feed,
    load_saved_feed,
    read_amazon,
    read_hub_dataset,
    read_kuairand,
    read_table,
    save_feed,
)
from .schema import (
    SESSION_LABELS,
    DataError,
    feedback_columns,
    interaction_features,
    item_features,
)
from .sessions import (
    FeedSplit,
    evaluation_cases,
    exposure_sessions,
    pretraining_sessions,
    session_labels,
    split_feed,
    user_histories,
)
from .simulated_feed import SimulatedFeed, SimulatedFeedParameters

__all__ = [
    "SESSION_LABELS",
    "DataArguments",
    "DataError",
    "Feed",
    "FeedSplit",
    "FeedbackPredicate",
    "SimulatedFeed",
    "SimulatedFeedParameters",
    "evaluation_cases",
    "exposure_runs",
    "exposure_sessions",
    "feedback_columns",
    "feedback_signals",
    "interaction_features",
    "item_features",
    "load_feed",
    "load_saved_feed",
    "positive_mask",
    "pretraining_sessions",
    "read_amazon",
    "read_hub_dataset",
    "read_kuairand",
    "read_table",
    "save_feed",
    "session_labels",
    "signal_names",
    "split_feed",
    "user_exposures",
    "user_histories",
]
