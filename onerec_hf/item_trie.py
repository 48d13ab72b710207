"""The trie of real items: which code may follow which prefix, as sorted arrays that live on the model's device."""

import torch
from torch import nn
from transformers import LogitsProcessor


class ItemTrie(nn.Module):
    """Prefix tree over the catalogue's semantic IDs, without a Python loop over users, beams or codes.

    Items are sorted by code tuple, so that every trie node is one range of that order. A level holds the sorted keys
    `parent * K + code` of its nodes; a look-up is a binary search in them. The root is node 0 of level -1.
    """

    def __init__(self, codes: torch.LongTensor, codebook_sizes: list[int] | tuple[int, ...]):
        """
        Args:
            codes (`torch.LongTensor` of shape `(num_items, L)`): Code tuple per catalogue index, all distinct.
            codebook_sizes (`list[int]`): Codes per level.

        Raises:
            ValueError: If a code lies outside its level or two items share a semantic ID.
        """
        super().__init__()
        codes = torch.as_tensor(codes, dtype=torch.long)
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        self.num_items, self.num_levels = codes.shape
        if self.num_levels != len(self.codebook_sizes):
            raise ValueError(f"codes have {self.num_levels} levels, codebook_sizes {len(self.codebook_sizes)}.")
        for level, size in enumerate(self.codebook_sizes):
            outside = ((codes[:, level] < 0) | (codes[:, level] >= size)).nonzero()
            if len(outside):
                row = int(outside[0])
                raise ValueError(
                    f"Item at catalogue index {row} has code {int(codes[row, level])} at level {level}, "
                    f"which has codes 0 to {size - 1}."
                )
        order = torch.arange(self.num_items)
        for level in reversed(range(self.num_levels)):
            order = order[torch.sort(codes[order, level], stable=True).indices]
        parent = torch.zeros(self.num_items, dtype=torch.long)  # node of each item in sorted order, level by level
        for level, size in enumerate(self.codebook_sizes):
            keys, node, counts = torch.unique_consecutive(
                parent * size + codes[order, level], return_inverse=True, return_counts=True
            )
            ends = counts.cumsum(0)
            self.register_buffer(f"keys_{level}", keys, persistent=False)
            self.register_buffer(f"starts_{level}", ends - counts, persistent=False)
            self.register_buffer(f"ends_{level}", ends, persistent=False)
            parent = node
        if len(self.get_buffer(f"keys_{self.num_levels - 1}")) < self.num_items:
            shared = int((counts > 1).nonzero()[0])
            first, second = order[int((ends - counts)[shared])], order[int((ends - counts)[shared]) + 1]
            raise ValueError(
                f"The items at catalogue indices {int(first)} and {int(second)} share the semantic ID "
                f"{codes[first].tolist()}: generation needs one item per ID. Quantize with collision_policy "
                "'nearest_free' or 'suffix'."
            )
        self.register_buffer("order", order, persistent=False)

    def child_nodes(self, nodes: torch.LongTensor, level: int) -> torch.LongTensor:
        """Nodes of `level` reached from `nodes` of the level before by every code: (...,) to (..., K), -1 = none."""
        codes = torch.arange(self.codebook_sizes[level], device=nodes.device)
        return self.child(nodes.unsqueeze(-1), codes, level)

    def child(self, nodes: torch.LongTensor, codes: torch.LongTensor, level: int) -> torch.LongTensor:
        """Node of `level` reached from `nodes` by `codes` (broadcast together), -1 where there is none."""
        keys = self.get_buffer(f"keys_{level}")
        wanted = nodes * self.codebook_sizes[level] + codes
        index = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        return torch.where((keys[index] == wanted) & (nodes >= 0), index, -1)

    def allowed_prefix_counts(self, excluded: torch.BoolTensor | None, rows: int) -> torch.LongTensor:
        """Running count of allowed items in sorted order, (rows, num_items + 1).

        Args:
            excluded (`torch.BoolTensor` of shape `(rows, num_items)`, *optional*): Catalogue indices not to be made.
        """
        if excluded is None:
            return torch.arange(self.num_items + 1, device=self.order.device).expand(rows, -1)
        allowed = ~excluded[:, self.order]
        return nn.functional.pad(allowed.cumsum(1), (1, 0))

    def available(
        self, nodes: torch.LongTensor, level: int, allowed_counts: torch.LongTensor, used: torch.LongTensor
    ) -> torch.LongTensor:
        """How many allowed and unused items lie below each node.

        Args:
            nodes (`torch.LongTensor` of shape `(rows, beams, K)`): Nodes of `level`, -1 = none (count 0).
            allowed_counts (`torch.LongTensor` of shape `(rows, num_items + 1)`): [`allowed_prefix_counts`].
            used (`torch.LongTensor` of shape `(rows, beams, items)`): Positions in sorted order of a beam's items.
        """
        safe = nodes.clamp(min=0)
        start, end = self.get_buffer(f"starts_{level}")[safe], self.get_buffer(f"ends_{level}")[safe]
        flat = allowed_counts.gather(1, end.flatten(1)) - allowed_counts.gather(1, start.flatten(1))
        count = flat.view_as(nodes)
        for position in used.unbind(-1):
            position = position.unsqueeze(-1)
            count = count - ((start <= position) & (position < end)).long()
        return count.masked_fill(nodes < 0, 0)


