"""OneRec reward model (paper section 3.3.1, eq 5-7).

For a user and a session of items the model estimates the session's watch time, view, follow and like rates and from
them one reward:

- an item vector v comes from all of the item's codes together;
- e_i = v_i (.) u: session item i attends over the user's behaviour (target attention), and its own vector, what it
  gathered and the product of the two are projected to e_i;
- h_f = SelfAttention over e_1..e_m, with position embeddings and a residual connection (eq 5);
- a tower for each objective: Sigmoid(MLP(Sum h_f)) (eq 6), trained with the sum of the objectives' binary
  cross-entropies (eq 7); labels may be soft and an unknown label (NaN) is left out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_onerec_reward import OneRecRewardConfig


@dataclass
class OneRecRewardOutput(ModelOutput):
    """
    Output of [`OneRecRewardModel`], for B users, C candidate sessions each (no such axis when one session was given)
    and O objectives in the order of `config.objectives`.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
            Sum over the objectives of the mean binary cross-entropy over the known labels (eq 7).
        logits (`torch.FloatTensor` of shape `(B, O)` or `(B, C, O)`):
            Towers' outputs before the sigmoid.
        probabilities (`torch.FloatTensor`, same shape as `logits`):
            Sigmoid of `logits` (eq 6).
        reward (`torch.FloatTensor` of shape `(B,)` or `(B, C)`):
            Sum of `probabilities` weighted by `config.objective_weights`.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*, returned with `output_hidden_states=True`):
            e_1..e_m with their positions, then the output of every session layer, each `(B * C, m, hidden_size)`.
        attentions (`tuple[torch.FloatTensor]`, *optional*, returned with `output_attentions=True`):
            Of every session layer, `(B * C, heads, m, m)`.
        cross_attentions (`tuple[torch.FloatTensor]`, *optional*, returned with `output_attentions=True`):
            Of the target attention, `(B, heads, C * m, 1 + n)`; the first key stands for no behaviour.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    probabilities: torch.FloatTensor | None = None
    reward: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


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
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = F.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class OneRecRewardAttention(nn.Module):
    """Multi-head attention of `queries` `(B, Q, H)` over `states` `(B, S, H)`; returns `(B, Q, H)` and the weights."""

    def __init__(self, config: OneRecRewardConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, queries: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, x in ((self.q_proj, queries), (self.k_proj, states), (self.v_proj, states))
        )
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(attended.flatten(2)), weights


class OneRecRewardItemEncoder(nn.Module):
    """Item vectors `(..., H)` from code token ids `(..., L)`."""

    def __init__(self, config: OneRecRewardConfig):
        super().__init__()
        self.code_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        # The levels are concatenated and mixed by a hidden layer: a sum of code embeddings would give an item no
        # more than the sum of its codes' effects.
        self.up_proj = nn.Linear(len(config.codebook_sizes) * config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN["gelu"]
        self.down_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, code_ids: torch.Tensor) -> torch.Tensor:
        codes = self.code_embeddings(code_ids).flatten(-2)
        return self.dropout(self.norm(self.down_proj(self.act_fn(self.up_proj(codes)))))


class OneRecRewardTargetAttention(GradientCheckpointingLayer):
    """e_i = v_i (.) u: each session item `(B, Q, H)` attends over the history `(B, n, H)` of its user."""

    def __init__(self, config: OneRecRewardConfig):
        super().__init__()
        self.config = config
        self.recency_embeddings = nn.Embedding(config.history_items, config.hidden_size)
        # A learned key that is never masked: what an item gathers from a user without any behaviour, and where its
        # attention can go when nothing in the history bears on it.
        self.no_behaviour = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.history_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = OneRecRewardAttention(config)
        self.fusion = nn.Linear(3 * config.hidden_size, config.hidden_size)

    def forward(
        self, items: torch.Tensor, history: torch.Tensor, history_mask: torch.Tensor, **kwargs
    ) -> torch.Tensor:
        # Positions count back from the latest item, so padding on either side changes nothing.
        recency = history_mask.flip(1).cumsum(1).flip(1).sub(1).clamp(min=0)
        history = self.history_norm(history + self.recency_embeddings(recency))
        states = torch.cat([self.no_behaviour.expand(history.shape[0], -1, -1).to(history.dtype), history], dim=1)
        attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=items,
            attention_mask=F.pad(history_mask, (1, 0), value=True),
            encoder_hidden_states=states,
        )
        user, _ = self.attention(items, states, attention_mask, **kwargs)
        return self.fusion(torch.cat([items, user, items * user], dim=-1))


