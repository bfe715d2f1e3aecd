"""What a recipe file may say: pydantic models, and the JSON schema that editors use.

A file is a `RecipeFile` or a `Fragment`, whose rules may import other fragments; a `Recipe` is what all of that comes
to. The schema carries more formats and granularities than are multiplied (MXFP8, blocks of any size);
`match.unsupported` tells what this version cannot run yet. Nothing here reads a file or knows a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    SerializeAsAny,
    Tag,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from qcompile.algorithms import ALGORITHMS, find_installed
from qcompile.algorithms.settings import MaxSettings, Settings
from qcompile.recipe.rule import Location, Rule, wrong
from qcompile.recipe.steps import asked, calibration_type, settings_of
from qcompile.schemes.strict import Strict


class Metadata(Strict):
    """What the recipe is called and what it does."""

    name: Annotated[str, Field(min_length=1)]
    """The name that reports show."""
    description: Annotated[str, Field(min_length=1)]
    """One or two sentences: what is quantized, to what, and what is left out."""
    targets: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Where it is known to run fast, for the reader: `sm89`, `sm120`, `portable`. Nothing depends on it."""
    notes: str | None = None
    """Anything else the reader should know."""


class Import(Strict):
    """The rules of a fragment, in this place."""

    name: Annotated[str, Field(min_length=1, alias="import")]
    """A shipped fragment, or the path of a YAML file, relative to the file that says so."""


def _tag(item: object) -> str:
    is_import = isinstance(item, Import) or (isinstance(item, Mapping) and "import" in item)
    return IMPORT_TAG if is_import else RULE_TAG


RULE_TAG, IMPORT_TAG = "<rule>", "<import>"
"""What pydantic puts into the path of an error after the index of a rule."""

_Items = Annotated[
    tuple[
        Annotated[Annotated[Rule, Tag(RULE_TAG)] | Annotated[Import, Tag(IMPORT_TAG)], Discriminator(_tag)],
        ...,
    ],
    Field(strict=False, min_length=1),
]


class Fragment(Strict):
    """Rules that recipes import by name."""

    description: Annotated[str, Field(min_length=1)]
    """What the rules are for."""
    rules: _Items
    """Rules and imports in order; later ones win."""


class _Header(Strict):
    metadata: Metadata
    """What the recipe is called and what it does."""
    calibration: SerializeAsAny[Settings] | tuple[SerializeAsAny[Settings], ...] = MaxSettings()
    """How scales are found: an algorithm with its settings, or a list of them, each of which sees what those before it
    chose."""

    convolutions: Literal["all", "where_it_pays", "none"] = "all"
    """Which of the convolutions that the rules name are quantized: `where_it_pays`, which shipped recipes have, leaves
    those to half precision whose arithmetic, by the roofline of a GPU, saves less than the kernels around them cost,
    and those that add more than one kernel each. The report has the numbers."""

    @property
    def steps(self) -> tuple[Settings, ...]:
        """The algorithms of `calibration`, in order."""
        return self.calibration if isinstance(self.calibration, tuple) else (self.calibration,)

    @property
    def power_of_two(self) -> bool:
        """Whether constant scales are rounded up to a power of two; all steps agree in it."""
        return self.steps[0].power_of_two

    @model_validator(mode="after")
    def _steps_agree(self) -> Self:
        if len({step.power_of_two for step in self.steps}) > 1:  # a saved range does not tell which of them chose it
            raise wrong(("calibration",), "`power_of_two` is for all steps or for none: say it in each")
        return self


class RecipeFile(_Header):
    """Which quantizers of a model are on and in which format."""

    rules: _Items
    """Rules and imports (`import: exclusions`) in order; later ones win."""


def recipe_file(names: Iterable[str]) -> type[RecipeFile]:
    """`RecipeFile` with the settings of these algorithms in their place."""
    return _recipe_file(tuple((name, settings_of(name)) for name in names))


@lru_cache(maxsize=64)
def _recipe_file(models: tuple[tuple[str, type[Settings]], ...]) -> type[RecipeFile]:
    described = _Header.model_fields["calibration"].description
    calibration: Any = (calibration_type(models), Field(MaxSettings(), description=described))
    return create_model("RecipeFile", __base__=RecipeFile, __doc__=RecipeFile.__doc__, calibration=calibration)


class Recipe(_Header):
    """A recipe whose imports are resolved. `Recipe.model_json_schema()` describes what a file may say."""

    rules: Annotated[tuple[Rule, ...], Field(strict=False, min_length=1)]
    """Rules in order; later ones win."""

    @field_validator("calibration", mode="before")
    @classmethod
    def _typed(cls, value: Any) -> Any:
        """Each step in the model of its algorithm, where no file has been read with it."""
        return tuple(map(_settings, value)) if isinstance(value, (list, tuple)) else _settings(value)

    @model_validator(mode="after")
    def _enable_follows_format(self) -> Recipe:
        index = idle_switch(self.rules)
        if index is not None:
            raise wrong(("rules", index, "enable"), IDLE_SWITCH)
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        find_installed()
        return handler(recipe_file(ALGORITHMS).__pydantic_core_schema__)

    def located(self, places: Sequence[Location]) -> Recipe:
        """The same recipe whose rule i says that it was written at `places[i]`."""
        rules = tuple(rule.located(place) for rule, place in zip(self.rules, places, strict=True))
        return self.model_copy(update={"rules": rules})


IDLE_SWITCH = "`enable: true` needs an earlier rule that gives a format"


def idle_switch(rules: Sequence[Rule]) -> int | None:
    """Index of an `enable: true` before which no rule gives a format."""
    for index, rule in enumerate(rules):
        if rule.format is not None:
            break
        if rule.enable:
            return index
    return None


def _settings(step: Any) -> Any:
    return settings_of(asked(step)[-1]).model_validate(step) if isinstance(step, Mapping) else step
