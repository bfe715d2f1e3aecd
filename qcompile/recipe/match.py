"""Which rule decides each quantizer of a model: later rules win, and what had no effect is said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from passes.formats import FORMATS
from qcompile.errors import RecipeError
from qcompile.recipe.globs import INPUT, KINDS, WEIGHT, glob_matches
from qcompile.recipe.notices import Notice, nothing_notice, overridden_notice, reason_notice
from qcompile.recipe.rule import BLOCK_FORMATS, Granularity, Rule
from qcompile.recipe.schema import Recipe


@dataclass(frozen=True)
class QuantizerName:
    """One quantizer of a model.

    Attributes:
        name: module path + "." + kind, such as "layers.0.q_proj.weight_quantizer".
        module_class: qualified class name of the owning module, or None if the graph does not know it.
    """

    name: str
    module_class: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name!r} does not end in a quantizer's name; known: {', '.join(KINDS)}")

    @property
    def kind(self) -> str:
        """The last component: `input_quantizer`, `weight_quantizer`, `q_bmm_quantizer` ..."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class QuantizerConfig:
    """How one quantizer quantizes. Two configs are equal if they do the same, whichever rule they came from.

    Attributes:
        format: "fp8", "int8", "nvfp4" or "mxfp8".
        granularity: what shares one scale.
        block_shape: rows and columns of a block, only with `per_block`.
        dynamic: scales are computed at run time; for nvfp4 those of the blocks, under a constant global scale that is
            calibrated.
        rotate: a Hadamard rotation comes first, on both operands of the linear.
        source: file:line of the rule that gave the format, and of the one that switched it on again.
    """

    format: str
    granularity: Granularity = "per_tensor"
    block_shape: tuple[int, int] | None = None
    dynamic: bool = False
    rotate: bool = False
    source: str = field(default="", compare=False)


@dataclass(frozen=True)
class Resolution:
    """What a recipe says about the quantizers of one model.

    Attributes:
        configs: name -> config of each enabled quantizer, in the order they were given.
        disabled: name -> the `enable: false` rule that decided. Names that no rule gives a format are in neither.
        notices: rules that matched nothing or were wholly overridden, and what rules with a `why` decided, in the order
            of the recipe.
    """

    configs: dict[str, QuantizerConfig]
    disabled: dict[str, Rule]
    notices: list[Notice]


def rule_matches(rule: Rule, quantizer: QuantizerName) -> bool:
    """Whether the rule's globs match. A rule with `module_class` matches no quantizer whose class is unknown."""
    if not glob_matches(quantizer.name, rule.quantizer):
        return False
    if rule.module_class is None:
        return True
    name = quantizer.module_class
    return name is not None and any(fnmatchcase(text, rule.module_class) for text in (name, name.rpartition(".")[2]))


def resolve(recipe: Recipe, quantizers: Sequence[QuantizerName]) -> Resolution:
    """Decides every quantizer by the last rule that matches it.

    Raises:
        RecipeError: a rule gives a quantizer what its kind cannot do, or switches on what has no format yet.
    """
    configs: dict[str, QuantizerConfig] = {}
    disabled: dict[str, Rule] = {}
    matched: list[list[QuantizerName]] = [[] for _ in recipe.rules]
    winners: dict[str, set[int]] = {}
    explained: list[list[str]] = [[] for _ in recipe.rules]
    for quantizer in quantizers:
        matching = [i for i, rule in enumerate(recipe.rules) if rule_matches(rule, quantizer)]
        for index in matching:
            matched[index].append(quantizer)
        given, switch = _decide(recipe, matching)
        winners[quantizer.name] = {index for index in (given, switch) if index is not None}
        if switch is not None and recipe.rules[switch].enable is False:
            disabled[quantizer.name] = recipe.rules[switch]
            winners[quantizer.name] = {switch}
        elif given is not None:
            again = recipe.rules[switch] if switch is not None else None
            configs[quantizer.name] = _config(recipe.rules[given], quantizer, again)
        if given is not None:  # off without a format is nothing to explain
            for index in winners[quantizer.name]:
                explained[index].append(quantizer.name)
    _check_switches(recipe, matched)
    _check_rotation(configs)
    _check_pairs(configs)
    return Resolution(configs, disabled, _notices(recipe, matched, winners, explained))


def _decide(recipe: Recipe, matching: Sequence[int]) -> tuple[int | None, int | None]:
    """(rule that gives the format, later rule that switches), of the rules that match one quantizer."""
    given = switch = None
    for index in matching:
        rule = recipe.rules[index]
        if rule.format is not None:
            given, switch = index, None
        elif rule.enable is False or given is not None:
            switch = index
    return given, switch


