"""Where a model is called: with and without autograd, autocast, graph breaks, state that the model writes, and control
flow. The judge is the quantized program, or the model itself where nothing in it is quantized."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import checkpoint

import qcompile
from qcompile.errors import CompileError
from tests.qcompile.dynamo.support import (
    DYNAMIC,
    WEIGHT_ONLY,
    Mlp,
    assert_current,
    assert_same,
    compiled,
    reference,
    rounded_copy,
)

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


# autograd


def test_no_grad_inference_mode_and_grad_in_any_order() -> None:
    model = Mlp()
    run = compiled(model)
    for _ in range(2):
        for context in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
            with context:
                expected = rounded_copy(model)(X)
                result = run(X)
                assert_same(result, expected)
                assert result.requires_grad == expected.requires_grad
                assert result.is_inference() == expected.is_inference()
        with torch.no_grad():
            model.up.weight.mul_(torch.rand(32, 1) + 0.5)


def test_inputs_made_in_inference_mode() -> None:
    model = Mlp()
    run = compiled(model)
    with torch.inference_mode():
        x = X * 2
        assert_current(run, model, x)
    with torch.no_grad():
        assert_same(run(x.clone()), reference(model, x.clone()))


def test_backward_is_one_clear_error() -> None:
    run = compiled(Mlp())
    with pytest.raises(CompileError, match="compiles for inference: a rounded value has no gradient"):
        run(X).sum().backward()
    x = X.clone().requires_grad_()
    frozen = Mlp().requires_grad_(False)
    with pytest.raises(CompileError, match="compiles for inference"):
        torch.autograd.grad(compiled(frozen)(x).sum(), x)


def test_loss_on_top_of_a_compiled_model_says_so_too() -> None:
    head = nn.Linear(16, 2)
    with pytest.raises(CompileError, match="compiles for inference"):
        head(compiled(Mlp())(X)).sum().backward()
    assert head(compiled(Mlp())(X).detach()).sum().backward() is None


class ManyResults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        with torch.no_grad():
            frozen = self.fc(x)
        return {"y": y, "of_x": x * 2, "ids": y.argmax(-1), "detached": y.detach(), "frozen": frozen, "mask": y > 0,
                "complex": torch.complex(y, y), "x": x}  # fmt: skip


def test_only_results_that_need_a_gradient_ask_for_one() -> None:
    model = ManyResults()
    expected, result = rounded_copy(model)(X), compiled(model)(X)
    assert {k: v.requires_grad for k, v in result.items()} == {k: v.requires_grad for k, v in expected.items()}
    assert_same(result, expected)
    assert result["x"] is X
    with pytest.raises(CompileError, match="compiles for inference"):
        result["complex"].abs().sum().backward()


def test_no_grad_inside_the_model() -> None:
    class Frozen(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    model = Frozen()
    assert not compiled(model)(X).requires_grad
    assert_current(compiled(model), model, X)


# autocast


class OwnAutocast(nn.Module):
    """Casts of its own, switched off again where a norm wants float32."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.mlp(x)
            with torch.autocast("cpu", enabled=False):
                y = F.layer_norm(y.float(), (16,))
        return self.head(y)


@pytest.mark.everyday(1)
@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_ambient_autocast(target: str) -> None:
    model = Mlp()
    run = compiled(model, target=target)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        result, expected, plain = run(X), rounded_copy(model)(X), model(X)
    assert result.dtype == torch.bfloat16
    assert_same(result, expected, 4 * torch.finfo(torch.bfloat16).eps)
    assert (result - plain).abs().max() > 0
    with torch.no_grad():
        assert_current(run, model, X)  # without autocast again


def test_autocast_in_the_model() -> None:
    model = OwnAutocast()
    result, expected = compiled(model)(X), rounded_copy(model)(X)
    assert_same(result, expected, 4 * torch.finfo(torch.bfloat16).eps)
    assert qcompile.explain(model).graphs[0].coverage["linear"][0] == 3


# graph breaks


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        torch._dynamo.graph_break()
        if h.sum() > 1e9:  # depends on data
            h = -h
        return self.down(torch.relu(h))


@pytest.mark.parametrize("grad", [True, False])
def test_graph_breaks(grad: bool) -> None:
    model = Breaks()
    run = compiled(model, fullgraph=False)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            assert_same(run(X), rounded_copy(model)(X))
            model.up.weight.data = torch.randn(32, 16)
    assert set(qcompile.explain(run).quantized) == {"up", "down"}


