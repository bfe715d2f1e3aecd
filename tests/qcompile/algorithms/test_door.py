"""The door for algorithms: one class, and what it chose is in the ONNX file, the checkpoint and the compiled model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import qcompile
from passes.base import Pass
from passes.constants import constant
from passes.graph import calls
from passes.ir import DEQUANTIZE
from passes.pipelines import Pipeline
from passes.program import unlift
from passes.quantize.insert import Quantizer
from qcompile.algorithms import ALGORITHMS
from qcompile.algorithms.base import Algorithm, Operand, Seen, View
from qcompile.algorithms.statistics import Largest, Statistic
from qcompile.errors import CalibrationError, CheckpointError, RecipeError
from qcompile.recipe import Settings
from tests.qcompile.checkpoint.models import read, save, tiny

WEIGHT_ONLY = {"fp8": "fp8_per_channel_per_token", "nvfp4": "nvfp4_weight_only", "block": "fp8_block"}


class CoinSettings(Settings):
    algorithm: Literal["coin"]
    seed: int = 0


class Coin(Algorithm[CoinSettings]):
    """Codes by chance, so that nothing but the algorithm can have made them."""

    model = CoinSettings

    def solve(self, view: View, seen: Seen) -> dict[Operand, Quantizer]:
        return {weight: self.chosen(view, weight) for weight in view.weights}

    def chosen(self, view: View, weight: Operand) -> Quantizer:
        fmt, random = weight.format, torch.Generator().manual_seed(self.settings.seed + sum(weight.shape))
        *rows, columns = weight.shape
        size = (*rows, columns // 2 if fmt.packed else columns)
        codes = torch.randint(0, 0x70, size, generator=random, dtype=torch.uint8).view(fmt.storage)
        if not fmt.sizes:
            return Quantizer(fmt, weight.stored(view.amax(weight) / 448), codes=codes)
        blocks = [*weight.shape[: -len(fmt.sizes)], *fmt.blocks(weight.shape)]
        numbers = torch.randint(8, 0x70, tuple(blocks), generator=random, dtype=torch.uint8)
        if fmt.scale is None:
            return Quantizer(fmt, None, numbers.float() / 64, codes)
        return Quantizer(fmt, view.amax(weight) / fmt.global_max, numbers.view(fmt.scale.storage), codes)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for algorithm in (Coin, Watcher, Doubling):
        monkeypatch.setitem(ALGORITHMS, algorithm.__name__.lower(), algorithm)


class Two(nn.Module):
    """Two layers read one tensor, and two one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x) * self.b(x)))


X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


def recipe(name: str, *steps: Any) -> qcompile.Recipe:
    return qcompile.load_recipe(name, [f"calibration=[{', '.join(steps)}]"])


def codes_of(program: Any) -> dict[str, Tensor]:
    """Name -> codes and scales that a dequantize reads."""
    gm = unlift(program)
    found = {}
    for node in calls(gm.graph, DEQUANTIZE):
        for operand in node.args[:2]:
            if (value := constant(gm, operand)) is not None:
                found[str(operand.target)] = value.detach()
    return found


