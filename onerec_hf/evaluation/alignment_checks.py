"""What rounds of preference alignment do to the policy, seen on sessions held out of training.

Measured before and after every round: whether the ranking keeps what pre-training learned, whether generation stays
legal and varied, and how far the policy has moved.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..history_features import encode_history_rows
from ..item_trie import ItemTrie
from ..modeling_onerec import OneRecForConditionalGeneration
from ..session_generation import excluded_items, generate_sessions
from ..session_likelihood import sampled_divergence, session_log_probs
from ..tokenization_onerec import OneRecTokenizer
from .policy_results import popular_item_share
from .ranking_metrics import illegal_rate, intra_session_diversity

RECALL = "recall@10"
RANKING_BEAMS = 64
SAMPLED_ROWS, SAMPLED_SESSIONS = 128, 16
ROWS_PER_BATCH = 32


class AlignmentChecks:
    """
    Args:
        held_out (`Dataset`): Sessions that no trainer has seen: `history` and `session` (catalogue indices) and the
            columns that [`encode_history_rows`] reads.
        popular (`np.ndarray` of shape `(items,)`): Which items are popular, bool: [`popular_items`].
        tokenizer (`OneRecTokenizer`), trie (`ItemTrie`): The catalogue, the trie on the models' device.
        item_embeddings (`torch.Tensor` of shape `(items, D)`): For the diversity of sessions.
        exclude_history (`bool`): Whether items of the history are kept out of what is generated.
        seed (`int`): Of the sessions drawn.
    """

    def __init__(
        self,
        held_out: Dataset,
        popular: np.ndarray,
        tokenizer: OneRecTokenizer,
        trie: ItemTrie,
        item_embeddings: torch.Tensor,
        exclude_history: bool = True,
        seed: int = 0,
    ):
        self.rows = held_out.to_list()
        self.tokenizer, self.trie, self.item_embeddings = tokenizer, trie, item_embeddings
        self.popular, self.exclude_history, self.seed = popular, exclude_history, seed

    @torch.no_grad()
    def measure(
        self,
        model: OneRecForConditionalGeneration,
        references: Mapping[str, OneRecForConditionalGeneration],
    ) -> dict[str, float]:
        """
        The policy's figures; nothing where no session is held out.

        Args:
            references: By name, the policies that the divergence is measured to.

        Returns:
            `dict[str, float]`: `recall@10`, share of a held-out session's items (at most 10) among the first ten
            ranked items; of sessions drawn from the policy `illegal_rate`, `diversity` (intra-session distance),
            `popular_share` ([`popular_item_share`]) and, for every reference, `kl_to_<name>` ([`sampled_divergence`]
            under the item constraint) [nats per session].
        """
        if not self.rows:
            return {}
        was_training = model.training
        model.eval()
        recalls = []
        for rows in _batches(self.rows):
            found = generate_sessions(
                model, self.trie, **self._inputs(model, rows), num_items=1, num_beams=RANKING_BEAMS, num_return=10
            )
            for ranked, row in zip(found.items[..., 0].tolist(), rows, strict=True):
                session = set(row["session"])
                recalls.append(len(session.intersection(ranked)) / min(len(session), 10))
        generator = torch.Generator(model.device).manual_seed(self.seed)
        offsets = torch.tensor(list(model.config.level_offsets), device=model.device)
        sessions, codes, divergences = [], [], {name: [] for name in references}
        for rows in _batches(self.rows[:SAMPLED_ROWS]):
            inputs = self._inputs(model, rows)
            found = generate_sessions(
                model,
                self.trie,
                **inputs,
                num_beams=SAMPLED_SESSIONS,
                search="sample",
                normalization="constrained",
                generator=generator,
            )
            made = (found.items >= 0).all(-1)
            sessions.append(found.items.cpu())
            codes.append((found.token_ids - offsets)[made].cpu())
            for name, reference in references.items():
                reference_scores = session_log_probs(reference, self.trie, found.items, **inputs)
                divergences[name].append(sampled_divergence(found.scores, reference_scores).cpu())
        model.train(was_training)
        items = torch.cat(sessions)
        return {
            RECALL: float(np.mean(recalls)),
            "illegal_rate": illegal_rate(torch.cat(codes), self.tokenizer.codes),
            "diversity": intra_session_diversity(items, self.item_embeddings),
            "popular_share": float(np.nanmean(popular_item_share(items.numpy(), self.popular))),
            **{f"kl_to_{name}": float(torch.cat(values).nanmean()) for name, values in divergences.items()},
        }

    @torch.no_grad()
    def pair_log_probs(self, model: OneRecForConditionalGeneration, pairs: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Log-probabilities `(pairs, 2)` of the chosen and the first rejected sessions over the whole vocabulary, as
        the DPO loss has them."""
        was_training = model.training
        model.eval()
        log_probs = []
        for rows in _batches(pairs):
            sessions = torch.tensor([[row["chosen"], row["rejected"][0]] for row in rows])
            encoded = encode_history_rows(rows, self.tokenizer, model.config).to(model.device)
            found = session_log_probs(model, self.trie, sessions, **encoded, normalization="vocabulary")
            log_probs.append(found.float().cpu().numpy())
        model.train(was_training)
        return np.concatenate(log_probs)

    def _inputs(self, model: OneRecForConditionalGeneration, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        histories = [np.asarray(row["history"], dtype=np.int64) for row in rows]
        excluded = excluded_items(histories, model.device) if self.exclude_history else None
        return {**encode_history_rows(rows, self.tokenizer, model.config).to(model.device), "excluded": excluded}


def _batches(rows: Sequence[Mapping[str, Any]]):
    for start in range(0, len(rows), ROWS_PER_BATCH):
        yield rows[start : start + ROWS_PER_BATCH]


__all__ = ["AlignmentChecks"]
