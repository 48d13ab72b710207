import copy
import gc
import itertools
import json
import os
import pickle
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, pipeline

import onerec_hf
from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, Recommender, item_index
from onerec_hf.item_index import ItemIdLookup, as_item_ids, item_id_array
from onerec_hf.pretraining import SessionCollator
from onerec_hf.semantic_ids import ResidualQuantizer
from onerec_hf.tokenization_onerec import OneRecTokenizer

SIZES = (3, 4, 5)
CODES = np.array([[0, 0, 0], [0, 0, 1], [2, 3, 4], [1, 2, 3], [2, 0, 0]])
INTEGER_IDS = [100, 7, 55, 2**40, -3]
STRING_IDS = ["B001", "7", "ünï", "x y", "B002"]


def build(item_ids=INTEGER_IDS, codes=CODES, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    codebooks = [torch.randn(size, 2, generator=generator) for size in sizes]
    return OneRecTokenizer.from_semantic_ids(item_ids, codes, codebooks, {"reconstruction_error": 0.25})


def points(count, seed=0, dim=4):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def fitted(item_ids=tuple(range(30)), policy="nearest_free", sizes=(4, 4, 8), **settings):
    quantizer = ResidualQuantizer(list(sizes), collision_policy=policy, max_iterations=5, **settings)
    return OneRecTokenizer.fit(item_ids, points(len(item_ids)), quantizer)


class TestItemIndex:
    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_look_up_against_a_dict(self, data):
        ids = data.draw(st.sampled_from([st.integers(-(2**63), 2**63 - 1), st.text(max_size=20)]))
        catalogue = data.draw(st.lists(ids, min_size=1, max_size=12, unique=True))
        wanted = data.draw(st.lists(st.sampled_from(catalogue) | ids, max_size=12))
        expected = [catalogue.index(item) if item in catalogue else -1 for item in wanted]
        ids = item_id_array(as_item_ids(catalogue))
        assert ids.tolist() == catalogue
        wanted = as_item_ids(wanted) if wanted else as_item_ids(catalogue)[:0]
        assert ItemIdLookup(ids).find(wanted).tolist() == expected

    @pytest.mark.parametrize("item_ids", [INTEGER_IDS, STRING_IDS])
    def test_kinds_of_columns(self, item_ids):
        tokenizer = build(np.array(item_ids))
        some = item_ids[3:0:-1]
        columns = [some, np.array(some), pd.Series(some), pd.Index(some), pa.array(some), pa.chunked_array([some, []])]
        if item_ids is STRING_IDS:
            columns += [np.array(some, dtype=object), tokenizer.item_ids[3:0:-1], pd.Series(some, dtype="category")]
        for column in columns:
            assert tokenizer.item_index(column).tolist() == [3, 2, 1]

    def test_strings_with_equal_hashes(self, monkeypatch):
        hash_array, salts = pd.util.hash_array, []

        def colliding(values, hash_key, categorize):
            salts.append(hash_key)
            hashes = hash_array(values, hash_key=hash_key, categorize=categorize)
            return hashes % 2 if hash_key == salts[0] else hashes

        monkeypatch.setattr(item_index.pd.util, "hash_array", colliding)
        tokenizer = build(STRING_IDS)
        assert tokenizer.item_index([*STRING_IDS, "7x"], unknown_items="skip").tolist() == [0, 1, 2, 3, 4, -1]
        assert len(set(salts)) == 2
        salts.clear()
        with pytest.raises(ValueError, match="holds 'x y' twice, in rows 1 and 3"):
            build(["B001", "x y", "7", "x y", "B002"])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=12), st.data())
    def test_items_of_shared_ids(self, codes, data):
        removed = data.draw(st.lists(st.sampled_from(range(len(codes))), max_size=len(codes) - 1, unique=True))
        tokenizer = OneRecTokenizer.from_semantic_ids(range(len(codes)), np.array(codes), codebook_sizes=[2, 3])
        tokenizer.remove_items(removed)
        for code in [(a, b) for a in range(2) for b in range(3)]:
            items = sorted(np.flatnonzero([code == other for other in codes]), key=lambda item: item in removed)
            assert tokenizer.items_of_semantic_id(code) == items
            assert tokenizer.codes_to_index([code]).tolist() == [items[0] if items else -1]

    def test_no_python_object_per_item(self, tmp_path):
        count = 20_000
        ids, codes = [f"item-{i:09d}" for i in range(count)], np.random.default_rng(0).integers(99, size=(count, 3))
        OneRecTokenizer.from_semantic_ids(ids, codes, codebook_sizes=[99] * 3).save_pretrained(tmp_path)
        OneRecTokenizer.from_pretrained(tmp_path)
        gc.collect()
        before = sys.getallocatedblocks()
        tokenizer = OneRecTokenizer.from_pretrained(tmp_path)
        tokenizer.encode_histories([ids[:50]])
        gc.collect()
        assert sys.getallocatedblocks() - before < count / 4
        assert tokenizer.codes.dtype == np.uint8 and isinstance(tokenizer.item_ids.dtype, np.dtypes.StringDType)


