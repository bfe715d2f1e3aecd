"""The models of the coverage table, in one place: to add one, write a builder and give it a row here.

Builders of models that need an optional package import it at the top of their module, so they are named by module and
function and imported when the row is run.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from benchmarks.models import Example


@dataclass(frozen=True)
class Model:
    """One model of the table.

    Attributes:
        name: row of the table.
        builder: "module:function" under `benchmarks`; the function takes `dynamic` and returns an Example.
        attentions: how many attention nodes the graph has, those that a recipe leaves out included.
        dtype: what the program computes in.
        forms: values of `dynamic` that the model supports.
        known: what runs in half precision although a recipe names it, "kind module" as a glob -> the reason. What a
            recipe leaves out is known already, anything else in half precision is reported as unexplained.
    """

    name: str
    builder: str
    attentions: int
    dtype: torch.dtype = torch.float16
    forms: tuple[bool, ...] = (False, True)
    known: Mapping[str, str] = field(default_factory=dict)

    def example(self, *, dynamic: bool) -> Example:
        module, _, function = self.builder.partition(":")
        example = getattr(importlib.import_module(f"benchmarks.{module}"), function)(dynamic=dynamic)
        assert isinstance(example, Example)
        return example

    def reason(self, kind: str, module: str) -> str | None:
        """Why this attention, GEMM or convolution need not run in low precision; None if nothing is known."""
        return next((why for glob, why in self.known.items() if fnmatchcase(f"{kind} {module}", glob)), None)


_ROPE = {"gemm *rotary_emb*": "angles of a dynamic rotary embedding, position times frequency: no layer"}

ZOO: tuple[Model, ...] = (
    Model("llama", "language:llama", attentions=2, known=_ROPE),
    Model("llama-bf16", "language:llama", attentions=2, dtype=torch.bfloat16, known=_ROPE),
    Model("qwen3", "language:qwen3", attentions=2, known=_ROPE),
    Model("gemma3", "language:gemma3", attentions=2, known=_ROPE),
    Model("gemma3-bf16", "language:gemma3", attentions=2, dtype=torch.bfloat16, known=_ROPE),
    Model("deepseek-v3-dense", "language:deepseek_v3", attentions=2, known=_ROPE),
    Model("mixtral", "moe_models:mixtral", attentions=2, known=_ROPE),
    Model("qwen3-moe", "moe_models:qwen3_moe", attentions=2, known=_ROPE),
    Model("deepseek-v3", "moe_models:deepseek_v3", attentions=2, known=_ROPE),
    Model("clip-vision", "vision:clip_vision", attentions=2),
    Model("siglip-vision", "vision:siglip_vision", attentions=3),
    Model("swin", "vision:swin", attentions=4),
    Model("whisper-encoder", "vision:whisper_encoder", attentions=2),
    Model("flux", "diffusion_models:flux", attentions=3),
    Model("flux-bf16", "diffusion_models:flux", attentions=3, dtype=torch.bfloat16),
    Model("flux2", "diffusion_models:flux2", attentions=3),
    Model("sd3", "diffusion_models:sd3", attentions=2),
    Model("sd3.5", "diffusion_models:sd35", attentions=3),
)
