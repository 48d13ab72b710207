"""Arguments of the recipes by stage: one YAML file, read by `TrlParser`, serves every stage and the whole pipeline.

A stage reads one group of arguments, and its output depends on that group alone, beside the stages that it reads and
what it reads from outside the run. Options that several stages read stand in classes that their groups inherit.
"""

import inspect
import json
import logging
import os
import sys
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import PartialState
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.hf_argparser import HfArg
from trl import TrlParser

from ..alignment import OneRecDPOConfig, PreferenceSampling
from ..configuration_onerec import OneRecConfig
from ..data import DataArguments
from ..data.data_arguments import option
from ..embedding_adaptation import EmbeddingAdaptation
from ..evaluation import EASE, Fused, ItemKNN, Popularity, SASRec
from ..packaged_recipes import recipe_file
from ..reward import OneRecRewardConfig
from ..semantic_ids import QUANTIZERS, SEMANTIC_ID_SOURCES
from ..typed_arguments import typed_value
from ..yaml_files import read_yaml
from .hub_access import require_repositories
from .previous_run import PreviousRun

logger = logging.getLogger(__name__)

Nested = dict[str, Any] | str | None  # a mapping as YAML has it, or as JSON on the command line
FUSED, FUSED_MEMBERS = "fused", ("ease", "sasrec")
BASELINES = {"popularity": Popularity, "item_knn": ItemKNN, "ease": EASE, "sasrec": SASRec, FUSED: Fused}

# Fields of nested options that another option, or the data, decides: they are refused, with who decides them.
BY_RUN = {"output_dir": "output_dir", "seed": "seed"}
BY_DATA = {name: name for name in ("history_items", "session_items", "user_features")}
BY_CODES = {
    **{"codebook_sizes": "codebook_sizes", "vocab_size": "codebook_sizes"},
    "num_semantic_ids": "num_semantic_ids",
}
BY_PROCESS = {"seed": "seed", "device": "the process", "show_progress": "the process"}
SAMPLING_OPTIONS = (
    *("r_dpo", "num_candidates", "min_reward_margin", "exclude_consumed"),
    *("guidance_weight", "num_item_beams"),
)
BY_EXPOSURES = dict.fromkeys(
    (
        *("feedback", "signals", "num_items", "item_features", "item_embedding_size", "numeric_features"),
        *("num_item_values", "objective_means", "objective_deviations", "catalogue_fingerprint"),
    ),
    "the data",
)


def as_mapping(value: Nested, name: str) -> dict[str, Any]:
    """A mapping that came from YAML as it is, or from the command line as JSON; an empty one for None."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"--{name} must be a JSON object such as '{{\"seed\": 1}}': {error}.") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping, got {value!r}.")
    return dict(value or {})


def typed_fields(values: dict[str, Any], name: str, owner: type, decided: dict[str, str]) -> dict[str, Any]:
    """The fields with numbers where `owner` takes numbers: YAML reads 1e-5 as text. What it does not take here is
    refused before a stage runs for hours ahead of the one that reads it.

    Raises:
        ValueError: a field that it does not have, with the class and the field that is likely meant; one that another
            option decides, with that; or one whose value is of another type.
    """
    known = {}
    for base in owner.__mro__[::-1]:
        known |= inspect.signature(base).parameters if "__init__" in vars(base) else {}
    for key in values:
        if key in decided:
            who = decided[key]
            where = f"the option {who} decides" if who in option_names() else f"{who} decides"
            raise ValueError(f"{name} has {key!r}, which {where}: leave it out of {name}.")
        if key not in known:
            likely = get_close_matches(str(key), set(known) - set(decided), n=1)
            meant = f" Did you mean {likely[0]!r}?" if likely else ""
            raise ValueError(f"{name} has {key!r}, which {owner.__name__} does not take.{meant}")
    return {key: typed_value(value, f"{name}.{key}", known[key].annotation) for key, value in values.items()}


def fused_members(baselines: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The members of the fused baseline by name, with the options that each is fitted with.

    Raises:
        ValueError: for members that are neither a list of other baselines' names nor a mapping of them to options.
    """
    named, place = (baselines.get(FUSED) or {}).get("members", FUSED_MEMBERS), "baselines.fused.members"
    if not isinstance(named, (list, tuple, dict)):
        raise ValueError(f"{place} must be a list of baselines, or a mapping of them to options, got {named!r}.")
    others = [name for name in BASELINES if name != FUSED]
    for name in named:
        if name not in others:
            raise ValueError(f"{place} has {name!r}; there are {', '.join(others)}.")
    if isinstance(named, dict):
        members = {name: as_mapping(options, f"{place}.{name}") for name, options in named.items()}
    else:
        members = {name: dict(baselines.get(name) or {}) for name in named}
    return {
        name: typed_fields(options, f"{place}.{name}", BASELINES[name], {"seed": "seed"})
        for name, options in members.items()
    }


