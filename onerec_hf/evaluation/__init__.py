"""Offline evaluation (Table 1, and what it leaves out): item-level metrics, baselines and the report."""

from .baselines import EASE, Baseline, ItemKNN, Popularity
from .bootstrap import bootstrap_interval, coverage_change, percentile_interval, relative_change, resampled_means
from .ranking_metrics import (
    duplicate_rate,
    illegal_rate,
    intra_session_diversity,
    rank_items,
    ranking_metrics,
    user_metrics,
)
from .report import print_table, write_report
from .sasrec import SASRec

__all__ = [
    "EASE",
    "Baseline",
    "ItemKNN",
    "Popularity",
    "SASRec",
    "bootstrap_interval",
    "coverage_change",
    "duplicate_rate",
    "illegal_rate",
    "intra_session_diversity",
    "percentile_interval",
    "print_table",
    "rank_items",
    "ranking_metrics",
    "relative_change",
    "resampled_means",
    "user_metrics",
    "write_report",
]
