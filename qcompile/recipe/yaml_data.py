"""YAML as plain data, of a bounded size: aliases and merges make a tree of any size out of a few lines."""

from __future__ import annotations

from typing import Any

import yaml

from qcompile.messages import value

LONGEST_TEXT = 200_000  # characters, which PyYAML takes up to five seconds for; the shipped recipes have up to 10,000
MOST_NODES = 50_000
MOST_LEVELS = 40


class Loader(yaml.SafeLoader):
    """The safe loader, whose every error is a `YAMLError` with a place.

    Its constructors raise whatever `int`, `datetime` and others have against a text: 2026-13-45, `!!bool maybe`.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]
            problem = f"{value(node.value)} is no {value(kind)} that can be read"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def compose(loader: Loader) -> yaml.Node | None:
    """The nodes of the one document, None for an empty one. Raises `YAMLError` for one that is too large."""
    try:
        node: yaml.Node | None = loader.get_single_node()
        if node is not None:
            _size(node, {}, 0)
    except RecursionError as error:
        raise _problem(f"it is nested more than {MOST_LEVELS} levels deep") from error
    return node


def construct(loader: Loader, node: yaml.Node) -> Any:
    """Plain dicts, lists and scalars. Raises `YAMLError`."""
    return loader.construct_document(node)


def load(text: str) -> Any:
    """The data of one document. Raises `YAMLError`."""
    loader = Loader(text)
    node = compose(loader)
    return None if node is None else construct(loader, node)


def _size(node: yaml.Node, known: dict[int, int | None], level: int) -> int:
    """How many nodes there are if each alias is written out; None is known of those that we are in."""
    if level > MOST_LEVELS:
        raise _problem(f"it is nested more than {MOST_LEVELS} levels deep", node)
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise _problem("it contains itself", node)
        return size
    known[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    size = 1 + sum(_size(child, known, level + 1) for child in children)
    if size > MOST_NODES:
        raise _problem(f"with its aliases written out it has more than {MOST_NODES} parts", node)
    known[id(node)] = size
    return size


def _problem(text: str, node: yaml.Node | None = None) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=None if node is None else node.start_mark)
