"""The recipes that ship with cakd, by name."""

from pathlib import Path

from cakd_cli.errors import RecipeError, nearest

# In a wheel the recipes lie beside this file; in a checkout at its top.
_FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes")

# Not a recipe, but settings that recipes refer to.
PUBLISHED = "published"


def folder() -> Path:
    """Return where the shipped recipes lie."""
    return next(path for path in _FOLDERS if path.is_dir())


def names() -> list[str]:
    """List the shipped recipes, as ``set/name``."""
    root = folder()
    found = {path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml")}
    return sorted(found - {PUBLISHED})


def find(name: str) -> tuple[Path, str]:
    """Find a recipe by path or by name.

    Returns:
        The file, and what to call it in messages.

    Raises:
        RecipeError: If there is no such recipe.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path, name
    known = names()
    bare = name.removesuffix(".yaml").removeprefix("recipes/")
    if bare in known:
        return folder() / f"{bare}.yaml", f"{bare}.yaml"
    raise RecipeError(
        f"no recipe '{name}': neither a file nor one that ships; {nearest(bare, known)}", hint="cakd recipes list"
    )


def goal(name: str) -> str:
    """Return the first line of a recipe's opening comment."""
    first = (folder() / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
