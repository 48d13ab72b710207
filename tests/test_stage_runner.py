"""When a stage is done again: its arguments, the stages that it reads, and what it reads from outside the run."""

import errno
import json
import os
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from onerec_hf.stages import parse_recipe_arguments, run_data, run_evaluate, run_pipeline
from onerec_hf.stages.baselines_stage import fitted_baselines, fitting_options
from onerec_hf.stages.data_stage import EVALUATION_CASES, USER_HISTORIES, prepared_data
from onerec_hf.stages.recipe_arguments import GROUPS, EvaluateArguments, PolicyArguments, RecommendArguments
from onerec_hf.stages.stage_runner import OutsideInput, Stage, run_stage

MAPPING = """
interactions:
  file: log/*.csv
  columns: {user_id: user, item_id: item, timestamp: time}
  feedback: {like: liked}
"""


@dataclass
class Options:
    dim: int = 4


@pytest.fixture
def arguments(tmp_path):
    threads = torch.get_num_threads()
    yield lambda *flags: parse_recipe_arguments(["--output_dir", str(tmp_path / "run"), *flags])
    torch.set_num_threads(threads)


def write_log(path: Path, users: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{user},{item},{100 * item + user},{item % 2}" for user in users for item in range(8)]
    path.write_text("\n".join(["user,item,time,liked", *rows]) + "\n")


def counted(stage: Stage) -> int:
    """How often the work of a stage was done by now, this call included."""
    path = stage.output_dir / "count"
    done = int(path.read_text()) if path.exists() else 0

    def work(folder: Path) -> None:
        path.write_text(str(done + 1))

    run_stage(stage, work)
    return int(path.read_text())


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def run(error):
        def work(folder):
            raise error

        with pytest.raises(type(error)) as caught:
            run_stage(Stage("first", tmp_path, Options()), work)
        return getattr(caught.value, "__notes__", [])

    full = f"The disk of {tmp_path / 'first.partial'} is full: make room, and run the same command again. "
    by_rust = RuntimeError("I/O error: No space left on device (os error 28)")
    for error in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), by_rust):
        [note] = run(error)
        assert note.startswith(full)
    assert run(RuntimeError("file write failed")) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    [note] = run(RuntimeError("file write failed"))  # as of torch's checkpoints
    assert note.startswith(full)


