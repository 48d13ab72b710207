"""OneRec's configuration: the encoder-decoder of section 3.2 with sparse mixture-of-experts decoder FFNs (eq 2)."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .typed_arguments import typed_arguments

# At ids 0 to 4 in every vocabulary, whatever the codebooks.
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<sep>", "<unk>")
NUM_SPECIAL_TOKENS = len(SPECIAL_TOKENS)
PAD_TOKEN_ID, EOS_TOKEN_ID, BOS_TOKEN_ID, SEP_TOKEN_ID, UNK_TOKEN_ID = range(NUM_SPECIAL_TOKENS)

FINGERPRINT = re.compile(r"\d{1,18}-[0-9a-f]+")
MOST_LAYERS = 1000  # no model is as deep, and one that a damaged file asks for would be built for hours

# Shapes by name. "debug" and "small" are for CPUs. The others have the paper's named sizes with its 24 experts, 2
# active, and three levels of 8,192 codes. The paper gives no widths: these follow its technical report's shapes.
_PAPER = {"codebook_sizes": [8192, 8192, 8192], "num_experts": 24, "encoder_layers": 4, "decoder_layers": 4}
PRESETS: dict[str, dict[str, Any]] = {
    "debug": {
        "codebook_sizes": [8, 8, 8],
        "hidden_size": 16,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "num_attention_heads": 2,
        "num_experts": 4,
    },
    "small": {
        "codebook_sizes": [256, 256, 256],
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 8,
    },
    "0.05b": _PAPER
    | {"hidden_size": 384, "intermediate_size": 1536, "moe_intermediate_size": 64, "num_attention_heads": 6},
    "0.1b": _PAPER
    | {"hidden_size": 512, "intermediate_size": 2048, "moe_intermediate_size": 256, "num_attention_heads": 8},
    "0.2b": _PAPER
    | {"hidden_size": 768, "intermediate_size": 3072, "moe_intermediate_size": 384, "num_attention_heads": 8},
    "0.5b": _PAPER
    | {"hidden_size": 1024, "intermediate_size": 4096, "moe_intermediate_size": 1152, "num_attention_heads": 8},
    "1b": _PAPER
    | {"hidden_size": 1024, "intermediate_size": 4096, "moe_intermediate_size": 2816, "num_attention_heads": 8},
}


def vocabulary_size(codebook_sizes: Sequence[int], num_semantic_ids: int) -> int:
    """The special tokens, the codes of all levels, and a BOS for every semantic ID but the first."""
    return NUM_SPECIAL_TOKENS + sum(codebook_sizes) + num_semantic_ids - 1


def require_ranges(config: PreTrainedConfig, least: dict[int, Sequence[str]], layers: Sequence[str], eps: str) -> None:
    """Checks what stands alone in a configuration, before it is calculated with.

    Args:
        config: has a `vocab_size`, in which its special tokens lie.
        least: Fields by the least that they may be.
        layers: Those of `least` that are numbers of layers.
        eps: Of the norms.

    Raises:
        ValueError: with the field's name.
    """
    ranges = {
        name: (start, MOST_LAYERS if name in layers else None) for start, names in least.items() for name in names
    }
    tokens = [name for name in ("pad", "bos", "sep", "decoder_start") if hasattr(config, f"{name}_token_id")]
    ranges |= {f"{name}_token_id": (0, config.vocab_size - 1) for name in tokens}
    for name, (start, end) in ranges.items():
        value = getattr(config, name)
        if value is None or value < start or (end is not None and value > end):
            most = "" if end is None else f" and at most {end}"
            raise ValueError(f"{name} must be at least {start}{most}, got {value}.")
    if not getattr(config, eps) > 0:
        raise ValueError(f"{eps} must be more than 0, got {getattr(config, eps)}.")


@partial(typed_arguments, read_text=False)
@strict
class OneRecConfig(PreTrainedConfig):
    """Configuration of [`OneRecModel`] and [`OneRecForConditionalGeneration`].

    Args:
        codebook_sizes: Codes per semantic-ID level, K_1 to K_L; in the vocabulary they follow the five special tokens.
        num_semantic_ids: C, semantic IDs of every item, each a numbering of the catalogue of its own. With several,
            `codebook_sizes` has the L levels of the first ID, then those of the second, and so on, and IDs 1 to C - 1
            have a BOS token each at the end of the vocabulary. The encoder reads all C L codes of an item, a session
            is written in one ID, and P(item) is the mean of the C probabilities of its codes.
        hidden_size, intermediate_size: Width of the model and of the encoder's dense FFNs.
        encoder_layers, decoder_layers, num_attention_heads: The paper has N/2 encoder and N/2 decoder layers. Without
            encoder layers, as in OneRec-V2 (arXiv 2508.20900), the decoder reads the embedded behaviours themselves.
        context_key_value_sets: L_kv of OneRec-V2's lazy decoder, sets of keys and values that the history is projected
            to once for all decoder layers, of which layer l reads set floor(l L_kv / decoder_layers). 0 (the paper):
            each decoder layer projects its own.
        context_key_value_heads: G_kv, heads of each of these sets, each read by as many attention heads; None: as many
            as there are attention heads.
        num_experts, num_experts_per_tok, moe_intermediate_size: N_MoE, K_MoE and the width of one decoder expert (eq
            2; the paper has 24 and 2).
        history_items, session_items: n = 256 behaviours that the encoder reads at most and m = 5 items of a session.
        history_positions: `"token"` (the paper): every code token and separator of the history is an encoder position.
            `"item"`: the code embeddings of an item are projected together into one position, a quarter of the
            length at L = 3.
        history_feedback: Feedback conditions, such as `"like"` or `"watch_time>=60"`, whose outcome is embedded with
            each behaviour of the history.
        time_gap_buckets: Buckets of the time from each behaviour to the moment of recommendation, embedded with the
            behaviour; bucket k holds 2^(k-1) - 1 to 2^k - 1 minutes, the last one everything longer. 0 leaves it out.
        user_features: Known values by categorical column of the users; each column is one encoder position in front of
            the history.
        encoder_attention: `"bidirectional"` (the paper): every position of the history sees the whole history.
            `"causal"`: it sees what lies before it, so that one encoding of a history serves the targets after each of
            its prefixes.
        encoder_positions: `"absolute"`: a vector by place is added to each position. `"distance"`, of a causal one:
            a learned bias of its attention by how many items lie between, so that every prefix trains what a whole
            history uses.
        item_head: `"encoder"`: beside the codes, a softmax over the catalogue at every position of a causal encoder
            with `history_positions="item"`, from vectors of the items.
        num_items: N, items of the catalogue that have a vector of the item head.
        catalogue_fingerprint: [`OneRecTokenizer.catalogue_fingerprint`] of the items and semantic IDs that the model
            was trained on, with which it is used; None: not known.
        item_content_size: Width of the content embeddings whose projection is a part of each item's vector; 0: none,
            so that items without a behaviour have no vector.
        item_encoders: The encoders of the item head, each with vectors of its own; the head is the geometric mean of
            their distributions. `"shared"`: the encoder itself, which then reads an item's vector beside its codes.
            `"content"` and `"learned"`: one as deep, which the codes' loss does not touch, of vectors that are learned
            and projected from the content, or learned alone.
        item_memory: Neighbours by co-consumption that the item head has of every item, of which a history brings those
            of its latest items to mind: see [`OneRecItemMemory`], filled by [`remember_items`]. 0: none.
        item_memory_weight: What a similarity of 1 to the latest item adds to an item's logit.
        item_loss_weight: Weight of the item head's loss beside eq 4.
        item_share: g, the item head's share in what is generated: P(item) = g P_item + (1 - g) P_codes.
        session_item_share: g of sessions of several items, where it is another than of ranked lists. With 0 these are
            of codes alone, which know the items before: they may be aligned while lists keep what the head recalls.
        item_gate: In place of `item_share`, each user's g is the sigmoid of a linear map of the state of its history,
            which [`fit_item_gate`] fits after training.
        item_negatives: In training the item head's softmax is over the whole catalogue, or, where that has more items
            than this, estimated from so many that are drawn at random for each batch; 0: always the whole one.
        expert_bias_update_rate: Step by which a router's selection bias moves towards balanced load after every
            optimizer step; 0 turns the balancing off.
        dropout: Dropout on embeddings and residual branches.
        attention_dropout: Dropout on attention weights. With it no fused attention kernel trains on a CPU.

    `vocab_size` follows from `codebook_sizes`; it is a field so that embeddings can be resized.
    """

    model_type = "onerec"
    keys_to_ignore_at_inference = ["past_key_values"]
    # Caches take the number of layers from `num_hidden_layers` of the decoder's view of this config, in which
    # `decoder_layers` is written to it.
    attribute_map = {"num_hidden_layers": "encoder_layers"}

    codebook_sizes: list[int] | tuple[int, ...] = (8192, 8192, 8192)
    num_semantic_ids: int = 1
    vocab_size: int | None = None
    hidden_size: int = 512
    intermediate_size: int = 2048
    encoder_layers: int = 4
    decoder_layers: int = 4
    num_attention_heads: int = 8
    context_key_value_sets: int = 0
    context_key_value_heads: int | None = None
    num_experts: int = 24
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 256
    expert_bias_update_rate: float = 1e-3
    history_items: int = 256
    session_items: int = 5
    history_positions: str = "token"
    history_feedback: list[str] | tuple[str, ...] = ()
    time_gap_buckets: int = 0
    user_features: dict[str, list[str]] | None = None
    encoder_attention: str = "bidirectional"
    encoder_positions: str = "absolute"
    item_head: str = "none"
    num_items: int = 0
    catalogue_fingerprint: str | None = None
    item_content_size: int = 0
    item_encoders: list[str] | tuple[str, ...] | int = ("shared",)
    item_memory: int = 0
    item_memory_weight: float = 3.0
    item_loss_weight: float = 1.0
    item_share: float = 0.5
    session_item_share: float | None = None
    item_gate: bool = False
    item_negatives: int = 16384
    hidden_act: str = "silu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = PAD_TOKEN_ID
    eos_token_id: int | list[int] | None = EOS_TOKEN_ID
    bos_token_id: int | None = BOS_TOKEN_ID
    sep_token_id: int | None = SEP_TOKEN_ID
    decoder_start_token_id: int | None = BOS_TOKEN_ID

    def __post_init__(self, **kwargs):
        self.codebook_sizes = list(self.codebook_sizes)
        self.history_feedback = list(self.history_feedback)
        if isinstance(self.item_encoders, int):  # checkpoints once had the number of further ones
            self.item_encoders = ["shared", *["learned"] * min(self.item_encoders, MOST_LAYERS)]
        self.item_encoders = list(self.item_encoders)
        self.user_features = dict(self.user_features or {})
        if self.vocab_size is None:
            self.vocab_size = vocabulary_size(self.codebook_sizes, self.num_semantic_ids)
        if self.context_key_value_sets and self.context_key_value_heads is None:
            self.context_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: sizes, and fields that only make sense together."""
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is none of {', '.join(ACT2FN)}.")
        if self.catalogue_fingerprint is not None and not FINGERPRINT.fullmatch(self.catalogue_fingerprint):
            raise ValueError(f"catalogue_fingerprint is none of a tokenizer's: {self.catalogue_fingerprint[:60]!r}.")
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes must hold at least one positive size, got {self.codebook_sizes}.")
        count = self.num_semantic_ids
        if count < 1 or len(self.codebook_sizes) % count:
            raise ValueError(
                f"codebook_sizes {self.codebook_sizes} must hold as many levels for each of {count} semantic IDs."
            )
        if count > 1 and self.history_positions != "item":
            raise ValueError(
                f"num_semantic_ids={count} needs history_positions='item', where all codes of an item are one "
                "position."
            )
        if self.vocab_size < vocabulary_size(self.codebook_sizes, count):
            raise ValueError(
                f"vocab_size ({self.vocab_size}) is smaller than the {NUM_SPECIAL_TOKENS + count - 1} special tokens "
                f"and the {sum(self.codebook_sizes)} codes of codebook_sizes {self.codebook_sizes}; leave it out."
            )
        sizes = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_experts")
        layers = ("encoder_layers", "decoder_layers")
        counts = ("history_items", "session_items")
        least = {1: (*sizes, "decoder_layers", *counts), 0: ("encoder_layers", "num_items", "item_content_size")}
        require_ranges(self, least, layers, "rms_norm_eps")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        self._validate_context()
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must lie between 1 and num_experts "
                f"({self.num_experts})."
            )
        if self.history_positions not in ("token", "item"):
            raise ValueError(f"history_positions must be 'token' or 'item', got {self.history_positions!r}.")
        if self.time_gap_buckets < 0:
            raise ValueError(f"time_gap_buckets must not be negative, got {self.time_gap_buckets}.")
        if self.encoder_attention not in ("bidirectional", "causal"):
            raise ValueError(f"encoder_attention must be 'bidirectional' or 'causal', got {self.encoder_attention!r}.")
        if self.encoder_attention == "causal" and (self.time_gap_buckets or self.user_features):
            raise ValueError(
                "encoder_attention='causal' encodes a history once for the targets after each of its prefixes: it "
                "takes neither time_gap_buckets, which count to one target's moment, nor user_features."
            )

        if self.encoder_positions not in ("absolute", "distance"):
            raise ValueError(f"encoder_positions must be 'absolute' or 'distance', got {self.encoder_positions!r}.")
        if self.encoder_positions == "distance" and not (
            self.encoder_attention == "causal" and self.history_positions == "item"
        ):
            raise ValueError(
                "encoder_positions='distance' needs encoder_attention='causal' and history_positions='item'."
            )
        if self.encoder_positions == "distance" and not self.encoder_layers:
            raise ValueError(
                "encoder_positions='distance' is of the attention of encoder layers, of which encoder_layers=0 has "
                "none: use 'absolute'."
            )
        self._validate_item_head()

    def _validate_context(self):
        sets, heads = self.context_key_value_sets, self.context_key_value_heads
        if not 0 <= sets <= self.decoder_layers:
            raise ValueError(
                f"context_key_value_sets must lie between 0 and decoder_layers ({self.decoder_layers}), got {sets}."
            )
        if heads is not None and not sets:
            raise ValueError(
                f"context_key_value_heads ({heads}) are those of keys and values that the decoder's layers share, "
                "which there are none of: set context_key_value_sets."
            )
        if heads is not None and (heads < 1 or self.num_attention_heads % heads):
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of context_key_value_heads "
                f"({heads})."
            )

    def _validate_item_head(self):
        if self.item_negatives < 0:
            raise ValueError(f"item_negatives must not be negative, got {self.item_negatives}.")
        for name in ("item_share", "session_item_share"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share}.")
        if self.item_head not in ("none", "encoder"):
            raise ValueError(f"item_head must be 'none' or 'encoder', got {self.item_head!r}.")
        kinds = ("shared", "content", "learned")
        if (
            not self.item_encoders
            or not set(self.item_encoders) <= set(kinds)
            or self.item_encoders.count("shared") > 1
        ):
            raise ValueError(
                f"item_encoders must list some of {', '.join(kinds)}, and shared at most once, got "
                f"{self.item_encoders}."
            )
        if self.item_gate and self.item_head == "none":
            raise ValueError("item_gate weighs the item head, which there is none of: set item_head.")
        if self.item_memory < 0:
            raise ValueError(f"item_memory must not be negative, got {self.item_memory}.")
        if self.item_memory and self.item_head == "none":
            raise ValueError("item_memory is the item head's, which there is none of: set item_head.")
        if self.item_head == "encoder" and not (
            self.encoder_attention == "causal" and self.history_positions == "item" and self.num_items > 0
        ):
            raise ValueError(
                "item_head='encoder' needs encoder_attention='causal', history_positions='item' and num_items."
            )
        if self.item_head == "encoder" and not self.encoder_layers:
            raise ValueError(
                "item_head='encoder' reads the states of encoder layers, of which encoder_layers=0 has none: use at "
                "least 1, or item_head='none'."
            )

    @property
    def num_levels(self) -> int:
        """L, the codes of one semantic ID."""
        return len(self.codebook_sizes) // self.num_semantic_ids

    @property
    def tokens_per_item(self) -> int:
        """L codes and the BOS that goes with an item of a session, or SEP with one of a history."""
        return self.num_levels + 1

    @property
    def level_offsets(self) -> list[int]:
        """Token id of code 0 of every level, of all IDs one after the other."""
        return [NUM_SPECIAL_TOKENS + sum(self.codebook_sizes[:level]) for level in range(len(self.codebook_sizes))]

    @property
    def bos_token_ids(self) -> list[int]:
        """What a session's items begin with, by the ID that the session is written in."""
        first = NUM_SPECIAL_TOKENS + sum(self.codebook_sizes)
        return [self.bos_token_id, *range(first, first + self.num_semantic_ids - 1)]

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "OneRecConfig":
        """A configuration by preset name (`"debug"`, `"small"`, `"0.05b"`, ..., `"1b"`) with fields overridden.

        Raises:
            ValueError: If there is no preset of that name; the message lists them.
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
        return cls(**(PRESETS[name] | overrides))
