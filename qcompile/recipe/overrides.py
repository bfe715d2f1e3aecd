"""`--set key=value`: changes to a recipe that need no file of their own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import yaml

from qcompile.algorithms.settings import Settings
from qcompile.errors import RecipeError
from qcompile.messages import cut
from qcompile.messages import value as shown
from qcompile.recipe.diagnose import Path, show_path
from qcompile.recipe.imports import Written, recipe_of
from qcompile.recipe.rule import Location
from qcompile.recipe.schema import Recipe
from qcompile.recipe.yaml_data import load
from qcompile.recipe.yaml_lines import parse

_STEP = re.compile(
    r"(?:^|\.)(?P<key>[A-Za-z_]\w*)|\[(?P<index>\d+)\]|\[(?P<append>\+)\]|\[(?P<field>\w+)=(?P<value>[^\]]*)\]"
)
_SPLIT = re.compile(r"^(?P<path>(?:[^=\[]|\[[^\]]*\])+)=(?P<value>.*)$", re.DOTALL)
_LONGEST, _MOST_STEPS = 10_000, 20
_FORM = "write it as path=value, for example rules[0].format=int8"


@dataclasses.dataclass(frozen=True)
class _Override:
    """One parsed expression: `steps` are keys (str), indices (int), "+" in a list, or (field, value) selectors."""

    text: str
    steps: tuple[str | int | tuple[str, Any], ...]
    value: Any


def with_overrides(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """The recipe with every `path=value` applied in order, then validated again as a whole.

    A path is keys and list positions: `metadata.name=mine`, `rules[0].format=int8`.
    `rules[+]={quantizer: "*lm_head*", enable: true}` appends a rule (so it wins), `rules[+]={import: fp8_attention}`
    the rules of a fragment, and `rules[format=nvfp4].rotate=true` changes every rule whose key has that value. Values
    are YAML. A step of `calibration` that gets another `algorithm` has only those of its settings that every algorithm
    has. Rules are counted after imports, as `qcompile recipes show NAME --expanded` lists them.

    Raises:
        RecipeError: names the override that cannot be read, leads nowhere, or makes the recipe invalid.
    """
    parsed = [_parse(text) for text in overrides]
    if not parsed:
        return recipe
    data = recipe.model_dump(exclude_unset=True, mode="json")
    touched: list[tuple[Path, str]] = []
    for override in parsed:
        touched += [(path, override.text) for path in _assign(data, override.steps, (), override)]

    def place(path: Path) -> str:
        """The overrides that reached into the place of the error; the last of them if it is elsewhere."""
        texts = [text for where, text in touched if where[: len(path)] == path or path[: len(where)] == where]
        if not texts:
            texts = [text for where, text in touched if where[:2] == path[:2]]
        return "; ".join(f"--set {text}" for text in dict.fromkeys(texts or [o.text for o in parsed]))

    return recipe_of(Written(data, place, lambda index: _place_of_rule(recipe, index, touched)))


def _place_of_rule(recipe: Recipe, index: int, touched: list[tuple[Path, str]]) -> Location:
    """Where the rule was written, and which overrides changed it since."""
    whole = [text for path, text in touched if path in (("rules",), ("rules", index))]
    if whole:
        return Location(f"--set {whole[-1]}")
    parts = [f"--set {text}" for path, text in touched if path[:2] == ("rules", index)]
    return dataclasses.replace(recipe.rules[index].where, note=", ".join(parts))


def _parse(text: str) -> _Override:
    match = _SPLIT.match(text) if len(text) <= _LONGEST else None
    if match is None:
        raise RecipeError(f"--set {cut(text)}: {_FORM}")
    steps: list[str | int | tuple[str, Any]] = []
    path, position = match["path"].strip(), 0
    while position < len(path):
        step = _STEP.match(path, position)
        if step is None or path[0] in ".[":
            raise RecipeError(f"--set {text}: cannot read {shown(path[position:])}; {_FORM}")
        steps.append(_step(step, text))
        position = step.end()
    if len(steps) > _MOST_STEPS:
        raise RecipeError(f"--set {cut(text)}: a recipe has no {len(steps)} levels")
    return _Override(text, tuple(steps), _yaml(match["value"], text))


def _step(match: re.Match[str], text: str) -> str | int | tuple[str, Any]:
    if match["key"]:
        return match["key"]
    if match["index"]:
        return int(match["index"][:9])  # no list is that long
    return "+" if match["append"] else (match["field"], _yaml(match["value"], text))


def _yaml(value: str, text: str) -> Any:
    try:
        if value.lstrip().startswith("{"):
            parse(value, f"--set {text}")  # refuses what YAML would cut without a word
        return load(value)
    except yaml.YAMLError as error:
        problem = cut(" ".join(str(error).split()), 300)
        raise RecipeError(f"--set {cut(text)}: the value {shown(value)} is not valid YAML: {problem}") from error


def _assign(node: Any, steps: tuple[Any, ...], done: Path, override: _Override) -> list[Path]:
    """Sets the value at every place that the steps lead to; returns those places."""
    step, rest = steps[0], steps[1:]
    paths: list[Path] = []
    for key in _targets(node, step, done, override):
        if not rest:
            if isinstance(node, list) and key == len(node):
                node.append(override.value)
            else:
                if (*done[:1], key) == ("calibration", "algorithm") and node.get(key) != override.value:
                    for other in set(node) - set(Settings.model_fields):  # settings of the algorithm that it was
                        del node[other]
                node[key] = override.value
            paths.append((*done, key))
        elif isinstance(node, dict):
            paths += _assign(node.setdefault(key, {}), rest, (*done, key), override)
        else:
            paths += _assign(node[key], rest, (*done, key), override)
    return paths


def _targets(node: Any, step: Any, done: Path, override: _Override) -> list[Any]:
    """The keys or indices of `node` that one step names; never none."""
    where = show_path(done)
    if isinstance(step, str) and step != "+":
        if not isinstance(node, dict):
            raise RecipeError(f"--set {cut(override.text)}: {where} is not a mapping, it has no key {step!r}")
        return [step]
    if not isinstance(node, list):
        raise RecipeError(f"--set {cut(override.text)}: {where} is not a list")
    if step == "+":
        if override.steps[-1] != "+":
            raise RecipeError(f"--set {cut(override.text)}: [+] appends a whole item, so it must end the path")
        return [len(node)]
    if isinstance(step, int):
        if step >= len(node):
            raise RecipeError(
                f"--set {cut(override.text)}: {where} has {len(node)} items, the last is [{len(node) - 1}]"
            )
        return [step]
    found = [i for i, item in enumerate(node) if isinstance(item, dict) and item.get(step[0]) == step[1]]
    if not found:
        raise RecipeError(f"--set {cut(override.text)}: no item of {where} has {step[0]} = {shown(step[1])}")
    return found
