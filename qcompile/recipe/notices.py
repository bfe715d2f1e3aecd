"""What a recipe says that has no effect: never an error, never silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qcompile.recipe.diagnose import did_you_mean
from qcompile.recipe.globs import KINDS, possible_kinds
from qcompile.recipe.schema import Rule


@dataclass(frozen=True)
class Notice:
    """Something in a recipe that had no effect; prints as `file:line: message`."""

    kind: Literal["matches_nothing", "overridden"]
    file: str
    line: int | None
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}" if self.line else f"{self.file}: {self.message}"


def nothing_notice(rule: Rule) -> Notice:
    """The notice for a rule that matched no quantizer; says so if it never could."""
    message = f"the glob {rule.quantizer!r} matches nothing in this model"
    if rule.module_class is not None:
        message = f"the glob {rule.quantizer!r} with module_class {rule.module_class!r} matches nothing in this model"
    if not possible_kinds(rule.quantizer):
        tail = rule.quantizer.rpartition(".")[2].lstrip("*")
        hint = did_you_mean(tail, KINDS) or "; a name ends in a quantizer, so add `.*` to name a module"
        message = f"the glob {rule.quantizer!r} can match no quantizer of any model{hint}"
    return Notice("matches_nothing", rule.where.file, rule.where.line, message)


def overridden_notice(rule: Rule, by: Sequence[Rule]) -> Notice:
    """The notice for a rule all of whose quantizers later rules decide."""
    places = ", ".join(f"{other.quantizer!r} ({other.where})" for other in by)
    message = f"the rule for {rule.quantizer!r} is wholly overridden by {places}"
    return Notice("overridden", rule.where.file, rule.where.line, message)
