"""Configuration of the OneRec reward model (paper section 3.3.1, eq 5-7)."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..configuration_onerec import NUM_SPECIAL_TOKENS


@strict
class OneRecRewardConfig(PreTrainedConfig):
    r"""
    Configuration of [`OneRecRewardModel`].

    The paper leaves open how the four objectives become one reward. Here the reward of a session is the sum of the
    towers' probabilities weighted by `objective_weights`, which are saved with the model.

    Args:
        codebook_sizes (`list[int]`, *optional*, defaults to `[8192, 8192, 8192]`):
            Number of codes of each semantic-ID level; the default is the paper's.
        vocab_size (`int`, *optional*):
            Number of token ids of the tokenizer. Left out, it is the special tokens and the codes of all levels.
        hidden_size (`int`, *optional*, defaults to 128):
            Width of item vectors and of both attentions.
        num_attention_heads (`int`, *optional*, defaults to 4):
            Heads of the target attention and of the session's self-attention.
        num_hidden_layers (`int`, *optional*, defaults to 1):
            Self-attention layers over the session's items (eq 5 has one).
        tower_hidden_size (`int`, *optional*, defaults to 128):
            Width of the hidden layer of each objective's tower.
        dropout (`float`, *optional*, defaults to 0.1):
            Dropout of the item vectors and towers.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention probabilities.
        history_items (`int`, *optional*, defaults to 256):
            Largest number of history items (n).
        session_items (`int`, *optional*, defaults to 5):
            Largest number of session items (m).
        objectives (`list[str]`, *optional*, defaults to `["swt", "vtr", "wtr", "ltr"]`):
            Names of the towers: session watch time, view, follow and like rate.
        objective_weights (`list[float]`, *optional*):
            Weight of each objective in the reward; 1 each when left out. An objective of weight 0 is still trained.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial embeddings.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer normalisations.
        pad_token_id (`int`, *optional*, defaults to 0):
            Token id that stands in place of the codes of a missing item.
    """

    model_type = "onerec_reward"
    keys_to_ignore_at_inference = ["probabilities", "reward"]

    codebook_sizes: list[int] | tuple[int, ...] = (8192, 8192, 8192)
    vocab_size: int | None = None
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_hidden_layers: int = 1
    tower_hidden_size: int = 128
    dropout: float = 0.1
    attention_dropout: float = 0.0
    history_items: int = 256
    session_items: int = 5
    objectives: list[str] | tuple[str, ...] = ("swt", "vtr", "wtr", "ltr")
    objective_weights: list[float] | None = None
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        self.codebook_sizes = list(self.codebook_sizes)
        if self.vocab_size is None:
            self.vocab_size = NUM_SPECIAL_TOKENS + sum(self.codebook_sizes)
        self.objectives = list(self.objectives)
        if self.objective_weights is None:
            self.objective_weights = [1.0] * len(self.objectives)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}): change one of them."
            )
        if self.vocab_size < NUM_SPECIAL_TOKENS + sum(self.codebook_sizes):
            raise ValueError(
                f"vocab_size ({self.vocab_size}) is smaller than the {NUM_SPECIAL_TOKENS} special tokens and the "
                f"{sum(self.codebook_sizes)} codes of codebook_sizes {self.codebook_sizes}: give the tokenizer's "
                "vocab_size."
            )
        if not self.objectives or len(set(self.objectives)) != len(self.objectives):
            raise ValueError(f"objectives must be a non-empty list of distinct names, got {self.objectives}.")
        if len(self.objective_weights) != len(self.objectives):
            raise ValueError(
                f"objective_weights has {len(self.objective_weights)} values for {len(self.objectives)} objectives "
                f"({', '.join(self.objectives)}): give one weight for each."
            )


__all__ = ["OneRecRewardConfig"]
