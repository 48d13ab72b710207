"""Runs a stage once: atomically, skipped when it is complete, resumed when it was killed.

It is done again when anything that decides its output has changed: its group of arguments, a stage that it reads, or
what it reads from outside the run.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
from accelerate import PartialState
from accelerate.logging import get_logger
from huggingface_hub import HfApi, snapshot_download
from tqdm.contrib.logging import logging_redirect_tqdm

from ..staged_files import staged_file

STAGE_FILE = "stage.json"
SETTINGS = "settings.json"  # all that the stage depends on
FULL_BYTES = 2**16  # a disk with less room is full
MODEL = "model"  # where a stage that makes a generator puts it
CHECKPOINTS = "checkpoints"  # a stage's training checkpoints, which only a run that is not complete needs

logger = get_logger(__name__)


def write_json(path: Path, content: Any):
    """Writes JSON so that the file is there whole or not at all."""
    with staged_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError with its name where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete its folder, and run the stage again.") from None


def completed_stage(output_dir: Path, name: str) -> dict[str, Any] | None:
    """What a complete stage says of itself, or None. Raises ValueError for a damaged stage.json."""
    path = output_dir / name / STAGE_FILE
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or "fingerprint" not in content:
        raise ValueError(f"{path} has no fingerprint: no stage wrote it. Delete its folder, and run the stage again.")
    return content


def last_model_stage(output_dir: Path) -> str:
    """The stage whose model a complete run ends in."""
    return "pretrain" if completed_stage(output_dir, "align") is None else "align"


@dataclass(frozen=True)
class OutsideInput:
    """What a stage reads and no stage of the run has written.

    Args:
        source: a file, also one with a protocol such as s3://, a folder (all of it is read), or a repository of the
            Hub.
        repo_type: "model" or "dataset".
    """

    source: str | Path
    repo_type: str = "model"

    def identity(self) -> Any:
        """What tells one version from another under the same name: size and time of change of each file, or the
        commit of the repository; None where neither can be looked at, without the Hub for example."""
        if "://" in str(self.source):
            return fsspec.core.url_to_fs(str(self.source))[0].ukey(str(self.source))
        path = Path(self.source).expanduser()
        if path.exists():
            files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            stats = [(str(file.resolve()), file.stat()) for file in files]
            return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats}
        repository = {"repo_id": str(self.source), "repo_type": self.repo_type}
        try:
            return HfApi().repo_info(**repository, timeout=10).sha
        except Exception:  # no such repository, no network, no permission: whoever reads it says which
            pass
        try:
            return Path(snapshot_download(**repository, local_files_only=True)).name
        except Exception:
            return None


@dataclass(frozen=True)
class Stage:
    """A stage of a run, and everything that decides its output.

    Args:
        name: its folder below `output_dir`.
        output_dir: the run's folder.
        arguments: its group of options, a dataclass.
        reads: stages whose output it reads.
        outside: what it reads from outside the run.
    """

    name: str
    output_dir: Path
    arguments: Any
    reads: Sequence[str] = ()
    outside: Sequence[OutsideInput] = ()

    def description(self) -> dict[str, Any]:
        """All that decides the output, JSON-able.

        Raises:
            FileNotFoundError: a stage that it reads is not complete.
        """
        inputs = {
            stage: completed_stage(self.output_dir, stage)["fingerprint"]
            for stage in self.reads
            if stage_dir(self.output_dir, stage, self.name)
        }
        described = {"arguments": asdict(self.arguments), "inputs": inputs}
        if self.outside:
            described["outside"] = {str(entry.source): self._identity(entry) for entry in self.outside}
        return json.loads(json.dumps(described, sort_keys=True, default=str))

    def _identity(self, entry: OutsideInput) -> Any:
        identity = entry.identity()
        if identity is None:
            path = self.output_dir / self.name / SETTINGS
            known = read_json(path).get("outside", {}) if path.exists() else {}
            identity = known.get(str(entry.source))
            if identity is not None:
                logger.warning(f"[{self.name}] {entry.source} cannot be looked at now, and is taken to be unchanged.")
        return identity

    def is_complete(self) -> bool:
        """Whether [`run_stage`] would have nothing to do."""
        done = completed_stage(self.output_dir, self.name)
        return done is not None and done["fingerprint"] == fingerprint(self.description())


def stage_dir(output_dir: Path, name: str, needed_by: str) -> Path:
    """The folder of a stage that must be complete.

    Raises:
        FileNotFoundError: if it isn't; the message says which recipe makes it.
    """
    if completed_stage(output_dir, name) is None:
        recipe = {"data": "fit_tokenizer", "tokenize": "fit_tokenizer"}.get(name, name)
        raise FileNotFoundError(
            f"{needed_by} reads {output_dir / name}, which is not complete: run recipes/{recipe}.py "
            f"(`onerec {recipe}`) or recipes/pipeline.py (`onerec pipeline`) with the same --config and --output_dir "
            "first."
        )
    return output_dir / name


def fingerprint(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def changed_entries(former: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the arguments, stages and outside inputs that differ between two descriptions of a stage."""
    names = []
    for part in ("arguments", "inputs", "outside"):
        before, after = former.get(part, {}), now.get(part, {})
        names += [name for name in before | after if before.get(name) != after.get(name)]
    return names


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Adds to an error that comes of a full disk which disk it is, and what to do: libraries say it in many ways, and
    some of them not at all."""
    try:
        yield
    except Exception as error:
        said = any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))
        if said or shutil.disk_usage(folder).free < FULL_BYTES:
            error.add_note(
                f"The disk of {folder} is full: make room, and run the same command again. What is complete is kept."
            )
        raise


@contextmanager
def interruption_named(stage: str) -> Iterator[None]:
    """Adds to a Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        text = f"[{stage}] interrupted. The same command goes on from here; what is complete is kept."
        interruption.add_note(text)
        raise


