"""The rows of the fusion benchmark: which models, in which dtype, and what the engine of each has to reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import models
from benchmarks.models import Example, Size


@dataclass(frozen=True)
class Case:
    """A model to compile with the recipe `fp8`, and its bars.

    Attributes:
        make: builds it in a given size.
        full, tiny: the sizes of the benchmark and of the tests.
        dtype: what the program computes in.
        per_block: most kernels that one more block may cost; None is no bar.
        beats_half: whether the engine must, at full depth, have fewer kernels than that of the unquantized model.
        excluded: last components of module paths whose GEMMs the recipe leaves out.
    """

    name: str
    make: Callable[[Size], Example]
    full: Size
    tiny: Size
    dtype: torch.dtype = torch.float16
    per_block: int | None = None
    beats_half: bool = False
    excluded: tuple[str, ...] = ()

    def example(self, *, tiny: bool = False, layers: int | None = None) -> Example:
        """The model with its inputs, with `layers` blocks in place of the size's own."""
        size = self.tiny if tiny else self.full
        return self.make(models.with_layers(size, layers or size.layers))

    def layers(self, *, tiny: bool = False) -> int:
        return (self.tiny if tiny else self.full).layers

    def is_excluded(self, module: str) -> bool:
        return module.rpartition(".")[2] in self.excluded


def _vit(name: str, make: Callable[[Size], Example], excluded: tuple[str, ...] = ()) -> Case:
    return Case(name, make, models.VIT_BASE, models.VIT_TINY, per_block=10, beats_half=True, excluded=excluded)


def _llama(name: str, dtype: torch.dtype, dynamic: bool) -> Case:
    # The angles of a dynamic RoPE are a tiny matmul at run time, of position and frequency: no linear layer.
    excluded = ("lm_head", "rotary_emb")
    make = partial(models.llama, dynamic=dynamic)
    return Case(name, make, models.LLAMA, models.LLAMA_TINY, dtype=dtype, per_block=11, excluded=excluded)


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
