"""Checks a recipe without a model: schema, globs that can match nothing, rules that can never win, odd pairs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from qcompile.errors import RecipeError
from qcompile.messages import cut, value
from qcompile.recipe.effects import undoes
from qcompile.recipe.empty import NO_FORMAT
from qcompile.recipe.globs import ATTENTION, INPUT, KINDS, WEIGHT, alternatives, glob_matches, possible_kinds
from qcompile.recipe.load import RecipeSource, load_recipe
from qcompile.recipe.match import QuantizerName, check_pairs, configs_of, decide
from qcompile.recipe.notices import Notice, nothing_notice, overridden_notice, undone_notice
from qcompile.recipe.rule import Rule
from qcompile.recipe.schema import Recipe
from qcompile.recipe.stacks import Stacks, counts_from_end

_CLASS = re.compile(r"\[!?\]?[^\]]*\]|\?")
_FROM_END = re.compile(r"(?<=\.)-[^.]*|^-[^.]*")

_MOST_LOOKS = 300_000  # a second or two; a recipe of 100 rules has a tenth of it


def check_recipe(source: RecipeSource) -> list[Notice]:
    """Notices about rules that have no effect on any model, or are undone, in the order of the recipe.

    Silence is no proof: only cover by a single later rule for each kind of quantizer is found, and of many hundreds of
    rules only the first are looked at.

    Raises:
        RecipeError: the recipe is not valid, has no format, or gives a linear layer operands that no target multiplies.
    """
    recipe = load_recipe(source)
    if not any(rule.format for rule in recipe.rules):
        raise RecipeError(f"the recipe {cut(recipe.metadata.name)} quantizes nothing: {NO_FORMAT}")
    _check_pairs(recipe)
    formatted = {kind for rule in recipe.rules if rule.format for kind in possible_kinds(rule.quantizer)}
    notices, looked = [], 0
    for index, rule in enumerate(recipe.rules):
        kinds = possible_kinds(rule.quantizer)
        if not kinds:
            notices.append(nothing_notice(rule))
            continue
        live = [kind for kind in kinds if kind in formatted] or list(kinds)
        later = recipe.rules[index + 1 :]
        looked += len(later) * len(live) * len(alternatives(rule.quantizer))
        if looked > _MOST_LOOKS:
            continue
        lost = {kind: winner for kind in live if (winner := _dead_under(rule, kind, later)) is not None}
        winners = [other for other in later if any(other is winner for winner in lost.values())]
        if len(lost) == len(live):
            notices.append(overridden_notice(rule, winners))
        elif undone := [kind for kind, winner in lost.items() if undoes(winner, rule, refines=covers(rule, winner))]:
            notices.append(undone_notice(rule, undone, len(live), winners))
    return notices


def _dead_under(rule: Rule, kind: str, later: tuple[Rule, ...]) -> Rule | None:
    """The later rule that takes every quantizer of that kind from `rule`, or None."""
    for index, other in enumerate(later):
        if not covers(other, rule, kind):
            continue
        if rule.format is None or other.format is not None:
            return other
        revived = any(rest.enable for rest in later[index + 1 :])
        if other.enable is False and not revived:
            return other
    return None


def covers(wide: Rule, narrow: Rule, kind: str | None = None) -> bool:
    """Whether `wide` surely matches everything that `narrow` matches, or all quantizers of one kind that it does.

    False where that is hard to see.
    """
    for key in ("module_class", "operator", "unless"):
        if getattr(wide, key) not in (None, getattr(narrow, key)):
            return False
    globs = [glob for one in alternatives(narrow.quantizer) for glob in _of_kind(one, kind)]
    return all(any(one == other or _glob_covers(one, other) for one in alternatives(wide.quantizer)) for other in globs)


@lru_cache(maxsize=1024)
def _of_kind(glob: str, kind: str | None) -> list[str]:
    """Globs that together match what `glob` matches of that kind: of `a.*` these are `a.KIND` and `a.*.KIND`.

    `glob` itself where its end may lie inside the kind's name.
    """
    if kind is None:
        return [glob]
    if kind not in possible_kinds(glob):
        return []
    head = glob.rstrip("*")
    text = re.split(r"[*?\]]", head)[-1]
    inside = text in kind or any(kind.startswith(text[start:]) for start in range(len(text)))
    if head == glob or head.endswith(("?", "]")) or (text and inside):
        return [glob]
    return [f"{head}*.{kind}", *([f"{head}{kind}"] if not head or head.endswith(".") else [])]


def _glob_covers(wide: str, narrow: str) -> bool:
    """A glob of literals and stars covers another if it matches that glob's text: its stars swallow the wildcards.

    `?`, `[...]` and numbers from the end in the narrow glob stand for characters that no literal equals.
    """
    if "?" in wide or "[" in wide:
        return False
    text = _CLASS.sub("\0", narrow)
    if counts_from_end(narrow) and not counts_from_end(wide):
        text = _FROM_END.sub("\0", text)
    return glob_matches(text, wide)


def _check_pairs(recipe: Recipe) -> None:
    """Try layers whose names are made of the globs: a real one called so would be refused."""
    tried = 0
    for rule in recipe.rules:
        for path in dict.fromkeys(path for glob in alternatives(rule.quantizer) for path in _paths(glob)):
            tried += 3 * len(recipe.rules)
            if tried > _MOST_LOOKS:
                return
            owner = None if rule.module_class is None else _text(rule.module_class)
            names = [f"{path}.{kind}".lstrip(".") for kind in (WEIGHT, INPUT, *ATTENTION)]
            layer = [QuantizerName(name, owner, rule.operator) for name in names]
            decisions = decide(recipe, layer, Stacks(quantizer.name for quantizer in layer))
            check_pairs(configs_of(recipe, layer, decisions), f"a layer called like {value(path)}")


def _paths(glob: str) -> Iterator[str]:
    """Paths of modules that have quantizers which `glob` matches."""
    path, _, last = _text(glob).rpartition(".")
    yield path
    if last not in KINDS:
        yield f"{path}.{last}".lstrip(".")


def _text(glob: str) -> str:
    """A text that the glob matches."""
    text = re.sub(r"\[!\]?[^\]]*\]|\?", "x", glob)
    text = re.sub(r"\[(\]?[^\]])[^\]]*\]", lambda found: found[1][0], text)
    return text.replace("*", "x")
