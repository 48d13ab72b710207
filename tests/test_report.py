import os
import re

import numpy as np
import pytest

from onerec_hf.evaluation import print_table, write_report


def ranking(value):
    return {f"{m}@{c}": value * c / 10 for m in ("recall", "ndcg") for c in (5, 10, 50)} | {"coverage": 0.25}


def judged(value):
    heads = ("reward", "swt", "vtr", "wtr", "ltr")
    return {f"{head}_{kind}": value * scale for head in heads for kind, scale in (("mean", 1.0), ("max", 1.5))}


@pytest.fixture
def metrics():
    rates = {"intra_session_diversity": 0.61, "illegal_rate": 0.0, "duplicate_rate": 0.0}
    return {
        "dataset": {"name": "simulated", "users": 2000},
        "tokenizer": {"levels": [{"use": 1.0, "entropy": 6.9}, {"use": 0.9, "entropy": 6.5}], "collision_rate": 0.01},
        "model": {"parameters": 1_234_567},
        "onerec": ranking(0.0812) | rates,
        "baselines": {name: ranking(0.07) for name in ("popularity", "item_knn", "ease", "sasrec")},
        "reward_models": {"independent_judge": {"swt_auc": 0.7301}},
        "alignment": [
            {"round": r, **ranking(0.0799 + r / 1000), **rates}
            | {"judges": {judge: judged(0.3 + r / 10) for judge in ("reward_model", "independent_judge", "truth")}}
            for r in range(3)
        ],
        "timings": {"pretrain": 61.5},
        "environment": {"torch": "2"},
    }


@pytest.fixture
def arguments():
    return {
        "training_curves": {"Pre-training loss": [(step, 5 / (step + 1)) for step in range(40)], "empty": []},
        "code_use": [np.array([3, 0, 5]), np.array([4, 4])],
        "examples": [
            {
                "user": "u<1>",
                "history": [{"item": 7, "label": "cats & dogs"}],
                "recommendations": [{"item": 9, "label": "<script>", "score": -1.5}, {"item": 3, "score": -2.0}],
                "next_item": 3,
            }
        ],
        "settings": {"pretrain": {"epochs": 2, "codebook_sizes": [128] * 40}},
    }


class TestWriteReport:
    def test_is_complete_self_contained_and_escaped(self, tmp_path, metrics, arguments):
        page = write_report(tmp_path / "deep" / "report.html", metrics, **arguments).read_text(encoding="utf-8")
        assert os.listdir(tmp_path / "deep") == ["report.html"]
        assert page.count("<img ") == 5 and "first code" not in page
        assert not re.search(r'(src|href)="(?!data:|#)', page) and "url(" not in page and "@import" not in page
        assert "<script>" not in page and "&lt;script&gt;" in page and "cats &amp; dogs" in page
        for text in ("0.0812", "0.7301", "1,234,567", "(40 values)", "Simulated truth", 'class="hit"', "61.5"):
            assert text in page

    def test_semantic_ids_are_pictured(self, tmp_path, metrics, arguments):
        samples = [{"code": "<a_7>", "num_items": 21, "items": ["cats & dogs", "mice"]}]
        page = write_report(tmp_path / "r.html", metrics, **arguments, item_map=b"png", code_samples=samples)
        page = page.read_text(encoding="utf-8")
        assert page.count("<img ") == 6 and 'src="data:image/png;base64,cG5n"' in page
        assert "<td>&lt;a_7&gt;</td><td>21</td><td>cats &amp; dogs; mice</td>" in page

    def test_the_same_run_writes_the_same_bytes(self, tmp_path, metrics, arguments):
        first = write_report(tmp_path / "a.html", metrics, **arguments).read_bytes()
        assert first == write_report(tmp_path / "b.html", metrics, **arguments).read_bytes()

    def test_leaves_out_what_the_run_did_not_have(self, tmp_path):
        metrics = {"onerec": ranking(0.05) | {"intra_session_diversity": float("nan")}}
        page = write_report(tmp_path / "r.html", metrics, {}, [], [], {}).read_text(encoding="utf-8")
        assert "Rewards by" not in page and "Losses" not in page and page.count("<img ") == 1

    def test_a_failure_leaves_the_old_report(self, tmp_path):
        path = write_report(tmp_path / "r.html", {}, {}, [], [], {"seed": 1})
        before = path.read_bytes()
        with pytest.raises(UnicodeEncodeError):  # a lone surrogate cannot be encoded: the write itself fails
            write_report(path, {}, {}, [], [], {"seed": "\ud800"})
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["r.html"]


class TestPrintTable:
    def test_methods_and_rounds(self, metrics):
        text = print_table(metrics)
        lines = [line.split("  ")[0] for line in text.splitlines()]
        methods = ["OneRec, aligned", "OneRec, pre-trained", "Popularity", "Item-KNN", "EASE", "SASRec"]
        assert [line for line in lines if line in methods] == methods
        assert re.search(r"OneRec, aligned +0\.0812 +0\.4060 +0\.0812 +0\.2500", text)
        assert re.search(r"Simulated truth +2 +0\.5000/0\.7500", text)
        assert "illegal rate 0," in text

    def test_without_alignment(self):
        assert "OneRec " in print_table({"onerec": ranking(0.05)}) and "aligned" not in print_table({"onerec": {}})
