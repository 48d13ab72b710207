import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.semantic_ids import ResidualQuantizer, load_quantizer, make_quantizer, quantization_report
from onerec_hf.semantic_ids.collisions import move_to_free_ids, prefix_ranks, rank_among_equals
from onerec_hf.semantic_ids.quantizer import neighbours_kept
from onerec_hf.semantic_ids.semantic_id_report import sample_items, write_semantic_id_report


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


class TestCollisions:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=30))
    def test_ranks(self, rows):
        codes = np.array(rows)
        ranks = prefix_ranks(codes)
        for depth in (1, 2, 3):
            distinct = sorted({tuple(row[:depth]) for row in rows})
            assert ranks[:, depth - 1].tolist() == [distinct.index(tuple(row[:depth])) for row in rows]
        assert rank_among_equals(codes).tolist() == [rows[:i].count(row) for i, row in enumerate(rows)]

    def test_the_cheaper_item_moves(self):
        codebooks = [torch.tensor([[0.0], [10.0]]), torch.tensor([[0.0], [2.0], [-5.0]])]
        # Both want code 0; the first would lose 1.5^2 - 0.5^2 = 2 by code 1, the second 2.1^2 - 0.1^2 = 4.4.
        latents = torch.tensor([[0.5], [-0.1], [10.2]])
        codes = np.array([[0, 0], [0, 0], [1, 0]])
        none = np.zeros((0, 2), dtype=np.int64)
        assert move_to_free_ids(latents, codes, codebooks, none).tolist() == [[0, 1], [0, 0], [1, 0]]
        # An existing item stays, whatever it costs the new one.
        moved = move_to_free_ids(latents[1:2], codes[1:2], codebooks, np.array([[0, 0], [1, 0]]))
        assert moved.tolist() == [[0, 1]]

    def test_a_full_prefix_sends_its_items_to_the_nearest_one_with_room(self):
        codebooks = [torch.tensor([[0.0], [10.0], [4.0]]), torch.tensor([[0.0], [1.0]])]
        existing = np.array([[0, 0], [0, 1], [2, 0]])
        moved = move_to_free_ids(torch.zeros(4, 1), np.zeros((4, 2), dtype=np.int64)[:3], codebooks, existing)
        assert sorted(map(tuple, moved.tolist())) == [(1, 0), (1, 1), (2, 1)]
        with pytest.raises(ValueError, match="fewer IDs than there are items"):
            move_to_free_ids(torch.zeros(4, 1), np.zeros((4, 2), dtype=np.int64), codebooks, existing)


