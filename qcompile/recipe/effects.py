"""Which rules had an effect on a model, which were overridden, and where that undoes what somebody asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompile.recipe.globs import alternatives
from qcompile.recipe.notices import Notice, nothing_notice, overridden_notice, reason_notice, undone_notice
from qcompile.recipe.rule import Rule
from qcompile.recipe.schema import Recipe
from qcompile.recipe.stacks import Stacks


@dataclass(frozen=True)
class Decision:
    """What the rules, by their indices, come to for one quantizer.

    Attributes:
        name: of the quantizer.
        matching: the rules that match it.
        given: the one that gives its format.
        switch: a later one that switches it off or on again.
        off: `switch` switches it off.
    """

    name: str
    matching: tuple[int, ...]
    given: int | None
    switch: int | None
    off: bool

    @property
    def winners(self) -> set[int]:
        """The rules that decide."""
        both = (self.switch,) if self.off else (self.given, self.switch)
        return {index for index in both if index is not None}

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


def notices(recipe: Recipe, decisions: Sequence[Decision]) -> list[Notice]:
    """What a reader should know of each rule, in the order of the recipe.

    A quantizer that no rule gives a format stays off whatever other rules say, so for the question whether a rule had
    an effect it does not count.
    """
    found: list[Notice] = []
    stacks = Stacks(decision.name for decision in decisions)
    for index, rule in enumerate(recipe.rules):
        matched = [decision for decision in decisions if index in decision.matching]
        live = [decision for decision in matched if decision.given is not None]
        won = [decision for decision in live if index in decision.winners]
        if not matched:
            found.append(nothing_notice(rule))
        elif live and not won:
            found.append(overridden_notice(rule, _by(recipe, index, live)))
        else:
            if lost := _undone(recipe, index, decisions, live, stacks):
                found.append(undone_notice(rule, [d.name for d in lost], len(live), _by(recipe, index, lost)))
            if rule.why and won:
                found.append(reason_notice(rule, [decision.name for decision in won]))
    return found


def undoes(later: Rule, earlier: Rule, *, refines: bool) -> bool:
    """Whether it is worth a word that `later` takes some quantizers, not all, from `earlier`.

    Usual is a wide rule that narrower ones refine, and formats that rules at the end switch off. Not usual is to switch
    off and then give a format again, or that a fragment undoes what its importer said before the import. What a shipped
    rule says is for its recipe to undo.

    Args:
        refines: `later` is about nothing but modules that `earlier` is about.
    """
    if earlier.where.shipped:
        return False
    if earlier.enable is False:
        return later.enable is not False and not refines
    if earlier.enable:
        return later.enable is False and (later.where.foreign_to(earlier.where) or not refines)
    return later.format is not None and not refines and later.where.foreign_to(earlier.where)


def _by(recipe: Recipe, index: int, lost: Sequence[Decision]) -> list[Rule]:
    """The later rules that decide `lost`, which rule `index` matches."""
    return [recipe.rules[i] for i in sorted({i for decision in lost for i in decision.winners if i > index})]


def _undone(
    recipe: Recipe, index: int, decisions: Sequence[Decision], live: Sequence[Decision], stacks: Stacks
) -> list[Decision]:
    """Those of `live`, which rule `index` matches and does not decide alone, that its author may not have meant."""
    rule = recipe.rules[index]
    modules = {decision.module for decision in live}
    lost = [d for d in live if index not in d.winners and _differs(recipe.rules[max(d.winners)], rule)]
    found = {}
    for later in {max(decision.winners) for decision in lost}:
        touched = {decision.module for decision in decisions if later in decision.matching}
        if undoes(recipe.rules[later], rule, refines=touched <= modules):
            found.update({d.name: d for d in lost if max(d.winners) == later})
    if not rule.where.shipped and len(globs := alternatives(rule.quantizer)) > 1:
        for glob in globs:  # each is as good as a rule of its own, and may be overridden wholly
            part = [decision for decision in live if stacks.matches(decision.name, glob)]
            if all(d in lost and recipe.rules[max(d.winners)].where.foreign_to(rule.where) for d in part):
                found.update({decision.name: decision for decision in part})
    return [decision for decision in live if decision.name in found]


def _differs(later: Rule, earlier: Rule) -> bool:
    """Whether the quantizer would be another one without `later`."""
    where = {"quantizer", "unless", "module_class", "operator", "why"}
    return later.model_dump(exclude=where) != earlier.model_dump(exclude=where)