def test_fullgraph_refuses_a_break() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(Breaks(), fullgraph=True)(X)


def test_nested_compiled_functions() -> None:
    model = Mlp()
    inner = compiled(lambda x: model(x) + 1)
    outer = compiled(lambda x: inner(x) * 2)
    assert_same(outer(X), (rounded_copy(model)(X) + 1) * 2)
    other = torch.compile(lambda x: model(x), backend="eager")
    assert_same(other(X), model(X))


# state


class Cache(nn.Module):
    """One step of decoding with a key/value cache in buffers, and a counter."""

    keys: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(16, 16)
        self.register_buffer("keys", torch.zeros(8, 16))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        self.keys.index_copy_(0, position, self.k(x))
        self.count += 1
        return x @ self.keys.T + self.count


@pytest.mark.everyday(1)
@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_key_value_cache_and_counter(target: str) -> None:
    model = Cache()
    judge = rounded_copy(model)
    run = compiled(model, target=target)
    with torch.no_grad():
        for step in range(4):
            x, position = torch.randn(1, 16), torch.tensor([step])
            assert_same(run(x, position), judge(x, position))
            assert_same(model.keys, judge.keys)
            assert model.count == judge.count == step + 1
    assert len(qcompile.explain(model).graphs) == 1


class _Seen(CustomGraphPass):
    """Keeps which inputs Inductor is told are written to, and which of them stay where they are."""

    written: list[bool]

    def __call__(self, graph: torch.fx.Graph) -> None:
        known = torch._guards.TracingContext.get().fw_metadata
        written = [i for i, info in enumerate(known.input_info) if info.mutates_data]
        self.written = [i in known.static_input_indices for i in written]

    def uuid(self) -> None:
        """No part of a cache's key: the graph is compiled anew."""


@pytest.mark.slow
def test_caches_that_are_written_to_stay_where_they_are() -> None:
    """Or Inductor makes no CUDA graph of a step: it skips one that writes to an input that may move."""
    for seen, backend in ((_Seen(), "inductor"), (_Seen(), "qcompile")):
        torch._dynamo.reset()
        model, settings = Cache(), {"post_grad_custom_post_pass": seen, "fx_graph_cache": False}
        options = settings if backend == "inductor" else {"recipe": WEIGHT_ONLY, "inductor": settings}
        with torch.no_grad():
            torch.compile(model, backend=backend, options=options)(torch.randn(1, 16), torch.tensor([3]))
        assert seen.written == [True, True]


def test_batch_norm_in_training_updates_its_buffers() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).train()
    judge = rounded_copy(model)
    run = compiled(model)
    for _ in range(3):
        x = torch.randn(8, 16)
        assert_same(run(x), judge(x))
    for (name, a), b in zip(model.named_buffers(), judge.buffers(), strict=True):
        assert_same(a, b), name
    model.eval(), judge.eval()
    assert_same(run(X), judge(X))


def test_inputs_that_are_written_to() -> None:
    model = nn.Linear(16, 16)

    def step(x: Tensor, out: dict[str, Tensor]) -> Tensor:
        x.mul_(2)
        out["y"][1:] = model(x)[1:]
        out["new"] = x + 1
        return x

    judge = nn.functional.linear
    weight = rounded_copy(model).weight  # type: ignore[arg-type]
    x, out = X.clone(), {"y": torch.zeros(3, 16)}
    with torch.no_grad():
        result = compiled(step)(x, out)
        y = judge(X * 2, weight, model.bias)  # type: ignore[arg-type]
    assert_same(x, X * 2)
    assert result is x, "what is returned is the input itself"
    assert_same(out["y"], torch.cat([torch.zeros(1, 16), y[1:]]))
    assert_same(out["new"], X * 2 + 1)


@pytest.mark.everyday(1)
@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_views_and_aliased_results(target: str) -> None:
    model = nn.Linear(16, 16)

    def views(x: Tensor) -> tuple[Tensor, ...]:
        y = model(x)
        return x.view(-1), x, y, y.t(), y[0], y

    x = X.clone()
    with torch.no_grad():
        flat, same, y, turned, row, again = compiled(views, target=target)(x)
        assert_same((flat, same, y), (X.view(-1), X, rounded_copy(model)(X)))
        assert same is x
        x.zero_()
        assert not flat.any(), "a view of an input is one"
        y.fill_(7)
    assert (turned == 7).all() and (row == 7).all() and (again == 7).all(), "views of a result are views of it"


