"""From what somebody wrote to a `Recipe`: validation, and fragments in the place of their imports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from qcompile.errors import RecipeError
from qcompile.messages import cut, value
from qcompile.recipe.diagnose import Path, diagnose, show_path, typos
from qcompile.recipe.files import fragment_path, looks_like_path, read
from qcompile.recipe.globs import alternatives
from qcompile.recipe.rule import Location, Rule
from qcompile.recipe.schema import IDLE_SWITCH, Fragment, Import, Recipe, idle_switch, recipe_file
from qcompile.recipe.steps import asked
from qcompile.recipe.yaml_lines import Document
from qcompile.remedy import Remedy, with_remedy

_Model = TypeVar("_Model", bound=BaseModel)

MOST_RULES, MOST_GLOBS, MOST_IMPORTS, MOST_LEVELS = 1_000, 3_000, 200, 20


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
    written = text.data.get("calibration") if isinstance(text.data, Mapping) else None
    file = _validated(recipe_file(asked(written)), text)
    found = list(_Imports().expanded(file.rules, text, ()))
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


class _Imports:
    """Puts fragments in the place of their imports, each file read once; fragments that import others twice double."""

    def __init__(self) -> None:
        self._read: dict[FilePath, tuple[Sequence[Rule | Import], Written]] = {}
        self._rules = self._globs = self._imports = 0

    def expanded(
        self, items: Sequence[Rule | Import], text: Written, chain: tuple[FilePath, ...]
    ) -> Iterator[tuple[Rule, Written, int]]:
        """Rules in order, each with the text and the index at which it was written; `chain` is how we came here."""
        for index, item in enumerate(items):
            at: Path = ("rules", index)
            if isinstance(item, Rule):
                self._rules += 1
                self._globs += len(alternatives(item.quantizer))
                if self._rules > MOST_RULES or self._globs > MOST_GLOBS:
                    most = f"{MOST_RULES} rules, and {MOST_GLOBS} globs when braces are unfolded"
                    raise RecipeError(f"{text.place(at)}: {show_path(at)}: a recipe has at most {most}")
                yield item.located(text.where(index)), text, index
                continue
            try:
                yield from self._imported(item, text, chain)
            except _ImportProblem as problem:
                at = (*at, "import")
                raise RecipeError(f"{text.place(at)}: {show_path(at)}: {problem}") from problem

    def _imported(
        self, item: Import, text: Written, chain: tuple[FilePath, ...]
    ) -> Iterator[tuple[Rule, Written, int]]:
        self._imports += 1
        if self._imports > MOST_IMPORTS or len(chain) > MOST_LEVELS:
            raise _ImportProblem(f"a recipe has at most {MOST_IMPORTS} imports, {MOST_LEVELS} in each other")
        path = _find(item.name, text.folder)
        file = path.resolve()
        _check_circle(file, chain)
        if file not in self._read:
            fragment = _read_fragment(path)
            self._read[file] = _validated(Fragment, fragment).rules, fragment
        rules, fragment = self._read[file]
        yield from self.expanded(rules, fragment, (*chain, file))


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
        raise _ImportProblem(f"{value(name)} is relative to a file, and this is in none; give an absolute path")
    path = (folder or FilePath()) / path
    try:
        found = path.is_file()
    except OSError:  # a name that is too long
        found = False
    if not found:
        raise _ImportProblem(f"there is no file {cut(str(path), 300)}")
    return path


def _check_circle(file: FilePath, chain: tuple[FilePath, ...]) -> None:
    if file in chain:
        circle = (*chain[chain.index(file) :], file)
        raise _ImportProblem(f"fragments import each other in a circle: {' -> '.join(one.name for one in circle)}")


def _read_fragment(path: FilePath) -> Written:
    document = read(path, "fragment")
    if isinstance(document.data, Mapping) and "metadata" in document.data:
        raise _ImportProblem(f"{document.file} is a recipe (it has `metadata`), and only fragments can be imported")
    return in_file(document, path)
