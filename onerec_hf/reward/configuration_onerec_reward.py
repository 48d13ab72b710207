"""Configuration of the OneRec reward model (paper section 3.3.1, eq 5-7)."""

from functools import partial
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..configuration_onerec import NUM_SPECIAL_TOKENS, require_ranges
from ..typed_arguments import typed_arguments, typed_value

LABEL_KINDS = ("binary", "share", "quantile")
SCALARS = ("weighted_sum", "z_score")
DEFAULT_OBJECTIVES = (
    {"name": "swt", "source": "watch_time", "kind": "share"},
    {"name": "vtr", "source": "view", "kind": "binary"},
    {"name": "wtr", "source": "follow", "kind": "binary"},
    {"name": "ltr", "source": "like", "kind": "binary"},
)
OBJECTIVE_FIELDS = {"name", "source", "kind", "weight", "positive_weight", "quantiles"}


def _with_weights(objective: dict[str, Any]) -> dict[str, Any]:
    weights = {field: objective.get(field, 1.0) for field in ("weight", "positive_weight")}
    named = {field: f"objective {objective.get('name')!r}: {field}" for field in weights}
    return objective | {field: typed_value(weights[field], named[field], float) for field in weights}


@partial(typed_arguments, read_text=False)
@strict
class OneRecRewardConfig(PreTrainedConfig):
    r"""Configuration of [`OneRecRewardModel`].

    The paper leaves open how the objectives become one reward. Here it is a sum over the objectives, weighted by their
    `weight`, of the calibrated probabilities (`scalar` "weighted_sum") or of their distances from `objective_means` in
    units of `objective_deviations` ("z_score"); all of it is saved with the model.

    Args:
        codebook_sizes: Number of codes of each semantic-ID level; the default is the paper's.
        vocab_size: Token ids of the tokenizer; by default the special tokens and the codes of all levels.
        hidden_size: Width of item vectors and of both attentions.
        num_attention_heads: Heads of the target attention and of the session's self-attention.
        num_hidden_layers: Self-attention layers over the session's items (eq 5 has one).
        tower_hidden_size: Width of the hidden layer of each objective's tower.
        feature_size: Width of the embedding of a feature's value, of items and of users.
        num_members: E, members of the ensemble that share the weights after the target attention.
        dropout: Dropout of the item vectors and towers.
        history_items, session_items: The most behaviours that a session's item attends to (n), and session items (m).
        objectives: What is estimated, each with a tower: `name`; `source`, a feedback column; `kind` of label,
            "binary" (the share of the items whose source is more than 0), "share" (of the duration, summed over the
            session) or "quantile" (of the source in the fitted period; its bounds are saved as `quantiles`); `weight`
            in the reward, 1 by default (of weight 0 it is still trained); `positive_weight` of the positive part of
            its loss, 1 by default, for rare events. By default swt (share of watch time), vtr (view), wtr (follow) and
            ltr (like). The name alone stands for one of these.
        focal_gamma: Exponent of the focal loss, which counts well-judged labels less; 0 is plain cross-entropy.
        objective_means, objective_deviations: Of the calibrated probabilities, by objective; for "z_score". Set by
            [`fit_calibration`].
        feedback: Feedback columns of the user's exposures, in the order in which rows hold them. Without any the
            history is read without feedback.
        signals: What is counted of them, see data/exposures.py.
        rate_prior: Exposures' worth of the overall mean in the smoothed rates of users and items.
        match_prior: The same for a user's rates with items that share a feature, and for their taste.
        taste_size: Width of the space in which an item is compared with all that the user liked and was shown, by
            their embeddings; 0 for no such comparison.
        num_items: Items whose features are saved; later items of the catalogue count as unknown.
        item_features: Column of each of the K feature places of an item; a column of lists has several.
        item_embedding_size: Width of the items' embeddings, of their content; 0 for none.
        numeric_features: Numeric columns of the items, read as ranks beside their bins among `item_features`.
        num_item_values: Values of all item features, 0 for unknown among them.
        user_features: Known values by column of the user's profile; other values count as unknown.
        catalogue_fingerprint: [`OneRecTokenizer.catalogue_fingerprint`] of the items and semantic IDs that the model
            was trained on, with which it is used; None: not known.
        pad_token_id: Token id that stands in place of the codes of a missing item.
    """

    model_type = "onerec_reward"
    keys_to_ignore_at_inference = ["probabilities", "reward"]

    codebook_sizes: list[int] | tuple[int, ...] = (8192, 8192, 8192)
    vocab_size: int | None = None
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_hidden_layers: int = 1
    tower_hidden_size: int = 128
    feature_size: int = 4
    num_members: int = 4
    dropout: float = 0.2
    attention_dropout: float = 0.0
    history_items: int = 256
    session_items: int = 5
    objectives: list[Any] | tuple[Any, ...] = DEFAULT_OBJECTIVES
    focal_gamma: float = 0.0
    scalar: str = "weighted_sum"
    objective_means: list[float] | None = None
    objective_deviations: list[float] | None = None
    feedback: list[str] | tuple[str, ...] = ()
    signals: list[str] | tuple[str, ...] = ()
    rate_prior: float = 20.0
    match_prior: float = 5.0
    taste_size: int = 0
    num_items: int = 0
    item_features: list[str] | tuple[str, ...] = ()
    item_embedding_size: int = 0
    numeric_features: list[str] | tuple[str, ...] = ()
    num_item_values: int = 1
    user_features: dict[str, list[str]] | None = None
    catalogue_fingerprint: str | None = None
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        self.codebook_sizes = list(self.codebook_sizes)
        if self.vocab_size is None:
            self.vocab_size = NUM_SPECIAL_TOKENS + sum(self.codebook_sizes)
        known = {objective["name"]: objective for objective in DEFAULT_OBJECTIVES}
        named = [known.get(entry, {"name": entry}) if isinstance(entry, str) else entry for entry in self.objectives]
        self.objectives = [_with_weights(entry) for entry in named]
        self.feedback, self.signals = list(self.feedback), list(self.signals)
        self.item_features, self.numeric_features = list(self.item_features), list(self.numeric_features)
        self.user_features = dict(self.user_features or {})
        super().__post_init__(**kwargs)

    @property
    def objective_names(self) -> list[str]:
        return [objective["name"] for objective in self.objectives]

    @property
    def objective_weights(self) -> list[float]:
        return [objective["weight"] for objective in self.objectives]

    def validate_architecture(self):
        """Part of `@strict`-powered validation: sizes, and fields that only make sense together."""
        sizes = ("hidden_size", "num_attention_heads", "tower_hidden_size", "feature_size", "num_members")
        counts = ("num_hidden_layers", "taste_size", "num_items", "item_embedding_size", "num_item_values")
        least = {1: (*sizes, "history_items", "session_items"), 0: counts}
        require_ranges(self, least, ["num_hidden_layers"], "layer_norm_eps")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}): change one of them."
            )
        if self.taste_size and not self.item_embedding_size:
            raise ValueError(
                f"taste_size is {self.taste_size}, but items have no embeddings to be compared by: leave it at 0."
            )
        if self.vocab_size < NUM_SPECIAL_TOKENS + sum(self.codebook_sizes):
            raise ValueError(
                f"vocab_size ({self.vocab_size}) is smaller than the {NUM_SPECIAL_TOKENS} special tokens and the "
                f"{sum(self.codebook_sizes)} codes of codebook_sizes {self.codebook_sizes}: give the tokenizer's "
                "vocab_size."
            )
        self._validate_objectives()
        if self.scalar not in SCALARS:
            raise ValueError(f"scalar must be one of {', '.join(SCALARS)}, got {self.scalar!r}.")
        for name in ("objective_means", "objective_deviations"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.objectives):
                raise ValueError(
                    f"{name} has {len(values)} values for {len(self.objectives)} objectives: give one each."
                )
        if self.scalar == "z_score" and self.objective_deviations is not None and min(self.objective_deviations) <= 0:
            raise ValueError(f"objective_deviations must be more than 0, got {self.objective_deviations}.")

    def _validate_objectives(self):
        for objective in self.objectives:
            missing = {"name", "source", "kind"} - set(objective)
            unknown = set(objective) - OBJECTIVE_FIELDS
            if missing or unknown:
                raise ValueError(
                    f"objective {objective} lacks {', '.join(sorted(missing)) or 'nothing'} and has the unknown "
                    f"fields {', '.join(sorted(unknown)) or 'none'}: give name, source and kind, and at most weight "
                    "and positive_weight beside them."
                )
            if objective["kind"] not in LABEL_KINDS:
                raise ValueError(
                    f"objective '{objective['name']}' has the kind {objective['kind']!r}: use one of "
                    f"{', '.join(LABEL_KINDS)}."
                )
            if objective["weight"] is None or not (objective["positive_weight"] or 0) > 0:
                raise ValueError(
                    f"objective '{objective['name']}': weight must be a number, and positive_weight more than 0."
                )
        if not self.objectives or len(set(self.objective_names)) != len(self.objectives):
            raise ValueError(f"objectives must be a non-empty list of distinct names, got {self.objective_names}.")
