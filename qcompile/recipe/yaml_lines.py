"""YAML with line numbers: plain data by the safe loader, and the line of every mapping, key and list item."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import yaml

from qcompile.errors import RecipeError
from qcompile.messages import cut
from qcompile.messages import value as shown
from qcompile.recipe.diagnose import Path, show_path
from qcompile.recipe.yaml_data import LONGEST_TEXT, Loader, compose, construct

_TEXTS = ("name", "description", "notes", "why")
_CUT = re.compile(r"[ \t]+(#[^\s#\0][^\s\0]*)")
_QUOTED = re.compile(r"""'.*'|".*\"""")
_NEEDS = {"recipe": "`metadata` and `rules`", "fragment": "`description` and `rules`"}


@dataclass(frozen=True)
class Document:
    """A parsed file.

    Attributes:
        file: the name that messages show.
        data: plain dicts, lists and scalars.
        lines: path -> line (from 1): of a key for mappings, of the item for lists.
        plain: path -> what is written there, for text without quotes that YAML reads as something else.
    """

    file: str
    data: object
    lines: dict[Path, int]
    plain: dict[Path, str]

    def line(self, path: Path) -> int:
        """Line of that path, or of the nearest parent that the file has (a missing key, an alias, a merged key)."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def parse(text: str, file: str, what: str = "recipe") -> Document:
    """Parses one YAML document. Raises `RecipeError` with file and line for bad YAML and for duplicate keys."""
    if len(text) > LONGEST_TEXT:
        raise RecipeError(f"{file}: a {what} has at most {LONGEST_TEXT} characters, and this has {len(text)}")
    try:
        loader = Loader(text)
        node = compose(loader)
        if node is None:
            raise RecipeError(f"{file}:1: the file is empty; a {what} needs {_NEEDS[what]}")
        if what == "fragment" and not _is_fragment(node):
            raise RecipeError(f"{file} is no fragment, which needs {_NEEDS[what]}")
        document = Document(file, None, {}, {})
        _walk(node, (), document, set())
        return replace(document, data=construct(loader, node))
    except yaml.YAMLError as error:
        raise RecipeError(_syntax_message(error, text, file, quoting=what == "recipe")) from error


def _is_fragment(node: yaml.Node) -> bool:
    """Nothing is shown of what is none: a recipe may import any file of whoever runs it."""
    return isinstance(node, yaml.MappingNode) and any(key.value == "rules" for key, _ in node.value)


def _walk(node: yaml.Node, path: Path, document: Document, seen: set[int]) -> None:
    """Notes lines, and refuses what YAML would take without a word: duplicate keys, and texts that it cuts."""
    document.lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in seen:  # an alias: its lines are those of its anchor, and it may contain itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode) and node.style is None:
        if node.tag != "tag:yaml.org,2002:str":
            document.plain[path] = node.value
        elif path and path[-1] in _TEXTS:
            _check_cut(node, path, document)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), document, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        if node.flow_style:
            _check_commas(node, path, document.file)
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.tag.endswith((":bool", ":null")):
                    raise RecipeError(
                        f"{document.file}:{line}: YAML reads the key {cut(key.value)} as no text: quote it"
                    )
                if key.value in first:
                    where = f"in {show_path(path)}, first on line {first[key.value]}"
                    raise RecipeError(f"{document.file}:{line}: duplicate key {shown(key.value)} {where}")
                first[key.value] = line
                document.lines[(*path, key.value)] = line
                _walk(value, (*path, key.value), document, seen)


def _check_commas(node: yaml.MappingNode, path: Path, file: str) -> None:
    """`{why: small, and early}` is a `why` and a key without a value."""
    text, owner = "", ""
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or value.start_mark.index != value.end_mark.index:
            text, owner = _words(value), _words(key)
            continue
        hint = f"write {cut(key.value)}: and what it is to be"
        if owner in _TEXTS:
            hint = f'a comma ends a text inside of {{...}}, so quote it, {owner}: "{text}, {cut(key.value)}"'
        where = f"after {show_path((*path, owner))}" if owner else f"in {show_path(path)}"
        raise RecipeError(f"{file}:{key.start_mark.line + 1}: {shown(key.value)} {where} has no value: {hint}")


def _words(node: yaml.Node) -> str:
    return cut(node.value) if isinstance(node, yaml.ScalarNode) else ""


def _check_cut(node: yaml.ScalarNode, path: Path, document: Document) -> None:
    """`why: as in issue #12` is the text "as in issue", and `why: &co` none; a comment that is meant has a space."""
    buffer = node.start_mark.buffer or ""
    sign = "" if (comment := _CUT.match(buffer, node.end_mark.pointer)) is None else comment[1]
    text = f"{cut(node.value)} {sign} ..."
    if buffer[node.start_mark.pointer : node.start_mark.pointer + 1] == "&":
        sign, text = "&", f"&... {cut(node.value)}"
    if sign:
        raise RecipeError(
            f"{document.file}:{node.end_mark.line + 1}: {show_path(path)} is cut at {shown(sign)}, which is not text to"
            f' YAML: quote it, {path[-1]}: "{text}"'
        )


def _syntax_message(error: yaml.YAMLError, text: str, file: str, *, quoting: bool) -> str:
    """`quoting`: with words of the file."""
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark or error.context_mark) is not None:
        problem = cut(", ".join(part for part in (error.context, error.problem) if part), 300)
        lines = [*text.splitlines(), ""]
        source = lines[min(mark.line, len(lines) - 1)]
        begin = error.context_mark.line if error.context_mark is not None else mark.line
        hint = _hint(problem, source, lines[begin])
        return f"{file}:{mark.line + 1}: not valid YAML: {problem if quoting else _QUOTED.sub('...', problem)}{hint}"
    return f"{file}:1: not valid YAML: {cut(' '.join(str(error).split()), 300)}"


def _hint(problem: str, source: str, begin: str) -> str:
    """What to write instead, for what is no YAML in `source`, a line, and began in the line `begin`."""
    value = source.partition(": ")[2].lstrip()[:1]
    if "alias" in problem and "*" in source:
        return '; a glob that starts with * must be quoted: "*..."'
    if "'\\t'" in problem:
        return "; indent with spaces, not with a tab"
    if start := re.search(r"character '([%@`])'", problem):
        return f"; a text that starts with {start[1]} must be quoted"
    if "could not determine a constructor" in problem:
        return "; a text that starts with ! must be quoted"
    if "mapping values are not allowed" in problem or "got ':'" in problem:
        return "; a text with a colon in it must be quoted, and keys of one mapping start in one column"
    if "flow mapping" in problem and re.search(r"\s#", begin):
        return "; ` #` begins a comment: a text with it must be quoted"
    if "flow mapping" in problem and re.search(r"[\[{].*[\[{]", begin):
        return "; a text with braces or brackets must be quoted inside of {...}"
    if "unknown escape" in problem:
        return "; between double quotes \\ is written twice, between single quotes once"
    if value and value in "[{'\"|>-":
        return f"; a text that starts with {value} must be quoted, and its own quotes doubled"
    return ""
