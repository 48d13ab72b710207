"""Replay: of what a method serves, the part that a log really showed to the same user, and how it went."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from ..reward import SessionScorer
from .bootstrap import bootstrap_interval
from .logged_exposures import exposure_labels


class Replay:
    """The exposures of users in the evaluated period, by which served sessions are replayed.

    Crude: the items of a session that were shown at all are few, were shown in other sessions, and were chosen by
    another policy. But it is nobody's opinion.

    Args:
        user_ids: (B,) the served users.
        shown: exposures of the evaluated period: `user_id`, `item_id` and the feedback columns that the scorer's
            objectives need; of an item that a user was shown again the first one counts.
        scorer: whose objectives are labelled, and whose tokenizer knows the items.
    """

    def __init__(self, user_ids: np.ndarray, shown: pd.DataFrame, scorer: SessionScorer):
        shown = shown[shown["user_id"].isin(user_ids)].drop_duplicates(["user_id", "item_id"])
        self.num_items, self.num_users = len(scorer.tokenizer.item_ids), len(user_ids)
        self._labels = exposure_labels(scorer, shown)
        rows = pd.Index(user_ids).get_indexer(shown["user_id"])
        self._keys = rows * self.num_items + scorer.tokenizer.item_index(shown["item_id"])

    def of(self, sessions: torch.LongTensor) -> dict[str, Any]:
        """`items`, how many of the sessions' (B, m) were shown to their user, and their `share`; and `feedback`, by
        objective with any label its mean by user, averaged over users, and the `interval` of that."""
        flat = sessions.numpy()
        served = np.where(flat >= 0, np.arange(self.num_users)[:, None] * self.num_items + flat, -1)
        found = pd.Index(self._keys).get_indexer(served.ravel()).reshape(served.shape)
        feedback = {}
        for name, labels in self._labels.items():
            known = np.append(labels, np.nan)[found]
            counts = (~np.isnan(known)).sum(1)
            if counts.any():
                with np.errstate(invalid="ignore"):
                    by_user = np.nansum(known, axis=1) / counts
                feedback[name] = {"mean": float(np.nanmean(by_user)), "interval": list(bootstrap_interval(by_user))}
        shown = int((found >= 0).sum())
        return {"items": shown, "share": shown / max(int((flat >= 0).sum()), 1), "feedback": feedback}
