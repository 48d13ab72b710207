"""What a run says of itself while it works: its trainings' runs at a tracker, and Ctrl-C."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from onerec_hf.stages import parse_recipe_arguments
from onerec_hf.stages.stage_runner import write_json
from onerec_hf.stages.time_left import minutes_left


def test_trainings_are_runs_of_one_project_grouped_by_stage(tmp_path, monkeypatch):
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT", "WANDB_RUN_GROUP"):
        monkeypatch.setenv(name, "before")
    monkeypatch.delenv("WANDB_PROJECT")
    words = ["--config", "quickstart/debug", "--output_dir", str(tmp_path / "mine")]
    assert parse_recipe_arguments(words).tracking("pretrain") == {}
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "before"
    found = parse_recipe_arguments([*words, "--report_to", "trackio"]).tracking("align/round_1")
    assert found == {"report_to": "trackio", "project": "mine", "run_name": "align/round_1"}
    assert os.environ["WANDB_PROJECT"] == "mine" and os.environ["WANDB_RUN_GROUP"] == "align"
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "mine" / "tensorboard" / "align" / "round_1")
    monkeypatch.delenv("WANDB_PROJECT")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_says_how_to_go_on(tmp_path):
    script = """
        import signal, sys
        from dataclasses import dataclass
        from pathlib import Path
        from onerec_hf import command_line
        from onerec_hf.stages.stage_runner import Stage, run_stage

        @dataclass
        class Options:
            seed: int = 0

        def work(folder):
            print("at work", flush=True)
            signal.pause()

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
        command_line.run_recipe = lambda *words: run_stage(Stage("pretrain", Path(words[1][0]), Options()), work)
        sys.argv[1:1] = ["pretrain"]
        sys.exit(command_line.main())
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], **pipes)
    assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert said.count("[pretrain] interrupted. The same command goes on from here") == 1
    assert os.listdir(tmp_path) == ["pretrain.partial"]


def test_the_time_left_is_told_from_what_the_complete_stages_took(tmp_path):
    words = ["--config", "quickstart/debug", "--output_dir", str(tmp_path)]
    args = parse_recipe_arguments(words)

    def complete(name, seconds):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "stage.json", {"fingerprint": "", "seconds": seconds})

    complete("tokenize", 7)
    assert minutes_left(args) is None
    complete("data", 3)
    complete("pretrain", 46)
    # 56 s were .28 of a run.
    assert minutes_left(args) == pytest.approx(0.72 * 56 / 0.28 / 60)
    without_alignment = parse_recipe_arguments([*words, "--align_rounds", "0"])
    assert minutes_left(without_alignment) == pytest.approx(0.24 * 56 / 0.28 / 60)
