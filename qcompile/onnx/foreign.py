"""One verdict on files of any writer, for `inspect` and `repair`: the verifier's, less what their readers take.

Exports of qcompile are held to more: no float copy of a quantized weight, no operator that one tool alone reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from qcompile.onnx.inlining import function_key
from qcompile.onnx.names import describe
from qcompile.onnx.verify import CHECKS, Check, verify_onnx
from qcompile.onnx.view import STANDARD_DOMAINS, ModelView, reads

TENSORRT = "trt"
UNREAD = frozenset({"nothing_opaque", "zero_points", "tensorrt"})
"""Checks that say that TensorRT, or everything but one tool, cannot read a file that is right otherwise."""


def verify_foreign(path: str | os.PathLike[str], dependence: Mapping[str, set[str]] | None = None) -> list[Check]:
    """`verify_onnx`, where these do not fail a check: float weights behind a QuantizeLinear, which every reader folds;
    TensorRT's own operators, and quantizers whose shapes nobody can infer behind an operator that is not standard.
    """
    checks = verify_onnx(path, dependence)
    if all(check.passed for check in checks) or len(checks) < len(CHECKS):  # it is no ONNX, and nothing excuses that
        return checks
    view, functions = ModelView(path, dependence), dict(CHECKS)
    excuses = _excuses(view)
    return [
        check if check.passed else _excused(check, functions[check.name](view).problems, excuses) for check in checks
    ]


def _excused(check: Check, problems: list[str], excuses: Mapping[str, list[str]]) -> Check:
    left = [problem for problem in problems if not any(excuse in problem for excuse in excuses.get(check.name, []))]
    return check if left else Check(check.name, True, f"every reader takes it: {check.detail}")


def _excuses(view: ModelView) -> dict[str, list[str]]:
    """Check -> parts of the problems that it may find."""
    own = {function_key(function) for function in view.model.functions}
    unknown: set[str] = set()  # tensors behind an operator that nobody can infer
    opaque: list[str] = []
    shapes: list[str] = []
    for node in view.nodes:
        foreign = node.domain not in STANDARD_DOMAINS and function_key(node) not in own
        if foreign and node.domain == TENSORRT:
            opaque.append(describe(node))
        if foreign or unknown.intersection(reads(node)):
            unknown.update(node.output)
            shapes.append(f"{describe(node)}: no shape and type for")
    return {"float_weights": [""], "nothing_opaque": opaque, "shapes": shapes}
