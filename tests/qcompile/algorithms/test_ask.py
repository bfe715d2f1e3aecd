"""What goes wrong in an algorithm, and what it may not choose, is one error that names it, from every door."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

import qcompile
from passes.formats import get_format
from passes.quantize.insert import Quantizer
from qcompile import algorithms
from qcompile.algorithms import ALGORITHMS
from qcompile.algorithms.base import Algorithm, Operand, Seen, View, quantizer
from qcompile.algorithms.statistics import Largest, Statistic
from qcompile.errors import AlgorithmError, RecipeError
from qcompile.recipe import Settings, load_recipe
from tests.qcompile.checkpoint.models import save, tiny

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


class OwnSettings(Settings):
    algorithm: Literal["own"]


class Own(Algorithm[OwnSettings]):
    """Does what a test says."""

    model = OwnSettings
    does: ClassVar[dict[str, Callable[..., Any]]] = {}

    def watch(self, view: View) -> Any:
        return self.does.get("watch", lambda view: {})(view)

    def edits(self, view: View, seen: Seen) -> Any:
        return self.does.get("edits", lambda view, seen: ())(view, seen)

    def solve(self, view: View, seen: Seen) -> Any:
        return self.does.get("solve", lambda view, seen: {})(view, seen)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.k_proj(x)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., Any]]:
    does: dict[str, Callable[..., Any]] = {}
    monkeypatch.setitem(ALGORITHMS, "own", Own)
    monkeypatch.setattr(Own, "does", does)
    return does


def quantized(recipe: str = "fp8_gemm") -> Any:
    chosen = load_recipe(recipe, ["calibration=[{algorithm: own}]"])
    return qcompile.quantize(Two().eval(), (X,), recipe=chosen, calibration=[X], progress=False)


def each(choose: Callable[[Operand, Quantizer], Any], kind: str = "weight") -> Callable[..., Any]:
    """A `solve` that gives each operand of a kind what `choose` makes of the quantizer of `max`."""

    def solve(view: View, seen: Seen) -> Any:
        amax = torch.tensor(1.0)
        return {
            o: choose(o, quantizer(o, amax, False)) for o in view.operands if (o.kind == "weight") == (kind == "weight")
        }

    return solve


class Failing(Statistic):
    def update(self, result: Any, args: Any, weight: float) -> None:
        raise KeyError("lost")

    def merge(self, other: Statistic) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        return {}


def with_(kind: str = "weight", **fields: Any) -> Callable[..., Any]:
    """A `solve` whose quantizers have other fields, values or functions of the scale."""

    def change(operand: Operand, q: Quantizer) -> Quantizer:
        return replace(q, **{name: given(q.scale) if callable(given) else given for name, given in fields.items()})

    return each(change, kind)


INT8 = get_format("int8")
WRONG: dict[str, tuple[str, Callable[..., Any], str]] = {
    "solve gives nothing": ("solve", lambda view, seen: None, "own: solve gives None, and not {operand: quantizer}"),
    "watch gives nothing": ("watch", lambda view: None, "own: watch gives None"),
    "watch gives a class": ("watch", lambda view: {view.activations[0].node: Largest}, "and not a node and a stat"),
    "edits are no passes": ("edits", lambda view, seen: (3,), "3 is no pass"),
    "edits are no pipeline": ("edits", lambda view, seen: 3, "edits gives 3, and not a Pipeline"),
    "a fault": ("solve", lambda view, seen: 1 / 0, "own: solve failed with ZeroDivisionError: division by zero"),
    "names": ("solve", lambda view, seen: {"q_proj": None}, "'q_proj' a quantizer, which is no operand"),
    "a number": ("solve", each(lambda o, q: 0.5), "weight_quantizer 0.5, and not a Quantizer"),
    "another format": ("solve", with_(format=INT8), "int8, and the recipe says fp8"),
    "no scale": ("solve", with_(scale=None), "its scale is None"),
    "a float": ("solve", with_(scale=0.5), "its scale is 0.5, and not a tensor"),
    "zero": ("solve", with_(scale=lambda scale: scale * 0), "scales are positive"),
    "channels": ("solve", with_(scale=lambda scale: scale.expand(32, 1)), "[32, 1], and per_tensor wants []"),
    "codes of another shape": ("solve", with_(codes=torch.zeros(3)), "its codes are torch.float32"),
    "blocks": ("solve", with_(block_scales=torch.ones(32, 2)), "fp8 has none"),
    "codes of an activation": ("solve", with_("input", codes=X), "are for weights"),
    "two scales in a group": (
        "solve",
        each(lambda o, q: replace(q, scale=q.scale * (1 + ("k_proj" in o.name)))),
        "k_proj.weight_quantizer different scales",
    ),
    "a statistic that fails": (
        "watch",
        lambda view: {view.activations[0].node: Failing()},
        "Failing.update failed at ",
    ),
}


@pytest.mark.parametrize(("method", "does", "told"), WRONG.values(), ids=WRONG)
def test_what_it_does_wrong_names_it(own: Any, method: str, does: Callable[..., Any], told: str) -> None:
    own[method] = does
    with pytest.raises(qcompile.QCompileError, match=re.escape(told)):
        quantized()


def test_one_number_is_a_scale_whatever_its_shape(own: Any) -> None:
    own["solve"] = each(lambda o, q: replace(q, scale=q.scale.reshape(1, 1)))
    assert quantized().state_dict["q_proj.weight_scale"].shape == ()


@pytest.mark.parametrize("name", ["a number", "another format", "two scales in a group"])
def test_a_checkpoint_of_a_directory_says_it_too(own: Any, name: str, tmp_path: Path) -> None:
    method, own["solve"], told = WRONG[name]
    save(tiny("llama"), tmp_path / "source")
    no_inputs = "rules[+]={quantizer: '*.input_quantizer', enable: false}"
    recipe = load_recipe("fp8_gemm", [no_inputs, "calibration={algorithm: own}"])
    with pytest.raises(AlgorithmError, match=re.escape(told)):
        qcompile.save_checkpoint(tmp_path / "source", tmp_path / "out", format="compressed-tensors", recipe=recipe)
    assert method == "solve" and not (tmp_path / "out").exists()


def test_a_name_that_its_settings_do_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "renamed", Own)
    with pytest.raises(AlgorithmError, match=r"renamed: `algorithm` of OwnSettings is Literal\['own'\]"):
        load_recipe("fp8_gemm", ["calibration={algorithm: renamed}"])
    monkeypatch.setitem(ALGORITHMS, "bare", type("Bare", (), {}))
    with pytest.raises(AlgorithmError, match=r"bare: Bare\.model is to be the class of its Settings"):
        load_recipe("fp8_gemm", ["calibration={algorithm: bare}"])


def test_steps_agree_on_powers_of_two() -> None:
    with pytest.raises(RecipeError, match="`power_of_two` is for all steps or for none"):
        load_recipe("fp8_gemm", ["calibration=[{algorithm: max, power_of_two: true}, {algorithm: mse}]"])


def test_installed_packages_bring_their_own(monkeypatch: pytest.MonkeyPatch, own: Any) -> None:
    monkeypatch.delitem(ALGORITHMS, "own")
    point = metadata.EntryPoint("own", f"{__name__}:Own", "qcompile.algorithms")
    monkeypatch.setattr(algorithms, "entry_points", lambda group: [point] if group == "qcompile.algorithms" else [])
    algorithms.find_installed.cache_clear()
    try:
        assert load_recipe("fp8_gemm", ["calibration={algorithm: max}"]) and "own" not in ALGORITHMS
        with pytest.raises(RecipeError, match=r"unknown algorithm 'oun'.*did you mean 'own'"):
            load_recipe("fp8_gemm", ["calibration={algorithm: oun}"])
        assert ALGORITHMS["own"] == f"{__name__}.Own"
    finally:
        algorithms.find_installed.cache_clear()
        ALGORITHMS.pop("own", None)


def test_reports_say_who_chose_scales(tmp_path: Path) -> None:
    recipe = load_recipe("fp8_gemm", ["calibration={algorithm: mse, candidates: 9}"])
    program = qcompile.quantize(Two().eval(), (X,), recipe=recipe, calibration=[X], progress=False)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx")
    assert "scales were chosen by mse (candidates 9)" in report.notices
    plain = qcompile.quantize(Two().eval(), (X,), recipe="fp8_gemm", calibration=[X], progress=False)
    assert not re.search("chosen by", str(qcompile.export_onnx(plain, tmp_path / "p.onnx").notices))
