"""OneRec's session generator (section 3.2, figure 2): a T5-like encoder-decoder with RMSNorm whose decoder FFNs are a
sparse mixture of experts (eq 2), trained by next-token prediction over the session's codes (eq 3 and 4)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationConfig
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqMoEModelOutput,
    Seq2SeqMoEOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_onerec import OneRecConfig
from .item_head import (
    FullSoftmaxLoss,
    JoinedItemVectors,
    OneRecItemMemory,
    OneRecItemVectors,
    sampled_softmax_loss,
)
from .readable_checkpoints import readable_checkpoint


class OneRecRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    if key.shape[1] < query.shape[1]:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class HistoryPrefixes(NamedTuple):
    """Which history, and how much of it, each decoder row reads where several targets share an encoding.

    Args:
        rows: (targets,) each target's history, a row of the encoder's output.
        recency: (targets, positions) items from the latest one of the target's prefix.
        embeddings: (history_items, hidden_size) what is added to a position by recency.
    """

    rows: torch.LongTensor
    recency: torch.LongTensor
    embeddings: torch.Tensor


def project_history(projection: nn.Linear, states: torch.Tensor, prefixes: HistoryPrefixes | None) -> torch.Tensor:
    """A projection of the encoder's output, of what each target reads of it where targets share histories."""
    projected = projection(states)
    if prefixes is None:
        return projected
    # The projection is linear: histories and recencies are projected apart, once each and not per target.
    recency = nn.functional.embedding(prefixes.recency, projection(prefixes.embeddings))
    return projected.index_select(0, prefixes.rows) + recency


class OneRecAttention(nn.Module):
    """Multi-head attention: bidirectional (encoder), causal (decoder) or over the encoder's output (cross); `lazy`
    with keys and values from an [`OneRecContextProcessor`] in place of projections of its own."""

    def __init__(self, config: OneRecConfig, layer_idx: int, is_causal: bool = False, lazy: bool = False):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.lazy = lazy
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if lazy:
            self.num_key_value_groups = config.num_attention_heads // config.context_key_value_heads
        else:
            self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        # A module, so that trainers which turn dropout off by module reach the attention weights too.
        self.dropout = nn.Dropout(config.attention_dropout)

    def _project_keys_values(
        self, states: torch.Tensor, prefixes: HistoryPrefixes | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (project_history(projection, states, prefixes) for projection in (self.k_proj, self.v_proj))
        shape = (*keys.shape[:-1], -1, self.head_dim)
        return keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        prefixes: HistoryPrefixes | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        input_shape = hidden_states.shape[:-1]
        if key_value_states is None:
            keys, values = self._project_keys_values(hidden_states)
            if past_key_values is not None:
                keys, values = past_key_values.self_attention_cache.update(keys, values, self.layer_idx)
        elif self.lazy:
            keys, values = key_value_states
        elif past_key_values is None:
            keys, values = self._project_keys_values(key_value_states, prefixes)
        elif past_key_values.is_updated.get(self.layer_idx):
            layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
            keys, values = layer.keys, layer.values
        else:
            keys, values = self._project_keys_values(key_value_states)
            keys, values = past_key_values.cross_attention_cache.update(keys, values, self.layer_idx)
            past_key_values.is_updated[self.layer_idx] = True

        queries = self.q_proj(hidden_states)
        if key_value_states is not None:
            # Beams of one user share that user's keys and values: they become query positions of one attention, so
            # the history is neither projected nor stored once per beam.
            queries = queries.reshape(keys.shape[0], -1, queries.shape[-1])
        queries = queries.view(*queries.shape[:2], -1, self.head_dim).transpose(1, 2)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1)), attn_weights


