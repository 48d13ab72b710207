"""Stage `serve`: the one session that each judged user is given, by OneRec after every round, by cascades of a
retriever and the run's reward model, and by what a simulated world knows; beside what each costs."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file

from ..evaluation import RANKERS, ServedMethod, add_oracle_shares, cascade_sessions, oracle_sessions
from ..evaluation.served_sessions import (
    BEAMS,
    BEST_SESSION,
    CASCADE,
    DIVERSE_BEAMS,
    ONEREC,
    ORACLE,
    RANKED_LIST,
)
from ..evaluation.session_judges import scalar_of
from ..evaluation_mode import evaluation_mode
from ..modeling_onerec import OneRecForConditionalGeneration
from ..session_generation.searches import SearchOptions
from ..staged_files import staged_file
from .baselines_stage import BASELINE_STAGE, evaluated_baselines
from .evaluated_run import EvaluatedRun
from .recipe_arguments import PolicyArguments
from .reward_stage import REWARD_MODEL
from .stage_runner import Stage, completed_stage, read_json, run_stage, write_json

SERVE_STAGE = "serve"
ENTRIES = "served.json"


@dataclass(frozen=True)
class Served:
    """A method's sessions (judged users, m), -1 for nothing, and what they take for a user [ms]; None for a figure
    that would be of no use."""

    sessions: torch.LongTensor
    milliseconds: float | None

    def save(self, path: Path) -> None:
        about = {} if self.milliseconds is None else {"milliseconds": str(self.milliseconds)}
        with staged_file(path) as partial:
            save_file({"sessions": self.sessions.contiguous()}, partial, metadata=about)

    @classmethod
    def load(cls, path: Path) -> "Served":
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("milliseconds")
            return cls(file.get_tensor("sessions"), None if found is None else float(found))


def run_serve(run: EvaluatedRun) -> Path:
    """Writes `served.json`, the entries of "served" in metrics.json, and every method's sessions."""

    def work(folder: Path) -> None:
        if not PartialState().is_main_process:
            return
        entries = []
        for method, serve in served_methods(run):
            path = folder / f"{method.name}.safetensors"
            if not path.exists():
                serve().save(path)
            served = Served.load(path)
            entries.append(run.served.entry(method, served.sessions, served.milliseconds))
        add_oracle_shares(entries)
        write_json(folder / ENTRIES, entries)

    reads = ["data", "tokenize", "pretrain", BASELINE_STAGE, "reward", "align"]
    return run_stage(Stage(SERVE_STAGE, run.args.output_dir, run.args.group(PolicyArguments), reads), work)


def served_entries(run: EvaluatedRun) -> list[dict]:
    """What the complete stage wrote."""
    return read_json(run.args.output_dir / SERVE_STAGE / ENTRIES)


def served_methods(run: EvaluatedRun) -> Iterator[tuple[ServedMethod, Callable[[], Served]]]:
    """Every method of a run with alignment, and what serves by it."""
    args = run.args
    lists: dict[str, BaselineList | OneRecServing] = {
        name: BaselineList(run, name) for name in evaluated_baselines(args)
    }
    for name, ranked in lists.items():
        yield ServedMethod(name, retriever=name), ranked.first_items
    rounds = completed_stage(args.output_dir, "align")["rounds"]
    kept = max([0, *(done["round"] for done in rounds if done["kept"])])
    for number in (0, *(done["round"] for done in rounds)):
        serving = OneRecServing(run, number)
        yield ServedMethod(ONEREC, BEAMS, round=number), serving.likeliest
        yield ServedMethod(ONEREC, RANKED_LIST, round=number), serving.first_items
        for search in (BEAMS, DIVERSE_BEAMS):
            count = run.evaluator.options.judged_sessions
            if search == BEAMS or count % SearchOptions.num_beam_groups == 0:
                method = ServedMethod(ONEREC, search, count, BEST_SESSION, round=number)
                yield method, partial(serving.best_session, search)
        guided = [(count, args.guidance_weight) for count in args.cascade_candidates]
        if number == kept:
            lists[ONEREC] = serving
            guided += args.served_guidance.items()
        for count, weight in dict.fromkeys(guided):
            method = ServedMethod(ONEREC, BEAMS, count, guided=True, round=number, guidance_weight=weight)
            yield method, partial(serving.guided, count, weight)
    for name, ranked in lists.items():
        for count in args.cascade_candidates:
            for ranker in RANKERS:
                method = ServedMethod(CASCADE, name, count, ranker, round=kept if name == ONEREC else None)
                yield method, partial(cascade, run, ranked, count, ranker)
    if run.evaluator.world is not None and knows_the_reward(run):
        yield ServedMethod(ORACLE), lambda: Served(oracle(run), None)


def cascade(run: EvaluatedRun, retriever: "BaselineList | OneRecServing", count: int, ranker: str) -> Served:
    """Sessions of the retriever's first `count` items by the run's reward model."""
    candidates, milliseconds = retriever.ranking
    started, rows = time.monotonic(), run.evaluator.judged_rows
    sessions = cascade_sessions(
        run.scorers[REWARD_MODEL],
        rows,
        torch.from_numpy(candidates[:, :count]).long(),
        run.args.session_items,
        ranker,
        title=f"cascade, {retriever.name}, {count} items, by {ranker}",
    )
    return Served(sessions, milliseconds + 1000 * (time.monotonic() - started) / len(rows))