def test_a_view_of_an_input_that_is_written_to() -> None:
    def write(x: Tensor) -> Tensor:
        view = x[0]
        x.add_(1)
        return view

    x = X.clone()
    with torch.no_grad():
        row = compiled(write)(x)
        assert_same(row, X[0] + 1)
        assert_same(x, X + 1)


# what goes in and comes out


@dataclasses.dataclass
class Batch:
    x: Tensor
    scale: float


def test_dicts_dataclasses_and_keywords() -> None:
    model = Mlp()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Batch, *, extra: dict[str, Tensor] | None = None) -> dict[str, Any]:
            y = self.model(batch.x * batch.scale)
            return {"y": y, "batch": Batch(y, batch.scale), "extra": [v + 1 for v in (extra or {}).values()]}

    result = compiled(Wrapped())(Batch(X, 2.0), extra={"a": X})
    y = reference(model, X * 2)
    assert_same(result["y"], y)
    assert isinstance(result["batch"], Batch)
    assert_same(result["batch"].x, y)
    assert_same(result["extra"], [X + 1])


def test_no_weights_no_floats_nothing() -> None:
    def count(ids: Tensor) -> Tensor:
        return (ids * 3 % 7).cumsum(-1)

    ids = torch.arange(12).view(3, 4)
    assert_same(compiled(count)(ids), count(ids))
    assert_same(compiled(nn.ReLU())(X), X.relu())
    assert_same(compiled(lambda: torch.arange(5) + 1)(), torch.arange(5) + 1)
    assert compiled(lambda x: x)(X) is X
    assert compiled(lambda x: None)(X) is None


def test_complex_numbers() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
            turned = torch.view_as_complex(self.fc(x).view(3, 8, 2)) * torch.polar(torch.ones_like(angles), angles)
            return torch.view_as_real(turned).flatten(1), turned

    model, angles = Rotary(), torch.rand(3, 8)
    assert_same(compiled(model)(X, angles), rounded_copy(model)(X, angles))


# randomness


def test_dropout_in_training_draws_the_same_numbers() -> None:
    class Dropping(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.dropout(self.up(x), 0.5, self.training))

    model = Dropping().train()
    run = compiled(model)
    draws = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        draws.append(run(X))
        torch.manual_seed(seed)
        assert_same(draws[-1], rounded_copy(model)(X))
    assert not torch.equal(draws[0], draws[1])
    model.eval()
    assert_current(run, model, X)


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_random_operators_are_not_folded(target: str) -> None:
    model = Mlp()
    run = compiled(lambda x: model(x) + torch.randn(3, 16) + torch.rand_like(x), target=target)
    with torch.no_grad():
        assert not torch.equal(run(X), run(X))
        torch.manual_seed(3)
        first = run(X)
        torch.manual_seed(3)
        assert torch.equal(run(X), first)


# control flow and higher-order operators


def test_activation_checkpointing() -> None:
    """What is wrapped is quantized as the rest is."""
    model = Mlp()

    def run(x: Tensor) -> Tensor:
        result: Tensor = checkpoint(model, x, use_reentrant=False)
        return result + 1

    assert_same(compiled(run)(X), rounded_copy(model)(X) + 1)
    assert len(qcompile.explain(run).quantized) == 2


def test_cond() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return torch.cond(y.sum() > 0, lambda y: y * 2, lambda y: y - 1, (y,))  # type: ignore[no-any-return]

    model = Switch()
    run = compiled(model)
    with torch.no_grad():
        for x in (X, -X, X * 0.1, X + 1, X - 1):
            assert_same(run(x), rounded_copy(model)(x))


def test_cond_with_layers_in_its_branches() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, self.one, self.two, (x,))  # type: ignore[no-any-return]

    model = Switch()
    run = compiled(model)
    with torch.no_grad():
        for x in (X + 1, X - 1):
            candidates = model(x), rounded_copy(model)(x)
            assert any(torch.allclose(run(x), c, rtol=0, atol=1e-5) for c in candidates)


def test_half_precision_is_computed_in_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = Mlp().to(dtype)
        x = X.to(dtype)
        run = compiled(model, DYNAMIC)
        assert run(x).dtype == dtype
        assert_same(run(x), reference(model, x, recipe=DYNAMIC), 2 * torch.finfo(dtype).eps)


