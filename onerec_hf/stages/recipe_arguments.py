"""Arguments of the recipes: one YAML file, read by `TrlParser`, serves every stage and the whole pipeline."""

import inspect
import json
import logging
import os
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl import TrlParser

from ..alignment import OneRecDPOConfig, PreferenceSampling
from ..configuration_onerec import OneRecConfig
from ..data import DataArguments
from ..evaluation import EASE, ItemKNN, Popularity, SASRec
from ..item_alignment import ItemAlignment
from ..reward import OneRecRewardConfig
from ..semantic_ids import QUANTIZERS

BASELINES = {"popularity": Popularity, "item_knn": ItemKNN, "ease": EASE, "sasrec": SASRec}


def _as_dict(value: dict[str, Any] | str | None, name: str) -> dict[str, Any]:
    """A mapping that came from YAML as it is, or from the command line as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"--{name} must be a JSON object such as '{{\"seed\": 1}}': {error}.") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping, got {value!r}.")
    return dict(value or {})


def _check_fields(values: dict[str, Any], name: str, owner: type) -> None:
    """Refuses keys that `owner` does not take, before a stage runs for hours ahead of the one that reads them.

    Raises:
        ValueError: such a key, with the class and the field that is likely meant.
    """
    known = {key for base in owner.__mro__ if "__init__" in vars(base) for key in inspect.signature(base).parameters}
    for key in values:
        if key not in known:
            likely = get_close_matches(str(key), known, n=1)
            meant = f" Did you mean {likely[0]!r}?" if likely else ""
            raise ValueError(f"{name} has {key!r}, which {owner.__name__} does not take.{meant}")


def lora_config(fields: dict[str, Any]):
    """peft's `LoraConfig` of these fields, None where there are none.

    Raises:
        ImportError: peft is not installed, which only adapters need.
        ValueError: a field that it does not have.
    """
    if not fields:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("align_lora needs peft: pip install -c constraints.txt 'onerec_hf[lora]'.") from error
    _check_fields(fields, "align_lora", LoraConfig)
    return LoraConfig(**fields)


@dataclass
class RunArguments:
    """Where a run writes."""

    output_dir: str = field(metadata={"help": "Folder of the run; every stage writes one folder in it."})
    seed: int = field(default=0, metadata={"help": "Seed of quantization, training, sampling and baselines."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository that evaluate pushes model, tokenizer and card to, at the end."}
    )
    hub_reward_model_id: str | None = field(
        default=None, metadata={"help": "Repository for the reward model, beside hub_model_id."}
    )
    hub_preferences_id: str | None = field(
        default=None, metadata={"help": "Data set repository that sample_preferences pushes its pairs to."}
    )
    threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads of each process. Default: the available cores, shared by the processes."},
    )


@dataclass
class TokenizeArguments:
    """Item embeddings and semantic IDs (section 3.1). A source with weight 0 is left out."""

    content_weight: float = field(default=1.0, metadata={"help": "Weight of the items' own embedding column."})
    text_weight: float = field(default=1.0, metadata={"help": "Weight of the text embedding; needs text_encoder."})
    text_encoder: str | None = field(
        default=None, metadata={"help": "Hub id or folder of any AutoModel text encoder, for the items' text column."}
    )
    behaviour_weight: float = field(default=1.0, metadata={"help": "Weight of the co-occurrence embedding."})
    behaviour_dim: int = field(default=64, metadata={"help": "Dimensions of the co-occurrence embedding."})
    feature_weight: float = field(default=1.0, metadata={"help": "Weight of the item feature columns."})
    feature_dim: int = field(default=32, metadata={"help": "Dimensions of the feature embedding."})
    embedding_normalisation: str = field(
        default="l2", metadata={"help": "What is done to each source before the fusion: l2 or whiten."}
    )
    item_alignment: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fields of ItemAlignment, which draws items that follow one another together before they are "
            "quantized (QARM); {} for its defaults. Default: no alignment."
        },
    )
    quantizer_type: str = field(
        default="balanced_rkmeans", metadata={"help": "balanced_rkmeans, rkmeans (plain K-means) or rqvae."}
    )
    quantizer: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further fields of the quantizer's class, such as code_assignment."}
    )
    codebook_sizes: list[int] = field(
        default_factory=lambda: [128, 128, 128],
        metadata={"help": "Codes K of every level (the paper: three levels of 8192)."},
    )
    collision_policy: str = field(
        default="nearest_free",
        metadata={"help": "What happens to items with one ID: nearest_free, suffix, share or error."},
    )

    def __post_init__(self):
        if self.quantizer_type not in QUANTIZERS:
            raise ValueError(f"quantizer_type must be one of {', '.join(QUANTIZERS)}, got {self.quantizer_type!r}.")
        self.quantizer = _as_dict(self.quantizer, "quantizer")
        _check_fields(self.quantizer, "quantizer", QUANTIZERS[self.quantizer_type])
        if self.item_alignment is not None:
            self.item_alignment = _as_dict(self.item_alignment, "item_alignment")
            _check_fields(self.item_alignment, "item_alignment", ItemAlignment)


@dataclass
class TrainingStagesArguments:
    """Model and trainers. The mappings hold fields of the class that their help names."""

    preset: str = field(default="small", metadata={"help": "Preset of OneRecConfig."})
    model: dict[str, Any] | str | None = field(default=None, metadata={"help": "OneRecConfig fields to override."})
    pretrain: dict[str, Any] | str | None = field(default=None, metadata={"help": "Seq2SeqTrainingArguments fields."})
    recent_days: float | None = field(
        default=None,
        metadata={
            "help": "After `pretrain`, train on the sessions of the latest so many days alone, which are also those "
            "that alignment mixes in; SASRec does the same. Default: no such phase."
        },
    )
    pretrain_recent: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of `pretrain` that differ on the sessions of recent_days."}
    )
    holdout_sessions: int = field(
        default=512, metadata={"help": "Sessions kept out of pretraining for the curve of the held-out loss."}
    )
    reward_model: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "OneRecRewardConfig fields of the reward model that aligns."}
    )
    judge_model: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "OneRecRewardConfig fields of the independent judge."}
    )
    reward: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "TrainingArguments fields, for the reward model and the judge."}
    )
    align_rounds: int = field(default=2, metadata={"help": "Rounds of preference alignment (epochs, Algorithm 2)."})
    r_dpo: float = field(default=0.01, metadata={"help": "Share of users with a pair per round (the paper: 0.01)."})
    num_candidates: int = field(default=128, metadata={"help": "N, sessions drawn per user (the paper: 128)."})
    min_reward_margin: float = field(
        default=0.0, metadata={"help": "Pairs whose rewards differ by less than this are dropped."}
    )
    preferences: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further PreferenceSampling fields: search, temperature, winner_quantile, num_rejected, ..."
        },
    )
    sample_model: str | None = field(
        default=None,
        metadata={"help": "For sample_preferences: checkpoint folder or Hub repository. Default: the seed model."},
    )
    align: dict[str, Any] | str | None = field(default=None, metadata={"help": "OneRecDPOConfig fields."})
    align_reference: str = field(
        default="previous",
        metadata={"help": "Reference of a round: previous, the snapshot it starts from, or sft, the seed model."},
    )
    align_lora: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "LoraConfig fields; a round trains an adapter and merges it. Default: all weights."},
    )
    align_holdout: int = field(
        default=512, metadata={"help": "Sessions, of those held out of pretraining, that rounds are checked on."}
    )
    max_recall_drop: float = field(
        default=0.1,
        metadata={
            "help": "Alignment ends before the round after which held-out Recall@10 is lower than the seed model's "
            "by more than this share."
        },
    )

    def __post_init__(self):
        owners = {
            "model": OneRecConfig,
            "pretrain": Seq2SeqTrainingArguments,
            "pretrain_recent": Seq2SeqTrainingArguments,
            "reward_model": OneRecRewardConfig,
            "judge_model": OneRecRewardConfig,
            "reward": TrainingArguments,
            "preferences": PreferenceSampling,
            "align": OneRecDPOConfig,
        }
        for name, owner in owners.items():
            setattr(self, name, _as_dict(getattr(self, name), name))
            _check_fields(getattr(self, name), name, owner)
        self.align_lora = _as_dict(self.align_lora, "align_lora")
        lora_config(self.align_lora)
        if not 0 < self.r_dpo <= 1:
            raise ValueError(f"r_dpo must lie in (0, 1], got {self.r_dpo}.")
        if self.align_reference not in ("previous", "sft"):
            raise ValueError(f"align_reference must be 'previous' or 'sft', got {self.align_reference!r}.")
        if self.recent_days is not None and not self.recent_days > 0:
            raise ValueError(f"recent_days must be more than 0, got {self.recent_days}.")
        if self.pretrain_recent and self.recent_days is None:
            raise ValueError("pretrain_recent is of the sessions of recent_days: set recent_days too.")
        if not 0 <= self.max_recall_drop <= 1:
            raise ValueError(f"max_recall_drop must lie in [0, 1], got {self.max_recall_drop}.")


@dataclass
class EvaluationArguments:
    """Recommending and evaluating."""

    exclude_consumed: bool = field(
        default=True, metadata={"help": "Whether items of a user's history are left out, for every method alike."}
    )
    evaluation_users: int | None = field(
        default=None, metadata={"help": "Evaluated users, drawn by seed; all by default."}
    )
    ranking_beams: int = field(default=128, metadata={"help": "Beams of the ranked list."})
    judged_users: int = field(default=500, metadata={"help": "Users whose generated sessions are judged."})
    judged_sessions: int = field(default=32, metadata={"help": "Sessions generated by beam for each of them."})
    divergence_sessions: int = field(
        default=8,
        metadata={"help": "Sessions drawn by judged user for a round's KL from the seed model; 0: none."},
    )
    counterfactual_users: int = field(
        default=4000,
        metadata={"help": "Users whose logged feedback in the evaluated period is reweighted; 0: none."},
    )
    counterfactual_clip: float = field(
        default=20.0, metadata={"help": "Largest weight of a logged exposure in the counterfactual estimates."}
    )
    baselines: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options by baseline (popularity, item_knn, ease, sasrec); a baseline set to false is left out."
        },
    )
    histories: str | None = field(
        default=None,
        metadata={"help": "For recommend: Parquet of user_id and history_item_ids. Default: the evaluated users."},
    )
    recommend_model: str | None = field(
        default=None,
        metadata={"help": "For recommend: checkpoint folder or Hub repository. Default: the run's last model."},
    )
    recommend_reward_model: str | None = field(
        default=None,
        metadata={
            "help": "For recommend: folder or Hub repository of the reward model that chooses each user's session "
            "among those that are found. Default: none, the likeliest session."
        },
    )
    recommend_search: str = field(
        default="beam",
        metadata={"help": "For recommend: beam or diverse_beam, how sessions are found; as many as ranking_beams."},
    )
    unknown_items: str = field(
        default="error",
        metadata={"help": "For recommend: error, or skip to leave out a history's items that have no semantic ID."},
    )
    top_k: int = field(default=50, metadata={"help": "For recommend: length of the ranked list."})

    def __post_init__(self):
        self.baselines = _as_dict(self.baselines, "baselines")
        if self.counterfactual_clip <= 0:
            raise ValueError(f"counterfactual_clip must be positive, got {self.counterfactual_clip}.")
        if self.recommend_search not in ("beam", "diverse_beam"):
            raise ValueError(f"recommend_search must be 'beam' or 'diverse_beam', got {self.recommend_search!r}.")
        if self.unknown_items not in ("error", "skip"):
            raise ValueError(f"unknown_items must be 'error' or 'skip', got {self.unknown_items!r}.")
        unknown = set(self.baselines) - set(BASELINES)
        if unknown:
            raise ValueError(f"baselines has {', '.join(sorted(unknown))}; there are {', '.join(BASELINES)}.")
        for name, options in self.baselines.items():
            _check_fields(_as_dict(options or None, f"baselines.{name}"), f"baselines.{name}", BASELINES[name])


@dataclass
class RecipeArguments:
    """All of a recipe's arguments."""

    run: RunArguments
    data: DataArguments
    tokenize: TokenizeArguments
    training: TrainingStagesArguments
    evaluation: EvaluationArguments

    @property
    def output_dir(self) -> Path:
        return Path(self.run.output_dir)

    def settings(self, *names: str) -> dict[str, Any]:
        """Fields of the named groups (or `group.field`), by name: what a stage's output depends on."""
        chosen: dict[str, Any] = {}
        for name in names:
            group, _, single = name.partition(".")
            values = asdict(getattr(self, group))
            chosen |= {single: values[single]} if single else values
        return chosen


def parse_recipe_arguments(argv: list[str] | None = None) -> RecipeArguments:
    """Reads `--config FILE.yaml` and flags; a flag overrides the file."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "filelock", "fsspec", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    groups = (RunArguments, DataArguments, TokenizeArguments, TrainingStagesArguments, EvaluationArguments)
    parsed = TrlParser(groups).parse_args_and_config(args=argv)
    # Told so, it joins the processes of any launcher on the CPU too.
    state = PartialState(cpu=not torch.accelerator.is_available())
    # Launchers count physical cores, which halves a small virtual machine; and several processes with all of the
    # cores each are many times slower than one.
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(parsed[0].threads or max(1, available // state.num_processes))
    return RecipeArguments(*parsed)


__all__ = [
    "EvaluationArguments",
    "RecipeArguments",
    "RunArguments",
    "TokenizeArguments",
    "TrainingStagesArguments",
    "lora_config",
    "parse_recipe_arguments",
]
