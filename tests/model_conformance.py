"""What every transformers model is expected to do, as a mixin for the test classes of our models.

`recipes/benchmarks/conformance.py` runs transformers' own common tests; these need nothing but the package, run with
every test run, and also cover what those leave to each model: peft, quantization, compiling, resized embeddings.
"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
# OneRec-V2's decoder in miniature, for tests of what holds of every configuration: layers 0 and 1 share a set.
LAZY_DECODER = {
    "encoder_layers": 0,
    "decoder_layers": 3,
    "context_key_value_sets": 2,
    "context_key_value_heads": 1,
}


class ModelConformanceTests:
    """A subclass says which model and which inputs; `labels` among the inputs give a loss.

    Attributes:
        model_class: The class with the head.
        base_model_class: What `AutoModel` gives for the same checkpoint.
        attention_projections, expert_parameters: What a LoRA adapter is put on, by the ends of the names.
        offloaded: Name of the submodule that a device map puts on the disk.
    """

    model_class: type[PreTrainedModel]
    base_model_class: type[PreTrainedModel]
    attention_projections = ["q_proj", "v_proj"]
    expert_parameters: list[str] = []
    offloaded: str

    def make_config(self, **overrides) -> PreTrainedConfig:
        raise NotImplementedError

    def make_inputs(self, config: PreTrainedConfig, batch_size: int = 3) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def make_model(self, **overrides) -> PreTrainedModel:
        """A model in evaluation mode whose every tensor is off its initial value."""
        torch.manual_seed(0)
        model = self.model_class(self.make_config(**overrides)).eval()
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor) * 0.1)
        return model

    def test_config_round_trip(self, tmp_path):
        config = self.make_config(note="kept")
        config.save_pretrained(tmp_path)
        for loaded in (type(config).from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
            assert type(loaded) is type(config) and loaded.note == "kept"
            # Where it was loaded from is the one thing that may differ.
            assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}

    def test_weights_round_trip_in_shards(self, tmp_path):
        model = self.make_model()
        model.save_pretrained(tmp_path, max_shard_size="10KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1 and not list(tmp_path.glob("*.bin"))
        loaded, report = self.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name
        assert type(AutoModel.from_pretrained(tmp_path)) is self.base_model_class

    def test_meta_and_plain_initialisation_agree(self):
        """A weight that a checkpoint lacks starts as it does in a new model: by `_init_weights`, by name."""
        config = self.make_config()
        torch.manual_seed(0)
        new = self.model_class(config)
        loaded = self.model_class.from_pretrained(None, config=copy.deepcopy(config), state_dict={})
        for name, tensor in new.state_dict().items():
            other = loaded.state_dict()[name]
            assert other.device.type == "cpu" and other.isfinite().all()
            # Two draws of the same distribution: constants are equal, the rest has the same spread.
            if (tensor == tensor.flatten()[0]).all():
                assert torch.equal(other, tensor), name
            elif tensor.numel() > 256:
                assert other.std() / tensor.std() == pytest.approx(1, abs=0.3), name

    def test_resized_embeddings_keep_the_old_rows_and_the_outputs(self):
        model = self.make_model()
        inputs = self.make_inputs(model.config)
        before = model(**inputs)
        embeddings = {
            name: module.weight.clone()
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Embedding) and module.num_embeddings == model.config.vocab_size
        }
        assert embeddings
        size = model.config.vocab_size + 3
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == size
        for name, weight in embeddings.items():
            resized = model.get_submodule(name).weight
            assert resized.shape[0] == size and torch.equal(resized[:-3], weight), name
        after = model(**inputs)
        logits = after.logits[..., : before.logits.shape[-1]]
        torch.testing.assert_close(logits, before.logits, **TOLERANCE)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing_gives_the_same_gradients(self, use_reentrant):
        model = self.make_model(dropout=0.0).train()
        inputs = self.make_inputs(model.config)
        layer = next(layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer))
        inner = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
        passes, gradients = [], []
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            calls = []
            hook = inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            model.zero_grad()
            model(**inputs).loss.backward()
            hook.remove()
            passes.append(len(calls))
            gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        assert passes[1] == 2 * passes[0]  # once more in the backward pass
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, msg=name)

    def test_eager_and_sdpa_attention_agree(self):
        model = self.make_model()
        inputs = self.make_inputs(model.config)
        outputs = []
        for name in ("eager", "sdpa"):
            model.set_attn_implementation(name)
            outputs.append(model(**inputs))
        torch.testing.assert_close(outputs[1].logits, outputs[0].logits, **TOLERANCE)
        torch.testing.assert_close(outputs[1].loss, outputs[0].loss, **TOLERANCE)

    def test_rows_do_not_depend_on_the_rest_of_the_batch(self):
        model = self.make_model()
        inputs = self.make_inputs(model.config)
        together = model(**inputs).logits
        for row in range(3):
            alone = model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}).logits
            torch.testing.assert_close(alone[0], together[row], **TOLERANCE)

    def test_outputs_by_argument_by_config_and_as_a_tuple(self):
        model = self.make_model()
        inputs = self.make_inputs(model.config)
        model.set_attn_implementation("eager")
        plain = model(**inputs)
        asked = model(**inputs, output_hidden_states=True, output_attentions=True)
        added = set(asked) - set(plain)
        assert any("hidden_states" in name for name in added) and any("attentions" in name for name in added)
        model.config.output_hidden_states = model.config.output_attentions = True
        by_config = model(**inputs)
        assert set(by_config) == set(asked)
        for name in added:
            for one, other in zip(by_config[name], asked[name], strict=True):
                assert torch.equal(one, other), name
                if "attentions" in name:
                    torch.testing.assert_close(one.sum(-1), torch.ones_like(one.sum(-1)))
        as_tuple = model(**inputs, return_dict=False)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == len(by_config)
        assert torch.equal(as_tuple[0], by_config.loss)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_stays_close_and_trains(self, dtype, tmp_path):
        model = self.make_model(dropout=0.0)
        model.save_pretrained(tmp_path)
        half = self.model_class.from_pretrained(tmp_path, dtype=dtype).eval()
        inputs = self.make_inputs(model.config)
        expected, output = model(**inputs).logits, half(**inputs)
        assert output.logits.dtype == dtype
        # Two or three digits; a token whose two best experts are tied may go to the other one.
        error = (output.logits.float() - expected).abs() / expected.abs().max()
        assert error.median() < 2e-2
        loss = half.train()(**inputs).loss
        loss.backward()
        assert loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in half.parameters() if parameter.grad is not None)

    def test_compiles_in_one_graph(self):
        model = self.make_model()
        inputs = self.make_inputs(model.config)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, **TOLERANCE)

    def test_device_map_with_layers_on_disk(self, tmp_path):
        model = self.make_model()
        model.save_pretrained(tmp_path / "model")
        inputs = self.make_inputs(model.config)
        expected = model(**inputs).logits
        whole = self.model_class.from_pretrained(tmp_path / "model", device_map={"": "cpu"}).eval()
        torch.testing.assert_close(whole(**inputs).logits, expected)
        # Everything beside the path to the offloaded module stays in memory.
        places, parent = {self.offloaded: "disk"}, ""
        for name in self.offloaded.split("."):
            children = [child for child, _ in model.get_submodule(parent.rstrip(".")).named_children()]
            places |= {f"{parent}{child}": "cpu" for child in children if child != name}
            parent += f"{name}."
        parts = self.model_class.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
        ).eval()
        assert next(parts.get_submodule(self.offloaded).parameters()).device.type == "meta"
        torch.testing.assert_close(parts(**inputs).logits, expected)

    def test_lora_on_attention_and_experts(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = self.make_model(dropout=0.0)
        inputs = self.make_inputs(model.config)
        before = model(**inputs).logits
        config = peft.LoraConfig(
            r=2, target_modules=self.attention_projections, target_parameters=self.expert_parameters or None
        )
        adapted = peft.get_peft_model(model, config)
        torch.testing.assert_close(adapted(**inputs).logits, before, **TOLERANCE)
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        for target in (*self.attention_projections, *self.expert_parameters):
            assert any(target.rpartition(".")[2] in name or "experts" in name for name in trained), target
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(5):
            loss = adapted.train()(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        after = adapted.eval()(**inputs).logits
        adapted.save_pretrained(tmp_path)
        reloaded = peft.PeftModel.from_pretrained(self.make_model(dropout=0.0), tmp_path).eval()
        # The adapter alone is saved: everything else, the routers' biases too, is the base model's.
        torch.testing.assert_close(reloaded(**inputs).logits, after, **TOLERANCE)
        torch.testing.assert_close(adapted.merge_and_unload()(**inputs).logits, after, atol=1e-4, rtol=1e-4)

    def test_int8_weight_only_quantization(self, tmp_path):
        quantization = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        model = self.make_model()
        model.save_pretrained(tmp_path)
        config = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
        quantized = self.model_class.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
        weights = [name for name, tensor in quantized.named_parameters() if "Int8" in type(tensor).__name__]
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        assert len(weights) >= len(linear) - 1  # the output head stays as it is
        inputs = self.make_inputs(model.config)
        expected, logits = model(**inputs).logits, quantized(**inputs).logits
        assert not torch.equal(logits, expected)
        assert ((logits - expected).abs() / expected.abs().max()).median() < 2e-2
