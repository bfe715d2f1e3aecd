"""Recipes that leave a part out: rules that are missing, quantizers that are switched off, leave a legal file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qcompile
from qcompile.errors import RecipeError
from qcompile.recipe.files import list_recipes


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 16)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
        self.down_proj = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.bias = nn.Parameter(torch.randn(3, 48, 32) / 6), nn.Parameter(torch.randn(3, 48))
        self.down_proj = nn.Parameter(torch.randn(3, 32, 48) / 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ops.qcompile.batched_linear(x.reshape(1, -1, 32), self.up_proj, self.bias).relu()
        out: Tensor = torch.ops.qcompile.batched_linear(hidden, self.down_proj).mean(0).reshape(x.shape)
        return out


class Model(nn.Module):
    """Something for every kind of rule: patches, attention, an MLP, experts, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.lm_head = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 24)
        self.attn, self.mlp, self.experts, self.norm = Attention(), Mlp(), Experts(), nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attn(x)
        y = self.norm(x)
        out: Tensor = self.lm_head(x + self.mlp(y) + self.experts(y))
        return out


X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LINEARS = [
    *(f"attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    *("experts.up_proj", "experts.down_proj", "patches"),
]  # fmt: skip
QUANTIZERS = [
    *(f"{layer}.{side}_quantizer" for layer in LINEARS for side in ("weight", "input", "*")),
    *(f"attn.{operand}_bmm_quantizer" for operand in ("q", "k", "v", "softmax")),
]


def recipe(name: str, missing: set[int], off: list[str]) -> dict[str, Any]:
    full = qcompile.load_recipe(name)
    rules = [r.model_dump(exclude_none=True) for index, r in enumerate(full.rules) if index not in missing]
    return {
        "metadata": {"name": "parts", "description": "Parts of a shipped recipe."},
        "rules": [*rules, *({"quantizer": quantizer, "enable": False} for quantizer in off)],
    }


def exports(chosen: dict[str, Any], folder: Path) -> bool:
    """Whether the recipe quantizes anything that a target multiplies; if so both files were written and verified."""
    try:
        program = qcompile.quantize(Model().eval(), (X,), recipe=chosen, calibration=[X], progress=False)
    except RecipeError as error:
        assert "quantiz" in str(error)
        return False
    for target in ("portable", "tensorrt"):
        report = qcompile.export_onnx(program, folder / "m.onnx", target=target)  # type: ignore[arg-type]
        assert all(check.passed for check in report.checks)
        assert {*report.quantized, *report.unquantized} >= {*LINEARS, "attn"}, "something is in no list"
    return True


@pytest.mark.everyday(1)
@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("fp8", ["experts.*", "attn.q_bmm_quantizer", "mlp.up_proj.input_quantizer"]),
        ("nvfp4", ["experts.down_proj.*", "attn.k_proj.*", "mlp.gate_proj.weight_quantizer"]),
    ],
)
def test_one_of_a_pair_and_experts(name: str, off: list[str], tmp_path: Path) -> None:
    assert exports(recipe(name, set(), off), tmp_path)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_subset(data: st.DataObject, tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(list_recipes()), "recipe")
    count = len(qcompile.load_recipe(name).rules)
    missing = data.draw(st.sets(st.integers(0, count - 1), max_size=count), "missing")
    off = data.draw(st.lists(st.sampled_from(QUANTIZERS), max_size=4), "off")
    exports(recipe(name, missing, off), tmp_path)
