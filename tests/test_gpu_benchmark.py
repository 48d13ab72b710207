"""The checks of one GPU, at the size of a toy on the CPU."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"

# In place of gpu.py where it runs one check, without its imports.
SCRIPT = """
import json, os, sys, time
name, output = sys.argv[2], sys.argv[-1]
rows = [{"implementation": "a", "decoding_step_ms": 2.0}, {"implementation": "b", "decoding_step_ms": 1.0}]
outcome = "passed" if name == "quick" else "stopped"
if name != "silent":
    with open(output, "w") as file:
        json.dump({"outcome": outcome, "rows": rows}, file)
if name == "killed":
    os.abort()
if name == "silent":
    sys.exit("it did not even begin")
if name == "hanging":
    time.sleep(600)
"""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    if gpu.DEVICE.type != "cpu":
        pytest.skip("there is a GPU: run recipes/benchmarks/gpu.py")
    return gpu


@pytest.mark.parametrize(
    "name", ["same_results", "experts", "sdpa_backends", "generation_0.1b", "reward_scoring", "kmeans", "attention"]
)
def test_a_check_measures_what_it_says(name, gpu, tmp_path):
    path = tmp_path / "check.json"
    assert gpu.main(["--check", name, "--output", str(path)]) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["outcome"] == "passed" and result["rows"]
    figures = [value for row in result["rows"] for value in row.values() if isinstance(value, float)]
    assert figures and all(value >= 0 for value in figures)


def test_training_is_set_beside_a_matrix_product(gpu):
    product, *rows = gpu.training(gpu.TINY, preset="1b")
    assert len(rows) == 4 and all("failure" not in row for row in rows)
    for row in rows:
        assert row["share_of_peak"] == pytest.approx(row["tflops"] / product["tflops"])
        # 2 histories of 16 items and sessions of 5, with a separator between two items.
        assert row["tokens_per_second"] == pytest.approx(2 * (63 + 19) * 1000 / row["step_ms"])


@pytest.mark.parametrize("name", ["ddp_one_process", "fsdp2_one_process", "fsdp2_two_processes"])
def test_what_needs_gpus_is_not_applicable(name, gpu, tmp_path):
    path = tmp_path / "check.json"
    gpu.main(["--check", name, "--output", str(path)])
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["outcome"] == "not applicable" and result["reason"].endswith("of which there is none")


def test_a_row_says_what_was_in_its_way(gpu, capsys):
    import gpu_measurements
    import torch

    def fails(error: Exception):
        def measure():
            raise error

        return gpu_measurements.attempt({"name": "x"}, measure)

    assert fails(torch.OutOfMemoryError("CUDA out of memory")) == {"name": "x", "note": "out of memory"}
    assert fails(gpu.NotApplicable("no such kernel")) == {"name": "x", "note": "no such kernel"}
    assert fails(AssertionError("logits differ\nby much")) == {
        "name": "x",
        "failure": "AssertionError: logits differ",
    }
    assert "logits differ" in capsys.readouterr().err


def test_a_check_that_raises_fails_and_keeps_its_rows(gpu, tmp_path, monkeypatch):
    def broken(sizes):
        yield {"figure": 1.0}
        raise RuntimeError("this check is broken")

    def with_a_failure(sizes):
        yield {"failure": "ValueError: of this row"}
        yield {"figure": 2.0}

    path = tmp_path / "check.json"
    for check, reason, count in ((broken, "this check is broken", 1), (with_a_failure, "of this row", 2)):
        monkeypatch.setitem(gpu.CHECKS, "kmeans", (check, 1))
        gpu.run_check("kmeans", gpu.TINY, path)
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["outcome"] == "failed" and reason in result["reason"] and len(result["rows"]) == count


def test_a_check_that_dies_or_hangs_takes_nothing_from_the_others(gpu, tmp_path, monkeypatch, capsys):
    script, path = tmp_path / "check.py", tmp_path / "gpu.json"
    script.write_text(SCRIPT, encoding="utf-8")
    monkeypatch.setattr(gpu, "SCRIPT", script)
    shares = {"silent": 10, "killed": 10, "hanging": 3, "quick": 7}
    monkeypatch.setattr(gpu, "CHECKS", {name: (None, share) for name, share in shares.items()})
    assert gpu.main(["--minutes", "0.3", "--json", str(path)]) == 2
    results = json.loads(path.read_text(encoding="utf-8"))
    checks = results["checks"]
    outcomes = {name: check["outcome"] for name, check in checks.items()}
    assert outcomes == {"silent": "failed", "killed": "failed", "hanging": "out of time", "quick": "passed"}
    assert "it did not even begin" in checks["silent"]["reason"] and "status -6" in checks["killed"]["reason"]
    assert [len(check["rows"]) for check in checks.values()] == [0, 2, 2, 2]
    assert checks["quick"]["fastest"] == {"decoding_step_ms": "b"}
    printed = capsys.readouterr().out
    assert results["gpus"] == [] and results["note"] == gpu.NO_GPU == printed.splitlines()[0]
    assert "fastest by decoding_step_ms: b" in printed and "it did not even begin" in printed


def test_a_check_is_a_process_of_its_own(gpu, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert gpu.main(["--checks", "kmeans", "--json", str(path)]) == 0
    check = json.loads(path.read_text(encoding="utf-8"))["checks"]["kmeans"]
    assert check["outcome"] == "passed" and [row["clusters"] for row in check["rows"]] == ["16, balanced", "16, plain"]
    assert "| 16, balanced |" in capsys.readouterr().out
