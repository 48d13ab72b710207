"""The encoder-decoder with mixture of experts: shapes, invariances, caches, experts and round trips."""

import pytest
import torch
from model_conformance import LAZY_DECODER, ModelConformanceTests
from transformers import AutoModelForSeq2SeqLM
from transformers.cache_utils import EncoderDecoderCache, StaticCache

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecModel
from onerec_hf.modeling_onerec import OneRecSparseMoeBlock

BOS = 2


@pytest.fixture(params=["token", "item"])
def model(request):
    torch.manual_seed(0)
    config = OneRecConfig.from_preset(
        "debug",
        history_positions=request.param,
        history_items=4,
        session_items=2,
        encoder_layers=2,
        initializer_range=0.3,
    )
    return OneRecForConditionalGeneration(config).eval()


def history(model, *items):
    """Tokens of items given as code tuples, SEP between them."""
    tokens = []
    for item in items:
        tokens += [offset + code for offset, code in zip(model.config.level_offsets, item, strict=True)]
        tokens.append(model.config.sep_token_id)
    return torch.tensor([tokens[:-1]])


LABELS = torch.tensor([[5, 13, 21, BOS, 6, 14, 22]])


class TestConformance(ModelConformanceTests):
    """With the paper's positions; the mixin's base model is checked through it."""

    model_class = OneRecForConditionalGeneration
    base_model_class = OneRecModel
    expert_parameters = ["experts.gate_up_proj", "experts.down_proj"]
    offloaded = "model.decoder"
    history_positions = "token"
    settings: dict[str, int] = {}

    def make_config(self, **overrides):
        settings = {"history_positions": self.history_positions, "history_items": 4, "session_items": 2}
        return OneRecConfig.from_preset("debug", **(settings | self.settings | overrides))

    def make_inputs(self, config, batch_size=3):
        generator = torch.Generator().manual_seed(1)
        levels = torch.tensor(config.level_offsets)
        items = torch.randint(8, (batch_size, 3, 3), generator=generator) + levels
        tokens = torch.nn.functional.pad(items, (0, 1), value=config.sep_token_id).flatten(1)[:, :-1]
        attention_mask = torch.ones_like(tokens)
        # One history is padded on the left, one on the right.
        attention_mask[0, :4] = attention_mask[-1, -4:] = 0
        session = torch.randint(8, (batch_size, 2, 3), generator=generator) + levels
        labels = torch.nn.functional.pad(session, (0, 1), value=BOS).flatten(1)[:, :-1]
        return {"input_ids": tokens * attention_mask, "attention_mask": attention_mask, "labels": labels}

    def test_generation_config_is_saved(self, tmp_path):
        self.make_model().save_pretrained(tmp_path)
        generation = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).generation_config
        assert (generation.do_sample, generation.num_beams, generation.max_new_tokens) == (False, 128, 7)

    def test_experts_implementations_agree(self):
        model = self.make_model()
        inputs = self.make_inputs(model.config)
        gradients = []
        for name in ("eager", "grouped_mm", "batched_mm"):
            model.set_experts_implementation(name)
            model.zero_grad()
            model(**inputs).loss.backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        for other in gradients[1:]:
            for one, two in zip(gradients[0], other, strict=True):
                torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)

    def test_tied_embeddings(self, tmp_path):
        for tied in (False, True):
            model = self.make_model(tie_word_embeddings=tied)
            model.save_pretrained(tmp_path / str(tied))
            loaded = self.model_class.from_pretrained(tmp_path / str(tied))
            for one in (model, loaded):
                weights = one.model.encoder.embed_tokens, one.model.decoder.embed_tokens, one.lm_head
                assert len({module.weight.data_ptr() for module in weights}) == (1 if tied else 3)
                one.resize_token_embeddings(one.config.vocab_size + 2)
                weights = one.model.encoder.embed_tokens, one.model.decoder.embed_tokens, one.lm_head
                assert len({module.weight.data_ptr() for module in weights}) == (1 if tied else 3)
                assert {module.weight.shape[0] for module in weights} == {one.config.vocab_size}

    def test_embeddings_in_place_of_ids(self):
        model = self.make_model()
        inputs = self.make_inputs(model.config)
        expected = model(**inputs).logits
        session = model.prepare_decoder_input_ids_from_labels(inputs.pop("labels"))
        inputs["decoder_inputs_embeds"] = model.get_decoder().embed_tokens(session)
        torch.testing.assert_close(model(**inputs).logits, expected)
        if self.history_positions == "token":
            inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
            torch.testing.assert_close(model(**inputs).logits, expected)

    @pytest.mark.parametrize(
        "options", [{}, {"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}], ids=str
    )
    def test_generates_the_same_with_and_without_a_cache(self, options):
        model = self.make_model()
        inputs = self.make_inputs(model.config)
        del inputs["labels"]
        options = {"num_beams": 1, "max_new_tokens": 7} | options
        options |= {"return_dict_in_generate": True, "output_scores": True}
        generated = []
        for use_cache in (True, False):
            if not use_cache:
                options.pop("cache_implementation", None)
            torch.manual_seed(0)
            generated.append(model.generate(**inputs, **options, use_cache=use_cache))
        assert torch.equal(generated[0].sequences, generated[1].sequences)
        for one, two in zip(generated[0].scores, generated[1].scores, strict=True):
            torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("drafts", ["prompt lookup", "an equal model", "another model"])
    def test_speculative_decoding_gives_the_greedy_session(self, drafts):
        model = self.make_model()
        inputs = {name: values[:1] for name, values in self.make_inputs(model.config).items() if name != "labels"}
        options = {"num_beams": 1, "max_new_tokens": 7, "return_dict_in_generate": True, "output_scores": True}
        greedy = model.generate(**inputs, **options)
        if drafts == "prompt lookup":
            options["prompt_lookup_num_tokens"] = 2
        else:
            assistant = self.make_model()
            if drafts == "another model":
                torch.nn.init.normal_(assistant.lm_head.weight)
            # Without the mask, the library's assistants with an encoder read what they have in their cache once more.
            session = torch.full((1, 1), BOS)
            options |= {"decoder_input_ids": session, "decoder_attention_mask": torch.ones_like(session)}
            options["assistant_model"] = assistant
        speculative = model.generate(**inputs, **options)
        assert torch.equal(speculative.sequences, greedy.sequences)
        for one, two in zip(speculative.scores, greedy.scores, strict=True):
            torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)

    def test_compiles_a_decoding_step_in_one_graph(self):
        model = self.make_model()
        inputs = self.make_inputs(model.config)
        del inputs["labels"]
        torch.compiler.reset()
        encoder = torch.compile(model.get_encoder(), fullgraph=True, backend="eager")
        decoder = torch.compile(model.get_decoder(), fullgraph=True, backend="eager")
        with torch.no_grad():
            encoded = model.get_encoder()(**inputs)[0]
            torch.testing.assert_close(encoder(**inputs)[0], encoded)
            tokens = torch.full((3, 1), BOS)
            session = {"input_ids": tokens, "encoder_hidden_states": encoded}
            torch.testing.assert_close(decoder(**session)[0], model.get_decoder()(**session)[0])

    def test_half_precision_keeps_the_balance_exact(self, tmp_path):
        self.make_model().save_pretrained(tmp_path)
        model = self.model_class.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
        router = model.model.decoder.layers[0].moe.gate
        assert router.weight.dtype == torch.bfloat16 and router.expert_bias.dtype == torch.float32
        inputs = self.make_inputs(model.config)
        for _ in range(20):
            model(**inputs)
        assert router.tokens_per_expert.sum() == 20 * inputs["labels"].numel() * model.config.num_experts_per_tok


class TestConformanceOfItemPositions(TestConformance):
    history_positions = "item"


class TestConformanceOfLazyDecoder(TestConformance):
    settings = LAZY_DECODER


def test_padding_does_not_change_the_output(model):
    tokens = history(model, (1, 2, 3), (4, 5, 6))
    alone = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=LABELS)
    pads = torch.zeros(1, 4, dtype=torch.long)
    for padded in (torch.cat([pads, tokens], 1), torch.cat([tokens, pads], 1)):
        output = model(input_ids=padded, attention_mask=(padded != 0).long(), labels=LABELS)
        torch.testing.assert_close(output.logits, alone.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.loss, alone.loss)


