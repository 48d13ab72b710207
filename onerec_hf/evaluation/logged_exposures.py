"""A log's exposures in the form in which policies are estimated on them."""

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

from ..data.schema import PROPENSITY
from ..reward import SessionScorer, objective_labels
from ..reward.reward_objectives import DURATION
from .counterfactual import LoggedFeedback, exposure_shares
from .session_judges import REWARD, judge_by_model, scalar_of

LOG_EXPOSURES = 8  # of a user, the first ones: the model's view of them is as old as the period's beginning


class LoggedExposures:
    """The first exposures, good or bad, of users in the evaluated period, beside their histories before it.

    Users are drawn from all who were shown anything, not from the evaluation's, whom a later positive behaviour has
    chosen.

    Args:
        users: rows of [`index_sessions`] with `user_id`, `history` and what the scorer reads, as of the end of the
            fitted period; others are left out of the log.
        shown: the evaluated period's exposures, a user's together and in order of time: `user_id`, `item_id` and the
            feedback columns that the scorer's objectives need. What is missing or NaN is unknown. With a `propensity`
            that is known of any, those of which it is are the log; others were chosen by who knows what.
        earlier_items: catalogue indices of the exposures before, whose shares are the propensities where none is
            known.
        scorer: the model of the feedback, and whose objectives are labelled.
        clip: largest weight of an exposure.
        max_users: so many users at most, drawn by `seed`.

    Attributes:
        rows: the U users' rows.
        items: (U, K) catalogue indices of what was shown, -1 for nothing.
        feedback: its [`LoggedFeedback`]: labels of every objective, and of the scalar where all that it counts have
            labels.
    """

    def __init__(
        self,
        users: Dataset,
        shown: pd.DataFrame,
        earlier_items: np.ndarray,
        scorer: SessionScorer,
        clip: float = 20.0,
        max_users: int = 4000,
        seed: int = 0,
    ):
        self.scorer, tokenizer = scorer, scorer.tokenizer
        known_chances = PROPENSITY in shown and bool(shown[PROPENSITY].notna().any())
        if known_chances:
            shown = shown[shown[PROPENSITY].notna()]
        user_row = shown["user_id"].map(pd.Series(np.arange(len(users)), index=users["user_id"][:]))
        known = np.unique(user_row.dropna()).astype(np.int64)
        chosen = np.sort(np.random.default_rng(seed).permutation(known)[:max_users])
        self.rows = users.select(chosen).to_list()
        place, within = pd.Index(chosen).get_indexer(user_row), shown.groupby("user_id").cumcount().to_numpy()
        early = (place >= 0) & (within < LOG_EXPOSURES)
        shown, spot = shown[early], (place[early], within[early])

        self.items = np.full((len(chosen), LOG_EXPOSURES), -1)
        self.items[spot] = tokenizer.item_index(shown["item_id"])
        propensities = np.full(self.items.shape, np.nan)
        if known_chances:
            propensities[spot] = shown[PROPENSITY]
        else:
            propensities[spot] = exposure_shares(earlier_items, len(tokenizer.item_ids))[self.items[spot]]
        labels = {}
        for name, values in exposure_labels(scorer, shown).items():
            labels[name] = np.full(self.items.shape, np.nan)
            labels[name][spot] = values
        predicted = judge_by_model(scorer, self.rows, torch.from_numpy(self.items)[..., None])
        self.feedback = LoggedFeedback(propensities, labels, predicted, clip, known_chances)


def exposure_labels(scorer: SessionScorer, shown: pd.DataFrame) -> dict[str, np.ndarray]:
    """Labels of exposures, as of sessions of one item: by objective (rows,), NaN where unknown, the scalar reward
    first where all that it counts have labels.

    Args:
        scorer: whose objectives are labelled.
        shown: its feedback columns that the objectives need; what is missing is unknown.
    """
    objectives = scorer.model.config.objectives
    columns = list(dict.fromkeys([DURATION, *(objective["source"] for objective in objectives)]))
    feedback = shown.reindex(columns=columns).to_numpy(dtype=np.float64)
    # In the precision of the labels that the reward model is trained on.
    found = objective_labels(objectives, feedback, columns, np.arange(len(shown))[:, None]).astype(np.float32)
    labels = {name: found[:, index] for index, name in enumerate(scorer.objectives)}
    reward = scalar_of(scorer, labels)
    return labels if reward is None else {REWARD: reward, **labels}