class TestVocabulary:
    def test_special_tokens_have_fixed_low_ids(self):
        tokenizer = build()
        tokens = ["<pad>", "<eos>", "<bos>", "<sep>", "<unk>", "<a_0>", "<b_0>", "<c_4>"]
        assert tokenizer.convert_tokens_to_ids(tokens) == [0, 1, 2, 3, 4, 5, 8, 16]
        assert tokenizer.vocab_size == len(tokenizer) == 17
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
        assert tokenizer.level_offsets == (5, 8, 12)
        assert tokenizer.item_token_ids.tolist()[2] == [7, 11, 16]

    def test_text_is_split_with_and_without_spaces(self):
        tokenizer = build()
        assert tokenizer("<a_2><b_3><c_4>")["input_ids"] == [7, 11, 16]
        assert tokenizer("<bos> <a_2> <b_3><c_4><sep>")["input_ids"] == [2, 7, 11, 16, 3]
        assert tokenizer("<a_3> hello")["input_ids"] == [4, 4]
        assert tokenizer.decode([2, 7, 11, 16]) == "<bos><a_2><b_3><c_4>"
        assert tokenizer.decode([2, 7, 11, 16], skip_special_tokens=True) == "<a_2><b_3><c_4>"

    def test_semantic_id_and_back(self):
        tokenizer = build(STRING_IDS)
        assert tokenizer.semantic_id("ünï") == "<a_2><b_3><c_4>"
        assert tokenizer.items_of_semantic_id("<a_2><b_3><c_4>") == ["ünï"]
        assert tokenizer.items_of_semantic_id((0, 0, 2)) == []
        assert tokenizer.codes_to_index([[0, 0, 1], [0, 0, 2], [9, 0, 0]]).tolist() == [1, -1, -1]

    def test_codes_beyond_int64_products(self):
        sizes = (8192,) * 6
        codes = np.array([[8191] * 6, [8191] * 5 + [0]])
        tokenizer = OneRecTokenizer.from_semantic_ids([1, 2], codes, codebook_sizes=sizes)
        assert tokenizer.codes_to_index(codes[::-1]).tolist() == [1, 0]


