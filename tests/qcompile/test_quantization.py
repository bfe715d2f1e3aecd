"""quantize: what the program computes, which scales and codes it holds, and what is said when it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

import qcompile
from passes.base import Pass
from passes.constants import add_constant, evaluate_constant
from passes.graph import calls
from passes.ir import ATTENTION, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.program import unlift
from passes.quantize.sites import linear_name
from qcompile.errors import CalibrationError, QCompileError, RecipeError
from qcompile.quantization import plan
from qcompile.report import quantized_modules
from qcompile.report.record import record_of

X = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Pre-norm attention and an MLP: shared inputs for q, k, v, a residual on each, and a head."""

    def __init__(self, causal: bool = False, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.causal, width = heads, kv_heads, causal, 32
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width * kv_heads // heads)
        self.v_proj = nn.Linear(width, width * kv_heads // heads)
        self.o_proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 64)
        self.down = nn.Linear(64, width)
        self.lm_head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> dict[str, Any]:
        batch, length, width = x.shape
        h = self.norm(x)
        q, k, v = (
            proj(h).reshape(batch, length, -1, width // self.heads).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        x = x + self.o_proj(a.transpose(1, 2).reshape(batch, length, width))
        x = x + self.down(F.gelu(self.up(x)))
        return {"hidden": x, "out": (self.lm_head(x),)}


def quantize(model: nn.Module | ExportedProgram, *args: Tensor, **options: Any) -> ExportedProgram:
    options = {"calibration": [args or (X,)], "progress": False, **options}
    return qcompile.quantize(model, args, **options)


@pytest.fixture(scope="module")
def model() -> Block:
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def program(model: Block) -> ExportedProgram:
    return quantize(model, X)


def nodes_of(program: ExportedProgram, *targets: Any) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.target in targets]


def tensor_of(program: ExportedProgram, node: Any) -> Tensor:
    """The weight or scale behind a lifted placeholder."""
    (spec,) = (s for s in program.graph_signature.input_specs if s.arg.name == node.name)
    assert spec.target is not None
    return program.state_dict[spec.target]


def weight_and_scale(program: ExportedProgram, module: str) -> tuple[Tensor, Tensor]:
    for node in nodes_of(program, DEQUANTIZE):
        if node.meta["custom"]["quantizer"] == f"{module}.weight_quantizer":
            return tensor_of(program, node.args[0]), tensor_of(program, node.args[1])
    raise AssertionError(f"{module} has no quantized weight")


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_what_is_quantized(program: ExportedProgram) -> None:
    quantized, left = quantized_modules_of(program)
    assert quantized == dict.fromkeys(
        ["norm", "q_proj", "k_proj", "v_proj", "", "o_proj", "up", "down"], "fp8"
    )  # the attention belongs to the root, whose path is empty
    assert left == {"lm_head": "linear"}
    record = record_of(program)
    assert record.recipe == "fp8" and record.fired["InsertQdq"] > 0 and record.declined == []


def quantized_modules_of(program: ExportedProgram) -> tuple[dict[str, str], dict[str, str]]:
    return quantized_modules(unlift(program))


def test_a_shared_input_has_one_pair_and_a_residual_none(program: ExportedProgram) -> None:
    readers = {node.name: list(node.users) for node in nodes_of(program, DEQUANTIZE)}
    shared = [users for users in readers.values() if len(users) == 3]
    assert len(shared) == 1 and all("linear" in user.name for user in shared[0])
    for node in nodes_of(program, torch.ops.aten.add.Tensor):
        assert not any(operand.target is DEQUANTIZE for operand in node.all_input_nodes), "a residual stays exact"


def test_each_reader_of_one_tensor_gets_the_range_that_was_given_for_it(model: Block) -> None:
    ranges = {"q_proj": 1.0, "k_proj": 2.0, "v_proj": 2.0}
    state = qcompile.calibrate(model, (X,), recipe="fp8", calibration=[X], progress=False)
    state |= {f"{name}.input_quantizer": torch.tensor(amax) for name, amax in ranges.items()}
    program = quantize(model, X, calibration=state, dtype=torch.float32)
    gm = unlift(program)
    scales = {
        linear_name(linear): float(evaluate_constant(gm, linear.args[0].args[1]))  # type: ignore[union-attr, arg-type]
        for linear in calls(gm.graph, torch.ops.aten.linear.default)
        if linear_name(linear) in ranges
    }
    assert scales == {name: np.float32(amax / 448) for name, amax in ranges.items()}
    assert float(model.norm(X).detach().abs().max()) > 2, "the ranges cut, so that another's would show"
    quantizers = [node for node in nodes_of(program, QUANTIZE) if "layer_norm" in str(node.args[0])]
    assert len(quantizers) == 2, "k and v share a pair"


@pytest.mark.everyday(2)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_structure_dtypes_and_values_for_each_compute_dtype(model: Block, dtype: torch.dtype | None) -> None:
    program = quantize(model, X, dtype=dtype)
    found, expected = program.module()(X), model(X)
    assert found.keys() == expected.keys() and isinstance(found["out"], tuple)
    for a, b in ((found["hidden"], expected["hidden"]), (found["out"][0], expected["out"][0])):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert 0 < error(a, b) < 0.08
    computed = {node.meta["val"].dtype for node in nodes_of(program, torch.ops.aten.linear.default)}
    assert computed == {dtype or torch.float16}


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_keeps_its_dtype(half: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Block().eval().to(half), X.to(half)
    program = quantize(model, x)
    found = program.module()(x)["hidden"]
    assert found.dtype == half
    assert error(found, model.float()(x.float())["hidden"]) < 0.08
    assert {n.meta["val"].dtype for n in nodes_of(program, torch.ops.aten.linear.default)} == {half}


def test_a_double_model_computes_in_float16_and_returns_double() -> None:
    model = nn.Linear(16, 8).double().eval()
    x = torch.randn(4, 16).double()
    program = quantize(model, x)
    found = program.module()(x)
    assert found.dtype == torch.float64 and error(found, model(x)) < 0.1


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "float16"])
def test_other_compute_dtypes_are_an_error(model: Block, dtype: Any) -> None:
    with pytest.raises(QCompileError, match=r"cannot compute in .*known: torch\.float16"):
        quantize(model, X, dtype=dtype)


def test_the_model_is_not_changed(model: Block, program: ExportedProgram) -> None:
    torch.manual_seed(0)
    fresh = Block()
    for (name, found), (_, expected) in zip(model.state_dict().items(), fresh.state_dict().items(), strict=True):
        assert torch.equal(found, expected), name
    assert all(p.requires_grad and isinstance(p, nn.Parameter) for p in model.parameters())


def test_a_program_in_is_not_changed_and_gives_the_same(model: Block, program: ExportedProgram) -> None:
    with torch.no_grad():
        source = torch.export.export(model, (X,))
    code, state = source.graph_module.code, {k: v.clone() for k, v in source.state_dict.items()}
    result = qcompile.quantize(source, calibration=[X], progress=False)
    assert source.graph_module.code == code
    assert all(torch.equal(v, state[k]) for k, v in source.state_dict.items())
    assert torch.equal(result.module()(X)["hidden"], program.module()(X)["hidden"])


def test_codes_equal_ml_dtypes(model: Block, program: ExportedProgram) -> None:
    for name in ("q_proj", "o_proj", "up", "down"):
        codes, scale = weight_and_scale(program, name)
        weight = model.get_submodule(name).weight.detach().float().numpy()
        expected = np.clip(weight / np.float32(scale.float()), -448, 448).astype(ml_dtypes.float8_e4m3fn)
        assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float16
        assert np.array_equal(codes.view(torch.uint8).numpy(), expected.view(np.uint8)), name


def test_int8_codes_are_per_channel(model: Block) -> None:
    program = quantize(model, X, recipe="int8_fast", dtype=torch.float32)
    codes, scale = weight_and_scale(program, "up")
    weight = model.up.weight.detach()
    assert torch.equal(scale, weight.abs().amax(1, keepdim=True) / 127)
    assert codes.dtype == torch.int8 and torch.equal(codes, (weight / scale).round().to(torch.int8))


def test_weights_that_read_one_tensor_share_a_scale(model: Block, program: ExportedProgram) -> None:
    shared = {float(weight_and_scale(program, f"{name}_proj")[1]) for name in "qkv"}
    largest = max(float(model.get_submodule(f"{name}_proj").weight.abs().max()) for name in "qkv")
    assert shared == {float(torch.tensor(largest / 448).half())}
    assert float(weight_and_scale(program, "up")[1]) == float((model.up.weight.abs().max() / 448).half())


def test_the_input_scale_is_amax_over_448(model: Block, program: ExportedProgram) -> None:
    (node,) = (n for n in nodes_of(program, QUANTIZE) if n.meta["custom"]["quantizer"] == "up.input_quantizer")
    seen: list[Tensor] = []
    handle = model.up.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().max()))
    with torch.no_grad():
        model(X)
    handle.remove()
    assert float(tensor_of(program, node.args[1])) == pytest.approx(float(seen[0]) / 448, rel=2**-10)


