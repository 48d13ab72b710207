import copy
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import onerec_hf  # noqa: F401  registers the Auto classes
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
        with pytest.raises(ValueError, match=r"sessions\[1\]: -1 is no catalogue index"):
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
        skipped = tokenizer.encode_histories([[8], [7, 8]], unknown="skip", max_items=1)
        assert skipped["input_ids"].tolist() == [[0, 0, 3], [5, 8, 13]]
        assert tokenizer.item_index([8, 55], unknown="skip").tolist() == [-1, 2]
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
        "name", ["tokenizer.json", "item_index.parquet", "codebooks.safetensors", "semantic_id_report.json"]
    )
    @pytest.mark.parametrize("damage", ["missing", "truncated"])
    def test_damaged_file_is_named(self, tmp_path, name, damage):
        build().save_pretrained(tmp_path)
        path = tmp_path / name
        content = path.read_bytes()
        path.unlink()
        if damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=name):
            AutoTokenizer.from_pretrained(tmp_path)

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
        pq.write_table(pa.table({"video": [1, 2]}), tmp_path / "one" / "item_index.parquet")
        with pytest.raises(ValueError, match="item_index.parquet"):
            AutoTokenizer.from_pretrained(tmp_path / "one")

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