def test_a_stage_is_done_again_when_its_arguments_or_a_stage_that_it_reads_change(tmp_path, caplog):
    first = Stage("first", tmp_path, Options())
    run_stage(first, lambda folder: {})
    second = Stage("second", tmp_path, Options(), ["first"])
    assert counted(second) == counted(second) == 1 and second.is_complete()
    assert not replace(second, arguments=Options(5)).is_complete()
    with caplog.at_level("INFO"):
        assert counted(replace(second, arguments=Options(5))) == 2
    assert "settings or inputs changed, done again (dim)" in caplog.text
    run_stage(replace(first, arguments=Options(7)), lambda folder: {})
    with caplog.at_level("INFO"):
        assert counted(replace(second, arguments=Options(5))) == 3
    assert "done again (first)" in caplog.text


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_stage_is_done_again_when_what_it_reads_from_outside_changed_under_the_same_name(tmp_path, kind):
    log = tmp_path / "outside" / "log.csv"
    log.parent.mkdir()
    log.write_text("a\n")
    stage = Stage("stage", tmp_path, Options(), outside=[OutsideInput(log if kind == "file" else log.parent)])
    assert counted(stage) == counted(stage) == 1
    log.write_text("a\nb\n")
    assert counted(stage) == counted(stage) == 2
    before = log.stat()
    log.write_text("a\nc\n")  # as long as before
    os.utime(log, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert counted(stage) == counted(stage) == 3
    (log.parent / "more.csv").write_text("d\n")
    assert counted(stage) == (3 if kind == "file" else 4)


def test_a_repository_is_told_by_its_commit_and_taken_as_unchanged_without_the_hub(tmp_path, monkeypatch, caplog):
    commits = iter(["one", "one", "two"])

    def repo_info(self, repo_id, repo_type, timeout):
        assert (repo_id, repo_type) == ("me/log", "dataset")
        return type("", (), {"sha": next(commits)})

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", repo_info)
    stage = Stage("stage", tmp_path, Options(), outside=[OutsideInput("me/log", "dataset")])
    assert [counted(stage) for _ in range(3)] == [1, 1, 2]
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert counted(stage) == 2
    assert "me/log cannot be looked at now, and is taken to be unchanged" in caplog.text


def test_a_log_that_grew_a_shard_and_an_edited_mapping_redo_the_data(tmp_path, arguments):
    data_dir, mapping = tmp_path / "data", tmp_path / "mapping.yaml"
    write_log(data_dir / "log" / "a.csv", range(4))
    (data_dir / "unread.txt").write_text("notes")
    mapping.write_text(MAPPING)
    args = arguments("--dataset", "table", "--data_dir", str(data_dir), "--column_mapping", str(mapping))

    def users() -> int:
        return json.loads((run_data(args) / "stage.json").read_text())["dataset"]["num_users"]

    def seconds() -> float:
        return (args.output_dir / "data" / "stage.json").stat().st_mtime_ns

    assert users() == 4
    written = seconds()
    (data_dir / "unread.txt").write_text("other notes")
    assert users() == 4 and seconds() == written
    write_log(data_dir / "log" / "a.csv", range(5))
    assert users() == 5
    write_log(data_dir / "log" / "b.csv", range(5, 7))
    assert users() == 7
    mapping.write_text(MAPPING + "positive_feedback: [like]\n")
    run_data(args)
    about = json.loads((args.output_dir / "data" / "stage.json").read_text())["dataset"]
    assert about["positive_feedback"] == ["like"]
    (data_dir / "log" / "b.csv").unlink()
    assert users() == 5


def test_what_is_not_fitted_stands_in_the_histories_before_the_evaluated_period(tmp_path, arguments):
    data_dir, mapping = tmp_path / "data", tmp_path / "mapping.yaml"
    write_log(data_dir / "log" / "a.csv", range(4))
    mapping.write_text(MAPPING)
    data = ["--dataset", "table", "--data_dir", str(data_dir), "--column_mapping", str(mapping)]
    periods = ["--validation_start", "1970-01-01T00:08:00", "--test_start", "1970-01-01T00:10:00"]  # items 5, 6
    args = arguments(*data, *periods, "--fit_validation", "false")
    run_data(args)
    prepared = prepared_data(args, "test")
    fitted, before, cases = (
        {row["user_id"]: row for row in table.to_list()}
        for table in (
            prepared.read(USER_HISTORIES),
            prepared.histories_before_evaluation(),
            prepared.read(EVALUATION_CASES),
        )
    )
    assert fitted.keys() == before.keys() == cases.keys() == {0, 1, 2, 3}
    for user in range(4):
        assert fitted[user]["history_item_ids"] == [0, 1, 2, 3, 4]
        assert cases[user]["history_item_ids"] == [0, 1, 2, 3, 4, 5] and cases[user]["next_item_id"] == 6
        shared = before[user].keys() & cases[user].keys()
        assert "exposed_item_ids" in shared and all(before[user][name] == cases[user][name] for name in shared)


def test_what_is_recommended_with_does_not_redo_an_evaluation(arguments):
    plain, chosen = arguments(), arguments("--recommend_reward_model", "judge", "--recommend_search", "diverse_beam")
    assert plain.group(RecommendArguments) != chosen.group(RecommendArguments)
    assert plain.group(EvaluateArguments) == chosen.group(EvaluateArguments)
    other = arguments("--counterfactual_users", "5")
    assert plain.group(EvaluateArguments) != other.group(EvaluateArguments)
    assert plain.group(PolicyArguments) == other.group(PolicyArguments)


def test_every_option_belongs_to_a_stage_or_changes_no_output(arguments):
    staged = {entry.name for group in GROUPS for entry in fields(group)}
    others = {entry.name for entry in fields(arguments())} - staged
    hub = {"hub_model_id", "hub_reward_model_id", "hub_preferences_id", "hub_private_repo"}
    assert others == {"output_dir", "base", "threads", "report_to", "verbose", "update_starts", *hub}


@pytest.mark.parametrize(
    "option, values, decided_by",
    [
        ("preferences", {"num_candidates": 8}, "num_candidates"),
        ("preferences", {"sample_share": 0.1}, "r_dpo"),
        ("preferences", {"min_reward_gap": 0.1}, "min_reward_margin"),
        ("preferences", {"exclude_history": False}, "exclude_consumed"),
        ("model", {"codebook_sizes": [8, 8]}, "codebook_sizes"),
        ("model", {"session_items": 2}, "session_items"),
        ("reward_model", {"history_items": 2}, "history_items"),
        ("judge_model", {"feedback": ["like"]}, "the data"),
        ("quantizer", {"collision_policy": "share"}, "collision_policy"),
        ("quantizer", {"seed": 3}, "seed"),
        ("embedding_adaptation", {"seed": 3}, "seed"),
        ("pretrain", {"output_dir": "elsewhere"}, "output_dir"),
        ("align", {"seed": 3}, "seed"),
        ("baselines", {"sasrec": {"seed": 3}}, "seed"),
    ],
)
def test_a_field_that_another_option_decides_is_refused(arguments, option, values, decided_by):
    [name] = values if option != "baselines" else values["sasrec"]
    with pytest.raises(ValueError, match=f"has '{name}', which .*{decided_by} decides: leave it out of {option}"):
        arguments(f"--{option}", json.dumps(values))


@pytest.mark.parametrize(
    "option, field, text, value",
    [
        ("pretrain", "learning_rate", "1e-5", 1e-5),
        ("pretrain", "max_steps", "2e3", 2000),
        ("align", "beta", "1e-1", 0.1),
        ("align", "lambda_dpo", "5e-1", 0.5),
        ("model", "dropout", "1e-1", 0.1),
        ("reward_model", "rate_prior", "2e1", 20.0),
        ("preferences", "loser_quantile", "5e-1", 0.5),
        ("baselines", "sasrec.learning_rate", "1e-3", 1e-3),
        ("baselines", "fused.members.sasrec.epochs", "2e0", 2),
    ],
)
def test_numbers_that_yaml_reads_as_text_are_numbers(arguments, tmp_path, option, field, text, value):
    *owners, name = [option, *field.split(".")]
    for given, expected in ((text, value), ("much", None)):
        nested = f"{name}: {given}"
        for owner in owners[::-1]:
            nested = f"{owner}: {{{nested}}}"
        (tmp_path / "run.yaml").write_text(nested)
        if expected is None:
            with pytest.raises(ValueError, match=rf"{option}\.{field} must be a .*number, got 'much'"):
                arguments("--config", str(tmp_path / "run.yaml"))
            continue
        found = vars(arguments("--config", str(tmp_path / "run.yaml")))
        for owner in [*owners, name]:
            found = found[owner]
        assert found == expected and type(found) is type(expected)


def test_fields_of_other_types_are_refused(arguments):
    for option, values, message in [
        ("pretrain", {"learning_rate": True}, "pretrain.learning_rate must be a number, got True"),
        ("preferences", {"num_rejected": 1.5}, "preferences.num_rejected must be a whole number, got 1.5"),
        ("model", {"item_gate": "yes"}, "model.item_gate must be true or false, got 'yes'"),
        ("reward_model", {"dropout": [0.1]}, "reward_model.dropout must be a number"),
        (
            "pretrain",
            {"eval_strategy": "never"},
            "pretrain.eval_strategy must be one of no, steps, epoch, got 'never'",
        ),
        ("align", {"lr_scheduler_type": "cosin"}, "align.lr_scheduler_type must be one of linear, cosine"),
        ("judge_model", {"objectives": ["ltr", "none"]}, "judge_model: .*objective .*none.* lacks kind, source"),
        (
            "reward_model",
            {"objectives": [{"name": "wtr", "source": "follow", "kind": "binary", "weight": "much"}]},
            "reward_model: .*'wtr': weight must be a number, got 'much'",
        ),
    ]:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            arguments(f"--{option}", json.dumps(values))


def test_guided_searches_by_their_beams(arguments):
    assert arguments("--served_guidance", '{"512": "24", "128": 3}').served_guidance == {512: 24.0, 128: 3}
    for wrong in ('{"0": 1}', '{"8": -1}', '{"8": null}'):
        with pytest.raises(ValueError, match="served_guidance needs beams from 1 on and weights from 0 on"):
            arguments("--served_guidance", wrong)
    with pytest.raises(ValueError, match="served_guidance of 8 beams must be a number, got 'much'"):
        arguments("--served_guidance", '{"8": "much"}')


def test_no_is_what_yaml_reads_as_false(arguments, tmp_path):
    (tmp_path / "run.yaml").write_text("pretrain: {save_strategy: no, eval_strategy: no}\nholdout_sessions: 0")
    found = arguments("--config", str(tmp_path / "run.yaml"))
    assert found.pretrain == {"save_strategy": "no", "eval_strategy": "no"}


@pytest.mark.parametrize("field, value", [("eval_strategy", "steps"), ("load_best_model_at_end", True)])
def test_nothing_is_evaluated_in_training_where_nothing_is_held_out(arguments, field, value):
    given = json.dumps({field: value})
    assert arguments("--pretrain", given).pretrain == {field: value}
    for flags, message in [
        (
            ["--pretrain", given, "--holdout_sessions", "0"],
            rf"pretrain.{field} is .*, but holdout_sessions is 0: hold",
        ),
        (["--pretrain_recent", given, "--recent_days", "2", "--holdout_sessions", "0"], f"pretrain_recent.{field}"),
        (["--reward", given], f"reward.{field} is .* leave the field out"),
        (["--align", given], f"align.{field} is .* leave the field out"),
    ]:
        with pytest.raises(ValueError, match=message):
            arguments(*flags)
    arguments("--holdout_sessions", "0", "--reward", '{"eval_strategy": "no"}')


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--hub_model_id", "https://huggingface.co/me/model"],
            "hub_model_id must be a repository such as name/model",
        ),
        (["--hub_preferences_id", "me/../x"], "hub_preferences_id must be a repository"),
        (["--hub_reward_model_id", "me/reward"], "hub_reward_model_id goes with hub_model_id"),
        (["--hub_model_id", "me/m", "--hub_reward_model_id", "me/m"], "hub_reward_model_id and hub_model_id are both"),
        (["--hub_model_id", "me/m", "--hub_reward_model_id", "me/r", "--align_rounds", "0"], "no reward model"),
    ],
)
def test_what_cannot_be_pushed_is_refused_at_the_door(arguments, flags, message):
    with pytest.raises(ValueError, match=message):
        arguments(*flags)


