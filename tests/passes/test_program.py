"""ExportedProgram -> GraphModule -> ExportedProgram keeps the interface, the tensors and the values."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from passes.constants import add_constant
from passes.errors import PassError
from passes.fold.weights import FoldWeights
from passes.graph import Emitter, aten, fake_mode
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.legalize.compute_dtype import ConvertComputeDtype
from passes.program import lift, separated, unlift, written_tensors
from passes.testing import DYNAMIC, count, graph_of, only_call, run
from tests.passes.support import Attention, Mlp, export, insert, scale_of


class Buffers(nn.Module):
    """A persistent buffer, one that is not saved, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("saved", torch.randn(4))
        self.register_buffer("computed", torch.randn(4), persistent=False)
        self.constant = torch.randn(4)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.saved + self.computed - self.constant + torch.tensor([1.0, 2.0, 3.0, 4.0])


class Tied(nn.Module):
    """An embedding that is the output projection too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embed(ids)), "ids": ids}


class Keywords(nn.Module):
    """Keyword inputs, one of which is not a tensor; nested outputs with None, a number and an input."""

    def forward(self, x: Tensor, *, pair: tuple[Tensor, Tensor], flag: bool = True, other: None = None) -> Any:
        y = x + pair[0] if flag else x
        return {"out": [y, pair[1]], "none": other, "number": 3, "input": x}


class SimilarNames(nn.Module):
    """`a.b_c` and `a_b.c`: the same once dots are underscores."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_b = nn.Module(), nn.Module()
        self.a.b_c, self.a_b.c = nn.Parameter(torch.ones(1)), nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.a.b_c + self.a_b.c


class Branches(nn.Module):
    """Control flow, whose branches are sub-graphs."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda t: (t + 1,), lambda t: (t - 1,), (x,))[0]


class Direct(nn.Module):
    """Returns an input, a weight and a size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        return x, self.weight, x.shape[0]


CASES = {
    "mlp": (Mlp(), (torch.randn(2, 8),), {}, None),
    "buffers": (Buffers(), (torch.randn(4),), {}, None),
    "tied": (Tied(), (torch.arange(3),), {}, None),
    "keywords": (Keywords(), (torch.randn(3),), {"pair": (torch.randn(3), torch.randn(3))}, None),
    "similar names": (SimilarNames(), (torch.randn(3),), {}, None),
    "branches": (Branches(), (torch.randn(3),), {}, None),
    "direct": (Direct(), (torch.randn(3),), {}, ({0: DYNAMIC},)),
    "dynamic": (Attention(), (torch.randn(2, 5, 16),), {}, ({0: DYNAMIC, 1: DYNAMIC},)),
    "reserved": (nn.Linear(4, 4), (torch.randn(2, 4),), {}, None),
}


def resized(tree: Any, case: str) -> Any:
    """`tree` with other values, and other sizes if the case is dynamic."""
    double = case in ("dynamic", "direct")
    return pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t.flip(0)]) if double else t.flip(0), tree)


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def description(program: ExportedProgram) -> tuple[Any, ...]:
    meta = [(node.name, sorted(node.meta), str(node.meta.get("val"))) for node in program.graph.nodes]
    return program.graph_module.code, str(program.graph_signature), list(program.constants), meta


@pytest.mark.everyday(5)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("saved", [False, True], ids=["", "saved"])
def test_round_trip(case: str, saved: bool) -> None:
    module, args, kwargs, dynamic_shapes = CASES[case]
    program = export(module, *args, dynamic_shapes=dynamic_shapes, **kwargs)
    lifted = lift(unlift(program), program)
    lifted = saved_and_loaded(lifted) if saved else lifted
    assert lifted.state_dict.keys() == program.state_dict.keys()
    assert lifted.call_spec == program.call_spec
    torch.testing.assert_close(lifted.example_inputs, program.example_inputs, rtol=0, atol=0)
    assert sorted(map(str, lifted.range_constraints.values())) == sorted(map(str, program.range_constraints.values()))
    got_module, want_module = lifted.module(), program.module()
    for a, k in ((args, kwargs), (resized(args, case), resized(kwargs, case))):
        got, want = got_module(*a, **k), want_module(*a, **k)
        assert pytree.tree_structure(got) == pytree.tree_structure(want)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.everyday(3)
