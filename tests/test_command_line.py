"""The command `onerec`: a sub-command for every recipe, packaged recipes by name, and what `info` says."""

import sys
from importlib import metadata
from pathlib import Path

import pytest

from onerec_hf import command_line, stages
from onerec_hf.packaged_recipes import packaged_recipes
from onerec_hf.stages import parse_recipe_arguments

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
RUN_BY_NAME = {"demo", "init", "serve"}  # which take a folder, and no options of a recipe
WORDS = {"ablations": ["r_dpo"], "search": ["--methods", "item_knn"]}
RUN = {"ablations": "run_ablation", "fit_tokenizer": "run_tokenize"}


def onerec(monkeypatch, *words: str) -> int | None:
    monkeypatch.setattr(sys, "argv", ["onerec", *words])
    return command_line.main()


@pytest.mark.parametrize("name", sorted({*RECIPES} - RUN_BY_NAME))
def test_every_recipe_is_a_sub_command(name, monkeypatch, tmp_path, capsys):
    calls = []
    for run in [run for run in vars(stages) if run.startswith("run_")]:
        monkeypatch.setattr(stages, run, lambda *given, run=run: calls.append((run, given)))
    given = ["--config", "quickstart/debug", "--output_dir", str(tmp_path), "--top_k", "9", "--threads", "1"]
    onerec(monkeypatch, name, *WORDS.get(name, []), *given)
    ((run, (args, *_)),) = calls
    assert run == RUN.get(name, f"run_{name}")
    assert (args.output_dir, args.top_k, args.preset) == (tmp_path, 9, "debug")
    assert onerec(monkeypatch) == 0
    assert f"\n  {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        onerec(monkeypatch, name, "--help")
    assert f"usage: onerec {name} " in capsys.readouterr().out


def test_the_demo_takes_a_run(monkeypatch, tmp_path, capsys):
    served = []
    monkeypatch.setattr("onerec_hf.demo.page.launch_page", lambda *given, **options: served.append((given, options)))
    monkeypatch.setattr("onerec_hf.demo.page.optional_gradio", lambda: None)
    monkeypatch.setattr("onerec_hf.demo.run_content.content_of_run", lambda run: {"run": run})
    onerec(monkeypatch, "demo", str(tmp_path / "mine"), "--port", "7999")
    options = {"server_name": "127.0.0.1", "server_port": 7999, "share": False}
    assert served == [(({"run": tmp_path / "mine"}, "OneRec, mine"), options)]
    with pytest.raises(SystemExit, match="0"):
        onerec(monkeypatch, "demo", "--help")
    assert "usage: onerec demo " in capsys.readouterr().out


def test_the_server_takes_a_model_and_limits(monkeypatch, capsys):
    serving = pytest.importorskip("onerec_hf.serving", reason="the server needs its extra: pip install -e '.[serve]'")
    served = []
    monkeypatch.setattr(serving, "serve", lambda *given: served.append(given))
    onerec(monkeypatch, "serve", "name/model", "--revision", "v2", "--port", "0", "--max_batch", "8", "--wait_ms", "2")
    revisions = {"model": {"revision": "v2"}, "reward_model": {"revision": None}}
    limits = serving.Limits(histories=8)
    options = serving.ServerOptions("name/model", None, revisions, wait_seconds=0.002, limits=limits)
    assert served == [(options, "127.0.0.1", 0)]
    with pytest.raises(SystemExit, match="2"):
        onerec(monkeypatch, "serve", "name/model", "--max_beams", "0")
    assert "--max_beams must be above 0, got 0" in capsys.readouterr().err


def test_an_unknown_sub_command_is_refused_with_the_list(monkeypatch, capsys):
    assert onerec(monkeypatch, "sample-preferences", "--help") == 2
    message = capsys.readouterr().err
    assert "no sub-command 'sample-preferences'. Did you mean sample_preferences?" in message
    assert all(f"\n  {name} " in message for name in (*RECIPES, "info"))


def test_info_says_what_is_there_and_what_is_missing(monkeypatch, capsys):
    there = metadata.version

    def version(name):
        if name in ("peft", "trl"):
            raise metadata.PackageNotFoundError(name)
        return there(name) if name in command_line.PLATFORM else "3.2.1"

    monkeypatch.setattr(metadata, "version", version)
    assert onerec(monkeypatch, "info") == 0
    printed = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert lines["torch"] == there("torch") and lines["optuna"] == "3.2.1 (for onerec search)"
    assert lines["trl"] == "missing" and lines["Python"].startswith(sys.version.split()[0])
    assert lines["peft"] == "missing: pip install -c constraints.txt 'onerec_hf[lora]' (for adapters, align_lora)"
    assert f"{ROOT / 'recipes' / 'accelerate_configs'}: cpu.yaml, " in printed


def test_packaged_recipes_have_names_and_a_file_goes_before_them(monkeypatch, tmp_path):
    recipes = ROOT / "recipes"
    for name, path in {
        "quickstart": "quickstart/pipeline.yaml",
        "quickstart/recall": "quickstart/recall.yaml",
        "recall": "recall.yaml",
    }.items():
        assert packaged_recipes()[name] == recipes / path
    assert {"kuairand", "amazon_beauty", "quickstart/debug"} < set(packaged_recipes())
    assert not {"accelerate_configs/cpu", "search_spaces"} & set(packaged_recipes())

    monkeypatch.chdir(tmp_path)
    given = ["--config", "quickstart/debug", "--output_dir", "run", "--threads", "1"]
    assert parse_recipe_arguments(given).preset == "debug"
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "debug").write_text("preset: base")
    assert parse_recipe_arguments(given).preset == "base"
    # A folder of that name is no file.
    assert parse_recipe_arguments(["--config", "quickstart", *given[2:]]).preset == "small"
    with pytest.raises(FileNotFoundError, match=r"no file quikstart, .* kuairand, .* Did you mean quickstart\?"):
        parse_recipe_arguments(["--config", "quikstart", "--output_dir", "run"])
