"""Log-probability of given sessions under the item constraint: the generator's policy, asked instead of drawn from."""

import torch

from .item_trie import ItemConstraint, ItemTrie
from .session_generation import NORMALIZATIONS, _CodeScores


@torch.no_grad()
def session_log_probs(
    model,
    trie: ItemTrie,
    items: torch.LongTensor,
    input_ids: torch.LongTensor | None = None,
    attention_mask: torch.LongTensor | None = None,
    excluded: torch.LongTensor | None = None,
    allowed: torch.BoolTensor | None = None,
    normalization: str = "constrained",
    encoder_outputs=None,
    **encoder_inputs,
) -> torch.Tensor:
    """Of C sessions of each of B users, each history encoded once and all codes scored in one pass of the decoder.

    What [`generate_sessions`] would give as the score of these sessions. Under the default normalization the
    probabilities of all sessions that a user may be given sum to 1, and it is what `search="sample"` draws from.

    Args:
        model ([`OneRecForConditionalGeneration`]): In evaluation mode, or dropout takes part.
        trie ([`ItemTrie`]): The catalogue, on the model's device.
        items (`torch.LongTensor` of shape `(B, C, m)`): Catalogue indices, m at most `session_items`; -1 for no item,
            which counts nothing.
        input_ids, attention_mask, encoder_outputs, encoder_inputs: As [`generate_sessions`] takes them.
        excluded, allowed (*optional*): See [`ItemConstraint`].
        normalization (`str`): What a code's log-probability is taken over, see [`generate_sessions`].

    Returns:
        `torch.FloatTensor` of shape `(B, C)`; -inf for a session that the constraint forbids, such as one that repeats
        an item.

    Raises:
        ValueError: If the sessions are too long, hold what is no catalogue index, or are not of the histories' users.
    """
    config, device = model.config, trie.order.device
    items = items.to(device)
    if items.dim() != 3 or not 1 <= items.shape[2] <= config.session_items:
        raise ValueError(
            f"items must have shape [users, sessions, 1 to {config.session_items}], got {list(items.shape)}."
        )
    if items.numel() and (int(items.max()) >= trie.num_items or int(items.min()) < -1):
        raise ValueError(
            f"items must lie in [0, {trie.num_items}) or be -1, got {int(items.min())} to {int(items.max())}."
        )
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}.")
    encoder = model.get_encoder()
    if encoder_outputs is None:
        encoder_outputs = encoder(input_ids=input_ids, attention_mask=attention_mask, **encoder_inputs)
    encoder_hidden_states = encoder_outputs.last_hidden_state
    users, sessions, num_items = items.shape
    if encoder_hidden_states.shape[0] != users:
        raise ValueError(f"There are {encoder_hidden_states.shape[0]} histories for the sessions of {users} users.")

    levels, width = config.num_levels, config.tokens_per_item
    position = trie.position[items.clamp(min=0)].long()
    present, removed = items >= 0, position < 0
    position = position.masked_fill(~present | removed, trie.num_positions)
    path = position.clamp(max=trie.num_positions - 1)  # of items that are not there: any, its scores are left out
    nodes = [trie.node_of(path, level) for level in range(levels)]
    tokens = items.new_full((users, sessions, num_items, width), config.bos_token_id)
    for level in range(levels):
        tokens[..., level + 1] = trie.codes(nodes[level], level) + config.level_offsets[level]
    hidden_states = model.get_decoder()(
        input_ids=tokens.view(users * sessions, -1)[:, :-1],
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder.position_mask(attention_mask),
        use_cache=False,
    ).last_hidden_state.unflatten(0, (users, sessions))

    constraint = ItemConstraint(trie, users, excluded, allowed)
    code_scores = _CodeScores(model, normalization)
    total = hidden_states.new_zeros(users, sessions, dtype=torch.float32)
    for item in range(num_items):
        parent = torch.zeros_like(path[..., 0])
        for level in range(levels):
            logits = code_scores.logits(hidden_states[:, :, item * width + level], level)
            children, exists = trie.child_nodes(parent, level)
            available = constraint.available(parent, children, exists, level, position[..., :item])
            log_probs = code_scores.log_probs(logits, trie.codes(children, level), available)
            node = nodes[level][..., item]
            child = node - trie.get_buffer(f"first_child_{level}")[parent].long()
            chosen = log_probs.gather(-1, child[..., None]).squeeze(-1)
            total = total + chosen.masked_fill(~present[..., item], 0.0)
            parent = node
    return total.masked_fill((removed & present).any(-1), -torch.inf)


__all__ = ["session_log_probs"]
