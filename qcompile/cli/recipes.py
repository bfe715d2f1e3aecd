"""`qcompile recipes`: list, show and check what says which parts of a model are quantized."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import App, Parameter
from rich.syntax import Syntax
from rich.text import Text

from qcompile.cli.console import out
from qcompile.cli.options import UsageError
from qcompile.report.tables import add, table

_SET = Parameter(name="--set", consume_multiple=True, negative="", show_default=False)

recipes = App(
    name="recipes",
    help="""List, show and check recipes.

A recipe is YAML: rules, in order, that give quantizers a format (fp8, nvfp4, int8; linears also with a Hadamard
rotation) or switch them off; the last rule that matches wins.
`import: NAME` among the rules stands for those of a fragment, so that formats mix; what you want otherwise comes after.

A rule names quantizers by a glob: the path of a module and which of its quantizers. `*.mlp.*` has all of every mlp,
`*.[kv]_bmm_quantizer` keys and values, which are the key/value cache of a checkpoint; `qcompile recipes list` has all
kinds. `*layers.-1.*` is the last block of every stack called layers, `*layers.-[1-4].*` the last four.

Start your own from a shipped one:

    qcompile recipes show fp8 > mine.yaml
    qcompile recipes show nvfp4 --set 'rules[format=nvfp4].rotate=true' > rotated.yaml
    qcompile recipes check mine.yaml
    qcompile export ./model -o model.onnx --recipe mine.yaml --calibration data.safetensors
""",
)


@recipes.command(name="list")
def list_() -> int:
    """List the shipped recipes, the fragments that a recipe can import, and the quantizers that rules name."""
    from qcompile.recipe import fragment_description, list_fragments, list_recipes, load_recipe
    from qcompile.recipe.globs import MEANING

    found = table("Recipes", "name", "what it does", "for")
    for name in list_recipes():
        metadata = load_recipe(name).metadata
        add(found, name, metadata.description, ", ".join(metadata.targets))
    out().print(found)
    fragments = table("Fragments, for `- import: NAME` among the rules of a recipe", "name", "what it does")
    for name in list_fragments():
        add(fragments, name, fragment_description(name))
    out().print(fragments)
    quantizers = table("Quantizers, the last part of the names that globs match", "name", "what it quantizes")
    for kind, meaning in MEANING.items():
        add(quantizers, f"MODULE.{kind}", meaning)
    out().print(quantizers)
    return 0


@recipes.command
def show(
    name: str,
    /,
    *,
    expanded: Annotated[bool, Parameter(negative="")] = False,
    set_: Annotated[list[str], _SET] = [],  # noqa: B006
) -> int:
    """Print a recipe, or a fragment that recipes import, as YAML.

    ```
    qcompile recipes show fp8
    qcompile recipes show fp8 --expanded
    qcompile recipes show fp8 --set 'rules[+]={quantizer: "*layers.-1.*", enable: false}'
    ```

    What a rule can name: `qcompile recipes list` has the quantizers, `qcompile recipes check --schema` every key.

    Parameters
    ----------
    name:
        Name of a shipped recipe or fragment, or path of a YAML file.
    expanded:
        With the rules of the fragments in the place of their imports, each with the file and line that it is from.
    set_:
        Show it with this change, as path=value; expanded, too.
    """
    from qcompile.recipe import expanded_yaml, fragment_path, list_fragments, load_recipe, path_of

    if expanded or set_:
        text = expanded_yaml(load_recipe(name, set_))
    elif name in list_fragments():
        text = fragment_path(name).read_text(encoding="utf-8")
    else:
        load_recipe(name)  # it may be wrong
        text = path_of(name).read_text(encoding="utf-8-sig")
    console = out()
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default"), end="")
    else:
        print(text, end="")  # as it is: a console would wrap long lines
    return 0


@recipes.command
def check(
    file: str | None = None,
    /,
    *,
    schema: Annotated[bool, Parameter(negative="")] = False,
    set_: Annotated[list[str], _SET] = [],  # noqa: B006
) -> int:
    """Check a recipe without a model: its form, globs that can match nothing, rules that later ones override or undo.

    Exit code 1 if a rule has no effect on any model or is undone in part, 2 if the recipe is not valid or has layers
    whose weight and input no target multiplies.

    Parameters
    ----------
    file:
        YAML file, or name of a shipped recipe.
    schema:
        Print the JSON schema of recipes, for editors, instead.
    set_:
        Check it with this change, as path=value.
    """
    from qcompile.recipe import Recipe, check_recipe, load_recipe

    if schema:
        print(json.dumps(Recipe.model_json_schema(), indent=2))
        return 0
    if file is None:
        raise UsageError("name a recipe to check, or print the schema with --schema")
    recipe = load_recipe(file, set_)
    notices = check_recipe(recipe)
    for notice in notices:
        out().print(Text(str(notice)), soft_wrap=True)
    if not notices:
        out().print(Text(f"{recipe.metadata.name}: valid, {len(recipe.rules)} rules"))
    return 1 if notices else 0