class TestNewItems:
    @settings(max_examples=40, deadline=None)
    @given(
        policy=st.sampled_from(["nearest_free", "suffix", "share", "error"]),
        copies=st.lists(st.integers(0, 29), max_size=8),
        num_new=st.integers(1, 6),
        seed=st.integers(0, 3),
    )
    def test_ids_stay_one_to_one_and_existing_ones_as_they_are(self, policy, copies, num_new, seed):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(30, 3)).astype(np.float32)
        new = np.concatenate([rng.normal(size=(num_new, 3)).astype(np.float32), x[copies]])
        quantizer = ResidualQuantizer([4, 5, 6], collision_policy=policy, seed=seed)
        try:
            existing = quantizer.fit(x).codes
            placed = quantizer.place(new, existing)
        except ValueError as error:
            assert policy in ("error", "suffix") and ("have the same codes" in str(error) or "suffixes" in str(error))
            return
        codes = np.concatenate([existing, placed])
        assert (placed >= 0).all() and (placed < np.array(quantizer.id_sizes)).all()
        nearest = quantizer.encode(new)
        if policy == "share":
            assert np.array_equal(placed, nearest)
            return
        assert len(np.unique(codes, axis=0)) == len(codes)
        if policy == "suffix":
            assert np.array_equal(placed[:, :3], nearest)
        # Whoever's nearest ID nobody else has or wants gets it.
        wanted = np.concatenate([existing[:, :3], nearest])
        alone = [(wanted == row).all(1).sum() == 1 for row in nearest]
        if policy == "nearest_free":
            contested = [len({tuple(w) for w in wanted if (w[:2] == row[:2]).all()}) for row in nearest]
            size = [(wanted[:, :2] == row[:2]).all(1).sum() for row in nearest]
            alone = [own and distinct == total for own, distinct, total in zip(alone, contested, size, strict=True)]
            assert np.array_equal(placed[alone], nearest[alone])

    def test_suffix_counts_on_and_says_when_it_is_full(self):
        x = clustered(60)
        quantizer = ResidualQuantizer([8, 8], collision_policy="suffix", suffix_size=12)
        existing = quantizer.fit(torch.cat([x, x[:1]])).codes
        assert quantizer.id_sizes == (8, 8, 12)
        held = int((existing[:, :2] == existing[0, :2]).all(1).sum())
        placed = quantizer.place(x[[0] * (12 - held)], existing)
        assert placed[:, 2].tolist() == list(range(held, 12))
        with pytest.raises(ValueError, match="row 1: all 12 suffixes"):
            quantizer.place(x[[0, 0]], np.concatenate([existing, placed[:-1]]))
        with pytest.raises(ValueError, match="raise it to at least"):
            ResidualQuantizer([8, 8], collision_policy="suffix", suffix_size=1).fit(torch.cat([x, x]))

    def test_bad_input(self):
        x = clustered(60)
        quantizer = ResidualQuantizer([8, 8, 8], collision_policy="error")
        with pytest.raises(ValueError, match="no codebooks yet"):
            quantizer.place(x, np.zeros((1, 3), dtype=np.int64))
        existing = ResidualQuantizer([8, 8, 8]).fit(x).codes
        quantizer = ResidualQuantizer.from_codebooks(ResidualQuantizer([8, 8, 8]).fit(x).codebooks)
        with pytest.raises(ValueError, match="15 dimensions, the quantizer was fitted on 16"):
            quantizer.place(x[:, :15], existing)
        with pytest.raises(ValueError, match="expected \\[items, 3\\]"):
            quantizer.place(x, existing[:, :2])
        x[4, 2] = float("nan")
        with pytest.raises(ValueError, match="row 4 holds NaN"):
            quantizer.place(x, existing)


@pytest.fixture(scope="module")
def fitted():
    """One fitted quantizer of each type."""
    x = clustered(300)
    options = {"balanced_rkmeans": {"collision_policy": "suffix"}, "rkmeans": {}, "rqvae": {"num_steps": 30}}
    quantizers = {name: make_quantizer(name, [8, 7, 6], **option) for name, option in options.items()}
    for quantizer in quantizers.values():
        quantizer.fit(x)
    return x, quantizers


