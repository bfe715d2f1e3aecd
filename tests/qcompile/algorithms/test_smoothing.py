"""SmoothQuant and AWQ against their papers written in plain loops, and through every door."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompile
from passes.base import run_pipeline
from passes.place.smooth import is_factor
from passes.program import unlift
from passes.quantize.sites import find_sites
from passes.testing import graph_of, run
from qcompile.algorithms import algorithm_called
from qcompile.algorithms.channels import Channels
from qcompile.algorithms.smoothing import Smoother
from qcompile.errors import CalibrationError, RecipeError
from qcompile.quantization.view import graph_view
from qcompile.recipe import QuantizerConfig
from qcompile.report.record import record_of

INT8 = {"weight": QuantizerConfig("int8", "per_channel"), "input": QuantizerConfig("int8")}
BLOCKS = QuantizerConfig("nvfp4", "per_block", (1, 16))
NVFP4 = {"weight": BLOCKS, "input": replace(BLOCKS, dynamic=True)}


class Block(nn.Module):
    """Pre-norm attention-like part and a gated one, with channels that are much larger than others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.q, self.k = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.post, self.gate, self.up = nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.norm.weight.data[3] = 40.0
        self.norm.weight.data[9] = 15.0
        self.post.weight.data[[0, 7]] = 20.0
        self.up.weight.data[5] *= 30

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = self.post(self.q(y).sigmoid() * self.k(y))
        result: Tensor = self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return result


X = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))


def step(name: str, **settings: Any) -> Smoother[Any]:
    found = algorithm_called(name)
    made = found(found.model(algorithm=name, **settings))
    assert isinstance(made, Smoother)
    return made


def edited(module: nn.Module, algorithm: Smoother[Any], configs: dict[str, QuantizerConfig], x: Tensor = X) -> Any:
    """The graph of `module` after the edits that data `x` leads to, and the log of them."""
    gm = graph_of(module, x)
    chosen = {s: configs[s.operand] for s in find_sites(gm) if s.operand in configs}
    view = graph_view(gm, chosen, torch.float32)
    seen: dict[Any, Channels] = algorithm.watch(view)  # type: ignore[assignment]
    interpreter = torch.fx.Interpreter(gm)
    run_node = interpreter.run_node

    def keep(node: torch.fx.Node) -> Any:
        made = run_node(node)
        if node in seen:
            seen[node].update(made, (), 1.0)
        return made

    interpreter.run_node = keep  # type: ignore[method-assign]
    with torch.no_grad():
        interpreter.run(x)
    return gm, run_pipeline(algorithm.edits(view, seen), gm)


@pytest.mark.parametrize("name", ["smoothquant", "awq"])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_smoothed_model_is_the_model(name: str, power_of_two: bool) -> None:
    gm, log = edited(Block(), step(name, alpha=0.75, power_of_two=power_of_two), INT8)
    assert log.fired["SmoothLinears"] == 3
    with torch.no_grad():
        torch.testing.assert_close(run(gm, OTHER)[0], Block()(OTHER), rtol=2e-5, atol=2e-5)
    ratio = gm.get_parameter("norm.weight") / Block().norm.weight
    assert not torch.allclose(ratio, torch.ones(32))
    assert not power_of_two or bool((ratio.log2() % 1 == 0).all())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_factors_are_those_of_the_papers(alpha: float) -> None:
    module = Block()
    with torch.no_grad():
        y = module.norm(X).abs().double().numpy()
    weights = torch.cat([module.q.weight, module.k.weight]).detach().abs().double().numpy()
    smoothquant = [max(y[:, j]) ** alpha / max(weights[:, j]) ** (1 - alpha) for j in range(32)]
    awq = [(sum(y[:, j]) / len(y)) ** alpha for j in range(32)]
    for name, expected in (("smoothquant", smoothquant), ("awq", awq)):
        gm, _ = edited(module, step(name, alpha=alpha), INT8)
        found = (module.norm.weight / gm.get_parameter("norm.weight")).detach().double().numpy()
        ratio = found / np.array(expected)  # which all scales of tensors leave alone
        np.testing.assert_allclose(ratio, np.full(32, np.sqrt(ratio.min() * ratio.max())), rtol=5e-3)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


