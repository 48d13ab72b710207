"""Log-probabilities of given sessions: a forced decode, exact under the item constraint."""

import torch
from torch import nn

from ..item_trie import ItemConstraint, ItemTrie
from .code_scores import CodeScores
from .item_mixture import ItemMixture
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
        excluded, allowed: The same. A session with an item that may not be given has probability 0 under
            `"constrained"` and `"level"`.

    Returns:
        (batch, C) log-probabilities.

    Raises:
        ValueError: For a normalization that there is not, or sessions that do not fit the model or the catalogue.
        TypeError: For an input that the encoder does not have.
    """
    config = model.config
    code_scores = CodeScores(model, normalization)
    sessions = sessions.to(model.device)
    batch, candidates, num_items = sessions.shape
    if not 1 <= num_items <= config.session_items:
        raise ValueError(f"Sessions must have 1 to {config.session_items} items (session_items), got {num_items}.")
    there = sessions >= 0
    positions = trie.position[sessions.clamp(0, trie.num_items - 1)].long()
    if sessions.numel() and (sessions.max() >= trie.num_items or (there & (positions < 0)).any()):
        raise ValueError(f"sessions hold an item that is not in the trie of {trie.num_items} catalogue indices.")
    encoded = encoded_histories(model, input_ids, attention_mask, **encoder_inputs)
    found, start = [], 0
    for histories, constraint in user_chunks(encoded, ItemConstraint(trie, batch, excluded, allowed)):
        rows = slice(start, start + len(histories.hidden_states))
        start = rows.stop
        found.append(
            _log_probs(model, positions[rows].masked_fill(~there[rows], -1), histories, constraint, code_scores)
        )
    return torch.cat(found)


def _log_probs(
    model,
    positions: torch.LongTensor,
    histories: EncodedHistories,
    constraint: ItemConstraint,
    code_scores: CodeScores,
) -> torch.FloatTensor:
    """(batch, C) log-probabilities of sessions of trie positions (batch, C, m), -1 where there is no item."""
    config, levels, trie = model.config, model.config.num_levels, constraint.trie
    batch, candidates, num_items = positions.shape
    # From here on a missing item stands at the first position, and what it adds is left out at the end.
    there, positions = positions >= 0, positions.clamp(min=0)
    nodes = torch.stack([trie.node_of(positions, level) for level in range(levels)], dim=-1)
    codes = torch.stack([trie.codes(nodes[..., level], level) for level in range(levels)], dim=-1)
    tokens = codes + torch.tensor(list(config.level_offsets), device=model.device)
    decoder_input_ids = nn.functional.pad(tokens, (1, 0), value=config.bos_token_id).flatten(2)[..., :-1]
    hidden_states = model.get_decoder()(
        input_ids=decoder_input_ids.flatten(0, 1),
        encoder_hidden_states=histories.hidden_states,
        encoder_attention_mask=histories.attention_mask,
        use_cache=False,
    ).last_hidden_state.view(batch, candidates, -1, config.hidden_size)
    mixture = ItemMixture.of(histories, constraint, code_scores.normalization)
    log_probs = torch.zeros(batch, candidates, device=model.device)
    for item in range(num_items):
        used = positions[..., :item].masked_fill(~there[..., :item], trie.num_positions)
        node, of_codes = torch.zeros_like(positions[..., item]), torch.zeros_like(log_probs)
        for level in range(levels):
            children, exists = trie.child_nodes(node, level)
            available = constraint.available(node, children, exists, level, used)
            node = nodes[..., item, level]
            logits = code_scores.logits(hidden_states[:, :, item * config.tokens_per_item + level], level)
            step = code_scores.log_probs(logits, trie.codes(children, level), available)
            taken = (children == node[..., None]) & exists
            step = step.masked_fill(~taken, -torch.inf).amax(-1)
            of_codes += step
        of_item, position = of_codes, positions[..., item]
        if mixture is not None:
            below, free, parts = mixture.items_of_leaves(of_codes[..., None], node[..., None], used)
            of_codes = parts.masked_fill(~free | (below != position[..., None]), -torch.inf).amax(-1)
            of_item = mixture.log_probs(of_codes, position, levels - 1, used)
        log_probs += of_item.masked_fill(~there[..., item], 0.0)
    return log_probs


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
