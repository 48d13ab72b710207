"""The way through the trie, item by item and level by level, with whichever search chooses the beams."""

import inspect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers.masking_utils import create_bidirectional_mask

from ..item_trie import ItemConstraint
from .beam_cache import BeamPaths, beam_cache
from .code_scores import CodeScores
from .item_mixture import ItemMixture, items_of_leaves, users_at_a_time
from .searches import SEARCHES, Candidates, SearchOptions


class Beams(NamedTuple):
    """What the beams have generated so far: trie positions (batch, beams, items) and tokens (..., items, L)."""

    scores: torch.Tensor
    positions: torch.LongTensor
    token_ids: torch.LongTensor


class EncodedHistories(NamedTuple):
    """The encoder's output and the mask over its positions; where the item head takes part, its queries (batch, size),
    the items' vectors (N, size), its share g in the mixture, which may be a tensor (batch,), and where it has a memory
    what [`OneRecForConditionalGeneration.item_memories`] gives."""

    hidden_states: torch.Tensor
    attention_mask: torch.Tensor | None
    item_queries: torch.Tensor | None = None
    item_vectors: torch.Tensor | None = None
    item_share: float | torch.Tensor = 0.0
    remembered_items: torch.LongTensor | None = None
    remembered_logits: torch.Tensor | None = None

    def of_users(self, users: slice) -> "EncodedHistories":
        """Those of some users."""
        by_user = {"hidden_states", "attention_mask", "item_queries", "remembered_items", "remembered_logits"}
        by_user |= {"item_share"} if torch.is_tensor(self.item_share) else set()
        given = {name: getattr(self, name) for name in by_user}
        return self._replace(**{name: value[users] for name, value in given.items() if value is not None})


def encoded_histories(
    model,
    input_ids=None,
    attention_mask=None,
    encoder_outputs=None,
    item_share: float | torch.Tensor | None = None,
    num_items: int = 1,
    **encoder_inputs,
) -> EncodedHistories:
    """Encodes the histories, unless that is done already.

    Args:
        item_share: g, or a tensor (batch,) of it by user; by default the model's for sessions of `num_items`.

    Raises:
        TypeError: For an input that the encoder does not have; it would go unnoticed there.
        ValueError: For a share of an item head that there is not.
    """
    if model.config.item_head == "none" and (torch.is_tensor(item_share) or item_share not in (None, 0)):
        raise ValueError(f"item_share is {item_share}, but the model has no item head.")
    encoder = model.get_encoder()
    unknown = encoder_inputs.keys() - inspect.signature(encoder.forward).parameters.keys()
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))}: not an argument, nor an input of the encoder.")
    if item_share is None:
        item_share = model.configured_item_share(num_items)
    # The item head's own encoders run where something is to come of them.
    with_head = item_share is None or torch.is_tensor(item_share) or item_share != 0
    if encoder_outputs is None:
        encoder_inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        encoder_outputs = encoder(with_item_states=with_head, **encoder_inputs)
    histories = EncodedHistories(encoder_outputs.last_hidden_state, encoder.position_mask(attention_mask))
    if not with_head:
        return histories
    states = encoder_outputs.item_states, histories.attention_mask
    item_share = model.item_shares(*states, num_items) if item_share is None else item_share
    remembered_items, remembered_logits = model.item_memories(encoder_outputs.item_indices)
    return histories._replace(
        item_queries=model.item_queries(*states),
        item_vectors=model.item_vectors(),
        item_share=item_share,
        remembered_items=remembered_items,
        remembered_logits=remembered_logits,
    )


def user_chunks(
    histories: EncodedHistories, constraints: list[ItemConstraint]
) -> Iterator[tuple[slice, EncodedHistories, list[ItemConstraint]]]:
    """Users who are searched for together, all of them or with an item head as many as its tables have room for: which
    ones, and their histories and constraints in each semantic ID's trie."""
    count = len(histories.hidden_states)
    size = count if histories.item_queries is None else min(users_at_a_time(constraints[0].trie), count)
    if size == count:
        yield slice(count), histories, constraints
        return
    for start in range(0, count, size):
        users = slice(start, start + size)
        yield users, histories.of_users(users), [constraint.of_users(users) for constraint in constraints]


