"""What tests of passes share: modules to graphs, running and counting, and the checks that hold for every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from passes.base import Pass, PassLog
from passes.formats import FP8, Format
from passes.graph import Emitter, aten
from passes.program import unlift
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import Site, find_sites

DYNAMIC = Dim.DYNAMIC
Make = Callable[[], Pass]


def export(module: nn.Module, *args: Any, dynamic_shapes: Any = None, **kwargs: Any) -> ExportedProgram:
    """`module` as a functional ATen program with linear layers and attention kept whole."""
    with torch.no_grad():
        program = torch.export.export(module.eval(), args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        return program.run_decompositions({})


# `run_decompositions({})` leaves these alone, and takes five times as long as the export itself.
_KEPT = {
    aten.linear.default, aten.scaled_dot_product_attention.default, aten.layer_norm.default, aten.embedding.default,
    aten.add.Tensor, aten.mul.Tensor, aten.relu.default, aten.sin.default, aten.view.default, aten.transpose.int,
    aten.matmul.default, aten.softmax.int, aten.sym_size.int,
}  # fmt: skip


def graph_of(module: nn.Module, *args: Any, dynamic_shapes: Any = None, **kwargs: Any) -> GraphModule:
    """The graph that passes see: weights as `get_attr`, flat inputs."""
    with torch.no_grad():
        program = torch.export.export(module.eval(), args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        if not all(node.target in _KEPT for node in program.graph.nodes if node.op == "call_function"):
            program = program.run_decompositions({})
    return unlift(program)


class _CheckedInterpreter(Interpreter):
    """Runs a graph and compares what each node makes with its `meta["val"]`."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op in ("call_function", "get_attr") and isinstance(result, Tensor):
            fake = n.meta["val"]
            assert fake.dtype == result.dtype, f"{n}: meta says {fake.dtype}, made {result.dtype}"
            assert len(fake.shape) == result.ndim, f"{n}: meta says {fake.shape}, made {result.shape}"
            for said, made in zip(fake.shape, result.shape, strict=True):
                assert not isinstance(said, int) or said == made, f"{n}: meta says {fake.shape}, made {result.shape}"
        assert n.op != "call_function" or "nn_module_stack" in n.meta, f"{n} belongs to no module"
        return result


def run(gm: GraphModule, *inputs: Any) -> list[Tensor]:
    """The outputs of `gm`, with the metadata of every node checked on the way."""
    with torch.no_grad():
        return pytree.tree_leaves(_CheckedInterpreter(gm).run(*inputs))


def count(gm: GraphModule, *targets: Any) -> int:
    """How many calls of `targets` the graph holds."""
    return sum(node.op == "call_function" and node.target in targets for node in gm.graph.nodes)


def only_call(gm: GraphModule, target: Any) -> Node:
    """The one call of `target` in the graph."""
    (node,) = (n for n in gm.graph.nodes if n.op == "call_function" and n.target is target)
    return node


def rewrites(make: Make, gm: GraphModule, *inputs: Any, fired: int = 1, **tolerance: float) -> PassLog:
    """Run the pass that `make` makes on `gm` and check what every pass promises; the log of the run.

    It fires `fired` times, the values stay within `tolerance` (bit for bit if there is none), every node has right
    metadata, and a second run changes nothing.
    """
    expected = run(gm, *inputs)
    first = make()
    assert first(gm).modified
    assert first.log.fired[first.name] == fired
    for got, want in zip(run(gm, *inputs), expected, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, **(tolerance or {"rtol": 0.0, "atol": 0.0}))
    code, state = gm.code, dict(gm.state_dict())
    assert not make()(gm).modified, "a second run changes the graph"
    gm.recompile()
    assert gm.code == code
    assert gm.state_dict().keys() == state.keys()
    return first.log


def declines(make: Make, gm: GraphModule) -> list[str]:
    """Run the pass on a graph that it has to leave alone; its reasons."""
    code = gm.code
    instance = make()
    assert not instance(gm).modified
    gm.recompile()
    assert gm.code == code
    return [decline.reason for decline in instance.log.declined]


def scale_of(tensor: Tensor, fmt: Format = FP8, *, per_channel: bool = False) -> Tensor:
    """amax / max of a tensor, or of each row `[N, 1]` of a matrix."""
    amax = tensor.abs().amax(dim=1, keepdim=True) if per_channel else tensor.abs().amax()
    return amax.float() / fmt.max


def insert(gm: GraphModule, scales: Mapping[str, Tensor] | Callable[[Site], Tensor | None], fmt: Format = FP8) -> None:
    """Q/DQ in `fmt` at the sites that `scales` names (by operand, or full name) or gives a scale for."""
    chosen = {}
    for site in find_sites(gm):
        scale = scales(site) if callable(scales) else scales.get(site.name, scales.get(site.operand))
        if scale is not None:
            chosen[site] = Quantizer(fmt, scale)
    InsertQdq(chosen)(gm)


class Mlp(nn.Module):
    """Two linear layers with a residual."""

    def __init__(self, width: int = 8, hidden: int = 16, *, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Attention(nn.Module):
    """Scaled dot-product attention with projections: `[B, S, H * D]` -> `[B, H, S, D]`."""

    def __init__(self, heads: int = 2, width: int = 8, kv_heads: int | None = None, **options: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width, self.options = heads, kv_heads or heads, width, options
        self.q_proj = nn.Linear(heads * width, heads * width)
        self.k_proj = nn.Linear(heads * width, self.kv_heads * width, bias=False)
        self.v_proj = nn.Linear(heads * width, self.kv_heads * width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(*x.shape[:2], heads, self.width).transpose(1, 2)

        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = split(q, self.heads), split(k, self.kv_heads), split(v, self.kv_heads)
        grouped = {"enable_gqa": True} if self.kv_heads != self.heads else {}
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, **grouped, **self.options)


def blank(*inputs: Tensor) -> tuple[GraphModule, Emitter, list[Node]]:
    """A graph of `inputs` that returns nothing, what adds calls to it, and its placeholders: without an export."""
    graph, mode = Graph(), FakeTensorMode()
    placeholders = [graph.placeholder(f"x{index}") for index in range(len(inputs))]
    for node, tensor in zip(placeholders, inputs, strict=True):
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    emit = Emitter(graph.output(()))
    return GraphModule(nn.Module(), graph), emit, placeholders


def returns(gm: GraphModule, *results: Node) -> GraphModule:
    """`gm`, which returns `results` now."""
    gm.graph.output_node().args = (results,)
    gm.recompile()
    return gm
