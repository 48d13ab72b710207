"""Rewards of whole sessions given as catalogue indices."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from .modeling_onerec_reward import OneRecRewardModel


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


@torch.no_grad()
def score_sessions(
    model: OneRecRewardModel,
    item_token_ids: torch.LongTensor,
    histories: Sequence[Sequence[int]],
    sessions: torch.LongTensor,
    batch_size: int = 32,
    progress: bool = False,
) -> SessionScores:
    """
    Score candidate sessions, each user's history encoded once. The model's training mode is left as it was.

    Args:
        model (`OneRecRewardModel`): The judge.
        item_token_ids (`torch.LongTensor` of shape `(N, L)`): The tokenizer's code token ids of each item.
        histories (`Sequence[Sequence[int]]`): B histories of catalogue indices, oldest first; the latest
            `model.config.history_items` are used.
        sessions (`torch.LongTensor` of shape `(B, C, m)`): Catalogue indices, -1 where there is no item.
        batch_size (`int`): Users scored at once.
        progress (`bool`): Whether to show a progress bar.

    Raises:
        ValueError: if the catalogue indices are not the tokenizer's, or there is not one history for each user.
    """
    if len(histories) != len(sessions):
        raise ValueError(f"Got {len(histories)} histories for {len(sessions)} users' sessions: give one for each.")
    was_training = model.training
    model.eval()
    limit, pad = model.config.history_items, model.config.pad_token_id
    item_token_ids = item_token_ids.cpu()
    sessions = sessions.cpu()
    reward, probabilities = [], []
    for start in tqdm(range(0, len(histories), batch_size), desc="scoring sessions", disable=not progress):
        rows = slice(start, start + batch_size)
        history_ids = item_code_ids([history[-limit:] for history in histories[rows]], item_token_ids, pad)
        session_ids = _gather_codes(sessions[rows], item_token_ids, pad)
        output = model(history_ids=history_ids.to(model.device), session_ids=session_ids.to(model.device))
        empty = (sessions[rows] < 0).all(-1)
        reward.append(output.reward.float().cpu().masked_fill(empty, torch.nan))
        probabilities.append(output.probabilities.float().cpu().masked_fill(empty[..., None], torch.nan))
    model.train(was_training)
    if not reward:
        shape = tuple(sessions.shape[:2])
        return SessionScores(torch.empty(shape), torch.empty(*shape, len(model.config.objectives)))
    return SessionScores(reward=torch.cat(reward), probabilities=torch.cat(probabilities))
