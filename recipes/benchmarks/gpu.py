"""Whatever there is to check on one GPU, in one call of ten minutes at most: that it is right, and how fast it is.

    python recipes/benchmarks/gpu.py --json gpu.json
    python recipes/benchmarks/gpu.py --checks training_1b generation_1b --minutes 4 --json gpu.json

Each check is a process of its own with a share of the time, so that one that fails, hangs or runs out of memory takes
nothing from the others; what it measured before it was stopped is kept. Figures are medians after warm-ups. Without a
GPU the same checks run on the CPU in a tiny size, which says that they work and nothing of a GPU.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import accelerate
import psutil
import torch
import transformers
import yaml
from gpu_measurements import (
    DEVICE,
    TINY,
    NotApplicable,
    Sizes,
    attention,
    experts,
    generation,
    kmeans,
    reward_scoring,
    same_results,
    sdpa_backends,
    training,
)

from onerec_hf import OneRecForConditionalGeneration
from onerec_hf.reporting.tables import Table
from onerec_hf.staged_files import staged_file
from onerec_hf.yaml_files import read_yaml

SCRIPT = Path(__file__)
RECIPES = SCRIPT.parents[1]
SIZES = {"gpu": Sizes(), "tiny": TINY}
NO_GPU = "No GPU here: nothing below was measured on one. The checks run on the CPU in a tiny size."
LAST_LINES, LINES_KEPT = 12, 100  # of an error, and of what a check that did not pass has said


def run_command(*words: str | Path) -> None:
    """Runs Python with these words; RuntimeError with the last lines that it said where it fails."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        said = "\n".join(done.stdout.splitlines()[-LAST_LINES:])
        raise RuntimeError(f"{' '.join(map(str, words))} ended with status {done.returncode}:\n{said}")


