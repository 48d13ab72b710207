"""Offline evaluation (Table 1, and what it leaves out): item-level metrics, judges, baselines and the report."""

from .alignment_report import last_kept
from .baselines import EASE, Baseline, ItemKNN, Popularity
from .bootstrap import bootstrap_interval, coverage_change, percentile_interval, relative_change, resampled_means
from .counterfactual import LoggedFeedback, PolicyOnLog, exposure_shares
from .policy_comparison import comparison_figure, comparison_table
from .policy_results import PolicyResults, popular_item_share, popular_items
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
from .report import print_table, write_report
from .sasrec import SASRec
from .session_judges import REWARD, judge_by_model, judge_by_truth, mean_and_max, scalar_of

__all__ = [
    "COVERAGE_CUTOFF",
    "EASE",
    "REWARD",
    "Baseline",
    "ItemKNN",
    "LoggedFeedback",
    "PolicyOnLog",
    "PolicyResults",
    "Popularity",
    "SASRec",
    "bootstrap_interval",
    "comparison_figure",
    "comparison_table",
    "coverage_change",
    "duplicate_rate",
    "exposure_shares",
    "illegal_rate",
    "intra_session_diversity",
    "judge_by_model",
    "judge_by_truth",
    "last_kept",
    "mean_and_max",
    "percentile_interval",
    "popular_item_share",
    "popular_items",
    "print_table",
    "rank_items",
    "ranking_metrics",
    "relative_change",
    "resampled_means",
    "scalar_of",
    "sessions_of_ranking",
    "user_metrics",
    "write_report",
]
