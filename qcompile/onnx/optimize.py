"""What torch.onnx calls `optimize`, without the rules of onnxscript that change numbers.

Of its default rules (onnxscript 0.7.2) these are left out:

- Reshape, MatMul, Reshape as one MatMul: it looks at sizes alone, and multiplies `[1, 2 heads, 2 blocks, 12, 32]` with
  `[2 heads, 32, 13]` block by block where the Reshapes had it head by head.
- a ScatterND into all rows as its updates: of one that adds, too.
- Max and Min as Clip: of several with one input all but the first lose their bounds, and nothing loads the file.
- Clip of Clip, and of Relu, as one: where the bounds contradict each other the later one wins, and then does not.
"""

from __future__ import annotations

import copy
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import onnx_fusions
from onnxscript.rewriter.rules import common as rules

from qcompile.compat.onnx import last_operator

__all__ = ["optimize"]

_COMMUTATIVE = (rules.mul_by_1_rule, rules.add_0_rule)
_KEPT = (
    "sub_0_rule",
    "div_by_1_rule",
    "dropout_zero_rule",
    "dropout_inference_rule",
    "cast_constant_of_shape_rule",
    "cast_constant_of_shape_without_value_rule",
    "collapse_slice_rule",
    "collapse_slice2_rule",
    "materialize_reshape_shape_rule",  # 0.7
    "cast_cast_rule",
    "no_op_cast_rule",
    "no_op_expand_rule",
    "flatten_to_reshape_rule",  # before the next
    "reshape_reshape_rule",
    "squeeze_reshape_1d_rule",
    "no_op_transpose_rule",
    "transpose_transpose_rule",
    "unsqueeze_unsqueeze_rule",
    "no_op_dynamic_scatter_nd_rule",
    "fuse_pad_into_conv_rule",
    "normalize_pad_format_conv_rule",
    "fuse_batchnorm_into_conv_rule",
    "fuse_batchnorm_into_conv_transpose_rule",
    "fuse_batchnorm_into_gemm_rule",
    "remove_optional_bias_from_conv_rule",  # 0.7
    "remove_optional_bias_from_conv_transpose_rule",  # 0.7
    "remove_optional_bias_from_gemm_rule",  # 0.7
)


def _guarded(rule: Any, like: Any) -> Any:
    """`rule`, which looks at nodes of the operator alone that the pattern of `like` ends in.

    onnxscript tries each rule on each node, and prepares a match to find that out: a third of `optimize` were these.
    """
    last, rewritten = last_operator(like), rule.try_rewrite

    def try_rewrite(model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        return rewritten(model, graph, node, **options) if last in (None, node.op_type) else None

    guarded = copy.copy(rule)  # that of onnxscript stays as it is
    guarded.try_rewrite = try_rewrite
    return guarded


_RULES = [
    *(_guarded(variant, rule) for rule in _COMMUTATIVE for variant in rule.commute()),
    *(_guarded(rule, rule) for name in _KEPT if (rule := getattr(rules, name, None)) is not None),
]
_STEPS = 2


def optimize(model: ir.Model) -> None:
    """Fold constants, rewrite and tidy a model of `torch.onnx.export(optimize=False)`, in place."""
    common.InlinePass()(model)
    for _ in range(_STEPS):
        optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        rewriter.rewrite(model, _RULES)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
    )(model)
    onnx_fusions.fuse(model)
