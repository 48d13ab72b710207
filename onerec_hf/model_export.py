"""Export to a Hub folder that loads with `trust_remote_code=True` where this package is not installed.

Beside weights, configuration and tokenizer files the folder gets the source of the modules that they need.
transformers takes such modules only as flat siblings with imports of the form `from .module import name`, so
subpackages are flattened: `onerec_hf/reward/modeling_onerec_reward.py` becomes `reward_modeling_onerec_reward.py`.
"""

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path

from .modeling_onerec import OneRecForConditionalGeneration, OneRecModel
from .pipeline_generative_recommendation import GenerativeRecommendationPipeline
from .reward import OneRecRewardModel
from .staged_files import staged_files
from .tokenization_onerec import OneRecTokenizer

PACKAGE = __package__
PACKAGE_DIRECTORY = Path(__file__).parent


def export_remote_code(
    model: OneRecForConditionalGeneration | OneRecRewardModel, tokenizer: OneRecTokenizer, directory: str | Path
) -> Path:
    """Writes a folder from which `AutoConfig`, `AutoModel`, `AutoTokenizer` and, for a session generator,
    `AutoModelForSeq2SeqLM` and `pipeline` load with `trust_remote_code=True` alone.

    Args:
        model: the session generator, or a reward model.
        tokenizer: the tokenizer of its codes.
        directory: made if missing; files of the same names are replaced, each whole or not at all.

    Returns:
        The directory.

    Raises:
        TypeError: if the model is neither.
    """
    if isinstance(model, OneRecForConditionalGeneration):
        auto_classes = {"AutoModel": OneRecModel, "AutoModelForSeq2SeqLM": OneRecForConditionalGeneration}
        pipelines = {"generative-recommendation": GenerativeRecommendationPipeline}
    elif isinstance(model, OneRecRewardModel):
        auto_classes, pipelines = {"AutoModel": OneRecRewardModel}, {}
    else:
        raise TypeError(
            f"A OneRecForConditionalGeneration or a OneRecRewardModel can be exported, not a {type(model).__name__}."
        )
    auto_classes = {"AutoConfig": type(model.config)} | auto_classes
    classes = [*auto_classes.values(), *pipelines.values(), type(tokenizer)]

    directory = Path(directory)
    # The configuration comes last: it names everything else.
    with staged_files(directory, last="config.json") as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        for name, source in flat_modules(_module_of(cls) for cls in classes).items():
            (staging / name).write_text(source, encoding="utf-8")
        config = {"auto_map": {name: _reference(cls) for name, cls in auto_classes.items()}}
        if pipelines:
            config["custom_pipelines"] = {
                task: {"impl": _reference(cls), "pt": ["AutoModelForSeq2SeqLM"], "type": "text"}
                for task, cls in pipelines.items()
            }
        _update_json(staging / "config.json", config)
        tokenizer_map = {"AutoTokenizer": [_reference(type(tokenizer)), None]}
        _update_json(staging / "tokenizer_config.json", {"auto_map": tokenizer_map})
    return directory


def flat_modules(modules: Iterable[str]) -> dict[str, str]:
    """Source of modules of this package and of all that they import from it, with imports between flat siblings.

    Args:
        modules: names within the package, such as `"reward.modeling_onerec_reward"`.

    Returns:
        Source by file name.

    Raises:
        ValueError: if a module imports the package itself or a module as a whole, which has no flat form.
    """
    sources: dict[str, str] = {}
    to_do = list(modules)
    while to_do:
        module = to_do.pop()
        if _file_name(module) not in sources:
            source, imported = _flatten_imports(module)
            sources[_file_name(module)] = source
            to_do += imported
    return sources


def _flatten_imports(module: str) -> tuple[str, list[str]]:
    """A module's source with its imports from this package rewritten, and the names of the modules that they name."""
    path = PACKAGE_DIRECTORY.joinpath(*module.split("."))
    parents = module.split(".")
    if path.is_dir():
        path = path / "__init__.py"
    else:
        path, parents = path.with_suffix(".py"), parents[:-1]
    source = path.read_text(encoding="utf-8")
    lines, imported = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            whole = any(alias.name.split(".")[0] == PACKAGE for alias in node.names)
            target = None
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                target = ".".join([*parents[: len(parents) + 1 - node.level], *filter(None, [node.module])])
            elif node.module.split(".")[0] == PACKAGE:
                target = node.module.partition(".")[2]
            else:
                continue
            whole = not target or any(_is_module(f"{target}.{alias.name}") for alias in node.names)
        else:
            continue
        if whole:
            raise ValueError(
                f"{path}, line {node.lineno}: only imports of names from a module of {PACKAGE} can be exported."
            )
        if target:
            flat, number = f"from .{_flat_name(target)} import", node.lineno - 1
            lines[number] = re.sub(r"from\s+\S+\s+import", flat, lines[number], count=1)
            imported.append(target)
    return "".join(lines), imported


def _is_module(module: str) -> bool:
    path = PACKAGE_DIRECTORY.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def _flat_name(module: str) -> str:
    return module.replace(".", "_")


def _file_name(module: str) -> str:
    return f"{_flat_name(module)}.py"


def _module_of(cls: type) -> str:
    return cls.__module__.removeprefix(f"{PACKAGE}.")


def _reference(cls: type) -> str:
    return f"{_flat_name(_module_of(cls))}.{cls.__name__}"


def _update_json(path: Path, entries: dict) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
