"""Between the trace and the back end: the passes of `qcompile.quantize` or `import_quantized`, then the lowering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import GraphModule

from passes.base import PassLog
from passes.ir import ATTENTION, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.lower.device import Device
from passes.pipelines import DYNAMO, torch_pipeline
from passes.places import OwnPasses
from passes.subgraph_constants import hoist_constants, sink_constants
from passes.subgraphs import all_calls, all_nodes
from qcompile.dynamo.options import Options
from qcompile.dynamo.trace import Traced
from qcompile.errors import CompileError
from qcompile.frontends import modelopt, pt2e
from qcompile.quantization.plan import Work, planned, quantized_elsewhere
from qcompile.quantization.run import quantize_graph
from qcompile.report.coverage import Modules, layers

_HOW = (
    "pass options={'calibration': qcompile.calibrate(model, args, recipe=..., calibration=batches)}, or use a recipe"
    " with dynamic activations such as fp8_per_channel_per_token"
)


@dataclass(frozen=True)
class Lowered:
    """A graph for the back end, and what was done to it.

    Attributes:
        gm: weights, codes and scales as `get_attr`.
        modules: what of it is quantized, before the lowering.
        layers: (kind, path) of each layer that `coverage` counts -> whether it is quantized.
        log: what passes did and declined.
        notices: of the recipe.
    """

    gm: GraphModule
    modules: Modules
    layers: Mapping[tuple[str, str], bool]
    log: PassLog
    notices: list[str]


def lower(traced: Traced, weights: Mapping[str, torch.Tensor], options: Options, device: Device) -> Lowered:
    """Quantize the graph, or read how it is quantized already, and write it in what `options.target` runs on `device`.

    Raises:
        CalibrationError, RecipeError, PassError: what `qcompile.quantize` raises.
    """
    gm = traced.with_weights(weights)
    sink_constants(gm)
    work, notices = Work(gm, PassLog(own=OwnPasses(options.passes))), list[str]()
    if traced.autocast:
        work.run(DYNAMO)
    if _is_quantized(gm):
        if options.recipe is not None:
            raise CompileError(
                "this model is quantized already: compile it without a recipe, or the model it was made from with one"
            )
        # a program of `quantize` has its softmax quantized where its recipe wants that, and nowhere else
        quantize_graph(work, partial(quantized_elsewhere, fuses=_is_foreign(gm)), None, _HOW)
    elif options.recipe is not None:
        notices = quantize_graph(work, partial(planned, recipe=options.recipe), options.calibration, _HOW)
    modules, found = Modules.of(gm, work.log.declined), layers(gm)
    if modules.quantized and options.target == "inductor":
        work.run(torch_pipeline(device, fast_accumulation=options.fast_accumulation))
    if modules.quantized:
        work.log.own.check_placed()
    hoist_constants(gm)
    return Lowered(gm, modules, found, work.log, notices)


def _is_quantized(gm: GraphModule) -> bool:
    return any(all_calls(gm, QUANTIZE, DEQUANTIZE, DYNAMIC_QUANTIZE, ATTENTION)) or _is_foreign(gm)


def _is_foreign(gm: GraphModule) -> bool:
    """Whether another tool quantized the model."""
    tools = (*modelopt.NAMESPACES, pt2e.NAMESPACE)
    return any(getattr(node.target, "namespace", None) in tools for node in all_nodes(gm))