class OneRecRewardSessionLayer(GradientCheckpointingLayer):
    """h + SelfAttention(h W_q, h W_k, h W_v) over a session's items (eq 5), h normalised first."""

    def __init__(self, config: OneRecRewardConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = OneRecRewardAttention(config)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        normed = self.norm(hidden_states)
        attended, _ = self.attention(normed, normed, attention_mask, **kwargs)
        return hidden_states + attended


class OneRecRewardTower(nn.Module):
    """MLP of one objective (eq 6), from `(..., H)` to a logit `(...)`."""

    def __init__(self, config: OneRecRewardConfig):
        super().__init__()
        self.hidden = nn.Linear(config.hidden_size, config.tower_hidden_size)
        self.act_fn = ACT2FN["gelu"]
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.tower_hidden_size, 1)

    def forward(self, session: torch.Tensor) -> torch.Tensor:
        return self.output(self.dropout(self.act_fn(self.hidden(session)))).squeeze(-1)


class OneRecRewardPreTrainedModel(PreTrainedModel):
    config: OneRecRewardConfig
    base_model_prefix = "reward_model"
    main_input_name = "history_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OneRecRewardItemEncoder", "OneRecRewardTargetAttention", "OneRecRewardSessionLayer"]
    _supports_sdpa = True
    # Not flash: transformers' unpadding takes the queries' mask from the keys', which target attention does not share.
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OneRecRewardSessionLayer,
        "attentions": OutputRecorder(OneRecRewardAttention, index=1, layer_name="layers"),
        "cross_attentions": OutputRecorder(OneRecRewardAttention, index=1, layer_name="target_attention"),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            # These layers are a few hundred wide: the library's fixed range would start them almost at zero.
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
        elif isinstance(module, OneRecRewardTargetAttention):
            init.normal_(module.no_behaviour, mean=0.0, std=self.config.initializer_range)


