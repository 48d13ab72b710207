"""Log-probabilities of the next code, over what the caller wants them normalised."""

import torch
from torch import nn

NORMALIZATIONS = ("level", "constrained", "vocabulary")


class CodeScores:
    """Scores the next code of one semantic ID, from the current level's slice of the head where that is all it takes.
    What each of the `NORMALIZATIONS` is stands in [`generate_sessions`].

    Attributes:
        level_offsets, bos_token_id: Token id of code 0 of each of the ID's levels, and what its items begin with.

    Raises:
        ValueError: For another normalization.
    """

    def __init__(self, model, normalization: str, id_number: int = 0):
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}.")
        self.head, self.normalization = model.lm_head, normalization
        config = model.config
        levels = slice(id_number * config.num_levels, (id_number + 1) * config.num_levels)
        self.level_offsets, self.codebook_sizes = config.level_offsets[levels], config.codebook_sizes[levels]
        self.bos_token_id = config.bos_token_ids[id_number]

    def logits(self, hidden_states: torch.Tensor, level: int) -> torch.Tensor:
        """(batch, beams, hidden_size) to (batch, beams, K): scores of the level's codes."""
        codes = slice(self.level_offsets[level], self.level_offsets[level] + self.codebook_sizes[level])
        head, weight = self.head, self.head.weight
        # A quantized, adapted or offloaded head computes its own way, and so all of it.
        plain = type(head) is nn.Linear and type(weight) is nn.Parameter and weight.device == hidden_states.device
        if plain and self.normalization != "vocabulary":
            return nn.functional.linear(hidden_states, weight[codes]).float()
        logits = head(hidden_states).float()
        if self.normalization == "vocabulary":
            logits = logits.log_softmax(-1)
        return logits[..., codes]

    def log_probs(self, logits: torch.Tensor, codes: torch.LongTensor, available: torch.BoolTensor) -> torch.Tensor:
        """Those of the candidates (batch, beams, fan-out), -inf where none is available."""
        if self.normalization == "constrained":
            return log_softmax_over(logits.gather(-1, codes), available)
        if self.normalization == "level":
            logits = logits.log_softmax(-1)
        return logits.gather(-1, codes).masked_fill(~available, -torch.inf)


def log_softmax_over(logits: torch.Tensor, available: torch.BoolTensor) -> torch.Tensor:
    """log-softmax over what is available, -inf elsewhere, also where nothing is."""
    return logits.masked_fill(~available, -torch.inf).log_softmax(-1).masked_fill(~available, -torch.inf)
