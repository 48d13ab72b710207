"""Generating sessions and ranked items by catalogue index, under the item constraint."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import nn

from ..item_trie import ItemConstraint, ItemTrie
from .likelihood import item_log_probs
from .searches import SearchOptions
from .session_search import Beams, SessionSearch, encoded_histories, user_chunks

_TOKENS_AT_ONCE = 2**15  # of found sessions that are scored together


@dataclass
class SessionBeams:
    """Sessions, best first (by stochastic beam search and sampling: in the order in which they were drawn; by diverse
    beam search: best first within each group, group by group, and groups may have sessions in common; by guided beam
    search: highest first by the sum of log-probability and weighted value).

    Args:
        items: (batch, sessions, num_items) catalogue indices. -1 throughout where fewer sessions exist than were asked
            for, and after the last item of a user who may be given fewer items than a session has.
        scores: (batch, sessions) log-probability of each session's codes, -inf where there is no session.
        token_ids: (batch, sessions, num_items, L) the code tokens as they were generated, for a check of legality that
            does not rest on the trie; padding where there is no item. With several semantic IDs all of a session are
            those of one.
    """

    items: torch.LongTensor
    scores: torch.FloatTensor
    token_ids: torch.LongTensor


class DecidedItem(NamedTuple):
    """The item (catalogue index) at a position of a user's session, final."""

    user: int
    position: int
    item: int


@torch.no_grad()
def _session_searches(
    model, trie: ItemTrie, num_items, num_beams, excluded=None, allowed=None, normalization="level", **options
) -> Iterator[list[SessionSearch]]:
    """Checks a request of [`generate_sessions`], whose arguments these are, and encodes the histories; the searches in
    each semantic ID for each of their [`user_chunks`]."""
    config = model.config
    num_items = config.session_items if num_items is None else num_items
    if not 1 <= num_items <= config.session_items:
        raise ValueError(
            f"num_items ({num_items}) must lie in [1, {config.session_items}], the model's session_items."
        )
    sizes = [size for of_id in trie.of_ids for size in of_id.codebook_sizes]
    if sizes != list(config.codebook_sizes) or len(trie.of_ids) != config.num_semantic_ids:
        raise ValueError(
            f"The trie has levels of {sizes} codes, the model {list(config.codebook_sizes)}: the tokenizer belongs to "
            "another model."
        )
    num_beams = model.generation_config.num_beams if num_beams is None else num_beams
    of_search = {field.name for field in fields(SearchOptions)} & options.keys()
    search = SearchOptions(num_beams, **{name: options.pop(name) for name in of_search})
    if config.num_semantic_ids > 1 and search.search != "beam":
        raise ValueError(f"With several semantic IDs per item sessions are found by 'beam', not by {search.search!r}.")
    # What guides a search sees to a session's coherence: its candidates are those of a ranked list.
    histories = encoded_histories(model, **options, num_items=1 if search.guide is not None else num_items)
    constraints = [ItemConstraint(of_id, len(histories.hidden_states), excluded, allowed) for of_id in trie.of_ids]
    for users, chunk, of_users in user_chunks(histories, constraints):
        guide = None if search.guide is None else search.guide.of_users(users)
        of_chunk = replace(search, guide=guide)
        yield [SessionSearch(model, chunk, own, of_chunk, normalization, num_items) for own in of_users]