class ItemTrieLogitsProcessor(LogitsProcessor):
    """Lets plain `generate` produce real items only, each at most once per session, BOS before every item.

    Args:
        trie (`ItemTrie`): The catalogue.
        level_offsets (`list[int]`): Token id of code 0 of every level.
        bos_token_id (`int`): The token before every item.
        excluded (`torch.BoolTensor` of shape `(batch, num_items)`, *optional*): Items not to be made, by user.

    Raises:
        ValueError: At a prefix that no allowed item continues, rather than letting anything through.
    """

    def __init__(
        self,
        trie: ItemTrie,
        level_offsets: list[int],
        bos_token_id: int = 2,
        excluded: torch.BoolTensor | None = None,
    ):
        self.trie = trie
        self.level_offsets = list(level_offsets)
        self.bos_token_id = bos_token_id
        self.excluded = excluded

    def _walk(self, tokens: torch.LongTensor) -> torch.LongTensor:
        """Node reached by code tokens of shape (rows, levels), -1 where they are no prefix of an item."""
        node = torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device)
        for level in range(tokens.shape[1]):
            node = self.trie.child(node, tokens[:, level] - self.level_offsets[level], level)
        return node

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rows, length = input_ids.shape
        width = self.trie.num_levels + 1
        items_done, level = divmod(length - 1, width)
        mask = torch.full_like(scores, float("-inf"))
        if level == self.trie.num_levels:
            # A BOS is certain, so it costs nothing: scores stay log-probabilities of codes alone, as in eq 4.
            mask[:, self.bos_token_id] = 0
            return mask
        node = self._walk(input_ids[:, length - level :])
        done = input_ids[:, : items_done * width].reshape(rows, items_done, width)[..., 1:]
        used = torch.stack([self._walk(item) for item in done.unbind(1)], -1) if items_done else done[..., 0]
        users = rows if self.excluded is None else self.excluded.shape[0]
        counts = self.trie.allowed_prefix_counts(self.excluded, users).repeat_interleave(rows // users, dim=0)
        children = self.trie.child_nodes(node[:, None], level)
        allowed = self.trie.available(children, level, counts, used[:, None, :])[:, 0] > 0
        if level == 0 and not bool(allowed.any(1).all()):
            raise ValueError(
                "No allowed item is left for a user: the excluded items leave fewer than a session needs."
            )
        offset = self.level_offsets[level]
        mask[:, offset : offset + self.trie.codebook_sizes[level]].masked_fill_(allowed, 0)
        return scores + mask


__all__ = ["ItemTrie", "ItemTrieLogitsProcessor"]
