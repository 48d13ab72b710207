"""What a kill or a full disk costs a run: nothing but the time since its last finished part.

A whole pipeline is run undisturbed, then again with SIGKILL at random moments, and on disks that are too small for
it. After every interruption all finished files are opened, and every stage that was complete must be so still; each
interrupted run is then finished by the same command, and must end in the undisturbed one's metrics to the last digit,
speeds aside.

    python recipes/benchmarks/interrupted_runs.py --output_dir runs/interrupted --json interrupted_runs.json

The small disks are `tmpfs`, which only root may mount; for others the largest file is limited instead. The same
command goes on after the last interruption.
"""

import argparse
import contextlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_FSIZE, setrlimit
from typing import Any

import pyarrow.parquet as pq
from matplotlib.image import imread
from safetensors.numpy import load_file
from tqdm.auto import tqdm

from onerec_hf.reporting.tables import Table
from onerec_hf.stages.stage_runner import STAGE_FILE, read_json, write_json
from onerec_hf.training_checkpoints import CHECKPOINT_COMPLETE

RECIPES = Path(__file__).parents[1]
REFERENCE, FINISHED = "undisturbed", "finished runs"
AT_WORK = (".partial", ".former")
OF_THE_MACHINE = ("timings", "environment", "fit_seconds", "users_per_second", "milliseconds")
FULL = "is full: make room"
LONGEST_SHARE = 0.25  # of the undisturbed run's time, the longest time to a kill
DISKS = (0.1, 0.3, 0.45, 0.9)  # of what the undisturbed run has written
READERS: dict[str, Callable[[Path], Any]] = {
    ".json": read_json,
    ".parquet": pq.read_table,
    ".safetensors": load_file,
    ".png": imread,
}


@dataclass
class PipelineRun:
    """A run of the whole pipeline in a process of its own, with its log beside its folder or elsewhere."""

    config: Path
    folder: Path
    log: Path

    def start(self, largest_file: int | None = None) -> None:
        """Starts or continues it; no file may grow beyond `largest_file` [bytes]."""
        command = [sys.executable, str(RECIPES / "pipeline.py"), "--config", str(self.config)]
        command += ["--output_dir", str(self.folder), "--threads", "1"]
        limit = None if largest_file is None else partial(setrlimit, RLIMIT_FSIZE, (largest_file, RLIM_INFINITY))
        self.skipped = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=limit)

    def said(self) -> str:
        """What the process has said."""
        with open(self.log, "rb") as log:
            log.seek(self.skipped)
            return log.read().decode("utf-8", errors="replace")

    def wait_for_work(self) -> None:
        """Until it has begun with its stages, after the imports."""
        while self.process.poll() is None and "[data] " not in self.said():
            time.sleep(0.01)

    def finish(self) -> None:
        """Waits for its end, which must be a good one."""
        if self.process.wait():
            raise RuntimeError(f"{self.folder} failed: {self.said()[-2000:]}")

    def at_work(self) -> str:
        """The stage that it was in when it was interrupted."""
        return next((path.stem for path in self.folder.glob("*.partial")), "between two")


def stages(folder: Path) -> dict[str, int]:
    """The complete stages of a run, and when each became so [ns]."""
    done = [path for path in folder.glob(f"*/{STAGE_FILE}") if path.parent.suffix not in AT_WORK]
    return {path.parent.name: path.stat().st_mtime_ns for path in done}