@torch.no_grad()
def generate_sessions(
    model,
    trie: ItemTrie,
    input_ids: torch.LongTensor | None = None,
    attention_mask: torch.LongTensor | None = None,
    num_items: int | None = None,
    num_beams: int | None = None,
    num_return: int | None = None,
    excluded: torch.LongTensor | None = None,
    allowed: torch.BoolTensor | None = None,
    **options,
) -> SessionBeams:
    """Sessions of real items, none repeated within a session; with `num_items=1` a ranked list of items.

    The beams of a user share one copy of the encoder's keys and values, and only codes that an available item follows
    are scored. Where items share a semantic ID, a ranked list holds every item of an ID with the ID's score, and a
    session takes the first of them that is allowed and not in it yet. With an item head such items are told apart:
    each has its own P_item, and of its codes' probability the same part as all of them that may still be given.

    With several semantic IDs per item, beams are searched for in each ID, and all that are found are scored in all of
    them: P_codes of an item is the mean of the probabilities that it has in the IDs, given the items before it written
    in the same ID. So every score is exact, and the search alone is not. Items that share an ID are told apart.

    Args:
        model: The [`OneRecForConditionalGeneration`] in evaluation mode, or dropout takes part.
        trie: The catalogue, on the model's device.
        input_ids, attention_mask: (batch, tokens) encoded histories, left or right padded.
        num_items: Items per session, the config's `session_items` by default.
        num_beams: The generation config's by default; of sampling: sessions drawn.
        num_return: Sessions returned per user, all beams by default.
        excluded, allowed: Consumed and blocked items, an inventory: see [`ItemConstraint`].
        options: The fields of [`SearchOptions`] (`search`, `temperature`, ...); further inputs of the encoder, or
            `encoder_outputs` in place of all of them; and `normalization`, what a code's log-probability is taken
            over. `"level"`, the default: the codes of its level, which is exact since a place in the session fixes the
            level; `"constrained"`: the codes that an available item follows (`generate` with
            `renormalize_logits=True`); `"vocabulary"`: every token (plain `generate`). However sessions are searched
            for, `scores` have it without temperature, filters and penalty. With an item head `item_share`, g in
            P(item) = g P_item + (1 - g) P_codes, or a tensor (batch,) of it by user, strictly between 0 and 1; by
            default the configuration's, that of a ranked list for a guided search too; 0 leaves the head out.

    Returns:
        [`SessionBeams`] of exactly `num_return` sessions.

    Raises:
        ValueError: For a request that the model or the trie cannot serve; it names the argument.
        TypeError: For an option that there is not.
    """
    num_beams = model.generation_config.num_beams if num_beams is None else num_beams
    num_return = num_beams if num_return is None else num_return
    if not 1 <= num_return <= num_beams:
        raise ValueError(f"num_return ({num_return}) must lie in [1, num_beams = {num_beams}].")
    options |= {"input_ids": input_ids, "attention_mask": attention_mask}
    searches = _session_searches(model, trie, num_items, num_beams, excluded, allowed, **options)
    found = [
        _found_sessions(*of_ids, num_return) if len(of_ids) == 1 else _fused_sessions(model, of_ids, num_return)
        for of_ids in searches
    ]
    return SessionBeams(*(torch.cat(values) for values in zip(*found, strict=True)))


