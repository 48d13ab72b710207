"""The pipeline on logs that lack the feedback that the reward model would read."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from onerec_hf.stages import parse_recipe_arguments, run_pipeline, run_reward

OPTIONS = {
    "min_history_items": 1,
    "history_items": 8,
    "session_items": 2,
    "codebook_sizes": [6, 6, 6],
    "behaviour_dim": 8,
    "preset": "debug",
    "pretrain": {"max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 8},
    "holdout_sessions": 4,
    "align_rounds": 1,
    "evaluation_users": 6,
    "ranking_beams": 8,
    "judged_users": 3,
    "judged_sessions": 2,
    "baselines": {"sasrec": False},
}


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a run on a log with this feedback."""
    rng = np.random.default_rng(0)
    log = pd.DataFrame({"uid": np.repeat(np.arange(30), 12), "item": rng.permutation(np.arange(360) % 20)})
    log["time"] = 1_700_000_000 + 3600 * (np.arange(360) % 12 * 30 + log["uid"])

    def given(*feedback):
        log.assign(**dict.fromkeys(feedback, 1.0)).to_csv(tmp_path / "log.csv", index=False)
        columns = {"user_id": "uid", "item_id": "item", "timestamp": "time"}
        section = {"file": "log.csv", "columns": columns, "feedback": dict(zip(feedback, feedback, strict=True))}
        (tmp_path / "mapping.yaml").write_text(yaml.safe_dump({"interactions": section}))
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(OPTIONS))
        source = [
            "--dataset",
            "table",
            "--data_dir",
            str(tmp_path),
            "--column_mapping",
            str(tmp_path / "mapping.yaml"),
        ]
        files = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")]
        return parse_recipe_arguments([*files, *source, "--threads", "1"])

    return given


def test_without_feedback_there_is_nothing_to_align_to(arguments, tmp_path, caplog):
    run_pipeline(arguments())
    assert "there is nothing to align to" in caplog.text
    assert (tmp_path / "run" / "report.html").is_file() and not (tmp_path / "run" / "reward").exists()
    assert {"README.md", "handler.py"} <= {path.name for path in (tmp_path / "run" / "pretrain" / "model").iterdir()}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    results = pd.read_csv(tmp_path / "run" / "results.csv").set_index(["method", "metric"])["value"]
    assert results["onerec", "recall@10"] == metrics["onerec"]["recall@10"]
    assert results["ease", "ndcg@10"] == metrics["baselines"]["ease"]["ndcg@10"]
    with pytest.raises(
        ValueError, match="reward_model: objective 'swt' .* 'watch_time', and what is known is nothing"
    ):
        run_reward(arguments())


def test_an_objective_without_its_feedback_is_refused_before_pretraining(arguments, tmp_path):
    with pytest.raises(
        ValueError, match="reward_model: objective 'swt' .* 'watch_time', .* known is like. .*align_rounds"
    ):
        run_pipeline(arguments("like"))
    assert not (tmp_path / "run" / "pretrain").exists()