@pytest.mark.everyday(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_codes_arrive_in_the_program_under_the_names_of_others(kind: str, dtype: torch.dtype) -> None:
    made = [
        qcompile.quantize(Two(), (X,), recipe=recipe(WEIGHT_ONLY[kind], f"{{algorithm: {name}}}"), dtype=dtype)
        for name in ("coin", "max")
    ]
    ours, theirs = map(codes_of, made)
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    assert [str(n.target) for n in made[0].graph.nodes] == [str(n.target) for n in made[1].graph.nodes]
    assert list(made[0].state_dict) == list(made[1].state_dict)
    custom = [[n.meta.get("custom", {}).get("quantizer") for n in p.graph.nodes] for p in made]
    assert custom[0] == custom[1] and any(custom[0])
    size = (32, 16) if kind == "nvfp4" else (32, 32)
    random = torch.Generator().manual_seed(64)
    expected = torch.randint(0, 0x70, size, generator=random, dtype=torch.uint8)
    weights = {name for name in ours if name.partition(".")[2].rstrip("_1") == "weight"}
    assert len(weights) > 1
    for name in weights:
        assert torch.equal(ours[name].view(torch.uint8), expected), name


def test_codes_arrive_in_the_onnx_file_and_run_there(tmp_path: Path) -> None:
    program = qcompile.quantize(
        Two(), (X,), recipe=recipe("fp8_per_channel_per_token", "{algorithm: coin}"), dtype=torch.float32
    )
    qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
    fp8 = [t for t in onnx.load(tmp_path / "m.onnx").graph.initializer if t.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    held = [numpy_helper.to_array(t).view(np.uint8) for t in fp8]
    codes = {name: t.view(torch.uint8).numpy() for name, t in codes_of(program).items() if t.itemsize == 1}
    assert codes and all(any(np.array_equal(c, h) or np.array_equal(c.T, h) for h in held) for c in codes.values())


@pytest.mark.everyday(1)
@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_codes_arrive_in_checkpoints_of_programs_and_of_directories(tmp_path: Path, kind: str) -> None:
    model = tiny("llama")
    source, chosen = save(model, tmp_path / "source"), recipe(WEIGHT_ONLY[kind], "{algorithm: coin, seed: 3}")
    inputs = {"input_ids": torch.arange(8)[None]}
    program = qcompile.quantize(model, kwargs=inputs, recipe=chosen, dtype=torch.float32)
    for name, made, options in (("a", source, {"recipe": chosen}), ("b", program, {"source": source})):
        qcompile.save_checkpoint(made, tmp_path / name, format="compressed-tensors", progress=False, **options)
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.keys() == b.keys()
    different = [n for n in a if not torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) and "embed" not in n]
    assert not [n for n in different if "weight" in n and a[n].dtype.itemsize == 1]
    coins = [n for n in a if n.endswith(("_proj.weight", "_proj.weight_packed"))]
    for name in coins:
        rows, columns = a[name].shape
        seed = 3 + rows + columns * (2 if kind == "nvfp4" else 1)
        random = torch.Generator().manual_seed(seed)
        expected = torch.randint(0, 0x70, (rows, columns), generator=random, dtype=torch.uint8)
        assert torch.equal(a[name].view(torch.uint8), expected)
    assert coins


def test_codes_arrive_in_a_compiled_model() -> None:
    torch._dynamo.reset()
    chosen = recipe("nvfp4_weight_only", "{algorithm: coin}")
    program = qcompile.quantize(Two(), (X,), recipe=chosen, dtype=torch.float32)
    options = {"recipe": chosen, "target": "eager"}
    with torch.no_grad():
        found = torch.compile(Two(), backend="qcompile", options=options)(X)
    torch._dynamo.reset()
    assert torch.equal(found, program.module()(X)) and not torch.allclose(found, Two()(X), rtol=0.5)


class WatcherSettings(Settings):
    algorithm: Literal["watcher"]


class Watcher(Algorithm[WatcherSettings]):
    """Wants data, sees what was chosen before it, and chooses nothing."""

    model = WatcherSettings
    saw: ClassVar[list[tuple[int, float]]] = []

    def watch(self, view: View) -> dict[Node, Statistic]:
        return {weight.site.consumer.args[0]: Largest() for weight in view.weights}  # type: ignore[misc]

    def solve(self, view: View, seen: Seen) -> dict[Operand, Quantizer]:
        largest = max(float(s.value) for s in seen.values() if isinstance(s, Largest))
        self.saw.append((len(view.quantizers), largest))
        return {}


class DoublingSettings(Settings):
    algorithm: Literal["doubling"]


class Twice(Pass):
    def rewrite(self, gm: GraphModule) -> None:
        (x,) = gm.graph.find_nodes(op="placeholder")
        with gm.graph.inserting_after(x):
            double = gm.graph.call_function(torch.ops.aten.mul.Tensor, (x, 2.0))
        double.meta["val"] = x.meta["val"] * 2
        x.replace_all_uses_with(double, delete_user_cb=lambda user: user is not double)
        self.fire()


class Doubling(Algorithm[DoublingSettings]):
    """Changes the graph, so that other numbers flow."""

    model = DoublingSettings

    def edits(self, view: View, seen: Seen) -> Pipeline:
        return (Twice,)


def batches() -> Iterator[Tensor]:
    yield X
    yield X * 3


def test_steps_see_what_was_chosen_before_them_and_what_is_left_gets_the_largest() -> None:
    Watcher.saw.clear()
    steps = recipe("int8", "{algorithm: watcher}", "{algorithm: mse}", "{algorithm: watcher}")
    program = qcompile.quantize(Two(), (X,), recipe=steps, calibration=batches(), progress=False)
    (before, largest), (after, again) = Watcher.saw
    assert before == 0 and after > 0 and largest == again
    assert {t.dtype for n, t in program.state_dict.items() if n.endswith("weight")} == {torch.int8}


def test_after_an_edit_data_runs_through_the_new_graph() -> None:
    largest = {}
    for steps in (("{algorithm: max}",), ("{algorithm: doubling}", "{algorithm: max}")):
        chosen = recipe("int8", *steps)
        state = qcompile.calibrate(Two(), (X,), recipe=chosen, calibration=batches(), progress=False)
        largest[len(steps)] = float(state["a.input_quantizer"])
    assert largest == {1: float(X.abs().max() * 3), 2: float(X.abs().max() * 6)}
    with pytest.raises(RecipeError, match=r"calibration\[1\]: doubling changes the graph .* put it in front"):
        late = recipe("int8", "{algorithm: max}", "{algorithm: doubling}")
        qcompile.quantize(Two(), (X,), recipe=late, calibration=[X], progress=False)


def test_an_algorithm_that_needs_data_says_so(tmp_path: Path) -> None:
    chosen = recipe("nvfp4_weight_only", "{algorithm: watcher}")
    with pytest.raises(CalibrationError, match="algorithm watcher needs calibration data"):
        qcompile.quantize(Two(), (X,), recipe=chosen)
    source = save(tiny("llama"), tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"watcher needs calibration data: program = qcompile\.quantize"):
        qcompile.save_checkpoint(source, tmp_path / "out", format="compressed-tensors", recipe=chosen, progress=False)
    assert not (tmp_path / "out").exists()
