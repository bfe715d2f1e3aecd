"""Options and what is said about wrong ones: one clear sentence in torch's BackendCompilerFailed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import qcompile
from qcompile.dynamo.options import Options
from qcompile.errors import CompileError, ExpectationError, QCompileError
from tests.qcompile.dynamo.support import (
    DYNAMIC,
    LINEARS,
    WEIGHT_ONLY,
    Mlp,
    assert_current,
    assert_same,
    compiled,
    reference,
)

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def refusal(run: Any) -> str:
    """The sentence of our error, which is the cause of what Dynamo raises."""
    with pytest.raises(BackendCompilerFailed) as caught:
        run(X)
    inner = caught.value.inner_exception
    assert isinstance(inner, QCompileError), repr(inner)
    message = str(inner)
    assert message in str(caught.value)
    assert "\n" not in message.strip()
    return message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recipee": "fp8"}, "unknown options recipee; known: recipe, calibration, target, mode, "),
        ({"recipe": "fp9"}, "fp9"),
        ({"recipe": {**WEIGHT_ONLY, "metadata": {"name": "x"}}}, "description"),
        ({"recipe": 3}, "options['recipe'] is a name, a path, a mapping or a Recipe, not a int"),
        ({"recipe": DYNAMIC, "target": "trt"}, "unknown target 'trt'; known: inductor, torch_tensorrt, eager"),
        ({"recipe": DYNAMIC, "target": ["eager"]}, "unknown target"),
        ({"recipe": DYNAMIC, "mode": "fast"}, "unknown mode 'fast'; known: default"),
        ({"recipe": DYNAMIC, "mode": ["fast"]}, "unknown mode"),
        ({"recipe": DYNAMIC, "expect": 3}, "options['expect'] is a mapping, not a int"),
        ({"recipe": DYNAMIC, "calibration": [X]}, "options['calibration'] is a mapping, not a list"),
        ({"recipe": DYNAMIC, "fast_accumulation": "no"}, "options['fast_accumulation'] is a bool, not a str"),
        ({"recipe": DYNAMIC, "inductor": True}, "options['inductor'] is a mapping, not a bool"),
        ({"recipe": DYNAMIC, "expect": {"linears": 1}, "target": "eager"}, "linears; known: linear, experts"),
        ({"recipe": DYNAMIC, "inductor": {"no_such_setting": 1}}, "no_such_setting"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_wrong_options(options: dict[str, Any], says: str) -> None:
    """Before the model is called."""
    with pytest.raises(QCompileError) as caught:
        torch.compile(Mlp(), backend="qcompile", options=options)
    assert says in str(caught.value) and "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recipe": DYNAMIC, "expect": {"linear": 3}}, "2 of 2 linear are quantized, and 3 are expected"),
        ({"recipe": DYNAMIC, "expect": {"attention": 1}}, "0 of 0 attention are quantized, and 1 are expected"),
        ({"expect": {"linear": 1}}, "0 of 2 linear are quantized, and 1 are expected"),
    ],
)
def test_expectations_that_are_not_met(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ExpectationError, match=says):
        compiled(Mlp(), **{"recipe": None, **options})(X)


def test_expectations_of_a_back_end_that_is_called_by_another_one() -> None:
    """Dynamo does not tell it of calls then: each graph has to meet them."""
    from qcompile.dynamo.backend import qcompile_backend

    def run_backend(gm: Any, inputs: Any) -> Any:
        return qcompile_backend(gm, inputs, options={"recipe": DYNAMIC, "target": "eager", "expect": {"linear": 3}})

    assert "2 of 2 linear are quantized, and 3 are expected" in refusal(torch.compile(Mlp(), backend=run_backend))


def test_options_that_are_none_are_as_not_given() -> None:
    given = {"recipe": None, "calibration": None, "inductor": None, "expect": None, "mode": None}
    assert Options.read(given) == Options.read(None) == Options.read({}) == Options()


@pytest.mark.parametrize("options", [None, {}, {"target": "eager"}])
def test_no_recipe_leaves_a_model_as_it_is(options: dict[str, Any] | None) -> None:
    model = Mlp()
    run = torch.compile(model, backend="qcompile", options=options)
    assert_same(run(X), model(X))
    assert qcompile.explain(run).quantized == {}


def test_static_recipe_without_calibration_says_how() -> None:
    message = refusal(compiled(Mlp(), "fp8"))
    assert "up.input_quantizer" in message
    assert "qcompile.calibrate(" in message


def test_calibrated_state() -> None:
    model = Mlp()
    batches = [torch.randn(3, 16), X]
    state = qcompile.calibrate(model, (X,), recipe="fp8", calibration=batches, progress=False)
    run = compiled(model, "fp8", calibration=state)
    program = qcompile.quantize(model, (X,), recipe="fp8", calibration=batches, dtype=torch.float32, progress=False)
    with torch.no_grad():
        assert_same(run(X), program.module()(X))
        assert_same(run(X * 30), program.module()(X * 30))  # saturates: the scales are those of the batches
    model.up.weight.data = torch.randn(32, 16)
    program = qcompile.quantize(model, (X,), recipe="fp8", calibration=state, dtype=torch.float32, progress=False)
    with torch.no_grad():
        assert_same(run(X), program.module()(X))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(lambda s: s.clear() or s.update(other_input_quantizer=1), "no range for up.input", id="missing"),
        pytest.param(lambda s: s.update({"up.input_quantizer": torch.tensor(torch.nan)}), "up.input", id="nan"),
        pytest.param(lambda s: s.update({"up.input_quantizer": torch.ones(3)}), "up.input_quantizer", id="shape"),
        pytest.param(lambda s: s.update({"up.input_quantizer": -torch.ones(())}), "up.input_quantizer", id="negative"),
    ],
)  # fmt: skip
def test_calibrated_state_that_does_not_fit(change: Any, says: str) -> None:
    model = Mlp()
    state = qcompile.calibrate(model, (X,), recipe="fp8", calibration=[X], progress=False)
    change(state)
    assert says in refusal(compiled(model, "fp8", calibration=state))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda s: s.update({"down.input_quantizer": 0.0}), "zero in all of calibration", id="zero"),
        pytest.param(lambda s: s.pop("down.input_quantizer"), "the calibrated state has no range for it", id="absent"),
    ],
)
def test_a_layer_that_the_state_has_no_range_for_is_left(
    change: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Mlp()
    state = qcompile.calibrate(model, (X,), recipe="fp8", calibration=[X], progress=False)
    change(state)
    run = compiled(model, "fp8", calibration=state)
    with torch.no_grad():
        assert torch.isfinite(run(X)).all()
    (report,) = qcompile.explain(run).graphs
    assert "up" in report.quantized and report.unquantized["down"] == "linear"
    assert [reason in d.reason for d in report.declined if d.module == "down"] == [True]
    assert "down" in caplog.text and reason in caplog.text


def test_calibrated_state_of_another_type() -> None:
    with pytest.raises(CompileError, match=r"the range of up\.input_quantizer is a str, not a tensor"):
        compiled(Mlp(), "fp8", calibration={"up.input_quantizer": "3"})


def test_state_of_a_number_in_python_is_a_range() -> None:
    """A state that went through JSON holds floats."""
    model = Mlp()
    state = qcompile.calibrate(model, (X,), recipe="fp8", calibration=[X], progress=False)
    expected = compiled(model, "fp8", calibration=state)(X)
    torch._dynamo.reset()
    plain: Any = {name: float(amax) for name, amax in state.items()}
    assert_same(compiled(model, "fp8", calibration=plain)(X), expected)


def test_expectations_met() -> None:
    assert_same(compiled(Mlp(), expect={"linear": 2}).__call__(X) * 0, torch.zeros(3, 16))


def test_torch_refuses_mode_beside_options() -> None:
    with pytest.raises(RuntimeError, match="mode"):
        torch.compile(Mlp(), backend="qcompile", mode="max-autotune", options={"recipe": DYNAMIC})


@pytest.mark.everyday(1)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes_run(mode: str) -> None:
    model = Mlp()
    run = compiled(model, target="inductor", mode=mode)
    for _ in range(3):
        assert_current(run, model, X)


def test_mode_of_torch_compile_reaches_a_quantized_program() -> None:
    model = Mlp()
    program = qcompile.quantize(model, (X,), recipe=WEIGHT_ONLY, dtype=torch.float32, progress=False).module()
    run = torch.compile(program, backend="qcompile", mode="reduce-overhead")
    with torch.no_grad():
        assert_same(run(X), reference(model, X))


def test_program_of_quantize_with_and_without_a_recipe() -> None:
    """A model that is quantized already keeps its own numbers; a recipe for it is refused, not ignored."""
    model = Mlp()
    program = qcompile.quantize(model, (X,), recipe=DYNAMIC, dtype=torch.float32, progress=False).module()
    with torch.no_grad():
        run = torch.compile(program, backend="qcompile", options={"target": "eager"})
        assert_same(run(X), program(X))
        assert len(qcompile.explain(run).quantized) == 2
        torch._dynamo.reset()
        message = refusal(compiled(program, "fp8_per_channel_per_token"))
    assert "quantized already" in message


def test_inductor_settings_under_another_name() -> None:
    """`force_disable_caches` stands for a setting of torch.compiler, and is no part of a copy of the settings."""
    assert Options.read({"inductor": {"force_disable_caches": True}}).inductor == {"force_disable_caches": True}


def test_inductor_settings_reach_inductor() -> None:
    model = Mlp()
    run = compiled(model, target="inductor", inductor={"max_autotune": False, "epilogue_fusion": False})
    assert_current(run, model, X)


def test_errors_are_raised_again_at_the_next_call() -> None:
    run = compiled(Mlp(), "fp8")
    assert refusal(run) == refusal(run)


def test_backend_as_a_function() -> None:
    from qcompile.dynamo.backend import qcompile_backend

    model = Mlp()

    def run_backend(gm: Any, inputs: Any) -> Any:
        return qcompile_backend(gm, inputs, options={"recipe": WEIGHT_ONLY, "target": "eager"})

    assert_current(torch.compile(model, backend=run_backend), model, X)


def test_compile_error_is_a_qcompile_error() -> None:
    assert issubclass(CompileError, QCompileError)
    with pytest.raises(CompileError, match="unknown options"):
        Options.read({"no": 1})


def test_blocks_from_the_end_need_a_whole_model() -> None:
    recipe = {**WEIGHT_ONLY, "rules": [*LINEARS, {"quantizer": "*layers.-1.*", "enable": False}]}
    with pytest.raises(CompileError, match=r"rules\[1\]: .* counts blocks from the end, .* Give the number"):
        compiled(Mlp(), recipe=recipe)


def test_recipe_objects_and_files(tmp_path: Any) -> None:
    import yaml

    path = tmp_path / "weights.yaml"
    path.write_text(yaml.safe_dump({**WEIGHT_ONLY, "rules": [dict(r) for r in WEIGHT_ONLY["rules"]]}))  # type: ignore[arg-type]
    model = Mlp()
    expected: Tensor = reference(model, X)
    for recipe in (str(path), path, qcompile.recipe.load_recipe(WEIGHT_ONLY)):
        torch._dynamo.reset()
        assert_same(compiled(model, recipe)(X), expected)
