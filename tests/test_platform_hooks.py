"""What is used or overridden here of transformers, trl, datasets and others beyond their documented interfaces.

An upgrade that moves one of these hooks fails here, by its name and the place that uses it.
"""

import ast
import importlib
import inspect
import pkgutil
import textwrap
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler

import onerec_hf

# A line for each: `path(parameters): use`. The parameters are all, in their order, without self and cls; where `...`
# stands among them, some that must be there. What has no parentheses needs only exist.
HOOKS = r"""
transformers.PreTrainedModel._init_weights(module): both models' initial weights, on top of the library's own
transformers.PreTrainedModel.from_pretrained(pretrained_model_name_or_path, *model_args, ...): both models, errors \
with the folder's name
transformers.PreTrainedModel.get_encoder(modality): OneRecModel; generation reads the encoder by it
transformers.PreTrainedModel.get_decoder(): OneRecModel; generation reads the decoder by it
transformers.PreTrainedModel.get_input_embeddings(): both models
transformers.PreTrainedModel.set_input_embeddings(value): both models
transformers.PreTrainedModel.get_output_embeddings(): OneRecForConditionalGeneration
transformers.PreTrainedModel.set_output_embeddings(new_embeddings): OneRecForConditionalGeneration
transformers.PreTrainedModel.num_parameters(only_trainable, exclude_embeddings): OneRecModel, the active parameters
transformers.PreTrainedModel.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing): OneRecModel
transformers.PreTrainedModel.set_experts_implementation(experts_implementation): the trainers, on CPUs
transformers.PreTrainedModel.{base_model_prefix, main_input_name, supports_gradient_checkpointing}: both models
transformers.PreTrainedModel.{_no_split_modules, _skip_keys_device_placement}: both models, device maps
transformers.PreTrainedModel.{_supports_sdpa, _supports_flex_attn, _supports_attention_backend}: attentions
transformers.PreTrainedModel.{_can_compile_fullgraph, _can_record_outputs}: both models
transformers.PreTrainedModel._keep_in_fp32_modules_strict: OneRecModel, the routers' selection biases
transformers.PreTrainedModel.{_tied_weights_keys, _tp_plan, _ep_plan}: OneRecModel, tied and split weights
transformers.PreTrainedConfig.__post_init__(**kwargs): both configurations, defaults that follow from other fields
transformers.PreTrainedConfig.validate_architecture(): both configurations, fields that only make sense together
transformers.PreTrainedConfig.{attribute_map, model_type, is_encoder_decoder}: both configurations
huggingface_hub.dataclasses.strict(cls, ...): both configurations
transformers.initialization.normal_(tensor, mean, std, ...): _init_weights
transformers.initialization.constant_(tensor, val): _init_weights
transformers.initialization.copy_(tensor, other): _init_weights
transformers.initialization.{zeros_, ones_}: _init_weights
transformers.activations.ACT2FN: both models' feed-forward layers
transformers.masking_utils.create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, ...): OneRecModel
transformers.masking_utils.create_bidirectional_mask(config, attention_mask, encoder_hidden_states, ...): both models
transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface(attn_implementation, default): attentions
transformers.integrations.use_experts_implementation(experts_class, ...): OneRecExperts
transformers.modeling_layers.GradientCheckpointingLayer: both models' layers
transformers.utils.generic.merge_with_config_defaults(func): both models' forward
transformers.utils.output_capturing.capture_outputs(func, ...): both models' forward
transformers.utils.output_capturing.OutputRecorder(target_class, index, layer_name, ...): _can_record_outputs
transformers.utils.{can_return_tuple, TransformersKwargs, ModelOutput}: both models
transformers.processing_utils.Unpack: both models
transformers.modeling_outputs.BaseModelOutput(last_hidden_state, ...): OneRecEncoder
transformers.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions(past_key_values, ...): OneRecDecoder
transformers.modeling_outputs.Seq2SeqMoEModelOutput(decoder_router_logits, ...): OneRecModel
transformers.modeling_outputs.Seq2SeqMoEOutput(decoder_router_logits, ...): OneRecForConditionalGeneration
transformers.cache_utils.Cache(layers, ...): the search
transformers.cache_utils.DynamicCache: OneRecDecoder, the search
transformers.cache_utils.EncoderDecoderCache(*caches): OneRecDecoder, the search
transformers.cache_utils.CacheLayerMixin.lazy_initialization(key_states, value_states): BeamCacheLayer
transformers.cache_utils.CacheLayerMixin.update(key_states, value_states, *args, **kwargs): BeamCacheLayer
transformers.cache_utils.CacheLayerMixin.get_mask_sizes(query_length): BeamCacheLayer
transformers.cache_utils.CacheLayerMixin.{get_seq_length, get_max_length}(): BeamCacheLayer
transformers.generation.GenerationConfig: session_generation_config
transformers.generation.GenerateBeamEncoderDecoderOutput(sequences, sequences_scores, ...): generate_with_trie
transformers.GenerationMixin.generate(generation_config, logits_processor, stopping_criteria, custom_generate, ...): \
generate_with_trie
transformers.GenerationMixin._sample(input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, \
streamer, **model_kwargs): generate_with_trie, which generate hands those of its arguments that are not among these
transformers.LogitsProcessor.__call__(input_ids, scores): ItemTrieLogitsProcessor
transformers.pipelines.PIPELINE_REGISTRY.register_pipeline(task, pipeline_class, pt_model, default, type): onerec_hf
transformers.Pipeline.__call__(inputs, *args, num_workers, batch_size, **kwargs): GenerativeRecommendationPipeline
transformers.Pipeline._sanitize_parameters(**pipeline_parameters): GenerativeRecommendationPipeline
transformers.Pipeline.preprocess(input_, **preprocess_parameters): GenerativeRecommendationPipeline
transformers.Pipeline._forward(input_tensors, **forward_parameters): GenerativeRecommendationPipeline
transformers.Pipeline.postprocess(model_outputs, **postprocess_parameters): GenerativeRecommendationPipeline
transformers.Pipeline.{_load_tokenizer, _load_processor, _load_image_processor, _load_feature_extractor}: \
GenerativeRecommendationPipeline
transformers.TokenizersBackend.{vocab_files_names, model_input_names}: OneRecTokenizer
transformers.TokenizersBackend.save_pretrained(save_directory, legacy_format, filename_prefix, push_to_hub, \
save_format, **kwargs): OneRecTokenizer, each file whole or not at all
transformers.TokenizersBackend._save_pretrained(save_directory, file_names, legacy_format, filename_prefix): \
OneRecTokenizer, files of its own
transformers.TokenizersBackend.save_vocabulary(save_directory, filename_prefix): OneRecTokenizer
transformers.TokenizersBackend.from_pretrained(pretrained_model_name_or_path, *init_inputs, ...): OneRecTokenizer
transformers.TokenizersBackend._from_pretrained(resolved_vocab_files, pretrained_model_name_or_path, ...): \
OneRecTokenizer, broken files by name
transformers.TokenizersBackend.convert_to_native_format(trust_remote_code, **kwargs): OneRecTokenizer reads its files
transformers.tokenization_utils_base.TOKENIZER_CONFIG_FILE: OneRecTokenizer, the file that is written last
tokenizers.Tokenizer.get_vocab_size(with_added_tokens): OneRecTokenizer
tokenizers.models.WordLevel(vocab, unk_token): OneRecTokenizer
tokenizers.pre_tokenizers.Split(pattern, behavior, invert): OneRecTokenizer
transformers.Trainer._get_train_sampler(train_dataset): OneRecPretrainer, an order of the epoch's, and shards; \
OneRecRewardTrainer, shards
transformers.Trainer._set_signature_columns_if_needed(): the trainers, what the collators read
transformers.Trainer._get_num_items_in_batch(batch_samples, device): SessionCollator, <bos> is not counted
transformers.Trainer.train(resume_from_checkpoint, trial, ignore_keys_for_eval, ...): OneRecRewardTrainer, base rates \
before and the calibration after it
transformers.Trainer.log(logs, start_time): OneRecPretrainer, the experts' load
transformers.TrainerCallback.{on_optimizer_step, on_save}(args, state, control, **kwargs): the trainers' callbacks
transformers.trainer_pt_utils.LengthGroupedSampler(batch_size, dataset, lengths, model_input_name, generator): \
OneRecPretrainer
transformers.trainer_pt_utils.LengthGroupedSampler.__iter__(): OneRecPretrainer, with a generator of the epoch's
transformers.trainer_pt_utils.get_length_grouped_indices(lengths, batch_size, ...): ShardSampler, \
recipes/benchmarks/training.py
transformers.dynamic_module_utils.get_relative_imports(module_file): model_export, modules are flat siblings
trl.DPOConfig.__post_init__(): OneRecDPOConfig
trl.DPOConfig.{gradient_checkpointing, bf16}: OneRecDPOConfig, their defaults
trl.DPOTrainer._prepare_dataset(dataset, processing_class, args, dataset_name): OneRecDPOTrainer, rows with each pair
trl.DPOTrainer._set_signature_columns_if_needed(): OneRecDPOTrainer, what the collator reads
trl.DPOTrainer._precompute_ref_logps(dataset, name, batch_size): OneRecDPOTrainer, where the pairs have them already
trl.DPOTrainer.compute_ref_log_probs(model, inputs): OneRecDPOTrainer, of an encoder-decoder
trl.DPOTrainer._compute_loss(model, inputs, return_outputs): OneRecDPOTrainer, of an encoder-decoder, with L_NTP
trl.DPOTrainer.create_model_card(model_name, dataset_name, tags): OneRecDPOTrainer, which writes none
trl.trainer.utils.add_fused_lm_head(model, outputs, ...): OneRecDPOTrainer, log-probabilities of codes
trl.trainer.utils.FusedCausalLMOutput(log_probs, ...): OneRecDPOTrainer, S-DPO
trl.TrlParser.parse_args_and_config(args, ...): recipe_arguments
transformers.hf_argparser.HfArg(help, default, default_factory, ...): arguments of the data and the recipes
datasets.Dataset(arrow_table, info, ...): data/sessions.py, data/exposures.py
datasets.table.InMemoryTable(table): data/sessions.py
accelerate.commands.config.config_args.load_config_from_file(config_file): tests/test_packaging.py
accelerate.utils.parse_flag_from_env(key, default): OneRecDPOTrainer, whether FSDP shards the model
sklearn.utils.extmath.randomized_svd(M, n_components, n_iter, random_state, ...): item_embeddings
unittest.TestResult._exc_info_to_string(err, test): recipes/benchmarks/conformance.py
"""

