import copy
import math

import pytest
import torch
import torch.nn.functional as F
from alignment_cases import (
    NUM_ITEMS,
    dpo_arguments,
    make_trainer,
    preference_pairs,
    tiny_generator,
    tiny_tokenizer,
    training_rows,
)
from peft import LoraConfig

from onerec_hf.alignment import OneRecDPOTrainer, PreferenceCollator
from onerec_hf.evaluation.policy_inputs import generation_inputs
from onerec_hf.item_trie import ItemTrie
from onerec_hf.pretraining import SessionCollator, share_histories
from onerec_hf.session_generation import session_log_probs
from onerec_hf.tokenization_onerec import OneRecTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> OneRecTokenizer:
    return tiny_tokenizer()


def session_log_probability(model, tokenizer, history, session) -> torch.Tensor:
    """Sum of the log-probabilities of a session's codes by a plain forward of one row."""
    encoded = tokenizer.encode_histories([history], max_items=6, catalogue_indices=True)
    labels = tokenizer.encode_sessions([session], catalogue_indices=True)
    decoder_input_ids = F.pad(labels, (1, 0), value=2)[:, :-1]
    log_probs = model(**encoded, decoder_input_ids=decoder_input_ids).logits.log_softmax(-1)
    return log_probs.gather(-1, labels[..., None]).squeeze(-1)[labels != 2].sum()


def batch_of(trainer) -> dict[str, torch.Tensor]:
    return trainer.data_collator(list(trainer.train_dataset))


class TestCollator:
    def test_tensors(self, tokenizer):
        model = tiny_generator()
        ntp_dataset = training_rows()
        collator = PreferenceCollator(tokenizer, model, ntp_dataset)
        batch = collator(
            [
                {"history": [1, 2], "chosen": [3, 4], "rejected": [[5], [8, 9]], "ntp_rows": [7, 9]},
                {"history": [6], "chosen": [7, 8], "rejected": [[9, 10]], "ntp_rows": [0, 1]},
            ]
        )
        codes = tokenizer.item_token_ids
        bos = torch.tensor([2])
        assert torch.equal(batch["input_ids"][0], torch.cat([bos, codes[3], bos, codes[4]]))
        assert torch.equal(batch["input_ids"][2], torch.cat([bos, codes[5], torch.zeros(4, dtype=torch.long)]))
        assert batch["completion_mask"][0].tolist() == [0, 1, 1, 1, 0, 1, 1, 1]
        assert batch["completion_mask"][2].tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
        assert batch["encoder_input_ids"].shape == (2, 7)
        assert batch["input_ids"].shape == (4, 8) and batch["rejected_mask"].tolist() == [[True], [True]]
        ordinary = SessionCollator(tokenizer, model)([ntp_dataset[row] for row in (7, 9, 0, 1)])
        for name, tensor in ordinary.items():
            assert torch.equal(batch[f"ntp_{name}"], tensor)


def perturb(model) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def ratio(pair, place=0) -> float:
    """How much more than the reference the policy prefers the chosen to a rejected session, beta = 0.7."""
    return 0.7 * (pair[0][0] - pair[0][1] - pair[1 + place][0] + pair[1 + place][1])


# Of one pair's log-probabilities (policy, reference) of the chosen and the rejected sessions of six codes each, with
# beta 0.7, label_smoothing 0.1, cpo_alpha 0.3 and simpo_gamma 0.8.
LOSSES = {
    "sigmoid": lambda pair: softplus(-ratio(pair)),
    "ipo": lambda pair: (ratio(pair) / 0.7 / 6 - 1 / 1.4) ** 2,
    "cdpo": lambda pair: 0.9 * softplus(-ratio(pair)) + 0.1 * softplus(ratio(pair)),
    "robust": lambda pair: (0.9 * softplus(-ratio(pair)) - 0.1 * softplus(ratio(pair))) / 0.8,
    "cpo": lambda pair: softplus(-0.7 * (pair[0][0] - pair[1][0])) - 0.3 * pair[0][0] / 6,
    "simpo": lambda pair: softplus(0.8 - 0.7 * (pair[0][0] - pair[1][0]) / 6),
    "sft": lambda pair: -pair[0][0] / 6,
    "sdpo": lambda pair: math.log1p(sum(math.exp(-ratio(pair, place)) for place in range(len(pair) - 1))),
}


