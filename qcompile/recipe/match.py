"""Which rule decides each quantizer of a model: later rules win, and what had no effect is said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qcompile.errors import RecipeError
from qcompile.messages import value
from qcompile.recipe.effects import Decision, notices
from qcompile.recipe.globs import INPUT, KINDS, MULTIPLIED_IN_ATTENTION, WEIGHT
from qcompile.recipe.notices import Notice
from qcompile.recipe.rule import Rule
from qcompile.recipe.schema import Recipe
from qcompile.recipe.stacks import Stacks, counts_from_end
from qcompile.schemes.config import QuantizerConfig, attention_mismatch, mismatch
from qcompile.schemes.words import block_of


@dataclass(frozen=True)
class QuantizerName:
    """One quantizer of a model.

    Attributes:
        name: module path + "." + kind, such as "layers.0.q_proj.weight_quantizer".
        module_class: qualified class name of the owning module, or None if the graph does not know it.
        operator: what it belongs to, as `operator` of a rule; None if that is not known.
    """

    name: str
    module_class: str | None = None
    operator: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name!r} does not end in a quantizer's name; known: {', '.join(KINDS)}")

    @property
    def kind(self) -> str:
        """The last component: `input_quantizer`, `weight_quantizer`, `q_bmm_quantizer` ..."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Resolution:
    """What a recipe says about the quantizers of one model.

    Attributes:
        configs: name -> config of each enabled quantizer, in the order they were given.
        disabled: name -> the `enable: false` rule that decided. Names that no rule gives a format are in neither.
        notices: rules that matched nothing or were overridden, and what rules with a `why` decided, in the order of the
            recipe.
    """

    configs: dict[str, QuantizerConfig]
    disabled: dict[str, Rule]
    notices: list[Notice]


def rule_matches(rule: Rule, quantizer: QuantizerName, stacks: Stacks) -> bool:
    """Whether the rule's globs match. One with `module_class` or `operator` matches none where that is unknown."""
    if not stacks.matches(quantizer.name, rule.quantizer):
        return False
    if rule.unless is not None and stacks.matches(quantizer.name, rule.unless):
        return False
    if rule.operator not in (None, quantizer.operator):
        return False
    if rule.module_class is None:
        return True
    name = quantizer.module_class
    return name is not None and any(fnmatchcase(text, rule.module_class) for text in (name, name.rpartition(".")[2]))


def resolve(recipe: Recipe, quantizers: Sequence[QuantizerName]) -> Resolution:
    """Decides every quantizer by the last rule that matches it.

    Args:
        quantizers: all of the model: blocks that a rule counts from the end are counted here.

    Raises:
        RecipeError: a rule gives a quantizer what its kind cannot do, switches on what has no format yet, or names a
            block from the end that is not there; or a layer or attention would have operands that no target multiplies.
    """
    stacks = Stacks(quantizer.name for quantizer in quantizers)
    decisions = decide(recipe, quantizers, stacks)
    _check_blocks(recipe, decisions, stacks)
    configs = configs_of(recipe, quantizers, decisions)
    _check_switches(recipe, decisions)
    _check_rotation(configs)
    check_pairs(configs)
    disabled = {
        decision.name: recipe.rules[decision.switch]
        for decision in decisions
        if decision.off and decision.given is not None and decision.switch is not None
    }
    return Resolution(configs, disabled, notices(recipe, decisions))


def decide(recipe: Recipe, quantizers: Sequence[QuantizerName], stacks: Stacks) -> list[Decision]:
    """What the rules come to for each quantizer."""
    found = []
    for quantizer in quantizers:
        given = switch = None
        matching = [i for i, rule in enumerate(recipe.rules) if rule_matches(rule, quantizer, stacks)]
        for index in matching:
            rule = recipe.rules[index]
            if rule.format is not None:
                given, switch = index, None
            elif rule.enable is False or given is not None:
                switch = index
        off = switch is not None and recipe.rules[switch].enable is False
        found.append(Decision(quantizer.name, tuple(matching), given, switch, off))
    return found


def configs_of(
    recipe: Recipe, quantizers: Sequence[QuantizerName], decisions: Sequence[Decision]
) -> dict[str, QuantizerConfig]:
    """Name -> config of each quantizer that is on."""
    configs = {}
    for quantizer, decision in zip(quantizers, decisions, strict=True):
        if decision.given is not None and not decision.off:
            again = recipe.rules[decision.switch] if decision.switch is not None else None
            configs[quantizer.name] = _config(recipe.rules[decision.given], quantizer, again)
    return configs


