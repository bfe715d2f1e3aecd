"""Scales take the dtype of what they scale."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import add_constant, constant, delete_constant
from passes.errors import PassError
from passes.formats import get_format
from passes.graph import calls, dtype
from passes.ir import ATTENTION, DEQUANTIZE
from passes.subgraphs import all_calls, owner


class RoundScales(Pass):
    """Round every constant scale to the dtype that its dequantize computes in.

    Before (float16 graph):
        q = quantize(x, s_float32); y = dequantize(q, s_float32, dtype=float16)
    After:
        q = quantize(x, s_float16); y = dequantize(q, s_float16, dtype=float16)

    Requires: `ConvertComputeDtype` ran, if it will.
    Ensures: quantize and dequantize keep sharing one scale, and it is positive and finite in its own dtype. One that is
        so small that the dtype has few digits for it is rounded up, to the least number at most, so that nothing
        saturates; a notice says so. Scales of blocks stay as they are: float32, which is what their own legalization
        computes with, or codes. Those of INT4 are rounded: one kernel reads and multiplies them.
    Declines when: never; raises `PassError` naming the scale that the dtype cannot hold.
    Why: ONNX below opset 23 and ONNX Runtime want x and scale of one type. It comes before `FoldWeights`, so that codes
        are made with the scale that multiplies them.
    """

    def check_ensures(self, gm: GraphModule) -> list[str]:
        scales = {node.args[4 if node.target is ATTENTION else 1] for node in all_calls(gm, DEQUANTIZE, ATTENTION)}
        known = [(scale, constant(owner(scale), scale)) for scale in scales if isinstance(scale, Node)]
        found = [(scale, value.float()) for scale, value in known if value is not None]
        bad = (scale for scale, value in found if not bool(torch.isfinite(value).all() and (value >= 0).all()))
        return [f"the scale {scale.target} is negative or infinite" for scale in bad]

    def rewrite(self, gm: GraphModule) -> None:
        targets: dict[str, torch.dtype] = {}
        for node in calls(gm.graph, DEQUANTIZE, ATTENTION):
            scale_node = node.args[4] if node.target is ATTENTION else node.args[1]
            scale = constant(gm, scale_node)
            fmt = get_format(str(node.kwargs["format"]))
            in_blocks = node.target is DEQUANTIZE and bool(fmt.sizes)
            if isinstance(scale_node, Node) and scale is not None and (fmt.rounds_scales or not in_blocks):
                targets[str(scale_node.target)] = dtype(node)
        for name, to in targets.items():
            self._round(gm, name, to)

    def _round(self, gm: GraphModule, name: str, to: torch.dtype) -> None:
        nodes = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == name]
        scale = constant(gm, nodes[0])
        assert scale is not None
        rounded, coarse = round_scale(scale, to)
        if not bool(torch.isfinite(rounded).all() and (rounded > 0).all()):
            worst = float(scale.min() if not bool((rounded > 0).all()) else scale.max())
            raise PassError(
                f"{name} is {worst:.3g}, which {to} cannot hold; compute in bfloat16 or float32, or leave this"
                " tensor unquantized in the recipe"
            )
        if coarse.any():
            which = f"{name} is" if scale.numel() == 1 else f"{int(coarse.sum())} of {scale.numel()} in {name} are"
            self.notice(
                f"{which} {float(scale[coarse].min()):.3g}, for which {to} has few digits:"
                f" {float(rounded[coarse].min()):.3g} takes its place, and some codes are not used; bfloat16 has it"
            )
        if scale.dtype == to:
            return
        self.fire()
        delete_constant(gm, name)
        kept = torch.nn.Parameter(rounded, requires_grad=False) if isinstance(scale, torch.nn.Parameter) else rounded
        new = add_constant(gm, name, kept, nodes[0])
        for node in nodes:
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)


def round_scale(scale: torch.Tensor, to: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale` in `to`, and where it was moved up because `to` has less than seven bits for it.

    To the nearest a scale of 0.4 steps would be 0, and one of 1.4 steps would saturate a fourth of the range. What is
    not positive stays so.
    """
    step = torch.finfo(to).smallest_normal * torch.finfo(to).eps  # between subnormal numbers
    wide = scale.double()
    coarse = (wide > 0) & (wide < 64 * step)
    rounded = torch.where(coarse, (torch.ceil(wide / step) * step).to(to), scale.to(to))
    return rounded, coarse & (rounded.double() != wide)
