"""The recipes' configurations that come with the package, by name."""

from difflib import get_close_matches
from pathlib import Path

# A wheel holds the recipes inside the package; a checkout, installed with -e or not, beside it.
_PACKAGE = Path(__file__).parent
RECIPES = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"
LAUNCHER_CONFIGS = RECIPES / "accelerate_configs"
SEARCH_SPACES = RECIPES / "search_spaces.yaml"


def packaged_recipes() -> dict[str, Path]:
    """Configurations by name: `quickstart` is quickstart/pipeline.yaml, `quickstart/debug` the one beside it."""
    files = {*RECIPES.glob("*.yaml"), *RECIPES.glob("*/*.yaml")} - {*LAUNCHER_CONFIGS.glob("*"), SEARCH_SPACES}
    names = {path.relative_to(RECIPES).with_suffix("").as_posix().removesuffix("/pipeline"): path for path in files}
    return dict(sorted(names.items()))


def recipe_file(given: str) -> Path:
    """A configuration by its path, or by the name of a packaged one. A file goes before a name.

    Raises:
        FileNotFoundError: it is neither; lists the names.
    """
    if Path(given).is_file():
        return Path(given)
    packaged = packaged_recipes()
    if given not in packaged:
        likely = get_close_matches(given, packaged, n=1)
        meant = f" Did you mean {likely[0]}?" if likely else ""
        names = ", ".join(packaged)
        raise FileNotFoundError(f"There is no file {given}, nor a packaged recipe of that name: {names}.{meant}")
    return packaged[given]
