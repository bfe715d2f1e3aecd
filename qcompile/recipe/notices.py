"""What a reader should know of a recipe: rules that have no effect, and why some parts are treated differently."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qcompile.messages import cut, some, value
from qcompile.recipe.diagnose import did_you_mean
from qcompile.recipe.globs import KINDS, possible_kinds
from qcompile.recipe.rule import Location, Rule

_CACHE = "; the key/value cache of a checkpoint is the k_bmm_quantizer and the v_bmm_quantizer of each attention"
_MOVE = "; later rules win: move this one behind them"


@dataclass(frozen=True)
class Notice:
    """A rule that had no effect, or whose effect has a reason to tell; prints as `file:line: message`.

    Attributes:
        kind: the rule matched nothing, lost all that it matched to later rules (`overridden`), lost some of it in a way
            that its author may not have meant (`undone`), or has a `why`.
        file, line: of the rule; no line for what was written in Python or with `--set`.
    """

    kind: Literal["matches_nothing", "overridden", "undone", "reason"]
    file: str
    line: int | None
    message: str

    @property
    def is_warning(self) -> bool:
        """Whether the user wrote a rule that did not do what it says; shipped ones name what many models have."""
        return self.kind != "reason" and not Location(self.file).shipped

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}" if self.line else f"{self.file}: {self.message}"


def nothing_notice(rule: Rule) -> Notice:
    """The notice for a rule that matched no quantizer; says so if it never could."""
    message = f"the glob {value(rule.quantizer)} matches nothing in this model"
    owners = {"module_class": rule.module_class, "operator": rule.operator}
    if owner := " and ".join(f"{key} {value(found)}" for key, found in owners.items() if found is not None):
        owner = f"with {owner}"
        message = f"the glob {value(rule.quantizer)} {owner} matches nothing in this model"
    if not possible_kinds(rule.quantizer):
        tail = rule.quantizer.rpartition(".")[2].lstrip("*")
        hint = _CACHE if re.search("cache|kv", tail) else did_you_mean(tail, KINDS)
        hint = hint or "; a name ends in a quantizer, so add `.*` to name a module"
        message = f"the glob {value(rule.quantizer)} can match no quantizer of any model{hint}"
    return Notice("matches_nothing", rule.where.file, rule.where.line, message)


def overridden_notice(rule: Rule, by: Sequence[Rule]) -> Notice:
    """The notice for a rule all of whose quantizers later rules decide."""
    message = f"the rule for {value(rule.quantizer)} is wholly overridden by {_places(by)}"
    meant = rule.enable is not False or any(other.enable is not False for other in by)
    hint = _MOVE if meant and any(other.where.foreign_to(rule.where) for other in by) else ""
    return Notice("overridden", rule.where.file, rule.where.line, message + hint)


def undone_notice(rule: Rule, names: Sequence[str], total: int, by: Sequence[Rule]) -> Notice:
    """The notice for a rule that later ones take `names` from, of the `total` quantizers that it matches."""
    message = (
        f"later rules undo the rule for {value(rule.quantizer)} for {len(names)} of {total} quantizers ({some(names)})"
    )
    return Notice("undone", rule.where.file, rule.where.line, f"{message}: {_places(by)}{_MOVE}")


def reason_notice(rule: Rule, names: Sequence[str]) -> Notice:
    """The notice for what a rule with a `why` decided: names of quantizers, at least one."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] or "the root" for name in names))
    effect = "not quantized" if rule.enable is False else rule.format or "switched on again"
    shown = ", ".join(modules[:2]) + (", ..." if modules[2:] else "")
    count = "1 module" if len(modules) == 1 else f"{len(modules)} modules"
    return Notice(
        "reason", rule.where.file, rule.where.line, f"{count} {effect} ({shown}): {cut(rule.why or '', 1_000)}"
    )


def _places(rules: Sequence[Rule]) -> str:
    return ", ".join(f"{value(rule.quantizer)} ({rule.where})" for rule in rules)
