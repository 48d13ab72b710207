"""Generating sessions and ranked items under the item constraint, and recommending with item ids in and out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerateBeamEncoderDecoderOutput
from transformers.masking_utils import create_bidirectional_mask

from .history_features import encode_history_rows
from .item_trie import ItemConstraint, ItemTrie

NORMALIZATIONS = ("level", "constrained", "vocabulary")
SEARCHES = ("beam", "diverse_beam", "sample", "stochastic_beam")


@dataclass
class SessionBeams:
    """Sessions, best first (by stochastic beam search and sampling: in the order in which they were drawn; by diverse
    beam search: best first within each group, group by group, and groups may have sessions in common).

    Args:
        items (`torch.LongTensor` of shape `(batch, sessions, num_items)`): Catalogue indices. -1 throughout where
            fewer sessions exist than were asked for, and behind the last item of a user who may be given fewer items
            than a session has.
        scores (`torch.FloatTensor` of shape `(batch, sessions)`): Log-probability of each session's codes, -inf where
            there is no session.
        token_ids (`torch.LongTensor` of shape `(batch, sessions, num_items, L)`): The code tokens as they were
            generated, for a check of legality that does not rest on the trie; padding where there is no item.
    """

    items: torch.LongTensor
    scores: torch.FloatTensor
    token_ids: torch.LongTensor


class DecidedItem(NamedTuple):
    """The item (catalogue index) at a position of a user's session, final."""

    user: int
    position: int
    item: int


class BeamPaths:
    """Where the states that each beam has passed through lie in an append-only store.

    A step of beam search gives every beam a new past. Only the pointers to it move: the keys and values stay where
    they were written once, what beams have in common is there once, and the store never grows.
    """

    def __init__(self, batch_size: int, num_beams: int, num_tokens: int, device: torch.device):
        # At the first token the beams of a user are still one.
        self.capacity = batch_size * (1 + num_beams * (num_tokens - 1))
        self.rows = torch.empty(0, batch_size, dtype=torch.long, device=device)  # (tokens, beams of all users)
        self.stored = 0

    def extend(self, num_tokens: int):
        """Makes room for the states of each beam's next tokens."""
        beams = self.rows.shape[1]
        new = torch.arange(num_tokens * beams, device=self.rows.device).view(num_tokens, beams) + self.stored
        self.rows = torch.cat([self.rows, new])
        self.stored += num_tokens * beams

    def follow(self, parents: torch.LongTensor):
        """Beam i goes on from beam `parents[i]`."""
        self.rows = self.rows.index_select(1, parents)


class BeamCacheLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, read along [`BeamPaths`]."""

    is_sliding = False

    def __init__(self, paths: BeamPaths, scratch: dict[torch.device, torch.Tensor], num_tokens: int):
        super().__init__()
        self.paths, self.scratch, self.num_tokens = paths, scratch, num_tokens
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor):
        width = 2 * key_states.shape[1] * key_states.shape[3]
        self.store = key_states.new_empty(self.paths.capacity, width)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Takes (beams, heads, new tokens, head_dim) and gives (beams, heads, all tokens, head_dim)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        beams, heads, new_tokens, head_dim = key_states.shape
        rows = self.paths.rows
        new = self.store[self.paths.stored - new_tokens * beams : self.paths.stored]
        new = new.view(new_tokens, beams, 2, heads, head_dim)
        new[:, :, 0], new[:, :, 1] = key_states.permute(2, 0, 1, 3), value_states.permute(2, 0, 1, 3)
        self.length = rows.shape[0]
        # One buffer serves all layers in turn: each is done with it when the next one begins.
        device, width = self.store.device, self.store.shape[1]
        if device not in self.scratch or len(self.scratch[device]) < rows.numel():
            self.scratch[device] = self.store.new_empty(self.num_tokens * beams, width)
        past = self.scratch[device][: rows.numel()]
        torch.index_select(self.store, 0, rows.flatten().to(device), out=past)
        past = past.view(self.length, beams, 2, heads, head_dim).permute(2, 1, 3, 0, 4)
        return past[0], past[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.num_tokens


class CodeScores:
    """Log-probabilities of the next code, from the current level's slice of the head where that is all it takes."""

    def __init__(self, model, normalization: str):
        self.head, self.normalization = model.lm_head, normalization
        self.level_offsets, self.codebook_sizes = model.config.level_offsets, model.config.codebook_sizes

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
        """Of the candidates (batch, beams, fan-out), -inf where none is available."""
        if self.normalization == "constrained":
            return _log_softmax_over(logits.gather(-1, codes), available)
        if self.normalization == "level":
            logits = logits.log_softmax(-1)
        return logits.gather(-1, codes).masked_fill(~available, -torch.inf)


