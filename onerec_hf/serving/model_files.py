"""The files of what is served, as they were when it was loaded."""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download


class ModelFiles:
    """A model's folder or the Hub repository that it names, fixed: what a worker that is started again loads is what
    the others have, whatever has been written to the folder since.

    A folder is copied, a repository is fetched into the Hub's cache, where a commit's files stay.

    Args:
        source: a folder or a Hub id.
        hub_arguments: `revision`, `token` and such, of the Hub.

    Raises:
        FileNotFoundError: the folder has no `config.json`, or there is neither folder nor repository.
    """

    def __init__(self, source: str, hub_arguments: Mapping[str, Any]):
        self.source, self._copy = source, None
        folder = Path(source).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise FileNotFoundError(f"{source} has no config.json: give a folder such as RUN/align/model.")
            self._copy = tempfile.TemporaryDirectory(prefix="onerec_serve_")
            self.folder = Path(self._copy.name) / "model"
            shutil.copytree(folder, self.folder)
            self.version = self._digest()
            return
        try:
            self.folder = Path(snapshot_download(source, **hub_arguments))
        except Exception as error:  # no such folder or repository, no access, no network
            raise FileNotFoundError(f"{source} is no folder, and as a repository of the Hub: {error}") from None
        self.version = self.folder.name  # the commit

    def _digest(self) -> str:
        """Of all files, as long as a commit's."""
        digest = hashlib.sha1(usedforsecurity=False)
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(self.folder)}\n".encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha1").digest())
        return digest.hexdigest()

    def remove(self) -> None:
        """Removes the copy; nothing of the Hub's cache."""
        if self._copy is not None:
            self._copy.cleanup()
