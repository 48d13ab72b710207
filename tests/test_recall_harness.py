"""The harness over data sets and seeds, on the debug configuration."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from onerec_hf.evaluation import EASE, SASRec

ROOT = Path(__file__).parents[1]
FIELDS = ["recall@5", "ndcg@5", "recall@10", "ndcg@10", "minutes", "parameters", "users_per_second"]


@pytest.fixture
def recall(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    import recall

    threads = torch.get_num_threads()
    yield recall
    torch.set_num_threads(threads)


def test_sets_and_seeds_end_in_one_table_and_exact_rows(recall, monkeypatch, tmp_path, capsys):
    fitted = []
    for method in (EASE, SASRec):

        def fit(self, *args, fit=method.fit, **more):
            fitted.append(type(self).__name__)
            return fit(self, *args, **more)

        monkeypatch.setattr(method, "fit", fit)
    config = ROOT / "recipes" / "quickstart" / "debug.yaml"
    flags = ["--seeds", "0", "1", "--output_dir", str(tmp_path / "runs"), "--json", str(tmp_path / "recall.json")]
    short = """--judged_users 2 --pretrain '{"max_steps": 3}' --pretrain_recent '{"max_steps": 1}'"""
    command = ["recall.py", "--sets", f"{config} {short}", *flags, "--threads", "1"]
    monkeypatch.setattr(sys, "argv", command)
    recall.main()
    # The fused baseline has the others' fits, and EASE, which takes no seed, is fitted once.
    assert fitted == ["EASE", "SASRec", "SASRec"]

    rows = json.loads((tmp_path / "recall.json").read_text())
    methods = ["onerec", "popularity", "item_knn", "ease", "sasrec", "fused"]
    assert [(row["set"], row["method"], row["seed"]) for row in rows] == [
        ("quickstart_debug", method, seed) for seed in (0, 1) for method in methods
    ]
    for row in rows:
        assert list(row) == ["set", "method", "seed", *FIELDS]
        metrics = json.loads((tmp_path / "runs" / row["set"] / f"seed_{row['seed']}" / "metrics.json").read_text())
        known = metrics["onerec"] if row["method"] == "onerec" else metrics["baselines"][row["method"]]
        assert {name: row[name] for name in FIELDS[:4]} == pytest.approx({name: known[name] for name in FIELDS[:4]})
        assert row["minutes"] > 0 and row["parameters"] > 0 and row["users_per_second"] > 0
    first, second = ({row["method"]: row for row in rows if row["seed"] == seed} for seed in (0, 1))
    assert all(first["ease"][name] == second["ease"][name] for name in (*FIELDS[:5], "parameters"))
    assert first["sasrec"]["ndcg@10"] != second["sasrec"]["ndcg@10"]
    printed = capsys.readouterr().out
    assert "R@10 less the best" in printed and "quickstart_debug" in printed

    recall.main()
    assert len(fitted) == 3  # everything was complete
    monkeypatch.setattr(sys, "argv", ["recall.py", "--sets", str(config), str(config)])
    with pytest.raises(SystemExit):
        recall.main()
    assert "two sets would be called quickstart_debug" in capsys.readouterr().err


def test_sets_of_one_configuration_are_called_by_their_flags(recall):
    config = str(ROOT / "recipes" / "quickstart" / "debug.yaml")
    several = f"{config} --num_semantic_ids 2"
    assert recall.named_sets([config, several]) == {
        "quickstart_debug": [config],
        "quickstart_debug_num_semantic_ids_2": [config, "--num_semantic_ids", "2"],
    }
    with pytest.raises(ValueError, match="two sets would be called quickstart_debug_num_semantic_ids_2"):
        recall.named_sets([config, several, several])


def test_the_difference_is_from_the_best_baseline_of_users_averaged_over_seeds(recall):
    users = np.random.default_rng(0).integers(0, 2, size=(3, 2, 400)).astype(float)
    users[1] *= 0.5  # the second baseline is the better one
    names = ("onerec", "ease", "sasrec")
    runs = [
        recall.MethodRun("set", name, seed, {"recall@10": users[place, seed]}, {})
        for place, name in enumerate(names)
        for seed in (0, 1)
    ]
    found = recall.difference(runs, "recall@10")
    gains = (users[0] - users[2]).mean(axis=0)
    assert found["baseline"] == "sasrec" and found["value"] == pytest.approx(gains.mean())
    low, high = found["interval"]
    # Standard error of a mean over 400 users of averages over two seeds: 2 * 1.96 of it are the interval's width.
    assert high - low == pytest.approx(2 * 1.96 * gains.std() / 20, rel=0.15) and low < found["value"] < high
    assert recall.difference(runs[:2], "recall@10") is None
    assert recall.mean_and_deviation([0.1, 0.2]) == "0.1500 ± 0.0707" and recall.mean_and_deviation([0.1]) == "0.1000"