@pytest.mark.parametrize("name", ["smoothquant", "awq"])
def test_what_is_searched_is_better_on_data_that_it_did_not_see(name: str) -> None:
    model = nn.Sequential(Block().norm, Plain())
    data, other = (torch.randn(512, 32, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))
    errors = []
    for chosen in ("max", name):
        recipe = qcompile.load_recipe("int8", [f"calibration=[{{algorithm: {chosen}}}]"])
        program = qcompile.quantize(
            model, (data,), recipe=recipe, calibration=[data], dtype=torch.float32, progress=False
        )
        with torch.no_grad():
            errors.append(float((program.module()(other) - model(other)).square().mean()))
    assert errors[1] < 0.6 * errors[0]
    told = [notice for notice in record_of(program).notices if notice.startswith(name)]
    assert len(told) == 1 and "1 of 1 groups of layers have factors" in told[0] and " 1.a " in told[0]


def test_a_group_that_nothing_helps_is_left_alone() -> None:
    signs = torch.randint(0, 2, (64, 32), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    module = Plain()
    module.a.weight.data = signs[:32].clone()  # exact as it is
    gm, log = edited(module, step("smoothquant"), INT8, signs)
    assert not log.fired and "no exponent helps" in log.notices[0]
    assert torch.equal(gm.get_parameter("a.weight"), signs[:32])


@pytest.mark.parametrize("name", ["smoothquant", "awq"])
@pytest.mark.parametrize("configs", [INT8, NVFP4, {"weight": NVFP4["weight"]}], ids=["int8", "nvfp4", "weight only"])
def test_dead_channels_one_sample_and_equal_rows(name: str, configs: dict[str, QuantizerConfig]) -> None:
    module = Plain()
    module.a.weight.data[:, 4] = 0
    module.a.weight.data[2] = 0
    x = OTHER.clone()
    x[:, [4, 6]] = 0
    for data in (x, x[:1], x[:1].expand(8, -1).contiguous(), torch.zeros(2, 32)):
        gm, _ = edited(module, step(name, alpha=0.5), configs, data)
        assert all(bool(t.isfinite().all()) for t in gm.state_dict().values())
        with torch.no_grad():
            torch.testing.assert_close(run(gm, data)[0], module(data), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_one_error(bad: float) -> None:
    x = X.clone()
    x[3, 5] = bad
    told = r"a\b.*: calibration found (NaN|nan|inf).*, first in calibration batch 1"
    for name in ("smoothquant", "gptq", "gptq, sequential: true", "hessian_mse", "svdquant"):
        recipe = qcompile.load_recipe("nvfp4_weight_only", [f"calibration=[{{algorithm: {name}}}]"])
        with pytest.raises(CalibrationError, match=told):
            qcompile.quantize(Plain(), (X,), recipe=recipe, calibration=[X, x], progress=False)


def test_an_edit_that_is_given_twice_is_refused() -> None:
    for one, other in (("alpha: 0.5", "alpha: 0.8"), ("steps: 4", "steps: 4")):
        steps = f"[{{algorithm: awq, {one}}}, {{algorithm: awq, {other}}}]"
        recipe = qcompile.load_recipe("int8", [f"calibration={steps}"])
        with pytest.raises(RecipeError, match=r"calibration\[1\]: awq has edited the graph already"):
            qcompile.quantize(Plain(), (X,), recipe=recipe, calibration=[X], progress=False)


def test_percentile_without_a_constant_scale_says_so() -> None:
    recipe = qcompile.load_recipe("nvfp4_fast", ["calibration=[{algorithm: percentile}]"])
    program = qcompile.quantize(Plain(), (X,), recipe=recipe, calibration=[X], progress=False)
    assert "percentile chose nothing" in " ".join(record_of(program).notices)
    recipe = qcompile.load_recipe("int8_fast", ["calibration=[{algorithm: percentile}]"])
    program = qcompile.quantize(Plain(), (X,), recipe=recipe, calibration=[X], progress=False)
    assert "percentile chose nothing" not in " ".join(record_of(program).notices)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(16, 16, 3), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.conv(x).mean((2, 3)))
        return result


def test_convolutions_are_no_declines() -> None:
    x = torch.randn(4, 16, 8, 8)
    recipe = qcompile.load_recipe("int8", ["calibration=[{algorithm: smoothquant, alpha: 0.5}]", "convolutions=all"])
    program = qcompile.quantize(Convolved(), (x,), recipe=recipe, calibration=[x], progress=False)
    assert not [d for d in record_of(program).declined if d.pass_name == "SmoothLinears"]


def test_ranges_alone_do_not_say_it() -> None:
    recipe = qcompile.load_recipe("int8", ["calibration=[{algorithm: smoothquant}]"])
    with pytest.raises(CalibrationError, match="smoothquant changes weights by what data shows"):
        qcompile.calibrate(Block(), (X,), recipe=recipe, calibration=[X], progress=False)
    state = qcompile.calibrate(Block(), (X,), recipe="int8_fast", calibration=[X], progress=False)
    with pytest.raises(CalibrationError, match="smoothquant needs calibration data"):
        qcompile.quantize(Block(), (X,), recipe=recipe, calibration=state, progress=False)


@pytest.mark.everyday(1)
@pytest.mark.parametrize("target", ["portable", "tensorrt"])
def test_files_saved_programs_and_compiled_ones_have_it(target: Any, tmp_path: Path) -> None:
    first, second = "algorithm: smoothquant, alpha: 0.7", "algorithm: mse, smallest_range: 1"
    steps = ", ".join(f"{{{one}, power_of_two: true}}" for one in (first, second))
    recipe = qcompile.load_recipe("int8", [f"calibration=[{steps}]"])
    program = qcompile.quantize(Block(), (X,), recipe=recipe, calibration=[X], dtype=torch.float32, progress=False)
    plain = qcompile.quantize(Block(), (X,), recipe="int8_fast", calibration=[X], dtype=torch.float32, progress=False)
    scales = [float(p.state_dict["q.input_scale"]) for p in (program, plain)]
    assert scales[0] < 0.7 * scales[1]  # data ran through the edited graph
    with torch.no_grad():
        expected = program.module()(OTHER)
    qcompile.export_onnx(program, tmp_path / "m.onnx", target=target)
    (found,) = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {"x": OTHER.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
    if target == "portable":
        torch.export.save(program, tmp_path / "m.pt2")
        loaded = torch.export.load(tmp_path / "m.pt2")
        assert torch.equal(loaded.module()(OTHER), expected)
        assert "smoothquant" in " ".join(record_of(loaded).notices)
        assert any(n.meta.get("custom", {}).get("edited") for n in unlift(loaded).graph.nodes)
        torch._dynamo.reset()
        compiled = torch.compile(program.module(), backend="qcompile", options={"target": "eager"})
        with torch.no_grad():
            torch.testing.assert_close(compiled(OTHER), expected, rtol=1e-5, atol=1e-5)
        torch._dynamo.reset()


def test_awq_sizes_columns_within_what_shares_a_scale() -> None:
    torch.manual_seed(4)
    module = Plain()
    module.a.weight.data[:16, 3] = 0
    for config, width in ((NVFP4["weight"], 16), (INT8["weight"], 32)):
        gm = graph_of(module, X)
        view = graph_view(gm, {s: config for s in find_sites(gm) if s.operand == "weight"}, torch.float32)
        w = module.a.weight.detach().abs().double().numpy()
        expected = [
            sum(w[n, j] / max(w[n, j // width * width : (j // width + 1) * width]) for n in range(32)) / 32
            for j in range(32)
        ]
        np.testing.assert_allclose(step("awq").columns(view.weights).numpy(), expected, rtol=1e-5)


def test_awq_can_give_each_layer_a_factor_of_its_own() -> None:
    module = Block()
    module.q.weight.data[:, 5] *= 20  # that column alone, so that q and k want other factors
    gm, log = edited(module, step("awq", separate=True), NVFP4)
    assert log.fired["SmoothLinears"] >= 3
    assert torch.equal(gm.get_parameter("norm.weight"), module.norm.weight)
    factors = [value for name, value in gm.named_buffers() if is_factor(name)]
    assert len(factors) >= 2 and not torch.equal(factors[0], factors[1])
    with torch.no_grad():
        torch.testing.assert_close(run(gm, OTHER)[0], module(OTHER), rtol=2e-5, atol=2e-5)
