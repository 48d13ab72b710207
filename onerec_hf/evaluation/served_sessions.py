"""The one session that a user is served, by any method: what the judges and the log say of it, and what it costs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from .bootstrap import bootstrap_interval
from .policy_evaluator import TRUTH, PolicyEvaluator
from .policy_results import popular_item_share
from .ranking_metrics import intra_session_diversity
from .replay import Replay
from .session_judges import REWARD

ONEREC, CASCADE, ORACLE = "onerec", "cascade", "oracle"
BEAMS, DIVERSE_BEAMS, RANKED_LIST = "beam", "diverse_beam", "ranked_list"
BEST_SESSION = "best_session"


@dataclass(frozen=True)
class ServedMethod:
    """How sessions came about; None for what a method does not have.

    Args:
        method: `onerec`; `cascade`; a baseline's name, whose first ranked items are served; `oracle`, which builds
            sessions by the simulated truth.
        retriever: what finds the candidates: of a cascade or a baseline what ranks items, of OneRec `beam`,
            `diverse_beam` or its own `ranked_list`.
        candidates: how many of them the reward model sees, items of a cascade and sessions of OneRec.
        ranker: what the reward model does with them: `item` or `session` (see [`cascade_sessions`]), or, of whole
            sessions, `best_session`, which takes the one of highest reward.
        guided: whether the reward model takes part in OneRec's search itself.
        guidance_weight: what a reward of 1 is worth there, in nats an item.
        round: of alignment, of which OneRec's model is.
    """

    method: str
    retriever: str | None = None
    candidates: int | None = None
    ranker: str | None = None
    guided: bool = False
    round: int | None = None
    guidance_weight: float | None = None

    @property
    def name(self) -> str:
        """Of a file."""
        parts = [self.method, self.retriever if self.retriever != self.method else None]
        parts += [self.candidates, self.ranker, "guided" if self.guided else None]
        parts += [None if self.round is None else f"round_{self.round}"]
        parts += [None if self.guidance_weight is None else f"weight_{self.guidance_weight:g}"]
        return "_".join(str(part) for part in parts if part is not None)


class ServedSessions:
    """Judges what methods serve to the judged users of an evaluator.

    Args:
        evaluator: with one judge at least.
        following: of each judged user the next positive items (catalogue indices), as many as a session has at most.
        replay: the log's answers to these users' sessions; None where the period shows what was positive alone.
    """

    def __init__(self, evaluator: PolicyEvaluator, following: Sequence[np.ndarray], replay: Replay | None = None):
        self.evaluator, self.following, self.replay = evaluator, following, replay

    def entry(self, method: ServedMethod, sessions: torch.LongTensor, milliseconds: float | None) -> dict[str, Any]:
        """An entry of "served" in metrics.json, which `reporting.metrics_schema` describes.

        Args:
            sessions: (judged users, m) catalogue indices, -1 for nothing.
            milliseconds: that the method takes for a user.
        """
        evaluator = self.evaluator
        recall = np.array([np.isin(*pair).mean() for pair in zip(self.following, sessions.numpy(), strict=True)])
        judges = {}
        for judge, values in evaluator.judge(sessions[:, None]).items():
            rewards = values[REWARD][:, 0] if REWARD in values else np.array([np.nan])
            if not np.isnan(rewards).all():
                judges[judge] = {REWARD: float(np.nanmean(rewards)), "interval": list(bootstrap_interval(rewards))}
        return {
            **asdict(method),
            "recall": float(recall.mean()),
            "recall_interval": list(bootstrap_interval(recall)),
            "coverage": len(torch.unique(sessions[sessions >= 0])) / evaluator.trie.num_items,
            "diversity": _known_mean(intra_session_diversity(sessions, evaluator.item_embeddings)),
            "popular_item_share": _known_mean(popular_item_share(sessions, evaluator.popular)),
            "milliseconds": milliseconds,
            "judges": judges,
            "replay": None if self.replay is None else self.replay.of(sessions),
        }


def add_oracle_shares(entries: Sequence[dict[str, Any]]) -> None:
    """Where there is an oracle, adds `oracle_share` to the entries that the truth judges: how much of the way from the
    first popular items (0) to the oracle (1) their sessions are."""
    known = [entry for entry in entries if TRUTH in entry["judges"]]
    ends = [entry for name in ("popularity", ORACLE) for entry in known if entry["method"] == name]
    if len(ends) == 2:
        low, high = (entry["judges"][TRUTH][REWARD] for entry in ends)
        for entry in known:
            entry["oracle_share"] = (entry["judges"][TRUTH][REWARD] - low) / (high - low)


def _known_mean(values: np.ndarray | float) -> float | None:
    """None where nothing was served: JSON has no NaN."""
    known = np.asarray(values)[~np.isnan(values)]
    return float(known.mean()) if known.size else None
