"""Model cards filled from a run's metrics, and pushing model, tokenizer and reward model to the Hub with them.

The text of the cards is in `model_cards/*.md` at the repository's root, Jinja templates that an installed package
carries as `onerec_hf/model_card_templates/`. `metrics` is everywhere the dict of the evaluate stage's `metrics.json`.
"""

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    DatasetCard,
    DatasetCardData,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
)
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from ..endpoint import ENDPOINT_FILES, write_endpoint_files
from ..staged_files import staged_files
from .alignment_report import judge_change, round_name
from .tables import Measured, Table, fact_rows

# A wheel holds the templates inside the package; a checkout, installed with -e or not, beside it.
_PACKAGE = Path(__file__).parents[1]
_TEMPLATE_DIRECTORIES = [_PACKAGE / "model_card_templates", _PACKAGE.parent / "model_cards"]
TASK = "generative-recommendation"
TAGS = ["onerec", "recommender-systems", "generative-retrieval", "semantic-ids"]
LICENSE = "apache-2.0"
EXAMPLE_ITEMS = 5
# Weights, configurations, vocabularies, item index and exported code; what a Trainer leaves beside them stays at home.
PUBLISHED_SUFFIXES = (".json", ".jinja", ".parquet", ".py", ".safetensors")


def onerec_card(model_dir: str | Path, metrics: Mapping[str, Any], repo_id: str | None = None) -> ModelCard:
    """Card of a generator and its tokenizer.

    Args:
        model_dir: directory with a saved `OneRecForConditionalGeneration` and its `OneRecTokenizer`.
        metrics: the run's metrics; `dataset` (with its `name`), `onerec` and `baselines` are required, `tokenizer` and
            `alignment` are shown where present.
        repo_id: repository that the card's code loads from. Without one the code is to be run in `model_dir`.

    Raises:
        ValueError: if a required part of the metrics is missing.
        OSError: if `model_dir` holds no model or no tokenizer.
    """
    _require(metrics, "dataset", "onerec", "baselines")
    config = AutoConfig.from_pretrained(model_dir)
    values = {
        "num_parameters": count_parameters(model_dir),
        "config_table": _config_table(config),
        "tokenizer_table": _facts_table(metrics.get("tokenizer", {})),
        "ranking_table": ranking_table(metrics),
        "session_table": _facts_table({k: v for k, v in metrics["onerec"].items() if "@" not in k}),
        "alignment_table": alignment_table(metrics.get("alignment", [])),
    }
    ranking = {"pipeline_tag": TASK, "eval_results": _ranking_results(metrics)}
    return _render("onerec.md", metrics, repo_id, "mixture-of-experts", model_dir, **ranking, **values)


def tokenizer_card(tokenizer_dir: str | Path, metrics: Mapping[str, Any], repo_id: str | None = None) -> ModelCard:
    """Card of a `OneRecTokenizer` that is published alone; arguments and errors as for [`onerec_card`]."""
    _require(metrics, "dataset")
    return _render("tokenizer.md", metrics, repo_id, "tokenizer", tokenizer_dir)


def reward_model_card(
    reward_model_dir: str | Path,
    tokenizer_dir: str | Path,
    metrics: Mapping[str, Any],
    repo_id: str | None = None,
    judge: str = "reward_model",
) -> ModelCard:
    """Card of a reward model.

    Args:
        reward_model_dir: directory with a saved `OneRecRewardModel`.
        tokenizer_dir: directory with the tokenizer of the codes it was trained on.
        metrics: the run's metrics; `dataset` and `reward_models` are required.
        repo_id: as for [`onerec_card`], whose errors this has too.
        judge: name of this reward model in `metrics["reward_models"]`.
    """
    _require(metrics, "dataset", "reward_models")
    _require(metrics["reward_models"], judge)
    config = AutoConfig.from_pretrained(reward_model_dir)
    values = {
        "num_parameters": count_parameters(reward_model_dir),
        "config": config,
        "config_table": _config_table(config),
        "reward_table": _facts_table(metrics["reward_models"][judge]),
    }
    return _render("reward_model.md", metrics, repo_id, "reward-model", tokenizer_dir, **values)