def knows_the_reward(run: EvaluatedRun) -> bool:
    """Whether the simulated world has all that the reward counts."""
    scorer = run.scorers[REWARD_MODEL]
    user, item = run.evaluator.cases["user_id"][:1], np.asarray(run.tokenizer.item_ids)[:1]
    found = run.evaluator.world.expected_feedback(np.asarray(user), item[:, None])
    return scalar_of(scorer, {name: found[name] for name in scorer.objectives if name in found}) is not None


def oracle(run: EvaluatedRun) -> torch.LongTensor:
    """The sessions that the truth builds of all that a user may be given."""
    evaluator = run.evaluator
    candidates = torch.arange(evaluator.trie.num_items).repeat(len(evaluator.judged), 1)
    if evaluator.options.exclude_consumed:
        for place, case in enumerate(evaluator.judged):
            candidates[place, evaluator.histories[case]] = -1
    scorer, item_ids, users = run.scorers[REWARD_MODEL], np.asarray(run.tokenizer.item_ids), evaluator.judged_user_ids
    return oracle_sessions(evaluator.world, scorer, item_ids, users, candidates, run.args.session_items)


class BaselineList:
    """What a baseline ranks for the judged users."""

    def __init__(self, run: EvaluatedRun, name: str):
        self.run, self.name = run, name

    @cached_property
    def ranking(self) -> tuple[np.ndarray, float]:
        """(judged users, k) catalogue indices, and what they take for a user [ms]."""
        folder = self.run.args.output_dir / BASELINE_STAGE
        ranked = load_file(folder / f"{self.name}.safetensors")["ranked"][self.run.evaluator.judged]
        return ranked, 1000 / read_json(folder / f"{self.name}.json")["users_per_second"]

    def first_items(self) -> Served:
        ranked, milliseconds = self.ranking
        return Served(torch.from_numpy(ranked[:, : self.run.args.session_items]).long(), milliseconds)


class OneRecServing:
    """What OneRec after a round finds for the judged users; what is looked for twice is found once."""

    name = ONEREC

    def __init__(self, run: EvaluatedRun, number: int):
        self.run, self.number = run, number
        self._sessions: dict[str, tuple[torch.LongTensor, float]] = {}

    @cached_property
    def model(self) -> OneRecForConditionalGeneration:
        output_dir = self.run.args.output_dir
        return self.run.load(output_dir / "align" / f"round_{self.number}") if self.number else self.run.seed_model

    @cached_property
    def ranking(self) -> tuple[np.ndarray, float]:
        """As of [`BaselineList`], as long as the longest cascade needs it."""
        return self._ranked(max(self.run.args.cascade_candidates))

    def first_items(self) -> Served:
        """Of a list no longer than a session."""
        ranked, milliseconds = self._ranked(self.run.args.session_items)
        return Served(torch.from_numpy(ranked), milliseconds)

    def likeliest(self) -> Served:
        model, beams, started = self.model, self.run.args.session_beams, time.monotonic()
        with evaluation_mode(model):
            sessions = self.run.evaluator.best_sessions(model, f"round {self.number}", num_beams=beams)
        return Served(sessions, 1000 * (time.monotonic() - started) / len(sessions))

    def best_session(self, search: str) -> Served:
        """Of a search's sessions the one of highest reward."""
        sessions, milliseconds = self._found(search)
        started = time.monotonic()
        rewards = self.run.scorers[REWARD_MODEL].score(self.run.evaluator.judged_rows, sessions).reward
        best = rewards.nan_to_num(-torch.inf).argmax(dim=1)
        chosen = sessions[torch.arange(len(sessions)), best]
        return Served(chosen, milliseconds + 1000 * (time.monotonic() - started) / len(sessions))

    def guided(self, count: int, weight: float) -> Served:
        """By a search of `count` beams in all that the reward model guides with this weight."""
        args, model, started = self.run.args, self.model, time.monotonic()
        with evaluation_mode(model):
            sessions = self.run.evaluator.best_sessions(
                model,
                f"round {self.number}, guided, {count} beams",
                self.run.scorers[REWARD_MODEL],
                guidance_weight=weight,
                **SearchOptions.divided(count, args.num_item_beams),
            )
        return Served(sessions, 1000 * (time.monotonic() - started) / len(sessions))

    def _ranked(self, width: int) -> tuple[np.ndarray, float]:
        model, evaluator = self.model, self.run.evaluator
        started = time.monotonic()
        with evaluation_mode(model):
            ranked, _ = evaluator.rank(model, width, f"round {self.number}", evaluator.judged)
        return ranked, 1000 * (time.monotonic() - started) / len(ranked)

    def _found(self, search: str) -> tuple[torch.LongTensor, float]:
        if search not in self._sessions:
            model, started = self.model, time.monotonic()
            with evaluation_mode(model):
                sessions, _ = self.run.evaluator.generate(model, f"round {self.number}, {search}", search=search)
            self._sessions[search] = sessions, 1000 * (time.monotonic() - started) / len(sessions)
        return self._sessions[search]