class OneRecRewardModel(OneRecRewardPreTrainedModel):
    """Reward of sessions given a user's behaviour (paper section 3.3.1)."""

    def __init__(self, config: OneRecRewardConfig):
        super().__init__(config)
        self.item_encoder = OneRecRewardItemEncoder(config)
        self.target_attention = OneRecRewardTargetAttention(config)
        self.position_embeddings = nn.Embedding(config.session_items, config.hidden_size)
        self.layers = nn.ModuleList([OneRecRewardSessionLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.towers = nn.ModuleDict({objective: OneRecRewardTower(config) for objective in config.objectives})
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.item_encoder.code_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.item_encoder.code_embeddings = value

    @torch.no_grad()
    def set_base_rates(self, rates: dict[str, float]):
        """
        Start each tower at its objective's base rate, so that training a rare event such as follow does not begin
        with learning how rare it is.

        Args:
            rates (`dict[str, float]`): Mean label of each objective; NaN where no label is known.
        """
        for objective, tower in self.towers.items():
            rate = rates[objective]
            if not math.isnan(rate):
                rate = min(max(rate, 1e-4), 1 - 1e-4)
                tower.output.bias.fill_(math.log(rate / (1 - rate)))

    def _check_inputs(self, history_ids: torch.Tensor, session_ids: torch.Tensor):
        levels = len(self.config.codebook_sizes)
        if history_ids.dim() != 3 or session_ids.dim() not in (3, 4):
            raise ValueError(
                "history_ids must have the shape (B, n, L) and session_ids (B, m, L) or (B, C, m, L), got "
                f"{tuple(history_ids.shape)} and {tuple(session_ids.shape)}."
            )
        if history_ids.shape[-1] != levels or session_ids.shape[-1] != levels:
            raise ValueError(
                f"The reward model has {levels} code levels, got {history_ids.shape[-1]} in history_ids and "
                f"{session_ids.shape[-1]} in session_ids: use the tokenizer it was trained with."
            )
        if history_ids.shape[1] > self.config.history_items:
            raise ValueError(
                f"history_ids has {history_ids.shape[1]} items, more than history_items = "
                f"{self.config.history_items}: keep the latest ones."
            )
        if session_ids.shape[-2] > self.config.session_items:
            raise ValueError(
                f"session_ids has {session_ids.shape[-2]} items, more than session_items = "
                f"{self.config.session_items}: shorten the sessions or raise session_items."
            )

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        history_ids: torch.LongTensor,
        session_ids: torch.LongTensor,
        labels: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OneRecRewardOutput:
        r"""
        The history is encoded once for all of a user's candidate sessions. Sessions shorter than m are padded; the
        sum of eq 6 runs over the real items, so a shorter session gives a smaller sum.

        Args:
            history_ids (`torch.LongTensor` of shape `(B, n, L)`):
                Code token ids of the user's behaviour, oldest first; `pad_token_id` in place of a missing item, on
                either side. A history may be empty.
            session_ids (`torch.LongTensor` of shape `(B, m, L)` or `(B, C, m, L)`):
                Code token ids of one session or C candidate sessions of each user, padded at the end.
            labels (`torch.FloatTensor` of shape `(B, O)` or `(B, C, O)`, *optional*):
                Labels in [0, 1] of each objective, NaN where unknown.

        Raises:
            ValueError: on inputs of another shape, or longer than `history_items` or `session_items`.
        """
        self._check_inputs(history_ids, session_ids)
        candidates = session_ids if session_ids.dim() == 4 else session_ids[:, None]
        batch, num_candidates, num_items, _ = candidates.shape
        pad = self.config.pad_token_id
        history_mask = history_ids[..., 0] != pad
        session_mask = (candidates[..., 0] != pad).flatten(0, 1)

        history = self.item_encoder(history_ids)
        items = self.item_encoder(candidates.flatten(1, 2))
        hidden_states = self.target_attention(items, history, history_mask, **kwargs)

        hidden_states = hidden_states.unflatten(1, (num_candidates, num_items)).flatten(0, 1)
        positions = torch.arange(num_items, device=hidden_states.device)
        hidden_states = hidden_states + self.position_embeddings(positions)
        # A session of padding alone sees its first place, so that it is well defined; the sum leaves it out.
        visible = session_mask | ((positions == 0) & ~session_mask.any(1, keepdim=True))
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=visible
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        hidden_states = self.norm(hidden_states)

        session = (hidden_states * session_mask[..., None]).sum(1).unflatten(0, (batch, num_candidates))
        logits = torch.stack([tower(session) for tower in self.towers.values()], dim=-1)
        if session_ids.dim() == 3:
            logits = logits[:, 0]

        loss = None
        if labels is not None:
            if labels.shape != logits.shape:
                raise ValueError(f"labels must have the shape {tuple(logits.shape)}, got {tuple(labels.shape)}.")
            loss = self._objectives_loss(logits, labels)
        probabilities = torch.sigmoid(logits)
        weights = torch.tensor(self.config.objective_weights, dtype=logits.dtype, device=logits.device)
        return OneRecRewardOutput(
            loss=loss, logits=logits, probabilities=probabilities, reward=(probabilities * weights).sum(-1)
        )

    @staticmethod
    def _objectives_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        known = ~labels.isnan()
        losses = F.binary_cross_entropy_with_logits(
            logits.float(), labels.float().nan_to_num(0.0).to(logits.device), reduction="none"
        )
        losses, known = (losses * known).flatten(0, -2), known.flatten(0, -2)
        return (losses.sum(0) / known.sum(0).clamp(min=1)).sum()


__all__ = ["OneRecRewardModel", "OneRecRewardOutput", "OneRecRewardPreTrainedModel"]
