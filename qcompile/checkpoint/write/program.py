"""Codes and scales of the linear layers of a quantized program, and the scales of its key/value cache."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from passes.absorb import norm_operands
from passes.base import run_pipeline
from passes.constants import constant
from passes.formats import FP8
from passes.graph import aten, calls, is_call, module_path
from passes.ir import ATTENTION, BATCHED_LINEAR, QUANTIZE
from passes.operators import NORMS
from passes.pipelines import RESTORE
from passes.place.low_rank import SplitProduct
from passes.place.rotate import FACTOR
from passes.place.smooth import EDITED, SMOOTHED, is_factor
from passes.program import unlift
from passes.reading import Operand, QuantizedLayer
from passes.sdpa import SDPA
from passes.state import past_of
from passes.subgraphs import graphs
from qcompile.checkpoint.hub.layout import Part
from qcompile.checkpoint.write.activations import KvScales
from qcompile.checkpoint.write.plan import refuse_rotation
from qcompile.errors import CheckpointError
from qcompile.process import alone
from qcompile.schemes.layer import QuantizedWeight
from qcompile.schemes.scheme import Scheme

NO_CONVOLUTIONS = "servers compute convolutions in floating point, and checkpoints hold them so"


@dataclass
class ProgramWeights:
    """What a program holds for a checkpoint.

    Attributes:
        layers: name -> codes and scales; of fused experts `[E, N, K]`.
        kv_scales: module path of an attention -> fp32 (k, v) scales.
        edited: name of a parameter -> what smoothing made of it, beside the weights in `layers`.
        convolutions: names of those that are quantized, which no checkpoint holds so.
        fused: there are attentions whose probabilities are quantized.
        notices: what the reader of the report should know.
    """

    layers: dict[str, QuantizedWeight] = field(default_factory=dict)
    kv_scales: dict[str, KvScales] = field(default_factory=dict)
    edited: dict[str, torch.Tensor] = field(default_factory=dict)
    convolutions: dict[str, None] = field(default_factory=dict)
    fused: bool = False
    notices: list[str] = field(default_factory=list)


def read_program(program: ExportedProgram) -> ProgramWeights:
    """What `program`, which `qcompile.quantize` or `import_quantized` returned, holds. Nothing is computed anew.

    Raises:
        CheckpointError: nothing in it is quantized, or something in a way that no checkpoint says.
    """
    found = ProgramWeights()
    with alone():
        gm = unlift(program)
        run_pipeline(RESTORE, gm)
    for part in graphs(gm):
        _read(part, found)
    if not found.layers:
        others = f" (convolutions are: {NO_CONVOLUTIONS})" if found.convolutions else ""
        raise CheckpointError(
            f"no linear layer of this program is quantized{others}: give what qcompile.quantize returned"
        )
    return found


def _read(gm: GraphModule, found: ProgramWeights) -> None:
    """Add what one graph holds to `found`."""
    for node in gm.graph.find_nodes(op="get_attr"):
        if str(node.target).startswith(FACTOR):
            refuse_rotation(module_path(next(iter(node.users))) or "the model", True)
        if is_factor(str(node.target)):
            raise CheckpointError(
                f"{module_path(next(iter(node.users))) or 'the model'}: its input is multiplied by factors for its"
                " channels, which no server that reads these checkpoints does: quantize with `multiply: false` in the"
                " step that smooths"
            )
    found.edited |= _edited(gm)
    for node in calls(gm.graph, aten.linear.default, BATCHED_LINEAR):
        layer = QuantizedLayer.read(node)
        if layer is None:
            continue
        name, weight = layer.name, _weight(gm, layer)
        found.layers[name] = _joined(name, found.layers[name], weight, found) if name in found.layers else weight
    found.convolutions |= {
        layer.name: None
        for node in calls(gm.graph, aten.convolution.default)
        if (layer := QuantizedLayer.read(node)) is not None
    }
    for node in calls(gm.graph, SDPA, ATTENTION):
        found.fused = found.fused or node.target is ATTENTION
        k, v = (_static_scale(gm, operand) for operand in node.args[1:3])
        if (k is None) != (v is None):
            raise CheckpointError(f"{module_path(node)}: one of k and v is quantized, and a key/value cache holds both")
        if k is not None and v is not None:
            found.kv_scales[module_path(node)] = k, v


def _edited(gm: GraphModule) -> dict[str, torch.Tensor]:
    """The parameters of norms and layers that have factors, their own or of what reads them; codes are read with their
    layers."""
    found: dict[str, torch.Tensor] = {}
    for node in calls(gm.graph, *NORMS, aten.linear.default):
        marks, places = node.meta.get("custom", {}), list[int]()
        if marks.get(EDITED):
            places = norm_operands(node) if is_call(node, *NORMS) else [*range(1, min(3, len(node.args)))]
        elif marks.get(SMOOTHED):
            places = [1]
        for operand in (node.args[place] for place in places):
            value = constant(gm, operand)
            if value is not None and isinstance(operand, Node):
                found[str(operand.target)] = value.detach()
            elif isinstance(operand, Node) and Operand.read(operand) is None:
                raise CheckpointError(f"{module_path(node)}: what smoothing changed in it is computed: {operand.name}")
    return found


def _weight(gm: GraphModule, layer: QuantizedLayer) -> QuantizedWeight:
    fmt, x = layer.weight.format, layer.input
    codes, (scale, global_scale) = constant(gm, layer.weight.codes), _scales(gm, layer.weight)
    if codes is None or scale is None:
        raise CheckpointError(f"{layer.name}: the codes or scales of its weight are computed when the program runs")
    input_scale = None
    if x is not None:
        own, above = _scales(gm, x)
        input_scale = own if above is None else above
    per_channel = not fmt.block and scale.ndim > 1 and scale.shape[-2] > 1
    low_rank = _low_rank(gm, layer)
    scheme = Scheme(fmt, None if x is None else x.format, per_channel, low_rank=low_rank is not None)
    if scheme.has_input_scale and input_scale is None:
        raise CheckpointError(
            f"{layer.name}: its input has a scale per tensor that is found at run time, which no format says"
        )
    input_scale = input_scale if scheme.has_input_scale else None
    return QuantizedWeight(scheme, codes, scale, global_scale, input_scale, low_rank)


def _low_rank(gm: GraphModule, layer: QuantizedLayer) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The factors of the low-rank part of a layer, the first of which it may share with others."""
    split = SplitProduct.read(layer.node)
    factors = None if split is None else (constant(gm, split.down), constant(gm, split.up))
    return None if factors is None or factors[0] is None or factors[1] is None else (factors[0], factors[1])


