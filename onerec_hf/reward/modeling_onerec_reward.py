"""OneRec reward model (paper section 3.3.1, eq 5-7).

For a user and a session of items the model estimates the session's watch time, view, follow and like rates and from
them one reward:

- an item vector v comes from all of the item's codes together and, where there are any, from its embedding and its
  features;
- e_i = v_i (.) u: session item i attends over the user's behaviour (target attention), which is all that they
  were exposed to with their feedback. Its own vector, what it gathered, the product of the two, the user's profile
  and the smoothed rates of the past (the user's, the item's, the user's with items that share a feature), how much it
  repeats of what came before and how near it is to what they liked and were shown give e_i;
- h_f = SelfAttention over e_1..e_m, with position embeddings and a residual connection (eq 5);
- a tower for each objective: Sigmoid(MLP(Sum h_f / m)) (eq 6), trained with the sum of the objectives' binary
  cross-entropies (eq 7); labels may be soft and an unknown label (NaN) is left out. The sum is divided by the items,
  as labels are means over them: sessions of any length are judged alike, a single exposure too.

Everything from e_i on is an ensemble whose members share their weights but for scales of inputs and outputs
(BatchEnsemble, arXiv 2002.06715; for tables of features TabM, arXiv 2410.24210). Each learns the labels for itself,
and the mean of their logits is the estimate.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

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

from ..modeling_onerec import eager_attention_forward
from ..readable_checkpoints import readable_checkpoint
from .configuration_onerec_reward import OneRecRewardConfig

RANK_WAVES = 6


class _Items(NamedTuple):
    """What is read of items `(B, Q)`, Q of a user's sessions (C candidates of m) or the n of their behaviour."""

    code_ids: torch.LongTensor  # (B, Q, L)
    mask: torch.BoolTensor  # (B, Q), where there is an item
    rows: torch.LongTensor  # (B, Q), of the item table
    values: torch.LongTensor  # (B, Q, K), of the features
    embeddings: torch.Tensor  # (B, Q, D)
    vectors: torch.Tensor  # (B, Q, H), v of the paper

    def described(self) -> torch.Tensor:
        """(B, Q, H + D), what is compared of two items."""
        return torch.cat([self.vectors, self.embeddings.to(self.vectors.dtype)], dim=-1)


class EncodedBehaviour(NamedTuple):
    """A user's behaviour as [`OneRecRewardModel.encode_behaviour`] makes it, for any number of sessions after it."""

    items: _Items
    states: torch.Tensor  # (B, n, H), the items with their feedback
    signals: torch.Tensor  # (B, n, 2 S), the feedback's sums and counts
    totals: torch.Tensor  # (B, 1 + n, 2 S), running sums of these, from those before the history

    def of_users(self, users: slice) -> "EncodedBehaviour":
        """Those of a part of the batch."""
        return EncodedBehaviour(_Items(*(value[users] for value in self.items)), *(part[users] for part in self[1:]))