class TestSequences:
    def test_histories_are_left_padded_with_separators_between_items(self):
        batch = build().encode_histories([[100, 7], [55], []])
        assert batch["input_ids"].tolist() == [
            [5, 8, 12, 3, 5, 8, 13],
            [0, 0, 0, 0, 7, 11, 16],
            [0, 0, 0, 0, 0, 0, 3],
        ]
        assert batch["attention_mask"].tolist() == [[1] * 7, [0] * 4 + [1] * 3, [0] * 6 + [1]]

    def test_the_latest_items_are_kept(self):
        batch = build().encode_histories([[100, 7, 55], np.array([55])], max_items=1)
        assert batch["input_ids"].tolist() == [[7, 11, 16], [7, 11, 16]]

    def test_session_labels(self):
        labels = build().encode_sessions([[100, 7, 55], [55]], max_items=2)
        assert labels.tolist() == [[5, 8, 12, 2, 5, 8, 13], [7, 11, 16] + [-100] * 4]

    def test_catalogue_indices(self):
        tokenizer = build()
        by_id = tokenizer.encode_sessions([[100, 55]])
        assert torch.equal(by_id, tokenizer.encode_sessions(np.array([[0, 2]]), catalogue_indices=True))
        with pytest.raises(ValueError, match=r"sessions\[1\]: -1 is not a catalogue index"):
            tokenizer.encode_sessions([[0], [-1]], catalogue_indices=True)

    def test_decode_marks_what_is_no_item(self):
        tokenizer = build()
        rows = [[5, 8, 12, 2, 5, 8, 14], [5, 8, 2, 7, 11, 16, -100], [12, 8, 5, 8, 13, 1, 5]]
        assert tokenizer.decode_sessions(rows, illegal="none") == [[100, None], [None, 55], [None, 7, None]]
        with pytest.raises(ValueError, match=r"token_ids\[0\] holds <a_0><b_0><c_2>"):
            tokenizer.decode_sessions(rows)
        assert tokenizer.decode_sessions(torch.zeros(2, 3, dtype=torch.long)) == [[], []]

    def test_unknown_items(self):
        tokenizer = build()
        with pytest.raises(ValueError, match=r"histories\[1\] holds item id 8,"):
            tokenizer.encode_histories([[100], [7, 8]])
        skipped = tokenizer.encode_histories([[8], [7, 8]], unknown_items="skip", max_items=1)
        assert skipped["input_ids"].tolist() == [[0, 0, 3], [5, 8, 13]]
        assert tokenizer.item_index([8, 55], unknown_items="skip").tolist() == [-1, 2]
        with pytest.warns(FutureWarning, match="'unknown' is now called 'unknown_items'"):
            assert tokenizer.item_index([8], unknown="skip").tolist() == [-1]
        with pytest.raises(ValueError, match="are integers, got strings"):
            tokenizer.item_index(["100"])
        with pytest.raises(ValueError, match=r"sessions\[1\] is empty"):
            tokenizer.encode_sessions([[7], []])

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.lists(st.sampled_from(STRING_IDS), max_size=6), max_size=5))
    def test_round_trip(self, histories):
        tokenizer = build(STRING_IDS)
        assert tokenizer.decode_sessions(tokenizer.encode_histories(histories)["input_ids"]) == histories
        sessions = [history for history in histories if history]
        assert tokenizer.decode_sessions(tokenizer.encode_sessions(sessions)) == sessions


def state(tokenizer):
    """What must not change when an item is refused."""
    return (
        tokenizer.item_ids.tolist(),
        tokenizer.codes.tolist(),
        tokenizer.removed.tolist(),
        tokenizer.semantic_id_fingerprint,
        copy.deepcopy(tokenizer.report),
    )


