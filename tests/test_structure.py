"""The house in order: which module may import which, how long a function is and how many arguments it takes."""

import ast
import graphlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "onerec_hf"

# The flow of the data, the lowest floor first: a module imports from its own floor and from those before it. A name
# stands for a module, or for a package with all that is in it. "" is the package's own __init__, which gives users
# what they need of every stage.
FLOORS = [
    [
        "co_consumption",
        "evaluation_mode",
        "figure_style",
        "free_memory",
        "large_truncated_svd",
        "packaged_recipes",
        "readable_checkpoints",
        "renamed_arguments",
        "staged_files",
        "typed_arguments",
        "yaml_files",
    ],
    ["data"],
    ["item_embeddings", "item_alignment", "embedding_adaptation", "item_index", "semantic_ids"],
    ["configuration_onerec", "tokenization_onerec", "item_trie"],
    ["history_features", "session_rows", "sharded_rows", "shared_histories"],
    ["modeling_onerec", "item_head", "item_memory", "training_checkpoints", "pretraining"],
    ["session_generation", "session_likelihood", "pipeline_generative_recommendation", "endpoint"],
    ["reward"],
    ["alignment"],
    ["evaluation"],
    [""],
    ["reporting", "model_cards", "model_export"],
    ["stages"],
    ["demo", "serving"],
    ["command_line", "__main__"],
]
MAX_LINES, MAX_ARGUMENTS = 80, 10
# transformers dictates what these take: the models' inputs, and of `generate` what is an argument by name.
PLATFORM_SIGNATURES = {
    "OneRecModel.forward",
    "OneRecForConditionalGeneration.forward",
    "OneRecRewardModel.forward",
    "generate_with_trie",
}


def modules() -> dict[str, Path]:
    """Files by name within the package, a package's __init__ by the package's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported_modules(name: str) -> set[str]:
    """The package's modules that one imports anywhere, for the type checker alone or within a function too."""
    folder = list(MODULES[name].relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            whole = [alias.name.split(".") for alias in node.names]
            found |= {".".join(parts[1:]) for parts in whole if parts[0] == PACKAGE.name}
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level:
                parts = [*folder[: len(folder) - node.level + 1], *parts]
            elif parts[0] == PACKAGE.name:
                parts = parts[1:]
            else:
                continue
            inner = {".".join([*parts, alias.name]) for alias in node.names} & MODULES.keys()
            found |= inner or {".".join(parts)}
    return found - {name}


IMPORTS = {name: imported_modules(name) for name in MODULES}


def floor(name: str) -> int:
    """Raises LookupError for a module that stands on none."""
    for number, prefixes in enumerate(FLOORS):
        if any(name == prefix or prefix and name.startswith(f"{prefix}.") for prefix in prefixes):
            return number
    raise LookupError(f"{name} stands on no floor: add it to FLOORS")


def functions() -> list[tuple[str, str, ast.FunctionDef]]:
    """File, qualified name and tree of each."""
    found = []

    def collect(path: str, prefix: str, tree: ast.AST) -> None:
        for node in ast.iter_child_nodes(tree):
            name = f"{prefix}{getattr(node, 'name', '')}"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((path, name, node))
            is_scope = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            collect(path, f"{name}." if is_scope else prefix, node)

    for name, tree in TREES.items():
        collect(str(MODULES[name].relative_to(PACKAGE.parent)), "", tree)
    return found


def lines_of_code(path: str, function: ast.FunctionDef) -> int:
    """From the signature on, without the docstring, comments and blank lines."""
    lines = (PACKAGE.parent / path).read_text(encoding="utf-8").splitlines()
    counted = set(range(function.lineno, function.end_lineno + 1))
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        counted -= set(range(docstring.lineno, docstring.end_lineno + 1))
    return sum(bool(text) and not text.startswith("#") for text in (lines[line - 1].strip() for line in counted))


def num_arguments(function: ast.FunctionDef) -> int:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_no_modules_import_each_other_in_a_circle():
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"each imports the next: {' <- '.join(error.args[1])}") from None


def test_no_floor_imports_from_a_higher_one():
    upward = [
        f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})"
        for name, others in IMPORTS.items()
        for other in sorted(others)
        if floor(other) > floor(name)
    ]
    assert not upward, "\n".join(upward)


def test_no_function_is_too_long():
    sizes = [(lines_of_code(path, function), path, name) for path, name, function in functions()]
    longest = [f"{path}: {name} has {size} lines" for size, path, name in sorted(sizes)[::-1] if size > MAX_LINES]
    assert not longest, "\n".join(longest)


def test_no_function_takes_too_many_arguments():
    counts = [(num_arguments(function), path, name) for path, name, function in functions()]
    most = [
        f"{path}: {name} takes {count} arguments"
        for count, path, name in sorted(counts)[::-1]
        if count > MAX_ARGUMENTS and name not in PLATFORM_SIGNATURES
    ]
    assert not most, "\n".join(most)


def text_without_encoding(tree: ast.Module) -> list[int]:
    """Lines of calls that open a text file in the encoding of the locale."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", None)
        modes = [argument.value for argument in call.args[:2] if isinstance(argument, ast.Constant)]
        binary = any(isinstance(mode, str) and "b" in mode and set(mode) <= set("rwaxb+") for mode in modes)
        opened = name == "open" and isinstance(call.func, ast.Name) and not binary
        if (opened or name in ("read_text", "write_text")) and "encoding" not in {word.arg for word in call.keywords}:
            found.append(call.lineno)
    return found


def test_text_files_are_opened_in_utf_8_whatever_the_locale():
    assert text_without_encoding(
        ast.parse('open("a"); open("a", "rb"); path.read_text(); open("a", encoding="x")')
    ) == [1, 1]
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "recipes").rglob("*.py")]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    assert {str(path): lines for path, tree in trees.items() if (lines := text_without_encoding(tree))} == {}
