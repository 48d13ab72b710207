"""The page as a folder that runs by itself and can be pushed to the Hub as a Space."""

import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

from huggingface_hub import SpaceCardData

from ..staged_files import staged_directory
from .content import DemoContent

APP = """from pathlib import Path

from onerec_hf.demo.content import DemoContent
from onerec_hf.demo.page import launch_page

launch_page(DemoContent.load(Path(__file__).parent), {title!r})
"""
README = """---
{front_matter}
---

# {title}

A page on a [OneRec](https://arxiv.org/abs/2502.18965) recommender: `pip install -r requirements.txt`, then
`python app.py`. The folder holds the models, the catalogue with the items' names, baselines fitted on the log and the
histories of {num_users} users under numbers in the place of their ids, without times of day, profiles and feedback
that the generator does not read; and the source of onerec_hf.
"""
PACKAGE = Path(__file__).parents[1]


def write_space(content: DemoContent, folder: str | Path, title: str) -> None:
    """Writes the folder, whole or not at all.

    Raises:
        FileExistsError: it holds something already.
        ModuleNotFoundError: a package that the page needs is not installed, so that its version is not known.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already, and not empty: give --space a new folder.")
    with staged_directory(folder) as staging:
        num_users = content.save(staging)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, staging / PACKAGE.name, ignore=ignored)
        (staging / "app.py").write_text(APP.format(title=title), encoding="utf-8")
        (staging / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
        card = SpaceCardData(
            title=title,
            sdk="gradio",
            sdk_version=metadata.version("gradio"),
            python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
            app_file="app.py",
        )
        text = README.format(front_matter=card.to_yaml(), title=title, num_users=num_users)
        (staging / "README.md").write_text(text, encoding="utf-8")


def requirements() -> list[str]:
    """What the package needs, and gradio, in the versions that are installed."""
    lines = [line for line in metadata.requires(PACKAGE.name) or [] if "extra ==" not in line]
    names = [re.match(r"[\w.-]+", line)[0] for line in lines]
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in [*names, "gradio"]]
