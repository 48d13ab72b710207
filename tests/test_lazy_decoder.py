"""OneRec-V2's decoder: no encoder over the history, and keys and values that the decoder's layers share."""

import itertools

import pytest
import torch
from model_conformance import LAZY_DECODER
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from onerec_hf import ItemTrie, OneRecConfig, OneRecForConditionalGeneration, generate_sessions

HISTORIES = torch.tensor([[5, 9, 13, 3, 6, 10, 14], [0, 0, 0, 0, 7, 11, 15]])
SESSIONS = torch.tensor([[2, 5, 10], [2, 6, 11]])


def lazy_model(**overrides) -> OneRecForConditionalGeneration:
    torch.manual_seed(0)
    settings = {"codebook_sizes": [4, 4, 4], "history_items": 4, "session_items": 2, "initializer_range": 0.3}
    config = OneRecConfig.from_preset("debug", **(settings | LAZY_DECODER | overrides))
    model = OneRecForConditionalGeneration(config).eval()
    for norm in model.get_decoder().context_processor.norms:
        torch.nn.init.normal_(norm.weight)
    return model


def rms_norm(states):
    return states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cross_attention_by_hand(attention):
    """Of 4 heads, in groups of 2 to a key; layers 0 and 1 read the first two chunks, layer 2 the last two."""
    model = lazy_model(num_attention_heads=4, context_key_value_heads=2)
    model.set_attn_implementation(attention)
    decoder, found = model.get_decoder(), []
    for layer in decoder.layers:
        layer.cross_attn.q_proj.register_forward_hook(lambda _, inputs, output: found.append(output))
        layer.cross_attn.o_proj.register_forward_hook(lambda _, inputs, output: found.append(inputs[0]))
    mask = (HISTORIES != 0).long()
    context = model(HISTORIES, attention_mask=mask, decoder_input_ids=SESSIONS).encoder_last_hidden_state
    processor, size = decoder.context_processor, 4
    for index, (queries, outputs) in enumerate(zip(found[::2], found[1::2], strict=True)):
        first = 2 * (index * 2 // 3)
        for row, place, head in itertools.product(range(2), range(3), range(4)):
            keys, values = (
                rms_norm(context[row] @ processor.proj.weight[8 * chunk : 8 * chunk + 8].T)
                * processor.norms[chunk].weight
                for chunk in (first, first + 1)
            )
            group = slice(head // 2 * size, head // 2 * size + size)
            own = slice(head * size, head * size + size)
            logits = keys[:, group] @ queries[row, place, own] / size**0.5
            weights = logits.masked_fill(mask[row] == 0, -torch.inf).softmax(0)
            torch.testing.assert_close(outputs[row, place, own], weights @ values[:, group], atol=1e-5, rtol=1e-5)


def test_without_layers_the_encoder_embeds_each_behaviour_by_itself():
    for attention in ("bidirectional", "causal"):
        encoder = lazy_model(encoder_attention=attention).get_encoder()
        recency = encoder.embed_recency(torch.tensor([1, 1, 1, 0, 0, 0, 0]))
        embeds = encoder.embed_tokens(HISTORIES[0])
        by_hand = encoder.norm(embeds) + recency if attention == "causal" else encoder.norm(embeds + recency)
        torch.testing.assert_close(encoder(HISTORIES[:1]).last_hidden_state[0], by_hand)
        assert not hasattr(encoder, "embed_positions")


def test_a_search_projects_each_history_once_and_layers_share_the_tensors(monkeypatch):
    model = lazy_model()
    codes = torch.cartesian_prod(*[torch.arange(4)] * 3)[::7]
    trie = ItemTrie(codes, [4, 4, 4])
    projected, read, plain = [], [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module, queries, keys, values, *args, **kwargs):
        if getattr(module, "lazy", False):
            read.append((len(keys), keys.data_ptr(), values.data_ptr()))
        return plain(module, queries, keys, values, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
    model.get_decoder().context_processor.proj.register_forward_hook(lambda *call: projected.append(call[-1].shape))
    generate_sessions(model, trie, HISTORIES, (HISTORIES != 0).long(), num_items=2, num_beams=5)
    assert projected == [(2, 7, 2 * 2 * 8)]
    assert len(read) == 3 * 6 and len(set(read)) == 2  # at every layer and step one of the two sets, of two users
    assert read[0] == read[1] != read[2]


def test_a_cache_holds_a_layer_for_each_set():
    cache = lazy_model()(HISTORIES, decoder_input_ids=SESSIONS, use_cache=True).past_key_values
    assert (len(cache.self_attention_cache), len(cache.cross_attention_cache)) == (3, 2)
    assert cache.cross_attention_cache.layers[0].keys.shape == (2, 1, 7, 8)


def test_a_decoder_that_shares_nothing_has_what_it_had():
    config = OneRecConfig.from_preset("debug", history_positions="item")
    assert (config.context_key_value_sets, config.context_key_value_heads) == (0, None)
    names = OneRecForConditionalGeneration(config).state_dict()
    assert "model.decoder.layers.0.cross_attn.k_proj.weight" in names
    assert not any("context" in name for name in names)


CAUSAL_ITEMS = {"encoder_layers": 0, "encoder_attention": "causal", "history_positions": "item"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context_key_value_sets": 2}, r"between 0 and decoder_layers \(1\), got 2"),
        ({"context_key_value_sets": -1}, "got -1"),
        ({"context_key_value_heads": 1}, r"context_key_value_heads \(1\).* set context_key_value_sets"),
        ({"context_key_value_sets": 1, "context_key_value_heads": 3}, r"num_attention_heads \(2\) is not a multiple"),
        ({"context_key_value_sets": 1, "context_key_value_heads": 0}, "not a multiple"),
        (CAUSAL_ITEMS | {"encoder_positions": "distance"}, "encoder_positions='distance'.*use 'absolute'"),
        (CAUSAL_ITEMS | {"item_head": "encoder", "num_items": 9}, "item_head='encoder'.*encoder_layers=0"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        OneRecConfig.from_preset("debug", **fields)
