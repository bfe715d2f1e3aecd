"""A recipe that quantizes nothing of a model is an error, which says what the model has and why none of it is on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from qcompile.errors import RecipeError
from qcompile.messages import cut, some, value
from qcompile.recipe.globs import OUTPUT, SOFTMAX, WEIGHT
from qcompile.recipe.match import QuantizerName, Resolution
from qcompile.recipe.notices import nothing_notice
from qcompile.recipe.rule import Rule
from qcompile.recipe.schema import Recipe

NO_FORMAT = 'no rule gives a format, such as {quantizer: "*.weight_quantizer", format: fp8}'


def check_quantizes(recipe: Recipe, quantizers: Sequence[QuantizerName], found: Resolution) -> None:
    """Raise `RecipeError` if `found`, the resolution of `recipe` for all `quantizers` of a model, has none switched on.

    The message has the rules that could have switched one on, the nearest names, and what the model has.
    """
    if found.configs:
        return
    wanted = [rule for rule in recipe.rules if rule.format is not None]
    if not wanted:
        reason = NO_FORMAT
    elif not quantizers:
        reason = "none of it could be"
    elif found.disabled:
        reason = "; ".join(_left_out(found.disabled))
    else:
        names = [quantizer.name for quantizer in quantizers]
        reason = "; ".join(f"{nothing_notice(rule)}{_nearest(rule, names)}" for rule in wanted)
    raise RecipeError(
        f"the recipe {cut(recipe.metadata.name)} quantizes nothing of this model: {reason}. {_has(quantizers)}"
    )


def _left_out(disabled: dict[str, Rule]) -> list[str]:
    """What each rule leaves out that another one gave a format, and how to have it back."""
    modules: dict[tuple[str, str], list[str]] = {}
    for name, rule in disabled.items():
        modules.setdefault((str(rule.where), rule.quantizer), []).append(name.rpartition(".")[0])
    sentences = []
    for (place, glob), paths in modules.items():
        names = list(dict.fromkeys(path or "the root" for path in paths))
        again = f"{paths[0]}.*".lstrip(".")
        sentences.append(
            f"{place}: {value(glob)} leaves out {some(names)}; to quantize it all the same, end with the rule"
            f' {{quantizer: "{again}", enable: true}}'
        )
    return sentences


def _nearest(rule: Rule, names: Sequence[str]) -> str:
    """The names whose ends are most like that of the glob."""
    end = rule.quantizer.strip("*.")
    ends = {".".join(name.split(".")[-1 - end.count(".") :]): name for name in reversed(names)}
    close = difflib.get_close_matches(end, ends, n=2, cutoff=0.6)
    return f" (nearest: {', '.join(ends[found] for found in close)})" if close else ""


def _has(quantizers: Sequence[QuantizerName]) -> str:
    """The parts of the model that have quantizers."""
    parts = {"linear layer": WEIGHT, "convolution": WEIGHT, "attention": SOFTMAX, "norm": OUTPUT}
    weights = {q.name.rpartition(".")[0] for q in quantizers if q.kind == WEIGHT}
    counts = []
    for what, kind in parts.items():
        found = [q for q in quantizers if q.kind == kind]
        if kind == WEIGHT:
            found = [q for q in found if (q.operator == "convolution") == (what == "convolution")]
        paths = [q.name.rpartition(".")[0] or "the root" for q in found]
        paths = [path for path in paths if kind != OUTPUT or path not in weights]
        if paths:
            counts.append(f"{len(paths)} {what}{'s' if paths[1:] else ''} ({some(paths)})")
    return f"It has {', '.join(counts) or 'no linear layer, convolution, attention or norm that can be'}"
