"""A recipe that quantizes nothing of a model is an error with a way out, from Python and in checkpoints alike."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import qcompile
from qcompile.errors import RecipeError
from qcompile.recipe import QuantizerName, check_quantizes, check_recipe, load_recipe, resolve
from qcompile.recipe.globs import ATTENTION

MODEL = [
    *(QuantizerName(f"{path}.{kind}_quantizer") for path in ("q_proj", "fc") for kind in ("weight", "input", "output")),
    *(QuantizerName(kind) for kind in ATTENTION),
    QuantizerName("norm.output_quantizer"),
]
HAS = "It has 2 linear layers (q_proj, fc), 1 attention (the root), 1 norm (norm)"


def message(rules: list[dict[str, Any]], model: list[QuantizerName] = MODEL) -> str:
    recipe = load_recipe({"metadata": {"name": "mine", "description": "a test"}, "rules": rules})
    with pytest.raises(RecipeError) as caught:
        check_quantizes(recipe, model, resolve(recipe, model))
    return str(caught.value)


def test_globs_that_match_nothing_come_with_the_nearest_names() -> None:
    assert message([{"quantizer": "*.q_prj.weight_quantizer", "format": "fp8"}]) == (
        "the recipe mine quantizes nothing of this model: rules[0]: the glob '*.q_prj.weight_quantizer'"
        f" matches nothing in this model (nearest: q_proj.weight_quantizer, fc.weight_quantizer). {HAS}"
    )


def test_what_is_left_out_is_named_with_the_rule_that_has_it_back() -> None:
    rules = [
        {"quantizer": "*.weight_quantizer", "format": "fp8"},
        {"quantizer": "q_proj.*", "enable": False},
        {"quantizer": "*.fc.*", "enable": False},
    ]
    text = message(rules)
    assert "rules[1]: 'q_proj.*' leaves out q_proj; to quantize it all the same, end with the rule" in text
    back = re.findall(r"\{quantizer: (\"[^\"]*\"), enable: true\}", text)
    assert back == ['"q_proj.*"', '"fc.*"']
    again = [{"quantizer": glob.strip('"'), "enable": True} for glob in back]
    recipe = load_recipe({"metadata": {"name": "mine", "description": "a test"}, "rules": [*rules, *again]})
    assert list(resolve(recipe, MODEL).configs) == ["q_proj.weight_quantizer", "fc.weight_quantizer"]


def test_the_key_value_cache_goes_by_its_operands() -> None:
    text = message([{"quantizer": "*.kv_cache", "format": "fp8"}])
    assert (
        "the key/value cache of a checkpoint is the k_bmm_quantizer and the v_bmm_quantizer of each attention" in text
    )


def test_no_format_and_no_layers() -> None:
    rules = [{"quantizer": "*", "enable": False}]
    off = message(rules)
    with pytest.raises(RecipeError, match="the recipe mine quantizes nothing: no rule gives a format"):
        check_recipe({"metadata": {"name": "mine", "description": "a test"}, "rules": rules})
    assert "mine quantizes nothing of this model: no rule gives a format, such as {quantizer:" in off
    nothing = message([{"quantizer": "*", "format": "fp8"}], [])
    assert nothing.endswith(". It has no linear layer, convolution, attention or norm that can be")


class Network(nn.Module):
    """As torchvision's ResNet: convolutions and a head called fc."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(self.conv1(x).relu().mean((2, 3)))
        return y


@pytest.mark.everyday(1)
@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential], ids=["bare", "wrapped"])
def test_a_model_of_convolutions_and_a_head(wrap: Any) -> None:
    x = torch.randn(2, 3, 8, 8)
    path = "fc" if wrap is not nn.Sequential else "0.fc"
    for call in (qcompile.quantize, qcompile.calibrate):
        with pytest.raises(
            RecipeError,
            match=rf"fp8_gemm quantizes nothing .*convolutions_half.*conv1; .*leaves out {path};"
            rf".*1 linear layer \({path}\), 1 convolution \(.*conv1\)",
        ):
            call(wrap(Network()), (x,), recipe="fp8_gemm", calibration=[x], progress=False)
    back = load_recipe("fp8_gemm", [f'rules[+]={{quantizer: "{path}.*", enable: true}}'])
    program = qcompile.quantize(wrap(Network()), (x,), recipe=back, calibration=[x], progress=False)
    assert "qcompile.quantize" in str(program.graph)


def test_a_single_linear_layer_is_quantized_and_can_be_left_out_by_mistake() -> None:
    x = torch.randn(2, 16)
    assert qcompile.quantize(nn.Linear(16, 16), (x,), recipe="fp8", calibration=[x], progress=False)
    off = load_recipe("fp8", ['rules[+]={quantizer: "*", enable: false}'])
    with pytest.raises(RecipeError, match=r'leaves out the root; .* \{quantizer: "\*", enable: true\}'):
        qcompile.quantize(nn.Linear(16, 16), (x,), recipe=off, calibration=[x], progress=False)
