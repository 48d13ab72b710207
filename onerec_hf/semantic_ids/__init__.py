"""Semantic IDs: quantization of item embeddings (OneRec section 3.1, Algorithm 1)."""

import math
import os
from collections.abc import Sequence

from onerec_hf.semantic_ids.balanced_kmeans import BalancedKMeans
from onerec_hf.semantic_ids.quantizer import Quantizer, SemanticIds, quantization_report, read_quantizer_file
from onerec_hf.semantic_ids.quantizer_types import QUANTIZERS
from onerec_hf.semantic_ids.residual_quantizer import ResidualQuantizer
from onerec_hf.semantic_ids.rq_vae import RQVAE
from onerec_hf.semantic_ids.several_quantizers import SEMANTIC_ID_SOURCES, SeveralQuantizers, shared_pairs


def make_quantizer(quantizer_type: str, codebook_sizes: Sequence[int], **settings) -> Quantizer:
    """An unfitted quantizer by the name of its type; `settings` are arguments of its class."""
    if quantizer_type not in QUANTIZERS:
        raise ValueError(f"quantizer_type must be one of {', '.join(QUANTIZERS)}, got {quantizer_type!r}")
    if quantizer_type == "rkmeans":
        settings = {"assignment": "nearest"} | settings
    return QUANTIZERS[quantizer_type](codebook_sizes, **settings)


def codebook_sizes_for(num_items: int) -> list[int]:
    """Three levels, the first two of which could already tell the items of a catalogue apart.

    >>> codebook_sizes_for(2_000), codebook_sizes_for(12_101), codebook_sizes_for(1_000_000)
    ([64, 64, 64], [128, 128, 128], [1024, 1024, 1024])
    """
    return [2 ** math.ceil(math.log2(num_items) / 2)] * 3


def load_quantizer(directory: str | os.PathLike) -> Quantizer:
    """The quantizer of any type that `save_pretrained` wrote into a directory.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a truncated or foreign file, named.
    """
    quantizer_type = read_quantizer_file(directory)["quantizer_type"]
    known = {**QUANTIZERS, SeveralQuantizers.quantizer_type: SeveralQuantizers}
    if quantizer_type not in known:
        raise ValueError(f"{directory}: quantizer_type {quantizer_type!r} is not one of {', '.join(known)}")
    return known[quantizer_type].from_pretrained(directory)


def make_several_quantizers(
    num_semantic_ids: int, quantizer_type: str, codebook_sizes: Sequence[int], sources: str, seed: int = 0, **settings
) -> Quantizer:
    """As [`make_quantizer`], for so many semantic IDs of every item, each of `codebook_sizes`.

    Args:
        sources: those of [`SeveralQuantizers`]; of no meaning for one ID.
        seed: of the first ID and of the projections.
    """
    # The levels of one ID draw by the seeds from its own on.
    seeds = [seed + number * len(codebook_sizes) for number in range(num_semantic_ids)]
    members = [make_quantizer(quantizer_type, codebook_sizes, seed=own, **settings) for own in seeds]
    return members[0] if num_semantic_ids == 1 else SeveralQuantizers(members, sources, seed)
