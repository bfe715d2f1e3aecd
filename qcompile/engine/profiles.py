"""Checks optimization profiles against a network's inputs, so that a mistake is named before the build starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from qcompile.engine.profile_dims import NAME, likely, with_shapes
from qcompile.errors import EngineError
from qcompile.remedy import meant, with_remedy

Shape = Sequence[int]
ShapeProfile = Mapping[str, tuple[Shape, Shape, Shape]]
# for some, the size of a dimension in the place of the shape of an input
Profile = Mapping[str, tuple[Shape, Shape, Shape] | tuple[int, int, int]]
# input name -> its dimensions: a size, or the name of a dynamic one
Inputs = Mapping[str, Sequence[int | str]]


def listed(profiles: Profile | Sequence[Profile] | None) -> list[Profile]:
    """The profiles as a list. Raises EngineError for what no file could make a profile."""
    found = [] if profiles is None else [profiles] if isinstance(profiles, Mapping) else profiles
    if not isinstance(found, list | tuple) or not all(isinstance(profile, Mapping) for profile in found):
        raise EngineError(f"profiles are {{input or dimension: (min, opt, max)}}, or a list of those, not {profiles!r}")
    for profile in found:
        for name, shapes in profile.items():
            parts = shapes if isinstance(shapes, list | tuple) else (None,)
            sizes = [size for part in parts for size in (part if isinstance(part, list | tuple) else (part,))]
            if not all(isinstance(size, int) for size in sizes):
                raise EngineError(
                    f"profile of {name!r}: (min, opt, max) are shapes of whole numbers, or sizes, not {shapes!r}"
                )
    return list(found)


def checked_profiles(
    profiles: Profile | Sequence[Profile] | None, inputs: Inputs, values: Mapping[str, int] = MappingProxyType({})
) -> list[ShapeProfile]:
    """The profiles as a list, each complete and consistent, by input.

    Args:
        profiles: {input: (min, opt, max)}, or {dimension: (min, opt, max)} for all inputs that have it, or a list of
            those.
        inputs: the network's inputs.
        values: those whose values other shapes depend on, and how many values each has; a profile gives them in the
            place of a shape.

    Raises:
        EngineError: names the input, what is wrong with its shapes, and for a missing one gives an example.
    """
    named = dict.fromkeys(name for d in inputs.values() for dim in d for name in NAME.findall(str(dim)))
    inputs = {name: [f"value {i}" for i in range(values[name])] if name in values else d for name, d in inputs.items()}
    found: list[ShapeProfile] = [with_shapes(profile, inputs) for profile in listed(profiles)]
    dynamic = {name: dims for name, dims in inputs.items() if any(isinstance(d, str) for d in dims)}
    if dynamic and not found:
        raise EngineError(_missing(dynamic, dynamic))
    for profile in found:
        if unknown := [name for name in profile if name not in inputs]:
            dimensions = f", and its dynamic dimensions {', '.join(named)}" if named else ""
            problem = EngineError(
                f"the profile names {unknown[0]!r}, but the file's inputs are {', '.join(inputs)}{dimensions}"
            )
            raise with_remedy(problem, meant(unknown[0], [*named, *inputs]))
        if missing := {name: dims for name, dims in dynamic.items() if name not in profile}:
            raise EngineError(_missing(missing, dynamic))
        for name, shapes in profile.items():
            _check_shapes(name, shapes, inputs[name])
    return found


def _check_shapes(name: str, shapes: tuple[Shape, Shape, Shape], dims: Sequence[int | str]) -> None:
    declared = "(" + ", ".join(map(str, dims)) + ")"
    if len(shapes) != 3 or any(isinstance(s, int) or len(s) != len(dims) for s in shapes):
        raise EngineError(
            f"profile of input {name!r}: three shapes (min, opt, max) of {len(dims)} sizes each are needed for "
            f"{declared}, not {shapes}"
        )
    for axis, (dim, low, best, high) in enumerate(zip(dims, *shapes, strict=True)):
        if isinstance(dim, int) and not low == best == high == dim:
            raise EngineError(f"profile of input {name!r}: axis {axis} is {dim} in the file, not {low}, {best}, {high}")
        if not 0 <= low <= best <= high:
            raise EngineError(
                f"profile of input {name!r}: axis {axis} needs min <= opt <= max, not {low}, {best}, {high}"
            )


def _missing(missing: Inputs, dynamic: Inputs) -> str:
    """What is missing, with an example that has a likely size for every dynamic dimension."""
    lines = [
        f"  {name}: ({', '.join(map(str, dims))}); dynamic: {', '.join(d for d in dims if isinstance(d, str))}"
        for name, dims in missing.items()
    ]
    return (
        "these inputs have dynamic dimensions, or values that are sizes, and need an optimization profile:\n"
        + "\n".join(lines)
        + f"\npass (min, opt, max) for each dimension or input, for example profiles={likely(dynamic)}"
    )