def test_dynamic_shapes_stay_dynamic(model: Block) -> None:
    batch = Dim("batch", min=1, max=16)
    program = quantize(model, X, dynamic_shapes=({0: batch, 1: Dim.DYNAMIC},))
    (x,) = (n for n in program.graph.nodes if n.name == "x")
    assert [isinstance(size, torch.SymInt) for size in x.meta["val"].shape] == [True, True, False]
    assert any((r.lower, r.upper) == (1, 16) for r in program.range_constraints.values())
    for shape in ((1, 32, 32), (5, 40, 32)):
        y = torch.randn(shape)
        assert error(program.module()(y)["hidden"], model(y)["hidden"]) < 0.1
    with pytest.raises(AssertionError, match=r"<= ?16"):
        program.module()(torch.randn(17, 32, 32))


def test_save_and_load(program: ExportedProgram, tmp_path: Path) -> None:
    torch.export.save(program, tmp_path / "p.pt2")
    loaded = torch.export.load(tmp_path / "p.pt2")
    assert torch.equal(loaded.module()(X)["hidden"], program.module()(X)["hidden"])
    assert quantized_modules_of(loaded) == quantized_modules_of(program)


def test_static_activations_need_calibration(model: Block) -> None:
    with pytest.raises(
        CalibrationError, match=r"(?s)scales to q_proj\.input_quantizer, .* and \d more, .*calibration=\["
    ):
        quantize(model, X, calibration=None)