class OneRecContextProcessor(nn.Module):
    """Keys and values of the history for all layers of a lazy decoder (OneRec-V2, arXiv 2508.20900): one projection,
    cut into a key and a value chunk for each of `config.context_key_value_sets`, each with an RMSNorm of its own."""

    def __init__(self, config: OneRecConfig):
        super().__init__()
        self.num_sets = config.context_key_value_sets
        self.head_dim = config.hidden_size // config.num_attention_heads
        width = config.context_key_value_heads * self.head_dim
        self.proj = nn.Linear(config.hidden_size, 2 * self.num_sets * width, bias=False)
        self.norms = nn.ModuleList([OneRecRMSNorm(width, config.rms_norm_eps) for _ in range(2 * self.num_sets)])

    def forward(
        self,
        states: torch.Tensor,
        past_key_values: EncoderDecoderCache | None = None,
        prefixes: HistoryPrefixes | None = None,
    ) -> list[torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each set, (batch, heads, positions, head_dim) both: one tensor, as an argument of
        checkpointed layers, or a pair in a cache, which has a layer for each set."""
        if past_key_values is not None and past_key_values.is_updated.get(0):
            layers = past_key_values.cross_attention_cache.layers[: self.num_sets]
            return [(layer.keys, layer.values) for layer in layers]
        chunks = project_history(self.proj, states, prefixes).chunk(len(self.norms), dim=-1)
        heads = [
            norm(chunk).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for norm, chunk in zip(self.norms, chunks, strict=True)
        ]
        sets = list(zip(heads[::2], heads[1::2], strict=True))
        if past_key_values is None:
            return [torch.stack(pair) for pair in sets]
        past_key_values.is_updated |= dict.fromkeys(range(self.num_sets), True)
        return [past_key_values.cross_attention_cache.update(*pair, index) for index, pair in enumerate(sets)]


class OneRecMLP(nn.Module):
    """The encoder's dense gated FFN."""

    def __init__(self, config: OneRecConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


@use_experts_implementation
class OneRecExperts(nn.Module):
    """The N_MoE expert FFNs of one decoder layer as 3-D tensors, on transformers' experts interface."""

    def __init__(self, config: OneRecConfig):
        super().__init__()
        self.num_experts = config.num_experts
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        # Sorted by expert, every expert's tokens are one slice: no search and no scattered write per expert.
        experts, pairs = top_k_index.flatten().sort()
        counts = torch.bincount(experts, minlength=self.num_experts).tolist()
        tokens = pairs // top_k_index.shape[-1]
        outputs = []
        for states, gate_up, down in zip(
            hidden_states.index_select(0, tokens).split(counts), self.gate_up_proj, self.down_proj, strict=True
        ):
            gate, up = nn.functional.linear(states, gate_up).chunk(2, dim=-1)
            outputs.append(nn.functional.linear(self.act_fn(gate) * up, down))
        weighted = torch.cat(outputs) * top_k_weights.flatten().index_select(0, pairs)[:, None]
        return torch.zeros_like(hidden_states).index_add(0, tokens, weighted.to(hidden_states.dtype))


class OneRecTopKRouter(nn.Module):
    """Router of eq 2: a softmax over *all* experts, then the top K of it, without renormalisation.

    Experts are balanced without a loss: `expert_bias`, which is added for the selection alone and never to the gates,
    is moved after every optimizer step by [`OneRecModel.update_expert_bias`] from the load counted while training.
    """

    def __init__(self, config: OneRecConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))
        # Integers, which no cast to half precision touches: a bfloat16 count would stop at 256.
        counts = torch.zeros(config.num_experts, dtype=torch.long)
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        router_logits = nn.functional.linear(hidden_states, self.weight)  # (tokens, experts)
        scores = nn.functional.softmax(router_logits, dim=-1, dtype=torch.float32)
        top_k_index = torch.topk(scores + self.expert_bias, self.top_k, dim=-1).indices
        top_k_weights = scores.gather(-1, top_k_index).to(hidden_states.dtype)
        if self.training:
            with torch.no_grad():
                chosen = top_k_index.flatten()
                self.tokens_per_expert.index_add_(0, chosen, torch.ones_like(chosen))
        return router_logits, top_k_weights, top_k_index


class OneRecSparseMoeBlock(nn.Module):
    """The sum of eq 2; its residual is added by the layer."""

    def __init__(self, config: OneRecConfig):
        super().__init__()
        self.gate = OneRecTopKRouter(config)
        self.experts = OneRecExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(tokens)
        return self.experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)


class OneRecEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: OneRecConfig, layer_idx: int):
        super().__init__()
        self.self_attn = OneRecAttention(config, layer_idx, is_causal=config.encoder_attention == "causal")
        self.mlp = OneRecMLP(config)
        self.self_attn_norm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_norm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(self.self_attn_norm(hidden_states), attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class OneRecDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: OneRecConfig, layer_idx: int):
        super().__init__()
        self.self_attn = OneRecAttention(config, layer_idx, is_causal=True)
        self.cross_attn = OneRecAttention(config, layer_idx, lazy=config.context_key_value_sets > 0)
        self.moe = OneRecSparseMoeBlock(config)
        self.self_attn_norm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_norm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe_norm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None = None,
        prefixes: HistoryPrefixes | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.self_attn_norm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(attended)
        attended, _ = self.cross_attn(
            self.cross_attn_norm(hidden_states),
            key_value_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            prefixes=prefixes,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.moe(self.moe_norm(hidden_states)))