def check_fused(baselines: dict[str, Any]) -> None:
    """Raises ValueError for options of the fused baseline that it will not take."""
    members = dict.fromkeys(fused_members(baselines))
    try:
        Fused(**{**(baselines.get(FUSED) or {}), "members": members})
    except (TypeError, ValueError) as error:
        raise ValueError(f"baselines.fused: {error}.") from error


def require_held_out(options: dict[str, Any], name: str, why: str) -> None:
    """Raises ValueError, which says why there is nothing to do it on, for options that evaluate while training."""
    for field in ("eval_strategy", "load_best_model_at_end"):
        if options.get(field) not in (None, False, "no"):
            raise ValueError(f"{name}.{field} is {options[field]!r}, but {why}.")


def lora_config(values: dict[str, Any]):
    """peft's `LoraConfig` of these fields, None where there are none.

    Raises:
        ImportError: peft is not installed, which only adapters need.
        ValueError: a field that it does not have.
    """
    if not values:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("align_lora needs peft: pip install -c constraints.txt 'onerec_hf[lora]'.") from error
    return LoraConfig(**typed_fields(values, "align_lora", LoraConfig, {}))


@dataclass
class RunArguments:
    """Where a run writes, and with what; nothing of it changes a stage's output."""

    output_dir: str = HfArg(help="Folder of the run; every stage writes one folder in it.")
    base: str | None = option(
        None, "In a YAML file: another one, by its path from there, with the options that this one leaves out."
    )
    update_starts: list[str] | None = option(
        None,
        "For update: ISO date-times at which periods start. Each has a run of that name in output_dir, which goes on "
        "from the one before, fits what was before the start and is evaluated on the period; the first begins anew.",
    )
    hub_model_id: str | None = option(None, "Repository that evaluate pushes model, tokenizer and card to.")
    hub_reward_model_id: str | None = option(None, "Repository for the reward model, beside hub_model_id.")
    hub_preferences_id: str | None = option(None, "Data set repository that sample_preferences pushes its pairs to.")
    hub_private_repo: bool | None = option(
        None,
        "Whether repositories made for these are private. Default: public, unless the organization has it otherwise.",
    )
    threads: int | None = option(None, "CPU threads of each process. Default: its share of the available cores.")
    report_to: str | None = option(
        None,
        "Where trainings log to: trackio, tensorboard or wandb; each of a run's is one run of a project that has "
        "the name of output_dir. Default: nowhere.",
    )
    verbose: bool = option(False, "Whether a run ends in all tables of its report, in place of a summary.")


@dataclass
class StageArguments:
    """What every stage reads.

    `NESTED` of a group has its nested options by name: the class that takes their fields, and the fields that are
    refused as another option decides them, which is named.
    """

    seed: int = option(0, "Seed of quantization, training, sampling and baselines.")
    sampled_interactions: int = option(
        20_000_000,
        "With num_partitions: interactions, about, that are in memory at once, those of a random part of the users. "
        "All but the training on sessions and recommend takes no others: a million needs about 0.4 GB.",
    )

    def __post_init__(self):
        if self.sampled_interactions < 1:
            raise ValueError(f"sampled_interactions={self.sampled_interactions} is not allowed; at least 1 is needed.")
        for base in type(self).__mro__:
            for name, (owner, decided) in vars(base).get("NESTED", {}).items():
                values = as_mapping(getattr(self, name), name)
                setattr(self, name, typed_fields(values, name, owner, decided))

    def check_choice(self, name: str, *allowed: str) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")


