"""Recipes that are killed on the way. A server that has the libraries imported forks them, each into a new process."""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["onerec_hf.stages"])


def run_recipe(script: str, arguments: list[str], log: str) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def kill_when(reached: Callable[[], object], script: Path, arguments: list[str], log: Path) -> None:
    """Starts a recipe and sends SIGKILL as soon as a point is reached."""
    process = CONTEXT.Process(target=run_recipe, args=(str(script), arguments, str(log)), daemon=True)
    process.start()
    deadline = time.monotonic() + 120
    while not reached():
        assert process.is_alive(), f"ended before it was to be killed: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, "not there within two minutes"
        time.sleep(0.01)
    process.kill()
    process.join()
