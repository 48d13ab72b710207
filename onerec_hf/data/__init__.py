"""Data: from raw logs to sessions with histories (paper, 3.1 and 3.2)."""

from .data_arguments import DataArguments
from .exposures import exposure_runs, feedback_signals, signal_names, user_exposures, with_user_exposures
from .feed import Feed, FeedbackPredicate, SessionSimulator, positive_mask
from .public_sets import (
    read_amazon_reviews,
    read_eb_nerd,
    read_kuairec,
    read_mind,
    read_movielens,
    read_otto,
    read_yambda,
)
from .readers import (
    as_feed,
    feed_from_log,
    load_feed,
    load_saved_feed,
    read_amazon,
    read_hub_dataset,
    read_kuairand,
    read_table,
    save_feed,
    source_files,
)
from .schema import DataError, feedback_columns, interaction_features, item_features
from .sessions import FeedSplit, evaluation_cases, exposure_sessions, pretraining_sessions, split_feed, user_histories
from .simulated_feed import SimulatedFeed, SimulatedFeedParameters
