"""compare_layers: equal codes where the lowering is right, and the layer that is wrong where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from onnxscript import opset21
from torch import Tensor, nn

import qcompile
from passes.ir import QUANTIZE
from qcompile.errors import CalibrationError
from qcompile.onnx import export as export_module
from qcompile.onnx.ops import translation_table

X = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(32), *(nn.Linear(32, 32) for _ in range(3))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        h = self.norm(input)
        q, k, v = (f(h).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = input + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return {"y": x + self.down(F.gelu(self.up(x)))}


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    recipe = qcompile.load_recipe("fp8").model_dump(exclude_none=True)
    recipe["calibration"] = {**recipe["calibration"], "power_of_two": True}
    return qcompile.quantize(Layers().eval(), (X,), recipe=recipe, calibration=[X], dtype=torch.float32, progress=False)


@pytest.mark.parametrize("target", ["tensorrt", "portable"])
def test_codes_are_equal_in_float32(program: torch.export.ExportedProgram, tmp_path: Path, target: Any) -> None:
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target=target, compare=X)
    assert report.comparison is not None
    codes = {d.name: d.unequal for d in report.comparison.differences if d.unequal is not None}
    # norm -> q, k, v; up; down; q; k; v; the probabilities: TensorRT fuses none in float32 that no quantizer reads
    assert len(codes) == (3 if target == "tensorrt" else 7)
    assert set(codes.values()) == {0.0}
    assert report.comparison["y"].relative_l2 < 1e-5
    assert report.comparison.worst(1)[0].badness < 1e-3


def test_a_wrong_lowering_is_the_worst_layer(
    program: torch.export.ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer_norm = torch.ops.aten.layer_norm.default

    def wrong_table(opset: int) -> dict[Any, Any]:
        def wrong(x: Any, shape: Any, weight: Any, bias: Any, eps: float = 0, cudnn_enable: bool = True) -> Any:
            made = opset21.LayerNormalization(x, weight, bias, axis=-1, epsilon=0.5)
            return made[0] if isinstance(made, (tuple, list)) else made  # it has two more outputs

        return {**translation_table(opset), layer_norm: wrong}

    monkeypatch.setattr(export_module, "translation_table", wrong_table)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", compare=X)
    assert report.comparison is not None
    worst, second = report.comparison.worst(2)
    assert worst.name.startswith("layer_norm") and worst.relative_l2 > 0.1
    assert second.relative_l2 < 1e-3, "layers behind the wrong one get the right inputs"


def test_wrong_codes_are_counted(
    program: torch.export.ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_table(opset: int) -> dict[Any, Any]:
        table = translation_table(opset)
        right = table[QUANTIZE]

        def wrong(x: Any, scale: Any, format: str) -> Any:
            return right(opset21.Mul(x, x), scale, format)

        return {**table, QUANTIZE: wrong}

    monkeypatch.setattr(export_module, "translation_table", wrong_table)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", compare=X)
    assert report.comparison is not None
    assert max(d.unequal or 0 for d in report.comparison.differences) > 0.5


def test_a_batch_that_does_not_fit(program: torch.export.ExportedProgram, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"the batch is called as model\(x=Tensor\)"):
        qcompile.export_onnx(program, tmp_path / "m.onnx", compare={"x": X})
    assert not list(tmp_path.iterdir())


class Codebook(nn.Module):
    """The entry of a codebook that is nearest to each vector: of two that are as near, the dtype decides."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.after = nn.Linear(32, 32), nn.Linear(32, 32)
        self.entries = nn.Embedding(256, 32)

    def forward(self, x: Tensor) -> Tensor:
        y, entries = self.layer(x), self.entries.weight
        distances = (y[..., None, :] - entries).square().sum(-1)
        result: Tensor = self.after(self.entries(distances.argmin(-1)))
        return result


def test_what_is_chosen_is_chosen_by_the_numbers_of_the_program(tmp_path: Path) -> None:
    program = qcompile.quantize(Codebook().eval(), (X,), recipe="fp8", calibration=[X], progress=False)
    comparison = qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable", compare=X).comparison
    assert comparison is not None
    assert max(d.elements for d in comparison.differences) == 2 * 32 * 256  # the distances end a layer
    assert comparison["embedding"].relative_l2 == 0
