"""Dynamic shapes and numbers: how often is compiled, and that every size has the numbers of the quantized program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompile
from tests.qcompile.dynamo.support import (
    DYNAMIC,
    WEIGHT_ONLY,
    Mlp,
    assert_current,
    assert_same,
    compiled,
    reference,
    rounded,
    rounded_copy,
)

transformers = pytest.importorskip("transformers")


def graphs() -> int:
    """How often a graph was compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Block(nn.Module):
    """Pre-norm attention with a causal mask of the sequence's length, made in the model, and an MLP."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        attended = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(x)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


def program_of(model: nn.Module, recipe: Any = DYNAMIC) -> Any:
    """The quantized program, exported for any batch and length."""
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    return qcompile.quantize(
        model, (torch.randn(4, 7, 32),), recipe=recipe, dynamic_shapes=shapes, dtype=torch.float32, progress=False
    ).module()


def run_sizes(run: Any, model: nn.Module, sizes: list[tuple[int, int]], recipe: Any = DYNAMIC) -> list[int]:
    """Checks the numbers at each (batch, length); returns how many graphs there were after each."""
    counts, judge = [], program_of(model, recipe)
    for batch, length in sizes:
        x = torch.randn(batch, length, 32)
        assert_same(run(x), judge(x))
        counts.append(graphs())
    return counts


def test_static_then_dynamic_then_no_more() -> None:
    """As with any back end: the second size of an axis compiles once more, for all sizes of that axis."""
    model = Block().eval()
    run = compiled(model, DYNAMIC)
    sizes = [(2, 8), (2, 8), (3, 8), (5, 8), (7, 8), (5, 6), (4, 9), (6, 17)]
    assert run_sizes(run, model, sizes) == [1, 1, 2, 2, 2, 3, 3, 3]
    assert len(qcompile.explain(run).graphs) == 3


@pytest.mark.slow
def test_sizes_one_and_zero() -> None:
    """Dynamo compiles sizes 0 and 1 apart."""
    model = Block().eval()
    run = compiled(model, dynamic=True)
    counts = []
    for size in [(2, 8), (3, 5), (1, 8), (1, 12), (2, 1), (4, 1)]:
        assert_current(run, model, torch.randn(*size, 32))
        counts.append(graphs())
    assert counts == [1, 1, 2, 2, 3, 3]
    assert run(torch.randn(0, 8, 32)).shape == (0, 8, 32)


@pytest.mark.slow
def test_marked_dynamic_compiles_once() -> None:
    model = Block().eval()
    run, judge = compiled(model, DYNAMIC), program_of(model)
    for size in [(2, 8), (3, 8), (5, 6), (9, 17)]:
        x = torch.randn(*size, 32)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        assert_same(run(x), judge(x))
    assert graphs() == 1


@pytest.mark.slow
def test_dynamic_true_compiles_once() -> None:
    """Dynamo then hands Python floats such as the eps of LayerNorm over as tensors."""
    model = Block().eval()
    run = compiled(model, DYNAMIC, dynamic=True)
    assert run_sizes(run, model, [(2, 8), (3, 8), (5, 6), (9, 17)]) == [1, 1, 1, 1]


def test_dynamic_false_compiles_each_size() -> None:
    model = Mlp(32)
    run = compiled(model, dynamic=False)
    assert run_sizes(run, model, [(2, 8), (3, 8), (2, 8), (5, 8)], WEIGHT_ONLY) == [1, 2, 2, 3]


@pytest.mark.slow
def test_dynamic_shapes_by_inductor() -> None:
    model = Block().eval()
    run = compiled(model, target="inductor", dynamic=True)
    assert run_sizes(run, model, [(2, 8), (3, 5), (4, 11)], WEIGHT_ONLY) == [1, 1, 1]


@pytest.mark.slow
def test_weights_change_between_sizes() -> None:
    """Each graph that was compiled for a size looks at the weights itself."""
    model = Block().eval()
    run = compiled(model)
    for _ in range(2):
        for batch in (2, 3, 4, 1):
            assert_current(run, model, torch.randn(batch, 8, 32))
            model.qkv.weight.mul_(torch.rand(96, 1) + 0.5)
            model.mlp.up.weight.data = torch.randn_like(model.mlp.up.weight)
    assert graphs() == 3


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, factor: float, repeat: int = 1, flag: bool = False) -> Tensor:
        y = self.fc(x * factor)
        return torch.cat([y] * repeat) if flag else y * repeat


def test_float_and_int_arguments() -> None:
    model = Scaled()
    run, judge = compiled(model), rounded_copy(model)
    x = torch.randn(3, 16)
    for factor, repeat, flag in [(1.0, 1, False), (0.5, 1, False), (0.25, 1, False), (0.5, 3, False), (2.0, 5, False),
                                 (2.0, 2, True), (1.5, 7, False)]:  # fmt: skip
        assert_same(run(x, factor, repeat, flag=flag), judge(x, factor, repeat, flag=flag))


def test_a_float_that_changes_at_every_call(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A diffusion loop hands over sigma or guidance as a Python float: codes are kept once, and a line in the log says
    that a tensor were better."""
    monkeypatch.setattr("qcompile.dynamo.compiled.KEPT", 10)
    model = Scaled()
    run, judge = compiled(model), rounded_copy(model)
    x = torch.randn(3, 16)
    for step in range(15):
        assert_same(run(x, 1.0 - step / 100), judge(x, 1.0 - step / 100))
    bound = [b for g in _compiled_graphs() for weights in g._bound.values() for b in weights.by_numbers.values()]
    codes = {
        id(c) for b in bound for c in b.binding.constants if isinstance(c, Tensor) and c.dtype == torch.float8_e4m3fn
    }
    assert len(codes) == 1
    assert len(bound) <= 11, "what is kept for numbers has a limit"
    assert len(bound) >= 8, "a number is a constant of what is compiled for it: passes and kernels read its value"
    said = [record.getMessage() for record in caplog.records if "Python number" in record.getMessage()]
    assert len(said) <= 1
    if graphs() < len(bound):  # the back end compiled where Dynamo did not
        assert said and "hand it over as a tensor" in said[0]


