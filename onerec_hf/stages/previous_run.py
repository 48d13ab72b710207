"""The run of an earlier period that a run goes on from, as its stages read it."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .stage_runner import (
    MODEL,
    SETTINGS,
    STAGE_FILE,
    OutsideInput,
    completed_stage,
    last_model_stage,
    read_json,
)


class PreviousRun:
    """A complete run; `PreviousRun.of(args)` is None where a run begins anew."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()

    @classmethod
    def of(cls, args: Any) -> "PreviousRun | None":
        """Of the options of a run or a stage."""
        return None if args.previous_run is None else cls(args.previous_run)

    def stage(self, name: str) -> Path:
        """The folder of a stage.

        Raises:
            FileNotFoundError: it is not complete.
        """
        if completed_stage(self.folder, name) is None:
            raise FileNotFoundError(
                f"previous_run is {self.folder}, which has no complete stage {name!r}: run the command that began it "
                "to its end, or name another run."
            )
        return self.folder / name

    def input(self, *stages: str) -> list[OutsideInput]:
        """What these stages wrote, for a stage that reads it."""
        return [OutsideInput(self.stage(stage) / STAGE_FILE) for stage in stages]

    @property
    def evaluation_start(self) -> str:
        """The ISO date-time before which everything was fitted.

        Raises:
            ValueError: the split was not by time, or left a period out of what was fitted.
        """
        split = read_json(self.stage("data") / STAGE_FILE)["dataset"]["split"]
        if split["method"] != "time" or split["fitted_until"] != split["evaluation_split"]:
            raise ValueError(
                f"previous_run is {self.folder}, which did not fit everything before a time: an update needs a run "
                "with split_method: time and without fit_validation: false."
            )
        return split["evaluation_start"]

    def generator(self) -> Path:
        """The last model."""
        return self.stage(last_model_stage(self.folder)) / MODEL

    def require_same(self, stage: str, arguments: Any, names: Iterable[str]) -> None:
        """Raises ValueError for options of a stage, by `names`, that are others than this run's, whose model or
        semantic IDs cannot become others."""
        known, given = read_json(self.stage(stage) / SETTINGS)["arguments"], asdict(arguments)
        for name in names:
            if known.get(name, given[name]) != given[name]:
                raise ValueError(
                    f"{name} is {given[name]!r}, and {known[name]!r} in {self.folder / stage}: give the same, or "
                    "leave previous_run out to begin anew."
                )
