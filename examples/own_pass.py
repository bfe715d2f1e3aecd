"""A pass of your own: its test, its place in a pipeline, and what it does to the kernels of an engine.

Wants the extra `tensorrt-rtx`.
"""

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import qcompile
from passes import Pass, after
from passes.constants import add_constant, constant
from passes.graph import Emitter, aten, calls, is_call, name_in_module
from passes.testing import declines, rewrites


class JoinStackedLinears(Pass):
    """linear(linear(x, w1), w2, bias)  ->  linear(x, w2 @ w1, bias), of a model that was trained in low rank."""

    def rewrite(self, gm: GraphModule) -> None:
        for outer in calls(gm.graph, aten.linear.default):
            inner, second, *bias = outer.args
            if not isinstance(inner, Node) or not is_call(inner, aten.linear.default) or len(inner.args) > 2:
                continue
            w1, w2 = constant(gm, inner.args[1]), constant(gm, second)
            if w1 is None or w2 is None or len(inner.users) > 1:
                self.decline("the first result has another reader, or a weight is no constant", outer)
                continue
            joined = add_constant(gm, name_in_module(outer, "joined"), w2 @ w1, outer)
            outer.replace_all_uses_with(Emitter(outer)(aten.linear.default, inner.args[0], joined, *bias))
            self.fire()


class LowRank(nn.Module):
    def __init__(self, shows: bool = False) -> None:
        super().__init__()
        self.up, self.narrow, self.wide = nn.Linear(256, 256), nn.Linear(256, 192, bias=False), nn.Linear(192, 256)
        self.shows = shows

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        between = self.narrow(self.up(x).relu())
        return (self.wide(between), between) if self.shows else self.wide(between)


torch.manual_seed(0)
x = torch.randn(64, 256)

# It fires once, the values and the metadata stay, a second run does nothing; so with second readers and any batch.
rewrites(JoinStackedLinears, LowRank(), x, second_user=True, dynamic={"x": 0}, rtol=1e-4, atol=1e-4)
declines(JoinStackedLinears, LowRank(shows=True), x, reason="another reader")

for own in ([], [after("NormalizeLinear", JoinStackedLinears)]):
    program = qcompile.quantize(LowRank().eval(), (x,), calibration=[x], progress=False, passes=own)
    qcompile.export_onnx(program, "model.onnx")
    engine = qcompile.build_engine("model.onnx", target="sm89", progress=False)
    print(f"own passes: {len(own)}; GEMMs in FP8: {engine.gemms['fp8']}; kernels: {engine.kernels}")
