"""What `torch.compile(model, backend="qcompile", options={...})` takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch

from passes.pipelines import route
from passes.places import OwnPasses, Placed
from qcompile.compat.dynamo import inductor_modes, inductor_settings
from qcompile.errors import CompileError
from qcompile.recipe import Recipe, load_recipe
from qcompile.recipe.stacks import counts_from_end
from qcompile.report.coverage import KINDS

TARGETS = ("inductor", "torch_tensorrt", "eager")


@dataclass(frozen=True)
class Options:
    """
    Attributes:
        recipe: how to quantize a model in floating point: a name, a path, a mapping or a `Recipe`; None for a model
            that is quantized already.
        calibration: what `qcompile.calibrate` returned, for recipes with static activations.
        target: who runs the result: "inductor", "torch_tensorrt", or "eager" for the passes alone.
        mode: as `mode=` of torch.compile, which takes no options beside it: "reduce-overhead", "max-autotune", ...
        fast_accumulation: let a GPU add FP8 products in fewer digits than float32 where that is faster (Hopper).
        inductor: settings of `torch._inductor.config` for this model.
        expect: least counts of what each call has to run quantized, such as {"linear": 49, "attention": 12}.
        passes: passes of the user, each with its place: `[passes.after("fuse", MyPass)]`.
    """

    recipe: Recipe | None = None
    calibration: Mapping[str, torch.Tensor] | None = None
    target: str = "inductor"
    mode: str | None = None
    fast_accumulation: bool = True
    inductor: Mapping[str, Any] = field(default_factory=dict)
    expect: Mapping[str, int] = field(default_factory=dict)
    passes: Sequence[Placed] = ()

    @classmethod
    def read(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """The options that a user gave. Raises `CompileError` for one that is not known, or not of its type."""
        given = {name: value for name, value in (options or {}).items() if value is not None}
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(options or {}) - set(known)):
            raise CompileError(f"unknown options {', '.join(unknown)}; known: {', '.join(known)}")
        if mode is not None:
            given["mode"] = mode
        if (target := given.get("target", "inductor")) not in TARGETS:
            raise CompileError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
        modes = list(inductor_modes())
        if (name := given.get("mode", "default")) not in modes:
            raise CompileError(f"unknown mode {name!r}; known: {', '.join(modes)}")
        for option in ("calibration", "inductor", "expect"):
            if not isinstance(given.get(option, {}), Mapping):
                raise CompileError(f"options[{option!r}] is a mapping, not a {type(given[option]).__name__}")
        if not isinstance(fast := given.get("fast_accumulation", True), bool):
            raise CompileError(f"options['fast_accumulation'] is a bool, not a {type(fast).__name__}")
        if unknown := sorted(set(given.get("inductor", {})) - inductor_settings()):
            raise CompileError(f"options['inductor']: torch._inductor.config has no {', '.join(unknown)}")
        if unknown := sorted(set(given.get("expect", {})) - set(KINDS)):
            raise CompileError(f"options['expect'] has no {', '.join(unknown)}; known: {', '.join(KINDS)}")
        if "calibration" in given:
            given["calibration"] = {name: _range(name, amax) for name, amax in given["calibration"].items()}
        OwnPasses(given.get("passes"), route("compile"))  # a place that there is not is known now
        if "recipe" in given:
            given["recipe"] = _recipe(given["recipe"])
        return cls(**given)


def _range(name: str, amax: object) -> torch.Tensor:
    """`amax` as a tensor; a state that was kept as JSON has floats."""
    if not isinstance(amax, torch.Tensor | float | int):
        raise CompileError(f"options['calibration']: the range of {name} is a {type(amax).__name__}, not a tensor")
    return torch.as_tensor(amax)


def _recipe(recipe: Any) -> Recipe:
    if not isinstance(recipe, str | PathLike | Mapping | Recipe):
        raise CompileError(f"options['recipe'] is a name, a path, a mapping or a Recipe, not a {type(recipe).__name__}")
    loaded = load_recipe(recipe)
    for rule in loaded.rules:
        if counts_from_end(rule.quantizer):
            raise CompileError(
                f"{rule.where}: the glob {rule.quantizer!r} counts blocks from the end, which torch.compile cannot: a"
                " graph of Dynamo may hold a part of the model only. Give the number of the block"
            )
    return loaded
