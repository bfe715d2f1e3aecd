"""Calibration: every form of batch, one clear error for each that does not fit, and the amax that a hook finds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from passes.graph import aten, calls
from passes.program import unlift
from qcompile.algorithms.observe import observe
from qcompile.algorithms.statistics import Largest
from qcompile.capture import capture
from qcompile.errors import CalibrationError
from qcompile.quantization.calibrate import calibrate


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor, *, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        y = self.first(x).sin()
        y = y if bias is None else y + bias
        return self.second(y if scale is None else y * scale)


def observed(program: ExportedProgram, batches: Any) -> dict[str, float]:
    """amax of what goes into each linear layer."""
    gm = unlift(program)
    nodes = {node.args[0]: f"input of {node.name}" for node in calls(gm.graph, aten.linear.default)}
    largest = {node: Largest() for node in nodes}
    observe(gm, program, {node: [statistic] for node, statistic in largest.items()}, batches, progress=False)
    assert all(s.value.dtype == torch.float32 and s.value.shape == () and s.reached for s in largest.values())
    return {nodes[node]: float(statistic.value) for node, statistic in largest.items()}


def hooked(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """The same, found with hooks on the eager module."""
    amax: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            amax[name] = max(amax.get(name, 0.0), float(args[0].abs().max()))

        return hook

    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    names = ("input of linear", "input of linear_1")
    handles = [linear.register_forward_pre_hook(note(name)) for linear, name in zip(linears, names, strict=True)]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return amax


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def program(model: nn.Module) -> ExportedProgram:
    return capture(model, (torch.randn(4, 6),))


def test_amax_is_what_hooks_on_the_eager_module_find(model: nn.Module, program: ExportedProgram) -> None:
    batches = [torch.randn(4, 6), torch.randn(4, 6) * 3, -7 * torch.rand(4, 6)]
    assert observed(program, batches) == pytest.approx(hooked(model, batches), rel=1e-6)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: [x]], ids=["tensor", "tuple", "list"])
def test_forms_of_a_positional_batch(program: ExportedProgram, form: Any) -> None:
    x = torch.randn(4, 6)
    expected = observed(program, [x])
    assert observed(program, [form(x)]) == expected
    assert observed(program, (form(x) for _ in range(2))) == expected  # a generator has no length


def test_keyword_batches_in_any_order() -> None:
    x, scale, bias = torch.randn(4, 6), torch.tensor(2.0), torch.randn(8)
    program = capture(Net(), (), {"scale": scale, "x": x, "bias": bias})
    expected = observed(program, [{"scale": scale, "x": x, "bias": bias}])
    assert observed(program, [{"x": x, "bias": bias, "scale": scale}]) == expected
    assert expected["input of linear"] == pytest.approx(float(x.abs().max()))
    with pytest.raises(CalibrationError, match=r"batch 0 is called as model\(x=Tensor\), but .* model\(scale=Tensor"):
        observed(program, [{"x": x}])


@pytest.mark.parametrize("size", [1, 3, 4, 8, 11])
def test_a_batch_of_another_size_is_run_in_pieces(model: nn.Module, program: ExportedProgram, size: int) -> None:
    batch = torch.randn(size, 6)
    batch[-1] *= 10  # the last sample counts, also where it is alone in a piece
    assert observed(program, [batch]) == pytest.approx(hooked(model, [batch]), rel=1e-6)


class Fixed(Net):
    """Keeps the batch size of the capture as a number in its graph."""

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return self.second(self.first(x).reshape(x.shape[0] * 2, 4).repeat(1, 2) + position)


def test_pieces_have_the_captured_size_and_other_tensors_stay_whole() -> None:
    program = capture(Fixed(), (torch.randn(2, 6), torch.randn(1, 8)))
    position = torch.zeros(1, 8)
    assert observed(program, [(torch.ones(5, 6), position)]).keys() == {"input of linear", "input of linear_1"}
    with pytest.raises(CalibrationError, match="different batch sizes"):
        observed(program, [(torch.ones(4, 6), torch.zeros(3, 8))])


def test_a_dynamic_batch_is_not_cut() -> None:
    program = capture(Net(), (torch.randn(4, 6),), dynamic_shapes=({0: Dim("batch")},))
    batch = torch.randn(9, 6)
    assert observed(program, [batch])["input of linear"] == float(batch.abs().max())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration data is empty"),
        (torch.randn(4, 6), "list of batches, not a Tensor"),
        ({"x": torch.randn(4, 6)}, "list of batches, not a dict"),
        (3, "list of batches, not a int"),
        ([None], "batch 0 is a NoneType; a batch is a tuple"),
        ([torch.randn(4, 6), [torch.randn(4, 6), torch.zeros(4)]], r"batch 1 is called as model\(Tensor, Tensor\)"),
        ([{"y": torch.randn(4, 6)}], r"model\(y=Tensor\), but the model was captured as model\(Tensor\)"),
        (
            [torch.randn(4, 7)],
            r"x has shape \[4, 7\], but the model was captured with \[4, 6\]; give batches of that",
        ),
        ([torch.randn(6)], r"x has shape \[6\]"),
        ([torch.randn(0, 6)], "0 where 4 was captured"),
        ([torch.randn(4, 6).double()], "x is torch.float64, but the model was captured with torch.float32"),
        ([("four",)], "x is a str, but"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(program: ExportedProgram, batches: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        observed(program, batches)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.linear = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.table(ids))


def test_values_that_an_operator_refuses() -> None:
    program = capture(Lookup(), (torch.zeros(2, dtype=torch.long),))
    with pytest.raises(CalibrationError, match="batch 1 does not run through the captured graph: index out of range"):
        observed(program, [torch.tensor([0, 4]), torch.tensor([0, 5])])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_name_the_quantizer(model: nn.Module, bad: float) -> None:
    batch = torch.randn(4, 6)
    batch[2, 3] = bad
    batches = [torch.randn(4, 6), batch, torch.randn(4, 6)]
    with pytest.raises(CalibrationError, match=r"first.input_quantizer: calibration found (nan|inf) in x"):
        calibrate(model, (batch,), recipe="int8", calibration=batches, progress=False)


def test_half_precision_graphs_are_observed_too() -> None:
    model = Net().eval().half()
    x = torch.randn(4, 6).half()
    program = capture(model, (x,))
    assert observed(program, [x])["input of linear"] == float(x.abs().max())
