"""What `torch.compile(model, backend="qcompile", options={...})` takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qcompile.errors import CompileError
from qcompile.recipe import Recipe, load_recipe

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
        inductor: settings of `torch._inductor.config` for this model.
        expect: least counts of what has to be quantized, such as {"linear": 49, "attention": 12}.
    """

    recipe: Recipe | None = None
    calibration: Mapping[str, torch.Tensor] | None = None
    target: str = "inductor"
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    expect: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """The options that a user gave. Raises `CompileError` for one that is not known, or not of its type."""
        given = dict(options or {})
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise CompileError(f"unknown options {', '.join(unknown)}; known: {', '.join(known)}")
        if mode is not None:
            given["mode"] = mode
        if (target := given.get("target", "inductor")) not in TARGETS:
            raise CompileError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
        if (name := given.get("mode")) not in (None, "default", *torch._inductor.list_mode_options()):
            raise CompileError(
                f"unknown mode {name!r}; known: default, {', '.join(torch._inductor.list_mode_options())}"
            )
        for option in ("calibration", "inductor", "expect"):
            if not isinstance(given.get(option, {}), Mapping):
                raise CompileError(f"options[{option!r}] is a mapping, not a {type(given[option]).__name__}")
        if given.get("recipe") is not None:
            given["recipe"] = load_recipe(given["recipe"])
        return cls(**given)
