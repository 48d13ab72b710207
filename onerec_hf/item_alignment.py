"""The earlier name of [`onerec_hf.embedding_adaptation`]."""

from .embedding_adaptation import EmbeddingAdaptation as ItemAlignment
from .embedding_adaptation import contrastive_loss, cooccurring_pairs

__all__ = ["ItemAlignment", "contrastive_loss", "cooccurring_pairs"]