def finished_files(folder: Path) -> Iterator[Path]:
    """All that a run counts as done: what stands under its own name, and in a stage at work the marked checkpoints."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        marked = any((parent / CHECKPOINT_COMPLETE).exists() for parent in path.parents if parent != folder)
        at_work = any(part.startswith(".") or part.endswith(AT_WORK) for part in parts)
        if path.is_file() and (marked or not at_work):
            yield path


def faults(folder: Path) -> list[str]:
    """What is not whole in a run that was interrupted."""
    found = []
    for path in finished_files(folder):
        try:
            READERS.get(path.suffix, Path.read_bytes)(path)
            if path.suffix == ".html" and not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
                raise ValueError("is cut off")
        except Exception as error:
            found.append(f"{path.relative_to(folder)}: {type(error).__name__}: {error}")
    own = [path for path in folder.glob("*/") if path.suffix not in AT_WORK]
    return found + [f"{path.name}: no {STAGE_FILE}" for path in own if not (path / STAGE_FILE).exists()]


def lost(before: dict[str, int], folder: Path) -> list[str]:
    """Complete stages that are there no more, or were done again."""
    now = stages(folder)
    return [f"{name}: was complete" for name, moment in before.items() if now.get(name) != moment]


def comparable(metrics: Any) -> Any:
    """Metrics without what another moment or machine changes."""
    if isinstance(metrics, dict):
        return {name: comparable(value) for name, value in metrics.items() if name not in OF_THE_MACHINE}
    return [comparable(value) for value in metrics] if isinstance(metrics, list) else metrics


def differing(folder: Path, reference: Path) -> list[str]:
    """The parts of a run's metrics that are not the reference's."""
    ours, theirs = (comparable(read_json(run / "metrics.json")) for run in (folder, reference))
    names = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
    return [f"{folder.name}: other {name}" for name in sorted(names)]


def undisturbed(config: Path, output_dir: Path) -> dict[str, Any]:
    """The run that the others are compared with: time from its first stage on [s], size and largest file [bytes]."""
    known = output_dir / "undisturbed.json"
    if not known.exists():
        run = PipelineRun(config, output_dir / REFERENCE, output_dir / f"{REFERENCE}.log")
        shutil.rmtree(run.folder, ignore_errors=True)
        run.start()
        run.wait_for_work()
        started = time.monotonic()
        run.finish()
        seconds = time.monotonic() - started
        sizes = [path.stat().st_size for path in run.folder.rglob("*") if path.is_file()]
        write_json(known, {"seconds": seconds, "bytes": sum(sizes), "largest_file": max(sizes)})
    return read_json(known)


def kill_runs(config: Path, output_dir: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """Kills runs, each as often as it takes, until there were so many kills; an entry by kill and by finished run."""
    state, longest = output_dir / "kills.json", LONGEST_SHARE * undisturbed(config, output_dir)["seconds"]
    entries = read_json(state) if state.exists() else []
    with tqdm(total=kills, initial=sum(entry["killed"] for entry in entries), desc="kills") as bar:
        while bar.n < kills or entries[-1]["killed"]:
            number = sum(not entry["killed"] for entry in entries)
            run = PipelineRun(config, output_dir / f"run_{number}", output_dir / f"run_{number}.log")
            before = entries[-1]["stages"] if entries and entries[-1]["killed"] else {}
            delay = random.Random(f"{seed} {len(entries)}").uniform(0, longest)
            run.start()
            run.wait_for_work()
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(delay if bar.n < kills else None)
            killed = run.process.poll() is None
            if killed:
                run.process.kill()
                run.process.wait()
            else:
                run.finish()
            found = faults(run.folder) + lost(before, run.folder)
            found += [] if killed else differing(run.folder, output_dir / REFERENCE)
            at_work = run.at_work() if killed else FINISHED
            entry = {"run": number, "killed": killed, "at_work": at_work, "seconds": delay}
            entries.append({**entry, "stages": stages(run.folder), "faults": found})
            write_json(state, entries)
            bar.update(killed)
    return entries


def last_error(said: str) -> tuple[str, bool]:
    """The line of a process's last error, and whether the next one says that the disk is full, and which."""
    lines = said.strip().splitlines() or [""]
    named = [place for place, line in enumerate(lines) if FULL in line]
    return (lines[named[-1] - 1], True) if named else (lines[-1], False)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of that size [bytes] for a folder, and whether it could be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", folder], check=True)


def fill_disks(config: Path, output_dir: Path) -> list[dict[str, Any]]:
    """Runs on disks that hold a share of what the undisturbed run has written, then with room; an entry by share."""
    state, known = output_dir / "disks.json", undisturbed(config, output_dir)
    entries = read_json(state) if state.exists() else []
    for share in tqdm(DISKS[len(entries) :], desc="full disks", total=len(DISKS), initial=len(entries)):
        disk = output_dir / f"disk_{share:g}"
        run = PipelineRun(config, disk / "run", output_dir / f"disk_{share:g}.log")
        shutil.rmtree(disk, ignore_errors=True)
        with small_disk(disk, int(share * known["bytes"])) as mounted:
            run.start(None if mounted else int(share * known["largest_file"]))
            code = run.process.wait()
            said, named = last_error(run.said())
            found, before, at_work = faults(run.folder), stages(run.folder), run.at_work()
            found += [] if code == 1 and (named or not mounted) else [f"code {code}, says {said!r}"]
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=4g", disk], check=True)
            run.start()
            run.finish()
            found += faults(run.folder) + lost(before, run.folder) + differing(run.folder, output_dir / REFERENCE)
        entries.append({"share": share, "tmpfs": mounted, "at_work": at_work, "says": said, "faults": found})
        write_json(state, entries)
    return entries


def table(kills: list[dict[str, Any]], disks: list[dict[str, Any]]) -> str:
    """Interruptions and faults by the stage that was at work, and the disks."""
    rows = []
    for at_work in sorted({entry["at_work"] for entry in kills}, key=lambda name: (name == FINISHED, name)):
        of_these = [entry for entry in kills if entry["at_work"] == at_work]
        rows.append([at_work, len(of_these), sum(len(entry["faults"]) for entry in of_these)])
    killed = Table(["killed in", "times", "faults"], rows).text()
    rows = [[f"{disk['share']:.0%}", disk["at_work"], len(disk["faults"]), disk["says"]] for disk in disks]
    return f"{killed}\n\n{Table(['disk', 'full in', 'faults', 'says'], rows).text()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=RECIPES / "quickstart" / "debug.yaml")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write the entries here too")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    kills = kill_runs(args.config, args.output_dir, args.kills, args.seed)
    disks = fill_disks(args.config, args.output_dir)
    print(table(kills, disks))
    for fault in (fault for entry in (*kills, *disks) for fault in entry["faults"]):
        print(f"FAULT {fault}")
    if args.json is not None:
        write_json(args.json, {"kills": kills, "disks": disks})


if __name__ == "__main__":
    main()
