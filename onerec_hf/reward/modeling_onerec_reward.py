"""OneRec reward model (paper section 3.3.1, eq 5-7).

For a user and a session of items the model estimates the session's watch time, view, follow and like rates and from
them one reward:

- an item vector v comes from all of the item's codes together and, where there are any, from its embedding and its
  features;
- e_i = v_i (.) u: session item i attends over the user's behaviour (target attention), which is all that he was
  exposed to with his feedback. Its own vector, what it gathered, the product of the two, the user's profile and the
  smoothed rates of the past (the user's, the item's, the user's with items that share a feature) and how much it
  repeats of what came before give e_i;
- h_f = SelfAttention over e_1..e_m, with position embeddings and a residual connection (eq 5);
- a tower for each objective: Sigmoid(MLP(Sum h_f / m)) (eq 6), trained with the sum of the objectives' binary
  cross-entropies (eq 7); labels may be soft and an unknown label (NaN) is left out. The sum is divided by the items,
  as labels are means over them: sessions of any length are judged alike, a single exposure too.

Everything from e_i on is an ensemble whose members share their weights but for scales of inputs and outputs
(BatchEnsemble, arXiv 2002.06715; for tables of features TabM, arXiv 2410.24210). Each learns the labels for itself,
and the mean of their logits is the estimate.
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

RANK_WAVES = 6


@dataclass
class OneRecRewardOutput(ModelOutput):
    """
    Output of [`OneRecRewardModel`], for B users, C candidate sessions each (no such axis when one session was given)
    and O objectives in the order of `config.objectives`.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
            Sum over the objectives of the mean binary cross-entropy over the known labels (eq 7).
        logits (`torch.FloatTensor` of shape `(B, O)` or `(B, C, O)`):
            Towers' outputs before calibration and sigmoid.
        probabilities (`torch.FloatTensor`, same shape as `logits`):
            Sigmoid of the calibrated logits (eq 6).
        reward (`torch.FloatTensor` of shape `(B,)` or `(B, C)`):
            [`OneRecRewardModel.scalar`] of `probabilities`.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*, returned with `output_hidden_states=True`):
            e_1..e_m with their positions, then the output of every session layer, each `(B * C * E, m, hidden_size)`
            for E members of the ensemble.
        attentions (`tuple[torch.FloatTensor]`, *optional*, returned with `output_attentions=True`):
            Of every session layer, `(B * C * E, heads, m, m)`.
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


class OneRecRewardFeatureEmbeddings(nn.Module):
    """Features' values `(..., K)`, 0 for unknown, as their embeddings side by side `(..., K * feature_size)`."""

    def __init__(self, config: OneRecRewardConfig, num_values: int):
        super().__init__()
        self.embeddings = nn.Embedding(num_values, config.feature_size)

    def forward(self, values: torch.LongTensor) -> torch.Tensor:
        return self.embeddings(values).flatten(-2)


class OneRecRewardItemEncoder(nn.Module):
    """Item vectors `(..., H)` from code token ids `(..., L)`, features' values `(..., K)`, embeddings `(..., D)`."""

    def __init__(self, config: OneRecRewardConfig):
        super().__init__()
        self.code_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        width = len(config.codebook_sizes) * config.hidden_size
        if config.item_features:
            self.feature_embeddings = OneRecRewardFeatureEmbeddings(config, config.num_item_values)
            width += len(config.item_features) * config.feature_size
        width += config.item_embedding_size
        # The levels are concatenated and mixed by a hidden layer: a sum of code embeddings would give an item no
        # more than the sum of its codes' effects.
        self.up_proj = nn.Linear(width, config.hidden_size)
        self.act_fn = ACT2FN["gelu"]
        self.down_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, code_ids: torch.Tensor, values: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        item = self.code_embeddings(code_ids).flatten(-2)
        if values.shape[-1]:
            item = torch.cat([item, self.feature_embeddings(values)], dim=-1)
        item = torch.cat([item, embeddings.to(item.dtype)], dim=-1)
        return self.dropout(self.norm(self.down_proj(self.act_fn(self.up_proj(item)))))


