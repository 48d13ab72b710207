"""Generating sessions and ranked items under the item constraint, and recommending with item ids in and out."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from .history_features import encode_history_rows
from .item_trie import ItemTrie


@dataclass
class SessionBeams:
    """Sessions by beam search, best first.

    Args:
        items (`torch.LongTensor` of shape `(batch, sessions, num_items)`): Catalogue indices; -1 where fewer sessions
            exist than were asked for.
        scores (`torch.FloatTensor` of shape `(batch, sessions)`): Log-probability of each session's codes under the
            model's full softmax, -inf where `items` is -1.
        token_ids (`torch.LongTensor` of shape `(batch, sessions, num_items, L)`): The code tokens as they were
            generated, for a check of legality that does not rest on the trie.
    """

    items: torch.LongTensor
    scores: torch.FloatTensor
    token_ids: torch.LongTensor


@torch.no_grad()
def generate_sessions(
    model,
    trie: ItemTrie,
    input_ids: torch.LongTensor,
    attention_mask: torch.LongTensor,
    num_items: int | None = None,
    num_beams: int | None = None,
    num_return: int | None = None,
    excluded: torch.BoolTensor | None = None,
    **encoder_inputs: torch.Tensor,
) -> SessionBeams:
    """Beam search over whole sessions of real items, none repeated within a session.

    The same search as `generate` with an [`ItemTrieLogitsProcessor`], but the beams of a user share one copy of the
    encoder's keys and values. With `num_items=1` the beams are a ranked list of items.

    Args:
        model ([`OneRecForConditionalGeneration`]): In evaluation mode, or dropout takes part.
        trie ([`ItemTrie`]): The catalogue, on the model's device.
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch, tokens)`): Encoded histories.
        num_items (`int`, *optional*): Items per session, the config's `session_items` by default.
        num_beams (`int`, *optional*): The generation config's by default.
        num_return (`int`, *optional*): Sessions returned per user, all beams by default.
        excluded (`torch.BoolTensor` of shape `(batch, N)`, *optional*): Catalogue indices not to be generated.
        encoder_inputs: Further tensors for the encoder, such as those of [`encode_history_rows`].

    Raises:
        ValueError: If more items are asked for than a session of this model has.
    """
    config = model.config
    num_items = num_items or config.session_items
    num_beams = num_beams or model.generation_config.num_beams
    num_return = num_return or num_beams
    if num_items > config.session_items:
        raise ValueError(f"num_items ({num_items}) exceeds the model's session_items ({config.session_items}).")
    if num_return > num_beams:
        raise ValueError(f"num_return ({num_return}) exceeds num_beams ({num_beams}).")
    batch, device = input_ids.shape[0], input_ids.device
    decoder = model.get_decoder()
    encoder_inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
    encoder_hidden_states = model.get_encoder()(**encoder_inputs).last_hidden_state
    encoder_attention_mask = model.get_encoder().position_mask(attention_mask)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    allowed_counts = trie.allowed_prefix_counts(excluded, batch)
    first_row = torch.arange(batch, device=device)[:, None]

    scores = torch.zeros(batch, 1, device=device)
    sorted_items = torch.empty(batch, 1, 0, dtype=torch.long, device=device)
    generated = torch.empty(batch, 1, 0, dtype=torch.long, device=device)
    bos = torch.full((batch, 1), config.bos_token_id, device=device)
    tokens = bos
    for _ in range(num_items):
        beams = scores.shape[1]
        node = torch.zeros(batch, beams, dtype=torch.long, device=device)
        for level, (offset, size) in enumerate(zip(config.level_offsets, config.codebook_sizes, strict=True)):
            hidden_states = decoder(
                input_ids=tokens,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            log_probs = model.lm_head(hidden_states).float().log_softmax(-1)[:, offset : offset + size]
            children = trie.child_nodes(node, level)
            allowed = trie.available(children, level, allowed_counts, sorted_items) > 0
            candidates = scores[..., None] + log_probs.view(batch, beams, size).masked_fill(~allowed, -torch.inf)
            scores, flat = candidates.flatten(1).topk(min(num_beams, beams * size))
            parent, code = flat // size, flat % size
            node = children.flatten(1).gather(1, flat)
            sorted_items = sorted_items.gather(1, parent[..., None].expand(-1, -1, sorted_items.shape[-1]))
            generated = generated.gather(1, parent[..., None].expand(-1, -1, generated.shape[-1]))
            generated = torch.cat([generated, (code + offset)[..., None]], dim=-1)
            cache.self_attention_cache.reorder_cache((parent + first_row * beams).flatten())
            beams = scores.shape[1]
            tokens = generated[..., -1].reshape(-1, 1)
        # A dead beam (-inf) keeps a valid position so that the search goes on; it is blanked at the end.
        sorted_items = torch.cat([sorted_items, node.clamp(min=0)[..., None]], dim=-1)
        tokens = torch.cat([tokens, bos.new_full(tokens.shape, config.bos_token_id)], dim=1)

    scores, sorted_items, generated = scores[:, :num_return], sorted_items[:, :num_return], generated[:, :num_return]
    items = trie.order[sorted_items].masked_fill(scores.isneginf()[..., None], -1)
    return SessionBeams(items, scores, generated.view(*items.shape, config.num_levels))


def excluded_items(histories: list[np.ndarray], num_items: int, device: torch.device) -> torch.BoolTensor:
    """Marks each user's history as excluded: lists of catalogue indices to a mask of shape (users, num_items)."""
    mask = torch.zeros(len(histories), num_items, dtype=torch.bool, device=device)
    lengths = torch.tensor([len(history) for history in histories], device=device)
    if int(lengths.sum()):
        rows = torch.arange(len(histories), device=device).repeat_interleave(lengths)
        mask[rows, torch.as_tensor(np.concatenate(histories), dtype=torch.long, device=device)] = True
    return mask


def recommend(
    model,
    tokenizer,
    histories: list[list | dict],
    top_k: int = 10,
    num_beams: int | None = None,
    exclude_seen: bool = True,
    batch_size: int = 32,
    show_progress: bool = False,
) -> list[dict[str, list]]:
    """Recommends to users from their histories of item ids.

    Args:
        model ([`OneRecForConditionalGeneration`]): The trained generator.
        tokenizer ([`OneRecTokenizer`]): The tokenizer saved with it.
        histories (`list[list]`): Item ids per user, oldest first, of the catalogue's own type. May be empty. A
            model with feedback, times or user features needs rows (`dict`) of `history_item_ids` and of the columns
            that [`encode_history_rows`] names.
        top_k (`int`): Length of the ranked list.
        num_beams (`int`, *optional*): The saved generation config's by default, and at least `top_k`.
        exclude_seen (`bool`): Whether items of the history are left out.
        batch_size (`int`): Users encoded together.
        show_progress (`bool`): Whether to draw a progress bar.

    Returns:
        `list[dict]`: Per user `session`, the best session's item ids; `items`, the ranked item ids; and `scores`,
        their log-probabilities, highest first. Lists are shorter than asked where fewer items may be recommended.

    Raises:
        ValueError: If a history names an item that the tokenizer does not know.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if not histories:
        return []
    device = model.device
    trie = ItemTrie(tokenizer.codes, tokenizer.codebook_sizes).to(device)
    num_beams = min(max(num_beams or model.generation_config.num_beams, top_k), trie.num_items)
    item_ids = np.asarray(tokenizer.item_ids)
    was_training = model.training
    model.eval()
    rows = [history if isinstance(history, dict) else {"history_item_ids": history} for history in histories]
    results = []
    for start in tqdm(range(0, len(rows), batch_size), desc="Recommending", disable=not show_progress):
        chunk = rows[start : start + batch_size]
        encoded = encode_history_rows(chunk, tokenizer, model.config).to(device)
        excluded = None
        if exclude_seen:
            seen = [tokenizer.item_index(row["history_item_ids"]) for row in chunk]
            excluded = excluded_items(seen, trie.num_items, device)
        ranked = generate_sessions(
            model,
            trie,
            **encoded,
            num_items=1,
            num_beams=num_beams,
            num_return=min(top_k, num_beams),
            excluded=excluded,
        )
        sessions = generate_sessions(model, trie, **encoded, num_beams=num_beams, num_return=1, excluded=excluded)
        for items, scores, session in zip(
            ranked.items[..., 0].tolist(), ranked.scores.tolist(), sessions.items[:, 0].tolist(), strict=True
        ):
            found = [position for position, item in enumerate(items) if item >= 0]
            results.append(
                {
                    "session": item_ids[[item for item in session if item >= 0]].tolist(),
                    "items": item_ids[[items[position] for position in found]].tolist(),
                    "scores": [scores[position] for position in found],
                }
            )
    model.train(was_training)
    return results


__all__ = ["SessionBeams", "excluded_items", "generate_sessions", "recommend"]
