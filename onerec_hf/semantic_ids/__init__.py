"""Semantic IDs: quantization of item embeddings (OneRec section 3.1, Algorithm 1)."""

import os

from onerec_hf.semantic_ids.balanced_kmeans import BalancedKMeans
from onerec_hf.semantic_ids.quantizer import Quantizer, SemanticIds, quantization_report, read_quantizer_file
from onerec_hf.semantic_ids.residual_quantizer import ResidualQuantizer

QUANTIZERS = {"balanced_rkmeans": ResidualQuantizer, "rkmeans": ResidualQuantizer}


def load_quantizer(directory: str | os.PathLike) -> Quantizer:
    """The quantizer of any type that `save_pretrained` wrote into a directory.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a truncated or foreign file, named.
    """
    described = read_quantizer_file(directory)
    if described["quantizer_type"] not in QUANTIZERS:
        raise ValueError(
            f"{directory}: quantizer_type {described['quantizer_type']!r} is not one of {', '.join(QUANTIZERS)}"
        )
    return QUANTIZERS[described["quantizer_type"]].from_pretrained(directory)


__all__ = [
    "BalancedKMeans",
    "Quantizer",
    "ResidualQuantizer",
    "SemanticIds",
    "load_quantizer",
    "quantization_report",
]