def test_a_run_that_nobody_could_push_does_not_begin(arguments, monkeypatch):
    def whoami(self):
        raise OSError("Token is required.")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", whoami)
    args = arguments("--hub_model_id", "me/model")
    for run in (run_pipeline, run_evaluate):
        with pytest.raises(ValueError, match="me/model cannot be pushed to: Token is required.*hf auth login"):
            run(args)
    assert not any(args.output_dir.glob("*"))


def test_a_home_folder_is_found(arguments, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert arguments("--output_dir=~/runs").output_dir == tmp_path / "runs"


def test_the_fused_baseline_goes_with_its_members(arguments):
    def given(**baselines):
        return arguments("--baselines", json.dumps(baselines))

    everything = ["popularity", "item_knn", "ease", "sasrec", "fused"]
    assert fitted_baselines(given()) == everything
    assert fitted_baselines(given(popularity=False, ease=False)) == ["item_knn", "sasrec"]
    assert fitted_baselines(given(fused=False)) == everything[:-1]
    own = given(ease=False, sasrec={"epochs": 2}, fused={})
    assert fitted_baselines(own) == ["popularity", "item_knn", "sasrec", "fused"]
    members = {"ease": {}, "sasrec": {"epochs": 2, "seed": 0}}
    assert fitting_options(own, "fused") == {"members": members}
    assert fitting_options(own, "sasrec") == members["sasrec"]  # one fit serves both
    named = given(ease={"regularization": 9.0}, fused={"members": ["ease", "item_knn"], "weights": {"ease": 2.0}})
    assert fitting_options(named, "fused")["members"] == {"ease": {"regularization": 9.0}, "item_knn": {}}
    mapped = given(fused={"members": {"ease": {"half_life": None}}})
    assert fitting_options(mapped, "fused")["members"] == {"ease": {"half_life": None}}
    for fused, message in [
        ({"members": ["als"]}, "baselines.fused.members has 'als'; there are popularity, item_knn, ease, sasrec."),
        ({"members": "ease"}, "baselines.fused.members must be a list"),
        ({"members": {"ease": {"epochs": 1}}}, "baselines.fused.members.ease has 'epochs', which EASE"),
        ({"weights": {"item_knn": 1.0}}, "baselines.fused: weights has 'item_knn', which is no member"),
        ({"weight": 1.0}, "baselines.fused has 'weight', which Fused does not take. Did you mean 'weights'"),
    ]:
        with pytest.raises(ValueError, match=message):
            given(fused=fused)


def test_the_old_name_of_the_embeddings_adaptation_is_read(arguments, caplog):
    assert arguments("--item_alignment", '{"num_steps": 3}').embedding_adaptation == {"num_steps": 3}
    assert "item_alignment is now called embedding_adaptation" in caplog.text
