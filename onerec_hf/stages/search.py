"""Hyper-parameter search on the validation split: every method gets as many trials and minutes as any other.

A trial fits a method with options drawn from its space and ranks for the validation split's users; the best one has
the highest NDCG@10. The first trial has the recipe's own options. What a study knows is written after every trial, and
the same command goes on after a kill: finished trials are not done again, and the one that was running is.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import PartialState
from tqdm.auto import tqdm

from ..data import DataArguments
from ..evaluation import user_metrics
from ..staged_files import staged_file
from .baselines_stage import BaselineFits, fitting_options, rank_fitted
from .evaluated_run import EvaluatedRun
from .pretrain_stage import run_pretrain
from .recipe_arguments import (
    BASELINES,
    FUSED,
    EvaluatedUsers,
    PretrainArguments,
    RankingBeams,
    RecipeArguments,
    TokenizeArguments,
    fused_members,
)
from .search_space import ONEREC, SearchedField, changed_options, present_values, read_space
from .stage_runner import MODEL, changed_entries, completed_stage, read_json, write_json
from .tokenize_stage import run_tokenize

logger = logging.getLogger(__name__)

OBJECTIVE = "ndcg@10"
FIGURES = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
STUDY, TRIALS, BEST = "study.sqlite", "trials.csv", "best.json"
FRAGMENT = "best.yaml"
RANDOM_TRIALS = 5  # before the sampler learns from them
PRESENT = "present_settings"


@dataclass(frozen=True)
class Budget:
    """Of each method: a search ends with so many finished trials, or with the trial that reaches so many minutes,
    which is finished."""

    trials: int
    minutes: float

    def __post_init__(self):
        if self.trials < 1 or not self.minutes > 0:
            raise ValueError(f"A search needs a trial or more and some minutes, got {self.trials} and {self.minutes}.")


def run_search(args: RecipeArguments, space: Path, methods: Sequence[str], budget: Budget) -> Path:
    """Searches every method and returns `<output_dir>/best.yaml`, a part of a recipe with the best options of each.

    Beside it, by method: `<method>/study.sqlite`, optuna's study; `<method>/trials.csv`, a row for every trial;
    `<method>/best.json`. The fused baseline comes last, with its members as they were best by then.

    Args:
        args: the recipe; whatever split it evaluates, it is the validation split that is read.
        space: YAML of the searched fields by method.

    Raises:
        ValueError: for a space that does not fit the methods, naming the field, and for a folder that was searched
            with another space or other settings.
    """
    if PartialState().num_processes > 1:
        raise ValueError("A search runs in one process: start it with python, not with several by accelerate launch.")
    if args.evaluation_split != "validation":
        logger.warning(f"evaluation_split is {args.evaluation_split}, but a search reads the validation split alone.")
        args = replace(args, evaluation_split="validation")
    spaces = read_space(space, methods, args)
    optuna = import_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    run_tokenize(args)
    trials = _Trials(args)
    for method in sorted(spaces, key=lambda name: name == FUSED):
        _Search(method, spaces[method], trials).run(budget)
    return write_best(args)


def import_optuna():
    """optuna, which only a search needs.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("A search needs optuna: pip install -c constraints.txt 'onerec_hf[search]'.") from error
    return optuna


class _Trials:
    """Fits and ranks with changed options, on one run's data.

    Args:
        args: the recipe's, evaluated on validation.
    """

    def __init__(self, args: RecipeArguments):
        self.args, self.fits = args, BaselineFits()
        self.run = EvaluatedRun(args, "search", judged=False)

    def figures(self, method: str, args: RecipeArguments, key: str) -> dict[str, float]:
        """`FIGURES` of a method with a trial's options.

        Args:
            key: names the trial's folder, the same for the same options.
        """
        if method == ONEREC:
            return self._onerec(args, key)
        options = fitting_options(args, method)
        self.fits.keep([(method, options)])
        fitted = self.fits.fit(method, options, self.run)
        return _means(rank_fitted(fitted.model, self.run)[0], self.run)

    def _onerec(self, args: RecipeArguments, key: str) -> dict[str, float]:
        stage, run = f"{self.folder(key).relative_to(self.args.output_dir)}/pretrain", self.run
        if any(args.group(group) != self.args.group(group) for group in (DataArguments, TokenizeArguments)):
            # Sessions or semantic IDs of its own.
            args, stage = replace(args, output_dir=self.folder(key)), "pretrain"
            run_tokenize(args)
        if args.output_dir != self.args.output_dir or args.ranking_beams != self.args.ranking_beams:
            run = EvaluatedRun(args, "search", judged=False)
        trained = run_pretrain(args, stage)
        ranked, _ = run.evaluator.rank(run.load(trained / MODEL), name="trial")
        return _means(ranked, run)

    def folder(self, key: str) -> Path:
        """Where a trial's model is, as long as it is needed."""
        return self.args.output_dir / ONEREC / "trials" / key


