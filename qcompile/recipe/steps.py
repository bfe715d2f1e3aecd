"""`calibration:` of a recipe: one step, or a list of steps, each an algorithm with its settings.

A recipe that names no algorithms but those of `LIGHT` is read without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, get_args

from pydantic import Discriminator, Field, Tag

from qcompile.algorithms import ALGORITHMS, algorithm_called, find_installed
from qcompile.algorithms.settings import LIGHT, MaxSettings, Settings
from qcompile.errors import AlgorithmError

ONE_TAG, LIST_TAG = "<step>", "<steps>"


def settings_of(name: str) -> type[Settings]:
    """The model of the settings of an algorithm.

    Raises:
        AlgorithmError: it has none, or they are those of another name.
    """
    if name in LIGHT and str(ALGORITHMS[name]).startswith("qcompile.algorithms."):  # not replaced by another's
        return LIGHT[name]
    found = algorithm_called(name)
    model = getattr(found, "model", None)
    if not isinstance(model, type) or not issubclass(model, Settings):
        raise AlgorithmError(f"the algorithm {name}: {found.__name__}.model is to be the class of its Settings")
    says = get_args(model.model_fields["algorithm"].annotation)
    if says != (name,):
        said = f"Literal[{', '.join(map(repr, says))}]" if says else "no Literal"
        raise AlgorithmError(
            f'the algorithm {name}: `algorithm` of {model.__name__} is {said}, and has to be Literal["{name}"]'
        )
    return model


def tag_of(name: str) -> str:
    """What pydantic puts into the path of an error in the settings of an algorithm."""
    return f"<{name}>"


def is_tag(part: object) -> bool:
    """Whether a part of the path of an error is one of those that are not in the file."""
    return part in (ONE_TAG, LIST_TAG, *map(tag_of, ALGORITHMS))


def model_in(path: Iterable[object]) -> type[Settings]:
    """The settings that an error with such a path is about."""
    parts = list(path)
    return next((settings_of(name) for name in ALGORITHMS if tag_of(name) in parts), MaxSettings)


def asked(calibration: object) -> tuple[str, ...]:
    """The algorithms that what somebody wrote names, as far as they are known; `max` is always among them."""
    steps = calibration if isinstance(calibration, (list, tuple)) else [calibration]
    names = [step.get("algorithm") for step in steps if isinstance(step, Mapping)]
    if any(isinstance(name, str) and name not in ALGORITHMS for name in names):
        find_installed()
    return ("max", *sorted({name for name in names if isinstance(name, str) and name in ALGORITHMS} - {"max"}))


def calibration_type(models: Sequence[tuple[str, type[Settings]]]) -> Any:
    """The type of `calibration:` where these algorithms, `max` first, can be named."""
    known = {name for name, _ in models}

    def tag(item: object) -> str:
        name = item.get("algorithm") if isinstance(item, Mapping) else getattr(item, "algorithm", None)
        return tag_of(name if isinstance(name, str) and name in known else "max")  # whose error lists what is known

    step: Any = models[0][1]
    if models[1:]:
        choices = [Annotated[model, Tag(tag_of(name))] for name, model in models]
        step = Annotated[reduce(or_, choices), Discriminator(tag)]
    steps = Annotated[tuple[step, ...], Field(strict=False, min_length=1)]
    is_list = Discriminator(lambda value: LIST_TAG if isinstance(value, (list, tuple)) else ONE_TAG)
    return Annotated[Annotated[step, Tag(ONE_TAG)] | Annotated[steps, Tag(LIST_TAG)], is_list]