@pytest.mark.parametrize("case", CASES)
def test_a_graph_can_be_lifted_and_unlifted_again(case: str) -> None:
    module, args, kwargs, dynamic_shapes = CASES[case]
    program = export(module, *args, dynamic_shapes=dynamic_shapes, **kwargs)
    once = unlift(program)
    twice = unlift(lift(once, program))
    assert len(once.graph.nodes) == len(twice.graph.nodes)
    inputs = pytree.tree_leaves((args, kwargs))
    if case != "keywords":  # its flat inputs include those that are not tensors
        torch.testing.assert_close(run(twice, *inputs), run(once, *inputs), rtol=0, atol=0)


class Counts(nn.Module):
    """Writes to its buffer, or to its input, while it runs."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        (x if self.what == "x" else self.steps).add_(1)
        return x * self.steps


@pytest.mark.parametrize("what", ["steps", "x"])
def test_what_a_program_writes_to_is_no_constant(what: str) -> None:
    program = export(Counts(what), torch.randn(3))
    assert written_tensors(program) == [what]
    with pytest.raises(PassError, match=f"writes to {what} while it runs"):
        unlift(program)


def test_kinds_and_persistence_are_kept() -> None:
    program = export(Buffers(), torch.randn(4))
    lifted = lift(unlift(program), program)

    def tensors(p: ExportedProgram) -> set[tuple[InputKind, str | None, bool | None]]:
        return {(s.kind, s.target, s.persistent) for s in p.graph_signature.input_specs}

    assert tensors(lifted) == tensors(program)
    assert lifted.constants.keys() == program.constants.keys()
    assert isinstance(lifted.state_dict["saved"], Tensor)


def test_the_tensors_are_shared() -> None:
    module = Mlp()
    program = export(module, torch.randn(2, 8))
    gm = unlift(program)
    assert gm.get_parameter("up.weight").data_ptr() == module.up.weight.data_ptr()
    assert lift(gm, program).state_dict["up.weight"].data_ptr() == module.up.weight.data_ptr()


def test_editing_the_graph_leaves_program_and_module_as_they_were() -> None:
    module, x = Attention(), torch.randn(1, 3, 16)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    program = export(module, x)
    before = description(program)
    gm = unlift(program)
    insert(gm, lambda site: torch.tensor(0.02) if site.operand != "softmax" else None)
    FoldWeights()(gm)
    quantized = lift(gm, program)
    assert count(quantized.graph_module, DEQUANTIZE) > 0
    assert description(program) == before
    for now in (module.state_dict(), program.state_dict):
        torch.testing.assert_close(dict(now), state, rtol=0, atol=0)


def test_what_a_pass_adds_is_saved_and_what_it_drops_is_gone() -> None:
    program = export(Mlp(), torch.randn(2, 8))
    gm = unlift(program)
    insert(gm, lambda site: scale_of(gm.get_parameter("up.weight")) if site.name == "up.weight_quantizer" else None)
    FoldWeights()(gm)
    lifted = saved_and_loaded(lift(gm, program))
    assert lifted.state_dict.keys() == program.state_dict.keys() | {"up.weight_scale"}
    assert lifted.state_dict["up.weight"].dtype is torch.float8_e4m3fn
    kinds = {s.target: (s.kind, s.persistent) for s in lifted.graph_signature.input_specs}
    assert kinds["up.weight_scale"] == (InputKind.BUFFER, True)
    assert kinds["up.weight"] == (InputKind.PARAMETER, None)
    x = torch.randn(2, 8)
    torch.testing.assert_close([lifted.module()(x)], run(gm, x), rtol=0, atol=0)


def test_weights_that_nothing_reads_are_dropped() -> None:
    program = export(Mlp(), torch.randn(2, 8))
    gm = unlift(program)
    add = only_call(gm, aten.add.Tensor)
    add.replace_input_with(add.args[1], add.args[0])
    gm.graph.eliminate_dead_code()
    assert not lift(gm, program).state_dict


def test_new_constants_and_calls_before_the_inputs_are_put_in_order() -> None:
    """A cast of a weight may stand before the user's placeholders; lifted, placeholders come first."""
    program = export(nn.Linear(4, 4), torch.randn(2, 4))
    gm = unlift(program)
    linear = only_call(gm, aten.linear.default)
    weight = linear.args[1]
    doubled = Emitter(weight.next, like=linear)(aten.mul.Tensor, weight, 2.0)
    linear.update_arg(1, doubled)
    bias = add_constant(gm, "x", torch.ones(4), linear)
    linear.update_arg(2, bias)
    gm.recompile()
    lifted = saved_and_loaded(lift(gm, program))
    x = torch.randn(2, 4)
    torch.testing.assert_close([lifted.module()(x)], run(gm, x), rtol=0, atol=0)
    ops = [node.op for node in lifted.graph.nodes]
    assert ops == sorted(ops, key=["placeholder", "call_function", "output"].index)