@dataclass
class ContinuedRun:
    """What a run goes on from."""

    previous_run: str | None = option(
        None,
        "Folder of a complete run of an earlier period that this one goes on from: its items keep their semantic IDs, "
        "and its last model and reward models are trained further on what came since (update_since). Default: none.",
    )


@dataclass
class TokenizeArguments(ContinuedRun, StageArguments):
    """Item embeddings and semantic IDs (section 3.1). A source with weight 0 is left out."""

    content_weight: float = option(1.0, "Weight of the items' own embedding column.")
    text_weight: float = option(1.0, "Weight of the embedding of the items' text column.")
    text_encoder: str | None = option(
        None, "Hub id or folder of an AutoModel that encodes the text. Default: TF-IDF of its words."
    )
    behaviour_weight: float = option(1.0, "Weight of the co-occurrence embedding.")
    behaviour_dim: int = option(64, "Dimensions of the co-occurrence embedding.")
    feature_weight: float = option(1.0, "Weight of the item feature columns.")
    feature_dim: int = option(32, "Dimensions of the feature embedding.")
    embedding_normalisation: str = option("l2", "What is done to each source before the fusion: l2 or whiten.")
    embedding_adaptation: Nested = option(
        None,
        "Fields of EmbeddingAdaptation, which draws items that follow one another together before they are quantized "
        "(QARM); {} for its defaults. Default: none.",
    )
    item_alignment: Nested = option(None, "Old name of embedding_adaptation.")
    quantizer_type: str = option("balanced_rkmeans", "balanced_rkmeans, rkmeans (plain K-means) or rqvae.")
    quantizer: Nested = option(None, "Further fields of the quantizer's class, such as code_assignment.")
    codebook_sizes: list[int] | None = option(
        None,
        "Codes K by level (paper: 3 of 8192); left out: 3 of the power of two next above the square root of N.",
    )
    collision_policy: str = option("nearest_free", "Where items have one ID: nearest_free, suffix, share or error.")
    num_semantic_ids: int = option(
        1, "Semantic IDs of every item, each of codebook_sizes; OneRec's probability is the mean of theirs."
    )
    semantic_id_sources: str = option(
        "projections",
        "How several IDs differ: projections (all but the first see half of the dimensions, random ones), or seeds.",
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("quantizer_type", *QUANTIZERS)
        self.check_choice("semantic_id_sources", *SEMANTIC_ID_SOURCES)
        if self.num_semantic_ids < 1:
            raise ValueError(f"num_semantic_ids must be at least 1, got {self.num_semantic_ids}.")
        if self.num_semantic_ids > 1 and self.collision_policy == "suffix":
            raise ValueError("collision_policy 'suffix' is for one semantic ID: choose another for several.")
        self.quantizer = as_mapping(self.quantizer, "quantizer")
        decided = {"codebook_sizes": "codebook_sizes", "collision_policy": "collision_policy", **BY_PROCESS}
        self.quantizer = typed_fields(self.quantizer, "quantizer", QUANTIZERS[self.quantizer_type], decided)
        if self.item_alignment is not None:
            logger.warning("item_alignment is now called embedding_adaptation.")
            self.embedding_adaptation = as_mapping(self.item_alignment, "item_alignment")
            self.item_alignment = None
        if self.embedding_adaptation is not None:
            values = as_mapping(self.embedding_adaptation, "embedding_adaptation")
            self.embedding_adaptation = typed_fields(values, "embedding_adaptation", EmbeddingAdaptation, BY_PROCESS)


@dataclass
class RecentSessions:
    """What training ends on."""

    recent_days: float | None = option(
        None,
        "After `pretrain`, train on the sessions of the latest so many days alone, which are also those "
        "that alignment mixes in; SASRec does the same. Default: no such phase.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.recent_days is not None and not self.recent_days > 0:
            raise ValueError(f"recent_days must be more than 0, got {self.recent_days}.")


@dataclass
class PretrainArguments(ContinuedRun, RecentSessions, StageArguments):
    """The session generator and its training (section 3.2)."""

    NESTED: ClassVar = {
        "model": (
            OneRecConfig,
            {
                **BY_CODES,
                **BY_DATA,
                "history_feedback": "history_feedback",
                **dict.fromkeys(("num_items", "catalogue_fingerprint"), "the data"),
            },
        ),
        "pretrain": (Seq2SeqTrainingArguments, BY_RUN),
        "pretrain_recent": (Seq2SeqTrainingArguments, BY_RUN),
        "pretrain_update": (Seq2SeqTrainingArguments, BY_RUN),
    }

    preset: str = option("small", "Preset of OneRecConfig.")
    model: Nested = option(None, "OneRecConfig fields to override.")
    pretrain: Nested = option(None, "Seq2SeqTrainingArguments fields.")
    pretrain_recent: Nested = option(None, "Fields of `pretrain` that differ on the sessions of recent_days.")
    pretrain_update: Nested = option(
        None, "Fields of `pretrain` that differ where the training goes on from previous_run's, without recent_days."
    )
    holdout_sessions: int = option(512, "Sessions kept out of pretraining for the curve of the held-out loss.")

    def __post_init__(self):
        super().__post_init__()
        if self.pretrain_recent and self.recent_days is None:
            raise ValueError("pretrain_recent is of the sessions of recent_days: set recent_days too.")
        if self.holdout_sessions < 1:
            for name in ("pretrain", "pretrain_recent", "pretrain_update"):
                why = f"holdout_sessions is {self.holdout_sessions}: hold some out, or leave the field out"
                require_held_out(getattr(self, name), name, why)


@dataclass
class RewardArguments(ContinuedRun, StageArguments):
    """The reward model and the independent judge (section 3.3.1)."""

    NESTED: ClassVar = {
        "reward_model": (OneRecRewardConfig, {**BY_CODES, **BY_DATA, **BY_EXPOSURES}),
        "judge_model": (OneRecRewardConfig, {**BY_CODES, **BY_DATA, **BY_EXPOSURES}),
        "reward": (TrainingArguments, BY_RUN),
        "reward_update": (TrainingArguments, BY_RUN),
    }
    reward_model: Nested = option(None, "OneRecRewardConfig fields of the reward model that aligns.")
    judge_model: Nested = option(None, "OneRecRewardConfig fields of the independent judge.")
    reward: Nested = option(None, "TrainingArguments fields, for the reward model and the judge.")
    reward_update: Nested = option(None, "Fields of `reward` that differ where previous_run's models are trained on.")

    def __post_init__(self):
        super().__post_init__()
        why = "nothing is held out of the reward models' training to evaluate them on: leave the field out"
        for name in ("reward", "reward_update"):
            require_held_out(getattr(self, name), name, why)
        for name in ("reward_model", "judge_model"):
            given = {field: value for field, value in getattr(self, name).items() if field == "objectives"}
            try:
                OneRecRewardConfig(**given)
            except Exception as error:  # of the fields, or of what is no mapping of fields at all
                raise ValueError(f"{name}: {error}") from error


@dataclass
class ConsumedItems(StageArguments):
    """What nobody is given."""

    exclude_consumed: bool = option(True, "Whether items of a user's history are left out, for every method alike.")


@dataclass
class Guidance(StageArguments):
    """How the reward model guides the search of sessions."""

    guidance_weight: float = option(8.0, "What a reward of 1 is worth in guided_beam [nats an item].")
    num_item_beams: int = option(128, "Items by which guided_beam extends a session before some are kept.")

    def __post_init__(self):
        super().__post_init__()
        if self.guidance_weight < 0 or self.num_item_beams < 1:
            raise ValueError(
                f"guidance_weight must be at least 0 and num_item_beams at least 1, got {self.guidance_weight} and "
                f"{self.num_item_beams}."
            )


@dataclass
class PreferenceArguments(Guidance, ConsumedItems):
    """Drawing preference pairs from a snapshot (Algorithm 2)."""

    NESTED: ClassVar = {
        "preferences": (
            PreferenceSampling,
            {
                **{name: name for name in SAMPLING_OPTIONS},
                "sample_share": "r_dpo",
                "min_reward_gap": "min_reward_margin",
                "exclude_history": "exclude_consumed",
            },
        )
    }

    r_dpo: float = option(0.01, "Share of users with a pair per round (the paper: 0.01).")
    num_candidates: int = option(128, "N, sessions drawn per user (the paper: 128).")
    min_reward_margin: float = option(0.0, "Pairs whose rewards differ by less than this are dropped.")
    preferences: Nested = option(None, "Further PreferenceSampling fields, such as search, temperature, num_rejected.")

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.r_dpo <= 1:
            raise ValueError(f"r_dpo must lie in (0, 1], got {self.r_dpo}.")


@dataclass
class SamplePreferencesArguments(PreferenceArguments):
    """Drawing one round's pairs alone."""

    sample_model: str | None = option(None, "For sample_preferences: folder or Hub id. Default: the seed model.")


@dataclass
class AlignArguments(PreferenceArguments):
    """Iterative preference alignment (section 3.3.2)."""

    NESTED: ClassVar = {"align": (OneRecDPOConfig, BY_RUN)}

    align_rounds: int = option(2, "Rounds of preference alignment (epochs, Algorithm 2).")
    align: Nested = option(None, "OneRecDPOConfig fields.")
    align_reference: str = option(
        "previous", "A round's reference: previous (where it starts) or sft (the seed model)."
    )
    align_encoder: bool = option(
        True, "Whether rounds train the encoder too: without, what its item head recalls stays as it was."
    )
    align_lora: Nested = option(None, "LoraConfig fields; rounds train an adapter and merge it. Default: all weights.")
    align_holdout: int = option(512, "Sessions, of those held out of pretraining, that rounds are checked on.")
    max_recall_drop: float = option(
        0.1,
        "Alignment ends before the round after which session_recall@10 on held-out sessions is lower than the seed "
        "model's by more than this share.",
    )

    def __post_init__(self):
        super().__post_init__()
        require_held_out(self.align, "align", "rounds are checked when they end (align_holdout): leave the field out")
        self.align_lora = as_mapping(self.align_lora, "align_lora")
        lora_config(self.align_lora)
        if self.align_lora and not self.align_encoder:
            raise ValueError("align_encoder is for whole weights: with align_lora target_modules say what is trained.")
        self.check_choice("align_reference", "previous", "sft")
        if not 0 <= self.max_recall_drop <= 1:
            raise ValueError(f"max_recall_drop must lie in [0, 1], got {self.max_recall_drop}.")


@dataclass
class EvaluatedUsers(ConsumedItems):
    """Who is evaluated."""

    evaluation_users: int | None = option(None, "Evaluated users, drawn by data_seed; all by default.")


@dataclass
class RankingBeams:
    """How OneRec ranks."""

    ranking_beams: int = option(128, "Beams of the ranked list.")


@dataclass
class JudgedSessions(StageArguments):
    """Which of a method's sessions are judged."""

    judged_sessions: int = option(32, "Sessions generated by beam for each judged user.")
    cascade_candidates: list[int] | None = option(
        None, "Items that a cascade's retriever hands to the reward model, each number a cascade. Default: 32 and 128."
    )

    def __post_init__(self):
        super().__post_init__()
        self.cascade_candidates = [32, 128] if self.cascade_candidates is None else self.cascade_candidates
        if any(count < 1 for count in self.cascade_candidates):
            raise ValueError(f"cascade_candidates must be 1 or more, got {self.cascade_candidates}.")


@dataclass
class RecommendArguments(Guidance, RankingBeams, EvaluatedUsers):
    """Recommending to the evaluated users, or to those of a file."""

    histories: str | None = option(
        None, "For recommend: Parquet of user_id and history_item_ids. Default: the evaluated users."
    )
    recommend_model: str | None = option(None, "For recommend: folder or Hub id. Default: the run's last model.")
    recommend_reward_model: str | None = option(
        None,
        "For recommend: folder or Hub id of the reward model that chooses each user's session among those that are "
        "found. Default: none, the likeliest session.",
    )
    recommend_search: str = option(
        "beam",
        "For recommend: beam, widening_beam (the likeliest session, in about half the time) or diverse_beam, with "
        "ranking_beams sessions; or guided_beam, in which the reward model takes part, with as many beams.",
    )
    unknown_items: str = option("error", "For recommend: error, or skip to leave out items without a semantic ID.")
    top_k: int = option(50, "For recommend: length of the ranked list.")

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("recommend_search", "beam", "widening_beam", "diverse_beam", "guided_beam")
        if self.recommend_search == "guided_beam" and self.recommend_reward_model is None:
            raise ValueError("recommend_search: guided_beam needs recommend_reward_model, which guides it.")
        self.check_choice("unknown_items", "error", "skip")


@dataclass
class BaselineArguments(JudgedSessions, RecentSessions, EvaluatedUsers):
    """The baselines that OneRec is compared with."""

    baselines: Nested = option(
        None,
        "Options by baseline (popularity, item_knn, ease, sasrec, fused); a baseline set to false is left out. fused "
        "goes without saying only where none of its members (ease and sasrec) is left out; `fused: {}` fits its own.",
    )

    def __post_init__(self):
        super().__post_init__()
        self.baselines = as_mapping(self.baselines, "baselines")
        unknown = set(self.baselines) - set(BASELINES)
        if unknown:
            raise ValueError(f"baselines has {', '.join(sorted(unknown))}; there are {', '.join(BASELINES)}.")
        for name, options in self.baselines.items():
            place = f"baselines.{name}"
            if options:
                values = as_mapping(options, place)
                self.baselines[name] = typed_fields(values, place, BASELINES[name], {"seed": "seed"})
        check_fused(self.baselines)
        if isinstance((self.baselines.get(FUSED) or {}).get("members"), dict):
            self.baselines[FUSED]["members"] = fused_members(self.baselines)


@dataclass
class PolicyArguments(Guidance, JudgedSessions, RankingBeams, EvaluatedUsers):
    """Ranking and generating by a policy, and judging what it generates."""

    judged_users: int = option(500, "Users whose generated sessions are judged.")
    session_beams: int = option(32, "Beams that find the session served without a reward model, the likeliest.")
    divergence_sessions: int = option(8, "Sessions drawn by judged user for the KL from the seed model; 0: none.")
    served_guidance: Nested = option(
        None,
        "Further guided searches whose sessions are served in the evaluation, each a point of its frontier: values of "
        "guidance_weight by numbers of beams, such as {512: 24}.",
    )

    def __post_init__(self):
        super().__post_init__()
        given = as_mapping(self.served_guidance, "served_guidance")
        # JSON has texts for keys.
        beams = {int(typed_value(key, "served_guidance", int)): weight for key, weight in given.items()}
        self.served_guidance = {
            key: typed_value(weight, f"served_guidance of {key} beams", float) for key, weight in beams.items()
        }
        if any(key < 1 or weight is None or weight < 0 for key, weight in self.served_guidance.items()):
            raise ValueError(f"served_guidance needs beams from 1 on and weights from 0 on, got {beams}.")


@dataclass
class EvaluateArguments(PolicyArguments):
    """Evaluating a run."""

    counterfactual_users: int = option(4000, "Users whose feedback in the evaluated period is reweighted; 0: none.")
    counterfactual_clip: float = option(20.0, "Largest weight of a logged exposure in the counterfactual estimates.")

    def __post_init__(self):
        super().__post_init__()
        if self.counterfactual_clip <= 0:
            raise ValueError(f"counterfactual_clip must be positive, got {self.counterfactual_clip}.")


Group = TypeVar("Group")


@dataclass
class RecipeArguments(
    EvaluateArguments,
    BaselineArguments,
    RecommendArguments,
    AlignArguments,
    SamplePreferencesArguments,
    RewardArguments,
    PretrainArguments,
    TokenizeArguments,
    DataArguments,
    RunArguments,
):
    """All options of the recipes, as they stand in one YAML file; [`group`] has those of a stage."""

    def __post_init__(self):
        self.output_dir = Path(self.output_dir).expanduser()
        for group in GROUPS:
            vars(self).update(vars(self.group(group)))
        if self.previous_run is not None:
            self.update_since = self.update_since or PreviousRun(self.previous_run).evaluation_start
            if self.replay_days is None:  # earlier ones would undo what the training ended on
                self.replay_days = self.recent_days
        if self.num_semantic_ids > 1 and self.align_rounds:
            raise ValueError("Alignment is for one semantic ID per item: with num_semantic_ids set align_rounds to 0.")
        if self.report_to is not None:
            self.check_choice("report_to", "trackio", "tensorboard", "wandb")
        names = ("hub_model_id", "hub_reward_model_id", "hub_preferences_id")
        require_repositories(**{name: getattr(self, name) for name in names})
        if self.hub_reward_model_id is not None and self.hub_model_id is None:
            raise ValueError("hub_reward_model_id goes with hub_model_id: give both, or neither.")
        if self.hub_reward_model_id is not None and not self.align_rounds:
            raise ValueError("With align_rounds 0 there is no reward model: leave out hub_reward_model_id.")

    def tracking(self, training: str) -> dict[str, Any]:
        """Fields of `TrainingArguments` by which a training logs to `report_to`, as the run of that name, such as
        `align/round_1`; none without."""
        if self.report_to is None:
            return {}
        project = self.output_dir.resolve().name
        # What no field of theirs says: tensorboard's folder, of which checkpoints are removed, and wandb's project.
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.output_dir / "tensorboard" / training)
        os.environ.setdefault("WANDB_PROJECT", project)
        os.environ["WANDB_RUN_GROUP"] = training.partition("/")[0]
        return {"report_to": self.report_to, "project": project, "run_name": training}

    def group(self, group: type[Group]) -> Group:
        """The options of one stage, checked."""
        return group(**{entry.name: getattr(self, entry.name) for entry in fields(group)})


GROUPS = RecipeArguments.__bases__[:-1]  # what a stage reads; where a run writes is of no stage


def option_names() -> set[str]:
    return {entry.name for entry in fields(RecipeArguments)}


def all_options(config: Path) -> dict[str, Any]:
    """The options of a YAML file, with those that it takes from its `base`, and that one from its own.

    Raises:
        ValueError: a base that is no file or no recipe, or that has the file as its own base.
    """
    files, latest = [config], read_options(config)
    options = latest
    while latest.get("base") is not None:
        base = files[-1].parent / latest["base"]
        if not base.is_file() or any(base.samefile(file) for file in files):
            reason = "itself" if base.is_file() else "no file"
            raise ValueError(f"{files[-1]} has base: {latest['base']}, which is {reason}.")
        latest = read_options(base)
        options = latest | options
        files.append(base)
    return options


def read_options(config: Path) -> dict[str, Any]:
    """The options that a YAML file has of its own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not in UTF-8, no YAML, or has anything else than options of a recipe; names it.
    """
    options = read_yaml(config)
    if not isinstance(options, dict):
        raise ValueError(f"{config}: must hold options of a recipe, as `name: value`, and holds {options!r:.40}.")
    unknown = sorted(map(str, options.keys() - option_names()))
    if unknown:
        raise ValueError(f"{config} has {unknown[0]!r}, which is no option of a recipe.")
    return options


def parse_recipe_arguments(argv: list[str] | None = None) -> RecipeArguments:
    """Reads `--config`, a YAML file or the name of a packaged recipe, and flags; a flag overrides the file, and the
    file what it names as its `base`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "filelock", "fsspec", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    parser = TrlParser(
        RecipeArguments,
        epilog="--config takes a YAML file of these options, or the name of a packaged recipe such as quickstart.",
    )
    argv = sys.argv[1:] if argv is None else argv
    if any(flag.partition("=")[0] == "--base" for flag in argv):
        raise ValueError("base stands in a YAML file; on the command line a file is given with --config.")
    if "--config" in argv[:-1]:
        # Not by the parser, which would read the file in the encoding of the locale.
        place = argv.index("--config")
        parser.set_defaults_with_config(**all_options(recipe_file(argv[place + 1])))
        argv = argv[:place] + argv[place + 2 :]
    [args] = parser.parse_args_and_config(args=argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a table has characters that an ASCII terminal has not
    # Told so, it joins the processes of any launcher on the CPU too.
    state = PartialState(cpu=not torch.accelerator.is_available())
    # Launchers count physical cores, which halves a small virtual machine; and several processes with all of the
    # cores each are many times slower than one.
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(args.threads or max(1, available // state.num_processes))
    return args
