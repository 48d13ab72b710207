"""A run whose catalogue is too large for one of its baselines."""

import json
from pathlib import Path

from metrics_keys import undescribed

from onerec_hf.evaluation import baselines
from onerec_hf.stages import parse_recipe_arguments, run_ablation, run_pipeline

CONFIG = Path(__file__).parents[1] / "recipes" / "quickstart" / "debug.yaml"


def test_a_run_goes_on_without_a_baseline_that_does_not_fit(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(baselines, "free_memory", lambda: 2**20)  # EASE needs 300 * 300 * 16 bytes
    flags = ["--align_rounds", "1", "--threads", "1", "--evaluation_users", "12", "--num_candidates", "4"]
    flags += ["--judged_users", "4", "--judged_sessions", "4"]
    caplog.set_level("INFO")
    args = parse_recipe_arguments(["--config", str(CONFIG), "--output_dir", str(tmp_path), *flags])
    run_pipeline(args)
    lines = [record.getMessage() for record in caplog.records]
    warned = [place for place, line in enumerate(lines) if "without the baseline ease: EASE needs 0.0 GiB" in line]
    started = next(place for place, line in enumerate(lines) if "[pretrain] started" in line)
    assert len(warned) == 1 and warned[0] < started
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["baselines"]) == ["popularity", "item_knn", "sasrec"] and undescribed(metrics) == []
    assert list(metrics["skipped_baselines"]) == ["ease", "fused"]
    served = {name for entry in metrics["served"] for name in (entry["method"], entry["retriever"])}
    assert "sasrec" in served and not served & {"ease", "fused"}
    assert "Without EASE: EASE needs 0.0 GiB of memory for a catalogue of 300 items" in capsys.readouterr().out
    assert "Without Fused: EASE needs" in (tmp_path / "report.html").read_text(encoding="utf-8")
    rows = json.loads((run_ablation(args, "table1", "ease", "popularity") / "table.json").read_text())["rows"]
    names = [row["name"] for row in rows]
    assert "Popularity" in names and "EASE" not in names
