"""Rewards of whole sessions given as catalogue indices."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..evaluation_mode import evaluation_mode
from ..renamed_arguments import renamed_arguments
from ..tokenization_onerec import OneRecTokenizer
from .exposure_encoding import ExposureEncoder
from .modeling_onerec_reward import OneRecRewardModel


@dataclass
class SessionScores:
    """Reward model's estimates of C candidate sessions of each of B users, on the CPU.

    Args:
        reward: (B, C) the objectives as one number; NaN for an empty session.
        probabilities: (B, C, O) one for each objective; NaN for an empty session.
    """

    reward: torch.FloatTensor
    probabilities: torch.FloatTensor


class SessionScorer:
    """A reward model, the judge, with the tokenizer of the codes that it was trained on.

    Raises:
        ValueError: the model was trained on the semantic IDs of another fit.
    """

    def __init__(self, model: OneRecRewardModel, tokenizer: OneRecTokenizer):
        tokenizer.require_trained_with(model.config)
        self.model, self.tokenizer = model, tokenizer
        self._encoder = ExposureEncoder(model.config, tokenizer.item_token_ids)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: str | torch.device | None = None, **hub_arguments
    ) -> "SessionScorer":
        """Reward model and tokenizer of a folder or Hub repository that holds both; `hub_arguments` (`revision`,
        `token`, `local_files_only`, ...) are for both."""
        model = OneRecRewardModel.from_pretrained(source, **hub_arguments).eval()
        scorer = cls(model, OneRecTokenizer.from_pretrained(source, **hub_arguments))
        return scorer if device is None else scorer.to(device)

    @property
    def objectives(self) -> list[str]:
        return self.model.config.objective_names

    def to(self, device: str | torch.device) -> "SessionScorer":
        self.model.to(device)
        return self

    def scalar(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The reward `(...)` of objectives' probabilities `(..., O)`, such as a simulated feed's true ones."""
        return self.model.scalar(probabilities)

    def guide(self, rows: Sequence[Mapping[str, Any]]) -> "RewardGuide":
        """What guides a search of these users' sessions; rows as of [`score`]."""
        return RewardGuide(self.model, self._encoder, rows)

    @renamed_arguments(progress="show_progress")
    def score(
        self,
        rows: Sequence[Mapping[str, Any]],
        sessions: torch.LongTensor,
        batch_size: int = 32,
        show_progress: bool = False,
    ) -> SessionScores:
        """Scores candidate sessions, each user's behaviour encoded once. The model's training mode is left as it was.

        Args:
            rows: B rows of [`index_sessions`] tables: the columns of `REWARD_FEATURES` that the data has, or else
                `history` (catalogue indices, oldest first), of which the latest `model.config.history_items` are used.
                Other columns are passed over.
            sessions: (B, C, m) catalogue indices, -1 where there is no item.
            batch_size: Users scored at once.

        Raises:
            ValueError: if the catalogue indices are not the tokenizer's, there is not one row for each user, or the
                model gives no numbers.
        """
        if len(rows) != len(sessions):
            raise ValueError(f"Got {len(rows)} rows for {len(sessions)} users' sessions: give one for each.")
        device, sessions = self.model.device, sessions.cpu()
        shape = (0, sessions.shape[1])
        reward, probabilities = [torch.empty(shape)], [torch.empty(*shape, len(self.objectives))]
        starts = tqdm(range(0, len(rows), batch_size), desc="scoring sessions", disable=not show_progress)
        with evaluation_mode(self.model):
            for start in starts:
                batch = sessions[start : start + batch_size]
                inputs = self._encoder(rows[start : start + batch_size], self.model.config.history_items)
                inputs |= {"session_ids": self._encoder.codes(batch.numpy()), "session_indices": batch}
                output = self.model(**{name: tensor.to(device) for name, tensor in inputs.items()})
                empty = (batch < 0).all(-1)
                reward.append(output.reward.float().cpu().masked_fill(empty, torch.nan))
                probabilities.append(output.probabilities.float().cpu().masked_fill(empty[..., None], torch.nan))
        scores = SessionScores(reward=torch.cat(reward), probabilities=torch.cat(probabilities))
        if (scores.reward.isnan() & (sessions >= 0).any(-1)).any():
            raise ValueError(
                "The reward model's scores are NaN: its weights are damaged, or its training diverged. "
                "Download or train it again."
            )
        return scores


class RewardGuide:
    """Rewards of sessions while they are searched for (see [`SessionGuide`]): users' behaviour is encoded once, and
    sessions come and go on the model's device.

    Args:
        model: whose training mode is left as it was.
        encoder: of the model and its tokenizer.
        rows: as of [`SessionScorer.score`].
    """

    def __init__(self, model: OneRecRewardModel, encoder: ExposureEncoder, rows: Sequence[Mapping[str, Any]]):
        self.model, self.item_token_ids = model, encoder.item_token_ids.to(model.device)
        inputs = encoder(rows, model.config.history_items)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        self.user_values = inputs.pop("user_values", None)
        with evaluation_mode(model):
            self.behaviour = model.encode_behaviour(**inputs)

    def __call__(self, sessions: torch.LongTensor, candidates: torch.LongTensor) -> torch.Tensor:
        """Rewards (B, C, K) of sessions (B, C, n), n from 0 on, each with one of the candidates (B, C, K) after it;
        catalogue indices, -1 for nothing. NaN of empty sessions."""
        sessions, candidates = sessions.to(self.model.device), candidates.to(self.model.device)
        with evaluation_mode(self.model):
            reward = self.model.score_extensions(
                self.behaviour,
                self._codes(sessions),
                self._codes(candidates),
                session_indices=sessions,
                candidate_indices=candidates,
                user_values=self.user_values,
            )
        empty = (candidates < 0) & (sessions < 0).all(-1, keepdim=True)
        return reward.float().masked_fill(empty, torch.nan)

    def _codes(self, items: torch.LongTensor) -> torch.LongTensor:
        codes = self.item_token_ids[items.clamp(min=0)]
        return codes.masked_fill((items < 0)[..., None], self.model.config.pad_token_id)

    def of_users(self, users: slice) -> "RewardGuide":
        """The same for a part of the users."""
        part = copy.copy(self)
        part.behaviour = self.behaviour.of_users(users)
        part.user_values = None if self.user_values is None else self.user_values[users]
        return part
