"""Claims: exact FP8 and NVFP4 codes of weights, equal codes out of every Q, and a shape on every Q/DQ output.

Judges that share no code with qcompile: ml_dtypes for FP8 weights, nvidia-modelopt for NVFP4 weights, ONNX Runtime (for
NVFP4 `onnx.reference`) for the activations, and `onnx.shape_inference` for the shapes. The model is MiniLM with its
real weights, on real sentences.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import starmap
from pathlib import Path
from typing import Any

import cyclopts
import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import inliner, numpy_helper, shape_inference

import qcompile
from benchmarks import fp4_codes, record
from benchmarks.accuracy_minilm import tokenize
from benchmarks.models import load_minilm
from benchmarks.sentences import sentences
from benchmarks.stored import module_of, parts_of

app = cyclopts.App(help=__doc__)


def stored_weights(model: onnx.ModelProto) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Module path, codes [K, N] or [N, K] as stored, and scale of each FP8 weight, read off its DequantizeLinear."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            codes, scale = (numpy_helper.to_array(constants[name]) for name in node.input[:2])
            yield module_of(node), codes, scale


def unequal_weights(model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> tuple[int, int, int]:
    """How many codes differ from the fp32 reference, of how many, in how many weights.

    Args:
        weights: state dict of the model that was quantized. Linears that were merged have a path `a.q+k+v`.
    """
    wrong = total = count = 0
    for module, codes, scale in stored_weights(model):
        weight = np.concatenate([weights[f"{path}.weight"].astype(np.float32) for path in parts_of(module)])
        expected = np.clip(weight / scale.astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn)
        stored = codes.T if codes.shape != weight.shape or _is_transposed(codes, expected) else codes
        wrong += int((stored.view(np.uint8) != expected.view(np.uint8)).sum())
        total, count = total + codes.size, count + 1
    return wrong, total, count


def _is_transposed(codes: np.ndarray, expected: np.ndarray) -> bool:
    """For a square weight, whose shape does not tell: which way round more codes agree."""
    bits, wanted = codes.view(np.uint8), expected.view(np.uint8)
    return bool((wanted == bits.T).sum() > (bits == wanted).sum())


def shapeless(model: onnx.ModelProto) -> tuple[list[str], int]:
    """Q/DQ outputs, those in function bodies included, that shape inference alone gives no shape; and their number."""
    flat = inliner.inline_local_functions(model)
    del flat.graph.value_info[:]
    inferred = shape_inference.infer_shapes(flat, check_type=True, strict_mode=True)
    known = {
        v.name for v in [*inferred.graph.value_info, *inferred.graph.output] if v.type.tensor_type.HasField("shape")
    }
    outputs = [n.output[0] for n in flat.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return [name for name in outputs if name not in known], len(outputs)


def measure(model: torch.nn.Module, batch: dict[str, torch.Tensor], path: Path) -> Iterator[dict[str, Any]]:
    """A row for each claim; `model` is quantized with power-of-two scales where codes are compared with ORT's."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    for dtype in (torch.float32, torch.float16):
        export(model, batch, path, dtype)
        stored = onnx.load(path)
        wrong, total, count = unequal_weights(stored, weights)
        yield row(f"FP8 codes of {count} weights, {_name(dtype)} program, against ml_dtypes", wrong, total)
        missing, outputs = shapeless(stored)
        yield row(f"Q/DQ outputs without a shape, {_name(dtype)} program", len(missing), outputs)
    recipe = qcompile.load_recipe("fp8", ["calibration.power_of_two=true"])
    report = export(model, batch, path, torch.float32, recipe=recipe, compare=batch)
    assert report.comparison is not None
    quantized = [d for d in report.comparison.differences if d.unequal is not None]
    wrong = sum(round(d.unequal * d.elements) for d in quantized if d.unequal is not None)
    elements = sum(d.elements for d in quantized)
    yield row(f"codes out of {len(quantized)} Q, power-of-two scales, fp32, ONNX Runtime against FX", wrong, elements)


def export(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    path: Path,
    dtype: torch.dtype,
    *,
    recipe: Any = "fp8",
    compare: Any = None,
) -> qcompile.Report:
    program = qcompile.quantize(model, (), batch, recipe=recipe, calibration=[batch], dtype=dtype, progress=False)
    return qcompile.export_onnx(program, path, compare=compare)


def row(what: str, wrong: int, total: int) -> dict[str, Any]:
    return {"what": what, "wrong": wrong, "of": total, "bar": "0", "ok": wrong == 0 and total > 0}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@app.default
def main(*, output: Path | None = None) -> int:
    """Count what differs. Exit code 1 if anything does.

    Parameters
    ----------
    output: JSON file, in place of benchmarks/results/codes.json.
    """
    (batch,) = tokenize(sentences(16, 0)[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "minilm.onnx"
        rows = [*measure(load_minilm(), batch, path), *starmap(row, fp4_codes.measure(load_minilm(), batch, path))]
    record.show("MiniLM-L6, recipes fp8 and nvfp4: codes and shapes", rows)
    record.write("codes", rows, output)
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(app())
