"""The command `onerec`: the recipes as sub-commands, and `info` on the installation."""

import ast
import os
import platform
import sys
from difflib import get_close_matches
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch

from .free_memory import free_memory
from .packaged_recipes import LAUNCHER_CONFIGS, RECIPES, packaged_recipes

# The scripts of recipes/ in the order of a run; the first lines of their docstrings are the help.
RECIPE_COMMANDS = (
    *("init", "pipeline", "update", "fit_tokenizer", "pretrain", "reward", "align", "sample_preferences"),
    *("recommend", "evaluate", "search", "ablations", "demo", "serve"),
)
INFO = "info"
PLATFORM = ("torch", "transformers", "trl", "accelerate", "datasets")
# What the plain installation leaves out, with its use and what pip is told.
OPTIONAL = {
    "peft": ("adapters, align_lora", "-c constraints.txt 'onerec_hf[lora]'"),
    "optuna": ("onerec search", "-c constraints.txt 'onerec_hf[search]'"),
    "gradio": ("onerec demo", "-c constraints.txt 'onerec_hf[demo]'"),
    "trackio": ("--report_to trackio", "-c constraints.txt 'onerec_hf[tracking]'"),
    "tensorboard": ("--report_to tensorboard", "tensorboard"),
    "wandb": ("--report_to wandb", "wandb"),
    "duckdb": ("num_partitions", "-c constraints.txt 'onerec_hf[large]'"),
    "uvicorn": ("onerec serve", "-c constraints.txt 'onerec_hf[serve]'"),
    "torchao": ("quantized weights", "-c constraints.txt torchao"),
    "deepspeed": ("accelerate_configs/deepspeed_zero2.yaml", "deepspeed"),
    "parameterized": ("recipes/benchmarks/conformance.py", "parameterized"),
    "lightgbm": ("recipes/benchmarks/reward.py", "lightgbm"),
    "faiss-cpu": ("recipes/benchmarks/semantic_ids.py", "faiss-cpu"),
    "k-means-constrained": ("recipes/benchmarks/semantic_ids.py", "k-means-constrained"),
}


def main() -> int | None:
    """Runs a sub-command with the words that follow it, and returns the exit status."""
    command, *words = sys.argv[1:] or ["--help"]
    if command in RECIPE_COMMANDS:
        try:
            return run_recipe(command, words)
        except KeyboardInterrupt as interruption:
            print("\n".join(["", *getattr(interruption, "__notes__", ())]), file=sys.stderr)
            return 130
    if command == INFO and not words:
        print(information())
    elif command in ("-h", "--help", INFO):
        print(usage())
    elif command == "--version":
        print(f"onerec {version('onerec_hf') or 'not installed'}")
    else:
        likely = get_close_matches(command, [*RECIPE_COMMANDS, INFO], n=1)
        meant = f" Did you mean {likely[0]}?" if likely else ""
        print(f"onerec has no sub-command {command!r}.{meant}\n\n{usage()}", file=sys.stderr)
        return 2
    return 0


def run_recipe(command: str, words: list[str]) -> None:
    """Runs the recipe's script as `python` would, under the command's name."""
    sys.argv = [f"onerec {command}", *words]
    script = spec_from_file_location("__main__", RECIPES / f"{command}.py")
    script.loader.exec_module(module_from_spec(script))


def usage() -> str:
    """All sub-commands, with a line for each."""
    lines = ["usage: onerec SUB-COMMAND [--config FILE or NAME] [--OPTION VALUE ...]", "", "Sub-commands:"]
    for command in RECIPE_COMMANDS:
        text = (RECIPES / f"{command}.py").read_text(encoding="utf-8")
        lines.append(f"  {command:<20}{ast.get_docstring(ast.parse(text)).splitlines()[0]}")
    lines += [
        f"  {INFO:<20}Versions, hardware and optional packages, for a report of an error.",
        "",
        f"Configurations by name: {', '.join(packaged_recipes())}.",
        "`onerec SUB-COMMAND --help` lists its options, `onerec --version` prints the version. On several processes:",
        "accelerate launch -m onerec_hf SUB-COMMAND ...",
    ]
    return "\n".join(lines)


def information() -> str:
    """What is installed, what is missing and what it runs on."""
    configs = ", ".join(sorted(path.name for path in LAUNCHER_CONFIGS.glob("*")))
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = {
        "onerec_hf": f"{version('onerec_hf') or 'not installed'}, {Path(__file__).parent}",
        "Python": f"{platform.python_version()}, {sys.executable}",
        **{name: version(name) or "missing" for name in PLATFORM},
        "OS": platform.platform(),
        "CPU threads": threads,
        "free memory": f"{free_memory() / 2**30:.1f} GiB",
        "GPUs": gpus(),
        "accelerate configs": f"{LAUNCHER_CONFIGS}: {configs}",
    }
    lines = [f"{name:<20}{value}" for name, value in rows.items()]
    for name, (use, packages) in OPTIONAL.items():
        lines.append(f"{name:<20}{version(name) or f'missing: pip install {packages}'} (for {use})")
    return "\n".join(lines)


def version(name: str) -> str | None:
    """Of an installed package, which is not imported for it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def gpus() -> str:
    """Those that torch sees."""
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in found) or "none"
