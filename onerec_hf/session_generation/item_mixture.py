"""The item head's part of the search: P(item) = g P_item + (1 - g) P_codes.

The probability of a prefix of codes under the mixture is that of all items below its node: a share g of the sum of
P_item over them, which prefix sums over the trie's positions give for any node, and 1 - g of the product of the codes'
probabilities. So the score of every prefix, and at last of every item, is exact.
"""

import torch
from torch import nn

from ..item_trie import ItemConstraint


class ItemMixture:
    """P_item of a batch of users, along the trie.

    Args:
        constraint: what each user may be given; other items have no probability.
        item_log_probs: (batch, N) of the item head, N at most the catalogue's items; later ones have no probability.
        item_share: g, in (0, 1], or of each user (batch,) in (0, 1).
        normalization: with `"constrained"` P_item is normalised over what the user may still be given.

    Raises:
        ValueError: for a share out of range, or a catalogue in which items share a semantic ID.
    """

    @classmethod
    def of(cls, histories, constraint: ItemConstraint, normalization: str) -> "ItemMixture | None":
        """The mixture for [`EncodedHistories`], None where the item head takes no part."""
        if histories.item_log_probs is None:
            return None
        return cls(constraint, histories.item_log_probs, histories.item_share, normalization)

    def __init__(
        self,
        constraint: ItemConstraint,
        item_log_probs: torch.Tensor,
        item_share: torch.Tensor | float,
        normalization: str,
    ):
        if not torch.is_tensor(item_share) and not 0 < item_share <= 1:
            raise ValueError(f"item_share must lie in [0, 1], got {item_share}.")
        self.trie, self.constrained = constraint.trie, normalization == "constrained"
        if self.trie.max_items_per_leaf > 1:
            raise ValueError("Items share semantic IDs, which the item head tells apart: generate with item_share=0.")
        share = torch.as_tensor(item_share, dtype=item_log_probs.dtype, device=item_log_probs.device)
        self.log_shares = share.log(), (-share).log1p()
        probs = nn.functional.pad(item_log_probs.exp(), (0, self.trie.num_items - item_log_probs.shape[1]))
        self.probs = constraint.mask_positions(probs[:, self.trie.order])
        if self.constrained:
            self.probs = self.probs / self.probs.sum(1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)
        # In double precision: a node of rare items is a small difference of sums near 1.
        self.before = nn.functional.pad(self.probs.double().cumsum(1), (1, 0))

    def log_probs(
        self, code_log_probs: torch.Tensor, nodes: torch.LongTensor, level: int, used: torch.LongTensor
    ) -> torch.Tensor:
        """Log-probabilities of the items below nodes (batch, beams, ...) of `level` under the mixture.

        Args:
            code_log_probs: (batch, beams, ...) of the nodes' codes.
            used: (batch, beams, items) positions of a session's items so far, which are not given again.
        """
        start, end = self.trie.item_range(nodes, level)
        if level == self.trie.num_levels - 1:
            mass = self._at(self.probs, start)
        else:
            mass = (self._at(self.before, end) - self._at(self.before, start)).to(self.probs.dtype)
        taken = self._at(self.probs, used.clamp(max=self.trie.num_positions - 1)) * (used < self.trie.num_positions)
        per_beam = *used.shape[:2], *(1,) * (nodes.dim() - 2)
        for place in range(used.shape[-1]):
            position = used[..., place].view(per_beam)
            mass = mass - taken[..., place].view(per_beam) * ((position >= start) & (position < end))
        mass = mass.clamp(min=0)
        if self.constrained and used.shape[-1]:
            left = (1 - taken.sum(-1)).clamp(min=torch.finfo(mass.dtype).tiny)
            mass = mass / left.view(per_beam)
        of_items, of_codes = (share.view(-1, *(1,) * (nodes.dim() - 1)) for share in self.log_shares)
        return torch.logaddexp(of_items + mass.log(), of_codes + code_log_probs)

    @staticmethod
    def _at(values: torch.Tensor, places: torch.LongTensor) -> torch.Tensor:
        """Values (batch, P) at places (batch, ...)."""
        return values.gather(1, places.flatten(1)).view(places.shape)