class TestTrainer:
    def test_first_loss_is_ln_2_plus_the_mixed_in_loss(self, tokenizer, tmp_path):
        trainer = make_trainer(tokenizer, tmp_path)
        batch = batch_of(trainer)
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, batch, False)
        metrics = trainer._metrics["train"]
        assert metrics["dpo_loss"] == [pytest.approx(math.log(2), abs=1e-6)]
        ntp = {name.removeprefix("ntp_"): tensor for name, tensor in batch.items() if name.startswith("ntp_")}
        expected = tiny_generator().eval()(**ntp).loss
        assert metrics["ntp_loss"] == [pytest.approx(expected.item(), abs=1e-6)]
        torch.testing.assert_close(loss, expected + 0.5 * math.log(2))
        assert len(trainer.train_dataset["ntp_rows"][0]) == 2

    @pytest.mark.parametrize("loss_type", LOSSES)
    def test_losses_of_two_pairs_by_hand(self, tokenizer, tmp_path, loss_type):
        model, pairs = tiny_generator(), preference_pairs(2)
        reference = copy.deepcopy(model).eval()
        options = {"label_smoothing": 0.1, "cpo_alpha": 0.3, "simpo_gamma": 0.8}
        trainer = make_trainer(
            tokenizer, tmp_path, model, pairs, beta=0.7, ntp_per_pair=0, lambda_dpo=2.0, loss_type=loss_type, **options
        )
        perturb(model)
        policy = copy.deepcopy(reference)
        policy.load_state_dict(model.state_dict())
        with torch.no_grad():
            # Each pair's chosen session, then its rejected ones: log-probabilities of policy and reference.
            log_probs = [
                [
                    tuple(
                        session_log_probability(scored, tokenizer, pair["history"], session).item()
                        for scored in (policy, reference)
                    )
                    for session in (pair["chosen"], *pair["rejected"])
                ]
                for pair in pairs
            ]
        expected = sum(LOSSES[loss_type](pair) for pair in log_probs) / 2
        loss = trainer._compute_loss(model.train(), batch_of(trainer), False)
        assert loss.item() == pytest.approx(2.0 * expected, rel=1e-4)
        assert (trainer.ref_model is None) == (loss_type in ("cpo", "simpo", "sft"))

    def test_training_raises_the_margin_and_leaves_the_reference(self, tokenizer, tmp_path):
        model = tiny_generator()
        before = copy.deepcopy(model)
        trainer = make_trainer(tokenizer, tmp_path, model, max_steps=10, learning_rate=5e-3)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
        assert history[-1]["rewards/margins"] > history[0]["rewards/margins"] + 0.05
        assert history[-1]["dpo_loss"] < history[0]["dpo_loss"]
        assert history[0]["loss"] == pytest.approx(0.5 * history[0]["dpo_loss"] + history[0]["ntp_loss"], abs=1e-3)
        reference = trainer.ref_model.state_dict()
        assert all(torch.equal(reference[name], tensor) for name, tensor in before.state_dict().items())
        assert any(not torch.equal(model.state_dict()[name], tensor) for name, tensor in before.state_dict().items())
        assert model.config.dropout == 0.1  # what is saved can be trained further with dropout

    def test_resumed_run_ends_where_an_uninterrupted_one_does(self, tokenizer, tmp_path):
        through = make_trainer(tokenizer, tmp_path / "through")
        through.train()
        arguments = {"save_strategy": "steps", "save_steps": 3}
        interrupted = make_trainer(tokenizer, tmp_path / "resumed", **arguments)
        interrupted.train()
        assert not (tmp_path / "resumed" / "README.md").exists()
        resumed = make_trainer(tokenizer, tmp_path / "resumed", **arguments)
        resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-3"))
        for name, tensor in through.model.state_dict().items():
            torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=0, atol=1e-7)

    @pytest.mark.parametrize("loss_type", ["sigmoid", "sdpo"])
    def test_precomputed_or_given_reference_gives_the_same_loss(self, tokenizer, tmp_path, loss_type):
        # As the sampler gives them: whole vocabulary, a list for the rejected ones.
        model, pairs = tiny_generator().eval(), preference_pairs()
        with torch.no_grad():
            log_probs = [
                [session_log_probability(model, tokenizer, pair["history"], session).item() for session in sessions]
                for pair in pairs
                for sessions in [[pair["chosen"], *pair["rejected"]]]
            ]
        given = pairs.add_column("ref_chosen_logps", [row[0] for row in log_probs])
        given = given.add_column("ref_rejected_logps", [row[1:] for row in log_probs])
        batch_losses = []
        for rows, precompute in ((pairs, False), (pairs, True), (given, False)):
            trainer = make_trainer(
                tokenizer, tmp_path, None, rows, precompute_ref_log_probs=precompute, loss_type=loss_type
            )
            assert rows is pairs or trainer.ref_model is None
            with torch.no_grad():
                trainer.model.lm_head.weight.mul_(1.1)
            batch = batch_of(trainer)
            assert ("ref_chosen_logps" in batch) == (precompute or rows is given)
            batch_losses.append(trainer._compute_loss(trainer.model.train(), batch, False))
        torch.testing.assert_close(batch_losses[1], batch_losses[0])
        torch.testing.assert_close(batch_losses[2], batch_losses[0])

    def test_shared_histories_of_a_causal_encoder_are_the_single_ones(self, tokenizer, tmp_path):
        model = tiny_generator(encoder_attention="causal", history_positions="item")
        # One user, each of whose histories continues the one before it: one row of shared histories.
        rows = training_rows(4).remove_columns("user_id").add_column("user_id", ["u"] * 4)
        rows = rows.map(lambda row, index: {"history": list(range(2 + index)), "length": 2 + index}, with_indices=True)
        shared = share_histories(rows, 6, targets_per_row=4)
        assert len(shared) == 1
        losses = []
        for ntp_dataset, ntp_per_pair in ((rows, 4), (shared, 1)):
            trainer = make_trainer(
                tokenizer,
                tmp_path,
                copy.deepcopy(model),
                preference_pairs(1),
                {"ntp_dataset": ntp_dataset},
                ntp_per_pair=ntp_per_pair,
            )
            perturb(trainer.model)
            losses.append(trainer._compute_loss(trainer.model.train(), batch_of(trainer), False))
        torch.testing.assert_close(*losses)

    def test_lora_trains_an_adapter_against_the_model_without_it(self, tokenizer, tmp_path):
        model = tiny_generator()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=True)
        trainer = make_trainer(tokenizer, tmp_path, model, None, {"peft_config": lora}, learning_rate=1e-1)
        assert trainer.ref_model is None
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
        assert log[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert log[-1]["rewards/margins"] > log[0]["rewards/margins"] + 0.05
        merged = trainer.model.merge_and_unload()
        changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed and all("proj" in name for name in changed)

    def test_checkpointing_and_bf16_run_the_same_training(self, tokenizer, tmp_path):
        logs = {}
        for name, options in {
            "plain": {},
            "checkpointing": {"gradient_checkpointing": True},
            "bf16": {"bf16": True},
        }.items():
            trainer = make_trainer(tokenizer, tmp_path / name, max_steps=3, **options)
            trainer.train()
            logs[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert logs["checkpointing"] == pytest.approx(logs["plain"], abs=1e-5)
        assert logs["bf16"] == pytest.approx(logs["plain"], rel=0.03) and logs["bf16"] != logs["plain"]

    @pytest.mark.parametrize(
        "overrides",
        [
            {"item_share": 0.3},
            {"item_share": 0.3, "item_memory": 2},
            {"item_gate": True},
            {"session_item_share": 0.0, "item_encoders": ["shared", "learned"]},
        ],
    )
    def test_with_an_item_head_a_session_has_the_mixtures_probability(self, tokenizer, tmp_path, overrides):
        head = {"history_positions": "item", "encoder_attention": "causal", "item_head": "encoder"}
        model = tiny_generator(**head, num_items=NUM_ITEMS - 1, **overrides)  # an item without a vector
        if model.config.item_memory:
            neighbours = torch.arange(NUM_ITEMS - 1)[:, None] // torch.tensor([2, 3])
            model.item_memory.set_neighbours(neighbours, torch.ones(neighbours.shape))
        trainer = make_trainer(tokenizer, tmp_path, model, ntp_per_pair=0, loss_type="sdpo")
        pairs = trainer.train_dataset.to_list()
        batch = trainer.data_collator(pairs)
        of_chosen, of_rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
        sessions = [[pair["chosen"], *pair["rejected"], [-1, -1]][:3] for pair in pairs]
        inputs = generation_inputs(trainer.ref_model, tokenizer, pairs, exclude_consumed=False)
        trie, sessions = ItemTrie.from_tokenizer(tokenizer), torch.tensor(sessions)
        expected = session_log_probs(trainer.ref_model, trie, sessions, **inputs, normalization="vocabulary")
        assert NUM_ITEMS - 1 in sessions
        torch.testing.assert_close(of_chosen, expected[:, 0])
        kept = batch["rejected_mask"]
        torch.testing.assert_close(of_rejected[kept], expected[:, 1:][kept])
        # Both parts are trained, but for a head that has no share in sessions: its vectors in the histories alone, and
        # its own encoders do not run.
        model.eval()
        for encoder in model.get_encoder().item_encoders:
            encoder.register_forward_hook(lambda *_: pytest.fail("ran for nothing"))
        trainer.compute_loss(model, batch).backward()
        gradient = model.get_encoder().item_vectors.learned.weight.grad
        assert gradient.any() and model.lm_head.weight.grad.any()
        read = {item for pair in pairs for item in pair["history"]}
        assert ("session_item_share" in overrides) == (set(gradient.any(1).nonzero().flatten().tolist()) <= read)

    def test_what_is_missing_is_named(self, tokenizer, tmp_path):
        with pytest.raises(
            ValueError, match="no preference pair.*: raise r_dpo or num_candidates, or lower min_reward_margin"
        ):
            OneRecDPOTrainer(tiny_generator(), dpo_arguments(tmp_path), preference_pairs().select([]), tokenizer)
        with pytest.raises(ValueError, match="stands alone"):
            dpo_arguments(tmp_path, loss_type=["cpo", "sigmoid"])
        with pytest.raises(ValueError, match="label_smoothing"):
            dpo_arguments(tmp_path, loss_type="robust")
        with pytest.raises(ValueError, match="ntp_dataset"):
            OneRecDPOTrainer(tiny_generator(), dpo_arguments(tmp_path), preference_pairs(), tokenizer)
        with pytest.raises(ValueError, match="negative"):
            dpo_arguments(tmp_path, lambda_dpo=-1.0)
        model = tiny_generator()
        make_trainer(tokenizer, tmp_path, model)
        assert model.config.catalogue_fingerprint == tokenizer.catalogue_fingerprint()
        model.config.catalogue_fingerprint = "3-other"
        with pytest.raises(ValueError, match="trained on other items or semantic IDs"):
            make_trainer(tokenizer, tmp_path, model)