def test_dynamic_activations_need_none(model: Block) -> None:
    program = quantize(model, X, calibration=None, recipe="fp8_per_channel_per_token")
    assert nodes_of(program, DYNAMIC_QUANTIZE) and not nodes_of(program, ATTENTION)
    assert error(program.module()(X)["hidden"], model(X)["hidden"]) < 0.08


@pytest.mark.everyday(2)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_nan_and_inf_in_a_weight_name_it(recipe: str, bad: float) -> None:
    model = Block()
    model.up.weight.data[3, 4] = bad
    with pytest.raises(CalibrationError, match=r"up\.weight_quantizer: the weight holds NaN or infinity"):
        quantize(model, X, recipe=recipe)


@pytest.mark.parametrize("recipe", ["fp8", "int8", "fp8_per_channel_per_token"])
def test_zeros_give_zeros(recipe: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model[1].weight.data.zero_()
    x = torch.zeros(4, 16)
    program = qcompile.quantize(model, (x,), recipe=recipe, calibration=[x], progress=False)
    for value in (x, torch.ones(4, 16)):
        assert torch.equal(program.module()(value), torch.zeros(4, 16))


def test_one_zero_channel_gives_zeros_in_it() -> None:
    model = nn.Linear(16, 4, bias=False)
    model.weight.data[2] = 0
    x = torch.randn(3, 16)
    found = quantize(model, x, recipe="int8").module()(x)
    assert torch.equal(found[:, 2], torch.zeros(3)) and error(found, model(x)) < 0.05


def test_a_format_of_a_later_version_says_where(model: Block, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "metadata: {name: mine, description: FP8 weights in other blocks}\n"
        "rules:\n"
        "  - {quantizer: 'up.weight_quantizer', format: fp8, granularity: per_block, block_shape: [64, 64]}\n"
    )
    with pytest.raises(RecipeError, match=r"up\.weight_quantizer.*mine\.yaml:3.*per_block fp8") as caught:
        quantize(model, X, recipe=str(path))
    assert str(caught.value).count("mine.yaml:3") == 1
    with pytest.raises(RecipeError, match="no recipe is called 'fp9'; shipped: fp8,"):
        quantize(model, X, recipe="fp9")


def test_a_rule_without_effect_is_noted(model: Block, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "metadata: {name: mine, description: one layer}\n"
        "rules:\n"
        "  - {quantizer: 'up.*_quantizer', format: fp8}\n"
        "  - {quantizer: 'up.output_quantizer', enable: false}\n"
        "  - {quantizer: 'gate.*', enable: false}\n"
    )
    program = quantize(model, X, recipe=path)
    (notice,) = record_of(program).notices
    assert "mine.yaml:5" in str(notice) and "gate.*" in str(notice)
    assert quantized_modules_of(program)[0] == {"up": "fp8"}


class Outputs(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(16, 16)

    def forward(self, x: Tensor, unused: Tensor | None = None) -> Any:
        y = self.linear(x)
        return {"tensor": y, "tuple": (y, x), "list": [y, {"z": y}], "none": (y, None), "number": (y, 3)}[self.kind]


@pytest.mark.everyday(3)
@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "none", "number"])
def test_the_structure_of_outputs_is_kept(kind: str) -> None:
    model, x = Outputs(kind).eval(), torch.randn(4, 16)
    program = quantize(model, x, torch.randn(3))
    found, expected = program.module()(x, torch.randn(3)), model(x)
    leaves, spec = torch.utils._pytree.tree_flatten(found)
    wanted, wanted_spec = torch.utils._pytree.tree_flatten(expected)
    assert spec == wanted_spec
    for a, b in zip(leaves, wanted, strict=True):
        assert (a.dtype == b.dtype and error(a, b) < 0.1) if isinstance(b, Tensor) else a == b


