"""What `qcompile.quantize` and `load_checkpoint` made, through torch.compile: the numbers of the program itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.checkpoint.load import load_checkpoint
from qcompile.recipe import list_recipes
from qcompile.schemes.scheme import FP8_BLOCK, FP8_TENSOR, INT8_CHANNEL_TOKEN, NVFP4_W4A4
from tests.passes.support import Attention
from tests.qcompile.dynamo.support import assert_same, compiled

X = torch.randn(2, 24, 128, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Attention and an MLP, wide enough for blocks of 128."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.o_proj = Attention(2, 64), nn.Linear(128, 128)
        self.mlp = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o_proj(self.attention(x).transpose(1, 2).flatten(2))
        return x + self.mlp(x)  # type: ignore[no-any-return]


def program(recipe: Any = "fp8", dtype: torch.dtype = torch.float32) -> Any:
    """The module of a quantized program with weights of its own."""
    model = Block().eval()
    return qcompile.quantize(
        model, (X,), recipe=recipe, calibration=[X], dtype=dtype, progress=False
    ).module()  # fmt: skip


@pytest.mark.everyday(1)
@pytest.mark.parametrize("recipe", list_recipes())
def test_a_program_of_each_recipe_computes_the_same(recipe: str) -> None:
    module = program(recipe)
    run = compiled(module, None, expect={"linear": 2})
    with torch.no_grad():
        assert_same(run(X), module(X))


@pytest.mark.parametrize(
    "recipe",
    ["fp8", *(pytest.param(r, marks=pytest.mark.slow) for r in list_recipes() if r != "fp8")],
)
def test_through_inductor(recipe: str) -> None:
    module = program(recipe)
    run = compiled(module, None, target="inductor")
    with torch.no_grad():
        assert_same(run(X), module(X))


@pytest.mark.slow
def test_rotation_and_half_precision() -> None:
    recipe = qcompile.load_recipe("nvfp4", ["rules[format=nvfp4].rotate=true"])
    module = program(recipe, torch.bfloat16)
    with torch.no_grad():
        assert_same(compiled(module, None)(X), module(X))


def test_attention_stays_fused() -> None:
    run = compiled(program("fp8"), None, expect={"attention": 1})
    with torch.no_grad():
        run(X)
    assert qcompile.explain(run).graphs[0].coverage["attention"] == (1, 1)


@pytest.mark.slow
def test_codes_and_scales_of_now() -> None:
    first, second = program(), program()
    run, other = compiled(first, None), compiled(second, None)
    with torch.no_grad():
        for _ in range(2):
            assert_same(run(X), first(X))
            assert_same(other(X), second(X))
            first.get_buffer("o_proj.weight_scale").mul_(2)
        first.load_state_dict(second.state_dict())
        assert_same(run(X), second(X))


@pytest.mark.slow
def test_experts() -> None:
    pytest.importorskip("transformers")
    from tests.qcompile.frontends.tiny import IDS, tiny_model

    quantized = qcompile.quantize(
        tiny_model("qwen3_moe", num_hidden_layers=1, use_cache=False),
        (IDS,), recipe="fp8", calibration=[IDS], dtype=torch.float32, progress=False,
    )  # fmt: skip
    module = quantized.module()
    with torch.no_grad():
        assert_same(compiled(module, None)(IDS)["logits"], module(IDS)["logits"])


CHECKPOINTS = [
    ("llama", "fp8", FP8_BLOCK),
    ("llama", "modelopt", NVFP4_W4A4),
    ("qwen3", "compressed-tensors", INT8_CHANNEL_TOKEN),
    ("qwen3_moe", "modelopt", FP8_TENSOR),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fmt", "scheme"), CHECKPOINTS)
def test_a_checkpoint_computes_what_its_imported_program_does(kind: str, fmt: str, scheme: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.qcompile.frontends.tiny import IDS, tiny_model, write_checkpoint

    write_checkpoint(tmp_path, tiny_model(kind, num_hidden_layers=1, use_cache=False), fmt, scheme)
    model = load_checkpoint(tmp_path)
    run = compiled(model, None)
    imported = qcompile.import_quantized(model, (), {"input_ids": IDS}, dtype=torch.float32).module()
    with torch.no_grad():
        want = imported(input_ids=IDS)["logits"]
        assert_same(run(input_ids=IDS).logits, want)
        for name, buffer in model.named_buffers():
            if name.endswith("input_scale"):
                buffer.mul_(0.5)
        layer = next(m for m in model.modules() if isinstance(m, qcompile.schemes.layer.QuantizedLinear))
        layer.weight = nn.Parameter(layer.codes.flip(0), requires_grad=False)
        assert not torch.equal(run(input_ids=IDS).logits, want)
        assert_same(run(input_ids=IDS).logits, model(input_ids=IDS).logits)