def test_a_history_keeps_its_latest_items_apart_from_older_ones(model):
    a, b = history(model, (1, 2, 3), (4, 5, 6)), history(model, (4, 5, 6), (1, 2, 3))
    logits = [model(input_ids=tokens, labels=LABELS).logits for tokens in (a, b)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_loss_leaves_out_bos_and_padding(model):
    tokens = history(model, (1, 2, 3))
    labels = torch.cat([LABELS, torch.full((1, 4), -100)], 1)[:, : model.config.session_items * 4 - 1]
    output = model(input_ids=tokens, labels=labels)
    log_probs = output.logits.log_softmax(-1)[0]
    codes = [(place, int(token)) for place, token in enumerate(labels[0]) if token not in (BOS, -100)]
    expected = -sum(log_probs[place, token] for place, token in codes) / len(codes)
    torch.testing.assert_close(output.loss, expected)


def test_decoder_input_has_bos_before_every_item(model):
    shifted = model.prepare_decoder_input_ids_from_labels(
        torch.tensor([[5, 13, 21, BOS, 6, 14, 22], [7, 13, 21] + [-100] * 4])
    )
    assert shifted.tolist() == [[BOS, 5, 13, 21, BOS, 6, 14], [BOS, 7, 13, 21, 0, 0, 0]]


def test_dynamic_and_static_caches_equal_no_cache(model):
    tokens = history(model, (1, 2, 3), (4, 5, 6))
    session = model.prepare_decoder_input_ids_from_labels(LABELS)
    expected = model(input_ids=tokens, decoder_input_ids=session, use_cache=False).logits
    positions = 2 if model.config.history_positions == "item" else tokens.shape[1]
    static = EncoderDecoderCache(
        StaticCache(model.config.get_text_config(decoder=True), max_cache_len=8),
        StaticCache(model.config.get_text_config(decoder=True), max_cache_len=positions),
    )
    for cache in (None, static):
        steps = []
        for place in range(session.shape[1]):
            output = model(
                input_ids=tokens,
                decoder_input_ids=session[:, place : place + 1],
                decoder_position_ids=torch.tensor([[place]]),
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-5, rtol=1e-5)


def test_sessions_of_one_history_can_share_its_encoding(model):
    tokens = torch.cat([history(model, (1, 2, 3)), history(model, (4, 5, 6))])
    sessions = torch.tensor([[BOS, 5, 13], [BOS, 6, 14], [BOS, 7, 15], [BOS, 8, 16]])
    shared = model(input_ids=tokens, decoder_input_ids=sessions).logits
    apart = model(input_ids=tokens.repeat_interleave(2, 0), decoder_input_ids=sessions).logits
    torch.testing.assert_close(shared, apart)
    with pytest.raises(ValueError, match="not a multiple of the 2 histories"):
        model(input_ids=tokens, decoder_input_ids=sessions[:3])


def test_mixture_of_experts_is_equation_2():
    torch.manual_seed(0)
    config = OneRecConfig.from_preset("debug", initializer_range=0.5)
    config._experts_implementation = "eager"
    block = OneRecSparseMoeBlock(config).eval()
    torch.nn.init.normal_(block.gate.weight)
    torch.nn.init.normal_(block.experts.gate_up_proj)
    torch.nn.init.normal_(block.experts.down_proj)
    hidden = torch.randn(3, 2, config.hidden_size)
    for expert_bias in (torch.zeros(config.num_experts), torch.tensor([0.0, 9.0, 0.0, 9.0])):
        block.gate.expert_bias.copy_(expert_bias)
        expected = torch.zeros_like(hidden)
        for place in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
            token = hidden[tuple(place)]
            scores = (block.gate.weight @ token).softmax(0)
            for expert in (scores + expert_bias).topk(config.num_experts_per_tok).indices.tolist():
                gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
                ffn = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                # Softmax over all experts, no renormalisation over the chosen ones, the bias not in the gate.
                expected[tuple(place)] += scores[expert] * ffn
        torch.testing.assert_close(block(hidden), expected, atol=1e-4, rtol=1e-4)


def test_expert_bias_moves_against_the_load_and_is_saved(model, tmp_path):
    model.train()
    model(input_ids=history(model, (1, 2, 3)), labels=LABELS)
    router = model.model.decoder.layers[0].moe.gate
    counts = router.tokens_per_expert.float()
    assert counts.sum() == LABELS.shape[1] * model.config.num_experts_per_tok
    model.model.update_expert_bias()
    expected = model.config.expert_bias_update_rate * torch.sign(counts.mean() - counts)
    torch.testing.assert_close(router.expert_bias, expected)
    assert router.tokens_per_expert.sum() == 0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.model.decoder.layers[0].moe.gate.expert_bias, expected)


