"""Recipes of strangers: small files stay small, nothing is raised but a RecipeError, and no other file is shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcompile.errors import RecipeError
from qcompile.recipe import load_recipe
from qcompile.recipe.globs import GlobError, alternatives

HEAD = "metadata: {name: mine, description: a test}\n"
RULES = 'rules: [{quantizer: "*.weight_quantizer", format: fp8}]\n'


def lines(*levels: str) -> str:
    return "".join(f"{level}\n" for level in levels)


LAUGHS = lines("a0: &a0 [x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)))
MERGES = lines("a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 30)))
WIDE = '- {quantizer: "{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}", enable: false}\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEAD + RULES + LAUGHS, r"r\.yaml:\d+: not valid YAML: with its aliases written out it has more than 50000"),
        (HEAD + RULES + MERGES, r"r\.yaml:\d+: not valid YAML: with its aliases written out it has more than 50000"),
        (HEAD + "rules: &a [{quantizer: x, why: *a}]\n", r"r\.yaml:2: not valid YAML: it contains itself"),
        (HEAD + f"rules: {'[' * 60}{']' * 60}\n", r"r\.yaml:2: not valid YAML: it is nested more than 40 levels deep"),
        (HEAD + f"rules: {'[' * 1_000}\n", r"r\.yaml:1: not valid YAML: it is nested more than 40 levels deep"),
        (HEAD + RULES + "#" * 200_000, r"r\.yaml: a recipe has at most 200000 characters"),
        (HEAD + f"rules: {'x' * 100_000}\n", r"r\.yaml:2: rules must be a list, not 'xxx"),
        (HEAD + "rules: 2026-13-45\n", r"r\.yaml:2: not valid YAML: '2026-13-45' is no 'timestamp' that can be read"),
        (HEAD + "rules: 0000-01-01\n", r"r\.yaml:2: not valid YAML: '0000-01-01' is no 'timestamp'"),
        (HEAD + f"rules: {'9' * 5_000}\n", r"r\.yaml:2: not valid YAML: '9+\.\.\.9+' is no 'int'"),
        (HEAD + f"rules: 0x{'f' * 5_000}\n", r"r\.yaml:2: rules must be a list, not a number of 20000 bits"),
        (HEAD + f"rules: [{{quantizer: a, format: 0x{'f' * 5_000}}}]\n", r"\.yaml:2: unknown format a number of 20000"),
        (HEAD + f"rules: [{{quantizer: a, enable: 0x{'f' * 5_000}}}]\n", r"\.yaml:2: .* not a number of 20000 bits"),
        (HEAD + "rules: !!int x\n", r"r\.yaml:2: not valid YAML: 'x' is no 'int' that can be read"),
        (HEAD + "rules: !!bool x\n", r"r\.yaml:2: not valid YAML: 'x' is no 'bool' that can be read"),
        (HEAD + "rules: !!timestamp x\n", r"r\.yaml:2: not valid YAML: 'x' is no 'timestamp' that can be read"),
        (HEAD + "? {a: b}\n: c\n", r"r\.yaml:2: not valid YAML: .*unhashable key"),
        (HEAD + f'rules: [{{quantizer: "{"{a,b}" * 40}", enable: false}}]\n', r"r\.yaml:2: .* more than 256 globs"),
        (HEAD + f'rules: [{{quantizer: "{"a" * 2_000}", enable: false}}]\n', r"r\.yaml:2: .*at most 1000 are allowed"),
        (HEAD + f'rules: [{{quantizer: a, module_class: "{"a" * 2_000}"}}]\n', r"r\.yaml:2: .*at most 1000 characters"),
        (HEAD + "rules:\n" + "- {quantizer: a, enable: false}\n" * 1_001, r"r\.yaml:1003: .*at most 1000 rules"),
        (HEAD + f"rules:\n{WIDE * 30}", r"r\.yaml:26: .*and 3000 globs when braces are unfolded"),
        (HEAD + "rules:\n" + "- import: fp8_attention\n" * 300, r"r\.yaml:203: .*a recipe has at most 200 imports"),
        (HEAD + '"\\e[2J\\x9b": 1\n' + RULES, r"r\.yaml:2: unknown key '\\x1b\[2J\\x9b' in the recipe"),
    ],
    ids=range(24),
)
def test_files(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=expected) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert len(str(caught.value)) < 1_000 and str(caught.value).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "override",
    [
        "metadata.notes=2026-13-45",
        "metadata.notes=" + "[" * 500,
        f"metadata.notes={'9' * 5_000}",
        f"rules[{'9' * 5_000}].why=x",
        "a" + ".a" * 2_000 + "=1",
        "x" * 100_000,
        "rules[+]=" + "{a: " * 50 + "}" * 50,
        "rules[why=!!bool x].why=x",
    ],
    ids=range(8),
)
def test_overrides(override: str) -> None:
    with pytest.raises(RecipeError, match=r"^--set ") as caught:
        load_recipe("fp8", [override])
    assert len(str(caught.value)) < 1_000


SECRETS = [
    "-----BEGIN OPENSSH PRIVATE KEY-----\nSECRETaaaa\nSECRETbbbb\n-----END OPENSSH PRIVATE KEY-----\n",
    "SECRETUSER:x:0:0:root:/root:/bin/bash\n",
    "password: SECRETvalue\nuser: SECRETuser\n",
    "- SECRETa\n- SECRETb\n",
    "password: *SECRET\n",
    "password: !SECRET x\n",
    "SECRET: 1\nSECRET: 2\n",
    "{SECRET, SECRET}\n",
    "'SECRET\n",
    '"SECRET\\SECRET"\n',
    "%SECRET\n",
    "description: SECRET #SECRET\n",
    "SECRET\ta: @SECRET\n",
    "metadata: {name: SECRET}\ntype: SECRET\n",
]


@pytest.mark.parametrize("content", SECRETS, ids=range(len(SECRETS)))
def test_an_import_shows_nothing_of_a_file_that_is_no_fragment(content: str, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text(content)
    (tmp_path / "r.yaml").write_text(HEAD + f"rules: [{{import: {tmp_path}/id_rsa}}]\n")
    with pytest.raises(RecipeError, match="id_rsa") as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "SECRET" not in str(caught.value)


def test_imports_that_double_are_read_once_and_counted(tmp_path: Path) -> None:
    for level in range(15):
        rules = f"- import: ./f{level + 1}.yaml\n" * 2 if level < 14 else RULES.removeprefix("rules: [")[:-2] + "\n"
        (tmp_path / f"f{level}.yaml").write_text(f"description: d\nrules:\n{rules.replace('{', '- {', 1)}")
    (tmp_path / "r.yaml").write_text(HEAD + "rules: [{import: ./f0.yaml}]\n")
    with pytest.raises(RecipeError, match=r"f\d+\.yaml:\d+: rules\[\d\]\.import: a recipe has at most 200 imports"):
        load_recipe(tmp_path / "r.yaml")
    (tmp_path / "few.yaml").write_text(HEAD + "rules: [{import: ./f9.yaml}]\n")
    assert len(load_recipe(tmp_path / "few.yaml").rules) == 2**5


@pytest.mark.parametrize(
    ("import_path", "expected"),
    [("/dev/zero", "there is no file"), ("./pipe", "there is no file"), (f"./{'n' * 300}.yaml", "there is no file")],
)
def test_imports_of_no_file(import_path: str, expected: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "r.yaml").write_text(HEAD + f"rules: [{{import: {import_path}}}]\n")
    with pytest.raises(RecipeError, match=expected):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(("name", "expected"), [("pipe", "it is no file"), ("a\0b", "null byte")])
def test_recipes_that_are_no_file(name: str, expected: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match=expected):
        load_recipe(str(tmp_path / f"{name}"))


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("{a,b}{c,d}", 4), ("{a,a}" * 60, 1), ("{{a,b},{c,d}}", 4), ("{,}" * 200, 1), ("a{", 1), ("{a,b}" * 8, 256)],
)
def test_alternatives_that_are_few(pattern: str, count: int) -> None:
    assert len(alternatives(pattern)) == count


@pytest.mark.parametrize(
    "pattern", ["{a,b}" * 9, "{a,b}" * 150, "{" + ",".join(map(str, range(300))) + "}", "a" * 1_001]
)
def test_alternatives_that_are_many(pattern: str) -> None:
    with pytest.raises(GlobError, match=r"unfold to more than|at most 1000 are allowed"):
        alternatives(pattern)