def _log_softmax_over(logits: torch.Tensor, available: torch.BoolTensor) -> torch.Tensor:
    """log-softmax over what is available, -inf elsewhere, also where nothing is."""
    return logits.masked_fill(~available, -torch.inf).log_softmax(-1).masked_fill(~available, -torch.inf)


def _gumbel(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    return -torch.empty_like(like).exponential_(generator=generator).log()


class _Search:
    """What becomes of the candidates of one step.

    `__call__` takes the candidates' log-probabilities and codes (batch, beams, fan-out), the beams' scores and the
    logits to draw from, and gives the chosen candidates as flat indices (batch, new beams) with their scores.
    """

    def __init__(
        self,
        kind,
        num_beams,
        temperature=1.0,
        top_k=None,
        top_p=None,
        generator=None,
        num_beam_groups=1,
        diversity_penalty=0.0,
    ):
        self.kind, self.num_beams, self.generator = kind, num_beams, generator
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.num_beam_groups, self.diversity_penalty = num_beam_groups, diversity_penalty
        self.started = False
        self.log_prob = self.perturbed = None  # of stochastic beams

    def __call__(
        self,
        log_probs: torch.Tensor,
        scores: torch.Tensor,
        logits: torch.Tensor,
        available: torch.BoolTensor,
        codes: torch.LongTensor,
        num_codes: int,
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        totals = scores[..., None] + log_probs
        if self.kind == "diverse_beam":
            chosen = self._diverse_beam(totals, codes, num_codes)
            return chosen, totals.flatten(1).gather(1, chosen)
        if self.kind == "beam":
            scores, chosen = totals.flatten(1).topk(min(self.num_beams, totals[0].numel()))
            return chosen, scores
        choose = self._sample if self.kind == "sample" else self._stochastic_beam
        chosen = choose(_log_softmax_over(logits / self.temperature, available))
        return chosen, totals.flatten(1).gather(1, chosen)

    def _diverse_beam(self, totals: torch.Tensor, codes: torch.LongTensor, num_codes: int) -> torch.LongTensor:
        """Every group's best beams, a code dearer by the penalty for each beam of former groups that took it at this
        step (Vijayakumar et al. 2016, arXiv 1610.02424, Hamming diversity)."""
        batch, parents, fan_out = totals.shape
        width = self.num_beams // self.num_beam_groups
        # All groups start from the one common beam; from then on each has its own, side by side.
        own = parents // self.num_beam_groups if self.started else 0
        self.started = True
        taken = totals.new_zeros(batch, num_codes)
        chosen = []
        for group in range(self.num_beam_groups):
            beams = slice(group * own, (group + 1) * own) if own else slice(0, parents)
            group_codes = codes[:, beams].flatten(1)
            penalized = totals[:, beams].flatten(1) - self.diversity_penalty * taken.gather(1, group_codes)
            best = penalized.topk(min(width, penalized.shape[1])).indices
            taken.scatter_add_(1, group_codes.gather(1, best), torch.ones_like(best, dtype=taken.dtype))
            chosen.append(best + beams.start * fan_out)
        return torch.cat(chosen, dim=1)

    def _sample(self, proposal: torch.Tensor) -> torch.LongTensor:
        """Every beam draws one code; from the common start there are drawn as many as beams are wanted."""
        fan_out = proposal.shape[-1]
        if self.top_k:
            smallest = proposal.topk(min(self.top_k, fan_out)).values[..., -1:]
            proposal = proposal.masked_fill(proposal < smallest, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = proposal.softmax(-1).sort(descending=True)
            # A code is dropped if those before it make up top_p already; the first one always stays.
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            beyond = torch.zeros_like(beyond).scatter(-1, order, beyond)
            proposal = proposal.masked_fill(beyond, -torch.inf)
        beam = torch.arange(proposal.shape[1], device=proposal.device)
        proposal = proposal.expand(-1, self.num_beams, -1)
        return (proposal + _gumbel(proposal, self.generator)).argmax(-1) + beam * fan_out

    def _stochastic_beam(self, proposal: torch.Tensor) -> torch.LongTensor:
        """Gumbel-top-k: sessions drawn without replacement (Kool et al. 2019, arXiv 1903.06059, Algorithm 1)."""
        if self.log_prob is None:
            self.log_prob = self.perturbed = proposal.new_zeros(proposal.shape[:2])
        log_prob = self.log_prob[..., None] + proposal
        noisy = log_prob + _gumbel(log_prob, self.generator)
        # Noise whose maximum over the children is the parent's, in the stable form of appendix B.3.
        below = noisy - noisy.amax(-1, keepdim=True)
        gap = self.perturbed[..., None] - noisy + torch.log1p(-below.exp())
        perturbed = self.perturbed[..., None] - gap.relu() - torch.log1p(torch.exp(-gap.abs()))
        perturbed = perturbed.masked_fill(log_prob.isneginf() | perturbed.isnan(), -torch.inf).flatten(1)
        self.perturbed, chosen = perturbed.topk(min(self.num_beams, perturbed.shape[1]))
        self.log_prob = log_prob.flatten(1).gather(1, chosen)
        return chosen


class _Beams(NamedTuple):
    """What the beams have generated so far: trie positions (batch, beams, items) and tokens (..., items, L)."""

    scores: torch.Tensor
    positions: torch.LongTensor
    token_ids: torch.LongTensor


@torch.no_grad()
def _search_sessions(
    model,
    trie: ItemTrie,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None,
    constraint: ItemConstraint,
    search: _Search,
    normalization: str,
    num_items: int,
) -> Iterator[_Beams]:
    """Yields the surviving beams after each item."""
    config, decoder = model.config, model.get_decoder()
    batch, device = encoder_hidden_states.shape[0], encoder_hidden_states.device
    levels = config.num_levels
    code_scores = CodeScores(model, normalization)
    # The codes of a session's last item are never read again.
    num_tokens = num_items * config.tokens_per_item - 1
    # Made once, since every making of it asks the device whether anything is padded; all queries share it.
    encoder_attention_mask = create_bidirectional_mask(
        config=decoder.config,
        inputs_embeds=encoder_hidden_states[:, :1],
        attention_mask=encoder_attention_mask,
        encoder_hidden_states=encoder_hidden_states,
    )
    paths = BeamPaths(batch, search.num_beams, num_tokens, device)
    scratch: dict[torch.device, torch.Tensor] = {}
    layers = [BeamCacheLayer(paths, scratch, num_tokens) for _ in range(config.decoder_layers)]
    cache = EncoderDecoderCache(Cache(layers=layers), DynamicCache())

    first_row = torch.arange(batch, device=device)[:, None]
    scores = torch.zeros(batch, 1, device=device)
    used = torch.empty(batch, 1, 0, dtype=torch.long, device=device)
    generated = torch.empty(batch, 1, 0, dtype=torch.long, device=device)
    bos = torch.full((batch, 1), config.bos_token_id, device=device)
    tokens = bos
    for item in range(num_items):
        node = torch.zeros(batch, scores.shape[1], dtype=torch.long, device=device)
        # A user whose items are used up keeps each beam as it is, by a candidate that costs nothing.
        exhausted = constraint.num_available <= item
        for level in range(levels):
            paths.extend(tokens.shape[1])
            hidden_states = decoder(
                input_ids=tokens,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            logits = code_scores.logits(hidden_states.view(batch, scores.shape[1], -1), level)
            children, exists = trie.child_nodes(node, level)
            codes = trie.codes(children, level)
            available = constraint.available(node, children, exists, level, used)
            available = torch.where(
                exhausted[:, None, None], torch.arange(exists.shape[-1], device=device) == 0, available
            )
            log_probs = code_scores.log_probs(logits, codes, available)
            log_probs = log_probs.masked_fill(available & exhausted[:, None, None], 0.0)
            parents = scores.shape[1]
            chosen, scores = search(
                log_probs, scores, logits.gather(-1, codes), available, codes, config.codebook_sizes[level]
            )
            parent = chosen // exists.shape[-1]
            node = children.flatten(1).gather(1, chosen)
            token = codes.flatten(1).gather(1, chosen) + config.level_offsets[level]
            used = used.gather(1, parent[..., None].expand(-1, -1, item))
            generated = generated.gather(1, parent[..., None].expand(-1, -1, generated.shape[-1]))
            generated = torch.cat([generated, token[..., None]], dim=-1)
            paths.follow((parent + first_row * parents).flatten())
            tokens = token.view(-1, 1)
        position = trie.item_range(node, levels - 1)[0]
        if trie.max_items_per_leaf > 1 and num_items > 1:
            below, free = constraint.items_of_leaves(node, used)
            position = below.gather(-1, free.int().argmax(-1, keepdim=True)).squeeze(-1)
        position = position.masked_fill(exhausted[:, None] | scores.isneginf(), trie.num_positions)
        used = torch.cat([used, position[..., None]], dim=-1)
        yield _Beams(scores, used, generated.view(*used.shape, levels))
        tokens = torch.cat([tokens, bos.new_full(tokens.shape, config.bos_token_id)], dim=1)


@torch.no_grad()
def _prepare(
    model,
    trie: ItemTrie,
    input_ids: torch.LongTensor | None,
    attention_mask: torch.LongTensor | None,
    num_items: int | None,
    num_beams: int | None,
    excluded: torch.LongTensor | None,
    allowed: torch.BoolTensor | None,
    normalization: str,
    search: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
    num_beam_groups: int = 1,
    diversity_penalty: float = 0.0,
    encoder_outputs=None,
    **encoder_inputs,
) -> tuple[ItemConstraint, Iterator[_Beams]]:
    """Checks the request and encodes the histories."""
    config = model.config
    num_items = config.session_items if num_items is None else num_items
    num_beams = model.generation_config.num_beams if num_beams is None else num_beams
    if not 1 <= num_items <= config.session_items:
        raise ValueError(
            f"num_items ({num_items}) must lie in [1, {config.session_items}], the model's session_items."
        )
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}.")
    if list(trie.codebook_sizes) != list(config.codebook_sizes):
        raise ValueError(
            f"The trie has levels of {list(trie.codebook_sizes)} codes, the model {list(config.codebook_sizes)}: the "
            "tokenizer belongs to another model."
        )
    for name, value, known in (("normalization", normalization, NORMALIZATIONS), ("search", search, SEARCHES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    if (top_k is not None and top_k < 0) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"top_k must be positive (0 keeps all) and top_p in (0, 1], got {top_k} and {top_p}.")
    if search in ("beam", "diverse_beam") and temperature != 1 or search != "sample" and (top_k or top_p is not None):
        raise ValueError(
            f"temperature serves 'sample' and 'stochastic_beam', top_k and top_p 'sample', not {search!r}."
        )
    if search == "diverse_beam" and (num_beam_groups < 2 or num_beams % num_beam_groups or diversity_penalty <= 0):
        raise ValueError(
            f"'diverse_beam' needs at least 2 num_beam_groups of equal size and a diversity_penalty above 0, got "
            f"{num_beam_groups} groups of {num_beams} beams and {diversity_penalty}."
        )
    encoder = model.get_encoder()
    if encoder_outputs is None:
        encoder_outputs = encoder(input_ids=input_ids, attention_mask=attention_mask, **encoder_inputs)
    hidden_states = encoder_outputs.last_hidden_state
    constraint = ItemConstraint(trie, hidden_states.shape[0], excluded, allowed)
    return constraint, _search_sessions(
        model,
        trie,
        hidden_states,
        encoder.position_mask(attention_mask),
        constraint,
        _Search(search, num_beams, temperature, top_k, top_p, generator, num_beam_groups, diversity_penalty),
        normalization,
        num_items,
    )


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
    normalization: str = "level",
    search: str = "beam",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    num_beam_groups: int = 1,
    diversity_penalty: float = 0.0,
    **encoder_inputs,
) -> SessionBeams:
    """Sessions of real items, none repeated within a session; with `num_items=1` a ranked list of items.

    The beams of a user share one copy of the encoder's keys and values, and only codes that an available item follows
    are scored. Where items share a semantic ID, a ranked list holds every item of an ID with the ID's score, and a
    session takes the first of them that is allowed and not in it yet.

    Args:
        model ([`OneRecForConditionalGeneration`]): In evaluation mode, or dropout takes part.
        trie ([`ItemTrie`]): The catalogue, on the model's device.
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch, tokens)`): Encoded histories, left or right
            padded.
        num_items (`int`, *optional*): Items per session, the config's `session_items` by default.
        num_beams (`int`, *optional*): The generation config's by default; of sampling: sessions drawn.
        num_return (`int`, *optional*): Sessions returned per user, all beams by default.
        excluded, allowed (*optional*): Seen and blocked items, an inventory: see [`ItemConstraint`].
        normalization (`str`): What a code's log-probability is taken over: `"level"`, the codes of its level, which
            is exact since a place in the session fixes the level; `"constrained"`, the codes that an available item
            follows (`generate` with `renormalize_logits=True`); `"vocabulary"`, every token (plain `generate`).
        search (`str`): `"beam"`; `"diverse_beam"`, groups of beams that avoid each other's codes; `"sample"`,
            independent sessions; `"stochastic_beam"`, sessions drawn without replacement. The latter two draw from
            the codes that an available item follows; `scores` are those of `normalization` all the same, without
            temperature, filters and penalty.
        temperature, top_k, top_p: Of the distribution that is drawn from; the latter two for `"sample"`.
        generator (`torch.Generator`, *optional*): Source of the draws, on the model's device.
        num_beam_groups, diversity_penalty: Of `"diverse_beam"`: into how many groups the beams are cut, and what a
            group's beams lose, in nats, for each beam of former groups with the same code at the same step.
        encoder_inputs: Further inputs of the encoder; or `encoder_outputs` in place of all of them.

    Returns:
        [`SessionBeams`] of exactly `num_return` sessions.

    Raises:
        ValueError: For a request that the model or the trie cannot serve; it names the argument.
    """
    num_beams = model.generation_config.num_beams if num_beams is None else num_beams
    num_return = num_beams if num_return is None else num_return
    if not 1 <= num_return <= num_beams:
        raise ValueError(f"num_return ({num_return}) must lie in [1, num_beams = {num_beams}].")
    constraint, found = _prepare(
        model,
        trie,
        input_ids,
        attention_mask,
        num_items,
        num_beams,
        excluded,
        allowed,
        normalization,
        search,
        temperature,
        top_k,
        top_p,
        generator,
        num_beam_groups,
        diversity_penalty,
        **encoder_inputs,
    )
    *_, session = found
    if session.positions.shape[-1] == 1 and trie.max_items_per_leaf > 1:
        session = _expand_leaves(session, constraint, num_return)
    padding = (0, max(num_return - session.scores.shape[1], 0))
    scores = nn.functional.pad(session.scores, padding, value=-torch.inf)[:, :num_return]
    positions = nn.functional.pad(session.positions, (0, 0, *padding), value=trie.num_positions)[:, :num_return]
    token_ids = nn.functional.pad(session.token_ids, (0, 0, 0, 0, *padding))[:, :num_return]
    items = trie.order[positions.clamp(max=trie.num_positions - 1)].long()
    items = items.masked_fill((positions == trie.num_positions) | scores.isneginf()[..., None], -1)
    scores = scores.masked_fill(items[..., 0] < 0, -torch.inf)
    return SessionBeams(items, scores, token_ids.masked_fill(items[..., None] < 0, model.config.pad_token_id))


def _expand_leaves(session: _Beams, constraint: ItemConstraint, num_return: int) -> _Beams:
    """A ranked list of semantic IDs to one of the items that may be given, an ID's items side by side."""
    trie = constraint.trie
    alive = ~session.scores.isneginf()
    first = session.positions[..., 0].clamp(max=trie.num_positions - 1)
    below, free = constraint.items_of_leaves(trie.node_of(first, trie.num_levels - 1), session.positions[..., :0])
    free &= alive[..., None]
    rank = torch.where(free, free.flatten(1).cumsum(1).view_as(free) - 1, num_return).clamp(max=num_return).flatten(1)
    beam = torch.arange(free.shape[1], device=free.device)[:, None].expand(free.shape[1:]).flatten().expand_as(rank)
    # What may not be given, and what is beyond num_return, falls into a column of its own.
    beams = rank.new_zeros(rank.shape[0], num_return + 1).scatter_(1, rank, beam)[:, :num_return]
    positions = rank.new_full((rank.shape[0], num_return + 1), trie.num_positions)
    positions = positions.scatter_(1, rank, below.flatten(1))[:, :num_return, None]
    scores = session.scores.gather(1, beams).masked_fill(positions[..., 0] == trie.num_positions, -torch.inf)
    token_ids = session.token_ids[torch.arange(len(beams), device=beams.device)[:, None], beams]
    return _Beams(scores, positions, token_ids)


def stream_sessions(
    model,
    trie: ItemTrie,
    input_ids: torch.LongTensor | None = None,
    attention_mask: torch.LongTensor | None = None,
    num_items: int | None = None,
    num_beams: int | None = None,
    excluded: torch.LongTensor | None = None,
    allowed: torch.BoolTensor | None = None,
    normalization: str = "level",
    search: str = "beam",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    **encoder_inputs,
) -> Iterator[DecidedItem]:
    """Every user's first session of [`generate_sessions`], each item as soon as nothing can change it any more.

    A sampled item is final at once. A beam's is when all surviving beams agree on it, at the latest at the end. The
    arguments are those of [`generate_sessions`]; a sampled session takes a single beam.

    Yields:
        [`DecidedItem`], of each user in the order of the session.
    """
    if search == "sample":
        num_beams = 1
    _, found = _prepare(
        model,
        trie,
        input_ids,
        attention_mask,
        num_items,
        num_beams,
        excluded,
        allowed,
        normalization,
        search,
        temperature,
        top_k,
        top_p,
        generator,
        **encoder_inputs,
    )
    order = trie.order.cpu()
    decided: dict[int, int] = {}
    session = None
    for session in found:
        yield from _newly_decided(session, order, decided, finished=False)
    yield from _newly_decided(session, order, decided, finished=True)


def _newly_decided(session: _Beams, order: torch.Tensor, decided: dict[int, int], finished: bool):
    positions, dead = session.positions, session.scores.isneginf()
    agreed = ((positions == positions[:, :1]) | dead[..., None]).all(1)
    count = agreed.int().cumprod(1).sum(1) if not finished else torch.full_like(dead[:, 0].int(), positions.shape[2])
    count = count.masked_fill(dead[:, 0], 0).tolist()
    best = positions[:, 0].tolist()
    for user, items in enumerate(best):
        for place in range(decided.get(user, 0), count[user]):
            if items[place] < len(order):
                yield DecidedItem(user, place, int(order[items[place]]))
        decided[user] = max(decided.get(user, 0), count[user])


def generate_with_trie(
    model,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    trie: ItemTrie,
    excluded: torch.LongTensor | None = None,
    allowed: torch.BoolTensor | None = None,
    normalization: str = "level",
    stochastic_beams: bool = False,
    generator: torch.Generator | None = None,
    **model_kwargs,
) -> GenerateBeamEncoderDecoderOutput | torch.LongTensor:
    """`generate`'s way to the engine: `model.generate(**inputs, custom_generate=generate_with_trie, trie=trie)`.

    Beams, returned sequences, length, sampling and the form of the result follow the generation config, as in plain
    `generate`; the other arguments are those of [`generate_sessions`]. `generate` itself repeats the encoder's output
    for every beam before it calls this: [`generate_sessions`] and [`Recommender`] spare that memory.

    Raises:
        ValueError: If a logits processor is given, which this search does not ask, or if a length is asked for that is
            no whole number of items.
    """
    config = model.config
    num_items, rest = divmod(generation_config.max_length, config.tokens_per_item)
    if rest:
        raise ValueError(
            f"max_length ({generation_config.max_length}) is no whole number of items: with <bos> an item has "
            f"{config.tokens_per_item} tokens, so max_new_tokens must be a multiple of that less one."
        )
    num_return = generation_config.num_return_sequences
    copies = max(generation_config.num_beams, num_return)
    encoder_outputs = model_kwargs["encoder_outputs"]
    encoder_outputs = type(encoder_outputs)(last_hidden_state=encoder_outputs.last_hidden_state[::copies])
    attention_mask = model_kwargs.get("attention_mask")
    sampling = generation_config.do_sample
    found = generate_sessions(
        model,
        trie,
        attention_mask=None if attention_mask is None else attention_mask[::copies],
        num_items=num_items,
        num_beams=num_return if sampling and not stochastic_beams else generation_config.num_beams,
        num_return=num_return,
        excluded=excluded,
        allowed=allowed,
        normalization=normalization,
        search="stochastic_beam" if stochastic_beams else "sample" if sampling else "beam",
        temperature=(generation_config.temperature or 1.0) if sampling or stochastic_beams else 1.0,
        top_k=generation_config.top_k if sampling and not stochastic_beams else None,
        top_p=generation_config.top_p if sampling and not stochastic_beams else None,
        generator=generator,
        encoder_outputs=encoder_outputs,
    )
    bos = found.token_ids.new_full((*found.items.shape, 1), config.bos_token_id)
    sequences = torch.cat([bos, found.token_ids], -1).flatten(2).flatten(0, 1)
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateBeamEncoderDecoderOutput(sequences=sequences, sequences_scores=found.scores.flatten())


def excluded_items(histories: list[np.ndarray], device: torch.device) -> torch.LongTensor:
    """Lists of catalogue indices, one by user, as [`ItemConstraint`] reads them: (users, longest), -1 behind."""
    lengths = np.fromiter((len(history) for history in histories), dtype=np.int64, count=len(histories))
    padded = np.full((len(histories), int(lengths.max(initial=0))), -1, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate([np.zeros(0, np.int64), *histories])
    return torch.from_numpy(padded).to(device)


class Recommender:
    """Recommends to users from their histories of item ids; keeps the trie on the model's device between calls.

    Items that the tokenizer adds or removes are added or removed here at the next call.

    Args:
        model ([`OneRecForConditionalGeneration`]): The trained generator.
        tokenizer ([`OneRecTokenizer`]): The tokenizer saved with it.
        scorer ([`SessionScorer`], *optional*): Its reward model chooses a user's session among those that the search
            finds; without one it is the likeliest. Its tokenizer has the same catalogue.

    Raises:
        ValueError: If the scorer's catalogue is another.
    """

    def __init__(self, model, tokenizer, scorer=None):
        self.model, self.tokenizer, self.scorer = model, tokenizer, scorer
        if scorer is not None and scorer.tokenizer.semantic_id_fingerprint != tokenizer.semantic_id_fingerprint:
            raise ValueError("The reward model's catalogue differs from the generator's: they are of different runs.")
        self._build_trie()

    def _build_trie(self):
        self.catalogue = self.tokenizer.semantic_id_fingerprint
        self.trie = ItemTrie.from_tokenizer(self.tokenizer).to(self.model.device)

    def __call__(
        self,
        histories: list[list | dict],
        top_k: int = 10,
        num_beams: int | None = None,
        exclude_seen: bool = True,
        unknown: str = "error",
        blocked_items: Iterable | None = None,
        allowed_items: Iterable | None = None,
        normalization: str = "level",
        search: str = "beam",
        temperature: float = 1.0,
        num_beam_groups: int = 4,
        diversity_penalty: float = 0.5,
        seed: int | None = None,
        batch_size: int = 32,
        show_progress: bool = False,
    ) -> list[dict[str, list]]:
        """Recommends.

        Args:
            histories (`list[list]`): Item ids per user, oldest first, of the catalogue's own type. May be empty. A
                model with feedback, times or user features needs rows (`dict`) of `history_item_ids` and of the
                columns that [`encode_history_rows`] names. A reward model reads `exposed_item_ids`,
                `exposed_feedback`, `feedback_totals` and `user_profile` (data/schema.py) of them, or else the history.
            top_k (`int`): Length of the ranked list.
            num_beams (`int`, *optional*): The saved generation config's by default, and at least `top_k`.
            exclude_seen (`bool`): Whether items of the history are left out.
            unknown (`str`): `"error"` raises for an item that is not in the catalogue, `"skip"` leaves it out.
            blocked_items (iterable, *optional*): Item ids that nobody is given.
            allowed_items (iterable, *optional*): The only item ids that may be given: an inventory or a region.
            normalization, search, temperature: As [`generate_sessions`] has them. With `"stochastic_beam"` the ranked
                list is a draw without replacement; `"diverse_beam"` is for sessions, and the list by plain beams.
            num_beam_groups, diversity_penalty: Of `"diverse_beam"`; beams are added to make the groups equal.
            seed (`int`, *optional*): Makes draws repeatable.
            batch_size (`int`): Users encoded together.
            show_progress (`bool`): Whether to draw a progress bar.

        Returns:
            `list[dict]`: Per user `session`, the item ids of the best (or first drawn) session, or of the one that
            the scorer chose; `items`, the ranked item ids, highest first; and `scores`, their log-probabilities. Lists
            are shorter than asked where fewer items may be recommended.

        Raises:
            ValueError: If a history, a user's exposures or an option name an item that the tokenizer does not know.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        if search == "sample":
            raise ValueError("Independent samples make no ranked list: draw without repeats by 'stochastic_beam'.")
        model = self.model
        if self.catalogue != self.tokenizer.semantic_id_fingerprint:  # items were added or removed
            self._build_trie()
        trie = self.trie = self.trie.to(model.device)
        num_beams = model.generation_config.num_beams if num_beams is None else num_beams
        num_beams = min(max(num_beams, top_k), trie.num_positions)
        generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
        ranking = {
            "num_beams": num_beams,
            "allowed": self._allowed(blocked_items, allowed_items),
            "normalization": normalization,
            "search": search,
            "temperature": temperature,
            "generator": generator,
        }
        sessions = ranking
        if search == "diverse_beam":
            sessions = ranking | {
                "num_beams": num_beams + -num_beams % max(num_beam_groups, 1),
                "num_beam_groups": num_beam_groups,
                "diversity_penalty": diversity_penalty,
            }
            ranking = ranking | {"search": "beam"}
        was_training = model.training
        model.eval()
        try:
            results = []
            for start in tqdm(range(0, len(histories), batch_size), desc="Recommending", disable=not show_progress):
                chunk = self._known_rows(histories[start : start + batch_size], start, unknown)
                results.extend(self._recommend(chunk, min(top_k, num_beams), exclude_seen, ranking, sessions))
        finally:
            model.train(was_training)
        return results

    def _allowed(self, blocked_items: Iterable | None, allowed_items: Iterable | None) -> torch.BoolTensor | None:
        if blocked_items is None and allowed_items is None:
            return None
        allowed = np.full(self.trie.num_items, allowed_items is None)
        if allowed_items is not None:
            allowed[self.tokenizer.item_index(list(allowed_items))] = True
        if blocked_items is not None:
            allowed[self.tokenizer.item_index(list(blocked_items))] = False
        return torch.from_numpy(allowed).to(self.model.device)

    def _known_rows(self, rows: list[list | dict], first: int, unknown: str) -> list[dict]:
        """The chunk that begins at user `first` as rows with catalogue indices in `history` and `exposed`."""
        rows = [row if isinstance(row, dict) else {"history_item_ids": row} for row in rows]
        for user, row in enumerate(rows, start=first):
            if "history_item_ids" not in row:
                raise ValueError(f"histories[{user}] has no history_item_ids, only {', '.join(map(str, row))}")
        rows = self._indexed(rows, "history", ("history_feedback", "history_timestamps"), first, unknown)
        if self.scorer is None:
            return rows
        feedback = len(self.scorer.model.config.feedback)
        for row in rows:  # one exposure's behind the other's, as a line for each
            if feedback and row.get("exposed_feedback") is not None:
                row["exposed_feedback"] = np.reshape(row["exposed_feedback"], (-1, feedback))
        return self._indexed(rows, "exposed", ("exposed_feedback",), first, unknown)

    def _indexed(self, rows: list[dict], name: str, aligned: tuple[str, ...], first: int, unknown: str) -> list[dict]:
        """The rows with the known items of `{name}_item_ids`, where there are any, as catalogue indices in `name`, all
        looked up at once, and with what the columns `aligned` hold of these items."""
        lists = [row.get(f"{name}_item_ids") for row in rows]
        items = [item for items in lists if items is not None for item in items]
        ends = np.cumsum([0 if items is None else len(items) for items in lists])
        indices = self.tokenizer.item_index(items, unknown="skip")
        missing = np.flatnonzero(indices < 0)
        if len(missing) and unknown == "error":
            user = first + int(np.searchsorted(ends, missing[0], side="right"))
            raise ValueError(
                f"histories[{user}] holds item id {items[missing[0]]!r}, which is not in the catalogue of "
                f"{self.tokenizer.num_items} items; drop it or pass unknown='skip'"
            )
        indexed = []
        for row, given, found in zip(rows, lists, np.split(indices, ends[:-1]), strict=True):
            known = np.flatnonzero(found >= 0)
            kept = {
                column: [row[column][position] for position in known]
                for column in aligned
                if row.get(column) is not None and len(known) < len(found) == len(row[column])
            }
            indexed.append({**row, **kept, name: None if given is None else found[known]})
        return indexed

    @torch.no_grad()
    def _recommend(self, rows: list[dict], top_k, exclude_seen, ranking, sessions) -> list[dict[str, list]]:
        """Results of users encoded together; `ranking` and `sessions` are options of the two searches."""
        model, trie = self.model, self.trie
        encoded = encode_history_rows(rows, self.tokenizer, model.config).to(model.device)
        users = {
            "attention_mask": encoded["attention_mask"],
            "encoder_outputs": model.get_encoder()(**encoded),
            "excluded": excluded_items([row["history"] for row in rows], model.device) if exclude_seen else None,
        }
        ranked = generate_sessions(model, trie, num_items=1, num_return=top_k, **users, **ranking)
        found = generate_sessions(
            model, trie, num_return=1 if self.scorer is None else None, **users, **sessions
        ).items.cpu()
        chosen = found[:, 0]
        if self.scorer is not None:
            rewards = self.scorer.score(rows, found).reward
            chosen = found[torch.arange(len(found)), rewards.nan_to_num(-torch.inf).argmax(dim=1)]
        # Draws come in their own order; the list is by score.
        scores, order = ranked.scores.sort(dim=1, descending=True, stable=True)
        items = ranked.items[..., 0].gather(1, order)
        ids = self.tokenizer.item_ids
        return [
            {
                "session": ids[session[session >= 0]].tolist(),
                "items": ids[row[row >= 0]].tolist(),
                "scores": row_scores[row >= 0].tolist(),
            }
            for session, row, row_scores in zip(chosen.numpy(), items.cpu().numpy(), scores.cpu().numpy(), strict=True)
        ]


def recommend(model, tokenizer, histories: list[list], **options) -> list[dict[str, list]]:
    """Recommends once: `Recommender(model, tokenizer)(histories, **options)`.

    Keep a [`Recommender`], whose options these are, to build the trie once for many calls.
    """
    return Recommender(model, tokenizer)(histories, **options)


__all__ = [
    "DecidedItem",
    "Recommender",
    "SessionBeams",
    "excluded_items",
    "generate_sessions",
    "generate_with_trie",
    "recommend",
    "stream_sessions",
]
