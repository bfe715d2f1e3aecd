"""YAML with line numbers: plain data by the safe loader, and the line of every mapping, key and list item."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from qcompile.errors import RecipeError
from qcompile.recipe.diagnose import Path, show_path

_NEEDS = {"recipe": "`metadata` and `rules`", "fragment": "`description` and `rules`"}


@dataclass(frozen=True)
class Document:
    """A parsed file.

    Attributes:
        file: the name that messages show.
        data: plain dicts, lists and scalars.
        lines: path -> line (from 1): of a key for mappings, of the item for lists.
    """

    file: str
    data: object
    lines: dict[Path, int]

    def line(self, path: Path) -> int:
        """Line of that path, or of the nearest parent that the file has (a missing key, an alias, a merged key)."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def parse(text: str, file: str, what: str = "recipe") -> Document:
    """Parses one YAML document. Raises `RecipeError` with file and line for bad YAML and for duplicate keys."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{file}:1: the file is empty; a {what} needs {_NEEDS[what]}")
        lines: dict[Path, int] = {}
        _walk(node, (), file, lines, set())
        return Document(file, loader.construct_document(node), lines)
    except yaml.YAMLError as error:
        raise RecipeError(_syntax_message(error, text, file)) from error


def _walk(node: yaml.Node, path: Path, file: str, lines: dict[Path, int], seen: set[int]) -> None:
    """Notes lines and refuses duplicate keys, which PyYAML would resolve silently to the last one."""
    lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in seen:  # an alias: its lines are those of its anchor, and it may contain itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), file, lines, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in first:
                    where = f"in {show_path(path)}, first on line {first[key.value]}"
                    raise RecipeError(f"{file}:{line}: duplicate key {key.value!r} {where}")
                first[key.value] = line
                lines[(*path, key.value)] = line
                _walk(value, (*path, key.value), file, lines, seen)


def _syntax_message(error: yaml.YAMLError, text: str, file: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark or error.context_mark) is not None:
        line = mark.line + 1
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        source = text.splitlines()[mark.line] if mark.line < len(text.splitlines()) else ""
        hint = '; a glob that starts with * must be quoted: "*..."' if "alias" in problem and "*" in source else ""
        return f"{file}:{line}: not valid YAML: {problem}{hint}"
    return f"{file}:1: not valid YAML: {' '.join(str(error).split())}"
