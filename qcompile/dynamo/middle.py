"""Between the trace and the back end: the passes of `qcompile.quantize` or `import_quantized`, then the lowering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from passes.base import PassLog, run_pipeline
from passes.ir import ATTENTION, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.lower.device import Device
from passes.pipelines import CANONICALIZE, DYNAMO, quantize_pipeline, torch_pipeline
from passes.place.attention_scale import PlaceAttentionScale
from passes.places import OwnPasses
from passes.subgraph_constants import hoist_constants, sink_constants
from passes.subgraphs import all_calls, all_nodes
from qcompile.coverage import Modules, layers
from qcompile.dynamo.options import Options
from qcompile.dynamo.trace import Traced
from qcompile.errors import CalibrationError, CompileError
from qcompile.frontends import modelopt, pt2e
from qcompile.messages import some
from qcompile.quantization import model_dtype, planned, quantize_graph, without
from qcompile.scales import known_amax, known_masks, static_sites, weight_amax


@dataclass(frozen=True)
class Lowered:
    """A graph for the back end, and what was done to it.

    Attributes:
        gm: weights, codes and scales as `get_attr`.
        quantized, unquantized, coverage: as in `qcompile.Report`, before the lowering.
        layers: (kind, path) of each layer that `coverage` counts -> whether it is quantized.
        log: what passes did and declined.
        notices: of the recipe.
    """

    gm: GraphModule
    quantized: Mapping[str, str]
    unquantized: Mapping[str, str]
    coverage: Mapping[str, tuple[int, int]]
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
    log = PassLog(own=OwnPasses(options.passes))
    if traced.autocast:
        run_pipeline(DYNAMO, gm, log, recompile=False)
    notices: list[str] = []
    dtype = model_dtype(gm)
    if _is_quantized(gm):
        if options.recipe is not None:
            raise CompileError(
                "this model is quantized already: compile it without a recipe, or the model it was made from with one"
            )
        # a program of `quantize` has its softmax quantized where its recipe wants that, and nowhere else
        softmax: Mapping[Node, torch.Tensor] | None = None if _is_foreign(gm) else {}
        pipeline = (*CANONICALIZE, PlaceAttentionScale, *quantize_pipeline({}, softmax, dtype, dtype))
        run_pipeline(pipeline, gm, log, recompile=False)
    elif options.recipe is not None:
        plan = planned(gm, options.recipe, log)
        if options.calibration is None and (static := static_sites(plan.configs)):
            raise CalibrationError(
                f"the recipe gives static scales to {some([site.name for site in static])}: pass"
                " options={'calibration': qcompile.calibrate(model, args, recipe=..., calibration=batches)}, or use a"
                " recipe with dynamic activations such as fp8_per_channel_per_token"
            )
        amax, unreached = known_amax(plan.configs, options.calibration or {})
        amax |= weight_amax(plan.configs)
        plan = replace(plan, configs=without(plan.configs, unreached, log))
        quantize_graph(gm, plan, amax, dtype, dtype, known_masks(gm, options.calibration or {}))
        notices = [*map(str, plan.notices), *log.notices]
    modules, found = Modules.of(gm, log.declined), layers(gm)
    if modules.quantized and options.target == "inductor":
        pipeline = torch_pipeline(device, fast_accumulation=options.fast_accumulation)
        run_pipeline(pipeline, gm, log, recompile=False)
    if modules.quantized:
        log.own.check_placed()
    hoist_constants(gm)
    return Lowered(gm, modules.quantized, modules.unquantized, modules.coverage, found, log, notices)


def _is_quantized(gm: GraphModule) -> bool:
    return any(all_calls(gm, QUANTIZE, DEQUANTIZE, DYNAMIC_QUANTIZE, ATTENTION)) or _is_foreign(gm)


def _is_foreign(gm: GraphModule) -> bool:
    """Whether another tool quantized the model."""
    tools = (*modelopt.NAMESPACES, pt2e.NAMESPACE)
    return any(getattr(node.target, "namespace", None) in tools for node in all_nodes(gm))