@dataclass
class OneRecRewardOutput(ModelOutput):
    """Output of [`OneRecRewardModel`], for B users, C candidate sessions each (no such axis when one session was
    given) and O objectives in the order of `config.objectives`.

    Args:
        loss: With `labels`, the sum over the objectives of the mean binary cross-entropy over known labels (eq 7).
        logits: (B, O) or (B, C, O) towers' outputs before calibration and sigmoid.
        probabilities: As many sigmoids of the calibrated logits (eq 6).
        reward: (B,) or (B, C), [`OneRecRewardModel.scalar`] of `probabilities`.
        hidden_states: With `output_hidden_states=True`, e_1..e_m with their positions, then the output of every
            session layer, each `(B * C * E, m, hidden_size)` for E members of the ensemble.
        attentions: With `output_attentions=True`, of every session layer, `(B * C * E, heads, m, m)`.
        cross_attentions: With `output_attentions=True`, of the target attention, `(B, heads, C * m, 1 + n)`; the first
            key stands for no behaviour.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    probabilities: torch.FloatTensor | None = None
    reward: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


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
        dropout = self.attention_dropout if self.training else 0.0
        attended, weights = attention_interface(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
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
        return self.attention(items, states, mask, **kwargs)[0]


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


class OneRecRewardTaste(nn.Module):
    """How near each item is to what the user liked, and to what they were shown, which a recommender chose for them:
    `(B, Q, heads * (1 + S))` of items `(B, Q, D)`.

    Each head compares an item with all behaviours `(B, n, D)` in a space of its own, and sums the products by 1 and
    by the signals' deviations from their means `(B, n, S)`, older behaviours counting less. Neither a softmax nor a
    threshold is between: an item further in the direction of the taste than any behaviour has more of it, so that the
    best of many are told apart, and what fits one item to its likes says something of every other.
    """

    def __init__(self, config: OneRecRewardConfig):
        super().__init__()
        self.num_heads, self.size, self.prior = config.num_attention_heads, config.taste_size, config.match_prior
        self.q_proj = nn.Linear(config.item_embedding_size, self.num_heads * self.size, bias=False)
        self.k_proj = nn.Linear(config.item_embedding_size, self.num_heads * self.size, bias=False)
        self.log_decay = nn.Parameter(torch.empty(self.num_heads))  # of a behaviour's weight, for each one after it

    def forward(
        self, items: torch.Tensor, behaviours: torch.Tensor, deviations: torch.Tensor, recency: torch.LongTensor
    ) -> torch.Tensor:
        """`recency` as in [`OneRecRewardTargetAttention`]."""
        query, key = (
            proj(vectors).unflatten(-1, (self.num_heads, self.size)).transpose(1, 2)
            for proj, vectors in ((self.q_proj, items), (self.k_proj, behaviours))
        )
        ages = recency.clamp(min=0)[:, None].to(query.dtype)
        weights = torch.exp(-self.log_decay.exp()[:, None, None] * ages) * (recency >= 0)[:, None]
        values = F.pad(deviations, (1, 0), value=1.0)
        sums = (query @ key.transpose(-1, -2) * weights) @ values[:, None]
        # About as wide as the other inputs.
        sums = 4 * self.size**-0.5 * sums / (weights.sum(-1, keepdim=True) + self.prior)
        return sums.transpose(1, 2).flatten(2)


class OneRecRewardSessionLayer(GradientCheckpointingLayer):
    """h + SelfAttention(h W_q, h W_k, h W_v) over a session's items (eq 5), h normalised first."""

    def __init__(self, config: OneRecRewardConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = OneRecRewardAttention(config)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        normed = self.norm(hidden_states)
        return hidden_states + self.attention(normed, normed, attention_mask, **kwargs)[0]


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
        return self.output(self.dropout(self.act_fn(self.hidden(session)))[..., None, :])[..., 0, 0]


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


def _extended(values: torch.Tensor, count: int, shape: tuple[int, int, int], dim: int) -> torch.Tensor:
    """Values along `dim`, `count` of C sessions of m items and then those of K items for each, as those of sessions
    with an item after them, of `shape` (C, K, m + 1)."""
    num_sessions, num_candidates, length = shape
    before, after = values.split([count, num_sessions * num_candidates], dim)
    before = before.unflatten(dim, (num_sessions, length - 1)).unsqueeze(dim + 1)
    sizes = [-1] * before.dim()
    sizes[dim + 1] = num_candidates
    after = after.unflatten(dim, (num_sessions, num_candidates)).unsqueeze(dim + 2)
    return torch.cat([before.expand(sizes), after], dim + 2)


class OneRecRewardPreTrainedModel(PreTrainedModel):
    config: OneRecRewardConfig
    base_model_prefix = "reward_model"
    main_input_name = "history_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over a batch's own labels, whatever other batches have
    # Not the encoder of items: FSDP2 shards the embeddings that it holds on their own.
    _no_split_modules = ["OneRecRewardTargetAttention", "OneRecRewardSessionLayer"]
    _supports_sdpa = True
    # Neither flash nor flex: the target attention's scores have a bias of their own.
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OneRecRewardSessionLayer,
        "attentions": OutputRecorder(OneRecRewardAttention, index=1, layer_name="layers"),
        "cross_attentions": OutputRecorder(OneRecRewardAttention, index=1, layer_name="target_attention"),
    }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As every model's; for files that cannot be loaded a ValueError with the folder's name."""
        with readable_checkpoint(pretrained_model_name_or_path, kwargs.get("subfolder")):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

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
        elif isinstance(module, OneRecRewardTaste):
            init.copy_(module.log_decay, torch.logspace(-3, -1, module.num_heads).log())
        elif isinstance(module, OneRecRewardItemTable):
            for buffer in (module.values, module.ranks, module.embeddings, module.totals):
                init.zeros_(buffer)
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
        if config.taste_size:
            self.taste = OneRecRewardTaste(config)
            width += config.num_attention_heads * (1 + num_signals)
        if config.user_features:
            self.user_embeddings = OneRecRewardFeatureEmbeddings(
                config, 1 + sum(map(len, config.user_features.values()))
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
        """Starts each tower at its objective's base rate, the mean label (NaN where none is known), so that training
        does not begin with learning how rare an event such as follow is."""
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
        """Sets what is known of the items.

        Args:
            values: (N, K) features' values, counted from 1; 0 for unknown.
            ranks: (N, P) ranks by the numeric features, in [-1, 1]; 0 for unknown.
            totals: (N, 2 S) sums of the signals over each item's exposures so far, and how many of each are known.
            signal_means: (S,) means of the signals over all exposures.
            embeddings: (N, D), brought to a mean square of 1 here.
        """
        table = self.item_table
        table.embeddings[:-1] = embeddings / embeddings.square().mean().sqrt() if embeddings.numel() else embeddings
        table.values[:-1], table.ranks[:-1], table.totals[:-1] = values, ranks, totals
        table.signal_means.copy_(signal_means)

    @torch.no_grad()
    def set_calibration(self, scale: torch.Tensor, bias: torch.Tensor, session_bias: torch.Tensor | None = None):
        """Probabilities become sigmoid(scale * logit + bias), of whole sessions of n items sigmoid(scale * logit +
        bias + session_bias[n - 1]): `scale` and `bias` (O,), `session_bias` (session_items, O), by default zeros."""
        self.calibration.scale.copy_(scale)
        self.calibration.bias.copy_(bias)
        self.calibration.session_bias.copy_(torch.zeros(()) if session_bias is None else session_bias)

    def scalar(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The reward `(...)` of objectives' probabilities `(..., O)`, as `config.scalar` says."""
        config = self.config
        weights = probabilities.new_tensor(config.objective_weights)
        if config.scalar == "z_score" and config.objective_means is not None:
            means = probabilities.new_tensor(config.objective_means)
            probabilities = (probabilities - means) / probabilities.new_tensor(config.objective_deviations)
        return (probabilities * weights).sum(-1)

    def encode_behaviour(
        self,
        history_ids: torch.LongTensor,
        history_indices: torch.LongTensor | None = None,
        history_signals: torch.FloatTensor | None = None,
        user_totals: torch.FloatTensor | None = None,
    ) -> EncodedBehaviour:
        """What sessions are judged by, encoded once for [`score_extensions`]; arguments as of `forward`."""
        items = self._item_vectors(history_ids, history_indices)
        states, num_signals = items.vectors, len(self.config.signals)
        if history_signals is None:
            history_signals = states.new_full((*states.shape[:2], num_signals), torch.nan)
        signals = history_signals.to(states.dtype)
        counted = torch.cat([signals.nan_to_num(0.0), (~signals.isnan()).to(states.dtype)], dim=-1)
        if num_signals:
            states = states + self.signal_proj(counted)
        counted = counted * items.mask[..., None]
        # Everything before the session counts for the user's own rates, not only what it attends to.
        totals = F.pad(counted.cumsum(1), (0, 0, 1, 0))
        if user_totals is not None:
            totals = totals + user_totals[:, None].to(totals.dtype)
        return EncodedBehaviour(items, states, counted, totals)

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
        self._check_length(session_ids.shape[-2])

    def _check_length(self, session_items: int):
        if session_items > self.config.session_items:
            raise ValueError(
                f"session_ids has {session_items} items, more than session_items = {self.config.session_items}: "
                "shorten the sessions or raise session_items."
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
        """The history is encoded once for all of a user's candidate sessions, which may be as short as one item. What
        is optional and not given counts as unknown.

        Args:
            history_ids: (B, n, L) code token ids of the user's behaviour, oldest first; `pad_token_id` in place of a
                missing item, on either side. A history may be empty.
            session_ids: (B, m, L) or (B, C, m, L) code token ids of one session or C candidate sessions of each user,
                padded at the end.
            labels: (B, O) or (B, C, O) labels in [0, 1] of each objective, NaN where unknown.
            history_indices, session_indices: (B, n) and (B, m) or (B, C, m) catalogue indices, by which the items'
                features are found.
            history_signals: (B, n, S) signals of each behaviour, NaN where unknown.
            user_totals: (B, 2 S) the signals' sums over exposures before the history, and how many of each are known.
            user_values: (B, U) values of the user's features, 0 for unknown.
            session_totals: (B, m, 2 S) or (B, C, m, 2 S) such totals of the sessions' items at the time of the
                session; by default those saved with the model.
            history_prefixes: (B,) or (B, C) behaviours before each session, the latest `history_items` of which it
                sees; by default all.
            session_offsets: (B,) or (B, C) how many of the latest behaviours are the session's own earlier part.
            whole_sessions: Whether the sessions are whole ones, and not lone exposures, which are calibrated apart.

        Raises:
            ValueError: on inputs of another shape, or longer than `history_items` or `session_items`.
        """
        self._check_inputs(history_ids, session_ids, history_prefixes)
        behaviour = self.encode_behaviour(history_ids, history_indices, history_signals, user_totals)
        single = session_ids.dim() == 3
        session_ids, session_indices, session_totals, history_prefixes, session_offsets = (
            tensor[:, None] if single and tensor is not None else tensor
            for tensor in (session_ids, session_indices, session_totals, history_prefixes, session_offsets)
        )
        items = self._item_vectors(session_ids.flatten(1, 2), session_indices)
        session_mask = items.mask.unflatten(1, session_ids.shape[1:3])
        recency, seen = self._before_sessions(behaviour.items.mask, history_prefixes, session_mask.shape[2])
        repetition = self._repetition(items, behaviour.items, recency, session_offsets, session_mask.shape[1:])
        rates = self._past_rates(items, behaviour, recency, seen, session_totals)
        fused = self._target_attention(items, behaviour, recency, [*rates, *repetition], user_values, **kwargs)
        sessions = self._session_attention(fused, session_mask, **kwargs)
        member_logits = torch.stack([tower(sessions) for tower in self.towers.values()], dim=-1)
        if single:
            member_logits, session_mask = member_logits[:, 0], session_mask[:, 0]
        logits = member_logits.mean(-2)
        loss = None if labels is None else self._objectives_loss(member_logits, labels)
        probabilities = self.calibration(logits, session_mask.sum(-1) if whole_sessions else None)
        return OneRecRewardOutput(loss, logits, probabilities, self.scalar(probabilities))

    def score_extensions(
        self,
        behaviour: EncodedBehaviour,
        session_ids: torch.LongTensor,
        candidate_ids: torch.LongTensor,
        session_indices: torch.LongTensor | None = None,
        candidate_indices: torch.LongTensor | None = None,
        user_values: torch.LongTensor | None = None,
    ) -> torch.FloatTensor:
        """The rewards `(B, C, K)` of C sessions so far of each user, each with one of K items after it: those of
        `forward`, where what they have in common is there once.

        Args:
            behaviour: Of [`encode_behaviour`].
            session_ids, candidate_ids: (B, C, m, L), m from 0 on, and (B, C, K, L) code token ids.
            session_indices, candidate_indices: (B, C, m) and (B, C, K) catalogue indices.
            user_values: As of `forward`.

        Raises:
            ValueError: on sessions that are longer than `session_items` with the item.
        """
        self._check_length(session_ids.shape[2] + 1)
        (num_sessions, num_before), num_candidates = session_ids.shape[1:3], candidate_ids.shape[2]
        indices = None
        if session_indices is not None:
            indices = torch.cat([session_indices.flatten(1), candidate_indices.flatten(1)], dim=1)
        items = self._item_vectors(torch.cat([session_ids.flatten(1, 2), candidate_ids.flatten(1, 2)], 1), indices)
        recency, seen = self._before_sessions(behaviour.items.mask, None, 1)
        # Of each item the session, and its place there.
        numbers = torch.arange(num_sessions)
        session = torch.cat([numbers.repeat_interleave(num_before), numbers.repeat_interleave(num_candidates)])
        count = num_sessions * num_before
        place = torch.full_like(session, num_before)
        place[:count] = torch.arange(num_before).repeat(num_sessions)
        earlier = (session[:, None] == session[:count]) & (place[:, None] > place[:count])
        repetition = self._repetition_of(items, behaviour.items, recency, earlier.to(session_ids.device))
        rates = self._past_rates(items, behaviour, recency, seen, None)
        fused = self._target_attention(items, behaviour, recency, [*rates, *repetition], user_values)
        shape = (num_sessions, num_candidates, num_before + 1)
        mask = _extended(items.mask, count, shape, dim=1).flatten(1, 2)
        sessions = self._session_attention(_extended(fused, count, shape, dim=2).flatten(2, 4), mask)
        logits = torch.stack([tower(sessions) for tower in self.towers.values()], dim=-1).mean(-2)
        return self.scalar(self.calibration(logits, mask.sum(-1))).unflatten(1, shape[:2])

    def _repetition_of(
        self, items: _Items, history: _Items, recency: torch.LongTensor, earlier: torch.BoolTensor
    ) -> list[torch.Tensor]:
        """As [`_repetition`], of items `(B, Q)` of which the first P are before others, as `earlier` `(Q, P)` says."""
        behaviours, targets = history.described(), items.described()
        latest = self.repetition(targets, behaviours, (recency >= 0) & (recency < self.config.session_items))
        return latest + self.repetition(targets, targets[:, : earlier.shape[1]], earlier)

    def _item_vectors(self, code_ids: torch.LongTensor, indices: torch.LongTensor | None) -> _Items:
        """Items `(B, Q)` by their code token ids `(B, Q, L)` and catalogue indices of as many, with their v."""
        table = self.item_table
        rows = table.rows(indices, code_ids.shape[:2])
        mask = code_ids[..., 0] != self.config.pad_token_id
        values, embeddings = table.values[rows], table.embeddings[rows]
        return _Items(code_ids, mask, rows, values, embeddings, self.item_encoder(code_ids, values, embeddings))

    def _before_sessions(
        self, history_mask: torch.BoolTensor, prefixes: torch.LongTensor | None, num_items: int
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """For each session item `(B, Q or 1)`: the recency `(B, Q or 1, n)` of behaviours, how many came after each
        one and before the session, -1 where it is hidden; and how many places of the history are before the session.
        `prefixes` `(B, C)` as in `forward`."""
        prefixes = history_mask.sum(1, keepdim=True) if prefixes is None else prefixes.repeat_interleave(num_items, 1)
        recency = prefixes[..., None] - history_mask.cumsum(1)[:, None]
        hidden = ~history_mask[:, None] | (recency >= self.config.history_items)
        return recency.masked_fill(hidden, -1), (recency >= 0).sum(-1)

    def _repetition(
        self,
        items: _Items,
        history: _Items,
        recency: torch.LongTensor,
        offsets: torch.LongTensor | None,
        shape: tuple[int, int],
    ) -> list[torch.Tensor]:
        """How much each session item repeats of the latest behaviours, as many as a session has items, and of its own
        session so far, a part of which may be behaviours: two tensors `(B, Q, heads)` for sessions of `shape`, C, m.
        """
        behaviours, targets = history.described(), items.described()
        counted = [(recency >= 0) & (recency < self.config.session_items)]
        if offsets is not None:
            counted.append((recency >= 0) & (recency < offsets.repeat_interleave(shape[1], 1)[..., None]))
        latest, *part = self.repetition(targets, behaviours, *counted)
        sessions = targets.unflatten(1, shape)
        earlier = torch.ones(shape[1], shape[1], dtype=torch.bool, device=targets.device).tril(-1)
        [so_far] = self.repetition(sessions, sessions, earlier)
        return [latest, sum(part, so_far.flatten(1, 2))]

    def _past_rates(
        self,
        items: _Items,
        behaviour: EncodedBehaviour,
        recency: torch.LongTensor,
        seen: torch.LongTensor,
        item_totals: torch.FloatTensor | None,
    ) -> list[torch.Tensor]:
        """Smoothed rates of the past, each `(B, Q, 2 S)`: of the user, of the item, of the user with the same item and
        with items of the same value of each feature."""
        config, totals, counted = self.config, behaviour.totals, behaviour.signals
        if not config.signals:
            return []
        of_user = totals.gather(1, seen[..., None].expand(-1, -1, totals.shape[-1]))
        of_item = self.item_table.totals[items.rows] if item_totals is None else item_totals.flatten(1, 2)
        pairs = self._same_features(items, behaviour.items)
        same = [(equal & (recency >= 0)).to(counted.dtype) @ counted for equal in pairs]
        return [
            self._rates(of_user, config.rate_prior).expand(-1, items.mask.shape[1], -1),
            self._rates(of_item.to(of_user.dtype), config.rate_prior),
            *(self._rates(sums, config.match_prior) for sums in same),
        ]

    def _tastes(self, items: _Items, behaviour: EncodedBehaviour, recency: torch.LongTensor) -> list[torch.Tensor]:
        """[`OneRecRewardTaste`], of the items' embeddings, which are smoother than what is learned of each."""
        if not self.config.taste_size:
            return []
        sums, counts = behaviour.signals.chunk(2, dim=-1)
        deviations = 2 * (sums - counts * self.item_table.signal_means.to(sums.dtype))
        compared = (part.embeddings.to(deviations.dtype) for part in (items, behaviour.items))
        return [self.taste(*compared, deviations, recency)]

    def _same_features(self, items: _Items, history: _Items) -> Iterator[torch.BoolTensor]:
        """Whether a session item and a behaviour `(B, Q, n)` are the same item; and for each column of features
        whether they share a value."""
        yield (items.code_ids[:, :, None] == history.code_ids[:, None]).all(-1)
        for places in self._columns:
            mine, theirs = items.values[:, :, None, places, None], history.values[:, None, :, None, places]
            yield ((mine == theirs) & (mine > 0)).flatten(3).any(-1)

    def _target_attention(
        self,
        items: _Items,
        behaviour: EncodedBehaviour,
        recency: torch.LongTensor,
        known: list[torch.Tensor],
        user_values: torch.LongTensor | None,
        **kwargs,
    ) -> torch.Tensor:
        """e_i = v_i (.) u of each member, `(B, E, Q, H)`, which also reads what else is `known` of item and user."""
        states = behaviour.states
        user = self.target_attention(items.vectors, states, recency, **kwargs)
        ranks = _waves(self.item_table.ranks[items.rows].to(states.dtype))
        tastes = self._tastes(items, behaviour, recency)
        inputs = [items.vectors, user, items.vectors * user, ranks, *known, *tastes]
        if self.config.user_features:
            if user_values is None:
                user_values = items.rows.new_zeros(len(states), len(self.config.user_features))
            inputs.append(self.user_embeddings(user_values)[:, None].expand(-1, items.mask.shape[1], -1))
        return self.fusion(torch.cat(inputs, dim=-1))

    def _session_attention(self, items: torch.Tensor, session_mask: torch.BoolTensor, **kwargs) -> torch.Tensor:
        """Sum h_f / m `(B, C, E, H)` of each member's sessions, h_f by self-attention (eq 5) over their e_i
        `(B, E, Q, H)`; `session_mask` `(B, C, m)` says where there is an item."""
        num_members = self.config.num_members
        # Each member has a session of its own.
        hidden_states = items.unflatten(2, session_mask.shape[1:]).transpose(1, 2).flatten(0, 2)
        mask = session_mask.flatten(0, 1).repeat_interleave(num_members, 0)
        positions = torch.arange(mask.shape[1], device=mask.device)
        hidden_states = hidden_states + self.position_embeddings(positions)
        # A session of padding alone sees its first place, so that it is well defined; the sum leaves it out.
        visible = mask | ((positions == 0) & ~mask.any(1, keepdim=True))
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=visible
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        hidden_states = self.norm(hidden_states)
        session = (hidden_states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return session.unflatten(0, (*session_mask.shape[:2], num_members))

    def _rates(self, totals: torch.Tensor, prior: float) -> torch.Tensor:
        """Sums and counts `(..., 2 S)` as smoothed rates, in logits from the mean's, and logarithms of the counts."""
        sums, counts = totals.chunk(2, dim=-1)
        means = self.item_table.signal_means.to(totals.dtype).clamp(1e-4, 1 - 1e-4)
        rates = (sums + prior * means) / (counts + prior)
        # About as wide as the other inputs.
        return torch.cat([2 * (rates.logit(1e-5) - means.logit()), torch.log1p(counts) / 4], dim=-1)

    def _objectives_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The objectives' summed cross-entropies (eq 7) of members' logits `(..., E, O)`, labels `(..., O)` alike."""
        shape = (*logits.shape[:-2], logits.shape[-1])
        if labels.shape != shape:
            raise ValueError(f"labels must have the shape {shape}, got {tuple(labels.shape)}.")
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
