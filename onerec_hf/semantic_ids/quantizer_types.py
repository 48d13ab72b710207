"""The quantizers of one semantic ID, by the names of their types."""

from onerec_hf.semantic_ids.residual_quantizer import ResidualQuantizer
from onerec_hf.semantic_ids.rq_vae import RQVAE

QUANTIZERS = {"balanced_rkmeans": ResidualQuantizer, "rkmeans": ResidualQuantizer, "rqvae": RQVAE}