def _config(rule: Rule, quantizer: QuantizerName, switched_on_by: Rule | None) -> QuantizerConfig:
    reason = rule.misfit(quantizer.kind)
    if reason or rule.format is None:
        raise RecipeError(f"{rule.where}: {reason}; the glob {rule.quantizer!r} matches {quantizer.name}")
    block = BLOCK_FORMATS.get(rule.format)
    source = str(rule.where) if switched_on_by is None else f"{rule.where}, switched on at {switched_on_by.where}"
    return QuantizerConfig(
        format=rule.format,
        granularity="per_block" if block else rule.granularity or "per_tensor",
        block_shape=block or rule.block_shape,
        dynamic=bool(block and quantizer.kind != WEIGHT) or bool(rule.dynamic),
        rotate=rule.rotate,
        source=source,
    )


def _check_switches(recipe: Recipe, matched: Sequence[Sequence[QuantizerName]]) -> None:
    """`enable: true` that finds no format at all asks for quantization that would silently not happen."""
    formatted: set[str] = set()
    for rule, names in zip(recipe.rules, matched, strict=True):
        if rule.format is not None:
            formatted.update(quantizer.name for quantizer in names)
        elif rule.enable and names and not any(quantizer.name in formatted for quantizer in names):
            found = f"{rule.quantizer!r} matches {names[0].name}" + (f" and {len(names) - 1} more" if names[1:] else "")
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


def _check_pairs(configs: dict[str, QuantizerConfig]) -> None:
    """Some formats are multiplied with their like only.

    NVFP4 with another format TensorRT computes in half precision, or crashes; an FP8 weight in blocks with an input
    that has one scale it miscompiles.
    """
    for module, config, weight in _inputs(configs):
        if weight is None:
            continue
        reason = None
        if weight.format != config.format and "nvfp4" in (weight.format, config.format):
            reason = "nvfp4 is multiplied with nvfp4, or with an input that is not quantized"
        elif (weight.block_shape == (128, 128)) != (config.block_shape == (1, 128)):
            reason = (
                "a weight in blocks of [128, 128] is multiplied with an input in dynamic blocks of [1, 128], or with"
                " one that is not quantized"
            )
        if reason is not None:
            places = f"weight: {_layout(weight)}, {weight.source}; input: {_layout(config)}, {config.source}"
            raise RecipeError(f"{module}: {reason} ({places})")


def _layout(config: QuantizerConfig) -> str:
    """The format as messages call it: nvfp4, fp8 per_tensor, fp8 per_block [128, 128]."""
    if config.format in BLOCK_FORMATS:
        return config.format
    block = f" {list(config.block_shape)}" if config.block_shape else ""
    return f"{config.format} {config.granularity}{block}"


def _inputs(
    configs: dict[str, QuantizerConfig],
) -> Iterator[tuple[str, QuantizerConfig, QuantizerConfig | None]]:
    """(module as messages call it, config of its input, that of its weight) for each quantized input."""
    for name, config in configs.items():
        module, _, kind = name.rpartition(".")
        if kind == INPUT:
            yield module or "the model", config, configs.get(f"{module}.{WEIGHT}".lstrip("."))


def _notices(
    recipe: Recipe,
    matched: Sequence[Sequence[QuantizerName]],
    winners: dict[str, set[int]],
    explained: Sequence[Sequence[str]],
) -> list[Notice]:
    notices = []
    for index, (rule, names) in enumerate(zip(recipe.rules, matched, strict=True)):
        if not names:
            notices.append(nothing_notice(rule))
        elif not any(index in winners[quantizer.name] for quantizer in names):
            by = {other for quantizer in names for other in winners[quantizer.name] if other > index}
            notices.append(overridden_notice(rule, [recipe.rules[other] for other in sorted(by)]))
        elif rule.why and explained[index]:
            notices.append(reason_notice(rule, explained[index]))
    return notices


# (format, block shape, dynamic) that back ends multiply.
_BLOCKS = {
    ("nvfp4", (1, 16), False),
    ("nvfp4", (1, 16), True),
    ("fp8", (128, 128), False),
    ("fp8", (1, 128), True),
}


def unsupported(config: QuantizerConfig) -> str | None:
    """What this version cannot run although the recipe schema carries it, as one sentence, or None."""
    if config.format not in FORMATS:
        reason = f"format {config.format}: no back end multiplies it; use fp8 or nvfp4"
    elif config.granularity == "per_block" and (config.format, config.block_shape, config.dynamic) not in _BLOCKS:
        reason = f"per_block {config.format} with block_shape {list(config.block_shape or ())}"
    elif config.dynamic and config.granularity == "per_tensor":
        reason = f"dynamic {config.granularity} scales; use `granularity: per_token` or leave out `dynamic`"
    else:
        return None
    return f"{config.source or 'recipe'}: not supported yet: {reason}"
