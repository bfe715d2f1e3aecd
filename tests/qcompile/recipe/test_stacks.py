"""Blocks counted from the end, against names that are counted by hand and a reference that rewrites the glob."""

from __future__ import annotations

import fnmatch
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import RecipeError
from qcompile.recipe import QuantizerName, Recipe, check_recipe, list_recipes, load_recipe, resolve
from qcompile.recipe.stacks import Stacks, counts_from_end

FP8 = {"quantizer": "*", "format": "fp8"}


def recipe(*globs: str) -> Recipe:
    rules = [FP8, *({"quantizer": glob, "enable": False} for glob in globs)]
    return load_recipe({"metadata": {"name": "mine", "description": "a test"}, "rules": rules})


def model(**lengths: int) -> list[QuantizerName]:
    """Stacks of that many blocks, each with a layer, and with two experts in the last."""
    paths = [f"{stack.replace('__', '.')}.{i}.fc1" for stack, length in lengths.items() for i in range(length)]
    paths += [f"{stack.replace('__', '.')}.{n - 1}.experts.{i}.up" for stack, n in lengths.items() for i in range(2)]
    return [QuantizerName(f"{path}.weight_quantizer") for path in paths]


def off(names: list[QuantizerName], *globs: str) -> set[str]:
    return {name.removesuffix(".weight_quantizer") for name in resolve(recipe(*globs), names).disabled}


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("*encoder.layers.-1.fc1.*", {"encoder.layers.11.fc1"}),
        ("*layers.-1.fc1.*", {"encoder.layers.11.fc1", "decoder.layers.3.fc1"}),
        ("*.layers.-[12].fc1.*", {f"{p}.fc1" for p in ("encoder.layers.11", "encoder.layers.10", "decoder.layers.3")}
         | {"decoder.layers.2.fc1"}),
        ("decoder.layers.{-1,0}.fc1.*", {"decoder.layers.3.fc1", "decoder.layers.0.fc1"}),
        ("decoder.layers.-4.*", {"decoder.layers.0.fc1"}),
        ("encoder.layers.-1[0-2].*", {f"encoder.layers.{i}.fc1" for i in range(3)}),
        ("*.experts.-1.*", {"encoder.layers.11.experts.1.up", "decoder.layers.3.experts.1.up"}),
        ("*layers.-1.experts.0.*", {"encoder.layers.11.experts.0.up", "decoder.layers.3.experts.0.up"}),
        ("*.-1.experts.-1.*", {"encoder.layers.11.experts.1.up", "decoder.layers.3.experts.1.up"}),
    ],
)  # fmt: skip
def test_each_stack_is_counted_by_its_own_length(glob: str, expected: set[str]) -> None:
    assert off(model(encoder__layers=12, decoder__layers=4), glob) == expected


def test_the_whole_last_block_goes() -> None:
    names = [
        QuantizerName(f"model.layers.{i}.{path}")
        for i in range(10)
        for path in ("mlp.up.weight_quantizer", "attn.q_bmm_quantizer", "norm.output_quantizer")
    ]
    disabled = set(resolve(recipe("*layers.-1.*"), names).disabled)
    assert disabled == {name.name for name in names if ".9." in name.name}, "9 is the last, not 10 in the order of text"


def test_a_model_at_the_root_and_in_wrappers() -> None:
    for prefix in ("", "m.", "0.", "m.0."):
        names = [QuantizerName(f"{prefix}{i}.up.weight_quantizer") for i in range(3)]
        glob = "-1.*" if not prefix else "*.-1.up.*"
        assert list(resolve(recipe(glob), names).disabled) == [f"{prefix}2.up.weight_quantizer"]


paths = st.lists(st.sampled_from(["layers", "blocks", "mlp", "0", "1", "2", "10"]), min_size=1, max_size=4)
texts = paths.map(lambda parts: ".".join([*parts, "weight_quantizer"]))
pieces = st.sampled_from(["*", "layers", "blocks", "mlp", "0", "1", "-1", "-2", "-3"])
globs = st.lists(pieces, min_size=1, max_size=4).map(lambda parts: ".".join(["*", *parts, "*"]))


def reference(name: str, names: list[str], glob: str) -> bool:
    """The same by trying every number that each minus could stand for; the glob is then a plain one."""
    parts = name.split(".")
    tail = [part for part in glob.split(".") if re.fullmatch(r"-\d", part)]
    if not tail:
        return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase("." + name, glob)
    marked = [parts]
    for at, part in enumerate(parts):
        if part.isdigit():
            prefix = parts[:at]
            others = [n.split(".") for n in names if n.split(".")[:at] == prefix and len(n.split(".")) > at]
            last = max(int(other[at]) for other in others if other[at].isdigit())
            marked += [[*m[:at], f"-{last + 1 - int(part)}", *m[at + 1 :]] for m in marked]
    return any(fnmatch.fnmatchcase("." + ".".join(m), glob) or fnmatch.fnmatchcase(".".join(m), glob) for m in marked)


@given(st.lists(texts, min_size=1, max_size=8, unique=True), globs)
def test_names_against_a_reference(names: list[str], glob: str) -> None:
    stacks = Stacks(names)
    for name in names:
        assert stacks.matches(name, glob) == reference(name, names, glob)


def test_a_block_that_is_not_there_is_an_error() -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(recipe("*layers.-13.*"), model(encoder__layers=12, decoder__layers=4))
    assert str(caught.value) == (
        "rules[1]: the glob '*layers.-13.*' counts blocks from the end, and matches nothing in this model, which has"
        " encoder.layers (0 to 11), decoder.layers (0 to 3), encoder.layers.11.experts (0 to 1),"
        " decoder.layers.3.experts (0 to 1)"
    )
    with pytest.raises(RecipeError, match="which has no numbered modules"):
        resolve(recipe("*layers.-1.*"), [QuantizerName("up.weight_quantizer")])


def test_a_minus_within_a_name_is_a_letter() -> None:
    assert not counts_from_end("*vit-b-16.*") and counts_from_end("{a,layers.-1}.*") and counts_from_end("-1.*")
    names = [QuantizerName("vit-1.weight_quantizer"), QuantizerName("vit.1.weight_quantizer")]
    assert list(resolve(recipe("*vit-1.*"), names).disabled) == ["vit-1.weight_quantizer"]


def test_a_block_from_the_end_covers_no_other_rule() -> None:
    def dead(*globs: str) -> list[str]:
        return [notice.file for notice in check_recipe(recipe(*globs))]

    assert dead("*layers.11.*", "*layers.-1.*") == []
    assert dead("*layers.-1.*", "*-1*") == [], "the second is no number from the end"
    assert dead("*layers.-1.fc1.*", "*layers.-1.*") == ["rules[1]"]
    assert dead("*layers.-1.*", "*layers.*") == ["rules[1]"]


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_count_from_the_start(name: str) -> None:
    """They are for any model, and a block that is not there is an error."""
    assert not any(counts_from_end(rule.quantizer) for rule in load_recipe(name).rules)
