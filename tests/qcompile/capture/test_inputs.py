"""Example inputs: one tensor in two places, weights and views among them, and how batches lie in memory."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

import qcompile
from qcompile.capture import capture
from qcompile.capture.inputs import laid_out, own_copies
from qcompile.errors import CaptureError

X, Y = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1)).unbind()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.randn(4, 16))
        self.register_buffer("table", torch.randn(4, 16))

    def forward(self, x: Tensor, y: Any) -> Tensor:
        y = y["y"] if isinstance(y, dict) else y[0] if isinstance(y, list) else y
        return self.left(x) - self.right(y) + self.weight * self.table


MODEL = Two().eval()


@pytest.mark.everyday(2)
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((X, X), {}), ((X,), {"y": X}), ((), {"x": X, "y": X}), ((X, [X]), {}), ((X, {"y": X}), {})],
    ids=["args", "mixed", "kwargs", "list", "dict"],
)
def test_one_tensor_in_two_places_is_two_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    program = capture(MODEL, args, kwargs)

    def other(value: Any, container: type) -> Any:
        return [value] if container is list else {"y": value} if container is dict else value

    kind = type((*args, *kwargs.values())[1])
    new: dict[str, Any] = {"x": X, "y": other(Y, kind)}
    positional = tuple(new.values())[: len(args)]
    named = {name: new[name] for name in kwargs}
    torch.testing.assert_close(program.module()(*positional, **named), MODEL(X, Y))


@pytest.mark.parametrize("name", ["weight", "table"])
def test_a_weight_as_example_is_an_input(name: str) -> None:
    program = capture(MODEL, (getattr(MODEL, name), X))
    assert len(program.graph_signature.user_inputs) == 2
    torch.testing.assert_close(program.module()(Y, X), MODEL(Y, X))
    torch.testing.assert_close(program.module()(X, Y), MODEL(X, Y))


def test_overlapping_views_are_inputs_of_their_own() -> None:
    rows = torch.randn(6, 16)
    torch.testing.assert_close(capture(MODEL, (rows[:4], rows[2:])).module()(X, Y), MODEL(X, Y))


@pytest.mark.everyday(1)
@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_quantize_calibrate_and_import_keep_both_inputs(recipe: str) -> None:
    program = qcompile.quantize(MODEL, (X, X), recipe=recipe, calibration=[(X, Y)], dtype=torch.float32, progress=False)
    expected = MODEL(X, Y)
    assert (program.module()(X, Y) - expected).norm() < 0.1 * expected.norm()  # 0.96 of it where inputs are one
    state = qcompile.calibrate(MODEL, (X, X), recipe=recipe, calibration=[(X, 10 * Y)], progress=False)
    torch.testing.assert_close(state["left.input_quantizer"], X.abs().max())
    torch.testing.assert_close(state["right.input_quantizer"], 10 * Y.abs().max())
    again = qcompile.import_quantized(program.module(), (X, X), dtype=torch.float32)
    torch.testing.assert_close(again.module()(X, Y), program.module()(X, Y))


def test_dynamo_tells_a_tensor_given_twice_from_two() -> None:
    compiled = torch.compile(
        MODEL, backend="qcompile", options={"recipe": "fp8_per_channel_per_token", "target": "eager"}
    )
    for y in (X, Y):
        with torch.no_grad():
            got, expected = compiled(X, y), MODEL(X, y)
        assert (got - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("args", "strict"),
    [((X, X), False), ((X, X), True), ((MODEL.table, X), False), ((MODEL.weight, X), False)],
    ids=["twice", "twice, by Dynamo", "a buffer", "a parameter"],
)
def test_a_program_exported_with_one_tensor_for_two_is_refused(args: tuple[Tensor, ...], strict: bool) -> None:
    with torch.no_grad():
        program = torch.export.export(MODEL, args, strict=strict)
    with pytest.raises(CaptureError, match=r"one tensor for x and for .*clone\(\)"):
        qcompile.quantize(program, recipe="fp8_per_channel_per_token")


class Ignores(Two):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.left(x)


def test_an_input_that_nothing_reads_is_said(caplog: pytest.LogCaptureFixture) -> None:
    program = torch.export.export(Ignores().eval(), (X, Y))
    with caplog.at_level(logging.WARNING, "qcompile"):
        capture(program)
    assert "nothing in this program reads its input y" in caplog.text


def test_a_collection_of_shapes_goes_by_the_tensors_that_were_given() -> None:
    shapes = torch.export.ShapesCollection()
    shapes[X] = {0: Dim.DYNAMIC}
    program = capture(MODEL.left, (X,), dynamic_shapes=shapes)
    assert program.module()(torch.randn(7, 16)).shape == (7, 16)
    with pytest.raises(CaptureError, match=r"dynamic_shapes: .*not found in args"):
        capture(MODEL.left, (Y,), dynamic_shapes=shapes)


def views() -> dict[str, Tensor]:
    return {
        "slice": torch.randn(4, 32)[:, :16],
        "step": torch.randn(8, 16)[::2],
        "transposed": torch.randn(16, 4).t(),
        "expanded": torch.randn(1, 16).expand(4, 16),
        "offset": torch.randn(9, 16)[3:7],
    }


@pytest.mark.everyday(3)
@pytest.mark.parametrize("name", views())
def test_strides_of_examples_are_no_guards(name: str) -> None:
    program = capture(MODEL.left, (views()[name],), dynamic_shapes=({0: Dim.DYNAMIC},))
    for x in (X, X.t().contiguous().t(), torch.randn(4, 99)[:, 3:19]):
        torch.testing.assert_close(program.module()(x), MODEL.left(x))


def test_a_program_that_was_exported_with_a_view_is_captured() -> None:
    """torch.export keeps the strides of the tensor behind it as guards, at which tracing the program anew stops."""
    with torch.no_grad():
        program = torch.export.export(MODEL.left, (views()["slice"],), dynamic_shapes=({0: Dim.DYNAMIC},))
    for x in (views()["slice"], X):
        torch.testing.assert_close(capture(program).module()(x), MODEL.left(x))


class Patches(nn.Module):
    """Reads an image by `view`, which wants it contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(x.shape[0], 48))