def _compiled_graphs() -> list[Any]:
    from qcompile.dynamo import registry

    return list(registry._KNOWN)


def test_sizes_as_results() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, int, float]:
            return self.fc(x), x.shape[0] * 2, x.shape[0] / 4

    model = Sized()
    run = compiled(model, dynamic=True)
    for batch in (2, 3, 6):
        x = torch.randn(batch, 16)
        y, count, ratio = run(x)
        assert (count, ratio) == (batch * 2, batch / 4)
        assert_same(y, rounded_copy(model.fc)(x))
    assert graphs() == 1


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()  # type: ignore[no-any-return]


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
        num_labels=5, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()  # type: ignore[no-any-return]


@pytest.mark.slow
def test_llama_with_grouped_queries_in_any_shape() -> None:
    model = llama()
    run = compiled(model, DYNAMIC, dynamic=True)
    for batch, length in [(2, 9), (3, 14)]:
        ids = torch.randint(0, 64, (batch, length))
        expected = reference(Logits(model), ids, recipe=DYNAMIC)
        result = run(ids)
        assert type(result).__name__ == "CausalLMOutputWithPast"
        assert_same(result.logits, expected)
    assert graphs() == 1
    explained = qcompile.explain(run)
    assert explained.graphs[0].coverage["linear"][0] == 14, explained


@pytest.mark.slow
def test_llama_with_a_padding_mask() -> None:
    model = llama()
    run = compiled(model, DYNAMIC, dynamic=True)
    for batch, length in [(2, 9), (3, 12)]:
        ids = torch.randint(0, 64, (batch, length))
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, :3] = 0
        assert_same(run(ids, attention_mask=mask).logits, reference(Logits(model), ids, mask, recipe=DYNAMIC))


class Logits(nn.Module):
    """torch.export does not need to know the classes of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        result = self.model(x) if mask is None else self.model(x, attention_mask=mask)
        return result.logits  # type: ignore[no-any-return]


def rounded_vit(model: nn.Module) -> Any:
    """The recipe rounds the patch embedding, too: it is a linear layer in disguise."""
    result = rounded_copy(model)
    for module in result.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = rounded(module.weight.flatten(1)).view_as(module.weight)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_vit_with_any_batch(target: str) -> None:
    model = vit()
    run = compiled(model, dynamic=True, target=target)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 16, 16)
        assert_same(run(x).logits, rounded_vit(model)(x).logits)
    assert graphs() == 1
    assert qcompile.explain(run).graphs[0].coverage["linear"][0] >= 12


@pytest.mark.slow
def test_a_float_that_changes_through_inductor() -> None:
    """More values than Dynamo compiles for: the model would run without quantization then, with no word from us."""
    model = Scaled()
    for dynamic in (None, True):
        torch._dynamo.reset()
        run, judge = compiled(model, target="inductor", dynamic=dynamic), rounded_copy(model)
        x = torch.randn(3, 16)
        for step in range(11):
            assert_same(run(x, 1.0 - step / 100), judge(x, 1.0 - step / 100))


class Divided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, by: float) -> Tensor:
        return self.fc(x).abs() / by


def test_the_sign_of_a_zero_among_numbers() -> None:
    run, x = compiled(Divided(), dynamic=True), torch.randn(2, 16)
    for by in (1.0, 2.0, 3.0, 0.0, -0.0):
        result = run(x, by)
    assert bool((result == -torch.inf).all())


def test_one_tensor_for_two_inputs_and_then_two() -> None:
    """Dynamo makes one input of them, and has to look at that at the next call."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, y: Tensor, *more: Tensor) -> Tensor:
            return self.q(x) @ self.k(y).T + sum(m.sum() for m in more)  # type: ignore[no-any-return]

    model = Two()
    judge = rounded_copy(model)
    run, x, y = compiled(model, expect={"linear": 2}), torch.randn(3, 16), torch.randn(3, 16)
    for given in [(x, x), (x, y), (y, x), (y, y), (x, y, y), (x, y, x), (x, x.view(3, 16)), (x, x[:2])]:
        assert_same(run(*given), judge(*given))
