"""Every kind of mistake in a recipe file gives one `RecipeError` with the file and the line of the mistake."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import RecipeError
from qcompile.recipe import Recipe, list_recipes, load_recipe, recipe_path
from qcompile.recipe.imports import in_file, recipe_of
from qcompile.recipe.yaml_lines import parse

HEAD = "metadata: {name: mine, description: a test}\n"  # line 1; a body starts on line 2


def fail(tmp_path: Path, text: str | bytes) -> str:
    """The error for a file `r.yaml` with that text, its directory removed."""
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value).replace(f"{tmp_path}/", "")


def fail_rules(tmp_path: Path, rules: str) -> str:
    """The error for a file whose line 2 is `rules:` and whose line 3 is the first line of `rules`."""
    return fail(tmp_path, HEAD + "rules:\n" + dedent(rules).lstrip("\n"))


def test_rules_know_their_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        HEAD + 'rules:\n  # a comment\n  - quantizer: "*"\n    format: fp8\n\n  - {quantizer: b, enable: false}\n'
    )
    recipe = load_recipe(path)
    assert [(rule.where.file, rule.where.line) for rule in recipe.rules] == [(str(path), 4), (str(path), 7)]
    assert str(recipe.rules[1].where) == f"{path}:7"


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            '- quantizer: "*"\n  formt: fp8',
            "r.yaml:4: unknown key 'formt' in rules[0]; did you mean 'format'?",
        ),
        (
            '- quantizer: "*"\n  zzz: 1\n  format: fp8',
            "r.yaml:4: unknown key 'zzz' in rules[0]; known: quantizer, unless, module_class, operator, enable, "
            "format, granularity, block_shape, group_size, dynamic, constant_amax, rotate",
        ),
        ('- quantizer: "*"\n  format: fp8\n  1: 2', "r.yaml:3: unknown key 1 in rules[0]; known: quantizer"),
        (
            '- quantizer: "*"\n\n  format: fp7',
            "r.yaml:5: unknown format 'fp7' at rules[0].format; known: fp8, int8, int4, nvfp4, mxfp8, mxfp4; did you"
            " mean 'fp8'?",
        ),
        (
            '- quantizer: "*"\n  format: fp8\n  granularity: pertensor',
            "r.yaml:5: unknown granularity 'pertensor' at rules[0].granularity; known: per_tensor, per_channel, "
            "per_token, per_block; did you mean 'per_tensor'?",
        ),
        ("- format: fp8", "r.yaml:3: rules[0] lacks the key 'quantizer'"),
        (
            '- quantizer: "*.{a,b"\n  format: fp8',
            "r.yaml:3: rules[0].quantizer: the braces of '*.{a,b' do not pair up",
        ),
        (
            "- quantizer: 5\n  format: fp8",
            'r.yaml:3: rules[0].quantizer must be text, and YAML reads 5 as a number: quote it, quantizer: "5"',
        ),
        ('- quantizer: ""\n  format: fp8', "r.yaml:3: rules[0].quantizer is empty"),
        ('- quantizer: "*"\n  enable: "false"', "r.yaml:4: rules[0].enable must be true or false, without quotes, not"),
        ('- quantizer: "*"\n  enable: "maybe"', "r.yaml:4: rules[0].enable must be true or false, not 'maybe'"),
        ('- quantizer: "*"\n  format: fp8\n  dynamic: 1', "r.yaml:5: rules[0].dynamic must be true or false, not 1"),
        ("- just text", "r.yaml:3: rules[0] must be a mapping, not 'just text'"),
        ('- quantizer: "*"', "r.yaml:3: rules[0].quantizer: a rule needs either `enable` or `format`"),
        (
            '- quantizer: "*"\n  format: fp8\n  enable: true',
            "r.yaml:5: rules[0].enable: a rule has `enable` or `format`, not both",
        ),
        (
            '- quantizer: "*"\n  enable: false\n  granularity: per_tensor',
            "r.yaml:5: rules[0].granularity: `granularity` belongs to a rule with `format`",
        ),
        (
            '- quantizer: "*"\n  enable: true',
            "r.yaml:4: rules[0].enable: `enable: true` needs an earlier rule that gives a format",
        ),
        (
            '- quantizer: "*"\n  format: fp8\n  block_shape: [128, 128]',
            "r.yaml:5: rules[0].block_shape: `block_shape` needs `granularity: per_block`",
        ),
        (
            '- quantizer: "*.weight_quantizer"\n  format: fp8\n  granularity: per_block',
            "r.yaml:5: rules[0].granularity: per_block fp8 needs `block_shape`, such as [128, 128]",
        ),
        (
            '- quantizer: "*"\n  format: fp8\n  granularity: per_block\n  block_shape: [1, 0]',
            "r.yaml:6: rules[0].block_shape: block sides must be at least 1, not [1, 0]",
        ),
        (
            '- quantizer: "*"\n  format: fp8\n  block_shape:\n    - 1\n    - x',
            "r.yaml:7: rules[0].block_shape[1] must be a whole number, not 'x'",
        ),
        (
            '- quantizer: "*"\n  format: fp8\n  block_shape: [1, 2, 3]',
            "r.yaml:5: rules[0].block_shape has 3 items; at most 2 are allowed",
        ),
        (
            '- quantizer: "*"\n  format: nvfp4\n  granularity: per_tensor',
            "r.yaml:5: rules[0].granularity: nvfp4 is always per_block, not per_tensor",
        ),
        (
            '- quantizer: "*"\n  format: nvfp4\n  block_shape: [1, 32]',
            "r.yaml:5: rules[0].block_shape: nvfp4 has blocks of [1, 16], not [1, 32]",
        ),
        (
            '- quantizer: "*.input_quantizer"\n  format: fp8\n  granularity: per_token',
            "r.yaml:5: rules[0].granularity: per_token scales exist only at run time: add `dynamic: true`",
        ),
        (
            '- quantizer: "*.input_quantizer"\n  format: int8\n  granularity: per_token\n  constant_amax: 4',
            "r.yaml:6: rules[0].constant_amax: `constant_amax` is one number, and per_token has many scales",
        ),
        (
            '- quantizer: "*.{weight,k_bmm}_quantizer"\n  format: fp8\n  constant_amax: 448',
            "r.yaml:5: rules[0].constant_amax: `constant_amax` is for activations whose range is not known, not for "
            "weight_quantizer",
        ),
        (
            '- quantizer: "*mlp*"\n  format: fp8\n  granularity: per_token\n  dynamic: true',
            "r.yaml:5: rules[0].granularity: per_token is for activations (end the glob with input_quantizer), "
            "but the glob '*mlp*' also reaches weight_quantizer",
        ),
        (
            '- quantizer: "*_quantizer"\n  format: int8\n  granularity: per_channel',
            "r.yaml:5: rules[0].granularity: per_channel is for weights",
        ),
        (
            '- quantizer: "*.weight_quantizer"\n  format: fp8\n  dynamic: true',
            "r.yaml:5: rules[0].dynamic: `dynamic: true` is for activations",
        ),
        (
            '- quantizer: "*_bmm_quantizer"\n  format: nvfp4',
            "r.yaml:4: rules[0].format: attention operands have one scale per tensor, so q_bmm",
        ),
        (
            '- quantizer: "*.input_quantizer"\n  format: nvfp4\n  dynamic: false',
            "r.yaml:4: rules[0].format: nvfp4 activations always have scales from run time: leave out `dynamic: false`",
        ),
    ],
)
def test_mistakes_in_rules(tmp_path: Path, rules: str, expected: str) -> None:
    message = fail_rules(tmp_path, rules)
    assert message.startswith(expected)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml:1: the file is empty"),
        ("# only a comment\n", "r.yaml:1: the file is empty"),
        ("- a\n", "r.yaml:1: the recipe must be a mapping, not ['a']"),
        (HEAD, "r.yaml:1: the recipe lacks the key 'rules'"),
        (HEAD + "rules: []\n", "r.yaml:2: rules has 0 items; at least 1 needed"),
        (HEAD + "rules: {}\n", "r.yaml:2: rules must be a list, not {}"),
        (HEAD + "ruels:\n", "r.yaml:2: unknown key 'ruels' in the recipe; did you mean 'rules'?"),
        ("metadata:\n  nam: x\n", "r.yaml:1: metadata lacks the key 'name'"),
        (
            HEAD + "calibration:\n  algorithm: entropy\n",
            "r.yaml:3: unknown algorithm 'entropy' at calibration.algorithm",
        ),
        (HEAD + "calibration:\n  algoritm: max\n", "r.yaml:3: unknown key 'algoritm' in calibration; did you mean"),
        (HEAD + HEAD, "r.yaml:2: duplicate key 'metadata' in the recipe, first on line 1"),
        (
            HEAD + "rules:\n- quantizer: a\n  format: fp8\n  format: int8\n",
            "r.yaml:5: duplicate key 'format' in rules[0], first on line 4",
        ),
        (HEAD + "rules:\n- quantizer: *.x\n", "r.yaml:3: not valid YAML: while scanning an alias"),
        (HEAD + "rules:\n- quantizer: *lm_head*\n", "r.yaml:3: not valid YAML"),
        (HEAD + "rules: [\n", "r.yaml:3: not valid YAML: while parsing a flow node"),
        (HEAD + "---\n" + HEAD, "r.yaml:2: not valid YAML: expected a single document"),
        (HEAD + "rules: !!python/object:os.system {}\n", "r.yaml:2: not valid YAML: could not determine a constructor"),
        (HEAD + "? [a]\n: b\n", "r.yaml:2: not valid YAML"),
        (HEAD.encode() + b"\xff", f"r.yaml: a recipe is UTF-8 text, but byte {len(HEAD)} is not"),
        (HEAD + "\x00", "r.yaml:1: not valid YAML: "),
        (HEAD + "rules: &a [*a]\n", "r.yaml:2: not valid YAML: it contains itself"),
    ],
)
def test_mistakes_in_files(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert any(line.startswith(expected) for line in fail(tmp_path, text).splitlines()), fail(tmp_path, text)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("why: fast, and small", None),
        ("why: 50% of it, (a) - b [c] {d} it's * & @#", None),
        ("why: the head  # a comment", None),
        ("why: FP8: fast", "a text with a colon in it must be quoted"),
        (
            "why: as in issue #12 of theirs",
            "rules[0].why is cut at '#12', which is not text to YAML: quote it, why: \"as",
        ),
        ("why: &co runs", "rules[0].why is cut at '&', which is not text to YAML: quote it"),
        ("why: *all of it", 'a glob that starts with * must be quoted: "*..."'),
        ("why: %50", "a text that starts with % must be quoted"),
        ("why: @home", "a text that starts with @ must be quoted"),
        ("why: `enable`", "a text that starts with ` must be quoted"),
        ("why: !important x", "a text that starts with ! must be quoted"),
        ("why: [1] says so", "a text that starts with [ must be quoted"),
        ("why: {a} says so", "a text that starts with { must be quoted"),
        ("why: 'it's so'", "a text that starts with ' must be quoted, and its own quotes doubled"),
        ("why: > 5 layers", "a text that starts with > must be quoted"),
        ("why: - early", "a text that starts with - must be quoted"),
        ('why: "a \\d"', "between double quotes \\ is written twice, between single quotes once"),
        ("why: on", 'rules[0].why must be text, and YAML reads on as true: quote it, why: "on"'),
        ("why: No", 'rules[0].why must be text, and YAML reads No as false: quote it, why: "No"'),
        ("why: 1.5", 'rules[0].why must be text, and YAML reads 1.5 as a number: quote it, why: "1.5"'),
        (
            "why: 2026-11-28",
            'rules[0].why must be text, and YAML reads 2026-11-28 as a date: quote it, why: "2026-11-28"',
        ),
        ("\twhy: tab", "indent with spaces, not with a tab"),
        ("on: x", "YAML reads the key on as no text: quote it"),
    ],
)
def test_text_without_quotes(tmp_path: Path, line: str, expected: str | None) -> None:
    """Each text that YAML does not take as it stands gets a sentence with its line and the fix."""
    rules = f'- quantizer: "*"\n  format: fp8\n  {line}'
    if expected is None:
        path = tmp_path / "r.yaml"
        path.write_text(HEAD + "rules:\n" + rules)
        assert load_recipe(path).rules[0].why == line.removeprefix("why: ").partition("  #")[0]
        return
    message = fail_rules(tmp_path, rules)
    assert message.startswith("r.yaml:5: ") and expected in message and "\n" not in message


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        (
            '{quantizer: "*", format: fp8, why: small, and early, too}',
            "'and early' after rules[0].why has no value: a comma ends a text inside of {...}, so quote it, "
            'why: "small, and early"',
        ),
        ('{quantizer: "*", format: fp8, dynamic}', "'dynamic' after rules[0].format has no value: write dynamic: and"),
        ("{quantizer}", "'quantizer' in rules[0] has no value"),
        ("{quantizer: a.{b,c}.*, format: fp8}", "a text with braces or brackets must be quoted inside of {...}"),
        ("{quantizer: a.[qk].*, format: fp8}", "a text with braces or brackets must be quoted inside of {...}"),
        ("{quantizer: a, format: fp8, why: FP8: fast}", "a text with a colon in it must be quoted"),
        ("{quantizer: a, format: fp8, why: issue #12}", "` #` begins a comment: a text with it must be quoted"),
        ("{quantizer: *.a, format: fp8}", 'a glob that starts with * must be quoted: "*..."'),
    ],
)
def test_text_without_quotes_inside_of_braces(tmp_path: Path, mapping: str, expected: str) -> None:
    message = fail_rules(tmp_path, f"- {mapping}\n")
    assert re.match(r"r\.yaml:[34]: ", message) and expected in message


def test_an_override_is_not_cut_either() -> None:
    with pytest.raises(RecipeError, match=r"^--set .*: 'b' after why has no value: a comma ends a text inside of"):
        load_recipe("fp8", ['rules[+]={quantizer: "*.a.*", enable: false, why: a, b}'])


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1))
@settings(max_examples=300, deadline=None)
def test_a_text_is_kept_or_refused(text: str) -> None:
    """Whatever stands behind `description: `, the recipe has all of it, or there is an error; only comments go."""
    head = f"metadata:\n  name: n\n  description: {text}\n"
    try:
        recipe = recipe_of(in_file(parse(head + 'rules: [{quantizer: "*", format: fp8}]\n', "r.yaml"), Path("r.yaml")))
    except RecipeError as error:
        assert str(error).startswith("r.yaml:")
        return
    kept, comment = recipe.metadata.description, re.search(r"(^|\s)#(\s|$)", text)
    written = text[: comment.start()] if comment else text
    quoted = written.strip()[:1] in ("'", '"', ">", "|")
    assert quoted or " ".join(kept.split()) == " ".join(written.split())


@pytest.mark.parametrize("glob", ["*lm_head*", "*.head.*"])
def test_an_unquoted_star_gets_a_hint(tmp_path: Path, glob: str) -> None:
    assert fail_rules(tmp_path, f"- quantizer: {glob}").endswith('; a glob that starts with * must be quoted: "*..."')


def test_all_mistakes_come_in_one_error(tmp_path: Path) -> None:
    message = fail_rules(tmp_path, '- quantizer: "*"\n  format: fp7\n- quantizer: "*"\n  enabl: true\n')
    lines = message.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["r.yaml:4:", "r.yaml:6:"]


def test_the_line_of_an_aliased_and_of_a_merged_mapping(tmp_path: Path) -> None:
    aliased = '- &a {quantizer: "*", format: fp8}\n- *a\n- <<: *a\n  format: fp7\n'
    assert fail_rules(tmp_path, aliased).startswith("r.yaml:6: unknown format 'fp7' at rules[2].format")
    merged = '- &a {quantizer: "*", format: fp8}\n- {<<: *a, format: int8}\n'
    (tmp_path / "m.yaml").write_text(HEAD + "rules:\n" + merged)
    recipe = load_recipe(tmp_path / "m.yaml")
    assert [(rule.format, rule.where.line) for rule in recipe.rules] == [("fp8", 3), ("int8", 4)]


def test_names_paths_mappings_and_recipes_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = load_recipe("fp8")
    copy = tmp_path / "copy.yaml"
    copy.write_bytes(recipe_path("fp8").read_bytes())
    assert load_recipe(copy) == load_recipe(str(copy)) == shipped == load_recipe(shipped)
    assert load_recipe(shipped.model_dump()) == shipped
    assert load_recipe(copy.rename(tmp_path / "no_suffix")) == shipped
    monkeypatch.chdir(tmp_path)
    assert load_recipe("no_suffix") == shipped
    (tmp_path / "int8").write_text("not a recipe")
    assert load_recipe("int8").metadata.name == "int8"  # a shipped name wins over a file of the same name
    copy.write_bytes(b"\xef\xbb\xbf" + recipe_path("fp8").read_bytes())
    assert load_recipe(copy) == shipped


def test_a_recipe_is_a_frozen_hashable_value() -> None:
    recipe = load_recipe("fp8")
    assert hash(recipe) == hash(load_recipe("fp8"))
    with pytest.raises(ValueError, match="frozen"):
        recipe.metadata.__setattr__("name", "other")


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("fp8_gem")
    message = str(caught.value)
    assert "no recipe is called 'fp8_gem'" in message
    assert all(name in message for name in list_recipes())
    assert message.endswith("did you mean 'fp8_gemm'?")


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot read the recipe: No such file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="cannot read the recipe: Is a directory"):
        load_recipe(tmp_path)


def test_a_wrong_mapping_names_the_key() -> None:
    data = {"metadata": {"name": "a", "description": "b"}, "rules": [{"quantizer": "*", "formt": "fp8"}]}
    with pytest.raises(RecipeError, match=r"^recipe mapping: unknown key 'formt' in rules\[0\]; did you mean 'format'"):
        load_recipe(data)


def test_a_recipe_from_python_needs_no_file() -> None:
    recipe = Recipe.model_validate(
        {"metadata": {"name": "a", "description": "b"}, "rules": [{"quantizer": "*", "format": "fp8"}]}
    )
    assert str(recipe.rules[0].where) == "recipe"
    assert str(load_recipe(recipe.model_dump()).rules[0].where) == "rules[0]"
