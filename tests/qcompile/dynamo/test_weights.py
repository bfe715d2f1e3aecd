"""Right before fast: whatever happens to the weights, the numbers are those of the weights as they are now.

The judge is `qcompile.quantize` of the model at that moment.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import qcompile
from tests.qcompile.dynamo.support import (
    WEIGHT_ONLY,
    Mlp,
    assert_current,
    assert_same,
    compiled,
    reference,
    rounded,
    rounded_copy,
)

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def graphs_of(model: Any) -> int:
    return len(qcompile.explain(model).graphs)


def test_two_modules_of_one_class_in_alternation() -> None:
    first, second = Mlp(), Mlp()
    run_first, run_second = compiled(first), compiled(second)
    for _ in range(2):
        assert_current(run_first, first, X)
        assert_current(run_second, second, X)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "the second module needs no graph of its own"


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_layers_of_a_stack_compiled_one_by_one(target: str) -> None:
    """Regional compilation: one graph serves all layers, each with its own codes."""
    stack = nn.Sequential(*(Mlp() for _ in range(4)))
    expected = rounded_copy(stack)(X)
    for layer in stack:
        layer.compile(backend="qcompile", fullgraph=True, options={"recipe": WEIGHT_ONLY, "target": target})
    for _ in range(2):
        with torch.no_grad():  # else the first layer differs from the others: its input needs no gradient
            assert_same(stack(X), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_more_layers_than_any_cache_holds_are_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An 80-layer model that is compiled layer by layer must not quantize all of them in each forward."""
    import qcompile.dynamo.backend as backend

    count = 0
    original = backend.lower

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args)

    monkeypatch.setattr(backend, "lower", counted)
    layers = [nn.Linear(16, 16) for _ in range(66)]
    runs = [compiled(layer) for layer in layers]
    for run in runs:
        run(X)
    assert count == len(layers)
    results = [run(X) for run in runs]
    assert count == len(layers)
    for layer, result in list(zip(layers, results, strict=True))[::23]:
        assert_same(result, rounded_copy(layer)(X))


def replace_parameter(model: Mlp) -> None:
    model.up.weight = nn.Parameter(torch.randn_like(model.up.weight))


def optimizer_step(model: Mlp) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(X).square().sum().backward()  # the module itself, uncompiled
    optimizer.step()


def multiply_in_place(model: Mlp) -> None:
    with torch.no_grad():
        model.up.weight.mul_(torch.rand(32, 1) + 0.5)


def copy_into(model: Mlp) -> None:
    with torch.no_grad():
        model.down.weight.copy_(torch.randn_like(model.down.weight))


def write_through_detach(model: Mlp) -> None:
    model.up.weight.detach()[3].zero_()


def init(model: Mlp) -> None:
    nn.init.normal_(model.up.weight)


def assign_data(model: Mlp) -> None:
    model.up.weight.data = torch.randn_like(model.up.weight)


def assign_data_twice(model: Mlp) -> None:
    """The allocator gives the second new tensor the address of the first weight."""
    model.up.weight.data = model.up.weight.data + torch.randn(32, 16)
    model.up.weight.data = model.up.weight.data + torch.randn(32, 16)


def offload_and_reload(model: Mlp) -> None:
    """The weight comes back with other numbers, often at the address that it had."""
    other = torch.randn(32, 16) * 3
    model.up.weight.data = torch.empty(0)
    model.up.weight.data = other.clone()


def load_state(model: Mlp) -> None:
    model.load_state_dict(Mlp().state_dict())


def load_state_by_assignment(model: Mlp) -> None:
    model.load_state_dict(Mlp().state_dict(), assign=True)


def replace_module(model: Mlp) -> None:
    model.up = nn.Linear(16, 32)


def swap_tensors(model: Mlp) -> None:
    torch.utils.swap_tensors(model.up.weight, nn.Parameter(torch.randn(32, 16)))