@pytest.mark.parametrize("permuted", [False, True])
def test_batches_may_lie_in_memory_in_another_order_than_the_example(permuted: bool) -> None:
    image = torch.randn(2, 4, 4, 3).permute(0, 3, 1, 2)
    example, batch = (image, image.contiguous()) if permuted else (image.contiguous(), image)
    recipe = {"recipe": "fp8", "progress": False, "dtype": torch.float32}
    model = Patches().eval()
    program = qcompile.quantize(model, (example,), calibration=[batch], **recipe)
    expected = qcompile.quantize(model, (example,), calibration=[example], **recipe)
    torch.testing.assert_close(program.module()(example), expected.module()(example), rtol=0, atol=0)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=0, max_size=4),
    seed=st.integers(0, 99),
    expand=st.booleans(),
)
def test_copies_and_layouts_keep_every_value(sizes: list[int], seed: int, expand: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sizes), generator=random).tolist()
    x = torch.randn(sizes, generator=random).permute(order)
    if expand and x.ndim:
        x = x.narrow(0, 0, 1).expand(3, *x.shape[1:])
    like = torch.randn(x.shape)
    (copy,), _ = own_copies((x,), {})
    assert torch.equal(copy, x) and copy._base is None
    assert copy.untyped_storage().nbytes() == x.numel() * x.element_size()
    (again,) = laid_out([x], [like])
    assert torch.equal(again, x) and (again.is_contiguous() or not like.is_contiguous())
    (back,) = laid_out([like], [copy])
    assert torch.equal(back, like)
