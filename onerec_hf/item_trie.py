"""The trie of real items: which code may follow which prefix, as sorted arrays that live on the model's device, and
which items a batch of users may be given."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import LogitsProcessor


class ItemTrie(nn.Module):
    """Prefix tree over the catalogue's semantic IDs, in compressed sparse rows: 17 bytes an item at three levels.

    Items are sorted by code tuple, so that the items below a node and the children of a node are one range each. The
    place of an item in that order is its *position*; the leaves are the nodes of the last level. Items that share a
    semantic ID (collision policy "share") stand side by side below one leaf, in catalogue order.

    Args:
        codes: (num_items, L) code tuple per catalogue index.
        codebook_sizes: Codes per level.
        removed: (num_items,) marks items that are never generated.
        id_number: Which of an item's semantic IDs, counted from 0, the codes are.

    Attributes:
        further: The tries of the items' further semantic IDs, where there are any, in the first one's.

    Raises:
        ValueError: If a code lies outside its level, or every item is removed.
    """

    def __init__(
        self,
        codes: torch.LongTensor,
        codebook_sizes: Sequence[int],
        removed: torch.BoolTensor | None = None,
        id_number: int = 0,
    ):
        super().__init__()
        self.id_number, self.further = id_number, nn.ModuleList()
        codes = torch.as_tensor(codes)
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        self.num_items, self.num_levels = codes.shape
        if self.num_levels != len(self.codebook_sizes):
            raise ValueError(f"codes have {self.num_levels} levels, codebook_sizes {len(self.codebook_sizes)}.")
        for level, size in enumerate(self.codebook_sizes):
            level_codes = codes[:, level].long()  # a byte holds every code of a level of 256, but not its size
            outside = ((level_codes < 0) | (level_codes >= size)).nonzero()
            if len(outside):
                row = int(outside[0])
                raise ValueError(
                    f"Item at catalogue index {row} has code {int(codes[row, level])} at level {level}, "
                    f"which has codes 0 to {size - 1}."
                )
        order = torch.arange(self.num_items)
        if removed is not None:
            removed = torch.as_tensor(removed, dtype=torch.bool)
            if removed.shape != (self.num_items,):
                raise ValueError(f"removed has shape {list(removed.shape)}, expected [{self.num_items}].")
            order = order[~removed]
        if not len(order):
            raise ValueError("No item is left to generate: the catalogue is empty or every item of it is removed.")
        for level in reversed(range(self.num_levels)):
            order = order[torch.sort(codes[order, level], stable=True).indices]
        fan_outs = []
        node = torch.zeros(len(order), dtype=torch.long)  # of each item in sorted order, level by level
        for level, size in enumerate(self.codebook_sizes):
            keys, node, counts = torch.unique_consecutive(
                node * size + codes[order, level].long(), return_inverse=True, return_counts=True
            )
            parents = len(self.get_buffer(f"codes_{level - 1}")) if level else 1
            children = torch.bincount(keys // size, minlength=parents)
            fan_outs.append(int(children.max()))
            for name, lengths in (("first_child", children), ("first_item", counts)):
                bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
                self.register_buffer(f"{name}_{level}", bounds, persistent=False)
            self.register_buffer(f"codes_{level}", (keys % size).int(), persistent=False)
        self.fan_outs = tuple(fan_outs)
        self.max_items_per_leaf = int(counts.max())
        position = torch.full((self.num_items,), -1, dtype=torch.int32)
        position[order] = torch.arange(len(order), dtype=torch.int32)
        self.register_buffer("order", order.int(), persistent=False)
        self.register_buffer("position", position, persistent=False)

    @classmethod
    def from_tokenizer(cls, tokenizer) -> "ItemTrie":
        """The trie of a tokenizer's catalogue, without the items that have been removed from it; of several semantic
        IDs that of the first, with those of the others in `further`."""
        first, *further = (
            cls(tokenizer.codes[:, levels], tokenizer.codebook_sizes[levels], tokenizer.removed, number)
            for number, levels in enumerate(map(tokenizer.levels_of, range(tokenizer.num_semantic_ids)))
        )
        first.further.extend(further)
        return first

    @property
    def of_ids(self) -> list["ItemTrie"]:
        """The tries of all semantic IDs: this one and the further ones."""
        return [self, *self.further]

    @property
    def num_positions(self) -> int:
        """Items that can be generated."""
        return len(self.order)

    def child_nodes(self, nodes: torch.LongTensor, level: int) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """The nodes of `level` below `nodes` of the level before (0, the root, below level 0).

        Returns:
            (..., fan-out) nodes, padded to the level's largest fan-out by some node of the level, and whether each is
            a child at all.
        """
        first_child = self.get_buffer(f"first_child_{level}")
        child = first_child[nodes].unsqueeze(-1) + torch.arange(
            self.fan_outs[level], device=first_child.device, dtype=first_child.dtype
        )
        exists = child < first_child[nodes + 1].unsqueeze(-1)
        return child.clamp_(max=len(self.get_buffer(f"codes_{level}")) - 1).long(), exists

    def codes(self, nodes: torch.LongTensor, level: int) -> torch.LongTensor:
        """The last code of nodes of `level`."""
        return self.get_buffer(f"codes_{level}")[nodes].long()

    def item_range(self, nodes: torch.LongTensor, level: int) -> tuple[torch.LongTensor, torch.LongTensor]:
        """First position below nodes of `level` (-1: the root), and the first one after those."""
        if level < 0:
            return torch.zeros_like(nodes), torch.full_like(nodes, self.num_positions)
        first_item = self.get_buffer(f"first_item_{level}")
        return first_item[nodes].long(), first_item[nodes + 1].long()

    def node_of(self, positions: torch.LongTensor, level: int) -> torch.LongTensor:
        """The node of `level` (-1: the root) above each position."""
        if level < 0:
            return torch.zeros_like(positions)
        return torch.searchsorted(self.get_buffer(f"first_item_{level}"), positions.int(), right=True) - 1

    def walk(self, codes: torch.LongTensor) -> torch.LongTensor:
        """Nodes reached by code prefixes of shape (..., levels), -1 where they begin no item."""
        node = torch.zeros(codes.shape[:-1], dtype=torch.long, device=codes.device)
        for level in range(codes.shape[-1]):
            child, exists = self.child_nodes(node.clamp(min=0), level)
            match = exists & (self.codes(child, level) == codes[..., level, None])
            found = child.gather(-1, match.int().argmax(-1, keepdim=True)).squeeze(-1)
            node = torch.where(match.any(-1) & (node >= 0), found, -1)
        return node


class ItemConstraint:
    """The items that each user of a batch may be given.

    Consumed items come as lists, whose cost goes by their length and not by the catalogue's; an inventory or a region
    comes as a bitmap. Nothing here waits for the device after the constructor.

    Args:
        batch_size: Users.
        excluded: (batch, S) catalogue indices by user that are not to be generated, in any order, repeats allowed,
            padded with -1.
        allowed: (num_items,) or (batch, num_items) marks the only items that may be generated, for all users or by
            user.

    Raises:
        ValueError: For another shape or dtype, or an index outside the catalogue.
    """

    def __init__(
        self,
        trie: ItemTrie,
        batch_size: int,
        excluded: torch.LongTensor | None = None,
        allowed: torch.BoolTensor | None = None,
    ):
        self.trie = trie
        device = trie.order.device
        self.allowed = None  # (1 or batch, num_items)
        self.allowed_before = None  # (1 or batch, positions + 1): allowed items before each position
        if allowed is not None:
            allowed = allowed.to(device)
            if allowed.dtype != torch.bool or allowed.shape not in ((trie.num_items,), (batch_size, trie.num_items)):
                raise ValueError(
                    f"allowed must be boolean of shape [{trie.num_items}] or [{batch_size}, {trie.num_items}] (users, "
                    f"items), got {allowed.dtype} of shape {list(allowed.shape)}."
                )
            self.allowed = allowed.view(-1, trie.num_items)
            marks = self.allowed[:, trie.order]
            self.allowed_before = nn.functional.pad(marks.cumsum(1, dtype=torch.int32), (1, 0))
        self.excluded = None  # (batch, S) sorted positions, each at most once, padded at the end
        if excluded is not None and excluded.shape[1:].numel():
            self._exclude(excluded.to(device), batch_size)
        everything = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.num_available = self._allowed_between(everything, everything + trie.num_positions)[:, 0]
        if self.excluded is not None:
            self.num_available = self.num_available - (self.excluded < trie.num_positions).sum(1)

    def _exclude(self, excluded: torch.LongTensor, batch_size: int):
        trie = self.trie
        if excluded.is_floating_point() or excluded.dtype == torch.bool or excluded.shape[:-1] != (batch_size,):
            raise ValueError(
                f"excluded must be catalogue indices of shape [{batch_size}, S] (users, items), padded with -1, got "
                f"{excluded.dtype} of shape {list(excluded.shape)}. A bitmap of what may be given goes to `allowed`."
            )
        none = trie.num_positions
        position = trie.position[excluded.clamp(0, trie.num_items - 1)].long()
        position = position.masked_fill((excluded < 0) | (position < 0), none)
        if self.allowed_before is not None:
            position = position.masked_fill(self._allowed_between(position, (position + 1).clamp(max=none)) == 0, none)
        position = position.sort(1).values
        repeated = nn.functional.pad(position[:, 1:] == position[:, :-1], (1, 0))
        self.excluded = position.masked_fill(repeated, none).sort(1).values
        # Below one node of a level lie at most so many excluded items: what a look-up has to read.
        runs = [(self.excluded < none).sum(1).max()]
        for level in range(trie.num_levels - 1):
            size = len(trie.get_buffer(f"codes_{level}")) + 1
            node = trie.node_of(self.excluded, level)  # size - 1 for the padding
            rows = torch.arange(batch_size, device=node.device)[:, None]
            key, counts = torch.unique_consecutive(node + rows * size, return_counts=True)
            runs.append(counts.masked_fill(key % size == size - 1, 0).max())
        *self.most_excluded_below, largest, smallest = torch.stack([*runs, excluded.max(), excluded.min()]).tolist()
        if largest >= trie.num_items or smallest < -1:
            raise ValueError(
                f"excluded holds {largest if largest >= trie.num_items else smallest}, which is not a catalogue index "
                f"in [0, {trie.num_items}), nor the padding -1."
            )

    def of_users(self, users: slice) -> "ItemConstraint":
        """The same for some users of the batch."""
        part = copy.copy(self)
        part.num_available = self.num_available[users]
        if self.excluded is not None:
            part.excluded = self.excluded[users]
        if self.allowed is not None and len(self.allowed) > 1:
            part.allowed, part.allowed_before = self.allowed[users], self.allowed_before[users]
        return part

    def mask_items(self, values: torch.Tensor) -> None:
        """Sets to 0, in values (num_items + 1, batch), what a user may not be given and the last row."""
        if self.allowed is not None:
            values[:-1] *= self.allowed.T
        values[-1] = 0
        if self.excluded is not None:
            # What is padding falls into the last row.
            padding = self.excluded == self.trie.num_positions
            items = self.trie.order[self.excluded.masked_fill(padding, 0)].long()
            values.scatter_(0, items.masked_fill(padding, self.trie.num_items).T, 0.0)

    def _allowed_between(self, start: torch.LongTensor, end: torch.LongTensor) -> torch.LongTensor:
        """Items in [start, end) that the bitmap allows, of shape (batch, ...)."""
        if self.allowed_before is None:
            return end - start
        before = self.allowed_before.expand(len(start), -1)
        counts = before.gather(1, end.flatten(1)) - before.gather(1, start.flatten(1))
        return counts.view(start.shape).long()

    def _excluded_below(self, nodes: torch.LongTensor, level: int) -> torch.LongTensor:
        """Positions of the excluded items below nodes (batch, beams) of `level`: (batch, beams, most of them)."""
        start, end = self.trie.item_range(nodes, level)
        place = torch.searchsorted(self.excluded, start)[..., None] + torch.arange(
            self.most_excluded_below[level + 1], device=nodes.device
        )
        found = self.excluded.gather(1, place.clamp(max=self.excluded.shape[1] - 1).flatten(1)).view_as(place)
        outside = (place >= self.excluded.shape[1]) | (found >= end[..., None])
        return found.masked_fill(outside, self.trie.num_positions)

    def available(
        self,
        nodes: torch.LongTensor,
        children: torch.LongTensor,
        exists: torch.BoolTensor,
        level: int,
        used: torch.LongTensor,
    ) -> torch.BoolTensor:
        """Whether an item that is allowed and not yet used lies below each child.

        Args:
            nodes: (batch, beams) nodes of the level before.
            children, exists: (batch, beams, fan-out) their [`ItemTrie.child_nodes`].
            level: The children's.
            used: (batch, beams, items) positions of a beam's items.
        """
        if self.excluded is None and self.allowed_before is None and not used.shape[-1]:
            return exists
        counts = self._allowed_between(*self.trie.item_range(children, level)) * exists
        taken = [used]
        if self.excluded is not None:
            # Every beam stands at the root at level 0: its excluded items are counted once for all of them.
            below = self._excluded_below(nodes[:, :1] if level == 0 else nodes, level - 1)
            if level == 0:
                counts = counts - self._tally(below, torch.zeros_like(nodes[:, :1]), level)
            else:
                taken.append(below)
        taken = torch.cat(taken, -1)
        return (counts - self._tally(taken, nodes, level) if taken.shape[-1] else counts) > 0

    def _tally(self, positions: torch.LongTensor, nodes: torch.LongTensor, level: int) -> torch.LongTensor:
        """How many of a beam's positions (batch, beams, items) lie below each child of its node."""
        trie = self.trie
        start, end = (bound[..., None] for bound in trie.item_range(nodes, level - 1))
        fan_out = trie.fan_outs[level]
        first_child = trie.get_buffer(f"first_child_{level}")[nodes].long()[..., None]
        child = trie.node_of(positions, level) - first_child
        # What lies elsewhere falls into a column of its own.
        child = torch.where((positions >= start) & (positions < end), child, fan_out)
        tally = torch.zeros(*nodes.shape, fan_out + 1, dtype=torch.long, device=nodes.device)
        return tally.scatter_add_(-1, child, torch.ones_like(child))[..., :-1]

    def items_of_leaves(
        self, leaves: torch.LongTensor, used: torch.LongTensor
    ) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """Positions (batch, beams, items of a leaf) below leaves (batch, beams), and whether each may be given."""
        trie = self.trie
        start, end = trie.item_range(leaves, trie.num_levels - 1)
        position = start[..., None] + torch.arange(trie.max_items_per_leaf, device=leaves.device)
        free = position < end[..., None]
        position = position.clamp(max=trie.num_positions - 1)
        free &= self._allowed_between(position, position + 1) > 0
        free &= ~(position[..., None] == used[..., None, :]).any(-1)
        if self.excluded is not None:
            place = torch.searchsorted(self.excluded, position.flatten(1)).clamp(max=self.excluded.shape[1] - 1)
            free &= (self.excluded.gather(1, place) != position.flatten(1)).view_as(position)
        return position, free


