import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.semantic_ids import ResidualQuantizer, quantization_report


def clustered(num_points=600, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(40, dim, generator=generator)
    labels = torch.multinomial(torch.rand(40, generator=generator) ** 3, num_points, True, generator=generator)
    return centers[labels] + torch.randn(num_points, dim, generator=generator)


class TestResidualQuantizer:
    def test_codes_are_nearest_centroids_of_residuals(self):
        x = clustered()
        quantizer = ResidualQuantizer([8, 8, 8], collision_policy="share")
        result = quantizer.fit(x)
        residual = x.clone()
        for level, codebook in enumerate(result.codebooks):
            codes = torch.cdist(residual, codebook).argmin(1)
            assert result.codes[:, level].tolist() == codes.tolist()
            residual -= codebook[codes]
        assert torch.allclose(x - quantizer.decode(result.codes), residual, atol=1e-5)
        frozen = ResidualQuantizer.from_codebooks(result.codebooks)
        assert np.array_equal(frozen.encode(x), result.codes)

    def test_balanced_codes(self):
        result = ResidualQuantizer([8, 8, 8], code_assignment="balanced", collision_policy="share").fit(clustered())
        for level in result.report["levels"]:
            assert level["min_size"] == level["max_size"] == 75 and level["entropy_bits"] == pytest.approx(3)

    @settings(max_examples=40, deadline=None)
    @given(
        distinct=st.integers(2, 12),
        copies=st.lists(st.integers(0, 11), max_size=20),
        sizes=st.lists(st.integers(2, 4), min_size=1, max_size=3),
        policy=st.sampled_from(["nearest_free", "suffix"]),
        seed=st.integers(0, 3),
    )
    def test_one_to_one_with_duplicate_embeddings(self, distinct, copies, sizes, policy, seed):
        x = np.random.default_rng(seed).normal(size=(distinct, 3)).astype(np.float32)
        x = np.concatenate([x, x[[copy % distinct for copy in copies]]])
        quantizer = ResidualQuantizer(sizes, collision_policy=policy, seed=seed)
        if max(sizes) > len(x) or (policy == "nearest_free" and np.prod(sizes) < len(x)):
            with pytest.raises(ValueError, match="codebook_sizes"):
                quantizer.fit(x)
            return
        result = quantizer.fit(x)
        assert len(np.unique(result.codes, axis=0)) == len(x)
        assert (result.codes >= 0).all() and (result.codes < np.array(result.codebook_sizes)).all()
        assert result.report["collision_rate"] == 0 and result.report["max_items_per_id"] == 1

    def test_every_id_in_use(self):
        result = ResidualQuantizer([3, 2, 4]).fit(np.repeat(np.random.default_rng(0).normal(size=(4, 5)), 6, axis=0))
        assert len(np.unique(result.codes, axis=0)) == 24 == 3 * 2 * 4

    def test_nearest_free_moves_the_last_code_only_and_as_little_as_it_can(self):
        x = clustered(300)
        x = torch.cat([x, x[:5]])
        shared = ResidualQuantizer([8, 8, 64], collision_policy="share").fit(x)
        free = ResidualQuantizer([8, 8, 64]).fit(x)
        assert np.array_equal(shared.codes[:, :2], free.codes[:, :2])
        alone = np.unique(shared.codes[:, :2], axis=0, return_inverse=True, return_counts=True)
        untouched = alone[2][alone[1]] == 1
        assert untouched.any() and np.array_equal(shared.codes[untouched], free.codes[untouched])
        assert shared.report["reconstruction_error"] < free.report["reconstruction_error"]

    def test_error_policy_names_the_items(self):
        x = clustered(50)
        x[40] = x[3]
        with pytest.raises(ValueError, match="items of rows .* have the same codes"):
            ResidualQuantizer([16, 16, 16], collision_policy="error").fit(x)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="64 codes for a catalogue of 50 items"):
            ResidualQuantizer([64, 8]).fit(clustered(50))
        with pytest.raises(ValueError, match="all 9 embeddings are equal"):
            ResidualQuantizer([2, 2]).fit(torch.ones(9, 4))
        with pytest.raises(ValueError, match="row 7 holds NaN"):
            x = clustered(50)
            x[7, 0] = float("inf")
            ResidualQuantizer([4, 4]).fit(x)


def test_report_by_hand():
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [-1.0, -1.0]])
    codebooks = [torch.tensor([[1.0, 0.0], [-1.0, 0.0], [9.0, 9.0]])]
    codes = np.array([[0, 0], [0, 0], [1, 0], [1, 1]])
    report = quantization_report(x, codes, codebooks, [3, 2])
    assert report["levels"][0] == {
        "codes": 3,
        "used": 2,
        "use": pytest.approx(2 / 3),
        "entropy_bits": 1.0,
        "perplexity": 2.0,
        "min_size": 0,
        "max_size": 2,
        "reconstruction_error": pytest.approx(2 / 6),
    }
    assert "reconstruction_error" not in report["levels"][1]
    assert report["collision_rate"] == 0.5 and report["max_items_per_id"] == 2
    assert json.loads(json.dumps(report)) == report