@pytest.mark.filterwarnings("ignore:the semantic IDs should be fitted again")
class TestChangingCatalogue:
    @settings(max_examples=25, deadline=None)
    @given(
        policy=st.sampled_from(["nearest_free", "suffix", "error", "share"]),
        near=st.lists(st.integers(0, 23), max_size=6),
        seed=st.integers(0, 1000),
        strings=st.booleans(),
    )
    def test_ids_stay_and_are_one_to_one(self, policy, near, seed, strings):
        """Through save, load and additions of which some lie on items that are there."""
        name = "item-{}".format if strings else int
        try:
            tokenizer = fitted([name(i) for i in range(24)], policy, (6, 6, 8))
        except ValueError as error:
            assert policy == "error" and "have the same codes" in str(error)
            return
        new = torch.cat([points(24)[near], points(3, seed)])
        with tempfile.TemporaryDirectory() as directory:
            tokenizer.save_pretrained(directory)
            loaded = AutoTokenizer.from_pretrained(directory)
            expected = tokenizer.codes.tolist()
            for first, part in ((24, new[:4]), (24 + len(new[:4]), new[4:])):
                ids = [name(100 + first + i) for i in range(len(part))]
                before = state(loaded)
                try:
                    indices = loaded.add_items(ids, part)
                except ValueError as error:
                    assert policy in ("error", "suffix") and state(loaded) == before, error
                    continue
                tokenizer.add_items(ids, part)
                assert indices.tolist() == loaded.item_index(ids).tolist()
                assert loaded.item_ids.tolist() == before[0] + ids
                assert loaded.codes[: len(before[0])].tolist() == before[1]
            assert state(loaded) == state(tokenizer) and loaded.codes[:24].tolist() == expected
            loaded.save_pretrained(directory)
            again = AutoTokenizer.from_pretrained(directory)
            assert state(again) == state(loaded)
        if policy == "share":
            items = [again.items_of_semantic_id(code) for code in again.codes.tolist()]
            assert all(item in shared for item, shared in zip(again.item_ids.tolist(), items, strict=True))
        else:
            assert again.codes_to_index(again.codes).tolist() == list(range(again.num_items))

    def test_codes_of_new_items(self):
        tokenizer = fitted(range(100, 130))
        # The first ones whose nearest codes nobody has.
        for seed in itertools.count(9):
            nearest = tokenizer.quantizer.encode(points(3, seed=seed))
            if (tokenizer.codes_to_index(nearest) < 0).all() and len(np.unique(nearest, axis=0)) == 3:
                break
        assert tokenizer.add_items([7, 8, 9], points(3, seed=seed)).tolist() == [30, 31, 32]
        assert np.array_equal(tokenizer.codes[30:], nearest)
        assert tokenizer.add_items([], torch.empty(0, 4)).tolist() == []
        batch = tokenizer.encode_histories([[9, 100]])
        assert tokenizer.decode_sessions(batch["input_ids"]) == [[9, 100]]

    def test_removed_items(self, tmp_path):
        tokenizer = build()
        before = tokenizer.semantic_id_fingerprint
        tokenizer.remove_items([55, 7, 55])
        assert tokenizer.removed.tolist() == [False, True, True, False, False]
        assert tokenizer.generatable.tolist() == [True, False, False, True, True]
        assert tokenizer.item_index([55]).tolist() == [2] and tokenizer.semantic_id(55) == "<a_2><b_3><c_4>"
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert state(loaded) == state(tokenizer)
        trie = onerec_hf.ItemTrie(loaded.codes[loaded.generatable], loaded.codebook_sizes)
        assert trie.num_items == 3
        with pytest.raises(ValueError, match="item id 8 .* is not in the catalogue"):
            loaded.remove_items([100, 8])
        with pytest.raises(ValueError, match="nothing would be left"):
            loaded.remove_items(INTEGER_IDS)
        assert state(loaded) == state(tokenizer)
        loaded.restore_items([55, 7])
        assert not loaded.removed.any() and loaded.semantic_id_fingerprint == before

    def test_refused_items(self):
        tokenizer = fitted(range(100, 130))
        tokenizer.remove_items([104])
        before = state(tokenizer)
        one_nan = points(3)
        one_nan[1, 2] = torch.nan
        for ids, embeddings, message in (
            ([7, 104, 8], points(3), "row 1: 104 is in the catalogue .* restore_items"),
            ([7, 8, 7], points(3), "holds 7 twice, in rows 0 and 2"),
            (["a", "b", "c"], points(3), "are integers, got strings"),
            ([7, 8], points(3), "2 item_ids but 3 embeddings"),
            ([7, 8, 9], one_nan, "row 1 holds NaN"),
            ([7, 8, 9], points(3, dim=5), "embeddings have 5 dimensions, the quantizer was fitted on 4"),
            ([7, 8], [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0]], "row 1 has 3 dimensions, the quantizer was fitted on 4"),
        ):
            with pytest.raises(ValueError, match=message):
                tokenizer.add_items(ids, embeddings)
            assert state(tokenizer) == before
        with pytest.raises(ValueError, match="holds no quantizer"):
            build().add_items([1], points(1))

    def test_a_refit_is_due(self, tmp_path):
        tokenizer = fitted(range(400), sizes=(8, 8, 16))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer.add_items(range(1000, 1099), 3 + points(99, seed=5) / 10)  # too few to judge
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="fitted again: the 100 added items have a quantization error"):
            tokenizer.add_items([1099], 3 + points(1, seed=6) / 10)
        added = tokenizer.report["added_items"]
        errors = tokenizer.quantizer.quantization_error(
            torch.cat([3 + points(99, seed=5) / 10, 3 + points(1, seed=6) / 10])
        )
        assert added["items"] == 100 and added["quantization_error"] == pytest.approx(float(errors.mean()))
        assert "found their ID taken" in tokenizer.refit_reasons()[1] and len(tokenizer.refit_reasons()) == 2
        tokenizer.remove_items(tokenizer.item_ids[tokenizer.codes[:, 0] != tokenizer.codes[0, 0]])
        assert "the codes of level 0 have a perplexity of 1.0" in tokenizer.refit_reasons()[2]