class OneRecRewardTargetAttention(GradientCheckpointingLayer):
    """What each session item `(B, Q, H)` gathers from the user's behaviour `(B, n, H)`; `(B, Q, H)`.

    `recency` `(B, Q or 1, n)` is how many behaviours came after each one before the session, -1 where it is hidden.
    """

    def __init__(self, config: OneRecRewardConfig):
        super().__init__()
        self.config = config
        # A bias of the attention's scores by recency: a behaviour's vector is the same for all sessions after it.
        self.recency_bias = nn.Embedding(config.history_items, config.num_attention_heads)
        # A learned key that is never masked: what an item gathers from a user without any behaviour, and where its
        # attention can go when nothing in the history bears on it.
        self.no_behaviour = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.history_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = OneRecRewardAttention(config)

    def forward(self, items: torch.Tensor, history: torch.Tensor, recency: torch.Tensor, **kwargs) -> torch.Tensor:
        history = self.history_norm(history)
        states = torch.cat([self.no_behaviour.expand(history.shape[0], -1, -1).to(history.dtype), history], dim=1)
        bias = self.recency_bias(recency.clamp(min=0)).to(items.dtype)
        bias = bias.masked_fill((recency < 0)[..., None], torch.finfo(items.dtype).min)
        mask = F.pad(bias.permute(0, 3, 1, 2), (1, 0)).expand(-1, -1, items.shape[1], -1)
        user, _ = self.attention(items, states, mask, **kwargs)
        return user


class OneRecRewardRepetition(nn.Module):
    """How much of what came before each item is like it, as users tire of more of the same: sums `(..., Q, heads)` of
    learned likenesses in 0..1 over those of K others that `counted` `(..., Q, K)` says, one for each of these masks.
    The weights of an attention sum to 1, so that it cannot count.

    Items are vectors `(..., Q or K, H + D)`: what the item encoder makes of them, and their embeddings.
    """

    def __init__(self, config: OneRecRewardConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.proj = nn.Linear(config.hidden_size + config.item_embedding_size, config.hidden_size)
        # Of the cosine of two items in a head's space: where it is 1/2, and how steep.
        self.threshold = nn.Parameter(torch.empty(self.num_heads))
        self.steepness = nn.Parameter(torch.empty(self.num_heads))

    def forward(self, items: torch.Tensor, others: torch.Tensor, *counted: torch.Tensor) -> list[torch.Tensor]:
        mine, theirs = (
            F.normalize(self.proj(vectors).unflatten(-1, (self.num_heads, -1)), dim=-1).transpose(-2, -3)
            for vectors in (items, others)
        )
        cosine = mine @ theirs.transpose(-1, -2)
        likeness = torch.sigmoid(self.steepness[:, None, None] * (cosine - self.threshold[:, None, None]))
        return [(likeness * mask[..., None, :, :]).sum(-1).transpose(-1, -2) for mask in counted]


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


class OneRecRewardEnsembleLinear(nn.Linear):
    """A linear layer of the ensemble's E members, `(..., E, Q, in)` to `(..., E, Q, out)`: one weight for all, and of
    each member scales of its inputs and outputs and a bias."""

    def __init__(self, config: OneRecRewardConfig, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.input_scale = nn.Parameter(torch.empty(config.num_members, 1, in_features))
        self.output_scale = nn.Parameter(torch.empty(config.num_members, 1, out_features))
        self.output_bias = nn.Parameter(torch.empty(config.num_members, 1, out_features))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs * self.input_scale) * self.output_scale + self.output_bias


class OneRecRewardFusion(nn.Module):
    """MLP of each member from what is known of an item and the user `(B, Q, in)` to e_i `(B, E, Q, H)`."""

    def __init__(self, config: OneRecRewardConfig, in_features: int):
        super().__init__()
        self.up_proj = OneRecRewardEnsembleLinear(config, in_features, 2 * config.hidden_size)
        self.act_fn = ACT2FN["gelu"]
        self.dropout = nn.Dropout(config.dropout)
        self.down_proj = OneRecRewardEnsembleLinear(config, 2 * config.hidden_size, config.hidden_size)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.up_proj(inputs[:, None]))))