def foreach_lerp(model: Mlp) -> None:
    """An exponential moving average of weights, as training loops write it."""
    with torch.no_grad():
        torch._foreach_lerp_(list(model.parameters()), [torch.randn_like(p) for p in model.parameters()], 0.5)


def change_bias(model: Mlp) -> None:
    with torch.no_grad():
        model.down.bias.add_(torch.randn(16))


CHANGES: list[Callable[[Mlp], None]] = [
    replace_parameter,
    optimizer_step,
    multiply_in_place,
    copy_into,
    write_through_detach,
    init,
    assign_data,
    assign_data_twice,
    offload_and_reload,
    load_state,
    load_state_by_assignment,
    replace_module,
    foreach_lerp,
    change_bias,
]


@pytest.mark.everyday(3)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen_at_the_next_call(change: Callable[[Mlp], None]) -> None:
    model = Mlp()
    run = compiled(model)
    before = run(X)
    for _ in range(2):
        change(model)
        assert_current(run, model, X)
        assert not torch.equal(run(X), before)
    assert graphs_of(run) == 1, "numbers of weights are no reason to compile again"


def test_changes_are_seen_by_inductor() -> None:
    model = Mlp()
    run = compiled(model, target="inductor")
    with torch.no_grad():
        run(X)
        for change in (multiply_in_place, load_state_by_assignment, assign_data_twice, replace_parameter):
            change(model)
            assert_current(run, model, X)
    assert graphs_of(run) == 1


def test_swapped_tensors_are_seen() -> None:
    """`swap_tensors` refuses tensors that anything refers to weakly, as torch.compile itself does."""
    model = Mlp()
    run = compiled(model)
    run(X)
    try:
        swap_tensors(model)
    except RuntimeError as error:
        assert "weakref" in str(error)
    assert_current(run, model, X)


