"""Semantic IDs: quantization of item embeddings (OneRec section 3.1, Algorithm 1)."""

import os
from collections.abc import Sequence

from onerec_hf.semantic_ids.balanced_kmeans import BalancedKMeans
from onerec_hf.semantic_ids.quantizer import Quantizer, SemanticIds, quantization_report, read_quantizer_file
from onerec_hf.semantic_ids.residual_quantizer import ResidualQuantizer
from onerec_hf.semantic_ids.rq_vae import RQVAE

QUANTIZERS = {"balanced_rkmeans": ResidualQuantizer, "rkmeans": ResidualQuantizer, "rqvae": RQVAE}


def make_quantizer(quantizer_type: str, codebook_sizes: Sequence[int], **settings) -> Quantizer:
    """An unfitted quantizer by the name of its type; `settings` are arguments of its class."""
    if quantizer_type not in QUANTIZERS:
        raise ValueError(f"quantizer_type must be one of {', '.join(QUANTIZERS)}, got {quantizer_type!r}")
    if quantizer_type == "rkmeans":
        settings = {"assignment": "nearest"} | settings
    return QUANTIZERS[quantizer_type](codebook_sizes, **settings)


def load_quantizer(directory: str | os.PathLike) -> Quantizer:
    """The quantizer of any type that `save_pretrained` wrote into a directory.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a truncated or foreign file, named.
    """
    quantizer_type = read_quantizer_file(directory)["quantizer_type"]
    if quantizer_type not in QUANTIZERS:
        raise ValueError(f"{directory}: quantizer_type {quantizer_type!r} is not one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[quantizer_type].from_pretrained(directory)
