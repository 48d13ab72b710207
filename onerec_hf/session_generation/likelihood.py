"""Log-probabilities of given sessions: a forced decode, exact under the item constraint."""

import math

import torch
from torch import nn

from ..item_trie import ItemConstraint, ItemTrie
from .code_scores import CodeScores
from .item_mixture import ItemMixture, items_of_leaves
from .session_search import EncodedHistories, encoded_histories, user_chunks


@torch.no_grad()
def session_log_probs(
    model,
    trie: ItemTrie,
    sessions: torch.LongTensor,
    input_ids: torch.LongTensor | None = None,
    attention_mask: torch.LongTensor | None = None,
    excluded: torch.LongTensor | None = None,
    allowed: torch.BoolTensor | None = None,
    normalization: str = "constrained",
    by_item: bool = False,
    **encoder_inputs,
) -> torch.FloatTensor:
    """Log-probability of each session given its user's history, encoded once.

    Equals the scores of [`generate_sessions`] with the same arguments. With `"constrained"`, the distribution that
    `search="sample"` draws from, the probabilities of all sessions sum to 1, so that differences of two models'
    values over one model's samples estimate their Kullback-Leibler divergence.

    Args:
        model: The [`OneRecForConditionalGeneration`] in evaluation mode, or dropout takes part.
        trie: The catalogue, on the model's device.
        sessions: (batch, C, m) catalogue indices, -1 where there is no item, which adds nothing.
        input_ids, attention_mask, normalization: As in [`generate_sessions`].
        encoder_inputs: Further inputs of the encoder, or `encoder_outputs`; `item_share` as in [`generate_sessions`].
        by_item: Whether each item's own is asked for, given those before it, in place of their sum.
        excluded, allowed: The same. A session with an item that may not be given has probability 0 under
            `"constrained"` and `"level"`.

    Returns:
        (batch, C) log-probabilities, or (batch, C, m) of the items.

    Raises:
        ValueError: For a normalization that there is not, or sessions that do not fit the model or the catalogue.
        TypeError: For an input that the encoder does not have.
    """
    config = model.config
    sessions = sessions.to(model.device)
    batch, _, num_items = sessions.shape
    if not 1 <= num_items <= config.session_items:
        raise ValueError(f"Sessions must have 1 to {config.session_items} items (session_items), got {num_items}.")
    positions = trie.position[sessions.clamp(0, trie.num_items - 1)]
    if sessions.numel() and (sessions.max() >= trie.num_items or ((sessions >= 0) & (positions < 0)).any()):
        raise ValueError(f"sessions hold an item that is not in the trie of {trie.num_items} catalogue indices.")
    encoded = encoded_histories(model, input_ids, attention_mask, num_items=num_items, **encoder_inputs)
    constraints = [ItemConstraint(of_id, batch, excluded, allowed) for of_id in trie.of_ids]
    of_items = torch.cat(
        [
            item_log_probs(model, sessions[users], histories, of_users, normalization)
            for users, histories, of_users in user_chunks(encoded, constraints)
        ]
    )
    return of_items if by_item else of_items.sum(-1)


def item_log_probs(
    model,
    sessions: torch.LongTensor,
    histories: EncodedHistories,
    constraints: list[ItemConstraint],
    normalization: str,
) -> torch.FloatTensor:
    """Log-probabilities (batch, C, m), given those before them, of the items of sessions (batch, C, m), in the trie or
    -1 where there is none, which has 0.

    With several semantic IDs, whose constraints these are, P_codes of an item is the mean of what the sessions written
    in each ID have for it.
    """
    mixture = ItemMixture.of(histories, constraints[0], normalization)
    several = len(constraints) > 1
    apart = several or mixture is not None
    if mixture is None or mixture.with_codes:
        by_id = [_code_log_probs(model, sessions, histories, own, normalization, apart) for own in constraints]
        of_items = torch.stack(by_id).logsumexp(0) - math.log(len(by_id)) if several else by_id[0]
    else:
        of_items = torch.zeros(sessions.shape, device=model.device)
    there = sessions >= 0
    positions, before = _trie_positions(sessions, constraints[0].trie)
    if mixture is not None:
        last = model.config.num_levels - 1
        mixed = [
            mixture.log_probs(of_items[..., item], positions[..., item], last, before[..., :item])
            for item in range(sessions.shape[-1])
        ]
        of_items = torch.stack(mixed, dim=-1)
    return of_items.masked_fill(~there, 0.0)


