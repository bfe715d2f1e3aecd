"""Private names of what writes ONNX files: loggers that say what is no news, and work of torch.onnx for nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from passes.private import Private

REGISTRATION = "torch.onnx._internal.exporter._registration"
"""It says that torchvision is not installed."""

LOGGERS = (
    "torch.onnx._internal.exporter._core",
    REGISTRATION,
    "onnx_ir.passes.common.initializer_deduplication",
    "onnxscript.optimizer._constant_folding",
)

_QUICK, _PROMOTION = "an export that is not slow", "torch.onnx._internal.fx.passes.type_promotion"
_TRACED = Private(
    "onnxscript.values", "TracedOnnxFunction", _QUICK, lambda found: isinstance(found.function_ir, property)
)
_INTERPRETER = Private(_PROMOTION, "_TypePromotionInterpreter", _QUICK, lambda found: "run_node" in vars(found))
_FIND_RULE = Private(_PROMOTION, "get_type_promotion_rule", _QUICK, callable)


def last_operator(rule: Any) -> str | None:
    """The operator that the pattern of a rule of onnxscript ends in; None if it is not told."""
    pattern = getattr(rule, "_target_pattern", None)
    ends: Any = getattr(pattern, "output_nodes", ())
    identifier = ends[0].op_identifier() if len(ends) == 1 else None
    return str(identifier[1]) if identifier is not None else None


@contextlib.contextmanager
def quick_translation() -> Iterator[None]:
    """Within the body torch.onnx leaves out two things, each a tenth of an export, that change nothing in a file.

    It would parse the source of 500 functions of onnxscript to ask for a domain, which nobody reads; and run, with fake
    tensors, every operator of a program, to learn the value that its node has: here those alone whose operands it may
    have to cast.
    """
    traced, interpreter = _TRACED.get(), _INTERPRETER.get()
    parsed, run, find_rule = traced.function_ir, interpreter.run_node, _FIND_RULE.get()

    def run_node(self: Any, node: Any) -> Any:
        known = node.op == "call_function" and "val" in node.meta and not find_rule(node, self.type_promotion_table)
        return node.meta["val"] if known else run(self, node)

    try:
        traced.function_ir = SimpleNamespace(domain="")
        interpreter.run_node = run_node
        yield
    finally:
        traced.function_ir, interpreter.run_node = parsed, run


def probes() -> Iterator[Private]:
    """Every private name that this module knows."""
    for name in LOGGERS:
        yield Private(name, "logger", "an export without notes on what is no news", _is_called(name))
    yield from (_TRACED, _INTERPRETER, _FIND_RULE)
    rule = "mul_by_1_rule"
    yield Private("onnxscript.rewriter.rules.common", rule, _QUICK, lambda found: last_operator(found) == "Mul")


def _is_called(name: str) -> Callable[[object], bool]:
    return lambda logger: isinstance(logger, logging.Logger) and logger.name == name
