"""Semantic IDs: residual quantization of item embeddings with balanced K-means (OneRec section 3.1, Algorithm 1)."""

from onerec_hf.semantic_ids.balanced_kmeans import BalancedKMeans
from onerec_hf.semantic_ids.residual_quantizer import ResidualQuantizer, SemanticIds, quantization_report

__all__ = ["BalancedKMeans", "ResidualQuantizer", "SemanticIds", "quantization_report"]