# `path = texts: use`: the texts, with | between them, must stand in the source at the path.
INSIDE = r"""
transformers.PreTrainedModel = config._attn_implementation: attentions, recipes/benchmarks/generation.py
transformers.PreTrainedModel._set_gradient_checkpointing = "gradient_checkpointing": an attribute of both models
transformers.initialization.copy_ = "_is_hf_initialized": _init_weights of the reward model
transformers.integrations.use_experts_implementation = config._experts_implementation: recipes/benchmarks/generation.py
transformers.cache_utils.EncoderDecoderCache = self.self_attention_cache | self.is_updated: OneRecAttention
transformers.cache_utils.EncoderDecoderCache = self.cross_attention_cache: OneRecAttention, OneRecContextProcessor
transformers.cache_utils.DynamicLayer.update = self.keys | self.values: OneRecAttention, a history's keys and values
transformers.GenerationMixin.generate = decoding_method( | logits_processor=prepared_logits_processor, | \
stopping_criteria=prepared_stopping_criteria, | generation_config=generation_config,: generate_with_trie
transformers.GenerationMixin._extract_generation_mode_kwargs = inspect.signature(custom_generate): generate_with_trie
transformers.pipelines.pipeline = custom_pipelines: model_export
transformers.Trainer._set_signature_columns_if_needed = self._signature_columns: the trainers
transformers.Trainer._save_checkpoint = PREFIX_CHECKPOINT_DIR | self.state.global_step: CheckpointCompleteCallback
transformers.trainer_callback.CallbackHandler.call_event = model=self.model: ExpertBalanceCallback
huggingface_hub.dataclasses.strict = "validate_": validate_architecture of both configurations
trl.DPOTrainer.__init__ = self._metrics = | self.loss_types = | self.loss_weights = | self.beta = | \
self.ref_model = | self.precompute_ref_logps = | add_fused_lm_head(: OneRecDPOTrainer
trl.DPOTrainer._compute_loss = fused_lm_head=True | inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]: \
OneRecDPOTrainer
trl.DPOTrainer._compute_loss = "sigmoid" | "sigmoid_norm" | "robust" | "sft": the losses of OneRecDPOConfig
"""


