"""Fragments: rules keep their place, order matters, and every mistake is one error with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qcompile.errors import RecipeError
from qcompile.recipe import QuantizerName, expanded_yaml, list_fragments, list_recipes, load_recipe, resolve

HEAD = "metadata: {name: mine, description: a test}\nrules:\n"  # rules start on line 3
PART = "description: a part\nrules:\n"  # the same
OFF, FP8 = '- {quantizer: "*.a.*", enable: false}\n', '- {quantizer: "*", format: fp8}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "off.yaml").write_text(PART + OFF)
    (tmp_path / "parts" / "both.yaml").write_text(PART + FP8 + "- import: ./off.yaml\n")
    return tmp_path


def write(folder: Path, rules: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(HEAD + rules)
    return path


def fail(folder: Path, rules: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, rules))
    return str(caught.value).replace(f"{folder}/", "")


def test_rules_come_in_place_and_know_their_own_line(folder: Path) -> None:
    recipe = load_recipe(write(folder, f"- import: parts/both.yaml\n{FP8}- import: fp8_attention\n"))
    places = [str(rule.where).replace(f"{folder}/", "") for rule in recipe.rules]
    shipped = "qcompile/recipe/builtin/fragments/fp8_attention.yaml"
    assert places[:3] == ["parts/both.yaml:3", "parts/off.yaml:3", "r.yaml:4"]
    assert [place.rpartition(":")[0] for place in places[3:]] == [shipped, shipped]
    name = QuantizerName("a.weight_quantizer")
    assert name.name in resolve(recipe, [name]).configs, "the later rule wins"
    last = load_recipe(write(folder, f"{FP8}- import: parts/off.yaml\n"))
    assert str(resolve(last, [name]).disabled[name.name].where) == f"{folder}/parts/off.yaml:3"


def test_a_path_is_relative_to_the_file_that_says_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "parts")
    write(folder, "- import: parts/both.yaml\n")
    assert len(load_recipe("../r.yaml").rules) == 2
    monkeypatch.chdir(folder)
    assert len(load_recipe("r.yaml").rules) == 2


def test_the_same_fragment_twice_is_no_circle(folder: Path) -> None:
    assert len(load_recipe(write(folder, "- import: parts/both.yaml\n- import: parts/off.yaml\n")).rules) == 3


def test_mappings_from_python_import(folder: Path) -> None:
    def data(name: str) -> dict[str, Any]:
        return {"metadata": {"name": "n", "description": "d"}, "rules": [{"import": name}]}

    assert load_recipe(data("fp8_linears")).rules == load_recipe("fp8").rules[:2]
    assert len(load_recipe(data(str(folder / "parts" / "both.yaml"))).rules) == 2
    with pytest.raises(RecipeError, match=r"^recipe mapping: rules\[0\]\.import: '\./x\.yaml' is relative to a file"):
        load_recipe(data("./x.yaml"))


def test_an_override_imports_and_changes_what_was_imported() -> None:
    recipe = load_recipe("fp8_gemm", ["rules[+]={import: fp8_attention}", "rules[format=fp8].format=int8"])
    assert [rule.quantizer for rule in recipe.rules[-2:]] == ["*.[qkv]_bmm_quantizer", "*.softmax_bmm_quantizer"]
    assert {rule.format for rule in recipe.rules} == {"int8", "fp8", None}, "imports of --set are resolved last"
    assert str(recipe.rules[0].where).endswith("fp8_linears.yaml:4 (--set rules[format=fp8].format=int8)")
    assert recipe.rules[-1].where.file.endswith("fp8_attention.yaml")
    with pytest.raises(RecipeError, match=r"^--set rules\[\+\]=\{import: x\}: rules\[\d+\]\.import: no fragment is"):
        load_recipe("fp8", ["rules[+]={import: x}"])


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            "- import: exclusion\n",
            "r.yaml:3: rules[0].import: no fragment is called 'exclusion'; shipped: "
            f"{', '.join(list_fragments())}; or give a path to a YAML file; did you mean 'exclusions'?",
        ),
        ("- import: fp8\n", "r.yaml:3: rules[0].import: 'fp8' is a recipe, and only fragments can be imported"),
        ("- import: ./x.yaml\n", "r.yaml:3: rules[0].import: there is no file x.yaml"),
        ("- import: parts/\n", "r.yaml:3: rules[0].import: there is no file parts"),
        (
            "- import: ./r.yaml\n",
            "r.yaml:3: rules[0].import: r.yaml is a recipe (it has `metadata`), and only fragments",
        ),
        ("- import: 3\n", "r.yaml:3: rules[0].import must be text, and YAML reads 3 as a number: quote it"),
        ("- import: [fp8_linears]\n", "r.yaml:3: rules[0].import must be text (quote it?), not ['fp8_linears']"),
        (
            f"{FP8}- import: exclusions\n  enable: false\n",
            "r.yaml:5: rules[1] imports a fragment, it cannot have the key 'enable' as well; add a rule after it",
        ),
        (
            "- imports: exclusions\n  quantizer: a\n",
            "r.yaml:3: unknown key 'imports' in rules[0]; did you mean 'import'?",
        ),
        (
            '- import: fp8_linears\n- {quantizer: "*", format: fp7}\n',
            "r.yaml:4: unknown format 'fp7' at rules[1].format",
        ),
    ],
)
def test_mistakes_in_imports(folder: Path, rules: str, expected: str) -> None:
    assert fail(folder, rules).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rules:\n" + FP8, "f.yaml:1: the fragment lacks the key 'description'"),
        (PART + "- {quantizer: a, formt: fp8}\n", "f.yaml:3: unknown key 'formt' in rules[0]; did you mean 'format'?"),
        (PART + FP8 + "zzz: []\n", "f.yaml:4: unknown key 'zzz' in the fragment; known: description, rules"),
        ("", "f.yaml:1: the file is empty; a fragment needs `description` and `rules`"),
        ("- a\n", "f.yaml is no fragment, which needs `description` and `rules`"),
        (PART + "- import: nothing\n", "f.yaml:3: rules[0].import: no fragment is called 'nothing'"),
        (
            PART + "- import: f.yaml\n",
            "f.yaml:3: rules[0].import: fragments import each other in a circle: f.yaml -> f",
        ),
        (
            PART + "- import: g.yaml\n",
            "g.yaml:4: rules[1].import: fragments import each other in a circle: f.yaml -> g",
        ),
        (
            PART + '- {quantizer: "*", enable: true}\n',
            "f.yaml:3: rules[0].enable: `enable: true` needs an earlier rule",
        ),
        (PART + "- [\n", "f.yaml:4: not valid YAML"),
    ],
)
def test_mistakes_in_fragments(folder: Path, text: str, expected: str) -> None:
    (folder / "f.yaml").write_text(text)
    (folder / "g.yaml").write_text(PART + FP8 + "- import: f.yaml\n")
    message = fail(folder, "- import: f.yaml\n")
    assert message.startswith(expected), message
    assert "metadata" not in message


def test_enable_may_follow_a_format_of_a_fragment(folder: Path) -> None:
    assert load_recipe(write(folder, '- import: fp8_linears\n- {quantizer: "*.a.*", enable: true}\n')).rules[2].enable


def test_a_fragment_is_no_recipe(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"off\.yaml:1: this is a fragment \(no `metadata`\)"):
        load_recipe(folder / "parts" / "off.yaml")
    with pytest.raises(RecipeError, match=r"'exclusions' is a fragment, not a recipe: .*`- import: exclusions`"):
        load_recipe("exclusions")


@pytest.mark.parametrize("name", list_recipes())
def test_the_expanded_text_is_the_same_recipe(name: str) -> None:
    recipe = load_recipe(name)
    text = expanded_yaml(recipe)
    assert load_recipe(yaml.safe_load(text)) == recipe
    assert "import" not in text.partition("\nrules:")[2]
    assert all(f"# rules[{index}], {rule.where}\n" in text for index, rule in enumerate(recipe.rules))
