"""The item head: a softmax over the catalogue at every position of a causal encoder."""

import copy
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn.functional import cross_entropy, normalize

from onerec_hf import (
    ItemTrie,
    OneRecConfig,
    OneRecForConditionalGeneration,
    OneRecTokenizer,
    generate_sessions,
    generate_with_trie,
    recommend,
    stream_sessions,
)
from onerec_hf.item_head import FullSoftmaxLoss, OneRecItemVectors, sampled_softmax_loss
from onerec_hf.pretraining import SessionCollator
from onerec_hf.semantic_ids import ResidualQuantizer
from onerec_hf.session_generation import fit_item_gate, session_log_probs

ITEMS = 12


def item_config(**overrides):
    settings = {
        "history_positions": "item",
        "encoder_attention": "causal",
        "encoder_positions": "distance",
        "encoder_layers": 2,
        "history_items": 6,
        "session_items": 2,
        "item_head": "encoder",
        "num_items": ITEMS,
        "item_content_size": 3,
        "item_memory": 3,
        "initializer_range": 0.3,
    }
    return OneRecConfig.from_preset("debug", **(settings | overrides))


def item_model(**overrides):
    torch.manual_seed(0)
    model = OneRecForConditionalGeneration(item_config(**overrides)).eval()
    if model.config.item_content_size:
        model.set_item_content(torch.randn(ITEMS, 3))
    if model.config.item_memory:
        neighbours = torch.rand(ITEMS, ITEMS).argsort(1)[:, :3]
        neighbours[::4, 2] = -1
        model.item_memory.set_neighbours(neighbours, torch.rand(ITEMS, 3) * (neighbours >= 0))
    return model


