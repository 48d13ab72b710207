"""The recipes themselves in their debug size, run as a user runs them; and what a kill leaves behind."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from killed_recipes import kill_when
from metrics_keys import undescribed
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import onerec_hf
from onerec_hf import command_line
from onerec_hf.demo.choice import Settings, choose
from onerec_hf.demo.run_content import content_of_run
from onerec_hf.item_memory import remember_items
from onerec_hf.reporting import number
from onerec_hf.reporting.served_report import served_name
from onerec_hf.stages import parse_recipe_arguments, run_pipeline, run_pretrain

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def command(recipe: str, data_set: str, output_dir: Path, *flags: str) -> list[str]:
    """A recipe's script and its arguments."""
    config = ROOT / "recipes" / data_set / "debug.yaml"
    script = ROOT / "recipes" / f"{recipe}.py"
    # Tiny models gain nothing from threads, and lose much where others run beside them.
    threads = ("--threads", "1")
    return [str(script), "--config", str(config), "--output_dir", str(output_dir), *threads, *flags]


def run(*args, check=True) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, *command(*args)], capture_output=True, text=True, env=environment)
    if check:
        assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory):
    """A quickstart that was killed once in every stage, then finished, and when each file was written first."""
    output_dir = tmp_path_factory.mktemp("runs") / "quickstart"
    arguments = ("pipeline", "quickstart", output_dir)
    written = {}
    for point in (
        "data.partial/feed",
        "tokenize.partial/settings.json",
        "pretrain.partial/checkpoints/checkpoint-10/checkpoint_complete",
        "reward.partial/reward_model/trained.json",
        "align.partial/round_1/aligned.json",
        "recommend.partial/settings.json",
        "baselines.partial/item_knn.json",
        "serve.partial/popularity.safetensors",
        "evaluate.partial/round_1.safetensors",
    ):
        script, *words = command(*arguments)
        kill_when(lambda point=point: list(output_dir.glob(point)), script, words, output_dir.with_suffix(".log"))
        if point.startswith("pretrain"):
            # What a kill in the middle of writing a checkpoint would leave.
            half = output_dir / "pretrain.partial" / "checkpoints" / "checkpoint-15"
            half.mkdir(exist_ok=True)
            (half / "model.safetensors").write_bytes(b"half")
            (half / "checkpoint_complete").unlink(missing_ok=True)
        for path in KEPT:
            for folder in (output_dir / path, output_dir / path.replace("/", ".partial/", 1)):
                if folder.exists():
                    written.setdefault(path, folder.stat().st_mtime_ns)
    return output_dir, written, run(*arguments)


# What a later kill must not cost: complete stages, and in a killed one the parts that were complete.
KEPT = [
    "data/stage.json",
    "tokenize/stage.json",
    "pretrain/stage.json",
    "reward/reward_model/model.safetensors",
    "align/round_1/pairs.parquet",
    "align/round_1/model.safetensors",
    "recommend/stage.json",
    "baselines/item_knn.json",
    "evaluate_seed/stage.json",
    "serve/popularity.safetensors",
    "evaluate/round_1.safetensors",
]


def test_a_killed_run_finishes_without_redoing_what_was_complete(killed_and_resumed):
    output_dir, written, _ = killed_and_resumed
    assert set(written) == set(KEPT)
    assert {path: (output_dir / path).stat().st_mtime_ns for path in KEPT} == written
    # The log of the resumed training goes on after the checkpoint at step 10 and holds the steps before it too.
    steps = [row["step"] for row in json.loads((output_dir / "pretrain" / "stage.json").read_text())["log"]]
    assert steps[:2] == [5, 10] and steps[-1] == 20
    log = output_dir.with_suffix(".log").read_text()
    assert "[pretrain] resumed" in log and "[pretrain] complete" in log
    assert not list(output_dir.glob("*.partial")) and not list(output_dir.glob("*/checkpoints"))