class OneRecPreTrainedModel(PreTrainedModel):
    config: OneRecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OneRecEncoderLayer", "OneRecDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # Not flash: transformers' unpadding takes the queries' mask from the keys', which cross-attention does not share.
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Its steps are finer than a bfloat16 of its size.
    _keep_in_fp32_modules_strict = ["expert_bias"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As every model's; for files that cannot be loaded a ValueError with the folder's name."""
        with readable_checkpoint(pretrained_model_name_or_path, kwargs.get("subfolder")):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, OneRecExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, OneRecTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.expert_bias)
            init.zeros_(module.tokens_per_expert)
        elif isinstance(module, OneRecItemMemory):
            init.constant_(module.neighbours, -1)
            init.zeros_(module.similarities)

    def num_parameters(
        self, only_trainable: bool = False, exclude_embeddings: bool = False, active: bool = False
    ) -> int:
        """Number of parameters; with `active` those that one token passes through: K_MoE of every N_MoE experts."""
        total = super().num_parameters(only_trainable, exclude_embeddings)
        if active:
            experts = [module for module in self.modules() if isinstance(module, OneRecExperts)]
            values = [
                tensor.numel()
                for module in experts
                for tensor in module.parameters(recurse=False)
                if tensor.requires_grad or not only_trainable
            ]
            idle = self.config.num_experts - self.config.num_experts_per_tok
            total -= sum(values) * idle // self.config.num_experts
        return total

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As every model's; the decoder's own embeddings, where they are not tied to the encoder's, grow with them."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        decoder = self.get_decoder()
        if decoder is not self and decoder.embed_tokens.num_embeddings != embeddings.num_embeddings:
            decoder.resize_token_embeddings(embeddings.num_embeddings, mean_resizing=mean_resizing)
        return embeddings

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """Shifts labels to the right after BOS, which gives eq 3's BOS before *every* item; -100 becomes padding.

        With several semantic IDs, BOS is that of the ID whose codes a row's labels begin with.
        """
        config = self.config
        decoder_input_ids = labels.new_full(labels.shape, config.decoder_start_token_id)
        decoder_input_ids[:, 1:] = labels[:, :-1]
        if config.num_semantic_ids > 1:
            starts = config.level_offsets[config.num_levels :: config.num_levels]
            number = sum((labels[:, :1] >= first_code).long() for first_code in starts)
            bos = labels.new_tensor(config.bos_token_ids)[number]
            decoder_input_ids = torch.where(decoder_input_ids == config.bos_token_id, bos, decoder_input_ids)
        return decoder_input_ids.masked_fill_(decoder_input_ids == -100, config.pad_token_id)


# Tensor-parallel plans stand on the classes: one in the configuration would be applied to both submodels.
ATTENTION_TP_PLAN = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}


@dataclass
class OneRecEncoderOutput(BaseModelOutput):
    """`item_states` (batch, heads, items, hidden_size): what the item head multiplies with the items' vectors, of the
    encoder itself, where it is one of `config.item_encoders`, and of each of the others. `item_indices` (batch,
    items): the behaviours that it read, for [`OneRecItemMemory`]."""

    item_states: torch.Tensor | None = None
    item_indices: torch.LongTensor | None = None


@dataclass
class OneRecModelOutput(Seq2SeqMoEModelOutput):
    """`item_states` as in [`OneRecEncoderOutput`]."""

    item_states: torch.Tensor | None = None


@dataclass
class OneRecOutput(Seq2SeqMoEOutput):
    """`item_states` as in [`OneRecEncoderOutput`]; `code_loss` and `item_loss`, whose weighted sum is `loss`."""

    item_states: torch.Tensor | None = None
    code_loss: torch.Tensor | None = None
    item_loss: torch.Tensor | None = None


class OneRecDistanceMask(nn.Module):
    """The additive causal mask with a learned bias by the distance between two items."""

    def __init__(self, config: OneRecConfig):
        super().__init__()
        self.bias = nn.Embedding(config.history_items, config.num_attention_heads)

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        """(batch, heads, items, items) of a mask (batch, items) that is 0 on padding."""
        places = torch.arange(mask.shape[1], device=mask.device)
        distance = places[:, None] - places
        bias = self.bias(distance.clamp(0, self.bias.num_embeddings - 1)).permute(2, 0, 1)
        hidden = (distance < 0) | (mask == 0)[:, None, None]
        return bias.masked_fill(hidden, torch.finfo(bias.dtype).min)


class OneRecItemEncoder(nn.Module):
    """An encoder of the item head's own, which reads items by their vectors alone: see `config.item_encoders`."""

    def __init__(self, config: OneRecConfig, kind: str):
        super().__init__()
        content_size = config.item_content_size if kind == "content" else 0
        self.item_vectors = OneRecItemVectors(config.num_items, config.hidden_size, content_size)
        self.distance_mask = OneRecDistanceMask(config)
        self.layers = nn.ModuleList([OneRecEncoderLayer(config, index) for index in range(config.encoder_layers)])
        self.norm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, items: torch.LongTensor, mask: torch.Tensor) -> torch.Tensor:
        hidden_states, layer_mask = self.dropout(self.item_vectors(items)), self.distance_mask(mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, layer_mask)
        return self.norm(hidden_states)


