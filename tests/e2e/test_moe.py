"""Mixtures of experts, from the module to the file: fused weights, a layer each, and what no form is known for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompile
from passes.graph import aten

pytest.importorskip("transformers")

from benchmarks import moe_models

MODELS = [moe_models.qwen3_moe, partial(moe_models.deepseek_v3, dynamic=True), moe_models.gpt_oss]


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS, ids=["qwen3_moe", "deepseek_v3-dynamic", "gpt_oss"])
def test_every_expert_is_quantized_and_the_file_agrees(make: Any, tmp_path: Path) -> None:
    example = make()
    program = example.quantized(dtype=torch.float32)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx")
    done, total = report.coverage["experts"]
    assert done == total >= 2
    assert report.quantized["model.layers.1.mlp.experts.gate_up_proj"] == "fp8"
    routers = {name for name, kind in report.unquantized.items() if kind == "linear"} - {"lm_head"}
    assert routers and all(name.endswith(("gate", "router")) for name in routers)
    session = qcompile.onnx_session(tmp_path / "m.onnx")
    found = session.run(None, {"input_ids": example.kwargs["input_ids"].numpy()})[0]
    expected = program.module()(**example.kwargs).logits.detach().numpy()
    # an expert that is a hair's breadth from being chosen may change, and with it one token
    errors = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(errors) < 0.02


class Experts(nn.Module):
    """All experts on every token, `[T,H]` and routing weights `[T,E]`: one layer each, or a fused weight."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.layers = nn.ModuleList(nn.Linear(32, 64) for _ in range(4)) if form == "layers" else None
        self.up = nn.Parameter(torch.randn(4, 32, 64) / 8)
        self.norm = nn.LayerNorm(32)
        self.down = nn.Linear(64, 32) if form == "gathered" else None  # a recipe that quantizes nothing is an error

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        x = self.norm(x)
        if self.layers is not None:
            parts = [layer(x) * weights[:, i, None] for i, layer in enumerate(self.layers)]
        elif self.form == "slices":
            parts = [x @ self.up[i] * weights[:, i, None] for i in range(4)]
        elif self.form == "functional":
            parts = [F.linear(x, self.up[i].t()) * weights[:, i, None] for i in range(4)]
        elif self.form == "einsum":
            return torch.einsum("teh,te->th", torch.einsum("td,edh->teh", x, self.up), weights)
        else:
            chosen = self.up[weights.argmax(-1)]
            return self.down(torch.bmm(x.unsqueeze(1), chosen).squeeze(1))
        return torch.stack(parts).sum(0)


def report_of(form: str, path: Path, recipe: str = "fp8") -> tuple[qcompile.Report, Any, Any]:
    args = (torch.randn(40, 32), torch.rand(40, 4))
    model = Experts(form).eval()
    program = qcompile.quantize(model, args, calibration=[args], recipe=recipe, progress=False, dtype=torch.float32)
    with torch.no_grad():
        expected = model(*args)
        error = (program.module()(*args) - expected).norm() / expected.norm()
    assert error < 0.1
    return qcompile.export_onnx(program, path / "m.onnx", compare=args), program, args


def test_a_layer_for_each_expert_is_an_ordinary_linear(tmp_path: Path) -> None:
    report, _, _ = report_of("layers", tmp_path)
    assert report.quantized == {"norm": "fp8"} | {f"layers.{i}": "fp8" for i in range(4)} and not report.unquantized
    assert report.coverage == {"linear": (4, 4)}


@pytest.mark.parametrize("form", ["slices", "functional"])
def test_slices_of_a_fused_weight_are_linears(form: str, tmp_path: Path) -> None:
    report, program, _ = report_of(form, tmp_path)
    assert set(report.quantized.values()) == {"fp8"} and report.unquantized == {}
    floats = [name for name, p in program.state_dict.items() if p.ndim >= 2 and p.dtype is torch.float32]
    assert floats == []


@pytest.mark.everyday(1)
@pytest.mark.parametrize("recipe", ["fp8", "fp8_per_channel_per_token", "int8"])
def test_an_einsum_over_experts(recipe: str, tmp_path: Path) -> None:
    report, _, _ = report_of("einsum", tmp_path, recipe)
    assert report.coverage == {"experts": (1, 1)} and list(report.quantized) == ["up"]
    assert report.comparison is not None and report.comparison.worst(1)[0].badness < 0.01


def test_a_gathered_weight_never_goes_unnoticed(tmp_path: Path) -> None:
    report, program, _ = report_of("gathered", tmp_path)
    assert report.unquantized == {"up": "experts"} and report.coverage == {"linear": (1, 1), "experts": (0, 1)}
    assert [d.reason for d in report.declined if "give qcompile.quantize the module" in d.reason]
    assert any(node.target is aten.bmm.default for node in program.graph.nodes)