def run_stage(stage: Stage, work: Callable[[Path], dict | None]) -> Path:
    """Runs `work(folder)` for a stage unless it is complete, and returns the stage's folder.

    The work is done in `<name>.partial`, which is renamed when it is done: `<name>` is always whole. A folder left by
    a killed run is handed to `work` again, to go on from what is in it. A stage that is to be done again keeps its
    former output until the new one takes its place.
    """
    state = PartialState()
    target = stage.output_dir / stage.name
    partial, former = target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.former")
    described = stage.description()
    done = completed_stage(stage.output_dir, stage.name)
    if done is not None and done["fingerprint"] == fingerprint(described):
        logger.info(f"[{stage.name}] complete: {target}")
        return target
    if state.is_main_process:
        settings = partial / SETTINGS
        if partial.exists() and not (settings.exists() and read_json(settings) == described):
            shutil.rmtree(partial)
        resumed = partial.exists()
        partial.mkdir(parents=True, exist_ok=True)
        if not resumed:
            write_json(settings, described)
        why = "resumed" if resumed else "started"
        if done and not resumed:
            known = read_json(target / SETTINGS) if (target / SETTINGS).exists() else {}
            why = f"settings or inputs changed, done again ({', '.join(changed_entries(known, described))})"
        read = [str(stage.output_dir / name) for name in stage.reads] + [str(entry.source) for entry in stage.outside]
        logger.info(f"[{stage.name}] {why}: reads {', '.join(read) or 'no file'}, writes {target}")
    state.wait_for_everyone()
    # A kill may have come between the end of the work and the renaming.
    if not (partial / STAGE_FILE).exists():
        started = time.monotonic()
        with interruption_named(stage.name), logging_redirect_tqdm(), full_disk_named(partial):
            summary = work(partial) or {}
            state.wait_for_everyone()
            if state.is_main_process:
                seconds = round(time.monotonic() - started, 1)
                done = {"fingerprint": fingerprint(described), "seconds": seconds, **summary}
                write_json(partial / STAGE_FILE, done)
    state.wait_for_everyone()
    if state.is_main_process:
        seconds = read_json(partial / STAGE_FILE)["seconds"]
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)
        if target.exists():
            os.rename(target, former)
        os.rename(partial, target)
        shutil.rmtree(former, ignore_errors=True)
        logger.info(f"[{stage.name}] done in {seconds} s: {target}")
    state.wait_for_everyone()
    return target
