"""Where recipes and fragments lie, how a name is told from a path, and reading a file."""

from __future__ import annotations

import os
from pathlib import Path

from qcompile.errors import RecipeError
from qcompile.messages import value
from qcompile.recipe.diagnose import did_you_mean
from qcompile.recipe.rule import SHIPPED
from qcompile.recipe.yaml_data import LONGEST_TEXT
from qcompile.recipe.yaml_lines import Document, parse
from qcompile.remedy import meant, with_remedy

_BUILTIN = Path(__file__).parent / "builtin"
_FRAGMENTS = _BUILTIN / "fragments"


def list_recipes() -> tuple[str, ...]:
    """Names of the shipped recipes, sorted."""
    return tuple(sorted(path.stem for path in _BUILTIN.glob("*.yaml")))


def list_fragments() -> tuple[str, ...]:
    """Names of the shipped fragments, which recipes import, sorted."""
    return tuple(sorted(path.stem for path in _FRAGMENTS.glob("*.yaml")))


def recipe_path(name: str) -> Path:
    """The YAML file of a shipped recipe, to show or to copy. Raises `RecipeError` for an unknown name."""
    known = list_recipes()
    if name in known:
        return _BUILTIN / f"{name}.yaml"
    if name in list_fragments():
        raise RecipeError(f"{name!r} is a fragment, not a recipe: a recipe has it among its rules, `- import: {name}`")
    others = f"shipped: {', '.join(known)}; or give a path to a YAML file"
    problem = RecipeError(f"no recipe is called {value(name)}; {others}{did_you_mean(name, known)}")
    raise with_remedy(problem, meant(name, known))


def fragment_path(name: str) -> Path:
    """The YAML file of a shipped fragment. Raises `RecipeError` for an unknown name."""
    known = list_fragments()
    if name in known:
        return _FRAGMENTS / f"{name}.yaml"
    if name in list_recipes():
        raise RecipeError(f"{name!r} is a recipe, and only fragments can be imported; shipped: {', '.join(known)}")
    others = f"shipped: {', '.join(known)}; or give a path to a YAML file"
    raise RecipeError(f"no fragment is called {value(name)}; {others}{did_you_mean(name, known)}")


def looks_like_path(source: str) -> bool:
    return source.endswith((".yaml", ".yml")) or "/" in source or os.sep in source


def read(path: Path, what: str) -> Document:
    """Reads and parses a YAML file; `what` it should be, for messages. Raises `RecipeError`."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a named pipe would be waited for
            raise RecipeError(f"{path}: cannot read the {what}: it is no file")
        with path.open("rb") as file:
            content = file.read(4 * LONGEST_TEXT + 1)
        if len(content) > 4 * LONGEST_TEXT:
            raise RecipeError(f"{path}: a {what} has at most {LONGEST_TEXT} characters, and this has more")
        text = content.decode("utf-8-sig")
    except ValueError as error:
        if not isinstance(error, UnicodeDecodeError):
            raise RecipeError(f"{value(str(path))}: cannot read the {what}: {error}") from error
        raise RecipeError(f"{path}: a {what} is UTF-8 text, but byte {error.start} is not") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the {what}: {error.strerror}") from error
    return parse(text, _shown(path), what)


def _shown(path: Path) -> str:
    """Shipped files are shown without the machine's install path, which has no place in a report."""
    if path.is_relative_to(_BUILTIN):
        return SHIPPED + path.relative_to(_BUILTIN).as_posix()
    return str(path)
