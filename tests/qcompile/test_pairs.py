"""Every pair of layouts that a recipe can say, for each product of a layer and an attention: it runs, or is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from passes.capabilities import PRODUCTS
from qcompile.errors import RecipeError
from qcompile.recipe import QuantizerName, resolve
from qcompile.schemes.config import QuantizerConfig, format_of, unsupported
from qcompile.schemes.words import WORDS

Data = dict[str, Any]
SHAPES = [None, (1, 16), (1, 32), (1, 128), (128, 128), (64, 64)]
LAYOUTS = [
    {"format": name, "granularity": granularity, "block_shape": shape, "dynamic": dynamic}
    for name, granularity, shape, dynamic in itertools.product(
        ("fp8", "int8", "int4", "nvfp4", "mxfp8", "mxfp4"),
        ("per_tensor", "per_channel", "per_token", "per_block"),
        SHAPES,
        (False, True),
    )
]


def recipe(*rules: Data) -> Data:
    return {"metadata": {"name": "mine", "description": "a test"}, "rules": list(rules)}


class Block(nn.Module):
    """A norm, q, k and v, an attention, and a layer that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.q, self.k, self.v, self.out = (nn.Linear(128, 128) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (layer(x).unflatten(-1, (4, 32)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return result


def made(*rules: Data) -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    x = torch.randn(1, 32, 128)
    return qcompile.quantize(Block().eval(), (x,), recipe=recipe(*rules), calibration=[(x,)], progress=False)


def accepted(*rules: Data) -> bool:
    """Whether a recipe takes the rules for a layer called a: the schema, and what no target multiplies."""
    names = [QuantizerName(f"a.{kind}_quantizer") for kind in ("weight", "input")]
    try:
        configs = resolve(qcompile.load_recipe(recipe(*rules)), names).configs
    except RecipeError as error:
        assert "rules[" in str(error)  # a file would be here with its line
        return False
    return not any(map(unsupported, configs.values()))


def test_a_recipe_takes_exactly_the_pairs_that_something_multiplies() -> None:
    """All of (format, granularity, block shape, dynamic) for the weight by all of them for the input."""
    alone = {
        kind: [layout for layout in LAYOUTS if accepted({"quantizer": f"*.{kind}_quantizer", **layout})]
        for kind in ("weight", "input")
    }

    def ir(layout: Data) -> str:
        block = layout["block_shape"] or {"nvfp4": (1, 16), "int4": (1, 128), "mxfp8": (1, 32), "mxfp4": (1, 32)}.get(
            layout["format"]
        )
        return format_of(QuantizerConfig(layout["format"], layout["granularity"], block)).name

    assert {ir(layout) for layout in alone["weight"]} == {p.weight.name for p in PRODUCTS} | {"int4_128"}
    assert {ir(layout) for layout in alone["input"]} == {p.input.name for p in PRODUCTS}
    pairs = set()
    for weight, x in itertools.product(alone["weight"], alone["input"]):
        if accepted({"quantizer": "*.weight_quantizer", **weight}, {"quantizer": "*.input_quantizer", **x}):
            pairs.add((ir(weight), ir(x)))
    assert pairs == {(product.weight.name, product.input.name) for product in PRODUCTS}


def test_what_the_schema_says_is_in_the_vocabulary_or_refused() -> None:
    for layout in LAYOUTS:
        shape = layout["block_shape"]
        config = QuantizerConfig(layout["format"], layout["granularity"], shape, layout["dynamic"], source="r.yaml:3")
        words = [
            w for w in WORDS if (w.format, w.granularity, w.block_shape) == (config.format, config.granularity, shape)
        ]
        reason = unsupported(config)
        assert reason is None or reason.startswith("r.yaml:3: ")
        if reason is None and layout["granularity"] == "per_block":
            assert [format_of(config)] == [word.ir for word in words]


ATTENTION = ("q", "k", "v", "softmax")


@pytest.mark.everyday(4)
@pytest.mark.parametrize("formats", [*itertools.product(("fp8", "int8"), repeat=4)], ids="-".join)
def test_attention_operands_of_two_formats_are_refused_or_run(formats: tuple[str, ...], tmp_path: Path) -> None:
    rules = [
        {"quantizer": f"*{name}_bmm_quantizer" if name == "softmax" else f"*.{name}_bmm_quantizer", "format": fmt}
        for name, fmt in zip(ATTENTION, formats, strict=True)
    ]
    q, k, v, softmax = formats
    if q != k or softmax != v:
        with pytest.raises(RecipeError, match=r"no target multiplies .* \(.*: rules\[\d\]; .*: rules\[\d\]\)"):
            made(*rules)
        return
    program = made(*rules)
    for target in ("tensorrt", "portable"):
        qcompile.export_onnx(program, tmp_path / f"{target}.onnx", target=target)


OUTPUTS: list[Data] = [
    {"format": "fp8"},
    {"format": "int8"},
    {"format": "int8", "granularity": "per_token", "dynamic": True},
    {"format": "nvfp4"},
]


@pytest.mark.everyday(3)
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
@pytest.mark.parametrize("weight", ["fp8", "int8", "nvfp4", None])
def test_a_quantized_result_meets_a_weight_or_is_refused(output: Data, weight: str | None, tmp_path: Path) -> None:
    """The recipe gives q, k and v no input quantizers: they read what the norm has quantized."""
    rules = [{"quantizer": "{norm,q,k}.output_quantizer", **output}]
    if weight is not None:
        rules.append({"quantizer": "{q,k,v}.weight_quantizer", "format": weight})
    if weight not in (None, output["format"]):
        with pytest.raises(RecipeError, match=r"reads norm\.output_quantizer: .*weight: rules\[1\]; input: ru"):
            made(*rules)
        return
    program = made(*rules)
    for target in ("tensorrt", "portable"):
        qcompile.export_onnx(program, tmp_path / f"{target}.onnx", target=target)


def test_two_results_of_an_attention_differ() -> None:
    rules: list[Data] = [{"quantizer": "q.output_quantizer", "format": "fp8"}]
    rules.append({"quantizer": "k.output_quantizer", "format": "int8"})
    with pytest.raises(RecipeError, match=r"what reads q\.output_quantizer and k\.output_quantizer: no target"):
        made(*rules)