def _found_sessions(search: SessionSearch, num_return: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of [`SessionBeams`]."""
    trie = search.trie
    *_, found = search
    if search.mixture is None and found.positions.shape[-1] == 1 and trie.max_items_per_leaf > 1:
        found = _expand_leaves(found, search.constraint, num_return)
    padding = (0, max(num_return - found.scores.shape[1], 0))
    scores = nn.functional.pad(found.scores, padding, value=-torch.inf)[:, :num_return]
    positions = nn.functional.pad(found.positions, (0, 0, *padding), value=trie.num_positions)[:, :num_return]
    token_ids = nn.functional.pad(found.token_ids, (0, 0, 0, 0, *padding))[:, :num_return]
    items = search.items(positions).masked_fill(scores.isneginf()[..., None], -1)
    scores = scores.masked_fill(items[..., 0] < 0, -torch.inf)
    return items, scores, token_ids.masked_fill(items[..., None] < 0, search.config.pad_token_id)


def _fused_sessions(
    model, searches: list[SessionSearch], num_return: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As [`_found_sessions`], of what the searches in the several semantic IDs find together; a session's tokens are
    those of the ID in which it was found first."""
    found = [_found_sessions(search, search.num_beams) for search in searches]
    items, _, token_ids = (torch.cat(values, dim=1) for values in zip(*found, strict=True))
    histories, normalization = searches[0].histories, searches[0].code_scores.normalization
    size = max(_TOKENS_AT_ONCE // token_ids[0].numel(), 1)
    scores = []
    for start in range(0, len(items), size):
        users = slice(start, start + size)
        constraints = [search.constraint.of_users(users) for search in searches]
        of_items = item_log_probs(model, items[users], histories.of_users(users), constraints, normalization)
        scores.append(of_items.sum(-1))
    scores = torch.cat(scores).masked_fill((items[..., 0] < 0) | _repeats(items), -torch.inf)
    scores, best = scores.topk(num_return)
    items = items.take_along_dim(best[..., None], dim=1).masked_fill(scores.isneginf()[..., None], -1)
    token_ids = token_ids.take_along_dim(best[..., None, None], dim=1)
    return items, scores, token_ids.masked_fill(items[..., None] < 0, model.config.pad_token_id)


def _repeats(sessions: torch.LongTensor) -> torch.BoolTensor:
    """Whether each of a user's sessions (batch, sessions, items) is one before it, (batch, sessions)."""
    order = torch.arange(sessions.shape[1], device=sessions.device).expand(sessions.shape[:2])
    for place in reversed(range(sessions.shape[2])):
        order = order.gather(1, sessions[..., place].gather(1, order).sort(dim=1, stable=True).indices)
    ordered = sessions.take_along_dim(order[..., None], dim=1)
    same = nn.functional.pad((ordered[:, 1:] == ordered[:, :-1]).all(-1), (1, 0))
    return torch.zeros_like(same).scatter(1, order, same)


def _expand_leaves(found: Beams, constraint: ItemConstraint, num_return: int) -> Beams:
    """A ranked list of semantic IDs to one of the items that may be given, an ID's items side by side."""
    trie = constraint.trie
    alive = ~found.scores.isneginf()
    first = found.positions[..., 0].clamp(max=trie.num_positions - 1)
    below, free = constraint.items_of_leaves(trie.node_of(first, trie.num_levels - 1), found.positions[..., :0])
    free &= alive[..., None]
    rank = torch.where(free, free.flatten(1).cumsum(1).view_as(free) - 1, num_return).clamp(max=num_return).flatten(1)
    beam = torch.arange(free.shape[1], device=free.device)[:, None].expand(free.shape[1:]).flatten().expand_as(rank)
    # What may not be given, and what is beyond num_return, falls into a column of its own.
    beams = rank.new_zeros(rank.shape[0], num_return + 1).scatter_(1, rank, beam)[:, :num_return]
    positions = rank.new_full((rank.shape[0], num_return + 1), trie.num_positions)
    positions = positions.scatter_(1, rank, below.flatten(1))[:, :num_return, None]
    scores = found.scores.gather(1, beams).masked_fill(positions[..., 0] == trie.num_positions, -torch.inf)
    token_ids = found.token_ids[torch.arange(len(beams), device=beams.device)[:, None], beams]
    return Beams(scores, positions, token_ids)


def stream_sessions(
    model,
    trie: ItemTrie,
    input_ids: torch.LongTensor | None = None,
    attention_mask: torch.LongTensor | None = None,
    num_items: int | None = None,
    num_beams: int | None = None,
    **options,
) -> Iterator[DecidedItem]:
    """Every user's first session of [`generate_sessions`], each item as soon as nothing can change it any more.

    A sampled item is final at once. A beam's is when all surviving beams agree on it, at the latest at the end. Users
    whose mixture does not fit into memory together are searched one part after the other. The arguments are those of
    [`generate_sessions`]; a sampled session takes a single beam.

    Yields:
        [`DecidedItem`], those of each user in the order of the session.
    """
    if options.get("search") == "sample":
        num_beams = 1
    options |= {"input_ids": input_ids, "attention_mask": attention_mask}
    order, first_user = trie.order.cpu(), 0
    if model.config.num_semantic_ids > 1:
        raise ValueError("With several semantic IDs per item no item of a session is decided before the last one.")
    for [search] in _session_searches(model, trie, num_items, num_beams, **options):
        decided: dict[int, int] = {}
        for found in search:
            yield from _newly_decided(found, order, decided, first_user)
        yield from _newly_decided(found, order, decided, first_user, finished=True)
        first_user += len(found.scores)


def _newly_decided(
    found: Beams, order: torch.Tensor, decided: dict[int, int], first_user: int, finished: bool = False
):
    positions, dead = found.positions, found.scores.isneginf()
    agreed = ((positions == positions[:, :1]) | dead[..., None]).all(1)
    count = agreed.int().cumprod(1).sum(1) if not finished else torch.full_like(dead[:, 0].int(), positions.shape[2])
    count = count.masked_fill(dead[:, 0], 0).tolist()
    best = positions[:, 0].tolist()
    for user, items in enumerate(best):
        for place in range(decided.get(user, 0), count[user]):
            if items[place] < len(order):
                yield DecidedItem(first_user + user, place, int(order[items[place]]))
        decided[user] = max(decided.get(user, 0), count[user])