def _means(ranked: np.ndarray, run: EvaluatedRun) -> dict[str, float]:
    by_user = user_metrics(ranked, run.evaluator.targets, (5, 10))
    return {name: float(by_user[name].mean()) for name in FIGURES}


class _Search:
    """The study of one method."""

    def __init__(self, method: str, searched: list[SearchedField], trials: _Trials):
        self.method, self.searched, self.trials, self.args = method, searched, trials, trials.args
        self.folder = self.args.output_dir / method
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def study(self):
        """The method's, as far as a former command got.

        Raises:
            ValueError: it was made with another space or other settings.
        """
        optuna = import_optuna()
        storage = f"sqlite:///{(self.folder / STUDY).resolve()}"
        study = optuna.create_study(storage=storage, study_name=self.method, direction="maximize", load_if_exists=True)
        settings, known = self._settings(), study.user_attrs.get("settings")
        if known is None:
            study.set_user_attr("settings", settings)
        elif known != settings:
            changed = ", ".join(changed_entries({"arguments": known}, {"arguments": settings}))
            raise ValueError(
                f"{self.folder} was searched with other settings ({changed}): go on with those, give another "
                "--output_dir, or remove the folder to search anew."
            )
        if not study.get_trials(deepcopy=False):
            inside = present_values(self.args, self.method, self.searched)
            stored = {field.name: field.stored(inside[field.name]) for field in self.searched if field.name in inside}
            study.enqueue_trial(stored, user_attrs={PRESENT: True})
        return study

    def _settings(self) -> dict[str, Any]:
        """All that decides a trial's figures beside what is drawn, JSON-able."""
        args = self.args
        settings = {
            "space": {field.name: asdict(field) for field in self.searched},
            "data": completed_stage(args.output_dir, "data")["fingerprint"],
            **asdict(args.group(EvaluatedUsers)),
        }
        if self.method == ONEREC:
            for group in (TokenizeArguments, PretrainArguments, RankingBeams):
                settings |= asdict(args.group(group))
        else:
            settings |= {"options": fitting_options(args, self.method), "recent_days": args.recent_days}
        return json.loads(json.dumps(settings, default=str))

    def run(self, budget: Budget) -> None:
        """Trials until the budget is spent, each with a row of the table."""
        self._requeue_killed()
        with tqdm(total=budget.trials, desc=f"search {self.method}") as bar:
            while True:
                finished = self._finished()
                seconds = sum(trial.user_attrs["seconds"] for trial in finished)
                bar.update(len(finished) - bar.n)
                best = self._best()
                if best is not None:
                    bar.set_postfix({OBJECTIVE: f"{best.value:.4f}"})
                if len(finished) >= budget.trials or finished and seconds >= 60 * budget.minutes:
                    break
                self._trial()
                self._write()
        self._write()

    def _requeue_killed(self) -> None:
        states = import_optuna().trial.TrialState
        for trial in self.study.get_trials(states=(states.RUNNING,)):
            present = {PRESENT: True} if trial.user_attrs.get(PRESENT) else None
            self.study.enqueue_trial(trial.params, user_attrs=present)
            self.study.tell(trial.number, state=states.FAIL)

    def _trial(self) -> None:
        """Draws, fits and ranks once; what it raises is kept with the trial."""
        optuna, study = import_optuna(), self.study
        # By the trial's number, so that a resumed study does not repeat its draws.
        entropy = [self.args.seed, len(study.get_trials(deepcopy=False)), *self.method.encode()]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, seed=seed)
        trial = study.ask()
        if trial.user_attrs.get(PRESENT):
            known = present_values(self.args, self.method, self.searched)
            for field in self.searched:
                if field.name in known:
                    field.suggest(trial)  # for the sampler to learn from
            changes: dict[str, Any] = {}
        else:
            changes = changed_options(
                self.args, self.method, {field.name: field.suggest(trial) for field in self.searched}
            )
            if self.method == FUSED:
                changes["baselines"][FUSED]["members"] = self._best_members()
        key = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:16]
        started = time.monotonic()
        try:
            figures = self.trials.figures(self.method, replace(self.args, **changes), key)
        except Exception as error:
            logger.exception(f"Trial {trial.number} of {self.method} has failed.")
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            figures = None
        trial.set_user_attr("seconds", round(time.monotonic() - started, 2))
        if figures is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            trial.set_user_attr("figures", figures)
            trial.set_user_attr("options", self._fragment(changes))
            study.tell(trial, figures[OBJECTIVE])
        shutil.rmtree(self.trials.folder(key), ignore_errors=True)

    def _fragment(self, changes: dict[str, Any]) -> dict[str, Any]:
        """What a recipe has of a trial's options: of a baseline its own, of OneRec those that were changed, whole."""
        if self.method == ONEREC:
            return changes
        return changes.get("baselines", self.args.baselines).get(self.method) or {}

    def _best_members(self) -> dict[str, dict[str, Any]]:
        """The fused baseline's members, with the best options of their own search where there was one."""
        found = {}
        for name, options in fused_members(self.args.baselines).items():
            path = self.args.output_dir / name / BEST
            found[name] = read_json(path)["options"] if path.exists() else options
        return found

    def _finished(self) -> list[Any]:
        """Trials that came to an end, with figures or an error, and not by a kill."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if _state(trial) in ("complete", "failed")]

    def _best(self) -> Any | None:
        complete = [trial for trial in self._finished() if _state(trial) == "complete"]
        return max(complete, key=lambda trial: trial.value, default=None)

    def _write(self) -> None:
        """The table of all trials, and the best one."""
        names = [field.name for field in self.searched]
        with staged_file(self.folder / TRIALS) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["number", "state", "seconds", *FIGURES, *names, "error"])
            for trial in self.study.get_trials(deepcopy=False):
                if _state(trial) != "waiting":
                    known, figures = trial.user_attrs, trial.user_attrs.get("figures", {})
                    cells = [trial.number, _state(trial), known.get("seconds", "")]
                    cells += [figures.get(name, "") for name in FIGURES]
                    cells += [
                        field.shown(trial.params[field.name]) if field.name in trial.params else ""
                        for field in self.searched
                    ]
                    table.writerow([*cells, known.get("error", "")])
        best = self._best()
        if best is None:
            logger.warning(f"No trial of {self.method} has come to figures: see {self.folder / TRIALS}.")
            return
        about = {"number": best.number, "trials": len(self._finished()), **best.user_attrs["figures"]}
        write_json(self.folder / BEST, {**about, "options": best.user_attrs["options"]})


def _state(trial: Any) -> str:
    """complete, failed (it raised), killed, running or waiting."""
    name = trial.state.name.lower()
    if name == "fail":
        return "failed" if "error" in trial.user_attrs else "killed"
    return name


def write_best(args: RecipeArguments) -> Path:
    """Joins the best options of all methods that were searched in a folder to one part of a recipe."""
    fragment, notes = {}, []
    for method in (*BASELINES, ONEREC):
        path = args.output_dir / method / BEST
        if not path.exists():
            continue
        best = read_json(path)
        if method == ONEREC:
            fragment |= best["options"]
        else:
            fragment.setdefault("baselines", dict(args.baselines))[method] = best["options"]
        notes.append(f"# {method}: {OBJECTIVE} {best[OBJECTIVE]:.4f} on validation, trial {best['number']}")
    target = args.output_dir / FRAGMENT
    with staged_file(target) as partial:
        text = yaml.safe_dump(fragment, sort_keys=False)
        partial.write_text("\n".join([*notes, text]), encoding="utf-8")
    return target