class OneRecRewardTower(nn.Module):
    """MLP of one objective (eq 6), from the members' `(..., E, H)` to their logits `(..., E)`."""

    def __init__(self, config: OneRecRewardConfig):
        super().__init__()
        self.hidden = nn.Linear(config.hidden_size, config.tower_hidden_size)
        self.act_fn = ACT2FN["gelu"]
        self.dropout = nn.Dropout(config.dropout)
        self.output = OneRecRewardEnsembleLinear(config, config.tower_hidden_size, 1)

    def forward(self, session: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(self.act_fn(self.hidden(session)))
        return self.output(hidden[..., None, :])[..., 0, 0]


class OneRecRewardItemTable(nn.Module):
    """What is known of N items: features' values, ranks by numeric features, embeddings and totals of the signals; and
    the signals' means over all exposures.

    The last row stands for items that are not known.
    """

    def __init__(self, config: OneRecRewardConfig):
        super().__init__()
        rows, num_signals = config.num_items + 1, len(config.signals)
        self.register_buffer("values", torch.zeros(rows, len(config.item_features), dtype=torch.long))
        self.register_buffer("ranks", torch.zeros(rows, len(config.numeric_features)))
        self.register_buffer("embeddings", torch.zeros(rows, config.item_embedding_size))
        self.register_buffer("totals", torch.zeros(rows, 2 * num_signals))
        self.register_buffer("signal_means", torch.full((num_signals,), 0.5))

    def rows(self, indices: torch.LongTensor | None, shape: torch.Size) -> torch.LongTensor:
        """Rows `shape` of catalogue indices; the last one for items that are not known."""
        unknown = len(self.values) - 1
        if indices is None:
            return torch.full(shape, unknown, device=self.values.device)
        indices = indices.reshape(shape)
        return indices.masked_fill((indices < 0) | (indices >= unknown), unknown)


class OneRecRewardCalibration(nn.Module):
    """Probabilities of logits `(..., O)` by scales and biases that are fitted after training.

    How long a session was says something of how it went, and a lone exposure is not a session of one item: biases of
    whole sessions go by their number of items.
    """

    def __init__(self, config: OneRecRewardConfig):
        super().__init__()
        self.register_buffer("scale", torch.ones(len(config.objectives)))
        self.register_buffer("bias", torch.zeros(len(config.objectives)))
        self.register_buffer("session_bias", torch.zeros(config.session_items, len(config.objectives)))

    def forward(self, logits: torch.Tensor, lengths: torch.LongTensor | None = None) -> torch.Tensor:
        """`lengths` `(...)`: items of the sessions if they are whole ones."""
        calibrated = logits * self.scale + self.bias
        if lengths is not None:
            calibrated = calibrated + self.session_bias[(lengths - 1).clamp(min=0)]
        return torch.sigmoid(calibrated)


def _waves(ranks: torch.Tensor) -> torch.Tensor:
    """Ranks `(..., P)` in [-1, 1] and their sines and cosines of octaves `(..., 13 P)`: fine differences of an item's
    duration change how much of it is watched."""
    octaves = 2.0 ** torch.arange(RANK_WAVES, device=ranks.device, dtype=ranks.dtype)
    angles = (math.pi * ranks[..., None] * octaves).flatten(-2)
    return torch.cat([ranks, angles.sin(), angles.cos()], dim=-1)


class OneRecRewardPreTrainedModel(PreTrainedModel):
    config: OneRecRewardConfig
    base_model_prefix = "reward_model"
    main_input_name = "history_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OneRecRewardItemEncoder", "OneRecRewardTargetAttention", "OneRecRewardSessionLayer"]
    _supports_sdpa = True
    # Neither flash nor flex: the target attention's scores have a bias of their own.
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
            if isinstance(module, OneRecRewardEnsembleLinear):
                # Signs make the members differ from the start. Of loaded ones none is drawn.
                if not getattr(module.input_scale, "_is_hf_initialized", False):
                    init.copy_(module.input_scale, torch.randint_like(module.input_scale, 2) * 2 - 1)
                init.ones_(module.output_scale)
                init.zeros_(module.output_bias)
        elif isinstance(module, OneRecRewardTargetAttention):
            init.normal_(module.no_behaviour, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, OneRecRewardRepetition):
            init.constant_(module.threshold, 0.4)
            init.constant_(module.steepness, 8.0)
        elif isinstance(module, OneRecRewardItemTable):
            init.zeros_(module.values)
            init.zeros_(module.ranks)
            init.zeros_(module.embeddings)
            init.zeros_(module.totals)
            init.constant_(module.signal_means, 0.5)
        elif isinstance(module, OneRecRewardCalibration):
            init.ones_(module.scale)
            init.zeros_(module.bias)
            init.zeros_(module.session_bias)