class OneRecEncoder(OneRecPreTrainedModel):
    """Self-attention over the user's positive behaviours, oldest first: full, or causal by configuration.

    Positions are learned and counted in items from the latest behaviour, so that the same history gives the same
    output under left and right padding. A causal encoder counts from the oldest instead, as a prefix must not know
    what follows it, and adds the recency to its output, where the decoder reads it. Without layers its output is the
    embedded behaviours, each by itself.
    """

    _can_record_outputs = {
        "hidden_states": OneRecEncoderLayer,
        "attentions": OutputRecorder(OneRecAttention, index=1, layer_name="self_attn"),
    }
    _tp_plan = {
        **{f"layers.*.self_attn.{name}": style for name, style in ATTENTION_TP_PLAN.items()},
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    def __init__(self, config: OneRecConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_recency = nn.Embedding(config.history_items, config.hidden_size)
        if config.encoder_positions == "distance":
            self.distance_mask = OneRecDistanceMask(config)
        elif config.encoder_attention == "causal" and config.encoder_layers:
            self.embed_positions = nn.Embedding(config.history_items, config.hidden_size)
        if config.history_positions == "item":
            self.item_proj = nn.Linear(len(config.codebook_sizes) * config.hidden_size, config.hidden_size, bias=False)
        if config.item_head == "encoder":
            own = [OneRecItemEncoder(config, kind) for kind in config.item_encoders if kind != "shared"]
            self.item_encoders = nn.ModuleList(own)
            if self._shares_item_head:
                self.item_vectors = OneRecItemVectors(config.num_items, config.hidden_size, config.item_content_size)
                self.item_norm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.history_feedback:
            # Per condition one vector where it holds and one where it does not; where unknown, neither.
            self.feedback_proj = nn.Linear(2 * len(config.history_feedback), config.hidden_size, bias=False)
        if config.time_gap_buckets:
            self.embed_time_gap = nn.Embedding(config.time_gap_buckets + 1, config.hidden_size, 0)
        if config.user_features:
            num_values = sum(len(values) for values in config.user_features.values())
            self.embed_user_features = nn.Embedding(num_values + 1, config.hidden_size, 0)
        self.layers = nn.ModuleList([OneRecEncoderLayer(config, index) for index in range(config.encoder_layers)])
        self.norm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def _shares_item_head(self) -> bool:
        return self.config.item_head == "encoder" and "shared" in self.config.item_encoders

    def item_vectors_by_head(self) -> list[OneRecItemVectors]:
        """The vectors of each of the item head's encoders, in the order of the heads of `item_states`."""
        own = [encoder.item_vectors for encoder in self.item_encoders]
        return [self.item_vectors, *own] if self._shares_item_head else own

    def _to_item_slots(self, tokens: torch.Tensor, fill: int) -> torch.Tensor:
        """(batch, tokens) to (batch, items, all codes of an item): drops the separators; the last item has none, so
        one is added."""
        width = len(self.config.codebook_sizes) + 1
        # A batch of empty histories has a single token, which must still make a whole slot.
        tokens = nn.functional.pad(tokens, (max(width - 1 - tokens.shape[1], 0), 1), value=fill)
        if tokens.shape[1] % width:
            raise ValueError(
                f"history_positions='item' reads whole items: the length of input_ids must be a multiple of {width} "
                f"less one, got {tokens.shape[1] - 1}. Use OneRecTokenizer.encode_histories."
            )
        return tokens.view(tokens.shape[0], -1, width)[..., :-1]

    def position_mask(self, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask over encoder positions: a 1 for every user feature, then `attention_mask` (batch, tokens), or
        (batch, items) with item positions."""
        if attention_mask is None:
            return None
        if self.config.history_positions == "item":
            attention_mask = self._to_item_slots(attention_mask, 0).amax(dim=-1)
        return nn.functional.pad(attention_mask, (len(self.config.user_features), 0), value=1)

    def _add_behaviours(
        self,
        inputs_embeds: torch.Tensor,
        history_feedback: torch.LongTensor | None,
        history_time_gaps: torch.LongTensor | None,
    ) -> torch.Tensor:
        """`inputs_embeds` with what is known of each behaviour added to every position of its item."""
        known = {}
        if history_feedback is not None:
            outcomes = torch.cat([history_feedback > 0, history_feedback < 0], dim=-1)
            known["history_feedback"] = self.feedback_proj(outcomes.to(inputs_embeds.dtype))
        if history_time_gaps is not None:
            known["history_time_gaps"] = self.embed_time_gap(history_time_gaps)
        for name, embeds in known.items():
            if self.config.history_positions == "token":
                embeds = embeds.repeat_interleave(self.config.tokens_per_item, dim=1)[:, :-1]
            if embeds.shape != inputs_embeds.shape:
                raise ValueError(
                    f"{name} covers {tuple(embeds.shape[:2])} (batch, positions), the history "
                    f"{tuple(inputs_embeds.shape[:2])}: give one entry per item, padding included."
                )
            inputs_embeds = inputs_embeds + embeds
        return inputs_embeds

    def _item_steps(self, positions: torch.Tensor) -> torch.Tensor:
        """Encoder positions counted from one end as items, within the learned range."""
        per_item = self.config.tokens_per_item if self.config.history_positions == "token" else 1
        return (positions // per_item).clamp(0, self.config.history_items - 1)

    def history_prefixes(
        self, mask: torch.Tensor, rows: torch.LongTensor, items: torch.LongTensor
    ) -> tuple[HistoryPrefixes, torch.Tensor]:
        """For targets that read the first `items` behaviours of histories `rows`: how, and the mask over positions.

        Args:
            mask: (batch, positions), from [`position_mask`].
            rows, items: (targets,) a target's history and prefix, at least one item.

        Returns:
            [`HistoryPrefixes`], and a mask (targets, positions).
        """
        from_oldest = (mask.cumsum(1) - 1)[rows]
        # With a position per token the separator after the last item is not part of the prefix.
        length = items if self.config.history_positions == "item" else items * self.config.tokens_per_item - 1
        from_latest = length[:, None] - 1 - from_oldest
        prefixes = HistoryPrefixes(rows, self._item_steps(from_latest), self.embed_recency.weight)
        return prefixes, mask[rows] * (from_latest >= 0)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        history_feedback: torch.LongTensor | None = None,
        history_time_gaps: torch.LongTensor | None = None,
        user_features: torch.LongTensor | None = None,
        history_item_indices: torch.LongTensor | None = None,
        recency_in_output: bool = True,
        with_item_states: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Encodes histories.

        The four inputs after `inputs_embeds` are needed where the configuration names them, and refused elsewhere;
        [`encode_history_rows`] makes them.

        Args:
            input_ids: (batch, tokens) code and SEP tokens.
            attention_mask: (batch, tokens) 0 on padding, which may be left or right.
            inputs_embeds: (batch, positions, hidden_size) in place of `input_ids`, one per encoder position.
            history_feedback: (batch, items, conditions) 1 where the condition holds, -1 where it does not, 0 where
                that is unknown and on padding.
            history_time_gaps: (batch, items) bucket of the time to the recommendation, 0 where unknown and on padding.
            user_features: (batch, columns) ids counted from 1 over the values of all columns, 0 where unknown.
            history_item_indices: (batch, items) catalogue indices, -1 where an item has no vector and on padding.
            recency_in_output: Whether a causal encoder adds the recency of the whole history to its output; `False`
                where each target adds that of its own prefix.
            with_item_states: Whether there are `item_states`, where there is an item head; nothing else is of the
                encoders that are the head's own.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        for name, given, setting in (
            ("history_feedback", history_feedback, self.config.history_feedback),
            ("history_time_gaps", history_time_gaps, self.config.time_gap_buckets),
            ("user_features", user_features, self.config.user_features),
            ("history_item_indices", history_item_indices, self.config.item_head == "encoder"),
        ):
            if (given is not None) != bool(setting):
                raise ValueError(
                    f"The encoder {'needs' if setting else 'takes no'} {name} with this configuration; "
                    "onerec_hf.history_features.encode_history_rows makes the inputs that a configuration names."
                )
        if input_ids is not None and attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = self.position_mask(attention_mask)
        if inputs_embeds is None:
            if self.config.history_positions == "item":
                slots = self._to_item_slots(input_ids, self.config.pad_token_id)
                inputs_embeds = self.item_proj(self.embed_tokens(slots).flatten(2))
            else:
                inputs_embeds = self.embed_tokens(input_ids)
        if self._shares_item_head:
            inputs_embeds = inputs_embeds + self.item_vectors(history_item_indices)
        inputs_embeds = self._add_behaviours(inputs_embeds, history_feedback, history_time_gaps)
        columns = len(self.config.user_features)
        if mask is None:
            shape = (inputs_embeds.shape[0], columns + inputs_embeds.shape[1])
            mask = torch.ones(shape, dtype=torch.long, device=inputs_embeds.device)
        causal = self.config.encoder_attention == "causal"
        behaviours = mask[:, columns:]
        recency = self.embed_recency(self._item_steps(behaviours.flip(1).cumsum(1).flip(1) - 1))
        by_distance = self.config.encoder_positions == "distance"
        hidden_states = inputs_embeds
        if not causal:
            hidden_states = hidden_states + recency
        elif self.layers and not by_distance:
            hidden_states = hidden_states + self.embed_positions(self._item_steps(behaviours.cumsum(1) - 1))
        if user_features is not None:
            hidden_states = torch.cat([self.embed_user_features(user_features), hidden_states], dim=1)
        hidden_states = self.dropout(hidden_states)
        if by_distance:
            layer_mask = self.distance_mask(mask)
        elif self.layers:
            make_mask = create_causal_mask if causal else create_bidirectional_mask
            layer_mask = make_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=mask, past_key_values=None
            )
        for layer in self.layers:
            hidden_states = layer(hidden_states, layer_mask, **kwargs)
        item_states = None
        if history_item_indices is not None and with_item_states:
            states = [encoder(history_item_indices, mask) for encoder in self.item_encoders]
            if self._shares_item_head:
                states.insert(0, self.item_norm(hidden_states))
            item_states = torch.stack(states, dim=1)
        hidden_states = self.norm(hidden_states)
        if self.layers:  # without them these are the embeddings, which have had their dropout
            hidden_states = self.dropout(hidden_states)
        if causal and recency_in_output:
            hidden_states = hidden_states + recency
        return OneRecEncoderOutput(
            last_hidden_state=hidden_states,
            item_states=item_states,
            item_indices=history_item_indices if self.config.item_memory else None,
        )


class OneRecDecoder(OneRecPreTrainedModel):
    """Causal self-attention over the session's tokens, cross-attention over the history, mixture of experts."""

    _can_record_outputs = {
        "hidden_states": OneRecDecoderLayer,
        "attentions": OutputRecorder(OneRecAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(OneRecAttention, index=1, layer_name="cross_attn"),
        "router_logits": OutputRecorder(OneRecTopKRouter, index=0),
    }
    _tp_plan = {
        **{f"layers.*.self_attn.{name}": style for name, style in ATTENTION_TP_PLAN.items()},
        **{f"layers.*.cross_attn.{name}": style for name, style in ATTENTION_TP_PLAN.items()},
        "layers.*.moe.experts.gate_up_proj": "packed_colwise",
        "layers.*.moe.experts.down_proj": "rowwise",
        "layers.*.moe.experts": "moe_tp_experts",
    }
    _ep_plan = {
        "layers.*.moe.experts.gate_up_proj": "grouped_gemm",
        "layers.*.moe.experts.down_proj": "grouped_gemm",
        "layers.*.moe.experts": "ep_dispatch_experts",
    }

    def __init__(self, config: OneRecConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = nn.Embedding(config.session_items * config.tokens_per_item, config.hidden_size)
        if config.context_key_value_sets:
            self.context_processor = OneRecContextProcessor(config)
        self.layers = nn.ModuleList([OneRecDecoderLayer(config, index) for index in range(config.decoder_layers)])
        self.norm = OneRecRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        self.post_init()
        if config.context_key_value_sets:
            # Every process has all keys and values, which fewer heads share, and so it has all queries.
            self._tp_plan = {name: style for name, style in self._tp_plan.items() if "cross_attn" not in name}

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        prefixes: HistoryPrefixes | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decodes sessions.

        Args:
            input_ids: (batch * beams, tokens) BOS and code tokens (eq 3).
            encoder_hidden_states: (batch, positions, hidden_size), a row for all beams of a user, which stand in
                consecutive rows of `input_ids`.
            encoder_attention_mask: (batch, positions) 0 on padding.
            prefixes: Of which history each row of `input_ids` reads which prefix, without a cache;
                `encoder_attention_mask` has the shape (targets, positions) then.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either decoder input_ids or inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length)[None]
        hidden_states = self.dropout(inputs_embeds + self.embed_positions(position_ids))

        self_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values.self_attention_cache if past_key_values is not None else None,
            position_ids=position_ids,
        )
        read = encoder_hidden_states
        if prefixes is not None:
            read = read[:1].expand(len(prefixes.rows), -1, -1)  # of which the mask takes the shape alone
        queries_per_user = hidden_states.reshape(read.shape[0], -1, hidden_states.shape[-1])
        cross_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=queries_per_user,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=read,
        )
        context = [encoder_hidden_states] * len(self.layers)
        if self.config.context_key_value_sets:
            sets = self.context_processor(encoder_hidden_states, past_key_values, prefixes)
            context = [sets[index * len(sets) // len(self.layers)] for index in range(len(self.layers))]
        for layer, states in zip(self.layers, context, strict=True):
            hidden_states = layer(hidden_states, states, self_mask, cross_mask, past_key_values, prefixes, **kwargs)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.dropout(self.norm(hidden_states)),
            past_key_values=past_key_values if use_cache else None,
        )


class OneRecModel(OneRecPreTrainedModel):
    """Encoder and decoder without the output head."""

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: OneRecConfig):
        super().__init__(config)
        self.encoder = OneRecEncoder(config)
        self.decoder = OneRecDecoder(config)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> OneRecEncoder:
        return self.encoder

    def get_decoder(self) -> OneRecDecoder:
        return self.decoder

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding):
        self.encoder.embed_tokens = value
        if self.config.tie_word_embeddings:
            self.decoder.embed_tokens = value

    @torch.no_grad()
    def update_expert_bias(self) -> dict[str, torch.Tensor]:
        """Moves every router's selection bias towards balanced load and starts a new count.

        The counts are summed over the processes of a distributed run first, so that all ranks keep the same bias.

        Returns:
            `expert_load` (layers, experts), the tokens of each expert relative to the mean of its layer (1 is
            balance); `expert_load_max`, the largest of them, and `dead_experts`, the share of experts with no token,
            both scalars. All on the model's device, so that no step has to wait for them.
        """
        routers = [layer.moe.gate for layer in self.decoder.layers]
        counts = torch.stack([router.tokens_per_expert for router in routers])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        counts = counts.float()
        mean = counts.mean(dim=1, keepdim=True)
        load = counts / mean.clamp(min=1)
        step = self.config.expert_bias_update_rate * torch.sign(mean - counts)
        for router, change in zip(routers, step, strict=True):
            router.expert_bias += change
            router.tokens_per_expert.zero_()
        return {"expert_load": load, "expert_load_max": load.max(), "dead_experts": (counts == 0).float().mean()}

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        target_histories: torch.LongTensor | None = None,
        target_prefixes: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        history_feedback: torch.LongTensor | None = None,
        history_time_gaps: torch.LongTensor | None = None,
        user_features: torch.LongTensor | None = None,
        history_item_indices: torch.LongTensor | None = None,
        with_item_states: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OneRecModelOutput:
        """Runs encoder and decoder.

        Of k * batch decoder rows k consecutive ones read the same history, encoded and projected for the
        cross-attention once. With a causal encoder rows may read different prefixes of the histories, as
        [`SessionCollator`] lays them out, with the result of encoding every prefix by itself:

        Args:
            target_histories: (decoder rows,) the history of each row.
            target_prefixes: (decoder rows,) how many of its oldest items the row reads, at least 1.
            with_item_states: as in [`OneRecEncoder`].
        """
        shared = target_histories is not None
        if shared and (self.config.encoder_attention != "causal" or encoder_outputs is not None or use_cache):
            raise ValueError(
                "Targets that share a history need encoder_attention='causal', no encoder_outputs and no cache."
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                history_feedback=history_feedback,
                history_time_gaps=history_time_gaps,
                user_features=user_features,
                history_item_indices=history_item_indices,
                recency_in_output=not shared,
                with_item_states=with_item_states,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = OneRecEncoderOutput(*encoder_outputs)
        encoder_hidden_states = encoder_outputs.last_hidden_state
        encoder_attention_mask = self.encoder.position_mask(attention_mask)
        prefixes = None
        if shared:
            if encoder_attention_mask is None:
                positions = encoder_hidden_states.shape[:2]
                encoder_attention_mask = encoder_hidden_states.new_ones(positions, dtype=torch.long)
            prefixes, encoder_attention_mask = self.encoder.history_prefixes(
                encoder_attention_mask, target_histories, target_prefixes
            )

        decoder_rows = (decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds).shape[0]
        if not shared and decoder_rows % encoder_hidden_states.shape[0]:
            raise ValueError(
                f"{decoder_rows} decoder rows are not a multiple of the {encoder_hidden_states.shape[0]} histories."
            )

        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=False if shared else use_cache,
            prefixes=prefixes,
            **kwargs,
        )
        return OneRecModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            decoder_router_logits=decoder_outputs.get("router_logits"),
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            item_states=encoder_outputs.get("item_states"),
        )