class TestFiles:
    @pytest.mark.parametrize("item_ids", [INTEGER_IDS, STRING_IDS])
    def test_round_trip_through_auto_tokenizer(self, tmp_path, item_ids):
        tokenizer = build(item_ids)
        tokenizer.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "codebooks.safetensors",
            "item_index.parquet",
            "semantic_id_report.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        assert str(tmp_path) not in (tmp_path / "tokenizer_config.json").read_text()
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        loaded = pickle.loads(pickle.dumps(copy.deepcopy(loaded)))
        assert isinstance(loaded, OneRecTokenizer)
        assert loaded.item_ids.tolist() == item_ids and type(loaded.item_ids.tolist()[0]) is type(item_ids[0])
        assert np.array_equal(loaded.codes, CODES) and loaded.codebook_sizes == SIZES
        assert all(torch.equal(a, b) for a, b in zip(loaded.codebooks, tokenizer.codebooks, strict=True))
        assert loaded.report == tokenizer.report
        history = [item_ids[:3], item_ids[3:4]]
        assert torch.equal(
            loaded.encode_histories(history)["input_ids"], tokenizer.encode_histories(history)["input_ids"]
        )
        assert loaded("<a_2><b_3>")["input_ids"] == [7, 11] and loaded.padding_side == "left"

    @pytest.mark.parametrize(
        "name",
        [
            "tokenizer.json",
            "item_index.parquet",
            "codebooks.safetensors",
            "quantizer.json",
            "semantic_id_report.json",
            "tokenizer_config.json",
        ],
    )
    @pytest.mark.parametrize("damage", ["missing", "truncated"])
    def test_damaged_file_is_named(self, tmp_path, name, damage):
        fitted().save_pretrained(tmp_path)
        path = tmp_path / name
        content = path.read_bytes()
        path.unlink()
        if damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=name):
            OneRecTokenizer.from_pretrained(tmp_path)

    def test_files_of_another_tokenizer(self, tmp_path):
        build().save_pretrained(tmp_path / "one")
        build(codes=CODES[::-1]).save_pretrained(tmp_path / "same_shape")
        build(codes=CODES[:, :2], sizes=SIZES[:2]).save_pretrained(tmp_path / "other_shape")
        for name, other, message in (
            ("item_index.parquet", "same_shape", "fingerprint"),
            ("item_index.parquet", "other_shape", "columns"),
            ("tokenizer.json", "other_shape", "tokenizer.json"),
        ):
            own = (tmp_path / "one" / name).read_bytes()
            (tmp_path / "one" / name).write_bytes((tmp_path / other / name).read_bytes())
            with pytest.raises(ValueError, match=message):
                AutoTokenizer.from_pretrained(tmp_path / "one")
            (tmp_path / "one" / name).write_bytes(own)
        wrong = {"item_id": INTEGER_IDS, "code_a": [0.5] * 5, "code_b": [0] * 5, "code_c": [0] * 5}
        for columns in ({"video": [1, 2]}, wrong):
            pq.write_table(pa.table(columns), tmp_path / "one" / "item_index.parquet")
            with pytest.raises(ValueError, match="item_index.parquet"):
                AutoTokenizer.from_pretrained(tmp_path / "one")

    def test_quantizer_of_another_tokenizer(self, tmp_path):
        fitted(seed=0).save_pretrained(tmp_path / "one")
        fitted(seed=1).save_pretrained(tmp_path / "other")
        for name in ("quantizer.json", "codebooks.safetensors"):
            own = (tmp_path / "one" / name).read_bytes()
            (tmp_path / "one" / name).write_bytes((tmp_path / "other" / name).read_bytes())
            with pytest.raises(ValueError, match="fingerprint"):
                AutoTokenizer.from_pretrained(tmp_path / "one")
            (tmp_path / "one" / name).write_bytes(own)

    def test_index_without_the_column_removed(self, tmp_path):
        build().save_pretrained(tmp_path)
        path = tmp_path / "item_index.parquet"
        pq.write_table(pq.read_table(path).drop_columns("removed"), path)
        assert state(AutoTokenizer.from_pretrained(tmp_path)) == state(build())

    @pytest.mark.parametrize("old_has_quantizer", [True, False])
    def test_a_kill_between_two_files_is_noticed(self, tmp_path, monkeypatch, old_has_quantizer):
        with_quantizer, without = fitted(), build()
        old, new = (with_quantizer, without) if old_has_quantizer else (without, with_quantizer)
        replace, unlink, outcomes = os.replace, Path.unlink, []
        for steps in range(8):
            done = []

            def until_killed(action, target, done=done, steps=steps):
                if Path(target).parent == tmp_path:
                    if len(done) == steps:
                        raise KeyboardInterrupt
                    done.append(target)
                return action()

            old.save_pretrained(tmp_path)
            with monkeypatch.context() as patched:
                patched.setattr(os, "replace", lambda a, b, kill=until_killed: kill(lambda: replace(a, b), b))
                patched.setattr(Path, "unlink", lambda p, *a, kill=until_killed, **k: kill(lambda: unlink(p, **k), p))
                try:
                    new.save_pretrained(tmp_path)
                except KeyboardInterrupt:
                    pass
            try:
                fingerprint = AutoTokenizer.from_pretrained(tmp_path).semantic_id_fingerprint
                outcomes.append("old" if fingerprint == old.semantic_id_fingerprint else "new")
                assert fingerprint in (old.semantic_id_fingerprint, new.semantic_id_fingerprint)
            except ValueError as error:
                assert "download" in str(error) or "save" in str(error)
                outcomes.append("refused")
        assert outcomes[0] == "old" and outcomes[-1] == "new" and "refused" in outcomes
        assert sorted(outcomes, key=["old", "refused", "new"].index) == outcomes

    def test_a_failed_save_leaves_the_old_files(self, tmp_path):
        build().save_pretrained(tmp_path)
        other = build(STRING_IDS)
        other.report = {"not JSON": object()}
        with pytest.raises(TypeError):
            other.save_pretrained(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path).item_ids.tolist() == INTEGER_IDS
        assert json.loads((tmp_path / "semantic_id_report.json").read_text()) == {"reconstruction_error": 0.25}
        assert len(list(tmp_path.iterdir())) == 5


