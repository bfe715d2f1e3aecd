"""What is measured: models at their batch sizes, most important first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.gpu.chips import Gemm
from benchmarks.gpu.llama import LLAMA_8B, LlamaLayers, LlamaSize
from benchmarks.gpu.models import DIT_XL, VIT_BASE, VIT_LARGE, DiTBlocks, DiTSize, ViT, ViTSize

Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class ModelCase:
    """A model and the shapes of its inputs.

    Attributes:
        name: as `--only` takes it.
        make: gives the module on the default device.
        shapes: of the inputs, all of them floating point.
        layers: how many equal layers or blocks the time is also divided by; None where the model is whole.
        linears: how many linear layers the recipes quantize.
        gemms: its linear layers as matrix products, by name.
    """

    name: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    linears: int
    gemms: dict[str, Gemm]
    layers: int | None = None

    def inputs(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Random inputs, the same each time."""
        generator = torch.Generator(device).manual_seed(1)
        return tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for shape in self.shapes)


def vit(name: str, size: ViTSize, batch: int) -> ModelCase:
    rows, hidden = batch * size.tokens, size.hidden
    gemms = {
        "qkv": Gemm(rows, 3 * hidden, hidden),
        "proj": Gemm(rows, hidden, hidden),
        "fc1": Gemm(rows, size.mlp, hidden),
        "fc2": Gemm(rows, hidden, size.mlp),
    }
    shapes = ((batch, 3, size.image, size.image),)
    return ModelCase(f"{name}/{batch}", lambda: ViT(size), shapes, 4 * size.layers + 1, gemms)


def _llama_gemms(size: LlamaSize, rows: int) -> dict[str, Gemm]:
    """With q, k and v, and gate and up, side by side, as a compiler is free to have them."""
    hidden, heads = size.hidden, size.heads * size.head_size
    return {
        "qkv": Gemm(rows, heads + 2 * size.kv_heads * size.head_size, hidden),
        "o": Gemm(rows, hidden, heads),
        "gate_up": Gemm(rows, 2 * size.mlp, hidden),
        "down": Gemm(rows, hidden, size.mlp),
    }


def prefill(name: str, size: LlamaSize, tokens: int) -> ModelCase:
    gemms = _llama_gemms(size, tokens)
    shapes = ((1, tokens, size.hidden),)
    make = lambda: LlamaLayers(size, range(tokens))  # noqa: E731
    return ModelCase(f"{name}/prefill-{tokens}", make, shapes, 7 * size.layers, gemms, size.layers)


def decode(name: str, size: LlamaSize, batch: int, past: int) -> ModelCase:
    gemms = _llama_gemms(size, batch)
    cache = (batch, size.kv_heads, past, size.head_size)
    shapes = ((batch, 1, size.hidden), *[cache] * 2 * size.layers)
    make = lambda: LlamaLayers(size, range(past, past + 1))  # noqa: E731
    return ModelCase(f"{name}/decode-{batch}", make, shapes, 7 * size.layers, gemms, size.layers)


def dit(name: str, size: DiTSize, tokens: int, batch: int) -> ModelCase:
    rows, hidden = batch * tokens, size.hidden
    gemms = {
        "qkv": Gemm(rows, 3 * hidden, hidden),
        "proj": Gemm(rows, hidden, hidden),
        "fc1": Gemm(rows, size.mlp, hidden),
        "fc2": Gemm(rows, hidden, size.mlp),
    }
    shapes = ((batch, tokens, hidden), (batch, hidden))
    return ModelCase(f"{name}/{tokens}", lambda: DiTBlocks(size), shapes, 4 * size.layers, gemms, size.layers)


@dataclass(frozen=True)
class GemmCase:
    """One matrix product on its own. `name` is "gemm/" and where the shape is from."""

    name: str
    gemm: Gemm


Case = ModelCase | GemmCase


def all_cases(layers: int = 4, past: int = 1024, images: int = 16) -> list[Case]:
    """Most important first: what a bar is set for, then large before small.

    Args:
        layers: of the decoder and of the diffusion transformer.
        past: tokens in the cache of a decoding step.
        images: batch of the diffusion transformer.
    """
    llama, diffusion = replace(LLAMA_8B, layers=layers), replace(DIT_XL, layers=layers)
    first: list[ModelCase] = [vit("vit-large", VIT_LARGE, 64), prefill("llama-8b", llama, 4096)]
    rest: list[ModelCase] = [
        decode("llama-8b", llama, 64, past),
        vit("vit-base", VIT_BASE, 64),
        dit("dit-xl", diffusion, 1024, images),
        prefill("llama-8b", llama, 512),
        decode("llama-8b", llama, 1, past),
        vit("vit-large", VIT_LARGE, 8),
        dit("dit-xl", diffusion, 256, images),
        decode("llama-8b", llama, 8, past),
        vit("vit-base", VIT_BASE, 8),
        vit("vit-large", VIT_LARGE, 1),
        vit("vit-base", VIT_BASE, 1),
    ]
    gemms = gemm_cases([*first, *[case for case in rest if case.name in _WITH_GEMMS]])
    large = [case for case in gemms[: len(first) * 4] if case.name.endswith(("/fc1", "/fc2", "/gate_up", "/down"))]
    return [*first, *large, *rest, *[case for case in gemms if case not in large]]


_WITH_GEMMS = ("llama-8b/decode-64", "dit-xl/1024", "llama-8b/decode-1")


def tiny_cases() -> list[Case]:
    """One of each kind, small enough for a CPU."""
    llama = LlamaSize(hidden=256, heads=4, kv_heads=2, mlp=384, layers=2)
    models = [
        vit("vit", ViTSize(hidden=128, layers=2, heads=4, mlp=256, image=32, patch=8, classes=16), 2),
        prefill("llama", llama, 16),
        decode("llama", llama, 2, past=16),
        dit("dit", DiTSize(hidden=128, heads=4, mlp=256, layers=1), 16, batch=2),
    ]
    return [models[0], *gemm_cases(models[:1])[:1], *models[1:]]


def gemm_cases(models: list[ModelCase]) -> list[GemmCase]:
    """The products of `models`, each shape once."""
    found: dict[Gemm, GemmCase] = {}
    for case in models:
        for name, gemm in case.gemms.items():
            found.setdefault(gemm, GemmCase(f"gemm/{case.name}/{name}", gemm))
    return list(found.values())
