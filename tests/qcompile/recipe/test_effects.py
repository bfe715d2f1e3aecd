"""Rules that later ones undo: what a user asked for before an import, and no noise about what is usual."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.errors import RecipeError
from qcompile.recipe import Notice, QuantizerName, check_recipe, list_recipes, load_recipe, resolve
from qcompile.recipe.globs import ATTENTION
from tests.qcompile.recipe.families import FAMILIES
from tests.qcompile.recipe.test_families import quantizers

HEAD = "metadata: {name: mine, description: a test}\nrules:\n"  # rules start on line 3
SHIPPED = "qcompile/recipe/builtin/fragments/"
MODEL = [
    *(QuantizerName(f"layers.{i}.{path}.{kind}_quantizer") for i in range(4) for path in ("mlp.up", "attn.q_proj")
      for kind in ("weight", "input")),
    *(QuantizerName(f"layers.{i}.attn.{kind}") for i in range(4) for kind in ATTENTION),
    *(QuantizerName(f"lm_head.{kind}_quantizer") for kind in ("weight", "input", "output")),
]  # fmt: skip
OFF = '- {quantizer: "*.layers.0.*", enable: false}\n'
LINEARS = "- import: fp8_linears\n"
FP8_INPUTS = '- {quantizer: "*.input_quantizer", format: fp8}\n'


def write(folder: Path, rules: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(HEAD + rules)
    return path


def told(folder: Path, rules: str) -> list[tuple[str, int | None]]:
    """(kind, line) of the notices about rules of the user's own file."""
    notices = resolve(load_recipe(write(folder, rules)), MODEL).notices
    return [(notice.kind, notice.line) for notice in notices if notice.is_warning]


def of(notices: list[Notice], folder: Path) -> str:
    (notice,) = (n for n in notices if n.is_warning)
    return str(notice).replace(f"{folder}/", "")


def test_an_import_that_switches_on_again_is_told_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, f"{OFF}- import: fp8_linears\n")
    assert of(resolve(load_recipe(path), MODEL).notices, tmp_path) == (
        "r.yaml:3: the rule for '*.layers.0.*' is wholly overridden by '*.weight_quantizer'"
        f" ({SHIPPED}fp8_linears.yaml:4), '*.input_quantizer' ({SHIPPED}fp8_linears.yaml:7); later rules win: move this"
        " one behind them"
    )
    path = write(tmp_path, f"- import: fp8_attention\n{OFF}- import: fp8_linears\n")
    assert of(resolve(load_recipe(path), MODEL).notices, tmp_path) == (
        "r.yaml:4: later rules undo the rule for '*.layers.0.*' for 4 of 8 quantizers"
        " (layers.0.mlp.up.weight_quantizer, layers.0.mlp.up.input_quantizer, layers.0.attn.q_proj.weight_quantizer and"
        f" 1 more): '*.weight_quantizer' ({SHIPPED}fp8_linears.yaml:4), '*.input_quantizer'"
        f" ({SHIPPED}fp8_linears.yaml:7); later rules win: move this one behind them"
    )


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        # undone by what was imported after it
        (f'{LINEARS}- {{quantizer: "*lm_head*", enable: true}}\n- import: exclusions\n', [("overridden", 4)]),
        (f'{LINEARS}- {{quantizer: "*{{lm_head,up}}.*", enable: true}}\n- import: exclusions\n', [("undone", 4)]),
        ('- {quantizer: "*{lm_head,up}.*_quantizer", format: fp8}\n- import: exclusions\n', [("undone", 3)]),
        ('- {quantizer: "*.layers.0.*{weight,input}_quantizer", format: fp8}\n- import: nvfp4_mlp\n', [("undone", 3)]),
        ('- {quantizer: "*.layers.0.*{weight,input}_quantizer", format: fp8}\n- import: nvfp4_linears\n',
         [("overridden", 3)]),
        (f"- import: fp8_attention\n{OFF}- import: nvfp4_mlp\n", [("undone", 4)]),
        # undone in the same file: off, and on again by a rule about more
        (f'- import: fp8_attention\n{OFF}- {{quantizer: "*.weight_quantizer", format: fp8}}\n', [("undone", 4)]),
        # what is usual
        (f"- import: fp8_linears\n- import: fp8_attention\n{OFF}", []),
        ('- {quantizer: "*.weight_quantizer", format: fp8}\n- import: exclusions\n', []),
        ('- {quantizer: "*.mlp.*weight_quantizer", format: nvfp4}\n- {quantizer: "*.layers.3.*", enable: false}\n', []),
        ('- {quantizer: "*.*{weight,input}_quantizer", format: fp8}\n- import: nvfp4_mlp\n', []),
        (f'- import: fp8_linears\n{OFF}- {{quantizer: "*.layers.0.mlp.*weight_quantizer", format: fp8}}\n', []),
        ('- {quantizer: "*.mlp.*", format: fp8}\n- {quantizer: "*.input_quantizer", enable: false}\n', []),
        ('- import: fp8_linears\n- {quantizer: "*.up.*_quantizer", enable: true}\n- import: exclusions\n', []),
    ],
)  # fmt: skip
def test_what_is_worth_a_notice(tmp_path: Path, rules: str, expected: list[tuple[str, int]]) -> None:
    assert told(tmp_path, rules) == expected


