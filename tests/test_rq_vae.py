import numpy as np
import pytest
import torch

from onerec_hf.semantic_ids import RQVAE
from onerec_hf.semantic_ids.rq_vae import _revive_dead_codes


def clustered(num_points=500, dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(12, dim, generator=generator)
    labels = torch.randint(12, (num_points,), generator=generator)
    return 7 + 0.01 * (centers[labels] + torch.randn(num_points, dim, generator=generator))


SETTINGS = {"latent_dim": 6, "hidden_sizes": (32,), "batch_size": 128, "collision_policy": "share"}


class TestRQVAE:
    def test_training_reconstructs_and_uses_every_code(self):
        x = clustered()
        short = RQVAE([8, 4, 4], num_steps=20, **SETTINGS).fit(x).report
        result = RQVAE([8, 4, 4], num_steps=600, **SETTINGS).fit(x)
        # Far from the origin and small in scale, which must not matter.
        assert result.report["reconstruction_error"] < 0.25 < short["reconstruction_error"]
        errors = [level["reconstruction_error"] for level in result.report["levels"]]
        assert errors == sorted(errors, reverse=True)
        assert all(level["use"] == 1 for level in result.report["levels"])
        assert result.quantizer.decode(result.codes).shape == x.shape

    def test_codes_are_the_nearest_ones_of_the_latents(self):
        x = clustered(200)
        quantizer = RQVAE([6, 5], num_steps=40, **SETTINGS)
        codes = quantizer.fit(x).codes
        residual = quantizer.network.encode(x)
        for level, codebook in enumerate(quantizer.codebooks):
            assert codes[:, level].tolist() == torch.cdist(residual, codebook).argmin(1).tolist()
            residual = residual - codebook[codes[:, level]]
        assert np.array_equal(quantizer.encode(x.numpy()), codes)

    def test_same_seed_same_codes_and_the_global_generator_is_left_alone(self):
        x = clustered(200)
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        first = RQVAE([6, 5], num_steps=40, seed=1, **SETTINGS).fit(x)
        assert torch.equal(torch.rand(1), expected)
        again = RQVAE([6, 5], num_steps=40, seed=1, **SETTINGS).fit(x)
        assert np.array_equal(first.codes, again.codes)
        assert all(torch.equal(a, b) for a, b in zip(first.codebooks, again.codebooks, strict=True))
        assert not np.array_equal(first.codes, RQVAE([6, 5], num_steps=40, seed=2, **SETTINGS).fit(x).codes)

    def test_new_items_get_free_ids_by_frozen_weights(self):
        x = clustered(100)
        quantizer = RQVAE([6, 8, 16], num_steps=40, **SETTINGS | {"collision_policy": "nearest_free"})
        codes = quantizer.fit(x).codes
        placed = quantizer.place(x[:20], codes)
        assert len(np.unique(np.concatenate([codes, placed]), axis=0)) == 120
        # Every first code has room for all of them, so only the later codes may have moved.
        assert np.array_equal(placed[:, 0], quantizer.encode(x[:20])[:, 0])

    def test_bad_input(self):
        with pytest.raises(ValueError, match="no codebooks yet"):
            RQVAE([4]).encode(torch.zeros(2, 3))
        with pytest.raises(ValueError, match="all 9 embeddings are equal"):
            RQVAE([4]).fit(torch.ones(9, 3))


def test_dead_codes_are_put_on_residuals_of_the_batch():
    codebook = torch.nn.Parameter(torch.zeros(4, 2))
    used = torch.tensor([True, False, True, False])
    residuals = torch.arange(1.0, 7.0).reshape(3, 2)
    _revive_dead_codes([codebook], [used], [residuals], torch.Generator().manual_seed(0))
    assert torch.equal(codebook[[0, 2]], torch.zeros(2, 2)) and not used.any()
    assert all(any(torch.equal(row, residual) for residual in residuals) for row in codebook[[1, 3]].detach())
