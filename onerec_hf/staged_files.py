"""Saving files so that each appears whole or not at all."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` when the block ends without an error."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def staged_files(directory: str | os.PathLike, last: str) -> Iterator[Path]:
    """A folder to write files into, which are moved into `directory` one by one when the block ends without an error.

    A kill between two of them leaves a mixture of old and new files. Let the file `last` hold what tells such a
    mixture: it is moved after all others.

    Args:
        directory: made if missing; files of the same names are replaced.
        last: name of the file that is moved last.

    Raises:
        NotADirectoryError: `directory` is a file.
    """
    directory = Path(directory)
    if directory.is_file():
        raise NotADirectoryError(f"{directory} is a file; give a directory to save to.")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as staging:
        yield Path(staging)
        for name in sorted(os.listdir(staging), key=lambda name: (name == last, name)):
            os.replace(Path(staging) / name, directory / name)


@contextmanager
def staged_directory(directory: str | Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `directory` once the block ends without an error."""
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    folder.mkdir()
    try:
        yield folder
        if target.exists():
            replaced = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.replaced")
            os.replace(target, replaced)
            os.replace(folder, target)
            shutil.rmtree(replaced)
        else:
            os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