def lines(table: str) -> list[tuple[str, str]]:
    """What is asked for and its use, of each line; of names in braces each by itself."""
    found = []
    for line in table.replace("\\\n", "").strip().splitlines():
        asked, _, use = line.rpartition(": ")
        owner, braces, rest = asked.partition("{")
        names, _, rest = rest.partition("}")
        found += [(f"{owner}{name}{rest}", use) for name in names.split(", ")] if braces else [(asked, use)]
    return found


PATHS = [asked.partition("(")[0] for asked, _ in lines(HOOKS)]


def resolve(path: str, use: str):
    try:
        return pkgutil.resolve_name(path)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"{path} is gone ({error}), which is used by: {use}")


@pytest.mark.parametrize(("hook", "use"), lines(HOOKS), ids=PATHS)
def test_hook_has_its_signature(hook, use):
    path, has_parameters, parameters = hook.removesuffix(")").partition("(")
    found = resolve(path, use)
    if has_parameters:
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        given = [stars.get(value.kind, "") + name for name, value in inspect.signature(found).parameters.items()]
        given = [name for name in given if name != "self"]
        wanted = [name for name in parameters.split(", ") if name]
        fits = set(wanted) - {"..."} <= set(given) if "..." in wanted else wanted == given
        assert fits, f"{path} takes ({', '.join(given)}) and not ({parameters}), which is used by: {use}"