def test_the_quickstart_ends_in_a_table_a_report_and_a_model(killed_and_resumed):
    output_dir, _, result = killed_and_resumed
    summary = result.stdout.strip().split("\n")
    assert len(summary) <= 25 and str(output_dir / "report.html") in summary[-1]
    assert (
        "Recall@10" in summary[0] and "session, simulated truth" in summary[0] and summary[-2].startswith("  and is")
    )
    report = (output_dir / "report.html").read_text()
    assert "data:image" in report and "http://" not in report.replace("http://www.w3.org", "")
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert undescribed(metrics) == []
    assert metrics["onerec"]["illegal_rate"] == 0 and metrics["onerec"]["duplicate_rate"] == 0
    for name in ("popularity", "item_knn", "ease", "sasrec"):
        assert {"recall@10", "ndcg@10", "coverage"} <= set(metrics["baselines"][name])
    assert [entry["round"] for entry in metrics["alignment"]] == [0, 1, 2]
    for entry in metrics["alignment"]:
        assert set(entry["judges"]) == {"reward_model", "independent_judge", "truth"}
        for judge in entry["judges"].values():
            assert judge["reward_max"] >= judge["reward_mean"] > 0
            assert {"swt_mean", "vtr_max", "wtr_mean", "ltr_max"} <= set(judge)
    assert metrics["tokenizer"]["collision_rate"] == 0
    served = {served_name(entry): entry for entry in metrics["served"]}
    assert {"EASE's 32, session by reward", "OneRec's 128, items by reward"} < set(served)
    assert {f"OneRec 2, guided, {beams} beams" for beams in ("128", "16")} <= {
        name.rpartition(",")[0] for name in served
    }
    assert len(served) == len(metrics["served"]) and served["The truth's own"]["oracle_share"] == 1
    truth = {name: entry["judges"]["truth"]["reward"] for name, entry in served.items()}
    assert max(truth, key=truth.get) == "The truth's own"
    assert all("interval" in entry["judges"]["independent_judge"] for entry in served.values())

    model = AutoModelForSeq2SeqLM.from_pretrained(output_dir / "align" / "model")
    tokenizer = AutoTokenizer.from_pretrained(output_dir / "align" / "model")
    history = tokenizer.item_ids[:5].tolist()
    result = onerec_hf.recommend(model, tokenizer, [history], top_k=5)[0]
    assert len(result["items"]) == 5 and not set(result["items"]) & set(history)

    recommendations = pq.read_table(output_dir / "recommend" / "recommendations.parquet")
    assert recommendations.column_names == ["user_id", "session", "items", "scores"]
    assert recommendations.num_rows == 40


def test_the_demo_shows_what_the_run_recommends(killed_and_resumed):
    output_dir, _, _ = killed_and_resumed
    content = content_of_run(output_dir)
    (example, *_) = json.loads((output_dir / "evaluate" / "examples.json").read_text())
    choice = choose(content, content.user_row(example["user"]), Settings(guidance_weight=8.0))
    assert [str(content.tokenizer.item_ids[found.item]) for found in choice.ranked] == [
        recommended["item"] for recommended in example["recommendations"]
    ]
    assert list(choice.baselines) == ["Popularity", "Item-KNN", "EASE"]
    assert choice.rewards.columns.get_level_values(0).unique().tolist() == ["Reward model", "Truth"]
    assert content.items["name"][0] == "item 100001" and choice.rewards.notna().all(axis=None)


