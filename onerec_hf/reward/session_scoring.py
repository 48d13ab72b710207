"""Rewards of whole sessions given as catalogue indices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..tokenization_onerec import OneRecTokenizer
from .modeling_onerec_reward import OneRecRewardModel

# Columns that the reward model reads of a row beside its history, where a data set has them.
REWARD_FEATURES: tuple[str, ...] = ()


@dataclass
class SessionScores:
    """
    Reward model's estimates of C candidate sessions of each of B users, on the CPU.

    Args:
        reward (`torch.FloatTensor` of shape `(B, C)`): Weighted sum of the objectives; NaN for an empty session.
        probabilities (`torch.FloatTensor` of shape `(B, C, O)`): One for each objective; NaN for an empty session.
    """

    reward: torch.FloatTensor
    probabilities: torch.FloatTensor


def item_code_ids(items: Sequence[Sequence[int]], item_token_ids: torch.LongTensor, pad_token_id: int = 0):
    """
    Code token ids of lists of items.

    Args:
        items (`Sequence[Sequence[int]]`): B lists of catalogue indices; they may be empty.
        item_token_ids (`torch.LongTensor` of shape `(N, L)`): The tokenizer's code token ids of each item.
        pad_token_id (`int`): Fills the rows after a list's end.

    Returns:
        `torch.LongTensor` of shape `(B, n, L)`, n the longest list's length, at least 1.
    """
    width = max(1, max((len(row) for row in items), default=1))
    indices = np.full((len(items), width), -1, dtype=np.int64)
    for row, values in zip(indices, items, strict=True):
        row[: len(values)] = values
    return _gather_codes(torch.from_numpy(indices), item_token_ids, pad_token_id)


def _gather_codes(indices: torch.LongTensor, item_token_ids: torch.LongTensor, pad_token_id: int) -> torch.LongTensor:
    if indices.numel() and (indices.max() >= len(item_token_ids) or indices.min() < -1):
        raise ValueError(
            f"Catalogue indices must lie in 0..{len(item_token_ids) - 1}, got {int(indices.min())}.."
            f"{int(indices.max())}: the sessions come from another catalogue than the tokenizer."
        )
    codes = item_token_ids[indices.clamp(min=0)]
    return codes.masked_fill((indices < 0)[..., None], pad_token_id)


class SessionScorer:
    """
    A reward model with what turns rows and sessions of catalogue indices into its tensors.

    Args:
        model (`OneRecRewardModel`): The judge.
        tokenizer (`OneRecTokenizer`): Tokenizer of the codes it was trained on.
    """

    def __init__(self, model: OneRecRewardModel, tokenizer: OneRecTokenizer):
        self.model, self.tokenizer = model, tokenizer
        self._item_token_ids = tokenizer.item_token_ids.cpu()

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device | None = None) -> "SessionScorer":
        """Reward model and tokenizer of a folder or Hub repository that holds both."""
        scorer = cls(OneRecRewardModel.from_pretrained(source).eval(), OneRecTokenizer.from_pretrained(source))
        return scorer if device is None else scorer.to(device)

    @property
    def objectives(self) -> list[str]:
        return self.model.config.objectives

    def to(self, device: str | torch.device) -> "SessionScorer":
        self.model.to(device)
        return self

    def scalar(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The reward `(...)` of objectives' probabilities `(..., O)`, such as a simulated feed's true ones."""
        weights = torch.tensor(
            self.model.config.objective_weights, dtype=probabilities.dtype, device=probabilities.device
        )
        return (probabilities * weights).sum(-1)

    @torch.no_grad()
    def score(
        self,
        rows: Sequence[Mapping[str, Any]],
        sessions: torch.LongTensor,
        batch_size: int = 32,
        progress: bool = False,
    ) -> SessionScores:
        """
        Score candidate sessions, each user's history encoded once. The model's training mode is left as it was.

        Args:
            rows (`Sequence[Mapping]`): B rows of [`index_sessions`] tables: `history` (catalogue indices, oldest
                first; the latest `model.config.history_items` are used) and, where the data has them, the columns of
                `REWARD_FEATURES`. Other columns are passed over.
            sessions (`torch.LongTensor` of shape `(B, C, m)`): Catalogue indices, -1 where there is no item.
            batch_size (`int`): Users scored at once.
            progress (`bool`): Whether to show a progress bar.

        Raises:
            ValueError: if the catalogue indices are not the tokenizer's, or there is not one row for each user.
        """
        if len(rows) != len(sessions):
            raise ValueError(f"Got {len(rows)} rows for {len(sessions)} users' sessions: give one for each.")
        was_training = self.model.training
        self.model.eval()
        limit, pad = self.model.config.history_items, self.model.config.pad_token_id
        sessions = sessions.cpu()
        reward, probabilities = [], []
        for start in tqdm(range(0, len(rows), batch_size), desc="scoring sessions", disable=not progress):
            batch = slice(start, start + batch_size)
            histories = [row["history"][-limit:] for row in rows[batch]]
            history_ids = item_code_ids(histories, self._item_token_ids, pad)
            session_ids = _gather_codes(sessions[batch], self._item_token_ids, pad)
            device = self.model.device
            output = self.model(history_ids=history_ids.to(device), session_ids=session_ids.to(device))
            empty = (sessions[batch] < 0).all(-1)
            reward.append(output.reward.float().cpu().masked_fill(empty, torch.nan))
            probabilities.append(output.probabilities.float().cpu().masked_fill(empty[..., None], torch.nan))
        self.model.train(was_training)
        if not reward:
            shape = tuple(sessions.shape[:2])
            return SessionScores(torch.empty(shape), torch.empty(*shape, len(self.objectives)))
        return SessionScores(reward=torch.cat(reward), probabilities=torch.cat(probabilities))
