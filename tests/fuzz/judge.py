"""Takes a random network through `quantize` and `export_onnx`, and holds what comes out against the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor

import qcompile
from qcompile.onnx.execute import REFERENCE, run_onnx_intermediates
from tests.fuzz.generator import Case
from tests.fuzz.oracle import expected

# Sums in another order, and rounding between layers, put values on the other side of a tie: a part of what quantization
# itself changes, and beside that the rounding of the dtype, both relative.
OF_QUANTIZATION = {torch.float32: 0.5, torch.float16: 0.75, torch.bfloat16: 1.0}
BEFORE_1_30 = 2e-2  # ONNX Runtime's Q and DQ of float16
IN_REFERENCE = 0.1  # onnx.reference adds bfloat16 numbers in bfloat16, and ONNX Runtime has no kernels for them
ROUNDING = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Outcome:
    """What became of a case: refused with a reason, or run."""

    refused: str = ""
    quantized: int = 0


def leaves(results: Any) -> list[Tensor]:
    """The tensors among the results of a model."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference."""
    return float((a.double() - b.double()).norm())


def hold(
    found: list[Tensor], wanted: list[Tensor], floats: list[Tensor], dtype: torch.dtype, what: str, rounding: float
) -> None:
    """Asserts that `found` is `wanted` up to rounding, for which ties of quantization are the measure."""
    assert len(found) == len(wanted), f"{what}: {len(found)} outputs for {len(wanted)}"
    for index, (got, want, exact) in enumerate(zip(found, wanted, floats, strict=True)):
        assert got.shape == want.shape, f"{what}: output {index} has shape {list(got.shape)}, not {list(want.shape)}"
        assert bool(torch.isfinite(got).all()), f"{what}: output {index} is not finite"
        allowed = OF_QUANTIZATION[dtype] * distance(want, exact) + rounding * float(exact.double().norm()) + 1e-7
        assert distance(got, want) <= allowed, (
            f"{what}: output {index} is {distance(got, want):.3g} away, quantization {distance(want, exact):.3g},"
            f" of {float(exact.double().norm()):.3g}"
        )


def check(case: Case, recipe: str, dtype: torch.dtype, target: str, folder: Path) -> Outcome:
    """Quantize, export and run `case`; asserts that the numbers are right.

    Raises:
        AssertionError: a wrong number. Anything that is no QCompileError is a fault, too.
    """
    nearest = qcompile.load_recipe(recipe, ["calibration={algorithm: max}"])  # codes that the oracle can tell
    with torch.no_grad():
        floats = leaves(case.model(*case.inputs))
        before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
        path = folder / "fuzz.onnx"
        try:
            program = qcompile.quantize(
                case.model, case.inputs, recipe=nearest, calibration=[case.inputs], dtype=dtype,
                dynamic_shapes=case.dynamic_shapes, progress=False,
            )  # fmt: skip
            report = qcompile.export_onnx(program, path, target=target)  # type: ignore[arg-type]
        except qcompile.QCompileError as error:
            return Outcome(refused=f"{type(error).__name__}: {error}")
        assert all(torch.equal(before[n], t) for n, t in case.model.state_dict().items()), "the model was changed"
        found = leaves(program.module()(*case.inputs))
        if case.model.exact:
            wanted, used = expected(case.model, case.inputs, recipe, report.quantized)
            listed = report.quantized.keys() | report.unquantized.keys()
            assert used <= listed, f"in no list: {sorted(used - listed)}"
            hold(found, wanted, floats, dtype, "the program", ROUNDING[dtype])
        _check_file(path, case, found, floats, dtype)
    return Outcome(quantized=len(report.quantized))


def _check_file(path: Path, case: Case, program: list[Tensor], floats: list[Tensor], dtype: torch.dtype) -> None:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    given = dict(zip(("x", "other", "mask"), (tensor.numpy() for tensor in case.inputs), strict=True))
    names = [output.name for output in graph.output]
    run = run_onnx_intermediates(path, {i.name: given[i.name] for i in graph.input}, names)
    found = [torch.from_numpy(np.asarray(run.values[name], dtype=np.float32)) for name in names]
    evaluator = run.evaluators[names[0]]
    rounding = IN_REFERENCE if (evaluator, dtype) == (REFERENCE, torch.bfloat16) else ROUNDING[dtype]
    if evaluator != REFERENCE and dtype is torch.float16 and Version(version("onnxruntime")) < Version("1.30"):
        rounding = BEFORE_1_30
    hold(found, program, floats, dtype, f"the file in {evaluator}", rounding)