def test_a_run_ends_in_the_last_round_that_was_kept(killed_and_resumed, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(killed_and_resumed[0], output_dir)
    # As a kill would leave it after round 2, had its checks failed, and after the judging of its sessions.
    for stage, left in (("align", "model"), ("evaluate", "metrics.json")):
        (output_dir / stage).rename(output_dir / f"{stage}.partial")
        (output_dir / f"{stage}.partial" / "stage.json").unlink()
        path = output_dir / f"{stage}.partial" / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    aligned = output_dir / "align.partial" / "round_2" / "aligned.json"
    aligned.write_text(json.dumps(json.loads(aligned.read_text()) | {"kept": False}))
    result = run("pipeline", "quickstart", output_dir, "--verbose")
    weights = [output_dir / "align" / name / "model.safetensors" for name in ("model", "round_1", "round_2")]
    final, first, second = (path.read_bytes() for path in weights)
    assert final == first != second
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert [entry["kept"] for entry in metrics["alignment"]] == [True, True, False]
    kept, dropped = metrics["alignment"][1:]
    assert {name: kept[name] for name in metrics["onerec"]} == metrics["onerec"]
    assert metrics["onerec"]["kl_to_seed"] != dropped["kl_to_seed"]
    card = (output_dir / "align" / "model" / "README.md").read_text()
    assert "| 2 (dropped) |" in card and f"| kl_to_seed | {number(kept['kl_to_seed'])} |" in card
    assert "2 (dropped)" in result.stdout and "The run ends in round 1." in (output_dir / "report.html").read_text()


def test_a_complete_run_is_left_alone_and_changed_settings_redo_a_stage(killed_and_resumed):
    output_dir, *_ = killed_and_resumed
    before = (output_dir / "pretrain" / "model" / "model.safetensors").stat().st_mtime_ns
    result = run("pretrain", "quickstart", output_dir)
    assert "[pretrain] complete" in result.stderr
    assert (output_dir / "pretrain" / "model" / "model.safetensors").stat().st_mtime_ns == before
    result = run("pretrain", "quickstart", output_dir, "--holdout_sessions", "8")
    assert "settings or inputs changed, done again" in result.stderr
    assert (output_dir / "pretrain" / "model" / "model.safetensors").stat().st_mtime_ns > before


def test_a_stage_without_its_inputs_says_which_recipe_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="run recipes/fit_tokenizer.py"):
        run_pretrain(parse_recipe_arguments(["--config", "quickstart/debug", "--output_dir", str(tmp_path)]))


@pytest.mark.parametrize("data_set", ["kuairand", "amazon_beauty"])
def test_real_data_runs_in_debug_size(data_set, tmp_path):
    data_dir = SHARED / {"kuairand": "kuairand_pure", "amazon_beauty": "amazon_beauty"}[data_set]
    if not data_dir.exists():
        pytest.skip(f"{data_dir} is not there")
    run("pipeline", data_set, tmp_path / "run", "--data_dir", str(data_dir))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["onerec"]["illegal_rate"] == 0 and undescribed(metrics) == []
    assert len(metrics["alignment"]) == (2 if data_set == "kuairand" else 1)


@pytest.mark.parametrize("item_head", [False, True])
def test_a_run_with_several_semantic_ids(item_head, tmp_path):
    flags = ["--num_semantic_ids", "2", "--align_rounds", "0", "--judged_users", "4", "--evaluation_users", "8"]
    if item_head:
        model = {"encoder_attention": "causal", "item_head": "encoder", "item_gate": True, "item_memory": 4}
        flags += ["--model", json.dumps(model), "--holdout_sessions", "64"]
    flags += ["--baselines", '{"ease": false, "sasrec": false}', "--threads", "1"]
    run_pipeline(parse_recipe_arguments(["--config", "quickstart/debug", "--output_dir", f"{tmp_path}/run", *flags]))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert undescribed(metrics) == [] and metrics["tokenizer"]["num_semantic_ids"] == 2
    assert metrics["onerec"]["illegal_rate"] == metrics["onerec"]["duplicate_rate"] == 0
    recommendations = pq.read_table(tmp_path / "run" / "recommend" / "recommendations.parquet")
    assert all(len(set(items)) == len(items) == 50 for items in recommendations["items"].to_pylist())
    if item_head:
        folder = tmp_path / "run" / "pretrain" / "model"
        model, again = (onerec_hf.OneRecForConditionalGeneration.from_pretrained(folder) for _ in range(2))
        tokenizer = onerec_hf.OneRecTokenizer.from_pretrained(folder)
        fitted = pq.read_table(tmp_path / "run" / "data" / "user_histories.parquet")["history_item_ids"]
        remember_items(again, [tokenizer.item_index(history) for history in fitted.to_pylist()])
        assert (model.item_memory.neighbours >= 0).any()
        assert torch.equal(model.item_memory.neighbours, again.item_memory.neighbours)


CONFIGURATIONS = [
    *("own_log.yaml", "recall.yaml"),
    *sorted(path.relative_to(ROOT / "recipes").as_posix() for path in ROOT.glob("recipes/*/*.yaml")),
]


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if not name.startswith("accelerate_configs")])
def test_every_configuration_is_read(name, tmp_path):
    given = ["--config", str(ROOT / "recipes" / name), "--output_dir", str(tmp_path), "--data_dir", str(tmp_path)]
    args = parse_recipe_arguments(given)
    assert args.align_rounds == 0 or not name.endswith("recall.yaml")