def debug_recipe(folder: Path) -> list[str | Path]:
    """Options of a run of the debug recipe in this folder, its trainings in half precision on a GPU."""
    options = read_yaml(RECIPES / "quickstart" / "debug.yaml")
    for name in ("pretrain", "pretrain_recent", "reward", "align"):
        options[name] = {**options[name], "bf16": DEVICE.type == "cuda"}
    (folder / "debug.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    return ["--config", folder / "debug.yaml", "--output_dir", folder / "run"]


def launch(config: str, processes: int = 1) -> list[str | Path]:
    """`accelerate launch` with this configuration, without a GPU with the CPU's."""
    file = RECIPES / "accelerate_configs" / f"{config if DEVICE.type == 'cuda' else 'cpu'}.yaml"
    return ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", str(processes)]


def pipeline(sizes: Sizes) -> Iterator[dict]:
    """All stages of the debug recipe, in half precision on a GPU: seconds by stage."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run_command(*launch("one_gpu"), RECIPES / "pipeline.py", *debug_recipe(folder))
        stages = sorted((folder / "run").glob("*/stage.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in stages:
            yield {"stage": path.parent.name, "seconds": json.loads(path.read_text(encoding="utf-8"))["seconds"]}


def launched(sizes: Sizes, config: str, processes: int) -> Iterator[dict]:
    """Pretraining of the debug recipe by `accelerate launch` with a configuration: losses, and weights that load."""
    gpus = torch.cuda.device_count() if DEVICE.type == "cuda" else 0
    if config != "one_gpu" and processes > gpus:
        raise NotApplicable(f"needs {processes} GPU{'s' * (processes > 1)}, of which there is {gpus or 'none'}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        options = debug_recipe(folder)
        run_command(RECIPES / "fit_tokenizer.py", *options)
        started = time.perf_counter()
        run_command(*launch(config, processes), RECIPES / "pretrain.py", *options)
        taken = time.perf_counter() - started
        log = json.loads((folder / "run/pretrain/stage.json").read_text(encoding="utf-8"))["log"]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        model = OneRecForConditionalGeneration.from_pretrained(folder / "run/pretrain/model")
        assert all(values.isfinite().all() for values in model.parameters()), "the saved weights are not finite"
        assert losses[-1] < losses[0], f"the loss went from {losses[0]} to {losses[-1]}"
        yield {"configuration": config if gpus else "cpu", "processes": processes, "seconds": taken, "losses": losses}


# By name, in the order in which they run: what is run, and its share of the time.
CHECKS: dict[str, tuple[Callable[[Sizes], Iterable[dict]], int]] = {
    "same_results": (same_results, 40),
    "experts": (experts, 40),
    "sdpa_backends": (sdpa_backends, 25),
    "training_0.1b": (partial(training, preset="0.1b"), 35),
    "training_1b": (partial(training, preset="1b"), 45),
    "generation_0.1b": (partial(generation, preset="0.1b"), 60),
    "generation_1b": (partial(generation, preset="1b"), 70),
    "reward_scoring": (reward_scoring, 25),
    "kmeans": (kmeans, 50),
    "one_process": (partial(launched, config="one_gpu", processes=1), 55),
    "ddp_one_process": (partial(launched, config="multi_gpu_ddp", processes=1), 50),
    "fsdp2_one_process": (partial(launched, config="fsdp2", processes=1), 50),
    "fsdp2_two_processes": (partial(launched, config="fsdp2", processes=2), 50),
    "pipeline": (pipeline, 120),
    "attention": (attention, 70),
}


def write_json(path: Path, content: dict) -> None:
    with staged_file(path) as partial_file:
        partial_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def run_check(name: str, sizes: Sizes, output: Path) -> None:
    """One check in this process; the file has its rows as soon as each is measured."""
    result = {"outcome": "stopped", "rows": []}
    write_json(output, result)
    try:
        for row in CHECKS[name][0](sizes):
            result["rows"].append(row)
            write_json(output, result)
        failures = [row["failure"] for row in result["rows"] if "failure" in row]
        result |= {"outcome": "failed", "reason": "; ".join(failures)} if failures else {"outcome": "passed"}
    except NotApplicable as reason:
        result |= {"outcome": "not applicable", "reason": str(reason)}
    except Exception:
        result |= {"outcome": "failed", "reason": "\n".join(traceback.format_exc().splitlines()[-LAST_LINES:])}
    write_json(output, result)


def end(process: subprocess.Popen) -> None:
    """Kills a process with all that it started, where it still runs."""
    if process.poll() is not None:
        return
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        for member in [psutil.Process(process.pid), *family]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def start_check(name: str, size: str, environment: dict[str, str], limit: float, folder: Path) -> dict:
    """A check in a process of its own, ended after so many seconds: outcome, reason, seconds, peak memory and rows."""
    output, log = folder / f"{name}.json", folder / f"{name}.log"
    command = [sys.executable, str(SCRIPT), "--check", name, "--size", size, "--output", str(output)]
    environment = environment | {"TMPDIR": str(folder)}  # where what it leaves behind, if it is ended, is removed
    started = time.monotonic()
    with open(log, "wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
    late = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        end(process)
    result = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"rows": [], "outcome": "stopped"}
    if late:
        result |= {"outcome": "out of time", "reason": f"after {limit:.0f} s"}
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if result["outcome"] == "stopped":
        reason = "\n".join([f"ended with status {process.returncode}:", *lines[-LAST_LINES:]])
        result |= {"outcome": "failed", "reason": reason}
    peak = max((row["peak_gib"] for row in result["rows"] if "peak_gib" in row), default=None)
    about = {"outcome": result["outcome"], "reason": result.get("reason", "")}
    about |= {"seconds": round(time.monotonic() - started, 1), "peak_gib": peak, "rows": result["rows"]}
    return about | {"said": lines[-LINES_KEPT:] if about["outcome"] in ("failed", "out of time") else []}


def fastest(rows: list[dict]) -> dict[str, str]:
    """The implementation that is fastest by each time."""
    times = dict.fromkeys(key for row in rows for key in row if "implementation" in row and key.endswith("_ms"))
    measured = {key: [row for row in rows if key in row] for key in times}
    return {key: min(some, key=lambda row: row[key])["implementation"] for key, some in measured.items()}


def print_results(checks: dict[str, dict]) -> None:
    for name, check in checks.items():
        columns = list(dict.fromkeys(key for row in check["rows"] for key in row))
        if columns:
            rows = [[row.get(key) for key in columns] for row in check["rows"]]
            print(f"\n{name}\n\n{Table(columns, rows).markdown()}")
        for key, best in check.get("fastest", {}).items():
            print(f"\nfastest by {key}: {best}")
    header = ["check", "outcome", "seconds", "peak GiB", "reason"]
    rows = [
        [name, check["outcome"], check["seconds"], check["peak_gib"], (check["reason"].splitlines() or [""])[-1]]
        for name, check in checks.items()
    ]
    print(f"\n{Table(header, rows).markdown(aligned=True)}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Returns how many checks failed."""
    started = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--minutes", type=float, default=9.5, help="For all checks together.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=DEVICE.type, help="cpu passes a GPU over.")
    parser.add_argument("--size", choices=SIZES, help="By default gpu on a GPU and tiny elsewhere.")
    parser.add_argument("--json", type=Path, help="File to write environment, outcomes and figures to.")
    parser.add_argument("--check", choices=CHECKS, help="Run this one in this process and write its --output.")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    on_gpu = args.device == "cuda" and torch.cuda.is_available()
    size = args.size or ("gpu" if on_gpu else "tiny")
    if args.check:
        run_check(args.check, SIZES[size], args.output)
        return 0
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions |= {"transformers": transformers.__version__, "accelerate": accelerate.__version__}
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if on_gpu else []
    results = {"note": "" if on_gpu else NO_GPU, "gpus": gpus, "size": size, "versions": versions, "checks": {}}
    print(f"{', '.join(gpus)}, {size} sizes" if on_gpu else NO_GPU, flush=True)
    environment = os.environ | ({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(args.checks):
            left = started + 60 * args.minutes - time.time()
            limit = max(left, 0) * CHECKS[name][1] / sum(CHECKS[later][1] for later in args.checks[number:])
            check = start_check(name, size, environment, limit, Path(scratch))
            check["fastest"] = fastest(check["rows"])
            results["checks"][name] = check
            print(f"{name}: {check['outcome']}, {check['seconds']} s", flush=True)
            if args.json:
                write_json(args.json, results)
    print_results(results["checks"])
    return sum(check["outcome"] == "failed" for check in results["checks"].values())


if __name__ == "__main__":
    sys.exit(min(main(), 1))
