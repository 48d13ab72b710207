"""Starts the command `onerec`. It stands outside the package, whose import takes seconds, so that help, the list of
sub-commands and `onerec info` are there at once, and where the package cannot be imported."""

import runpy
from importlib.util import find_spec
from pathlib import Path


def main() -> int | None:
    package = Path(find_spec("onerec_hf").origin).parent
    return runpy.run_path(str(package / "command_line.py"))["main"]()