def test_help_lists_the_options_and_unknown_ones_are_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse_recipe_arguments(["--help"])
    assert "--r_dpo" in capsys.readouterr().out
    config = tmp_path / "typo.yaml"
    config.write_text("output_dir: run\ncodebok_sizes: [8, 8]\n")
    with pytest.raises(ValueError, match="codebok_sizes"):
        parse_recipe_arguments(["--config", str(config)])
    with pytest.raises(ValueError, match="itemknn; there are popularity"):
        parse_recipe_arguments(["--output_dir", "run", "--baselines", '{"itemknn": false}'])


def test_a_configuration_takes_from_its_base_what_it_leaves_out(tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "all.yaml").write_text("session_items: 4\ntop_k: 7\nmodel: {dropout: 0.4}\n")
    (tmp_path / "set.yaml").write_text("base: all.yaml\ntop_k: 8\nhistory_items: 9\n")
    config = tmp_path / "sets" / "debug.yaml"
    config.write_text("base: ../set.yaml\nhistory_items: 10\n")
    given = ["--config", str(config), "--output_dir", str(tmp_path / "run")]
    args = parse_recipe_arguments(given)
    assert (args.session_items, args.top_k, args.history_items, args.model) == (4, 8, 10, {"dropout": 0.4})
    assert parse_recipe_arguments([*given, "--session_items", "3"]).session_items == 3
    with pytest.raises(ValueError, match="given with --config"):
        parse_recipe_arguments([*given, "--base", "all.yaml"])
    for text, message in {
        "base: ../nowhere.yaml": "nowhere.yaml, which is no file",
        "base: debug.yaml": "debug.yaml, which is itself",
    }.items():
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse_recipe_arguments(given)
    config.write_text("base: ../set.yaml")
    (tmp_path / "all.yaml").write_text("top_n: 7")
    with pytest.raises(ValueError, match="all.yaml has 'top_n'"):
        parse_recipe_arguments(given)