class OneRecForConditionalGeneration(OneRecPreTrainedModel, GenerationMixin):
    """The session generator: encoder-decoder with a head over the code vocabulary.

    [`onerec_hf.recommend`] turns histories of item ids into sessions and ranked item ids; plain `generate` with an
    [`ItemTrieLogitsProcessor`] gives the same sessions as tokens.

    Of two codes each, the item 5 and 9 comes after a history of two items:

    >>> config = OneRecConfig.from_preset("debug", codebook_sizes=[4, 4])
    >>> model = OneRecForConditionalGeneration(config)
    >>> output = model(input_ids=torch.tensor([[6, 9, 3, 8, 10]]), labels=torch.tensor([[5, 9]]))
    >>> output.logits.shape, output.loss.shape  # of 5 special tokens and 8 codes
    (torch.Size([1, 2, 13]), torch.Size([]))
    """

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: OneRecConfig):
        super().__init__(config)
        self.model = OneRecModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.item_gate:
            self.item_gate = nn.Linear(config.hidden_size, 1)
        if config.item_head == "encoder":
            self.joined_item_vectors = JoinedItemVectors()
        if config.item_memory:
            self.item_memory = OneRecItemMemory(config.num_items, config.item_memory, config.item_memory_weight)
        self.post_init()
        self.generation_config = session_generation_config(config)

    def get_encoder(self, modality: str | None = None) -> OneRecEncoder:
        return self.model.encoder

    def get_decoder(self) -> OneRecDecoder:
        return self.model.decoder

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.lm_head = new_embeddings

    def set_item_content(self, content: torch.Tensor) -> None:
        """Takes the items' content embeddings (N, item_content_size), of which vectors of the item head are made."""
        for vectors in self.get_encoder().item_vectors_by_head():
            if vectors.content is not None:
                vectors.set_content(content)

    def add_items(self, content: torch.Tensor) -> None:
        """Gives items that [`OneRecTokenizer.add_items`] appends a vector of the item head each, in the same order.

        Args:
            content: (items, item_content_size) content embeddings, in the space of those trained with.
        """
        for vectors in self.get_encoder().item_vectors_by_head():
            vectors.add(content)
        if self.config.item_memory:
            self.item_memory.add(len(content))
        self.config.num_items += len(content)

    def item_loss(self, item_states: torch.Tensor, item_targets: torch.LongTensor) -> torch.Tensor:
        """Cross-entropy of the softmax over the catalogue: the mean over the positions whose target is not -100, the
        sum over the heads, which share no parameters."""
        kept = item_targets != -100
        targets, total = item_targets[kept], item_states.sum() * 0.0  # where there is no target
        negatives = self.config.item_negatives
        for states, vectors in zip(item_states.unbind(1), self.get_encoder().item_vectors_by_head(), strict=True):
            if len(targets) and 0 < negatives < self.config.num_items:
                total = total + sampled_softmax_loss(states[kept], vectors, targets, negatives)
            elif len(targets):
                total = total + FullSoftmaxLoss.apply(states[kept], vectors(), targets)
        return total

    @staticmethod
    def latest_item_states(item_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, heads, hidden_size) of each history's latest behaviour.

        Args:
            item_states: (batch, heads, items, hidden_size) from the encoder.
            mask: (batch, items) from [`OneRecEncoder.position_mask`].
        """
        last = -1 if mask is None else (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        return item_states[torch.arange(len(item_states), device=item_states.device), :, last]

    def configured_item_share(self, num_items: int = 1) -> float | None:
        """g of all users in sessions of `num_items`, 0 without an item head; None where each user's is the gate's."""
        if self.config.item_head == "none":
            return 0.0
        if num_items > 1 and self.config.session_item_share is not None:
            return self.config.session_item_share
        return None if self.config.item_gate else self.config.item_share

    def item_shares(
        self, item_states: torch.Tensor, mask: torch.Tensor | None = None, num_items: int = 1
    ) -> torch.Tensor | float:
        """g, the item head's share in sessions of `num_items`: of each user (batch,) by the gate, or the
        configuration's for all of them; other arguments as of [`latest_item_states`]."""
        configured = self.configured_item_share(num_items)
        if configured is not None:
            return configured
        return self.item_gate(self.latest_item_states(item_states, mask)[:, 0]).squeeze(-1).float().sigmoid()

    def item_vectors(self) -> torch.Tensor:
        """The heads' vectors of all items side by side, (N, heads * hidden_size), made once while no weight changes:
        see [`JoinedItemVectors`]."""
        return self.joined_item_vectors(self.get_encoder().item_vectors_by_head())

    def item_queries(self, item_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """What gives, multiplied with [`item_vectors`], the mean of the heads' logits of what follows each history,
        (batch, heads * hidden_size); arguments as of [`latest_item_states`]."""
        states = self.latest_item_states(item_states, mask)
        return states.flatten(1) / states.shape[1]

    def item_memories(
        self, item_indices: torch.LongTensor | None
    ) -> tuple[torch.LongTensor | None, torch.Tensor | None]:
        """Items (batch, memories) that histories bring to mind, among which one may come several times, and what comes
        to their logits for each; None and None where there is no memory.

        Args:
            item_indices: (batch, items) from the encoder.

        Raises:
            ValueError: if there is a memory, but nothing for it to read.
        """
        if not self.config.item_memory:
            return None, None
        if item_indices is None:
            raise ValueError("The item head's memory reads the encoder's item_indices: give them with item_states.")
        return self.item_memory(item_indices)

    def item_log_probs(
        self,
        item_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        item_indices: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """The item head's distribution over the item that follows each history: the heads' geometric mean, whose
        logits are the mean of theirs, as their normalisers are the same for all items, with what is remembered.

        Args:
            item_states, mask: as of [`latest_item_states`].
            item_indices: (batch, items) from the encoder, which a memory reads.

        Returns:
            (batch, N) log-probabilities, float32.
        """
        logits = (self.item_queries(item_states, mask) @ self.item_vectors().T).float()
        items, remembered = self.item_memories(item_indices)
        return (logits if items is None else logits.scatter_add(1, items, remembered)).log_softmax(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        item_targets: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OneRecOutput:
        """Next-token prediction over session codes (eq 4) and, with an item head, over the catalogue's items.

        Args:
            input_ids: (batch, tokens) histories from [`OneRecTokenizer.encode_histories`].
            labels: (batch, session tokens) from [`OneRecTokenizer.encode_sessions`], codes with BOS between items. BOS
                and -100 carry no loss: a BOS is certain, not predicted.
            item_targets: (batch, items) catalogue index of what follows each behaviour of the history, -100 where
                nothing is predicted.
            num_items_in_batch: Divides the summed loss in place of the number of predicted codes.

        Returns:
            [`OneRecOutput`] with `logits` (batch, session tokens, vocab_size).
        """
        if labels is not None:
            use_cache = bool(use_cache)  # a loss has no next step to keep keys and values for
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = code_loss = item_loss = None
        if labels is not None:
            targets = labels.masked_fill(labels == self.config.bos_token_id, -100).flatten()
            code_loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum")
            predicted = (targets != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = code_loss = code_loss / predicted
        if item_targets is not None:
            item_loss = self.item_loss(outputs.item_states, item_targets)
            weighted = self.config.item_loss_weight * item_loss
            loss = weighted if loss is None else loss + weighted
        return OneRecOutput(
            loss=loss,
            code_loss=code_loss,
            item_loss=item_loss,
            item_states=outputs.item_states,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            decoder_router_logits=outputs.decoder_router_logits,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )


def session_generation_config(config: OneRecConfig) -> GenerationConfig:
    """The decoding that recommending needs: deterministic beam search over exactly `session_items` items.

    Scores are plain sums of log-probabilities, every session has the same length, and no sampling filter may cut
    beams that the item constraint keeps.
    """
    new_tokens = config.session_items * config.tokens_per_item - 1
    return GenerationConfig(
        do_sample=False,
        num_beams=128,
        num_return_sequences=1,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        length_penalty=0.0,
        early_stopping=True,
        renormalize_logits=False,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
    )
