"""`calibration:` as one step or a list: both load, are written again, and are told apart from what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from qcompile.errors import RecipeError
from qcompile.recipe import MaxSettings, Recipe, expanded_yaml, load_recipe, with_overrides

HEAD = "metadata: {name: r, description: d}\n"
RULES = 'rules:\n- {quantizer: "*.weight_quantizer", format: fp8}\n'
STEPS = {
    "": [("max", False)],
    "calibration: {power_of_two: true}\n": [("max", True)],
    "calibration:\n  algorithm: mse\n  candidates: 9\n": [("mse", False)],
    "calibration:\n- {algorithm: max, power_of_two: true}\n- {algorithm: mse, power_of_two: true, smallest: 0.25}\n": [
        ("max", True),
        ("mse", True),
    ],
    "calibration:\n- {}\n": [("max", False)],
}


def written(directory: Path, calibration: str) -> Path:
    path = directory / "r.yaml"
    path.write_text(HEAD + calibration + RULES, encoding="utf-8")
    return path


@pytest.mark.parametrize("calibration", STEPS)
def test_both_forms_load_and_are_written_again(tmp_path: Path, calibration: str) -> None:
    path = written(tmp_path, calibration)
    recipe = load_recipe(path)
    assert [(step.algorithm, step.power_of_two) for step in recipe.steps] == STEPS[calibration]
    again = tmp_path / "again.yaml"
    again.write_text(expanded_yaml(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe == load_recipe(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert Recipe.model_validate(recipe.model_dump(mode="json", exclude_unset=True)) == recipe
    assert recipe.power_of_two == any(power for _, power in STEPS[calibration])
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), Recipe.model_json_schema())


ONE, TWO = "calibration:\n  algorithm: ", "calibration:\n- algorithm: max\n- algorithm: "
WRONG = [
    (f"{ONE}mes\n", "3: unknown algorithm 'mes' at calibration.algorithm; known: max, mse, hessian_mse, gptq, percent"),
    (f"{TWO}maxx\n", "4: unknown algorithm 'maxx' at calibration[1].algorithm"),
    (f"{TWO}mse\n  candidate: 3\n", "5: unknown key 'candidate' in calibration[1]; did you mean 'candidates'?"),
    (f"{ONE}max\n  width: 3\n", "4: unknown key 'width' in calibration; known: algorithm, power_of_two"),
    (f"{ONE}mse\n  candidates: 1\n", "4: calibration.candidates"),
    (f"{TWO}mse\n  smallest: 0\n", "5: calibration[1].smallest"),
    (f"{TWO}mse\n  power_of_two: 'yes'\n", "5: calibration[1].power_of_two must be true or false"),
    ("calibration: []\n", "2: calibration has 0 items"),
    ("calibration: max\n", "2: calibration must be a mapping"),
    ("calibration:\n- max\n", "3: calibration[0] must be a mapping"),
]


@pytest.mark.parametrize(("calibration", "message"), WRONG)
def test_what_is_wrong_has_its_line(tmp_path: Path, calibration: str, message: str) -> None:
    with pytest.raises(RecipeError) as found:
        load_recipe(written(tmp_path, calibration))
    assert f"r.yaml:{message}" in str(found.value) and "<" not in str(found.value).replace("<=", "")


def test_overrides_reach_into_steps() -> None:
    recipe = load_recipe("fp8")
    assert [step.algorithm for step in with_overrides(recipe, ["calibration.algorithm=mse"]).steps] == ["mse"]
    other = with_overrides(load_recipe("nvfp4", ["calibration.power_of_two=true"]), ["calibration.algorithm=mse"]).steps
    assert other[0].model_dump(exclude_defaults=True) == {"algorithm": "mse", "power_of_two": True}
    steps = with_overrides(recipe, ["calibration=[{algorithm: max}, {algorithm: mse}]"])
    both = [f"calibration[{step}].power_of_two=true" for step in (0, 1)]
    changed = with_overrides(steps, ["calibration[algorithm=mse].candidates=5", *both])
    assert changed.steps[0] == MaxSettings(algorithm="max", power_of_two=True)
    assert changed.steps[1].model_dump()["candidates"] == 5
    added = with_overrides(steps, ["calibration[+]={algorithm: max}"])
    assert [step.algorithm for step in added.steps] == ["max", "mse", "max"]
    with pytest.raises(RecipeError, match=r"--set calibration\.algorithm=nothing: unknown algorithm 'nothing'"):
        with_overrides(recipe, ["calibration.algorithm=nothing"])


def test_reading_a_recipe_loads_no_algorithm() -> None:
    code = (
        "import sys, qcompile.recipe as r; r.load_recipe('nvfp4'); r.list_recipes();"
        "r.load_recipe('nvfp4', ['calibration=[{algorithm: svdquant}, {algorithm: gptq}]']);"
        "found = [m for m in sys.modules if m.startswith('qcompile.algorithms.')];"
        "assert found == ['qcompile.algorithms.settings'] and 'torch' not in sys.modules, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
