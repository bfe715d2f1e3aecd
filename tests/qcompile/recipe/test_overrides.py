"""`--set` changes a recipe, validates it again, and names itself when it is wrong."""

from __future__ import annotations

import re

import pytest

from qcompile.errors import RecipeError
from qcompile.recipe import QuantizerName, load_recipe, resolve, with_overrides

RECIPE = load_recipe(
    {
        "metadata": {"name": "mine", "description": "a test"},
        "rules": [
            {"quantizer": "*.weight_quantizer", "format": "fp8"},
            {"quantizer": "*.input_quantizer", "format": "fp8"},
            {"quantizer": "*lm_head*", "enable": False},
        ],
    }
)


def test_no_override_is_the_same_recipe() -> None:
    assert with_overrides(RECIPE, []) is RECIPE


def test_values_are_yaml_and_the_original_is_unchanged() -> None:
    before = RECIPE.model_dump()
    sets = ["metadata.name=other", "rules[0].format=int8", "rules[0].granularity=per_channel", "rules[2].enable=true"]
    changed = with_overrides(RECIPE, sets)
    assert RECIPE.model_dump() == before
    assert changed.metadata.name == "other"
    assert (changed.rules[0].format, changed.rules[0].granularity) == ("int8", "per_channel")
    assert changed.rules[1] == RECIPE.rules[1]
    assert changed.rules[2].enable is True


def test_overrides_are_validated_together() -> None:
    sets = ["rules[0].granularity=per_block", "rules[0].block_shape=[128, 128]"]
    assert with_overrides(RECIPE, sets).rules[0].block_shape == (128, 128)
    with pytest.raises(
        RecipeError, match=re.escape("--set rules[0].granularity=per_block: rules[0].granularity: per_bl")
    ):
        with_overrides(RECIPE, sets[:1])


def test_an_appended_rule_wins_and_says_where_it_is_from() -> None:
    append = 'rules[+]={quantizer: "*lm_head*", enable: true}'
    name = QuantizerName("lm_head.weight_quantizer")
    assert name.name in resolve(RECIPE, [name]).disabled
    config = resolve(with_overrides(RECIPE, [append]), [name]).configs[name.name]
    assert config.format == "fp8"
    assert config.source == f"rules[0], switched on at --set {append}"


def test_a_selector_changes_every_rule_with_that_value() -> None:
    changed = with_overrides(RECIPE, ["rules[format=fp8].format=nvfp4", "rules[format=nvfp4].rotate=true"])
    assert [(rule.format, rule.rotate) for rule in changed.rules] == [("nvfp4", True), ("nvfp4", True), (None, False)]
    assert str(changed.rules[2].where) == "rules[2]"
    expected = "rules[0] (--set rules[format=fp8].format=nvfp4, --set rules[format=nvfp4].rotate=true)"
    assert str(changed.rules[0].where) == expected


def test_a_section_that_the_recipe_leaves_out_can_be_set() -> None:
    assert with_overrides(RECIPE, ["calibration.algorithm=max"]).calibration.algorithm == "max"


def test_replacing_a_rule_and_all_rules() -> None:
    changed = with_overrides(RECIPE, ['rules[2]={quantizer: "*", enable: false}'])
    assert changed.rules[2].quantizer == "*"
    assert str(changed.rules[2].where) == '--set rules[2]={quantizer: "*", enable: false}'
    assert len(with_overrides(RECIPE, ['rules=[{quantizer: "*", format: fp8}]']).rules) == 1


def test_lines_of_a_file_survive() -> None:
    recipe = load_recipe("fp8", ["rules[1].format=int8"])
    assert recipe.rules[1].where.line == load_recipe("fp8").rules[1].where.line
    assert str(recipe.rules[1].where).endswith(" (--set rules[1].format=int8)")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("rules", "write it as path=value"),
        ("=3", "write it as path=value"),
        (".rules=3", "cannot read '.rules'"),
        ("[0]=3", "cannot read '[0]'"),
        ("rules[x].format=fp8", "cannot read '[x].format'"),
        ("rules..format=fp8", "cannot read '..format'"),
        ("rules[9].format=fp8", "rules has 3 items, the last is [2]"),
        ("rules.format=fp8", "rules is not a mapping, it has no key 'format'"),
        ("metadata[0]=fp8", "metadata is not a list"),
        ("rules[+].format=fp8", "[+] appends a whole item"),
        ("rules[format=int8].format=fp8", "no item of rules has format = 'int8'"),
        ("rules[0].format=[", "the value '[' is not valid YAML"),
        ("rules[0].format=fp7", "unknown format 'fp7' at rules[0].format; known: fp8"),
        ("rules[0].formt=fp8", "unknown key 'formt' in rules[0]; did you mean 'format'?"),
        ("ruels=1", "unknown key 'ruels' in the recipe; did you mean 'rules'?"),
        ("rules[0].format=null", "rules[0].quantizer: a rule needs either `enable` or `format`"),
        ("rules[+]={quantizer: a}", "rules[3].quantizer: a rule needs either `enable` or `format`"),
        ("rules=[]", "rules has 0 items; at least 1 needed"),
    ],
)
def test_a_wrong_override_is_named(override: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"--set {override}: {problem}")):
        with_overrides(RECIPE, ["metadata.name=fine", override])
