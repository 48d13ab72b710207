"""Runs a stage once: atomically, skipped when it is complete, resumed when it was killed."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger

from ..staged_files import staged_file

STAGE_FILE = "stage.json"
CHECKPOINTS = "checkpoints"  # a stage's training checkpoints, which only a run that is not complete needs

logger = get_logger(__name__)


def write_json(path: Path, content: Any):
    """Writes JSON so that the file is there whole or not at all."""
    with staged_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def completed_stage(output_dir: Path, name: str) -> dict[str, Any] | None:
    """What a complete stage says of itself, or None."""
    path = output_dir / name / STAGE_FILE
    return read_json(path) if path.exists() else None


def stage_dir(output_dir: Path, name: str, needed_by: str) -> Path:
    """The folder of a stage that must be complete.

    Raises:
        FileNotFoundError: If it isn't; the message says which recipe makes it.
    """
    if completed_stage(output_dir, name) is None:
        recipe = "tokenize" if name == "data" else name
        raise FileNotFoundError(
            f"{needed_by} reads {output_dir / name}, which is not complete: run recipes/{recipe}.py (or "
            "recipes/pipeline.py) with the same --config and --output_dir first."
        )
    return output_dir / name


def is_complete(name: str, output_dir: Path, settings: dict[str, Any], reads: list[str]) -> bool:
    """Whether [`run_stage`] with the same arguments would have nothing to do."""
    done = completed_stage(output_dir, name)
    return done is not None and done["fingerprint"] == _fingerprint(_description(name, output_dir, settings, reads))


def _description(name: str, output_dir: Path, settings: dict[str, Any], reads: list[str]) -> dict[str, Any]:
    """What decides a stage's output."""
    inputs = {
        stage: completed_stage(output_dir, stage)["fingerprint"]
        for stage in reads
        if stage_dir(output_dir, stage, name)
    }
    return json.loads(json.dumps({"settings": settings, "inputs": inputs}, sort_keys=True, default=str))


def _fingerprint(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def run_stage(
    name: str, output_dir: Path, settings: dict[str, Any], reads: list[str], work: Callable[[Path], dict | None]
) -> Path:
    """Runs `work(folder)` for a stage unless it is complete, and returns the stage's folder.

    The work is done in `<name>.partial`, which is renamed when it is done: `<name>` is always whole. A folder left by
    a killed run is handed to `work` again, to go on from what is in it. A stage whose settings, or whose inputs, have
    changed is done anew, and its former output replaced at the end.

    Args:
        name (`str`): The stage's folder below `output_dir`.
        settings (`dict`): Everything that decides the stage's output, JSON-able.
        reads (`list[str]`): The stages whose output it reads.
    """
    state = PartialState()
    target, partial = output_dir / name, output_dir / f"{name}.partial"
    former = output_dir / f"{name}.former"
    described = _description(name, output_dir, settings, reads)
    fingerprint = _fingerprint(described)
    done = completed_stage(output_dir, name)
    if done is not None and done["fingerprint"] == fingerprint:
        logger.info(f"[{name}] complete: {target}")
        return target
    if state.is_main_process:
        partial_settings = partial / "settings.json"
        if partial.exists() and not (partial_settings.exists() and read_json(partial_settings) == described):
            shutil.rmtree(partial)
        resumed = partial.exists()
        partial.mkdir(parents=True, exist_ok=True)
        if not resumed:
            write_json(partial_settings, described)
        why = "resumed" if resumed else "settings or inputs changed, done anew" if done else "started"
        read = ", ".join(str(output_dir / stage) for stage in reads) or "the data set"
        logger.info(f"[{name}] {why}: reads {read}, writes {target}")
    state.wait_for_everyone()
    # A kill may have come between the end of the work and the renaming.
    if not (partial / STAGE_FILE).exists():
        started = time.monotonic()
        summary = work(partial) or {}
        state.wait_for_everyone()
        if state.is_main_process:
            seconds = round(time.monotonic() - started, 1)
            write_json(partial / STAGE_FILE, {"fingerprint": fingerprint, "seconds": seconds, **summary})
    state.wait_for_everyone()
    if state.is_main_process:
        seconds = read_json(partial / STAGE_FILE)["seconds"]
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)
        if target.exists():
            os.rename(target, former)
        os.rename(partial, target)
        shutil.rmtree(former, ignore_errors=True)
        logger.info(f"[{name}] done in {seconds} s: {target}")
    state.wait_for_everyone()
    return target