class Lora(nn.Module):
    """A linear layer with a low-rank update that peft can merge into it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 16)
        self.a = nn.Parameter(torch.randn(4, 16))
        self.b = nn.Parameter(torch.randn(16, 4))
        self.merged = False

    def delta(self) -> Tensor:
        return self.b @ self.a

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        return result if self.merged else result + x @ self.a.T @ self.b.T


def test_lora_merge_and_unmerge() -> None:
    model = Lora()
    run = compiled(model)
    assert_same(run(X), reference(model, X))
    for sign in (1, -1, 1):
        with torch.no_grad():
            model.base.weight.data = model.base.weight.data + sign * model.delta()
        model.merged = sign == 1
        assert_same(run(X), reference(model, X))


def test_lora_weights_updated_by_training_between_calls() -> None:
    model = Lora()
    run = compiled(model)
    run(X)
    optimizer = torch.optim.Adam([model.a, model.b], lr=0.1)
    model(X).sum().backward()
    optimizer.step()
    assert_same(run(X), reference(model, X))


def test_functional_call_with_other_weights() -> None:
    """Weights that come as arguments are inputs: they are right, whether they are quantized or not."""
    model = Mlp()
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    @torch.compile(backend="qcompile", options={"recipe": WEIGHT_ONLY, "target": "eager"})
    def run(weights: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(model, weights, (x,))

    for weights in (dict(model.named_parameters()), other, {n: w * 2 for n, w in other.items()}):
        given = copy.deepcopy(model)
        given.load_state_dict(weights)
        candidates = [rounded_copy(given)(X).detach(), given(X).detach()]
        result = run(weights, X)
        assert any(torch.allclose(result, c, rtol=0, atol=1e-5 * float(c.abs().max())) for c in candidates)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(16, 16, bias=False)
        self.two = nn.Linear(16, 16, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def test_tied_weights_and_untied_later() -> None:
    model = Tied()
    run = compiled(model)
    assert_current(run, model, X)
    assert qcompile.explain(run).graphs[0].weight_bytes < 2 * 16 * 16, "tied codes are kept once"
    with torch.no_grad():
        model.one.weight.mul_(3)
    assert_current(run, model, X)
    model.two.weight = nn.Parameter(torch.randn(16, 16))
    assert_current(run, model, X)
    with torch.no_grad():
        model.one.weight.add_(1)
    assert_current(run, model, X)
    model.two.weight = model.one.weight
    assert_current(run, model, X)


def test_two_parameters_of_one_storage() -> None:
    model = Tied()
    model.two.weight = nn.Parameter(model.one.weight.detach().t())
    run = compiled(model)
    assert_current(run, model, X)
    with torch.no_grad():
        model.one.weight.mul_(torch.rand(16, 1) * 3)
    assert_current(run, model, X)


class Buffered(nn.Module):
    """A weight that is a buffer, and a buffer that is a number."""

    scale: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("weight", torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) * self.scale


def test_buffers() -> None:
    model = Buffered()
    run = compiled(model)
    assert_same(run(X), reference(model, X))
    model.scale.fill_(5)
    model.weight.neg_()
    assert_same(run(X), reference(model, X))
    model.weight = torch.randn(8, 16)
    model.scale = torch.tensor(-1.0)
    assert_same(run(X), reference(model, X))


def test_a_weight_at_the_place_of_one_that_died() -> None:
    model = nn.Linear(16, 16)
    run = compiled(model)
    places: set[tuple[int, int]] = set()
    again = False
    for _ in range(300):
        del model.weight
        model.weight = nn.Parameter(torch.randn(16, 16))
        place = id(model.weight), model.weight.data_ptr()
        again |= place in places
        places.add(place)
        assert_same(run(X), nn.functional.linear(X, rounded(model.weight), model.bias))
        if again and len(places) > 10:
            break
    assert again, "the allocator gave no place twice: the test says nothing"


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = Mlp()
    with (
        torch.inference_mode(),
        pytest.raises(Exception, match=r"made in inference mode.*outside of torch"),
    ):
        compiled(model)(X)


def test_a_weight_from_inference_mode_later_is_refused() -> None:
    model = Mlp()
    run = compiled(model)
    run(X)
    with torch.inference_mode():
        model.up.weight = nn.Parameter(torch.randn(32, 16))
    with torch.inference_mode(), pytest.raises(Exception, match="was made in inference mode"):
        run(X)


def test_dtype_changes() -> None:
    model = Mlp()
    run = compiled(model)
    assert_current(run, model, X)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        x = X.to(dtype)
        assert_same(run(x), reference(model, x), 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
        assert run(x).dtype == dtype


def test_requires_grad_toggles() -> None:
    model = Mlp()
    run = compiled(model)
    assert run(X).requires_grad
    model.requires_grad_(False)
    assert not run(X).requires_grad
    assert_current(run, model, X)
    model.up.weight.requires_grad_(True)
    with torch.no_grad():
        model.up.weight.mul_(2)
    assert run(X).requires_grad
    assert_current(run, model, X)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_parametrized_weights() -> None:
    """A weight that is computed has no constant codes; the numbers are right either way."""
    model = nn.Linear(16, 16)
    parametrize.register_parametrization(model, "weight", Halved())
    run = compiled(model)
    for _ in range(2):
        assert_same(run(X), model(X), 0.1)
        with torch.no_grad():
            model.parametrizations.weight.original.mul_(torch.rand(16, 1) * 5)
    parametrize.remove_parametrizations(model, "weight")
    assert_current(run, model, X)


def codes(shape: tuple[int, ...] = (32, 16)) -> int:
    """How many tensors of FP8 codes of this shape there are in the process."""
    gc.collect()
    return sum(
        type(o) is Tensor and o.dtype == torch.float8_e4m3fn and o.shape == shape and o.device.type == "cpu"
        for o in gc.get_objects()
    )


class Wide(nn.Module):
    """Codes of shapes that no other test makes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


WIDE = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))


@pytest.mark.slow
def test_codes_are_kept_once_for_all_graphs_of_a_weight() -> None:
    model = Wide()
    run = compiled(model)
    run(WIDE)
    with torch.no_grad():
        run(WIDE)
    run(WIDE[:2])
    assert graphs_of(run) >= 3
    assert codes((40, 24)) == 1
    with torch.no_grad():
        model.fc.weight.mul_(2)
        run(WIDE)
    run(WIDE), run(WIDE[:2])
    assert codes((40, 24)) == 1