def _config(rule: Rule, quantizer: QuantizerName, switched_on_by: Rule | None) -> QuantizerConfig:
    reason = rule.misfit(quantizer.kind)
    if reason or rule.format is None:
        raise RecipeError(f"{rule.where}: {reason}; the glob {value(rule.quantizer)} matches {quantizer.name}")
    block = block_of(rule.format, rule.group_size)
    source = str(rule.where) if switched_on_by is None else f"{rule.where}, switched on at {switched_on_by.where}"
    return QuantizerConfig(
        format=rule.format,
        granularity="per_block" if block else rule.granularity or "per_tensor",
        block_shape=block or rule.block_shape,
        dynamic=bool(block and quantizer.kind != WEIGHT) or bool(rule.dynamic),
        rotate=rule.rotate,
        constant_amax=rule.constant_amax,
        source=source,
    )


def _check_blocks(recipe: Recipe, decisions: Sequence[Decision], stacks: Stacks) -> None:
    """A block that is not there was to be treated differently, and would silently not be."""
    used = {index for decision in decisions for index in decision.matching}
    for index, rule in enumerate(recipe.rules):
        if counts_from_end(rule.quantizer) and index not in used:
            raise RecipeError(
                f"{rule.where}: the glob {value(rule.quantizer)} counts blocks from the end, and matches nothing in"
                f" this model, which has {stacks}"
            )


def _check_switches(recipe: Recipe, decisions: Sequence[Decision]) -> None:
    """`enable: true` that finds no format at all asks for quantization that would silently not happen."""
    for index, rule in enumerate(recipe.rules):
        if not rule.enable:
            continue
        matched = [decision for decision in decisions if index in decision.matching]
        formats = {i for decision in matched for i in decision.matching if i < index and recipe.rules[i].format}
        if matched and not formats:
            more = f" and {len(matched) - 1} more" if matched[1:] else ""
            found = f"{value(rule.quantizer)} matches {matched[0].name}{more}"
            raise RecipeError(f"{rule.where}: `enable: true` on {found}, to which no earlier rule gives a format")


def _check_rotation(configs: dict[str, QuantizerConfig]) -> None:
    """A rotation of one side only multiplies by the wrong matrix.

    Both quantizers of a linear agree; the weight's alone says it for an input that stays as it is (weight-only).
    """
    for module, config, weight in _inputs(configs):
        if weight is None and config.rotate:
            raise RecipeError(f"{module}: `rotate` on the input ({config.source}) needs a weight quantizer")
        if weight is not None and weight.rotate != config.rotate:
            places = f"weight: {weight.source}; input: {config.source}"
            raise RecipeError(f"{module}: `rotate` must be the same for the weight and the input ({places})")


def check_pairs(configs: dict[str, QuantizerConfig], name: str = "{}") -> None:
    """Raise `RecipeError` for a layer or an attention with operands that no target multiplies, called `name`."""
    for module, config, weight in _inputs(configs):
        if weight is not None and (reason := mismatch(weight, config)) is not None:
            raise RecipeError(f"{name.format(module)}: {reason}")
    for left, right in MULTIPLIED_IN_ATTENTION:
        for quantizer, config in configs.items():
            module, _, kind = quantizer.rpartition(".")
            other = configs.get(f"{module}.{right}".lstrip(".")) if kind == left else None
            if other is not None and (reason := attention_mismatch((_short(left), config), (_short(right), other))):
                raise RecipeError(f"{name.format(module or 'the model')}: {reason}")


def _short(kind: str) -> str:
    """`q` of `q_bmm_quantizer`."""
    return kind.removesuffix("_bmm_quantizer")


def _inputs(
    configs: dict[str, QuantizerConfig],
) -> Iterator[tuple[str, QuantizerConfig, QuantizerConfig | None]]:
    """(module as messages call it, config of its input, that of its weight) for each quantized input."""
    for name, config in configs.items():
        module, _, kind = name.rpartition(".")
        if kind == INPUT:
            yield module or "the model", config, configs.get(f"{module}.{WEIGHT}".lstrip("."))