class TestFiles:
    @pytest.mark.parametrize("name", ["balanced_rkmeans", "rkmeans", "rqvae"])
    def test_round_trip(self, fitted, name, tmp_path):
        x, quantizer = fitted[0], fitted[1][name]
        quantizer.save_pretrained(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["codebooks.safetensors", "quantizer.json"]
        loaded = load_quantizer(tmp_path)
        assert type(loaded) is type(quantizer) and loaded.quantizer_type == name
        assert loaded._settings() == quantizer._settings() and loaded.id_sizes == quantizer.id_sizes
        codes = quantizer.encode(x)
        assert np.array_equal(loaded.encode(x), codes) and torch.equal(loaded.decode(codes), quantizer.decode(codes))
        assert (
            loaded.fitted_error == quantizer.fitted_error == pytest.approx(float(loaded.quantization_error(x).mean()))
        )

    def test_foreign_truncated_and_mixed_files_are_refused(self, fitted, tmp_path):
        _, quantizers = fitted
        folder, other = tmp_path / "one", tmp_path / "other"
        with pytest.raises(FileNotFoundError, match="quantizer.json is missing"):
            load_quantizer(folder)
        quantizers["rqvae"].save_pretrained(folder)
        quantizers["balanced_rkmeans"].save_pretrained(other)
        weights = (folder / "codebooks.safetensors").read_bytes()
        (folder / "codebooks.safetensors").write_bytes(weights[: len(weights) // 2])
        with pytest.raises(ValueError, match="codebooks.safetensors cannot be read"):
            load_quantizer(folder)
        (folder / "codebooks.safetensors").write_bytes((other / "codebooks.safetensors").read_bytes())
        with pytest.raises(ValueError, match="Files of two quantizers are mixed"):
            load_quantizer(folder)
        (folder / "codebooks.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="codebooks.safetensors is missing"):
            load_quantizer(folder)
        described = (folder / "quantizer.json").read_text()
        (folder / "quantizer.json").write_text(described[:50])
        with pytest.raises(ValueError, match="quantizer.json is not valid JSON"):
            load_quantizer(folder)
        (folder / "quantizer.json").write_text('{"model_type": "bert"}')
        with pytest.raises(ValueError, match="file of something else"):
            load_quantizer(folder)
        (folder / "quantizer.json").write_text(described.replace('"rqvae"', '"vq"'))
        with pytest.raises(ValueError, match="'vq' is not one of"):
            load_quantizer(folder)


class TestQuantizerTypes:
    def test_plain_kmeans_is_less_even_and_nearer(self):
        x = clustered()
        plain = make_quantizer("rkmeans", [16, 16], collision_policy="share").fit(x).report
        balanced = make_quantizer("balanced_rkmeans", [16, 16], collision_policy="share").fit(x).report
        assert plain["reconstruction_error"] < balanced["reconstruction_error"]
        assert plain["levels"][0]["entropy_bits"] < balanced["levels"][0]["entropy_bits"]

    def test_unknown_type_and_settings(self):
        with pytest.raises(ValueError, match="balanced_rkmeans, rkmeans, rqvae, got 'kmeans'"):
            make_quantizer("kmeans", [4])
        with pytest.raises(ValueError, match="not plain K-means"):
            make_quantizer("rkmeans", [4], code_assignment="balanced")


def test_neighbours_kept_by_brute_force():
    x = clustered(80)
    codes = np.random.default_rng(0).integers(0, 3, 80)
    distances = torch.cdist(x, x).fill_diagonal_(torch.inf)
    nearest = distances.topk(10, largest=False).indices.numpy()
    assert neighbours_kept(x, codes) == pytest.approx((codes[nearest] == codes[:, None]).mean())
    assert neighbours_kept(x, np.zeros(80, dtype=int)) == 1 and neighbours_kept(x[:1], codes[:1]) == 0


class TestPictures:
    def test_samples_name_items_of_the_code(self):
        codes = np.array([3, 3, 1, 3, 1, 7])
        rows = sample_items(codes, lambda item: f"item {item}", items_per_code=2)
        assert [(row["code"], row["num_items"]) for row in rows] == [("<a_1>", 2), ("<a_3>", 3), ("<a_7>", 1)]
        assert rows[0]["items"] == ["item 2", "item 4"] and rows[2]["items"] == ["item 5"]
        assert len(rows[1]["items"]) == 2 and set(rows[1]["items"]) < {"item 0", "item 1", "item 3"}

    @pytest.mark.parametrize("num_items", [2, 40])
    def test_all_files_are_written_and_names_escaped(self, num_items, tmp_path):
        x = clustered(num_items)
        codes = np.stack([np.arange(num_items) % 3, np.arange(num_items) // 3], axis=1)
        write_semantic_id_report(tmp_path, x.numpy(), codes, (3, 14), lambda item: f"<item & {item}>")
        assert sorted(os.listdir(tmp_path)) == [
            "code_samples.json",
            "code_use.png",
            "item_map.png",
            "semantic_ids.html",
        ]
        page = (tmp_path / "semantic_ids.html").read_text()
        assert "&lt;item &amp; 0&gt;" in page and "<item" not in page and page.count("data:image/png") == 2
        assert json.loads((tmp_path / "code_samples.json").read_text())[0]["items"][0] == "<item & 0>"


def test_report_by_hand():
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [-1.0, -1.0]])
    codebooks = [torch.tensor([[1.0, 0.0], [-1.0, 0.0], [9.0, 9.0]])]
    codes = np.array([[0, 0], [0, 0], [1, 0], [1, 1]])
    quantizer = ResidualQuantizer.from_codebooks(codebooks)
    quantizer.id_sizes = (3, 2)
    report = quantization_report(x, codes, quantizer)
    assert report["levels"][0] == {
        "codes": 3,
        "used": 2,
        "use": pytest.approx(2 / 3),
        "entropy_bits": 1.0,
        "perplexity": 2.0,
        "min_size": 0,
        "max_size": 2,
        "balance": pytest.approx(4 / 3 / 2),
        "reconstruction_error": pytest.approx(2 / 6),
    }
    assert "reconstruction_error" not in report["levels"][1]
    # Each item has the three others for neighbours, and one of these has its first code.
    assert report["neighbours_kept"] == pytest.approx(1 / 3)
    assert report["collision_rate"] == 0.5 and report["max_items_per_id"] == 2
    assert json.loads(json.dumps(report)) == report