@pytest.mark.slow
def test_codes_of_a_changed_weight_replace_the_old_ones() -> None:
    model = Wide()
    run = compiled(model)
    for _ in range(5):
        run(WIDE)
        with torch.no_grad():
            model.fc.weight.add_(1)
    assert codes((40, 24)) == 1


@pytest.mark.slow
def test_nothing_outlives_a_model() -> None:
    """Another module of the class keeps the compiled code alive, and with it what it holds."""
    keep, model = Wide(), Wide()
    run_keep, run = compiled(keep), compiled(model)
    run_keep(WIDE), run(WIDE)
    assert codes((40, 24)) == 2
    dead = [weakref.ref(model), weakref.ref(model.fc.weight)]
    del model, run
    gc.collect()
    assert [ref() for ref in dead] == [None, None]
    assert codes((40, 24)) == 1
    assert_current(run_keep, keep, WIDE)


@pytest.mark.slow
def test_reset_frees_codes_of_models_that_live_on() -> None:
    model = Wide()
    compiled(model)(WIDE)
    assert codes((40, 24)) == 1
    torch._dynamo.reset()
    assert codes((40, 24)) == 0
    assert_current(compiled(model), model, WIDE)


def test_training_beside_a_compiled_model_accumulates_nothing() -> None:
    """What watches a weight is not registered anew with each change."""
    model = nn.Linear(16, 16)
    run = compiled(model)

    def step() -> None:
        run(X)
        with torch.no_grad():
            model.weight.add_(1e-3)

    step()
    gc.collect()  # what earlier tests left
    before = weakref.getweakrefcount(model.weight), len(weakref.finalize._registry)  # type: ignore[attr-defined]
    for _ in range(5):
        step()
    after = weakref.getweakrefcount(model.weight), len(weakref.finalize._registry)  # type: ignore[attr-defined]
    assert after == before


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda p: p.data.mul_(-1), id="data"),
        pytest.param(lambda p: setattr(p, "data", p.data.mul_(-1)), id="peft"),  # what `weight.data += delta` does
        pytest.param(lambda p: p.detach().numpy().__imul__(-1), id="numpy"),
    ],
)
def test_writes_that_torch_does_not_count_are_seen_after_a_refresh(write: Callable[[Tensor], Any]) -> None:
    """Documented: `weight.data.mul_()`, `weight.data += delta` (peft's merge without `safe_merge`) and writes through
    numpy leave address and version as they were."""
    model = Mlp()
    run = compiled(model)
    before = run(X)
    write(model.up.weight)
    assert torch.equal(run(X), before), "torch counts these now: say so in the documentation"
    qcompile.refresh(run)
    assert_current(run, model, X)
    assert len(qcompile.explain(run).graphs) == 1, "compiled again"


def test_weights_do_not_move_for_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor copies every input into a CUDA graph at each call, but those that are said to stay where they are."""
    from qcompile.dynamo import inductor

    compile_fx: Any = inductor.compile_fx
    static: list[tuple[int, int]] = []

    def spy(gm: Any, inputs: Any, **options: Any) -> Any:
        def inner(graph: Any, fakes: Any, **more: Any) -> Any:
            static.append((len(more["static_input_idxs"]), len(fakes)))
            return compile_fx_inner(graph, fakes, **more)

        return compile_fx(gm, inputs, inner_compile=inner, **options)

    from torch._inductor.compile_fx import compile_fx_inner

    monkeypatch.setattr(inductor, "compile_fx", spy)
    with torch.no_grad():
        compiled(nn.Linear(16, 16), target="inductor", inductor={"force_disable_caches": True})(X)
    ((kept, inputs),) = static
    assert inputs == 4, "the input of the user, codes, scale and bias"
    assert kept == 3
