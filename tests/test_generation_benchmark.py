"""The benchmark of generation, at the size of a toy."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_mixture_is_measured_beside_plain_beams(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    import generation

    sizes = ["--num_items", "60", "--many_items", "90", "--ranked_users", "60", "--item_encoders", "1"]
    path = tmp_path / "generation.json"
    monkeypatch.setattr(
        sys, "argv", ["generation.py", "--parts", "mixture", *sizes, "--repeats", "1", "--json", str(path)]
    )
    monkeypatch.setattr(generation, "machine_rate", lambda: 1.0)
    generation.main()
    rows = json.loads(path.read_text())["mixture"]
    catalogues = [(60, 256, 2), (90, 256, 2), (90, 1024, 2)]
    assert [(row["items"], row["codes"], row["heads"], row["item_memory"]) for row in rows] == [
        (*catalogue, neighbours) for catalogue in catalogues for neighbours in (0, 64)
    ]
    for row in rows:
        assert row["plain_ms"] > 0 and row["mixture_ms"] > 0 and row["ratio"] > 0
    assert "mixture ms" in capsys.readouterr().out
