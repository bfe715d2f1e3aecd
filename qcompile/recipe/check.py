"""Checks a recipe without a model: schema, globs that can match nothing, rules that can never win."""

from __future__ import annotations

import re

from qcompile.recipe.globs import alternatives, glob_matches, possible_kinds
from qcompile.recipe.load import RecipeSource, load_recipe
from qcompile.recipe.notices import Notice, nothing_notice, overridden_notice
from qcompile.recipe.rule import Rule

_CLASS = re.compile(r"\[!?\]?[^\]]*\]|\?")


def check_recipe(source: RecipeSource) -> list[Notice]:
    """Notices about rules that have no effect on any model, in the order of the recipe.

    Raises `RecipeError` if the recipe is not valid. Silence is no proof: only cover by a single later rule is found.
    """
    rules = load_recipe(source).rules
    notices = []
    for index, rule in enumerate(rules):
        if not possible_kinds(rule.quantizer):
            notices.append(nothing_notice(rule))
        elif (winner := _dead_under(rule, rules[index + 1 :])) is not None:
            notices.append(overridden_notice(rule, [winner]))
    return notices


def _dead_under(rule: Rule, later: tuple[Rule, ...]) -> Rule | None:
    """The later rule that takes every quantizer from `rule`, or None."""
    for index, other in enumerate(later):
        if not covers(other, rule):
            continue
        if rule.format is None or other.format is not None:
            return other
        revived = any(rest.enable for rest in later[index + 1 :])
        if other.enable is False and not revived:
            return other
    return None


def covers(wide: Rule, narrow: Rule) -> bool:
    """Whether `wide` surely matches everything that `narrow` matches. False where that is hard to see."""
    if wide.module_class not in (None, narrow.module_class):
        return False
    return all(
        any(one == other or _glob_covers(one, other) for one in alternatives(wide.quantizer))
        for other in alternatives(narrow.quantizer)
    )


def _glob_covers(wide: str, narrow: str) -> bool:
    """A glob of literals and stars covers another if it matches that glob's text: its stars swallow the wildcards.

    `?` and `[...]` in the narrow glob stand for a character that no literal equals.
    """
    if "?" in wide or "[" in wide:
        return False
    return glob_matches(_CLASS.sub("\0", narrow), wide)
