"""What a recipe asks for, whatever the model: formats, and calibration data."""

from __future__ import annotations

from qcompile.recipe.check import covers
from qcompile.recipe.globs import INPUT, glob_matches, possible_kinds
from qcompile.recipe.rule import Rule
from qcompile.recipe.schema import Recipe
from qcompile.schemes.words import WORDS

_ANY_MODULE = "\0"  # a module whose name no literal of a glob has


def asked_formats(recipe: Recipe) -> dict[str, Rule]:
    """Each format that `recipe` asks for, and the first rule that does and that no later rule surely overrides."""
    found: dict[str, Rule] = {}
    for index, rule in enumerate(recipe.rules):
        if rule.format is not None and possible_kinds(rule.quantizer) and not _dead(rule, recipe.rules[index + 1 :]):
            found.setdefault(rule.format, rule)
    return found


def calibrates(recipe: Recipe) -> bool:
    """Whether `recipe` gives the inputs of linear layers of any name a constant scale, which needs calibration data."""
    name = f"{_ANY_MODULE}.{INPUT}"
    rules = [rule for rule in recipe.rules if rule.module_class is None and rule.operator in (None, "linear")]
    given = [rule for rule in rules if glob_matches(name, rule.quantizer)]
    deciding = next((rule for rule in reversed(given) if rule.format is not None or rule.enable is False), None)
    if deciding is None or deciding.format is None:
        return False
    word = next((word for word in WORDS if word.format == deciding.format), None)
    two_levels = word is not None and word.ir.scale is not None  # of which the global one is a constant
    return two_levels or not (deciding.dynamic or deciding.block_shape)


def _dead(rule: Rule, later: tuple[Rule, ...]) -> bool:
    for index, other in enumerate(later):
        if covers(other, rule):
            if other.format is not None:
                return True
            if other.enable is False and not any(rest.enable for rest in later[index + 1 :]):
                return True
    return False