def test_float64_models_say_what_they_get() -> None:
    """No quantized program computes in float64: an error, or the numbers of the rounded weights."""
    model = Mlp().double()
    try:
        result = compiled(model)(X.double())
    except BackendCompilerFailed as error:
        assert "float64" in str(error)
    else:
        assert_same(result, rounded_copy(model)(X.double()), 1e-5)


def test_a_function_over_two_models() -> None:
    one, two = Mlp(), Mlp()
    run = compiled(lambda x: one(x) + two(x))
    assert_same(run(X), rounded_copy(one)(X) + rounded_copy(two)(X))
    assert len(qcompile.explain(run).quantized) == 4


@pytest.mark.xfail(strict=True, reason="functionalization before dispatch knows no levels of functorch")
def test_model_under_torch_func_vmap() -> None:
    """vmap over a linear layer keeps its numbers."""
    model = Mlp()
    run = compiled(lambda x: torch.func.vmap(model)(x))
    x = torch.randn(4, 3, 16)
    with torch.no_grad():
        candidates = rounded_copy(model)(x), model(x)
        assert any(torch.allclose(run(x), c, rtol=0, atol=1e-5) for c in candidates)


def test_judges_agree() -> None:
    """The program of `qcompile.quantize` computes what the rounded copy does."""
    model = Mlp()
    with torch.no_grad():
        assert_same(reference(model, X, recipe=WEIGHT_ONLY), rounded_copy(model)(X), 1e-6)


def test_numbers_under_another_default_dtype() -> None:
    """The scale of the softmax is 1/448 in float32 whatever new tensors are by default."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4))

    model, x = Attending(), torch.randn(2, 40, 32)
    state = qcompile.calibrate(model, (x,), recipe="fp8", calibration=[x], progress=False)
    with torch.no_grad():
        expected = compiled(model, "fp8", calibration=state)(x)
        torch._dynamo.reset()
        torch.set_default_dtype(torch.bfloat16)
        try:
            result = compiled(model, "fp8", calibration=state)(x)
        finally:
            torch.set_default_dtype(torch.float32)
    assert_same(result, expected)


@pytest.mark.everyday(1)
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fast_path_of_an_encoder_layer(norm_first: bool) -> None:
    """Without gradients torch has one operator for it, in which no pass would find a linear layer."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first, activation="gelu").eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        run = compiled(layer, DYNAMIC)
        torch.testing.assert_close(run(x), reference(layer, x, recipe=DYNAMIC), rtol=1e-5, atol=1e-5)
        assert qcompile.explain(run).graphs[0].coverage["linear"] == (4, 4)


_PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
_CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)


@pytest.mark.everyday(2)
@pytest.mark.parametrize(
    "masks",
    [
        {"src_key_padding_mask": _PADDING},
        {"src_mask": _CAUSAL},
        {"src_mask": _CAUSAL < 0},
        {"src_mask": (_CAUSAL < 0).expand(8, 5, 5)},
        {"src_mask": _CAUSAL < 0, "src_key_padding_mask": _PADDING},
    ],
    ids=["padding", "causal", "boolean", "one for each head", "both"],
)
def test_masks_on_the_fast_path_of_an_encoder_layer(masks: dict[str, torch.Tensor]) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    rule = {"quantizer": "*.linear2.weight_quantizer", "format": "fp8", "granularity": "per_channel"}
    recipe = {"metadata": {"name": "mine", "description": "nearly nothing"}, "rules": [rule]}
    with torch.no_grad():
        run = compiled(layer, recipe)
        layer.linear2.weight.zero_()  # nothing is rounded, so torch's own operator is the judge
        torch.testing.assert_close(run(x, **masks), layer(x, **masks), rtol=1e-5, atol=1e-5)


def test_an_encoder_and_a_decoder_with_a_mask_are_one_graph() -> None:
    """torch tests a mask of which nothing is said for being causal, by its values, where Dynamo gave up."""
    model = nn.Transformer(32, 4, 1, 1, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        run = compiled(model, DYNAMIC, expect={"linear": 9})
        got, want = run(x, x, src_mask=_CAUSAL, tgt_mask=_CAUSAL), model(x, x, src_mask=_CAUSAL, tgt_mask=_CAUSAL)
        assert float((got - want).norm() / want.norm()) < 0.1
        assert len(qcompile.explain(run).graphs) == 1
