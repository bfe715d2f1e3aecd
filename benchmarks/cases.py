"""The rows of the fusion benchmark: which models, in which dtype, and what the engine of each has to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch

from benchmarks import models
from benchmarks.models import Example, Size


@dataclass(frozen=True)
class Case:
    """A model to compile with a recipe, and its bars.

    Attributes:
        make: builds it in a given size.
        full, tiny: the sizes of the benchmark and of the tests.
        dtype: what the program computes in.
        recipe: the shipped recipe.
        targets: what engines are built for.
        fp8_attention: the recipe quantizes attention.
        gemms: what the engine has to multiply the linear layers in: module path as a glob -> type, later ones win.
        per_block: most kernels that one more block may cost; None is no bar.
        beats_half: whether the engine must, at full depth, have fewer kernels than that of the unquantized model.
        excluded: last components of module paths whose GEMMs the recipe leaves out.
    """

    name: str
    make: Callable[[Size], Example]
    full: Size
    tiny: Size
    dtype: torch.dtype = torch.float16
    recipe: str = "fp8"
    targets: tuple[str, ...] = ("sm89", "sm120")
    fp8_attention: bool = True
    gemms: Mapping[str, str] = field(default_factory=lambda: {"*": "fp8"})
    per_block: int | None = None
    beats_half: bool = False
    excluded: tuple[str, ...] = ()

    def example(self, *, tiny: bool = False, layers: int | None = None) -> Example:
        """The model with its inputs, with `layers` blocks in place of the size's own."""
        size = self.tiny if tiny else self.full
        return self.make(models.with_layers(size, layers or size.layers))

    def layers(self, *, tiny: bool = False) -> int:
        return (self.tiny if tiny else self.full).layers

    def wanted(self, module: str) -> str:
        """The type that the GEMM of `module` has to run in."""
        return [precision for glob, precision in self.gemms.items() if fnmatchcase(module, glob)][-1]

    def is_excluded(self, module: str) -> bool:
        return module.rpartition(".")[2] in self.excluded


# The angles of a dynamic RoPE are a tiny matmul at run time, of position and frequency: no linear layer.
_LLAMA_WIDE = ("lm_head", "rotary_emb")


def _vit(name: str, make: Callable[[Size], Example], excluded: tuple[str, ...] = ()) -> Case:
    return Case(name, make, models.VIT_BASE, models.VIT_TINY, per_block=10, beats_half=True, excluded=excluded)


def _llama(name: str, dtype: torch.dtype, dynamic: bool) -> Case:
    make, sizes = partial(models.llama, dynamic=dynamic), (models.LLAMA, models.LLAMA_TINY)
    # of an unbounded length causal attention is an operator, with a kernel behind it that quantizes
    return Case(name, make, *sizes, dtype=dtype, per_block=10 if dynamic else 9, excluded=_LLAMA_WIDE)


def _nvfp4(name: str, make: Callable[[Size], Example], full: Size, tiny: Size, **bars: Any) -> Case:
    gemms = {"*": "fp4", "*patch_embedding*": "fp8"}  # a convolution in the model
    return Case(name, make, full, tiny, recipe="nvfp4_fp8_attention", targets=("sm120",), gemms=gemms, **bars)


def _mixed(name: str, make: Callable[[Size], Example]) -> Case:
    gemms = {"*": "fp8", "*.mlp.*": "fp4"}
    sizes = models.LLAMA, models.LLAMA_TINY
    recipe = "fp8_qkvo-nvfp4_mlp"
    return Case(name, make, *sizes, recipe=recipe, targets=("sm120",), gemms=gemms, excluded=_LLAMA_WIDE)


def _dynamic_scales(name: str, recipe: str, make: Callable[[Size], Example], full: Size, tiny: Size) -> Case:
    return Case(name, make, full, tiny, recipe=recipe, fp8_attention=False, excluded=_LLAMA_WIDE)


CASES = (
    _vit("vit", models.vit),
    _vit("vit-wrapped", partial(models.vit, wrapped=True)),
    _vit("vit-eager", partial(models.vit, attention="eager")),
    _vit("vit-true-mask", partial(models.vit, mask=True)),
    _vit("vit-dynamic-batch", partial(models.vit, dynamic=True)),
    _vit("timm", models.timm_vit, ("head",)),
    _vit("timm-unfused", partial(models.timm_vit, fused=False), ("head",)),
    _vit("timm-true-mask", partial(models.timm_vit, mask=True), ("head",)),
    _llama("llama-fp16", torch.float16, dynamic=False),
    _llama("llama-bf16", torch.bfloat16, dynamic=False),
    _llama("llama-fp16-dynamic", torch.float16, dynamic=True),
    _llama("llama-bf16-dynamic", torch.bfloat16, dynamic=True),
    # with tokens a multiple of 128 TensorRT pads no scales
    _nvfp4("vit-nvfp4", models.vit, models.VIT_BASE, models.VIT_TINY, per_block=18),
    _nvfp4("vit-nvfp4-256-tokens", models.siglip, models.SIGLIP_BASE, models.SIGLIP_TINY, per_block=14),
    _nvfp4("llama-nvfp4", models.llama, models.LLAMA, models.LLAMA_TINY, per_block=19, excluded=_LLAMA_WIDE),
    _nvfp4(
        "llama-nvfp4-dynamic",
        partial(models.llama, dynamic=True),
        models.LLAMA,
        models.LLAMA_TINY,
        per_block=19,
        excluded=_LLAMA_WIDE,
    ),
    _mixed("llama-mixed", models.llama),
    _mixed("llama-mixed-dynamic", partial(models.llama, dynamic=True)),
    _dynamic_scales("vit-fp8-block", "fp8_block", models.vit, models.VIT_BASE, models.VIT_TINY),
    _dynamic_scales("llama-fp8-block", "fp8_block", models.llama, models.LLAMA, models.LLAMA_TINY),
    _dynamic_scales("llama-per-token", "fp8_per_channel_per_token", models.llama, models.LLAMA, models.LLAMA_TINY),
    Case("bert", models.bert, models.BERT_BASE, models.BERT_TINY),
    Case("bert-dynamic", partial(models.bert, dynamic=True), models.BERT_BASE, models.BERT_TINY),
    Case("minilm", models.minilm, models.MINILM, models.MINILM_TINY),
    Case(
        "minilm-dynamic",
        partial(models.minilm, dynamic=True),
        models.MINILM,
        models.MINILM_TINY,
    ),
)