def test_hidden_states_attentions_and_router_logits_on_request(model):
    tokens = history(model, (1, 2, 3), (4, 5, 6))
    model.set_attn_implementation("eager")
    output = model(
        input_ids=tokens, labels=LABELS, output_hidden_states=True, output_attentions=True, output_router_logits=True
    )
    config = model.config
    assert len(output.encoder_hidden_states) == config.encoder_layers + 1
    assert len(output.decoder_hidden_states) == config.decoder_layers + 1
    assert output.decoder_attentions[0].shape == (1, config.num_attention_heads, 7, 7)
    assert output.cross_attentions[0].shape[2] == 7
    assert output.decoder_router_logits[0].shape == (7, config.num_experts)


@pytest.mark.parametrize(
    ("name", "billions"), [("0.05b", 0.05), ("0.1b", 0.1), ("0.2b", 0.2), ("0.5b", 0.5), ("1b", 1.0)]
)
def test_presets_have_the_papers_sizes(name, billions):
    with torch.device("meta"):
        model = OneRecForConditionalGeneration(OneRecConfig.from_preset(name))
    assert model.num_parameters() == pytest.approx(billions * 1e9, rel=0.05)
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (24, 2)
    # Of every decoder layer's 24 experts a token passes through 2; all else is active.
    config = model.config
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    assert model.num_parameters() - model.num_parameters(active=True) == config.decoder_layers * 22 * expert


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codebook_sizes": []}, "at least one positive size"),
        ({"vocab_size": 3}, "smaller than the 5 special tokens"),
        ({"hidden_size": 15}, "not a multiple"),
        ({"num_experts_per_tok": 9}, "between 1 and num_experts"),
        ({"history_positions": "word"}, "'token' or 'item'"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        OneRecConfig.from_preset("debug", **fields)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="debug, small"):
        OneRecConfig.from_preset("huge")