class TestBadInput:
    def test_errors_name_the_row(self):
        with pytest.raises(ValueError, match="holds 7 twice, in rows 1 and 3"):
            build([100, 7, 55, 7, 8])
        with pytest.raises(ValueError, match=r"row 2 \(item 55\): code 4 of level 1"):
            build(codes=CODES + np.array([[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]))
        with pytest.raises(ValueError, match="row 1 holds None"):
            build(["a", None, "b", "c", "d"])
        with pytest.raises(ValueError, match="row 1 holds 'b'"):
            build([1, "b", 2, 3, 4])
        with pytest.raises(ValueError, match="integers or strings, got dtype float64"):
            build([1.0, 2.0, 3.0, 4.0, 5.0])
        with pytest.raises(ValueError, match=r"shape \[4, 3\]"):
            build([1, 2, 3, 4])

    def test_fit(self):
        embeddings = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
        tokenizer = OneRecTokenizer.fit(range(20), embeddings, ResidualQuantizer([4, 4, 4]))
        assert tokenizer.report["num_items"] == 20
        assert tokenizer.codes_to_index(tokenizer.codes).tolist() == list(range(20))
        with pytest.raises(ValueError, match="19 item_ids but 20 embeddings"):
            OneRecTokenizer.fit(range(19), embeddings, ResidualQuantizer([4, 4, 4]))


def test_a_model_knows_the_semantic_ids_that_it_was_trained_on(tmp_path):
    def fit(seed, ids=range(40)):
        return OneRecTokenizer.fit(list(ids), points(40), ResidualQuantizer([8, 8], seed=seed))

    tokenizer, other = fit(0), fit(1)
    config = OneRecConfig.from_preset("debug", codebook_sizes=[8, 8])
    Recommender(OneRecForConditionalGeneration(config), other)
    config.catalogue_fingerprint = tokenizer.catalogue_fingerprint()
    model = OneRecForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)  # the usual way: a new tokenizer is written beside old weights
    for wrong in (other, fit(0, range(1, 41)), AutoTokenizer.from_pretrained(tmp_path)):
        for use in (Recommender, lambda model, tokenizer: SessionCollator(tokenizer, model)):
            with pytest.raises(ValueError, match="trained on other items or semantic IDs .* of 40 items"):
                use(model, wrong)
    with pytest.raises(ValueError, match="trained on other items"):
        pipeline("generative-recommendation", model=str(tmp_path))
    tokenizer.add_items([100], points(1))
    tokenizer.remove_items([3])
    tokenizer.save_pretrained(tmp_path)
    assert pipeline("generative-recommendation", model=str(tmp_path))([[0, 1]], top_k=3)[0]["items"]