def _trie_positions(sessions: torch.LongTensor, trie: ItemTrie) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Trie positions (batch, C, m) of sessions, the first for a missing item, of which nothing is read; and those that
    an item after it finds used, where a missing item stands at none."""
    missing = sessions < 0
    positions = trie.position[sessions.clamp(min=0)].long().masked_fill(missing, 0)
    return positions, positions.masked_fill(missing, trie.num_positions)


def _code_log_probs(
    model,
    sessions: torch.LongTensor,
    histories: EncodedHistories,
    constraint: ItemConstraint,
    normalization: str,
    apart: bool,
) -> torch.FloatTensor:
    """(batch, C, m) log-probabilities of the items' codes in the semantic ID of the constraint's trie.

    Args:
        apart: whether items that share an ID are told apart: each has its part of the codes' probability.
    """
    config, trie = model.config, constraint.trie
    levels, code_scores = config.num_levels, CodeScores(model, normalization, trie.id_number)
    batch, candidates, num_items = sessions.shape
    positions, before = _trie_positions(sessions, trie)
    nodes = torch.stack([trie.node_of(positions, level) for level in range(levels)], dim=-1)
    codes = torch.stack([trie.codes(nodes[..., level], level) for level in range(levels)], dim=-1)
    tokens = codes + torch.tensor(list(code_scores.level_offsets), device=model.device)
    decoder_input_ids = nn.functional.pad(tokens, (1, 0), value=code_scores.bos_token_id).flatten(2)[..., :-1]
    hidden_states = model.get_decoder()(
        input_ids=decoder_input_ids.flatten(0, 1),
        encoder_hidden_states=histories.hidden_states,
        encoder_attention_mask=histories.attention_mask,
        use_cache=False,
    ).last_hidden_state.view(batch, candidates, -1, config.hidden_size)
    found = []
    for item in range(num_items):
        used = before[..., :item]
        node, of_codes = torch.zeros_like(positions[..., item]), torch.zeros(batch, candidates, device=model.device)
        for level in range(levels):
            children, exists = trie.child_nodes(node, level)
            available = constraint.available(node, children, exists, level, used)
            node = nodes[..., item, level]
            logits = code_scores.logits(hidden_states[:, :, item * config.tokens_per_item + level], level)
            step = code_scores.log_probs(logits, trie.codes(children, level), available)
            taken = (children == node[..., None]) & exists
            step = step.masked_fill(~taken, -torch.inf).amax(-1)
            of_codes += step
        if apart:
            below, free, parts = items_of_leaves(constraint, of_codes[..., None], node[..., None], used)
            of_codes = parts.masked_fill(~free | (below != positions[..., item, None]), -torch.inf).amax(-1)
        found.append(of_codes)
    return torch.stack(found, dim=-1)


def sampled_divergence(log_probs: torch.FloatTensor, reference_log_probs: torch.FloatTensor) -> torch.DoubleTensor:
    """Kullback-Leibler divergence of a policy from a reference, by Monte Carlo over sessions drawn from the policy.

    It is the mean of d + exp(-d) - 1 with d = log pi - log pi_ref: the mean of d with a term whose expectation is 0,
    which takes out most of its variance.

    Args:
        log_probs: (batch, samples) under the policy, normalised over what may be drawn (`"constrained"`); -inf where
            nothing was drawn.
        reference_log_probs: (batch, samples) under the reference, normalised alike.

    Returns:
        (batch,) divergences [nats a session], NaN where nothing was drawn.
    """
    drawn = log_probs.isfinite()
    distance = (log_probs - reference_log_probs).masked_fill(~drawn, 0.0).double()
    return (distance + torch.expm1(-distance)).sum(1) / drawn.sum(1)