def test_a_new_constant_may_be_called_like_an_input() -> None:
    class Named(nn.Module):
        def forward(self, b_scale: Tensor) -> Tensor:
            return b_scale * 2

    program = export(Named(), torch.randn(3))
    gm = unlift(program)
    mul = only_call(gm, aten.mul.Tensor)
    mul.update_arg(1, add_constant(gm, "scale", torch.tensor(3.0), mul))
    gm.recompile()
    lifted = saved_and_loaded(lift(gm, program))
    torch.testing.assert_close(lifted.module()(torch.ones(3)), torch.full((3,), 3.0))


@pytest.mark.parametrize("module", [Mlp(), Attention(width=4)], ids=["mlp", "attention"])
def test_the_short_cut_of_these_tests_makes_the_same_graph(module: nn.Module) -> None:
    x = torch.randn(2, 3, 8)
    assert graph_of(module, x).code == unlift(export(module, x)).code


@pytest.mark.parametrize("fmt", ["fp8", "int8"])
def test_a_program_with_the_operators_of_the_ir_saves_and_loads(fmt: str) -> None:
    class Qdq(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scale = torch.tensor(0.05)
            return DEQUANTIZE(QUANTIZE(x, scale, format=fmt), scale, format=fmt, dtype=x.dtype)

    x = torch.randn(4, 8)
    program = export(Qdq(), x, dynamic_shapes=({0: DYNAMIC},))
    assert (count(program.graph_module, QUANTIZE), count(program.graph_module, DEQUANTIZE)) == (1, 1)
    x = torch.randn(7, 8)
    torch.testing.assert_close(saved_and_loaded(program).module()(x), Qdq()(x), rtol=0, atol=0)


class Nonzero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[(x > 0).nonzero()[:, 0]] + 1


def test_a_graph_has_symbols_of_its_own() -> None:
    program = export(Nonzero(), torch.randn(6))
    env = fake_mode(program.graph).shape_env
    assert env is not None
    known = set(env.var_to_range)
    gm = unlift(program)
    assert fake_mode(gm.graph).shape_env is not env
    ConvertComputeDtype(torch.float32, torch.float16)(gm)  # runs `index` on fake values again
    shapes = {str(node.meta["val"].shape) for node in gm.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    first, second = lift(gm, program).run_decompositions({}), lift(gm, program).run_decompositions({})
    assert str(first) == str(second)
    assert set(env.var_to_range) == known
    assert not env.pending_fresh_unbacked_symbols
    assert shapes == {"torch.Size([6])", "torch.Size([u0, 1])", "torch.Size([u0])"}


def test_a_separated_program_is_traced_alone() -> None:
    program = export(Nonzero(), torch.randn(6))
    before = str(program)
    apart = separated(program)
    assert str(apart) == before
    assert str(apart.run_decompositions({})) == str(separated(program).run_decompositions({}))
    assert str(program) == before