class SessionSearch:
    """Searches `num_items` items for each user of a batch, by the semantic ID of the constraint's trie; iterating over
    it, which can be done once, gives the surviving [`Beams`] after each item."""

    def __init__(
        self,
        model,
        histories: EncodedHistories,
        constraint: ItemConstraint,
        options: SearchOptions,
        normalization: str,
        num_items: int,
    ):
        config, self.decoder = model.config, model.get_decoder()
        self.config, self.constraint, self.trie, self.num_items = config, constraint, constraint.trie, num_items
        self.histories, self.num_beams = histories, options.num_beams
        self.code_scores = CodeScores(model, normalization, constraint.trie.id_number)
        self.choose = SEARCHES[options.search](options, num_items, config.num_levels)
        hidden_states = histories.hidden_states
        self.mixture = ItemMixture.of(histories, constraint, normalization)
        batch, device = len(hidden_states), hidden_states.device
        # The codes of a session's last item are never read again.
        num_tokens = num_items * config.tokens_per_item - 1
        self.paths = BeamPaths(batch, options.most_beams, num_tokens, device)
        # Made once, since every making of it asks the device whether anything is padded; all queries share it.
        attention_mask = create_bidirectional_mask(
            config=self.decoder.config,
            inputs_embeds=hidden_states[:, :1],
            attention_mask=histories.attention_mask,
            encoder_hidden_states=hidden_states,
        )
        self.decoder_inputs = {
            "encoder_hidden_states": hidden_states,
            "encoder_attention_mask": attention_mask,
            "past_key_values": beam_cache(self.paths, config.decoder_layers),
            "use_cache": True,
        }
        self.first_row = torch.arange(batch, device=device)[:, None]
        self.scores = torch.zeros(batch, 1, device=device)
        self.used = torch.empty(batch, 1, 0, dtype=torch.long, device=device)
        self.generated = torch.empty(batch, 1, 0, dtype=torch.long, device=device)
        self.tokens = torch.full((batch, 1), self.code_scores.bos_token_id, device=device)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Beams]:
        levels = self.config.num_levels
        for item in range(self.num_items):
            # A user whose items are used up keeps each beam as it is, by a candidate that costs nothing.
            exhausted = (self.constraint.num_available <= item)[:, None]
            node = torch.zeros_like(self.scores, dtype=torch.long)
            # For a mixture: the scores of the items before this one, and of this item's codes alone.
            self.before, self.code_log_probs = self.scores, torch.zeros_like(self.scores)
            for level in range(levels):
                node = self._extend(self._candidates(node, level, exhausted[..., None]), level)
            self.used = torch.cat([self.used, self._taken_positions(node, exhausted)[..., None]], dim=-1)
            if self.choose.options.guide is not None:
                self._keep(self.choose.kept_sessions(self.scores, self.items(self.used)))
            yield Beams(self.scores, self.used, self.generated.view(*self.used.shape, levels))
            bos = self.tokens.new_full(self.tokens.shape, self.code_scores.bos_token_id)
            self.tokens = torch.cat([self.tokens, bos], dim=1)

    def _candidates(self, node: torch.LongTensor, level: int, exhausted: torch.BoolTensor) -> Candidates:
        """What may follow beams at nodes (batch, beams) of the level before."""
        logits = self._code_logits(node.shape, level)
        children, exists = self.trie.child_nodes(node, level)
        codes = self.trie.codes(children, level)
        available = self.constraint.available(node, children, exists, level, self.used)
        available = torch.where(exhausted, torch.arange(exists.shape[-1], device=exists.device) == 0, available)
        log_probs = self.code_scores.log_probs(logits, codes, available)
        if self.mixture is None:
            log_probs = log_probs.masked_fill(available & exhausted, 0.0)
            return Candidates(self.scores[..., None] + log_probs, logits, available, codes, children)
        of_codes = self.code_log_probs[..., None] + log_probs
        if level == self.config.num_levels - 1 and self.trie.max_items_per_leaf > 1:
            # A leaf's items are candidates of their own; where each has one alone, leaves are positions.
            codes, available = (
                each.repeat_interleave(self.trie.max_items_per_leaf, -1) for each in (codes, available)
            )
            children, free, of_codes = items_of_leaves(self.constraint, of_codes, children, self.used)
            available = available & torch.where(exhausted, torch.arange(free.shape[-1], device=free.device) == 0, free)
        # A beam without an item to go on to stays dead, although there are items below its node.
        alive = available & self.scores.isfinite()[..., None]
        of_items = self.mixture.log_probs(of_codes, children, level, self.used).masked_fill(~alive, -torch.inf)
        of_items = of_items.masked_fill(available & exhausted, 0.0)
        scores = self.before[..., None] + of_items
        return Candidates(scores, logits, available, codes, children, of_codes, of_items)

    def _code_logits(self, shape: torch.Size, level: int) -> torch.Tensor:
        """Scores (batch, beams, K) of a level's codes, without the decoder where an item head alone decides."""
        if self.mixture is not None and not self.mixture.with_codes:
            return self.scores.new_zeros(*shape, self.code_scores.codebook_sizes[level])
        self.paths.extend(self.tokens.shape[1])
        hidden_states = self.decoder(input_ids=self.tokens, **self.decoder_inputs).last_hidden_state[:, -1]
        return self.code_scores.logits(hidden_states.view(*shape, -1), level)

    def _extend(self, candidates: Candidates, level: int) -> torch.LongTensor:
        """Chooses the new beams, has everything follow them and gives their nodes."""
        chosen = self.choose(candidates)
        _, parents, fan_out = candidates.nodes.shape
        parent = chosen // fan_out
        token = candidates.codes.flatten(1).gather(1, chosen) + self.code_scores.level_offsets[level]
        self.scores = candidates.scores.flatten(1).gather(1, chosen)
        if self.mixture is not None:
            self.before = self.before.gather(1, parent)
            self.code_log_probs = candidates.code_log_probs.flatten(1).gather(1, chosen)
        self.used = self.used.take_along_dim(parent[..., None], dim=1)
        generated = self.generated.take_along_dim(parent[..., None], dim=1)
        self.generated = torch.cat([generated, token[..., None]], dim=-1)
        self.paths.follow((parent + self.first_row * parents).flatten())
        self.tokens = token.view(-1, 1)
        return candidates.nodes.flatten(1).gather(1, chosen)

    def items(self, positions: torch.LongTensor) -> torch.LongTensor:
        """Catalogue indices of trie positions, -1 where there is none."""
        items = self.trie.order[positions.clamp(max=self.trie.num_positions - 1)].long()
        return items.masked_fill(positions == self.trie.num_positions, -1)

    def _keep(self, kept: torch.LongTensor):
        """Goes on with some of the beams (batch, kept)."""
        beams = self.scores.shape[1]
        rows = (kept + self.first_row * beams).flatten()
        self.scores = self.scores.gather(1, kept)
        self.used = self.used.take_along_dim(kept[..., None], dim=1)
        self.generated = self.generated.take_along_dim(kept[..., None], dim=1)
        self.tokens = self.tokens[rows]
        self.paths.follow(rows)

    def _taken_positions(self, leaf: torch.LongTensor, exhausted: torch.BoolTensor) -> torch.LongTensor:
        """The item that each beam takes of its leaf: the first that it may, and none where there is none. A mixture's
        beams have chosen their items already."""
        if self.mixture is not None:
            position = leaf
        elif self.trie.max_items_per_leaf > 1 and self.num_items > 1:
            below, free = self.constraint.items_of_leaves(leaf, self.used)
            position = below.gather(-1, free.int().argmax(-1, keepdim=True)).squeeze(-1)
        else:
            position = self.trie.item_range(leaf, self.config.num_levels - 1)[0]
        return position.masked_fill(exhausted | self.scores.isneginf(), self.trie.num_positions)
