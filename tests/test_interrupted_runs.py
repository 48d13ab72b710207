"""What the benchmark of interrupted runs sees: halves, lost stages and other metrics."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SCRIPT = Path(__file__).parents[1] / "recipes" / "benchmarks" / "interrupted_runs.py"
spec = importlib.util.spec_from_file_location("interrupted_runs", SCRIPT)
interrupted_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interrupted_runs)


def stage(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text("{}")
    save_file({"x": np.zeros(3)}, folder / "x.safetensors")
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_halves_are_found_among_what_counts_as_done(tmp_path):
    data = stage(tmp_path / "data")
    checkpoints = tmp_path / "pretrain.partial" / "checkpoints"
    for name in ("checkpoint-5", "checkpoint-10"):
        stage(checkpoints / name)
    (checkpoints / "checkpoint-5" / "checkpoint_complete").touch()
    cut(checkpoints / "checkpoint-10" / "x.safetensors")  # at work, and not marked as complete
    (tmp_path / "report.html.partial").write_text("<html>")
    assert interrupted_runs.faults(tmp_path) == []
    assert list(interrupted_runs.stages(tmp_path)) == ["data"]
    cut(checkpoints / "checkpoint-5" / "x.safetensors")
    cut(data / "x.safetensors")
    (tmp_path / "report.html").write_text("<html>")
    (tmp_path / "align").mkdir()
    found = [fault.partition(":")[0] for fault in interrupted_runs.faults(tmp_path)]
    half = "pretrain.partial/checkpoints/checkpoint-5/x.safetensors"
    assert found == ["data/x.safetensors", half, "report.html", "align"]


def test_stages_that_are_lost_or_done_again_are_found(tmp_path):
    data = stage(tmp_path / "data")
    before = interrupted_runs.stages(tmp_path)
    stage(tmp_path / "tokenize")
    assert interrupted_runs.lost(before, tmp_path) == []
    os.utime(data / "stage.json", ns=(0, 0))
    assert interrupted_runs.lost({**before, "align": 5}, tmp_path) == ["data: was complete", "align: was complete"]


def test_what_a_full_disk_makes_a_run_say():
    said = "OSError: No space left\nThe disk of run is full: make room, and run the same command again.\n 50%|##  |"
    assert interrupted_runs.last_error(said) == ("OSError: No space left", True)
    assert interrupted_runs.last_error("OSError: No space left\n") == ("OSError: No space left", False)
    assert interrupted_runs.last_error("") == ("", False)


def test_metrics_are_compared_without_what_the_machine_decides(tmp_path):
    ours, theirs = tmp_path / "run_0", tmp_path / "undisturbed"
    for folder, recall, seconds in ((ours, 0.1, 1.0), (theirs, 0.1, 2.0)):
        folder.mkdir()
        baselines = {"ease": {"recall@10": recall, "fit_seconds": seconds}}
        content = {"baselines": baselines, "timings": {"data": seconds}, "served": [{"milliseconds": seconds}]}
        (folder / "metrics.json").write_text(json.dumps(content))
    assert interrupted_runs.differing(ours, theirs) == []
    (ours / "metrics.json").write_text((ours / "metrics.json").read_text().replace("0.1", "0.2"))
    assert interrupted_runs.differing(ours, theirs) == ["run_0: other baselines"]
