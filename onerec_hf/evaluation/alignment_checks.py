"""What rounds of alignment do to the policy, seen on sessions held out of training.

Measured before and after every round: whether the ranking keeps what pre-training learned, whether generation stays
legal and varied, and how far the policy has moved.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..evaluation_mode import evaluation_mode
from ..history_features import encode_history_rows
from ..item_trie import ItemTrie
from ..modeling_onerec import OneRecForConditionalGeneration
from ..renamed_arguments import renamed_arguments
from ..session_generation import generate_sessions
from ..session_likelihood import sampled_divergence, session_log_probs
from ..tokenization_onerec import OneRecTokenizer
from .policy_inputs import draw_sessions, generation_inputs
from .policy_results import defined_figures, popular_item_share
from .ranking_metrics import illegal_rate, intra_session_diversity

RECALL = "session_recall@10"
RANKING_BEAMS = 64
SAMPLED_ROWS, SAMPLED_SESSIONS = 128, 16
ROWS_PER_BATCH = 32


def session_recall(checks: Mapping[str, float]) -> float:
    """The `session_recall@10` of what [`AlignmentChecks.measure`] said; runs used to keep it as `recall@10`."""
    return checks[RECALL] if RECALL in checks else checks["recall@10"]


class AlignmentChecks:
    """Measures policies on the same held-out sessions.

    Args:
        held_out: sessions that no trainer has seen: `history` and `session` (catalogue indices) and the columns that
            [`encode_history_rows`] reads.
        popular: (items,) whether an item is popular: [`popular_items`].
        tokenizer, trie: the catalogue, the trie on the models' device.
        item_embeddings: (items, D), for the diversity of sessions.
        exclude_consumed: whether items of the history are left out of what is generated.
        seed: of the sessions drawn.
    """

    @renamed_arguments(exclude_history="exclude_consumed")
    def __init__(
        self,
        held_out: Dataset,
        popular: np.ndarray,
        tokenizer: OneRecTokenizer,
        trie: ItemTrie,
        item_embeddings: torch.Tensor,
        exclude_consumed: bool = True,
        seed: int = 0,
    ):
        self.rows = held_out.to_list()
        self.tokenizer, self.trie, self.item_embeddings = tokenizer, trie, item_embeddings
        self.popular, self.exclude_consumed, self.seed = popular, exclude_consumed, seed

    def measure(
        self, model: OneRecForConditionalGeneration, references: Mapping[str, OneRecForConditionalGeneration]
    ) -> dict[str, float]:
        """The policy's figures, without the undefined ones; nothing where no session is held out.

        Args:
            references: by name, the policies that the divergence is measured to.

        Returns:
            `session_recall@10`, share of a held-out session's items (at most 10) among the first ten ranked items
            (the evaluation's `recall@10` is another figure, whether the next item is among them); of sessions drawn
            from the policy `illegal_rate`, `diversity` (intra-session distance), `popular_share`
            ([`popular_item_share`]) and, for every reference, `kl_to_<name>` ([`sampled_divergence`] under the item
            constraint) [nats per session].
        """
        if not self.rows:
            return {}
        with evaluation_mode(model):
            recall = self._session_recall(model)
            sessions, codes, divergences = self._drawn(model, references)
        figures = {
            RECALL: recall,
            "illegal_rate": illegal_rate(codes, self.tokenizer.codes),
            "diversity": intra_session_diversity(sessions, self.item_embeddings),
            "popular_share": float(np.nanmean(popular_item_share(sessions.numpy(), self.popular))),
            **{f"kl_to_{name}": float(values.nanmean()) for name, values in divergences.items()},
        }
        return defined_figures(figures)

    def _session_recall(self, model: OneRecForConditionalGeneration) -> float:
        recalls = []
        for rows in _batches(self.rows):
            found = generate_sessions(
                model, self.trie, **self._inputs(model, rows), num_items=1, num_beams=RANKING_BEAMS, num_return=10
            )
            for ranked, row in zip(found.items[..., 0].tolist(), rows, strict=True):
                session = set(row["session"])
                recalls.append(len(session.intersection(ranked)) / min(len(session), 10))
        return float(np.mean(recalls))

    def _drawn(
        self, model: OneRecForConditionalGeneration, references: Mapping[str, OneRecForConditionalGeneration]
    ) -> tuple[torch.LongTensor, torch.LongTensor, dict[str, torch.Tensor]]:
        """Drawn sessions (users, C, m), the codes (items, L) of the whole ones, and divergences (users,) by name."""
        generator = torch.Generator(model.device).manual_seed(self.seed)
        offsets = torch.tensor(list(model.config.level_offsets), device=model.device)
        sessions, codes, divergences = [], [], {name: [] for name in references}
        for rows in _batches(self.rows[:SAMPLED_ROWS]):
            inputs = self._inputs(model, rows)
            found = draw_sessions(model, self.trie, SAMPLED_SESSIONS, generator, **inputs)
            made = (found.items >= 0).all(-1)
            sessions.append(found.items.cpu())
            codes.append((found.token_ids - offsets)[made].cpu())
            for name, reference in references.items():
                reference_scores = session_log_probs(reference, self.trie, found.items, **inputs)
                divergences[name].append(sampled_divergence(found.scores, reference_scores).cpu())
        return torch.cat(sessions), torch.cat(codes), {name: torch.cat(values) for name, values in divergences.items()}

    def pair_log_probs(self, model: OneRecForConditionalGeneration, pairs: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Log-probabilities `(pairs, 2)` of the chosen and the first rejected sessions over the whole vocabulary, as
        the DPO loss has them."""
        log_probs = []
        with evaluation_mode(model):
            for rows in _batches(pairs):
                sessions = torch.tensor([[row["chosen"], row["rejected"][0]] for row in rows])
                encoded = encode_history_rows(rows, self.tokenizer, model.config).to(model.device)
                found = session_log_probs(model, self.trie, sessions, **encoded, normalization="vocabulary")
                log_probs.append(found.float().cpu().numpy())
        return np.concatenate(log_probs)

    def _inputs(self, model: OneRecForConditionalGeneration, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return generation_inputs(model, self.tokenizer, rows, self.exclude_consumed)


def _batches(rows: Sequence[Mapping[str, Any]]):
    for start in range(0, len(rows), ROWS_PER_BATCH):
        yield rows[start : start + ROWS_PER_BATCH]