class OneRecRewardModel(OneRecRewardPreTrainedModel):
    """Reward of sessions given a user's behaviour (paper section 3.3.1)."""

    def __init__(self, config: OneRecRewardConfig):
        super().__init__(config)
        hidden, num_signals = config.hidden_size, len(config.signals)
        self.item_encoder = OneRecRewardItemEncoder(config)
        self.target_attention = OneRecRewardTargetAttention(config)
        self.repetition = OneRecRewardRepetition(config)
        # Places of the items' features that belong to one column, by which a behaviour and an item are compared.
        self._columns = [
            [place for place, column in enumerate(config.item_features) if column == name]
            for name in dict.fromkeys(config.item_features)
        ]
        width = 3 * hidden + 2 * config.num_attention_heads + (1 + 2 * RANK_WAVES) * len(config.numeric_features)
        if num_signals:
            self.signal_proj = nn.Linear(2 * num_signals, hidden)
            # Of the user, of the item, and of the user with the same item and with the same value of each feature.
            width += 2 * num_signals * (3 + len(self._columns))
        if config.user_features:
            self.user_embeddings = OneRecRewardFeatureEmbeddings(
                config, 1 + sum(len(values) for values in config.user_features.values())
            )
            width += len(config.user_features) * config.feature_size
        self.fusion = OneRecRewardFusion(config, width)
        self.position_embeddings = nn.Embedding(config.session_items, hidden)
        self.layers = nn.ModuleList([OneRecRewardSessionLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.towers = nn.ModuleDict({name: OneRecRewardTower(config) for name in config.objective_names})
        self.item_table = OneRecRewardItemTable(config)
        self.calibration = OneRecRewardCalibration(config)
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
                tower.output.output_bias.fill_(math.log(rate / (1 - rate)))

    @torch.no_grad()
    def set_items(
        self,
        values: torch.LongTensor,
        ranks: torch.Tensor,
        totals: torch.Tensor,
        signal_means: torch.Tensor,
        embeddings: torch.Tensor,
    ):
        """
        What is known of the items.

        Args:
            values (`torch.LongTensor` of shape `(N, K)`): Features' values, counted from 1; 0 for unknown.
            ranks (`torch.Tensor` of shape `(N, P)`): Ranks by the numeric features, in [-1, 1]; 0 for unknown.
            totals (`torch.Tensor` of shape `(N, 2 S)`): Of each item's exposures so far, the sums of the signals and
                how many of each are known.
            signal_means (`torch.Tensor` of shape `(S,)`): Means of the signals over all exposures.
            embeddings (`torch.Tensor` of shape `(N, D)`): Brought to a mean square of 1 here.
        """
        table = self.item_table
        table.embeddings[:-1] = embeddings / embeddings.square().mean().sqrt() if embeddings.numel() else embeddings
        table.values[:-1], table.ranks[:-1], table.totals[:-1] = values, ranks, totals
        table.signal_means.copy_(signal_means)

    @torch.no_grad()
    def set_calibration(self, scale: torch.Tensor, bias: torch.Tensor, session_bias: torch.Tensor | None = None):
        """
        Probabilities become sigmoid(scale * logit + bias), of whole sessions sigmoid(scale * logit + bias +
        session_bias[n - 1]) for n items.

        Args:
            scale, bias (`torch.Tensor` of shape `(O,)`): By objective.
            session_bias (`torch.Tensor` of shape `(session_items, O)`, *optional*): By length; zeros by default.
        """
        self.calibration.scale.copy_(scale)
        self.calibration.bias.copy_(bias)
        self.calibration.session_bias.copy_(torch.zeros(()) if session_bias is None else session_bias)

    def scalar(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The reward `(...)` of objectives' probabilities `(..., O)`, as `config.scalar` says."""
        config = self.config
        weights = probabilities.new_tensor(config.objective_weights)
        if config.scalar == "z_score" and config.objective_means is not None:
            means, deviations = (
                probabilities.new_tensor(values) for values in (config.objective_means, config.objective_deviations)
            )
            probabilities = (probabilities - means) / deviations
        return (probabilities * weights).sum(-1)

    def _check_inputs(
        self, history_ids: torch.Tensor, session_ids: torch.Tensor, history_prefixes: torch.Tensor | None
    ):
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
        if history_prefixes is None and history_ids.shape[1] > self.config.history_items:
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
        history_indices: torch.LongTensor | None = None,
        session_indices: torch.LongTensor | None = None,
        history_signals: torch.FloatTensor | None = None,
        user_totals: torch.FloatTensor | None = None,
        user_values: torch.LongTensor | None = None,
        session_totals: torch.FloatTensor | None = None,
        history_prefixes: torch.LongTensor | None = None,
        session_offsets: torch.LongTensor | None = None,
        whole_sessions: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OneRecRewardOutput:
        r"""
        The history is encoded once for all of a user's candidate sessions, which may be as short as one item. What is
        optional and not given counts as unknown.

        Args:
            history_ids (`torch.LongTensor` of shape `(B, n, L)`):
                Code token ids of the user's behaviour, oldest first; `pad_token_id` in place of a missing item, on
                either side. A history may be empty.
            session_ids (`torch.LongTensor` of shape `(B, m, L)` or `(B, C, m, L)`):
                Code token ids of one session or C candidate sessions of each user, padded at the end.
            labels (`torch.FloatTensor` of shape `(B, O)` or `(B, C, O)`, *optional*):
                Labels in [0, 1] of each objective, NaN where unknown.
            history_indices (`torch.LongTensor` of shape `(B, n)`, *optional*):
                Catalogue indices of the behaviour, by which the items' features are found.
            session_indices (`torch.LongTensor` of shape `(B, m)` or `(B, C, m)`, *optional*):
                The same of the sessions.
            history_signals (`torch.FloatTensor` of shape `(B, n, S)`, *optional*):
                Signals of each behaviour, NaN where unknown.
            user_totals (`torch.FloatTensor` of shape `(B, 2 S)`, *optional*):
                Of the user's exposures before the history, the signals' sums and how many of each are known.
            user_values (`torch.LongTensor` of shape `(B, U)`, *optional*):
                Values of the user's features, 0 for unknown.
            session_totals (`torch.FloatTensor` of shape `(B, m, 2 S)` or `(B, C, m, 2 S)`, *optional*):
                Totals of the sessions' items at the time of the session; by default those saved with the model.
            history_prefixes (`torch.LongTensor` of shape `(B,)` or `(B, C)`, *optional*):
                Behaviours before each session, the latest `history_items` of which it sees; by default all.
            session_offsets (`torch.LongTensor` of shape `(B,)` or `(B, C)`, *optional*):
                How many of the latest behaviours are the session's own earlier part; by default none.
            whole_sessions (`bool`, *optional*, defaults to `True`):
                Whether the sessions are whole ones, and not lone exposures, which are calibrated apart.

        Raises:
            ValueError: on inputs of another shape, or longer than `history_items` or `session_items`.
        """
        self._check_inputs(history_ids, session_ids, history_prefixes)
        single = session_ids.dim() == 3
        lengths = (session_ids[..., 0] != self.config.pad_token_id).sum(-1)
        if single:
            session_ids, session_indices, session_totals, history_prefixes, session_offsets = (
                None if tensor is None else tensor[:, None]
                for tensor in (session_ids, session_indices, session_totals, history_prefixes, session_offsets)
            )
        batch, num_candidates, num_items, _ = session_ids.shape
        pad = self.config.pad_token_id
        history_mask = history_ids[..., 0] != pad
        session_mask = (session_ids[..., 0] != pad).flatten(0, 1)
        item_ids = session_ids.flatten(1, 2)
        table = self.item_table
        item_rows = table.rows(session_indices, item_ids.shape[:2])
        item_values = table.values[item_rows]
        history_rows = table.rows(history_indices, history_ids.shape[:2])
        history_values = table.values[history_rows]

        # Behaviours after each one and before the session; -1 hides it.
        count = history_mask.sum(1, keepdim=True)
        prefixes = count if history_prefixes is None else history_prefixes.repeat_interleave(num_items, 1)
        recency = prefixes[..., None] - history_mask.cumsum(1)[:, None]
        hidden = ~history_mask[:, None] | (recency >= self.config.history_items)
        recency = recency.masked_fill(hidden, -1)

        item_embeddings, history_embeddings = table.embeddings[item_rows], table.embeddings[history_rows]
        history = self.item_encoder(history_ids, history_values, history_embeddings)
        items = self.item_encoder(item_ids, item_values, item_embeddings)

        # Of the session so far, and of the latest behaviours, as many as a session has items.
        behaviours = torch.cat([history, history_embeddings.to(history.dtype)], dim=-1)
        targets = torch.cat([items, item_embeddings.to(items.dtype)], dim=-1)
        counted = [(recency >= 0) & (recency < self.config.session_items)]
        if session_offsets is not None:
            counted.append((recency >= 0) & (recency < session_offsets.repeat_interleave(num_items, 1)[..., None]))
        latest, *part = self.repetition(targets, behaviours, *counted)
        sessions = targets.unflatten(1, (num_candidates, num_items))
        earlier = torch.ones(num_items, num_items, dtype=torch.bool, device=items.device).tril(-1)
        [so_far] = self.repetition(sessions, sessions, earlier)
        repetition = [latest, sum(part, so_far.flatten(1, 2))]
        inputs = []
        if self.config.signals:
            if history_signals is None:
                history_signals = history.new_full((*history_ids.shape[:2], len(self.config.signals)), torch.nan)
            history_signals = history_signals.to(history.dtype)
            counted = torch.cat(
                [history_signals.nan_to_num(0.0), (~history_signals.isnan()).to(history.dtype)], dim=-1
            )
            history = history + self.signal_proj(counted)
            counted = counted * history_mask[..., None]
            # Everything before the session counts for the user's own rates, not only what it attends to.
            before = F.pad(counted.cumsum(1), (0, 0, 1, 0))
            if user_totals is not None:
                before = before + user_totals[:, None].to(before.dtype)
            place = (history_mask.cumsum(1)[:, None] <= prefixes[..., None]).sum(-1)
            user = before.gather(1, place[..., None].expand(-1, -1, before.shape[-1]))
            same = [(item_ids[:, :, None] == history_ids[:, None]).all(-1)]
            for places in self._columns:
                mine, theirs = item_values[:, :, None, places, None], history_values[:, None, :, None, places]
                same.append(((mine == theirs) & (mine > 0)).flatten(3).any(-1))
            matched = [(equal & (recency >= 0)).to(counted.dtype) @ counted for equal in same]
            totals = table.totals[item_rows] if session_totals is None else session_totals.flatten(1, 2)
            rates = [
                self._rates(user, self.config.rate_prior).expand(-1, num_candidates * num_items, -1),
                self._rates(totals.to(user.dtype), self.config.rate_prior),
                *(self._rates(sums, self.config.match_prior) for sums in matched),
            ]
            inputs = [torch.cat(rates, dim=-1)]
        gathered = self.target_attention(items, history, recency, **kwargs)
        ranks = _waves(table.ranks[item_rows].to(items.dtype))
        inputs = [items, gathered, items * gathered, ranks, *inputs, *repetition]
        if self.config.user_features:
            if user_values is None:
                user_values = history_ids.new_zeros(batch, len(self.config.user_features))
            profile = self.user_embeddings(user_values)
            inputs.append(profile[:, None].expand(-1, num_candidates * num_items, -1))
        hidden_states = self.fusion(torch.cat(inputs, dim=-1))

        # Each member has a session of its own.
        num_members = self.config.num_members
        hidden_states = hidden_states.unflatten(2, (num_candidates, num_items)).transpose(1, 2).flatten(0, 2)
        session_mask = session_mask.repeat_interleave(num_members, 0)
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

        session = (hidden_states * session_mask[..., None]).sum(1) / session_mask.sum(1, keepdim=True).clamp(min=1)
        session = session.unflatten(0, (batch, num_candidates, num_members))
        member_logits = torch.stack([tower(session) for tower in self.towers.values()], dim=-1)
        if single:
            member_logits = member_logits[:, 0]
        logits = member_logits.mean(-2)

        loss = None
        if labels is not None:
            if labels.shape != logits.shape:
                raise ValueError(f"labels must have the shape {tuple(logits.shape)}, got {tuple(labels.shape)}.")
            loss = self._objectives_loss(member_logits, labels)
        probabilities = self.calibration(logits, lengths if whole_sessions else None)
        return OneRecRewardOutput(
            loss=loss, logits=logits, probabilities=probabilities, reward=self.scalar(probabilities)
        )

    def _rates(self, totals: torch.Tensor, prior: float) -> torch.Tensor:
        """Sums and counts `(..., 2 S)` as smoothed rates, in logits from the mean's, and logarithms of the counts."""
        sums, counts = totals.chunk(2, dim=-1)
        means = self.item_table.signal_means.to(totals.dtype).clamp(1e-4, 1 - 1e-4)
        rates = (sums + prior * means) / (counts + prior)
        # About as wide as the other inputs.
        return torch.cat([2 * (rates.logit(1e-5) - means.logit()), torch.log1p(counts) / 4], dim=-1)

    def _objectives_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of members' logits `(..., E, O)` and their common labels `(..., O)`."""
        labels = labels[..., None, :].expand_as(logits)
        known = ~labels.isnan()
        logits, labels = logits.float(), labels.float().nan_to_num(0.0).to(logits.device)
        weights = logits.new_tensor([objective["positive_weight"] for objective in self.config.objectives])
        losses = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="none")
        if self.config.focal_gamma:
            # Of a soft label: how far the estimate is from it.
            losses = losses * (torch.sigmoid(logits) - labels).abs() ** self.config.focal_gamma
        losses, known = (losses * known).flatten(0, -2), known.flatten(0, -2)
        return (losses.sum(0) / known.sum(0).clamp(min=1)).sum()


__all__ = ["OneRecRewardModel", "OneRecRewardOutput", "OneRecRewardPreTrainedModel"]
