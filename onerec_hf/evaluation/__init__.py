"""Offline evaluation (Table 1, and what it leaves out): item-level metrics, baselines and the report."""

from .baselines import EASE, Baseline, ItemKNN, Popularity
from .ranking_metrics import (
    bootstrap_interval,
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
    "duplicate_rate",
    "illegal_rate",
    "intra_session_diversity",
    "print_table",
    "rank_items",
    "ranking_metrics",
    "user_metrics",
    "write_report",
]