def history_inputs(model, histories, side="left"):
    """Item i has the codes (i % 8, i // 8, 0)."""
    longest = max(map(len, histories))
    first, second, third = model.config.level_offsets
    tokens, items = [], []
    for history in histories:
        pads = [-1] * (longest - len(history))
        items.append(pads + history if side == "left" else history + pads)
        slots = [[first + i % 8, second + i // 8, third, model.config.sep_token_id] for i in items[-1]]
        slots = [[0] * 4 if item < 0 else slot for item, slot in zip(items[-1], slots, strict=True)]
        tokens.append([token for slot in slots for token in slot][:-1])
    items, tokens = torch.tensor(items), torch.tensor(tokens)
    mask = (items >= 0).long().repeat_interleave(4, dim=1)[:, :-1]
    return {"input_ids": tokens, "attention_mask": mask, "history_item_indices": items}


def test_full_softmax_loss_is_cross_entropy(monkeypatch):
    monkeypatch.setattr("onerec_hf.item_head._LOSS_CHUNK", 4)
    torch.manual_seed(0)
    states = torch.randn(10, 5, dtype=torch.double, requires_grad=True)
    vectors = torch.randn(7, 5, dtype=torch.double, requires_grad=True)
    targets = torch.randint(0, 7, (10,))
    loss = FullSoftmaxLoss.apply(states, vectors, targets)
    expected = cross_entropy(states @ vectors.T, targets)
    torch.testing.assert_close(loss, expected)
    for given, wanted in zip(
        torch.autograd.grad(3 * loss, (states, vectors)),
        torch.autograd.grad(3 * expected, (states, vectors)),
        strict=True,
    ):
        torch.testing.assert_close(given, wanted)


def test_sampled_softmax_estimates_the_denominator(monkeypatch):
    vectors = OneRecItemVectors(7, 16)
    states, targets = torch.randn(10, 16), torch.randint(0, 7, (10,))
    full = cross_entropy(states @ vectors().T, targets)
    monkeypatch.setattr("torch.randint", lambda *args, **kwargs: torch.arange(7).repeat(2))
    torch.testing.assert_close(sampled_softmax_loss(states, vectors, targets, 14), full)


def test_a_vector_is_learned_plus_projected_content():
    vectors = OneRecItemVectors(2, 2, content_size=3)
    vectors.content.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
    with torch.no_grad():
        vectors.learned.weight.copy_(torch.tensor([[10.0, 20.0], [0.0, 0.0]]))
        vectors.content_proj.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert vectors().tolist() == [[17.0, 36.0], [2.0, 5.0]]
    assert vectors(torch.tensor([[1, -1], [0, 1]])).tolist() == [[[2.0, 5.0], [0.0, 0.0]], [[17.0, 36.0], [2.0, 5.0]]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["absolute", "distance"])
def test_every_position_is_the_end_of_its_prefix(positions, attention):
    """One pass over a history gives at each position what encoding that prefix alone gives, under any padding."""
    model = item_model(encoder_positions=positions, item_encoders=["shared", "learned"], item_memory=0)
    model.set_attn_implementation(attention)
    encoder, history = model.get_encoder(), [3, 1, 4, 1, 5]
    whole = encoder(**history_inputs(model, [history])).item_states[0].transpose(0, 1)
    for side in ("left", "right"):
        prefixes = [history[:length] for length in range(1, 6)]
        inputs = history_inputs(model, prefixes, side)
        states = encoder(**inputs).item_states
        mask = encoder.position_mask(inputs["attention_mask"])
        log_probs = model.item_log_probs(states, mask)
        torch.testing.assert_close(log_probs, model.item_log_probs(whole[:, :, None]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(5))


def test_the_loss_is_joint():
    model = item_model(item_loss_weight=0.5)
    inputs = history_inputs(model, [[3, 1, 4], [5, 9]])
    item_targets = torch.tensor([[1, 4, 7], [-100, -100, 2]])
    first, second, third = model.config.level_offsets
    labels = torch.tensor([[first + 7, second, third]] * 2)
    out = model(**inputs, labels=labels, item_targets=item_targets)
    torch.testing.assert_close(out.loss, out.code_loss + 0.5 * out.item_loss)
    logits = out.item_states[:, 0] @ model.get_encoder().item_vectors().T
    torch.testing.assert_close(out.item_loss, cross_entropy(logits.flatten(0, 1), item_targets.flatten()))
    torch.testing.assert_close(out.code_loss, model(**inputs, labels=labels).loss)
    out.item_loss.backward()
    assert model.get_encoder().item_vectors.content_proj.weight.grad.abs().sum() > 0
    assert model.get_encoder().embed_tokens.weight.grad.abs().sum() > 0


def test_heads_are_trained_apart_and_fused_by_their_geometric_mean():
    model = item_model(item_encoders=["shared", "learned", "content"], item_memory=0)
    encoder = model.get_encoder()
    inputs, item_targets = history_inputs(model, [[3, 1, 4], [5, 9]]), torch.tensor([[1, 4, 7], [-100, -100, 2]])
    states = encoder(**inputs).item_states
    vectors = [encoder.item_vectors, *(further.item_vectors for further in encoder.item_encoders)]
    logits = [head @ items().T for head, items in zip(states.unbind(1), vectors, strict=True)]
    losses = [cross_entropy(head.flatten(0, 1), item_targets.flatten()) for head in logits]
    torch.testing.assert_close(model.item_loss(states, item_targets), sum(losses))
    product = torch.stack([head[:, -1].softmax(-1) for head in logits]).prod(0) ** (1 / 3)
    torch.testing.assert_close(model.item_log_probs(states).exp(), product / product.sum(-1, keepdim=True))
    (gradient,) = torch.autograd.grad(
        losses[0], encoder.item_encoders[0].item_vectors.learned.weight, allow_unused=True
    )
    assert gradient is None or not gradient.any()


def test_encoders_of_the_heads_own_leave_the_codes_alone():
    model = item_model(item_encoders=["content", "learned"])
    encoder, inputs = model.get_encoder(), history_inputs(model, [[3, 1, 4], [5, 9]])
    other = {**inputs, "history_item_indices": inputs["history_item_indices"].flip(1)}
    assert encoder(**inputs).item_states.shape[1] == 2
    torch.testing.assert_close(encoder(**other).last_hidden_state, encoder(**inputs).last_hidden_state)
    assert [vectors.content is None for vectors in encoder.item_vectors_by_head()] == [False, True]
    first, second, third = model.config.level_offsets
    model(**inputs, labels=torch.tensor([[first + 7, second, third]] * 2)).loss.backward()
    assert all(weight.grad is None for weight in encoder.item_encoders.parameters())


def test_saved_with_its_content(tmp_path):
    model = item_model()
    model.save_pretrained(tmp_path)
    loaded = OneRecForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.num_items == ITEMS
    torch.testing.assert_close(loaded.get_encoder().item_vectors(), model.get_encoder().item_vectors())


def test_new_items_have_the_vector_of_their_content(tmp_path):
    model = item_model(item_encoders=["shared", "learned"])
    vectors = model.get_encoder().item_vectors
    before, content = vectors(), torch.randn(2, 3)
    model.add_items(content)
    torch.testing.assert_close(vectors(), torch.cat([before, vectors.content_proj(normalize(content))]))
    model.save_pretrained(tmp_path)
    loaded = OneRecForConditionalGeneration.from_pretrained(tmp_path)
    states = torch.randn(1, 2, 1, 16)
    latest = torch.tensor([[3, ITEMS]])  # nobody has consumed a new item: there is no memory of it
    expected = model.item_log_probs(states, item_indices=latest)
    torch.testing.assert_close(loaded.item_log_probs(states, item_indices=latest), expected)
    assert (loaded.item_memory.neighbours[ITEMS:] == -1).all()
    learned = model.get_encoder().item_encoders[0].item_vectors.learned.weight
    torch.testing.assert_close(learned[ITEMS:], learned[:ITEMS].mean(0).expand(2, -1))
    vectors.content.mul_(4)  # as long as checkpoints once had them
    model.add_items(content)
    torch.testing.assert_close(vectors()[-2:], vectors.content_proj(4 * normalize(content)))


def joined_by_hand(model):
    encoder = model.get_encoder()
    return torch.cat(
        [head() for head in (encoder.item_vectors, *(own.item_vectors for own in encoder.item_encoders))], 1
    )


@torch.no_grad()
def test_joined_vectors_are_made_once_and_never_out_of_date(tmp_path):
    model = item_model(item_encoders=["shared", "learned"])
    vectors, own = model.get_encoder().item_vectors, model.get_encoder().item_encoders[0].item_vectors

    def forget():
        model.train()
        model.eval()

    def replace_a_weight():
        own.learned.weight = torch.nn.Parameter(torch.randn(ITEMS, 16))

    def write_data():
        vectors.learned.weight.data = torch.randn(ITEMS, 16)

    changes = [
        lambda: vectors.learned.weight.mul_(2),
        lambda: vectors.content_proj.weight.add_(1),
        lambda: vectors.set_content(torch.randn(ITEMS, 3)),
        lambda: own.learned.weight.copy_(torch.randn(ITEMS, 16)),
        lambda: model.load_state_dict({name: 2 * weight for name, weight in model.state_dict().items()}),
        replace_a_weight,
        write_data,
        lambda: model.add_items(torch.randn(2, 3)),
        lambda: model.double(),
        lambda: model.float(),
        forget,
    ]
    for change in changes:
        before = model.item_vectors()
        assert model.item_vectors() is before
        change()
        after = model.item_vectors()
        assert after is not before
        torch.testing.assert_close(after, joined_by_hand(model))
    copied = copy.deepcopy(model)
    vectors.learned.weight.zero_()
    torch.testing.assert_close(copied.item_vectors(), after)
    torch.testing.assert_close(model.item_vectors(), joined_by_hand(model))
    copied.save_pretrained(tmp_path)
    loaded = OneRecForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.item_vectors(), after)


def test_joined_vectors_have_gradients_and_are_not_kept_while_training():
    model = item_model(item_encoders=["shared", "learned"])
    model.item_vectors().sum().backward()
    assert model.get_encoder().item_vectors.content_proj.weight.grad.any()
    with torch.no_grad():
        assert model.item_vectors() is model.item_vectors()
        model.train()
        model.get_encoder().item_vectors.learned.weight.data.zero_()  # a write that no version counts
        model.eval()
        torch.testing.assert_close(model.item_vectors(), joined_by_hand(model))
        model.train()
        assert model.item_vectors() is not model.item_vectors()


def test_checkpoints_with_a_number_of_further_encoders_are_read():
    assert item_config(item_encoders=1).item_encoders == ["shared", "learned"]
    assert OneRecConfig.from_preset("debug", item_encoders=0, item_negatives=0).item_encoders == ["shared"]


def test_off_where_it_is_not_configured():
    model = item_model(item_head="none", encoder_positions="absolute", num_items=0, item_content_size=0, item_memory=0)
    assert not [name for name in model.state_dict() if "item_" in name.replace("item_proj", "") or "distance" in name]
    inputs = history_inputs(model, [[3, 1]])
    with pytest.raises(ValueError, match="takes no history_item_indices"):
        model.get_encoder()(**inputs)
    inputs.pop("history_item_indices")
    assert model.get_encoder()(**inputs).item_states is None


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"item_head": "decoder"}, "item_head must be"),
        ({"item_encoders": ["shared", "shared"]}, "shared at most once"),
        ({"item_encoders": []}, "must list some of shared, content, learned"),
        ({"item_head": "none", "item_gate": True}, "item_gate weighs the item head"),
        ({"item_head": "none"}, "item_memory is the item head's"),
        ({"item_memory": -1}, "item_memory must not be negative"),
        ({"num_items": 0}, "needs encoder_attention='causal'"),
        ({"encoder_attention": "bidirectional"}, "needs encoder_attention='causal'"),
        ({"encoder_positions": "relative"}, "encoder_positions must be"),
    ],
)
def test_fields_that_do_not_fit_together(overrides, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        item_config(**overrides)


def mixture_case(**overrides):
    """A model with an item head, the trie of twelve items and the histories of three users, one of them empty."""
    model = item_model(codebook_sizes=[8, 8, 8], **overrides)
    codes = torch.stack([torch.arange(ITEMS) % 8, torch.arange(ITEMS) // 8, torch.zeros(ITEMS, dtype=torch.long)], 1)
    return model, ItemTrie(codes, [8, 8, 8]), history_inputs(model, [[0, 5, 11], [3], [7, 2]])


def item_probabilities(model, trie, inputs, share, normalization, excluded=None, used=None):
    """P(item) (batch, N) by brute force: the head's softmax, and every item's codes one by one."""
    codes = torch.full((3, ITEMS, 1), 0).copy_(torch.arange(ITEMS)[None, :, None])
    free = torch.ones(3, ITEMS, dtype=torch.bool)
    for row, items in enumerate(excluded if excluded is not None else []):
        free[row, [item for item in items.tolist() if item >= 0]] = False
    allowed = free if normalization == "constrained" else None
    of_codes = session_log_probs(
        model, trie, codes, **inputs, allowed=allowed, normalization=normalization, item_share=0
    ).exp()
    encoder = model.get_encoder()
    encoded = encoder(**inputs)
    mask = encoder.position_mask(inputs["attention_mask"])
    of_items = model.item_log_probs(encoded.item_states, mask, encoded.item_indices).exp() * free
    if normalization == "constrained":
        of_items = of_items / of_items.sum(1, keepdim=True)
    return share * of_items + (1 - share) * of_codes * free


@pytest.mark.parametrize("normalization", ["level", "constrained"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_ranked_list_has_the_mixtures_probability_of_every_item(share, normalization):
    model, trie, inputs = mixture_case()
    excluded = torch.tensor([[0, 5, 11], [3, -1, -1], [-1, -1, -1]])
    expected = item_probabilities(model, trie, inputs, share, normalization, excluded)
    options = {"item_share": share, "normalization": normalization, "excluded": excluded}
    found = generate_sessions(model, trie, **inputs, num_items=1, num_beams=ITEMS, **options)
    for row, (items, scores) in enumerate(zip(found.items[..., 0], found.scores, strict=True)):
        given = items >= 0
        assert given.sum() == ITEMS - (excluded[row] >= 0).sum() and len(items[given].unique()) == given.sum()
        torch.testing.assert_close(scores[given].exp(), expected[row][items[given]])
        assert (scores[given].diff() <= 1e-6).all()
    every = torch.arange(ITEMS).expand(3, -1)[..., None]
    again = session_log_probs(model, trie, every, **inputs, **options)
    torch.testing.assert_close(again.exp(), expected)
    if normalization == "constrained":
        torch.testing.assert_close(again.exp().sum(1), torch.ones(3))


def test_sessions_may_be_of_codes_alone_while_ranked_lists_and_guided_searches_have_the_head():
    model, trie, inputs = mixture_case(item_share=0.6, session_item_share=0.0)
    for num_items, share in ((1, 0.6), (2, 0.0)):
        found = generate_sessions(model, trie, **inputs, num_items=num_items, num_beams=5)
        expected = generate_sessions(model, trie, **inputs, num_items=num_items, num_beams=5, item_share=share)
        assert torch.equal(found.items, expected.items) and torch.equal(found.scores, expected.scores)
        log_probs = session_log_probs(model, trie, found.items, **inputs, normalization="level")
        torch.testing.assert_close(log_probs, found.scores)
    guide = SimpleNamespace(of_users=lambda users: lambda sessions, items: torch.zeros(items.shape))
    options = {"search": "guided_beam", "guide": guide, "num_items": 2, "num_beams": 5, "num_item_beams": ITEMS}
    found = generate_sessions(model, trie, **inputs, **options)
    expected = generate_sessions(model, trie, **inputs, **options, item_share=0.6)
    torch.testing.assert_close(found.scores, expected.scores)
    assert not torch.allclose(found.scores, generate_sessions(model, trie, **inputs, **options, item_share=0).scores)


def test_the_heads_own_encoders_run_only_for_its_share():
    model, trie, inputs = mixture_case(item_encoders=["shared", "learned"], session_item_share=0.0)
    encoded = {"attention_mask": inputs["attention_mask"], "encoder_outputs": model.get_encoder()(**inputs)}
    expected = generate_sessions(model, trie, **encoded, num_items=2, num_beams=5)
    ran = []
    model.get_encoder().item_encoders[0].register_forward_hook(lambda *_: ran.append(True))
    found = generate_sessions(model, trie, **inputs, num_items=2, num_beams=5)
    assert torch.equal(found.items, expected.items) and not ran
    torch.testing.assert_close(found.scores, expected.scores)
    generate_sessions(model, trie, **inputs, num_items=1, num_beams=5)
    assert ran


@pytest.mark.parametrize("search", ["beam", "diverse_beam", "sample", "stochastic_beam"])
def test_the_decoder_does_not_run_for_the_head_alone(search):
    model, trie, inputs = mixture_case()
    hook = model.get_decoder().register_forward_hook(lambda *_: pytest.fail("the decoder ran for nothing"))
    options = {"item_share": 1.0, "normalization": "constrained"}
    found = generate_sessions(model, trie, **inputs, num_items=2, num_beams=8, search=search, **options)
    again = session_log_probs(model, trie, found.items, **inputs, **options)
    hook.remove()
    nearly = session_log_probs(model, trie, found.items, **inputs, **options | {"item_share": 1 - 1e-7})
    torch.testing.assert_close(again, nearly)
    given = found.items[..., 0] >= 0
    torch.testing.assert_close(found.scores[given], nearly[given])


def test_sessions_have_the_mixtures_probability_and_draws_follow_it():
    model, trie, inputs = mixture_case(item_share=0.6)
    options = {"normalization": "constrained"}
    found = generate_sessions(model, trie, **inputs, num_items=2, num_beams=ITEMS * (ITEMS - 1), **options)
    assert (found.items >= 0).all() and (found.items[..., 0] != found.items[..., 1]).all()
    torch.testing.assert_close(found.scores.exp().sum(1), torch.ones(3))  # all sessions there are
    torch.testing.assert_close(session_log_probs(model, trie, found.items, **inputs, **options), found.scores)
    # Without the head's share it is another distribution, and without the head there is none to ask for.
    plain = generate_sessions(model, trie, **inputs, num_items=2, num_beams=4, item_share=0)
    assert not torch.equal(plain.items, found.items[:, :4])
    drawn = generate_sessions(
        model, trie, **inputs, num_items=1, num_beams=6000, search="sample", generator=torch.Generator(), **options
    )
    expected = item_probabilities(model, trie, inputs, 0.6, "constrained")
    counts = torch.stack([torch.bincount(items[:, 0], minlength=ITEMS) for items in drawn.items])
    torch.testing.assert_close(counts / 6000, expected, atol=0.03, rtol=0)
    streamed = list(stream_sessions(model, trie, **inputs, num_items=2, num_beams=ITEMS * ITEMS, **options))
    assert [item.item for item in streamed if item.user == 0] == found.items[0, 0].tolist()


def test_the_gate_learns_of_whom_which_part_is_right(tmp_path):
    """Users go on as the head says after items 0 to 5, and as the codes say after the others."""
    model, trie, _ = mixture_case(item_gate=True, item_share=1.0)
    histories = [[item] for item in range(ITEMS)] * 40
    inputs = history_inputs(model, histories)
    parts = [item_probabilities_of(model, trie, inputs, share) for share in (1.0, 0.0)]
    by_head = torch.arange(len(histories)) % ITEMS < 6
    probabilities = torch.where(by_head[:, None], *parts)
    following = probabilities.multinomial(1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    fitted = fit_item_gate(model, trie, [(inputs, following)])
    states = model.get_encoder()(**inputs).item_states
    shares = model.item_shares(states)
    assert shares[by_head].mean() > 0.7 > 0.3 > shares[~by_head].mean()
    assert fitted["num_users"] == len(histories) and abs(fitted["item_share"] - shares.mean().item()) < 1e-5
    assert fitted["nll_mixture"] < min(fitted["nll_items"], fitted["nll_codes"])
    # What is generated has each user's own share, and so has a reloaded model.
    model.save_pretrained(tmp_path)
    loaded = OneRecForConditionalGeneration.from_pretrained(tmp_path).eval()
    few = history_inputs(model, [[0], [7]])
    found = generate_sessions(loaded, trie, **few, num_items=1, num_beams=ITEMS, normalization="constrained")
    expected = torch.stack([shares[row] * parts[0][row] + (1 - shares[row]) * parts[1][row] for row in (0, 7)])
    torch.testing.assert_close(found.scores.exp(), expected.gather(1, found.items[..., 0]))
    every = torch.arange(ITEMS).expand(2, -1)[..., None]
    again = session_log_probs(loaded, trie, every, **few, normalization="constrained")
    torch.testing.assert_close(again.exp(), expected)
    with pytest.raises(ValueError, match="raise holdout_sessions"):
        fit_item_gate(model, trie, [])


def item_probabilities_of(model, trie, inputs, share):
    every = torch.arange(ITEMS).expand(len(inputs["input_ids"]), -1)[..., None]
    return session_log_probs(model, trie, every, **inputs, normalization="constrained", item_share=share).exp()


def shared_case(**overrides):
    """As [`mixture_case`], the items by their last digit in base 5: five leaves of two or three items."""
    model, _, inputs = mixture_case(**overrides)
    leaf = torch.arange(ITEMS) % 5
    return model, ItemTrie(torch.stack([leaf // 2, leaf, torch.zeros_like(leaf)], 1), [8, 8, 8]), inputs, leaf


def shared_probabilities(model, trie, inputs, leaf, share, normalization, free, history=()):
    """P(item | items before) (3, ITEMS) by brute force, for items that may be given (3, ITEMS): the head's softmax
    and, of the leaves' probability by codes alone, an equal part."""
    free = free.clone()
    free[:, list(history)] = False
    before = torch.tensor([*history], dtype=torch.long).expand(3, ITEMS, -1)
    sessions = torch.cat([before, torch.arange(ITEMS).expand(3, -1)[..., None]], -1)
    plain = {**inputs, "allowed": free, "normalization": normalization, "item_share": 0}
    if history:
        plain["allowed"] = free | (torch.arange(ITEMS) == torch.tensor(history)[:, None]).any(0)
        so_far = session_log_probs(model, trie, before[:, :1], **plain)
    of_codes = session_log_probs(model, trie, sessions, **plain) - (so_far if history else 0)
    sharing = torch.zeros(3, 5).index_add_(1, leaf, free.float())[:, leaf]
    of_codes = of_codes.exp() / sharing.clamp(min=1) * free
    encoder = model.get_encoder()
    encoded = encoder(**inputs)
    mask = encoder.position_mask(inputs["attention_mask"])
    of_items = model.item_log_probs(encoded.item_states, mask, encoded.item_indices).exp() * free
    if normalization == "constrained":
        of_items = of_items / of_items.sum(1, keepdim=True)
    return share * of_items + (1 - share) * of_codes


def constraints_of_items():
    """Excluded and allowed items, and what they leave (3, ITEMS)."""
    excluded = torch.tensor([[0, 5, 11], [3, -1, -1], [-1, -1, -1]])
    allowed = torch.arange(ITEMS) != torch.tensor([[1], [2], [4]])
    free = allowed.clone()
    free[0, [0, 5, 11]] = free[1, 3] = False
    return {"excluded": excluded, "allowed": allowed}, free


@pytest.mark.parametrize("normalization", ["level", "constrained"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_items_that_share_an_id_are_ranked_by_their_own_probability(share, normalization):
    model, trie, inputs, leaf = shared_case()
    constraint, free = constraints_of_items()
    expected = shared_probabilities(model, trie, inputs, leaf, share, normalization, free)
    options = {**inputs, **constraint, "item_share": share, "normalization": normalization}
    found = generate_sessions(model, trie, num_items=1, num_beams=ITEMS, **options)
    for row, (items, scores) in enumerate(zip(found.items[..., 0], found.scores, strict=True)):
        given = items >= 0
        assert sorted(items[given].tolist()) == free[row].nonzero()[:, 0].tolist()
        torch.testing.assert_close(scores[given].exp(), expected[row][items[given]])
        assert (scores[given].diff() <= 1e-6).all()
    every = torch.arange(ITEMS).expand(3, -1)[..., None]
    torch.testing.assert_close(session_log_probs(model, trie, every, **options).exp(), expected)
    if normalization == "constrained":
        torch.testing.assert_close(expected.sum(1), torch.ones(3))


@pytest.mark.parametrize("normalization", ["level", "constrained"])
def test_sessions_tell_items_apart_that_share_an_id(normalization):
    model, trie, inputs, leaf = shared_case(item_share=0.6)
    constraint, free = constraints_of_items()
    options = {**inputs, **constraint, "normalization": normalization}
    found = generate_sessions(model, trie, num_items=2, num_beams=ITEMS * ITEMS, **options)
    first = shared_probabilities(model, trie, inputs, leaf, 0.6, normalization, free)
    second = torch.stack(
        [shared_probabilities(model, trie, inputs, leaf, 0.6, normalization, free, [item]) for item in range(ITEMS)], 1
    )
    expected = first[..., None] * second
    if normalization == "constrained":
        torch.testing.assert_close(found.scores.exp().sum(1), torch.ones(3))
    for user, (sessions, scores) in enumerate(zip(found.items, found.scores, strict=True)):
        sessions, scores = sessions[scores.isfinite()], scores[scores.isfinite()]
        count = int(free[user].sum())
        assert len({tuple(session) for session in sessions.tolist()}) == len(sessions) == count * (count - 1)
        torch.testing.assert_close(scores.exp(), expected[user][sessions[:, 0], sessions[:, 1]])
    torch.testing.assert_close(
        session_log_probs(model, trie, found.items, **options)[found.scores.isfinite()],
        found.scores[found.scores.isfinite()],
    )
    best = list(stream_sessions(model, trie, num_items=2, num_beams=ITEMS * ITEMS, **options))
    assert [item.item for item in best if item.user == 1] == found.items[1, 0].tolist()


def test_draws_and_groups_tell_items_apart_that_share_an_id():
    model, trie, inputs, leaf = shared_case(item_share=0.6)
    constraint, free = constraints_of_items()
    options = {**inputs, **constraint, "normalization": "constrained"}
    expected = shared_probabilities(model, trie, inputs, leaf, 0.6, "constrained", free)
    draw = {"num_items": 1, "generator": torch.Generator().manual_seed(0)}
    drawn = generate_sessions(model, trie, **options, **draw, num_beams=6000, search="sample")
    counts = torch.stack([torch.bincount(items[:, 0], minlength=ITEMS) for items in drawn.items])
    torch.testing.assert_close(counts / 6000, expected, atol=0.03, rtol=0)
    for search in ("stochastic_beam", "diverse_beam"):
        found = generate_sessions(model, trie, **options, num_items=2, num_beams=8, search=search)
        assert found.scores.isfinite().all() and (found.items[..., 0] != found.items[..., 1]).all()
        assert free.gather(1, found.items.flatten(1)).all()
        torch.testing.assert_close(session_log_probs(model, trie, found.items, **options), found.scores)


def test_a_user_with_too_few_items_of_one_id_has_a_short_session():
    model, trie, inputs, leaf = shared_case(item_share=0.6)
    allowed = torch.ones(3, ITEMS, dtype=torch.bool)
    allowed[0] = torch.arange(ITEMS) == 7
    allowed[1] = leaf == 2
    found = generate_sessions(model, trie, **inputs, allowed=allowed, num_items=2, num_beams=20)
    assert found.items[0][found.scores[0].isfinite()].tolist() == [[7, -1]]
    pairs = {tuple(session) for session in found.items[1][found.scores[1].isfinite()].tolist()}
    assert pairs == {(2, 7), (7, 2)}


def test_users_whose_tables_do_not_fit_together_are_searched_one_after_the_other(monkeypatch):
    model, trie, inputs = mixture_case()
    model.config.item_share = 0.6
    constraint = {
        "excluded": torch.tensor([[0, 5, 11], [3, -1, -1], [-1, -1, -1]]),
        "allowed": torch.arange(ITEMS) != torch.tensor([[1], [2], [4]]),
    }
    options = {**inputs, **constraint, "num_items": 2, "num_beams": 5}
    for changed in ({}, {"allowed": constraint["allowed"][0]}, {"item_share": torch.tensor([0.2, 0.5, 0.9])}):
        together = generate_sessions(model, trie, **options | changed)
        streamed = list(stream_sessions(model, trie, **options | changed))
        given = {**inputs, **constraint, **changed}
        log_probs = session_log_probs(model, trie, together.items, **given)
        with monkeypatch.context() as patch:
            patch.setattr("onerec_hf.session_generation.item_mixture._TABLE_NUMBERS", 1)
            patch.setattr("onerec_hf.session_generation.item_mixture._CHUNK_NUMBERS", 5)
            apart = generate_sessions(model, trie, **options | changed)
            assert torch.equal(apart.items, together.items) and torch.equal(apart.token_ids, together.token_ids)
            torch.testing.assert_close(apart.scores, together.scores)
            torch.testing.assert_close(session_log_probs(model, trie, together.items, **given), log_probs)
            again = list(stream_sessions(model, trie, **options | changed))
            assert sorted(again) == sorted(streamed)


def test_an_item_far_above_the_first_ones_keeps_its_probability(monkeypatch):
    model, trie, inputs = mixture_case()
    with torch.no_grad():
        model.get_encoder().item_vectors.learned.weight.mul_(1000)
    encoder = model.get_encoder()
    mask = encoder.position_mask(inputs["attention_mask"])
    encoded = encoder(**inputs)
    assert (model.item_log_probs(encoded.item_states, mask, encoded.item_indices)[:, 0] < -100).any()
    options = {**inputs, "num_items": 1, "num_beams": ITEMS, "item_share": 0.6}
    expected = generate_sessions(model, trie, **options)
    assert expected.scores.isfinite().all()
    monkeypatch.setattr("onerec_hf.session_generation.item_mixture._CHUNK_NUMBERS", 3)  # an item at a time
    found = generate_sessions(model, trie, **options)
    assert torch.equal(found.items, expected.items)
    torch.testing.assert_close(found.scores, expected.scores)


def test_every_user_may_have_a_share_of_their_own():
    model, trie, inputs = mixture_case()
    shares = [0.2, 0.5, 0.95]
    options = {"num_items": 1, "num_beams": ITEMS}
    found = generate_sessions(model, trie, **inputs, **options, item_share=torch.tensor(shares))
    for user, share in enumerate(shares):
        expected = generate_sessions(model, trie, **inputs, **options, item_share=share)
        assert torch.equal(found.items[user], expected.items[user])
        torch.testing.assert_close(found.scores[user], expected.scores[user])


def test_generate_mixes_with_the_share_that_it_is_given():
    model, trie, inputs = mixture_case()
    options = {"num_beams": 6, "return_dict_in_generate": True, "custom_generate": generate_with_trie, "trie": trie}
    for share in (None, 0.0, 0.9, torch.tensor([0.2, 0.5, 0.9])):
        expected = generate_sessions(model, trie, **inputs, num_beams=6, item_share=share)
        found = model.generate(**inputs, **options, num_return_sequences=6, item_share=share)
        assert torch.equal(found.sequences.view(3, 6, 2, 4)[..., 1:], expected.token_ids)
        torch.testing.assert_close(found.sequences_scores.view(3, 6), expected.scores)


def test_half_precision_mixes_too():
    model, trie, inputs = mixture_case(item_encoders=["shared", "learned"])
    full = generate_sessions(model, trie, **inputs, num_items=1, num_beams=ITEMS)
    half = generate_sessions(model.to(torch.bfloat16), trie, **inputs, num_items=1, num_beams=ITEMS)
    assert half.scores.dtype == torch.float32
    torch.testing.assert_close(half.scores, full.scores, atol=0.3, rtol=0.05)


def test_what_the_mixture_cannot_do_is_refused():
    model, trie, inputs = mixture_case()
    with pytest.raises(ValueError, match=r"item_share must lie in \[0, 1\], got 2"):
        generate_sessions(model, trie, **inputs, item_share=2)
    plain = OneRecForConditionalGeneration(OneRecConfig.from_preset("debug")).eval()
    with pytest.raises(ValueError, match="the model has no item head"):
        generate_sessions(plain, trie, input_ids=inputs["input_ids"], item_share=0.5)


@pytest.fixture
def tokenizer():
    embeddings = torch.randn(ITEMS, 3, generator=torch.Generator().manual_seed(0)).numpy()
    return OneRecTokenizer.fit(range(100, 100 + ITEMS), embeddings, ResidualQuantizer([8, 8, 8]))


def test_every_behaviour_is_followed_by_a_label_and_the_last_by_the_sessions_first_item(tokenizer):
    collate = SessionCollator(tokenizer, item_model(history_items=3))
    rows = [
        {"history": [4, 5, 6, 7], "session": [8, 9]},
        {"history": [2], "session": [1]},
        {"history": [], "session": [3]},
    ]
    batch = collate(rows)
    assert batch["history_item_indices"].tolist() == [[5, 6, 7], [-1, -1, 2], [-1, -1, -1]]
    assert batch["item_targets"].tolist() == [[6, 7, 8], [-100, -100, 1], [-100, -100, -100]]
    shared = [{"rows": [{"history": [4, 5], "sessions": [[5], [6, 7]], "prefixes": [1, 2]}]}]
    assert collate(shared)["item_targets"].tolist() == [[5, 6]]


@torch.no_grad()
def test_the_items_of_the_last_session_are_the_heads_targets_too(tokenizer):
    model = item_model(history_items=4, session_items=3)
    continued, ordinary = SessionCollator(tokenizer, model, True), SessionCollator(tokenizer, model)
    shared = [{"rows": [{"history": [4, 5], "sessions": [[5], [6, 7, 8]], "prefixes": [1, 2]}]}]
    batch, expected = continued(shared), ordinary(shared)
    assert batch["history_item_indices"].tolist() == [[4, 5, 6, 7]]
    assert batch["item_targets"].tolist() == [[5, 6, 7, 8]]
    torch.testing.assert_close(model(**batch).code_loss, model(**expected).code_loss)
    # A full history gives its oldest behaviours away, but not the last one of the shortest prefix.
    shared = [{"rows": [{"history": [1, 2, 3, 4, 5], "sessions": [[4, 5], [6, 7, 8]], "prefixes": [2, 4]}]}]
    batch = continued(shared)
    assert batch["history_item_indices"].tolist() == [[3, 4, 5, 6]]
    assert batch["item_targets"].tolist() == [[4, 5, 6, 7]] and batch["target_prefixes"].tolist() == [1, 3]


def test_recommends_with_the_head_and_new_items_once_they_have_a_vector(tokenizer):
    model = item_model()
    histories = [[100, 103], [105]]
    first = recommend(model, tokenizer, histories, top_k=ITEMS, num_beams=ITEMS)
    assert [len(row["items"]) for row in first] == [ITEMS - 2, ITEMS - 1]
    by_codes = model.config.item_share
    model.config.item_share = 0.0
    assert recommend(model, tokenizer, histories, top_k=ITEMS, num_beams=ITEMS) != first
    model.config.item_share = by_codes
    tokenizer.add_items([200], torch.ones(1, 3).numpy())
    longer = recommend(model, tokenizer, [[100, 200]], top_k=ITEMS, num_beams=ITEMS)  # read by its codes alone
    assert len(longer[0]["items"]) == ITEMS - 1
    model.add_items(torch.ones(1, 3))
    before, after = (recommend(model, tokenizer, [[100]], top_k=13, num_beams=13, item_share=s) for s in (0, 1))
    assert 200 in after[0]["items"] and before != after
    tokenizer.remove_items([200])
    left = recommend(model, tokenizer, [[100, 200]], top_k=13, num_beams=13, item_share=1)[0]["items"]
    assert 200 not in left and len(left) == ITEMS - 1


def test_the_softmax_is_estimated_where_the_catalogue_is_larger_than_configured(monkeypatch):
    model = item_model()
    states, item_targets = torch.randn(1, 1, 3, 16), torch.tensor([[1, -100, 4]])
    full = model.item_loss(states, item_targets)
    monkeypatch.setattr("torch.randint", lambda *args, **kwargs: torch.arange(ITEMS - 1))
    model.config.item_negatives = ITEMS
    torch.testing.assert_close(model.item_loss(states, item_targets), full)
    model.config.item_negatives = 0
    torch.testing.assert_close(model.item_loss(states, item_targets), full)
    model.config.item_negatives = ITEMS - 1
    assert not torch.isclose(model.item_loss(states, item_targets), full)
    model.config.item_negatives = ITEMS
    monkeypatch.setattr("torch.randint", lambda *args, **kwargs: torch.arange(ITEMS))
    model.config.num_items += 1  # all items are drawn once: no longer an estimate, but for the factor
    torch.testing.assert_close(
        model.item_loss(states, item_targets), full, atol=2 * torch.log1p(torch.tensor(1 / ITEMS)).item(), rtol=0
    )
