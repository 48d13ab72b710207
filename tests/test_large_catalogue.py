"""What large catalogues need, on small ones: samples, blocks and files that are mapped give what they must."""

import warnings

import numpy as np
import pytest
import torch
from scipy import sparse

from onerec_hf import co_consumption
from onerec_hf.co_consumption import item_associations, item_similarities
from onerec_hf.large_truncated_svd import large_truncated_svd
from onerec_hf.semantic_ids import ResidualQuantizer, collisions, load_quantizer, quantizer
from onerec_hf.semantic_ids.balanced_kmeans import BalancedKMeans, Residuals
from onerec_hf.semantic_ids.collisions import collision_summary

SIZES = [16, 16, 16]


@pytest.fixture(scope="module")
def points():
    random = np.random.default_rng(0)
    centers = 2 * random.normal(size=(30, 12))
    x = centers[random.integers(30, size=4000) ** 2 % 30] + random.normal(size=(4000, 12)) + 5
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def mapped(points, tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings") / "embeddings.npy"
    np.save(path, points)
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("code_assignment", ["nearest", "balanced"])
def test_codes_of_a_mapped_file_are_those_of_an_array(points, mapped, code_assignment, tmp_path):
    fits = []
    for x in (torch.from_numpy(points.copy()), mapped):
        model = ResidualQuantizer(SIZES, code_assignment=code_assignment, fitted_items=1000, collision_policy="share")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fits.append(model.fit(x))
    assert np.array_equal(fits[0].codes, fits[1].codes) and fits[0].report == fits[1].report
    assert fits[1].report["fitted_items"] == 1000
    fits[1].quantizer.save_pretrained(tmp_path)
    assert load_quantizer(tmp_path).fitted_items == 1000
    if code_assignment == "nearest":
        residual = points.copy()
        for level, codebook in enumerate(fits[1].codebooks):
            nearest = torch.cdist(torch.from_numpy(residual), codebook).argmin(1).numpy()
            assert np.array_equal(nearest, fits[1].codes[:, level])
            residual -= codebook.numpy()[nearest]
        assert fits[1].quantizer.fitted_error == pytest.approx(np.square(residual).sum(1).mean(), rel=1e-5)


@pytest.mark.parametrize("assignment", ["transport", "greedy"])
def test_codes_are_balanced_whatever_they_were_fitted_on(points, assignment):
    # 4,000 items and 16 codes, then 3,997: sizes that differ by one.
    for num_items in (4000, 3997):
        settings = {"assignment": assignment, "code_assignment": "balanced", "collision_policy": "share"}
        whole = ResidualQuantizer(SIZES, **settings).fit(points[:num_items])
        sampled = ResidualQuantizer(SIZES, fitted_items=2000, **settings).fit(points[:num_items])
        for level in range(3):
            sizes = np.bincount(sampled.codes[:, level], minlength=16)
            assert sorted(np.unique(sizes)) == sorted({num_items // 16, -(-num_items // 16)})
        if assignment == "transport":  # the greedy one's last clusters are what nobody wanted
            assert sampled.report["reconstruction_error"] < 1.1 * whole.report["reconstruction_error"]


def test_the_assignment_of_a_sample_s_clusters_costs_little_more_than_that_of_all(points):
    x = torch.from_numpy(points)
    whole = BalancedKMeans(32).fit(x)
    sampled = BalancedKMeans(32).fit(x[torch.randperm(4000, generator=torch.Generator().manual_seed(0))[:2048]])
    labels = sampled.assign(x)
    assert torch.bincount(labels).tolist() == [125] * 32
    for kmeans, bound in ((whole, 1.02), (sampled, 1.1)):
        assert (x - kmeans.centroids[kmeans.assign(x)]).square().sum() < bound * whole.inertia
    # Residuals that are computed block by block are those that are held.
    codebook, codes = torch.randn(7, 12, generator=torch.Generator().manual_seed(1)), torch.arange(4000) % 7
    by_block = sampled.assign(Residuals(x, [codebook], [codes]))
    assert torch.equal(by_block, sampled.assign(x - codebook[codes]))
    with pytest.raises(ValueError, match="call predict"):
        BalancedKMeans(4, "nearest").fit(x[:50]).assign(x)


def test_points_that_all_want_one_cluster_are_spread_evenly(points):
    kmeans = BalancedKMeans(8).fit(points[:800])
    labels = kmeans.assign(torch.from_numpy(points[:1]).expand(1001, -1))
    assert sorted(torch.bincount(labels).tolist()) == [125] * 7 + [126]


def test_what_is_fitted_goes_by_the_catalogue():
    of_default = ResidualQuantizer([4])
    for num_items, size, expected in ((2**18, 4096, 2**18), (10**7, 4096, 2**18), (10**7, 8192, 2**19), (9, 4, 9)):
        assert of_default._num_fitted(num_items, size) == expected
    with pytest.raises(ValueError, match="fitted_items must be at least the largest of codebook_sizes, 16, got 15"):
        ResidualQuantizer(SIZES, fitted_items=15)


def test_the_report_in_blocks(points, monkeypatch):
    model = ResidualQuantizer(SIZES)
    whole = model.fit(points)
    monkeypatch.setattr(quantizer, "ITEMS_AT_ONCE", 300)
    monkeypatch.setattr(quantizer, "NUMBERS_AT_ONCE", 300 * 77)
    in_blocks = quantizer.quantization_report(points, whole.codes, model)
    for name, value in in_blocks.items():
        if name == "levels":
            for level, expected in zip(value, whole.report["levels"], strict=True):
                assert level == pytest.approx(expected, rel=1e-6)
        else:
            assert value == whole.report[name] or name == "reconstruction_error"
    drawn = torch.randperm(4000, generator=torch.Generator().manual_seed(0))[:1000]
    distances = torch.cdist(torch.from_numpy(points)[drawn].double(), torch.from_numpy(points).double())
    nearest = distances.topk(11, largest=False).indices[:, 1:].numpy()
    kept = (whole.codes[:, 0][nearest] == whole.codes[drawn.numpy(), 0][:, None]).mean()
    assert in_blocks["neighbours_kept"] == pytest.approx(kept, abs=1e-12)


def test_collisions_in_blocks(points, monkeypatch):
    x = np.concatenate([points[:400], np.repeat(points[:2], 100, axis=0)])
    whole = ResidualQuantizer([4, 8, 32]).fit(x)
    assert whole.report["moved_items"] > 150 and len(np.unique(whole.codes, axis=0)) == 600
    monkeypatch.setattr(collisions, "ROWS_AT_ONCE", 5)
    assert np.array_equal(ResidualQuantizer([4, 8, 32]).fit(x).codes, whole.codes)


@pytest.mark.parametrize("largest", [3, 2**40])
def test_collisions_are_counted_whatever_the_size_of_codes(largest):
    codes = np.random.default_rng(0).integers(4, size=(60, 3)) * (largest // 3)
    counts = np.unique(codes, axis=0, return_counts=True)[1]
    assert collision_summary(codes) == (counts[counts > 1].sum() / 60, counts.max())


@pytest.fixture(scope="module")
def log():
    random = np.random.default_rng(0)
    histories = [(25 * random.random(random.integers(0, 12)) ** 2).astype(np.int64) for _ in range(40)]
    return np.repeat(np.arange(40), [len(history) for history in histories]), np.concatenate(histories), histories


class TestCoOccurrence:
    def test_associations_counted_a_few_items_at_a_time(self, log, monkeypatch):
        users, items, _ = log
        whole = item_associations(users, items, 25, window=3)
        monkeypatch.setattr(co_consumption, "PAIRS_AT_ONCE", 40)
        monkeypatch.setattr(co_consumption, "PLACES_AT_ONCE", 7)
        parts = item_associations(users, items, 25, window=3)
        for name in ("data", "indices", "indptr"):
            assert np.array_equal(getattr(whole, name), getattr(parts, name))
        kept = item_associations(users, items, 25, window=3, per_item=2).toarray()
        for row, own in zip(whole.toarray(), kept, strict=True):
            largest = np.argsort(-row, kind="stable")[:2]
            assert np.array_equal(own, np.where(np.isin(np.arange(25), largest), row, 0))

    def test_similarities_of_a_few_items_at_a_time(self, log, monkeypatch):
        whole = item_similarities(log[2], 25, neighbours=4, shrinkage=1.0)
        monkeypatch.setattr(co_consumption, "PAIRS_AT_ONCE", 40)
        parts = item_similarities(log[2], 25, neighbours=4, shrinkage=1.0)
        assert (whole != parts).nnz == 0 and np.array_equal(whole.indices, parts.indices)


def test_truncated_svd_in_place(monkeypatch):
    random = np.random.default_rng(0)
    factors = random.normal(size=(500, 6)) @ (np.array([50, 20, 10, 5, 2, 1])[:, None] * random.normal(size=(6, 80)))
    matrix = sparse.csr_matrix(np.where(random.random((500, 80)) < 0.5, factors, 0))
    monkeypatch.setattr("onerec_hf.large_truncated_svd.ROWS_AT_ONCE", 64)
    left, lengths, _ = np.linalg.svd(matrix.toarray(), full_matrices=False)
    found = large_truncated_svd(matrix, 4, power=0.5, seed=0)
    expected = left[:, :4] * lengths[:4] ** 0.5
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.abs(np.sum(found * expected, axis=0)), lengths[:4], rtol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), lengths[:4] ** 0.5, rtol=1e-3)
    # A matrix of fewer directions than are asked for has zeros in the others.
    thin = large_truncated_svd(sparse.csr_matrix(np.outer(np.arange(1.0, 30), np.ones(25))), 3, power=0.5, seed=0)
    assert np.abs(thin[:, 1:]).max() == 0 and np.linalg.norm(thin[:, 0]) > 1