class CutsOff(Pass):
    """A rewrite that is wrong: it takes the mask for the constant that it was in the example."""

    def rewrite(self, gm: GraphModule) -> None:
        _, mask = gm.graph.find_nodes(op="placeholder")
        mask.replace_all_uses_with(add_constant(gm, "mask", torch.ones(16), mask.next))
        self.fire()


def test_a_pass_that_cuts_an_input_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.layer(x) * mask

    x, mask = torch.randn(3, 16), torch.ones(16)
    program = quantize(Model(), x, mask)
    lost = r"output 1 no longer depends on mask: a pass cut it off"
    for pipeline in ("NORMALIZE", "CANONICALIZE"):
        monkeypatch.setattr(plan, pipeline, (*getattr(plan, pipeline), CutsOff))
    with pytest.raises(QCompileError, match=lost):
        quantize(Model(), x, mask)
    with pytest.raises(QCompileError, match=lost):
        qcompile.import_quantized(program)


def test_hugging_face_outputs_and_a_padding_mask() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=50
    )
    model = transformers.BertModel(config).eval()
    batch = {"input_ids": torch.randint(0, 50, (2, 32)), "attention_mask": torch.ones(2, 32, dtype=torch.long)}
    batch["attention_mask"][1, 20:] = 0
    reversed_batch = dict(reversed(batch.items()))
    program = qcompile.quantize(model, (), batch, calibration=[reversed_batch], progress=False)
    found, expected = program.module()(**batch), model(**batch)
    assert type(found) is type(expected) and found.keys() == expected.keys()
    assert nodes_of(program, ATTENTION)
    keep = batch["attention_mask"].bool()
    assert error(found.last_hidden_state[keep], expected.last_hidden_state[keep]) < 0.1
