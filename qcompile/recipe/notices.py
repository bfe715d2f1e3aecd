"""What a reader should know of a recipe: rules that have no effect, and why some parts are treated differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qcompile.recipe.diagnose import did_you_mean
from qcompile.recipe.globs import KINDS, possible_kinds
from qcompile.recipe.rule import Rule


@dataclass(frozen=True)
class Notice:
    """A rule that had no effect, or whose effect has a reason to tell; prints as `file:line: message`."""

    kind: Literal["matches_nothing", "overridden", "reason"]
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


def reason_notice(rule: Rule, names: Sequence[str]) -> Notice:
    """The notice for what a rule with a `why` decided: names of quantizers, at least one."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] or "the root" for name in names))
    effect = "not quantized" if rule.enable is False else rule.format or "switched on again"
    shown = ", ".join(modules[:2]) + (", ..." if modules[2:] else "")
    count = "1 module" if len(modules) == 1 else f"{len(modules)} modules"
    return Notice("reason", rule.where.file, rule.where.line, f"{count} {effect} ({shown}): {rule.why}")
