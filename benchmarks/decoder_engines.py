"""Claim: one engine of a decoder with an FP8 cache has fused FP8 attentions for prompts and for every token after them.

For each model, recipe and target: quantize with a cache, export, build the two profiles of generation, and read the
builder's layer list. The rival is the same model with the same recipe and no cache, in the same builder.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cyclopts
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim

import qcompile
from benchmarks import record
from benchmarks.fast import of_max
from qcompile import EngineReport, GenerationProfiles
from qcompile.engine.layers import Layer

app = cyclopts.App(help=__doc__)

LIMITS = GenerationProfiles(context=512, prompt=256, batch=4)
BLOCKS, WIDTH, VOCABULARY = 2, 64, 256
_WINDOW = 48

Config = transformers.PreTrainedConfig


def _common() -> dict[str, Any]:
    return {
        "num_hidden_layers": BLOCKS,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": WIDTH,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
    }


def _gemma3() -> Config:
    kinds = ["sliding_attention", "full_attention"]
    return transformers.Gemma3TextConfig(**_common(), sliding_window=_WINDOW, layer_types=kinds)


MODELS: Mapping[str, Callable[[], Config]] = {
    "llama": lambda: transformers.LlamaConfig(**_common()),
    "qwen3": lambda: transformers.Qwen3Config(**_common() | {"head_dim": 2 * WIDTH}),
    "gemma3": _gemma3,
    "mixtral": lambda: transformers.MixtralConfig(**_common(), num_local_experts=4),
}
RECIPES: Mapping[str, Sequence[str]] = {
    "fp8": ("sm89", "sm120"),
    "nvfp4_fp8_attention": ("sm120",),
}
"""Recipe, to which `fp8_kv` is added -> its targets."""


@dataclass(frozen=True)
class Row:
    """One profile of one engine; `misses` are the bars that it does not reach, in words.

    gemm_low: GEMM kernels in the recipe's types; gemm_wide: modules that the file quantizes and that run wider.
    copies: kernels that write a whole cache, in whatever form, other than those that append.
    added: kernels that each block has more than the model without a cache; None for single tokens, which that lacks.
    """

    model: str
    recipe: str
    target: str
    profile: str
    kernels: int
    attention_total: int
    attention_fp8: int
    gemm_low: int
    gemm_wide: int
    copies: int
    added: float | None
    misses: tuple[str, ...]

    def cells(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "recipe": self.recipe,
            "target": self.target,
            "profile": self.profile,
            "attention FP8": f"{self.attention_fp8}/{self.attention_total}",
            "GEMMs low": f"{self.gemm_low}/{self.gemm_low + self.gemm_wide}",
            "kernels": self.kernels,
            "copies": self.copies,
            "added a block": self.added,
            "ok": not self.misses,
        }


class Logits(nn.Module):
    """A decoder without its cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def export(name: str, recipe: str, path: Path, *, cache: bool) -> None:
    """Quantize and export a model to `path`."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    ids = torch.randint(0, VOCABULARY, (2, 64))
    options: dict[str, Any] = {"dtype": torch.float16, "progress": False}
    if cache:
        whole = of_max(f"{recipe}+fp8_kv")
        program = qcompile.quantize(model, recipe=whole, calibration=[ids], cache="dynamic", **options)
    else:
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        axes = {0: Dim("batch", min=1), 1: Dim("sequence", min=2)}
        options |= {"kwargs": kwargs, "dynamic_shapes": dict.fromkeys(kwargs, axes)}
        program = qcompile.quantize(Logits(model), recipe=of_max(recipe), calibration=[kwargs], **options)
    qcompile.export_onnx(program, path, target="tensorrt")


def copies(layers: Sequence[Layer]) -> list[str]:
    """Kernels that write something as large as a cache and no cache that is given back.

    Of single tokens: there, batch and past alone are dynamic, and all but keys, values and masks is without a past.
    """

    def whole(shape: tuple[int, ...]) -> bool:
        return shape.count(-1) >= 2 and max(shape, default=0) >= WIDTH

    return [
        layer.name
        for layer in layers
        if layer.is_kernel
        and any(whole(tensor.shape) and not tensor.name.startswith("present.") for tensor in layer.outputs)
    ]


def measure(name: str, recipe: str, targets: Sequence[str]) -> Iterator[Row]:
    """The rows of one model and recipe."""
    with tempfile.TemporaryDirectory() as folder:
        cached, plain = Path(folder) / "cached.onnx", Path(folder) / "plain.onnx"
        export(name, recipe, cached, cache=True)
        export(name, recipe, plain, cache=False)
        assert LIMITS.prompt is not None
        sizes = {"batch": (1, LIMITS.batch, LIMITS.batch), "sequence": (32, LIMITS.prompt // 2, LIMITS.prompt)}
        for target in targets:
            built = qcompile.build_engine(cached, target=target, profiles=LIMITS, progress=False)
            without = qcompile.build_engine(plain, target=target, profiles=sizes, progress=False)
            yield from judge(name, recipe, built, without)


def judge(name: str, recipe: str, built: EngineReport, without: EngineReport) -> Iterator[Row]:
    """Hold each profile against the bars."""
    for index, counts in enumerate(built.profiles):
        decodes = counts.name == "decode"
        found = copies([layer for layer in built.layers if layer.profile == index]) if decodes else []
        wide = [
            gap for gap in counts.not_low_precision if gap.kind == "gemm" and "quantized in the file, but" in gap[2]
        ]
        added = None if decodes else (counts.kernels - without.kernels) / BLOCKS
        misses = [f"{gap.module} {gap.reason}" for gap in wide]
        misses += [f"{kernel} writes a whole cache" for kernel in found]
        if not counts.attention.fp8 == counts.attention.total == BLOCKS:
            misses.append(f"{counts.attention.fp8} of {BLOCKS} attentions in FP8")
        if added is not None and added > 2:
            misses.append(f"{added} kernels more in each block than without a cache")
        yield Row(
            model=name,
            recipe=recipe,
            target=built.target,
            profile=counts.name,
            kernels=counts.kernels,
            attention_total=counts.attention.total,
            attention_fp8=counts.attention.fp8,
            gemm_low=counts.gemms["fp8"] + counts.gemms["fp4"],
            gemm_wide=len(wide),
            copies=len(found),
            added=added,
            misses=tuple(misses),
        )


@app.default
def main(*, models: list[str] | None = None, recipes: list[str] | None = None, output: Path | None = None) -> int:
    """Build every model for every target. Exit code 1 if any bar is missed.

    Parameters
    ----------
    models: some of llama, qwen3, gemma3, mixtral; all of them without it.
    recipes: fp8, nvfp4_fp8_attention, or both.
    output: JSON file, in place of benchmarks/results/decoder_engines.json.
    """
    rows = []
    for name in models or MODELS:
        for recipe in recipes or RECIPES:
            for row in measure(name, recipe, RECIPES[recipe]):
                rows.append(row)
                print(f"{name} {recipe} {row.target} {row.profile}: {'; '.join(row.misses) or 'ok'}", file=sys.stderr)
    record.show("Engines of decoders with an FP8 cache", [row.cells() for row in rows])
    record.write("decoder_engines", [asdict(row) for row in rows], output, **asdict(LIMITS), blocks=BLOCKS)
    return int(any(row.misses for row in rows))


if __name__ == "__main__":
    sys.exit(app())
