"""The check without a model: it finds dead rules, and never calls a live one dead."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import RecipeError
from qcompile.recipe import QuantizerName, check_recipe, list_recipes, load_recipe, resolve
from qcompile.recipe.globs import KINDS

FP8, INT8, OFF, ON = {"format": "fp8"}, {"format": "int8"}, {"enable": False}, {"enable": True}
Rules = list[tuple[str, str | None, dict[str, Any]]]


def data(rules: Rules) -> dict[str, Any]:
    listed = [{"quantizer": glob, "module_class": cls, **action} for glob, cls, action in rules]
    return {"metadata": {"name": "mine", "description": "a test"}, "rules": listed}


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_have_no_dead_rule(name: str) -> None:
    assert check_recipe(name) == []


@pytest.mark.parametrize(
    ("rules", "dead"),
    [
        ([("*.a.*", None, FP8), ("*.a.*", None, INT8)], [0]),
        ([("*.a.*", None, FP8), ("*", None, INT8)], [0]),
        ([("*.a.weight_quantizer", None, FP8), ("*.weight_quantizer", None, OFF)], [0]),
        ([("*.[ab].weight_quantizer", None, FP8), ("*.weight_quantizer", None, INT8)], [0]),
        ([("*.weight_quantizer", None, FP8), ("*.a.weight_quantizer", None, INT8)], []),
        ([("*.[xy].*", None, FP8), ("*x*", None, INT8)], []),
        ([("*.?.*", None, FP8), ("*x*", None, INT8)], []),
        ([("*.[ab].*", None, FP8), ("*a*", None, INT8)], [0]),  # there is an a in every kind
        ([("*", None, FP8), ("*", None, OFF), ("*.a.*", None, ON)], []),
        ([("*", None, FP8), ("*", None, OFF), ("*", None, ON)], [1]),
        ([("*", None, FP8), ("*.a.*", None, OFF), ("*", None, FP8)], [0, 1]),
        ([("*", "Linear", FP8), ("*", None, INT8)], [0]),
        ([("*", "Linear", FP8), ("*", "Linear", INT8)], [0]),
        ([("*", None, FP8), ("*", "Linear", INT8)], []),
        ([("*.weight", None, FP8), ("*", None, FP8)], [0]),
        ([("*.{a,b}.weight_quantizer", None, FP8), ("*.{weight,input}_quantizer", None, INT8)], [0]),
        ([("*.{a,b}.*", None, FP8), ("*.a.*", None, INT8)], []),
        ([("*.a.*", None, FP8), ("*.{b,a}.*", None, INT8)], [0]),
    ],
)
def test_rules_that_can_never_win(rules: Rules, dead: list[int]) -> None:
    assert [notice.file for notice in check_recipe(data(rules))] == [f"rules[{index}]" for index in dead]


paths = st.lists(st.sampled_from(["a", "ab", "head"]), max_size=2)
quantizers = st.builds(lambda path, kind: ".".join([*path, kind]), paths, st.sampled_from(KINDS[:3]))
pieces = st.sampled_from(
    ["*", "*.", ".", "?", "[ab]", "[!a]", "a", "b", "head", "*.weight_quantizer", "_quantizer", "{a,head}"]
)
globs = st.lists(pieces, min_size=1, max_size=4).map("".join)
other = {"format": "fp8", "why": "the same format: the check refuses INT8 with FP8"}
rule = st.tuples(globs, st.sampled_from([None, None, "Linear", "L*"]), st.sampled_from([FP8, other, OFF, ON]))


@given(st.lists(rule, max_size=5), st.lists(quantizers, min_size=1, max_size=8))
def test_a_rule_called_dead_decides_nothing(rules: Rules, model: list[str]) -> None:
    recipe = load_recipe(data([("*", None, FP8), *rules]))
    noticed = {kind: {n.file for n in check_recipe(recipe) if n.kind == kind} for kind in ("overridden", "undone")}
    result = resolve(recipe, [QuantizerName(name, "torch.nn.Linear") for name in model])
    kinds = {notice.file: notice.kind for notice in result.notices}
    assert all(kinds[file] in ("overridden", "matches_nothing") for file in noticed["overridden"])


def test_the_check_gives_lines_of_a_file(tmp_path: Any) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        'metadata: {name: n, description: d}\nrules:\n- {quantizer: a*, format: fp8}\n- {quantizer: "*", format: fp8}\n'
    )
    assert [str(notice) for notice in check_recipe(path)] == [
        f"{path}:3: the rule for 'a*' is wholly overridden by '*' ({path}:4)"
    ]
    path.write_text("metadata: 3")
    with pytest.raises(RecipeError, match=r"r\.yaml:1: metadata must be a mapping"):
        check_recipe(path)
