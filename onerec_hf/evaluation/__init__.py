"""Offline evaluation (Table 1, and what it leaves out): item-level metrics, judges, baselines, estimates on a log.

It measures; `onerec_hf.reporting` shows what was measured.
"""

import importlib
import warnings

from .alignment_checks import AlignmentChecks
from .baselines import EASE, Baseline, CatalogueTooLargeError, ItemKNN, Popularity
from .bootstrap import bootstrap_interval, coverage_change, percentile_interval, relative_change, resampled_means
from .cascade import RANKERS, cascade_sessions, oracle_sessions
from .counterfactual import LoggedFeedback, PolicyOnLog, exposure_shares
from .fused import Fused
from .logged_exposures import LoggedExposures
from .policy_evaluator import CUTOFFS, EvaluationOptions, PolicyEvaluator
from .policy_results import PolicyResults, last_kept, popular_item_share, popular_items
from .ranked_sessions import sessions_of_ranking
from .ranking_metrics import (
    COVERAGE_CUTOFF,
    duplicate_rate,
    illegal_rate,
    intra_session_diversity,
    rank_items,
    ranking_metrics,
    user_metrics,
)
from .replay import Replay
from .sasrec import SASRec
from .served_sessions import ServedMethod, ServedSessions, add_oracle_shares
from .session_judges import REWARD, judge_by_model, judge_by_truth, mean_and_max, scalar_of

_MOVED_TO_REPORTING = ("comparison_figure", "comparison_table", "print_table", "write_report")


def __getattr__(name: str):
    if name not in _MOVED_TO_REPORTING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} has moved to onerec_hf.reporting", FutureWarning, stacklevel=2)
    return getattr(importlib.import_module("onerec_hf.reporting"), name)