def test_a_fragment_of_the_user_is_an_import_too(tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text(
        'description: d\nrules:\n- {quantizer: "*.mlp.*weight_quantizer", format: int8}\n'
    )
    rules = '- {quantizer: "*.layers.0.*weight_quantizer", format: fp8}\n- import: ./part.yaml\n'
    assert told(tmp_path, rules) == [("undone", 3)]


@pytest.mark.everyday(60)
@pytest.mark.parametrize("recipe", list_recipes())
@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_recipes_make_no_noise(recipe: str, family: str) -> None:
    found = [name for names in quantizers(family).values() for name in names]
    notices = resolve(load_recipe(recipe), found).notices
    assert not [notice for notice in notices if notice.is_warning or notice.kind == "undone"]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (f"{OFF}- import: fp8_linears\n", [("overridden", 3)]),
        (f"- import: fp8_attention\n{OFF}- import: fp8_linears\n", [("undone", 4)]),
        (
            '- import: fp8_linears\n- {quantizer: "*lm_head*", enable: true}\n- import: exclusions\n',
            [("overridden", 4)],
        ),
        (f"- import: fp8_linears\n- import: fp8_attention\n{OFF}", []),
        ('- {quantizer: "*.weight_quantizer", format: fp8}\n- import: exclusions\n', []),
    ],
)
def test_the_check_without_a_model_tells_it_too(tmp_path: Path, rules: str, expected: list[tuple[str, int]]) -> None:
    assert [(notice.kind, notice.line) for notice in check_recipe(write(tmp_path, rules))] == expected


@pytest.mark.parametrize(
    ("rules", "layer", "lines"),
    [
        (f'- {{quantizer: "*.weight_quantizer", format: nvfp4}}\n{FP8_INPUTS}', "x", "34"),
        (f'- {{quantizer: "*.weight_quantizer", format: int8}}\n{FP8_INPUTS}', "x", "34"),
        ('- import: fp8_linears\n- {quantizer: "*.mlp.*weight_quantizer", format: nvfp4}\n', "x.mlp", "4"),
        ('- import: nvfp4_linears\n- {quantizer: "*.fc[12].input_quantizer", format: int8}\n', "x.fc1", "4"),
        ('- import: nvfp4_linears\n- {quantizer: "*.input_quantizer", module_class: "A*", format: int8}\n', "x", "4"),
    ],
)  # fmt: skip
def test_the_check_refuses_operands_that_no_target_multiplies(
    tmp_path: Path, rules: str, layer: str, lines: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe(write(tmp_path, rules))
    message = str(caught.value)
    assert message.startswith(f"a layer called like '{layer}': no target multiplies a weight in ")
    assert all(f"r.yaml:{line}" in message for line in lines)
    assert "nvfp4 x nvfp4" in message and "fp8 x fp8 or fp8_per_token" in message


def test_a_pair_that_a_later_rule_takes_apart_is_no_error(tmp_path: Path) -> None:
    rules = '- {quantizer: "*.weight_quantizer", format: nvfp4}\n' + FP8_INPUTS
    assert check_recipe(write(tmp_path, rules + '- {quantizer: "*.input_quantizer", enable: false}\n'))
    off = '- {quantizer: "*.mlp.*input_quantizer", enable: false}\n'
    with pytest.raises(RecipeError, match="a layer called like 'x'"):
        check_recipe(write(tmp_path, rules + off))