def test_a_configuration_that_cannot_be_read_is_named(tmp_path):
    config = tmp_path / "run.yaml"
    for content, message in {
        "# Für alle\ntop_k: 3".encode("utf-16"): "run.yaml: is not written in utf-8: .* Save it in this encoding",
        "# Für alle\ntop_k: 3".encode("latin-1"): "run.yaml: is not written in utf-8",
        b"top_k: [3": "run.yaml: not valid YAML",
        b"- top_k": "run.yaml: must hold options of a recipe",
        b"": "run.yaml: must hold options of a recipe, .* holds None",
    }.items():
        config.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            parse_recipe_arguments(["--config", str(config), "--output_dir", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        parse_recipe_arguments(["--config", str(tmp_path / "nowhere.yaml"), "--output_dir", str(tmp_path)])
    config.write_text("top_k: 3", encoding="utf-8-sig")
    assert parse_recipe_arguments(["--config", str(config), "--output_dir", str(tmp_path)]).top_k == 3


def test_files_are_utf_8_where_the_locale_is_ascii(tmp_path):
    (tmp_path / "run.yaml").write_text("# Für alle\ntext_encoder: ü\ntop_k: 3", encoding="utf-8")
    (tmp_path / "map.yaml").write_text(
        "interactions: {file: log.csv, columns: {user_id: wer, item_id: waß, timestamp: t}}", encoding="utf-8"
    )
    (tmp_path / "log.csv").write_text(
        "wer,waß,t\n" + "".join(f"{i % 2},ü{i},{i}\n" for i in range(3)), encoding="utf-8"
    )
    code = """if True:
        import locale
        from onerec_hf.data import load_saved_feed, read_table, save_feed
        from onerec_hf.stages import parse_recipe_arguments
        args = parse_recipe_arguments(["--config", "run.yaml", "--output_dir", "run"])
        save_feed(read_table(".", "map.yaml"), "feed")
        items = load_saved_feed("feed").items["item_id"].tolist()
        assert locale.getpreferredencoding(False) == "ANSI_X3.4-1968"
        print(ascii(args.text_encoder), args.top_k, ascii(items))
        print(chr(0x2013))
    """
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | ascii_locale | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.splitlines()[-2:] == ["'\\xfc' 3 ['\\xfc0', '\\xfc1', '\\xfc2']", "?"]


@pytest.mark.parametrize(
    "option, fields, message",
    [
        (
            "pretrain",
            {"lerning_rate": 1},
            "pretrain has 'lerning_rate', .* Seq2SeqTrainingArguments .* 'learning_rate'",
        ),
        ("align", {"lambda": 1}, "align has 'lambda', which OneRecDPOConfig"),
        ("preferences", {"serch": "beam"}, "preferences has 'serch', which PreferenceSampling .* 'search'"),
        ("model", {"hiden_size": 8}, "'hidden_size'"),
        ("judge_model", {"towers": 8}, "OneRecRewardConfig"),
        ("quantizer", {"assignmnt": "greedy"}, "'assignment'"),
        ("embedding_adaptation", {"steps": 8}, "EmbeddingAdaptation"),
        ("align_lora", {"rank": 8}, "align_lora has 'rank', which LoraConfig"),
        ("baselines", {"sasrec": {"epoch": 1}}, "baselines.sasrec has 'epoch', which SASRec .* 'epochs'"),
    ],
)
def test_a_field_that_nothing_reads_is_refused_before_any_stage(option, fields, message):
    if option == "align_lora":
        pytest.importorskip("peft")
    with pytest.raises(ValueError, match=message):
        parse_recipe_arguments(["--output_dir", "run", f"--{option}", json.dumps(fields)])


def readme_code(title: str) -> str:
    """The first Python block under a heading of the README."""
    return re.search(rf"\n## {title}\n.*?```python\n(.*?)```", README, re.DOTALL).group(1)


def test_the_readme_is_short_and_its_commands_are_there():
    assert len(README.split()) <= 900
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    assert commands == ["bash recipes/quickstart/run.sh", "bash tests/run.sh"]
    linked = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    for path in [*(command.split()[1] for command in commands), *(link for link in linked if "://" not in link)]:
        assert (ROOT / path).is_file(), path


def test_the_readme_recommends(killed_and_resumed, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(killed_and_resumed[0])
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(readme_code("Recommend"), "README.md", "exec"), scope)
    assert "'items': [" in capsys.readouterr().out
    assert len(scope["recommender"](scope["histories"], top_k=10)[0]["items"]) == 10


def a_log(path: Path) -> None:
    users = np.arange(1200) % 100
    items = 20 * (users % 6) + np.random.default_rng(0).integers(20, size=len(users))
    log = pd.DataFrame({"user": users, "item": items, "time": 1_700_000_000 + 600 * np.arange(len(users))})
    log.to_csv(path, index=False)


def test_the_readme_trains_on_a_log_of_users_items_and_times(tmp_path, monkeypatch):
    a_log(tmp_path / "log.csv")
    monkeypatch.chdir(tmp_path)
    code = (
        readme_code("Train on your own log")
        .replace('"small"', '"debug"')
        .replace("num_train_epochs=10", "max_steps=2")
    )
    assert code.count("max_steps=2") == code.count('"debug"') == 1
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    recommended = scope["recommendations"]
    assert recommended["user_id"].nunique() == 100 and recommended["rank"].max() == 10


def test_the_readmes_commands_go_from_a_folder_to_a_report(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_data").mkdir()
    a_log(tmp_path / "my_data" / "log.csv")
    monkeypatch.chdir(tmp_path)
    shell = re.search(r"```shell\n(onerec init.*?)```", README, re.DOTALL).group(1).splitlines()
    init, pipeline = (shlex.split(line, comments=True) for line in shell[:2])
    monkeypatch.setattr(sys, "argv", init)
    with pytest.raises(SystemExit) as done:
        command_line.main()
    assert not done.value.code
    small = {"preset": "debug", "pretrain": '{"max_steps": 2}', "baselines": '{"sasrec": false}', "threads": "1"}
    flags = [part for name, value in small.items() for part in (f"--{name}", value)]
    assert pipeline[:5] == ["accelerate", "launch", "-m", "onerec_hf", "pipeline"]
    capsys.readouterr()
    run_pipeline(parse_recipe_arguments([*pipeline[5:], *flags]))
    _, rows = capsys.readouterr().out.split("Recall@10  NDCG@10\n")  # what training says comes before
    assert [line.split()[0] for line in rows.split("\n")[1:5]] == ["OneRec", "Popularity", "Item-KNN", "EASE"]
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