def preferences_card(
    num_pairs: int, sampling: Mapping[str, Any], dataset: Mapping[str, Any], repo_id: str | None = None
) -> DatasetCard:
    """Card of a round's preference pairs, in a file `pairs.parquet` beside it.

    Args:
        sampling: how they were drawn, by option.
        dataset: `dataset` of the run's metrics, which the users are from.
        repo_id: repository that the card's code loads from. Without one the code is to be run in the folder.
    """
    files = [{"split": "train", "path": "pairs.parquet"}]
    configs = [{"config_name": "default", "data_files": files}]
    data = DatasetCardData(license="unknown", tags=[*TAGS, "preference"], configs=configs)
    text = (
        _environment()
        .get_template("preferences.md")
        .render(
            card_data=data.to_yaml(),
            dataset=dataset,
            dataset_table=_dataset_table(dataset),
            num_pairs=num_pairs,
            sampling_table=_facts_table(sampling),
            source=repo_id or ".",
        )
    )
    return DatasetCard(text)


def save_model_card(card: ModelCard | DatasetCard, directory: str | Path) -> Path:
    """Writes the card to `README.md` in an existing directory, whole or not at all; returns its path."""
    path = Path(directory) / "README.md"
    with staged_files(directory, last=path.name) as staging:
        card.save(staging / path.name)
    return path