@pytest.mark.parametrize(("inside", "use"), lines(INSIDE), ids=lambda text: text.partition(" = ")[0])
def test_inner_name_is_still_there(inside, use):
    path, _, texts = inside.partition(" = ")
    source = inspect.getsource(resolve(path, use))
    missing = [text for text in texts.split(" | ") if text not in source]
    assert not missing, f"{path} has no {', '.join(missing)} any more, which is used by: {use}"


def test_instances_hold_what_is_read_of_them():
    sampler = LengthGroupedSampler(1, lengths=[2, 1])
    assert (sampler.batch_size, sampler.lengths) == (1, [2, 1]), "OneRecPretrainer makes another sampler of them"
    assert Dataset(pa.table({"a": [1]}))["a"][:] == [1], "pretraining makes a data set of an Arrow table as it is"


PLATFORM = {"accelerate", "datasets", "huggingface_hub", "sklearn", "tokenizers", "transformers", "trl"}
DOCUMENTED = {"accelerate.logging", "sklearn.feature_extraction.text", "sklearn.manifold", "sklearn.metrics"}


def test_every_override_and_every_import_from_the_inside_is_listed():
    modules = pkgutil.walk_packages(onerec_hf.__path__, "onerec_hf.")
    missing = set()
    for module in [onerec_hf, *(importlib.import_module(found.name) for found in modules)]:
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and "." in node.module:
                if node.module.split(".")[0] in PLATFORM and node.module not in DOCUMENTED:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                    missing |= {name for name in names if not any(f"{path}.".startswith(f"{name}.") for path in PATHS)}
        for owner in filter(inspect.isclass, vars(module).values()):
            bases = [base for base in owner.__mro__ if base.__module__.split(".")[0] in PLATFORM]
            if owner.__module__ == module.__name__ and bases:
                (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
                stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.col_offset == 4}
                own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} | stored
                overridden = own - {"__init__"} & {name for base in bases for name in vars(base)}
                missing |= {f"{owner.__name__}.{name}" for name in overridden if not _is_listed(name)}
    assert not missing, f"overridden or imported, but not among HOOKS: {', '.join(sorted(missing))}"


def _is_listed(name: str) -> bool:
    return any(path.endswith(f".{name}") for path in PATHS)