def _scales(gm: GraphModule, operand: Operand) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(scale, global scale) of an operand, each None if it is no constant; plain numbers come in fp32, but of a
    format that says otherwise."""
    if operand.block_scales is not None:
        return constant(gm, operand.block_scales), _fp32(constant(gm, operand.global_scale))
    scale = constant(gm, operand.scale)
    return scale if operand.format.rounds_scales else _fp32(scale), None


def _fp32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().float()


def _static_scale(gm: GraphModule, operand: object) -> torch.Tensor | None:
    """The scale of an operand of an attention, if it is quantized to FP8 with a constant one."""
    quantized = Operand.read(operand)
    if quantized is None or quantized.format != FP8:
        return None
    made = is_call(quantized.codes, QUANTIZE) or past_of(quantized.codes) is not None
    scale = _scales(gm, quantized)[0] if made else None
    if scale is None or scale.numel() != 1:
        raise CheckpointError(
            f"{module_path(quantized.node)}: a key/value cache has one constant scale, and this has not"
        )
    return scale.reshape(())


def _joined(name: str, first: QuantizedWeight, second: QuantizedWeight, found: ProgramWeights) -> QuantizedWeight:
    """One weight that is used twice; its inputs may differ in range."""
    if first.scheme != second.scheme:
        raise CheckpointError(f"{name} is used more than once, and its inputs are quantized in different ways")
    if first.input_scale is not None and second.input_scale is not None and first.input_scale != second.input_scale:
        first.input_scale = torch.maximum(first.input_scale, second.input_scale)
        found.notices.append(f"{name} is used more than once: the largest scale of its inputs is written")
    return first


def slice_weight(weight: QuantizedWeight, part: Part) -> QuantizedWeight:
    """The codes and scales of one linear layer of the hub. Raises `CheckpointError` where a block would be cut."""
    fmt, total = weight.scheme.weight, weight.codes.shape[-2]
    scale, global_scale = _of_expert(weight.scale, part), weight.global_scale
    if global_scale is not None:
        global_scale = _of_expert(global_scale, part).reshape(())
    if scale.numel() == 1 and not fmt.sizes and not weight.scheme.per_channel:
        scale = scale.reshape(())
    if part.expert is None:
        codes, scale = weight.codes.detach(), scale.detach()
        return replace(weight, codes=codes, scale=scale, global_scale=global_scale)
    codes = weight.codes.detach()[part.expert, part.rows]
    if scale.ndim:
        high = fmt.sizes[0] if len(fmt.sizes) == 2 else 1
        start, stop = part.rows.start, part.rows.stop
        if start % high or (stop % high and stop != total):
            raise CheckpointError(
                f"{part.name}: its {part.shape[0]} rows end within a block of {high} rows of the weight of all experts,"
                " so it has no blocks of its own: save the checkpoint from the model instead of a program"
            )
        scale = scale[start // high : -(-stop // high)]
    return QuantizedWeight(weight.scheme, codes, scale.detach(), global_scale, weight.input_scale)


def _of_expert(scale: torch.Tensor, part: Part) -> torch.Tensor:
    """What belongs to one expert of `[E, ...]`, or to all of `[1, ...]`."""
    if part.expert is None or scale.ndim < 3:
        return scale
    return scale[part.expert if scale.shape[0] > 1 else 0]