def push_to_hub(
    repo_id: str,
    card: ModelCard,
    *directories: str | Path,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads the saved files of one or more directories and a card as one commit; creates the repository if needed.

    Only top-level weights, configurations and tokenizer files are taken, no checkpoints, optimizer states or logs.

    Args:
        repo_id: `owner/name`.
        card: becomes the repository's `README.md`.
        directories: where `save_pretrained` wrote; of a file in several of them the first is taken.
        private: whether a new repository is private; None is the account's default.
        revision: an existing branch; `main` by default.
        token: access token; the one of `hf auth login` by default.
        commit_message: `Upload <repository name>` by default.

    Returns:
        The commit's URL.

    Raises:
        ValueError: if the directories hold nothing to publish.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses, for example a token that may not write.
    """
    files: dict[str, Path] = {}
    for directory in directories:
        for path in sorted(Path(directory).iterdir()):
            if path.is_file() and (path.suffix in PUBLISHED_SUFFIXES or path.name in ENDPOINT_FILES):
                files.setdefault(path.name, path)
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(
            f"{', '.join(map(str, directories)) or 'no directory'} holds no .safetensors file: give the directory "
            "that save_pretrained wrote the model or the tokenizer to."
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    operations.append(CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=str(card).encode()))
    commit_message = commit_message or f"Upload {repo_id.rpartition('/')[2]}"
    return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision).commit_url


def push_run_to_hub(
    repo_id: str,
    model_dir: str | Path,
    metrics: Mapping[str, Any],
    reward_repo_id: str | None = None,
    reward_model_dir: str | Path | None = None,
    **push_arguments,
) -> list[str]:
    """Publishes a run: model with tokenizer in one repository and, where both are given, the reward model in another.
    The model's has what an inference endpoint runs, too.

    The reward model's repository gets the tokenizer too: its inputs are that tokenizer's codes and no other's.
    `push_arguments` (private, revision, token, commit_message) are those of [`push_to_hub`].

    Returns:
        The commits' URLs.

    Raises:
        ValueError: if only one of `reward_repo_id` and `reward_model_dir` is given, or both repositories are the same,
            or the metrics lack what the cards need.
    """
    if (reward_repo_id is None) != (reward_model_dir is None):
        raise ValueError("reward_repo_id and reward_model_dir belong together: give both or neither.")
    if repo_id == reward_repo_id:
        raise ValueError(f"The reward model needs a repository of its own, not the model's {repo_id!r}.")
    # Both cards come first: nothing is uploaded when one of them cannot be filled.
    card, reward_card = onerec_card(model_dir, metrics, repo_id), None
    if reward_repo_id is not None:
        reward_card = reward_model_card(reward_model_dir, model_dir, metrics, reward_repo_id)
    with tempfile.TemporaryDirectory() as endpoint_dir:
        endpoint = write_endpoint_files(endpoint_dir)
        urls = [push_to_hub(repo_id, card, model_dir, endpoint, **push_arguments)]
    if reward_card is not None:
        with tempfile.TemporaryDirectory() as tokenizer_dir:
            AutoTokenizer.from_pretrained(model_dir).save_pretrained(tokenizer_dir)
            urls.append(push_to_hub(reward_repo_id, reward_card, reward_model_dir, tokenizer_dir, **push_arguments))
    return urls


def count_parameters(model_dir: str | Path) -> int:
    """Number of values in a saved model's .safetensors files, read from their headers."""
    total = 0
    for path in sorted(Path(model_dir).glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def ranking_table(metrics: Mapping[str, Any]) -> str:
    """Markdown table of OneRec and the baselines over the metrics that all of them have, but speeds, which are this
    machine's."""
    methods = {**metrics["baselines"], "onerec": metrics["onerec"]}
    shared = [name for name in metrics["onerec"] if all(name in values for values in methods.values())]
    columns = [name for name in shared if not name.endswith(("_interval", "_per_second"))]
    rows = [[method, *(values[name] for name in columns)] for method, values in methods.items()]
    return Table(["method", *columns], rows).markdown()


def alignment_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table with a row for each alignment round: the ranking at 10, then each judge's mean and best reward.

    Figures have their 95% intervals in brackets, followed for rewards by their change to round 0. Empty for a run
    without alignment, whose only round is number 0.
    """
    if len(rounds) < 2:
        return ""
    rows = []
    for entry in rounds:
        row = {"round": round_name(entry)}
        row |= {name: Measured.of(entry, name) for name in ("recall@10", "ndcg@10", "illegal_rate")}
        for judge, values in entry["judges"].items():
            for name in ("reward_mean", "reward_max"):
                row[f"{judge} {name}"] = Measured.of(values, name, judge_change(entry, judge, name))
        rows.append(row)
    return Table(list(rows[0]), [list(row.values()) for row in rows]).markdown()


def _facts_table(facts: Mapping[str, Any]) -> str:
    """Table of name and value; lists of mappings (per-level reports) are left to their files."""
    return Table(["", "value"], fact_rows(facts, separator=" ", nested_lists=False)).markdown()


def _dataset_table(dataset: Mapping[str, Any]) -> str:
    return _facts_table({name: value for name, value in dataset.items() if name != "name"})


def _environment() -> Environment:
    blocks = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return Environment(loader=FileSystemLoader(_TEMPLATE_DIRECTORIES), undefined=StrictUndefined, **blocks)


def _config_table(config: PreTrainedConfig) -> str:
    """The fields that the model's own configuration adds to those of every transformers configuration."""
    # Tables of values are for the file alone.
    left_out = {*PreTrainedConfig().to_dict(), "user_features"}
    return _facts_table({name: value for name, value in config.to_dict().items() if name not in left_out})


def _ranking_results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    """OneRec's own figures, for the card's `model-index`."""
    dataset = metrics["dataset"]
    task = {"task_type": TASK, "task_name": "Next item over the full catalogue", "dataset_name": dataset["name"]}
    # The Hub takes what could be a repository's name.
    task["dataset_type"] = dataset.get("hub_dataset") or re.sub(r"[^\w.-]+", "-", dataset["name"], flags=re.ASCII)
    task["dataset_split"] = dataset.get("evaluation_split")
    return [
        EvalResult(**task, metric_type=figure, metric_name=_metric_name(figure), metric_value=float(value))
        for figure, value in metrics["onerec"].items()
        if "@" in figure and not figure.endswith("_interval")
    ]


def _metric_name(figure: str) -> str:
    """`ndcg@10` is NDCG@10 to a reader, `recall@10` Recall@10."""
    return figure.upper() if figure.startswith("ndcg") else figure.capitalize()


def _require(metrics: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name not in metrics:
            raise ValueError(f"The metrics have no {name!r} ({', '.join(metrics)}): run the evaluate stage first.")
    if "dataset" in names and "name" not in metrics["dataset"]:
        raise ValueError("The metrics' 'dataset' has no 'name': run the evaluate stage again.")


def _render(
    template: str,
    metrics: Mapping[str, Any],
    repo_id: str | None,
    tag: str,
    directory: str | Path,
    pipeline_tag: str | None = None,
    eval_results: list[EvalResult] | None = None,
    **values,
) -> ModelCard:
    """A card from a template, with what all of them have; the tokenizer's example items come from its directory."""
    dataset, tokenizer = metrics["dataset"], AutoTokenizer.from_pretrained(directory)
    data = ModelCardData(
        library_name="transformers",
        license=LICENSE,
        pipeline_tag=pipeline_tag,
        tags=[*TAGS, tag],
        inference=False,  # no widget: the Hub has none for this task
        datasets=dataset.get("hub_dataset"),
        eval_results=eval_results,
        model_name=f"OneRec on {dataset['name']}" if eval_results else None,
    )
    text = (
        _environment()
        .get_template(template)
        .render(
            card_data=data.to_yaml(),
            dataset=dataset,
            dataset_table=_dataset_table(dataset),
            repo_id=repo_id,
            source=repo_id or ".",
            tokenizer=tokenizer,
            example_items=tokenizer.item_ids[:EXAMPLE_ITEMS].tolist(),
            **{"tokenizer_table": _facts_table(tokenizer.report), **values},
        )
    )
    return ModelCard(text)