class ItemTrieLogitsProcessor(LogitsProcessor):
    """Lets plain `generate` produce real items only, each at most once per session, BOS before every item.

    Args:
        level_offsets: Token id of code 0 of every level.
        excluded, allowed: By user or for all, as [`ItemConstraint`] takes them.

    Raises:
        ValueError: At a prefix that no allowed item continues, rather than letting anything through; and for levels
            of several semantic IDs, whose probabilities plain `generate` cannot join.
    """

    def __init__(
        self,
        trie: ItemTrie,
        level_offsets: list[int],
        bos_token_id: int = 2,
        excluded: torch.LongTensor | None = None,
        allowed: torch.BoolTensor | None = None,
    ):
        self.trie, self.level_offsets, self.bos_token_id = trie, list(level_offsets), bos_token_id
        if len(self.level_offsets) != trie.num_levels:
            raise ValueError(
                f"{len(self.level_offsets)} level_offsets for a trie of {trie.num_levels} levels: plain generate is "
                "for one semantic ID per item, generate_sessions for several."
            )
        # Without anything by user the rows of all users are beams of one.
        by_user = [given for given in (excluded, allowed) if given is not None and given.ndim == 2]
        self.users = len(by_user[0]) if by_user else 1
        self.constraint = ItemConstraint(trie, self.users, excluded, allowed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rows, length = input_ids.shape
        width = self.trie.num_levels + 1
        items_done, level = divmod(length - 1, width)
        mask = torch.full_like(scores, float("-inf"))
        if level == self.trie.num_levels:
            # A BOS is certain, so it costs nothing: scores stay log-probabilities of codes alone, as in eq 4.
            mask[:, self.bos_token_id] = 0
            return mask
        offsets = torch.tensor(self.level_offsets, device=input_ids.device)
        node = self.trie.walk(input_ids[:, length - level :] - offsets[:level]).view(self.users, -1)
        done = input_ids[:, : items_done * width].reshape(rows, items_done, width)[..., 1:] - offsets
        used = self.trie.walk(done).view(*node.shape, items_done)
        used, _ = self.trie.item_range(used, self.trie.num_levels - 1)
        children, exists = self.trie.child_nodes(node.clamp(min=0), level)
        exists = exists & (node >= 0)[..., None]
        allowed = self.constraint.available(node.clamp(min=0), children, exists, level, used).flatten(0, 1)
        if level == 0 and not bool(allowed.any(1).all()):
            raise ValueError(
                "No allowed item is left for a user: the excluded items leave fewer than a session needs."
            )
        tokens = self.trie.codes(children, level).flatten(0, 1) + self.level_offsets[level]
        # Padded children repeat a code, which must not hide the real one.
        tokens = tokens.masked_fill(~allowed, scores.shape[1])
        mask = nn.functional.pad(mask, (0, 1)).scatter_(1, tokens, 0.0)[:, :-1]
        return scores + mask
