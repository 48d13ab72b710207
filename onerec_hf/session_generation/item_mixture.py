"""The item head's part of the search: P(item) = g P_item + (1 - g) P_codes.

The probability of a prefix of codes under the mixture is that of all items below its node: a share g of the sum of
P_item over them, and 1 - g of the product of the codes' probabilities. So the score of every prefix, and at last of
every item, is exact. Items that share a semantic ID share its codes' probability equally among those of them that may
still be given.
"""

import math

import numpy as np
import torch
from torch import nn

from ..item_trie import ItemConstraint, ItemTrie

# In numbers of 4 bytes: the bound of a search's tables, and what a CPU multiplies at a time.
_TABLE_NUMBERS = 2**27
_CHUNK_NUMBERS = 2**18
_LARGEST_TOTAL = 1e30


def users_at_a_time(trie: ItemTrie) -> int:
    """How many users' tables of an [`ItemMixture`] of each ID fit within the bound of memory, at least one's."""
    numbers = 0
    for own in trie.of_ids:
        inner_nodes = sum(len(own.get_buffer(f"codes_{level}")) for level in range(own.num_levels - 1))
        numbers += own.num_items + inner_nodes
    return max(_TABLE_NUMBERS // numbers, 1)


class ItemMixture:
    """P_item of a batch of users, along the trie.

    Args:
        constraint: what each user may be given; other items have no probability.
        histories: have the item head's part of [`EncodedHistories`]: queries (batch, size) and vectors (N, size),
            whose products are its logits, N at most the catalogue's items, as later ones have no probability; what
            comes to the logits from a memory; and g, in (0, 1], or by user as a tensor (batch,) in (0, 1), which is
            not checked.
        normalization: with `"constrained"` P_item is normalised over what the user may still be given.

    Raises:
        ValueError: for a share out of range.
    """

    @classmethod
    def of(cls, histories, constraint: ItemConstraint, normalization: str) -> "ItemMixture | None":
        """The mixture for [`EncodedHistories`], None where the item head takes no part."""
        if histories.item_queries is None:
            return None
        return cls(constraint, histories, normalization)

    def __init__(self, constraint: ItemConstraint, histories, normalization: str):
        item_share = histories.item_share
        if not torch.is_tensor(item_share) and not 0 < item_share <= 1:
            raise ValueError(f"item_share must lie in [0, 1], got {item_share}.")
        self.constraint, self.trie, self.constrained = constraint, constraint.trie, normalization == "constrained"
        self.with_codes = torch.is_tensor(item_share) or item_share < 1  # or nothing of theirs is read
        self.log_shares = _log_shares(item_share, histories.item_queries)
        items, total = _exponentials(histories, self.trie.num_items)
        constraint.mask_items(items)
        # By level the sums (nodes, batch), at last the items' own (catalogue, batch), all but for the normaliser.
        # Users stand side by side, so that the items below a node are added up for all of them at once; level by
        # level, since sums of few and positive numbers lose nothing in single precision.
        self.tables = [items]
        for level in reversed(range(self.trie.num_levels - 1)):
            self.tables.insert(0, self._sums_below(self.tables[0], level))
        if self.constrained:
            total = (self.tables[0] if len(self.tables) > 1 else items[self.trie.order]).sum(0)
        self.scale = total.clamp(min=torch.finfo(total.dtype).tiny).reciprocal()
        self.row_of = nn.functional.pad(self.trie.order, (0, 1), value=self.trie.num_items)

    def log_probs(
        self, code_log_probs: torch.Tensor, nodes: torch.LongTensor, level: int, used: torch.LongTensor
    ) -> torch.Tensor:
        """Log-probabilities of the items below nodes (batch, beams, ...) of `level` under the mixture.

        Args:
            code_log_probs: (batch, beams, ...) of the nodes' codes; of items, as [`items_of_leaves`] has them.
            nodes: at the last level positions of items.
            used: (batch, beams, items) positions of a session's items so far, which are not given again.
        """
        mass = self._mass(nodes, level)
        if used.shape[-1]:
            last = level == self.trie.num_levels - 1
            start, end = (nodes, nodes + 1) if last else self.trie.item_range(nodes, level)
            taken = self._mass(used, self.trie.num_levels - 1)
            per_beam = *used.shape[:2], *(1,) * (nodes.dim() - 2)
            for place in range(used.shape[-1]):
                position = used[..., place].view(per_beam)
                mass = mass - taken[..., place].view(per_beam) * ((position >= start) & (position < end))
            mass = mass.clamp(min=0)
            if self.constrained:
                left = (1 - taken.sum(-1)).clamp(min=torch.finfo(mass.dtype).tiny)
                mass = mass / left.view(per_beam)
        of_items, of_codes = (share.view(-1, *(1,) * (nodes.dim() - 1)) for share in self.log_shares)
        return torch.logaddexp(of_items + mass.log(), of_codes + code_log_probs)

    def _mass(self, nodes: torch.LongTensor, level: int) -> torch.Tensor:
        """P_item of all that lies below nodes (batch, ...) of `level`; of the last one, of items at positions."""
        rows = nodes if level < self.trie.num_levels - 1 else self.row_of[nodes].long()
        found = self.tables[level].gather(0, rows.flatten(1).T) * self.scale
        return found.T.reshape(nodes.shape)

    def _sums_below(self, table: torch.Tensor, level: int) -> torch.Tensor:
        """(nodes of `level`, batch) from the table of what lies below: the next level's nodes, or items."""
        if level == self.trie.num_levels - 2:
            rows, bounds = self.trie.order, self.trie.get_buffer(f"first_item_{level}")
        else:
            bounds = self.trie.get_buffer(f"first_child_{level + 1}")
            rows = torch.arange(len(table), dtype=bounds.dtype, device=bounds.device)
        return nn.functional.embedding_bag(rows, table, bounds, mode="sum", include_last_offset=True)


def items_of_leaves(
    constraint: ItemConstraint, code_log_probs: torch.Tensor, leaves: torch.LongTensor, used: torch.LongTensor
) -> tuple[torch.LongTensor, torch.BoolTensor, torch.Tensor]:
    """The items of leaves (batch, beams, fan-out), side by side.

    Args:
        code_log_probs: (batch, beams, fan-out) of the leaves' codes.
        used: (batch, beams, items) positions of a session's items so far.

    Returns:
        (batch, beams, fan-out * the most items of a leaf) positions; whether each may be given; and log-probabilities
        of their codes, of which each has its part.
    """
    per_leaf = used[:, :, None].expand(*leaves.shape, -1).flatten(1, 2)
    positions, free = constraint.items_of_leaves(leaves.flatten(1), per_leaf)
    count = free.sum(-1).clamp(min=1).view(leaves.shape)
    of_codes = (code_log_probs - count.log())[..., None].expand(*leaves.shape, positions.shape[-1])
    return positions.view(of_codes.shape).flatten(2), free.view(of_codes.shape).flatten(2), of_codes.flatten(2)


def _log_shares(item_share: float | torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log g and log(1 - g) by user (batch,)."""
    if torch.is_tensor(item_share):
        share = item_share.to(queries.device, torch.float32)
        return share.log(), (-share).log1p()
    of_codes = math.log1p(-item_share) if item_share < 1 else -math.inf
    return tuple(
        queries.new_full((len(queries),), log, dtype=torch.float32) for log in (math.log(item_share), of_codes)
    )


def _exponentials(histories, num_items: int) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(logit - a shift of the user's) (num_items + 1, batch), 0 for items without a vector and in the last row, and
    the sums (batch,).

    On a CPU chunk by chunk, each of which stays in the cache, with the first one's largest logit as the shift.
    """
    queries, vectors = histories.item_queries, histories.item_vectors
    on_cpu = queries.device.type == "cpu"
    count, batch = len(vectors), len(queries)
    # Fresh memory costs about as much as the product; numpy asks for it in large pages.
    shape = num_items + 1, batch
    values = torch.from_numpy(np.empty(shape, np.float32)) if on_cpu else queries.new_empty(shape, dtype=torch.float32)
    values[count:] = 0
    size = max(_CHUNK_NUMBERS // max(batch, 1), 1) if on_cpu else count

    def logits_of(start: int) -> torch.Tensor:
        rows = slice(start, start + size)
        logits = values[:count][rows]
        if vectors.dtype == values.dtype:
            return torch.mm(vectors[rows], queries.T, out=logits)
        return logits.copy_(vectors[rows] @ queries.T)

    items, room = histories.remembered_items, 0.0
    if items is not None:
        items, remembered = (each.T for each in _summed_by_item(items, histories.remembered_logits, num_items))
        room = remembered.amax(0).clamp(min=0)  # so that nothing overflows where it comes to the largest logit

    def pass_over(largest: torch.Tensor | None) -> torch.Tensor:
        total = values.new_zeros(batch)
        for start in range(0, count, size):
            logits = logits_of(start)
            largest = _largest_of_columns(logits) + room if largest is None else largest
            total += logits.sub_(largest).exp_().sum(0)
        return total

    total = pass_over(None)
    if size < count and not (total < _LARGEST_TOTAL).all():  # a later chunk's logits lie far above the first one's
        of_chunks = [_largest_of_columns(logits_of(start)) for start in range(0, count, size)]
        total = pass_over(torch.stack(of_chunks).amax(0) + room)
    if items is not None:
        before = values.gather(0, items)
        after = (before.log() + remembered).exp()
        values.scatter_(0, items, after)
        total += (after - before).sum(0)
    return values, total


def _summed_by_item(items: torch.LongTensor, logits: torch.Tensor, none: int) -> tuple[torch.LongTensor, torch.Tensor]:
    """Each user's items (batch, memories) once, with the sum of what comes to its logit; `none` and 0 at the end."""
    items, order = items.sort(dim=1)
    place = nn.functional.pad((items[:, 1:] != items[:, :-1]).long(), (1, 0)).cumsum(1)
    summed = torch.zeros_like(logits).scatter_add(1, place, logits.gather(1, order))
    return torch.full_like(items, none).scatter(1, place, items), summed


def _largest_of_columns(values: torch.Tensor) -> torch.Tensor:
    """By halves: the maximum of two tensors is taken many numbers at a time, that along columns one by one."""
    while len(values) > 1:
        half = (len(values) + 1) // 2
        values = torch.maximum(values[:half], values[-half:])
    return values[0]
