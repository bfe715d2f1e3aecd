"""From what somebody wrote to a `Recipe`: validation, and fragments in the place of their imports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from qcompile.errors import RecipeError
from qcompile.recipe.diagnose import Path, diagnose, show_path, typos
from qcompile.recipe.files import fragment_path, looks_like_path, read
from qcompile.recipe.rule import Location, Rule
from qcompile.recipe.schema import IDLE_SWITCH, Fragment, Import, Recipe, RecipeFile, idle_switch
from qcompile.recipe.yaml_lines import Document
from qcompile.remedy import Remedy, with_remedy

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class Written:
    """A recipe or a fragment as somebody wrote it: in a file, in Python, or with `--set`.

    Attributes:
        data: mappings, lists and scalars.
        place: what a message about a path of the data begins with.
        where: what item i of `rules` says about its place.
        folder: what the paths of imports are relative to; None if the data lies in no file.
        plain: as of `Document`.
    """

    data: object
    place: Callable[[Path], str]
    where: Callable[[int], Location]
    folder: FilePath | None = None
    plain: Mapping[Path, str] = field(default_factory=dict)


def in_file(document: Document, path: FilePath) -> Written:
    """The parsed text of the file at `path`."""
    return Written(
        document.data,
        place=lambda at: f"{document.file}:{document.line(at)}",
        where=lambda index: Location(document.file, document.line(("rules", index))),
        folder=path.parent,
        plain=document.plain,
    )


def recipe_of(text: Written) -> Recipe:
    """The validated recipe, every import replaced by its rules, which know the lines of their own file.

    Raises:
        RecipeError: one message with a line `place: problem` for each problem.
    """
    if isinstance(text.data, Mapping) and "metadata" not in text.data and "description" in text.data:
        raise RecipeError(f"{text.place(())}: this is a fragment (no `metadata`); a recipe imports it among its rules")
    file = _validated(RecipeFile, text)
    found = list(_expanded(file.rules, text, ()))
    idle = idle_switch([rule for rule, _, _ in found])
    if idle is not None:
        _, source, index = found[idle]
        at = ("rules", index, "enable")
        raise RecipeError(f"{source.place(at)}: {show_path(at)}: {IDLE_SWITCH}")
    header = {name: getattr(file, name) for name in file.model_fields_set}
    return Recipe.model_validate({**header, "rules": tuple(rule for rule, _, _ in found)})


def _validated(model: type[_Model], text: Written) -> _Model:
    try:
        return model.model_validate(text.data)
    except ValidationError as error:
        problem = RecipeError(diagnose(error, text.place, model, text.plain))
        raise with_remedy(problem, Remedy(typos=typos(error, model))) from error


def _expanded(
    items: Sequence[Rule | Import], text: Written, chain: tuple[FilePath, ...]
) -> Iterator[tuple[Rule, Written, int]]:
    """Rules in order, each with the text and the index at which it was written; `chain` is how we came here."""
    for index, item in enumerate(items):
        if isinstance(item, Rule):
            yield item.located(text.where(index)), text, index
            continue
        at = ("rules", index, "import")
        try:
            path = _find(item.name, text.folder)
            fragment = _read_fragment(path, (*chain, path.resolve()))
        except _ImportProblem as problem:
            raise RecipeError(f"{text.place(at)}: {show_path(at)}: {problem}") from problem
        yield from _expanded(_validated(Fragment, fragment).rules, fragment, (*chain, path.resolve()))


def fragment_description(name: str) -> str:
    """What a shipped fragment says of itself. Raises `RecipeError` for an unknown name."""
    path = fragment_path(name)
    return _validated(Fragment, in_file(read(path, "fragment"), path)).description


class _ImportProblem(RecipeError):
    """What is wrong with an import, not with the file that it names."""


def _find(name: str, folder: FilePath | None) -> FilePath:
    if not looks_like_path(name):
        try:
            return fragment_path(name)
        except RecipeError as error:
            raise _ImportProblem(str(error)) from error
    path = FilePath(name)
    if folder is None and not path.is_absolute():
        raise _ImportProblem(f"{name!r} is relative to a file, and this is in none; give an absolute path")
    path = (folder or FilePath()) / path
    if not path.is_file():
        raise _ImportProblem(f"there is no file {path}")
    return path


def _read_fragment(path: FilePath, chain: tuple[FilePath, ...]) -> Written:
    if path.resolve() in chain[:-1]:
        circle = chain[chain.index(path.resolve()) :]
        raise _ImportProblem(f"fragments import each other in a circle: {' -> '.join(file.name for file in circle)}")
    document = read(path, "fragment")
    if isinstance(document.data, Mapping) and "metadata" in document.data:
        raise _ImportProblem(f"{document.file} is a recipe (it has `metadata`), and only fragments can be imported")
    return in_file(document, path)
