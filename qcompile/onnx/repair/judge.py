"""The verifier's verdict on a repaired file, less what the repair leaves as it finds it.

Two things in a file are not the repair's to change, and the verifier refuses both: integer quantizers (zero points
other than 0, weights in floating point), and operators that only TensorRT can read, behind which no shape is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto

from qcompile.onnx.names import describe
from qcompile.onnx.repair.legacy import DEQUANTIZE, QUANTIZE
from qcompile.onnx.verify import CHECKS, Check, verify_onnx
from qcompile.onnx.view import ModelView, reads

INTEGERS = {
    *(TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16),
    *(TensorProto.INT4, TensorProto.UINT4),
}
_EXCUSABLE = {"nothing_opaque", "shapes", "zero_points", "float_weights", "casts", "tensorrt"}


def judged(path: Path, dependence: Mapping[str, set[str]], opaque: set[str]) -> list[Check]:
    """`verify_onnx`, where a problem that names only what was left as it was does not fail a check.

    `opaque`: operators (`domain::name`) that the file came with and nobody but TensorRT can read.
    """
    checks = verify_onnx(path, dependence)
    if all(check.passed for check in checks):
        return checks
    view = ModelView(path, dependence)
    functions = dict(CHECKS)
    excuses = _excuses(view, opaque)
    result = []
    for check in checks:
        if not check.passed and check.name in _EXCUSABLE:
            problems = functions[check.name](view).problems
            left = [problem for problem in problems if not any(excuse in problem for excuse in excuses)]
            left = [] if check.name == "tensorrt" else left  # the report says it: nothing of it was made here
            if not left:
                check = Check(check.name, True, f"left as they were: {check.detail}")
        result.append(check)
    return result


def _excuses(view: ModelView, opaque: set[str]) -> list[str]:
    """What the verifier calls the nodes that the repair leaves alone."""
    excused: list[str] = []
    unknown: set[str] = set()  # tensors behind an operator that nobody can infer
    for node in view.nodes:
        if f"{node.domain}::{node.op_type}" in opaque:
            excused.append(describe(node))
            unknown.update(node.output)
        elif unknown.intersection(reads(node)):
            unknown.update(node.output)
            if node.op_type in (QUANTIZE, DEQUANTIZE):
                excused.append(f"{describe(node)}: no shape and type for")
        if node.op_type in (QUANTIZE, DEQUANTIZE) and _is_integer(view, node):
            excused.append(describe(node))
    return excused


def _is_integer(view: ModelView, node: onnx.NodeProto) -> bool:
    codes = node.output[0] if node.op_type == QUANTIZE else node.input[0]
    named = node.input[2] if len(node.input) > 2 else ""
    types = {view.elem_type(name) for name in (codes, named) if name}
    return bool(types & INTEGERS)
