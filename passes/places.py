"""Where a pass goes: pipelines that take others at a named place, and passes of a user on their way there.

>>> NORMALIZE.after("NormalizeLinear", MyPass)
>>> qcompile.quantize(model, args, passes=[after("fuse", MyPass), before(FoldWeights, partial(Other, 3))])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from passes.errors import PassError

__all__ = ["OwnPasses", "Pipeline", "Placed", "after", "before", "class_of", "stage_of"]

Make = Callable[[], Any]
Place = str | type
OWN = "own"


class Pipeline(tuple[Make, ...]):
    """Passes in their order: classes, or partials of those that take arguments. It is a tuple of what it is made of."""

    def __new__(cls, *passes: Make) -> Pipeline:
        return super().__new__(cls, passes)

    def after(self, place: Place, *passes: Make) -> Pipeline:
        """With `passes` behind the last pass of `place`: a stage ("fuse"), or the name or class of a pass.

        Raises:
            PassError: nothing here is of that place; it lists the places that there are.
        """
        return _inserted(self, Placed("after", place, passes))

    def before(self, place: Place, *passes: Make) -> Pipeline:
        """With `passes` in front of the first pass of `place`, as of `after`."""
        return _inserted(self, Placed("before", place, passes))


@dataclass(frozen=True)
class Placed:
    """Passes and where they go, as `after` and `before` make it."""

    side: Literal["after", "before"]
    place: Place
    passes: tuple[Make, ...]

    def __str__(self) -> str:
        name = self.place if isinstance(self.place, str) else self.place.__name__
        return f"{self.side}({name!r}, {', '.join(class_of(make).__name__ for make in self.passes)})"


def after(place: Place, *passes: Make) -> Placed:
    """`passes` behind the last pass of `place`: a stage ("fuse"), or the name or class of a pass."""
    return Placed("after", place, passes)


def before(place: Place, *passes: Make) -> Placed:
    """`passes` in front of the first pass of `place`, as of `after`."""
    return Placed("before", place, passes)


class OwnPasses:
    """The passes of a user for one run through some pipelines: each goes into the first that has its place."""

    def __init__(self, placed: Iterable[Placed] | None = None, known: Sequence[Make] | None = None) -> None:
        """`known` has all passes that the run can have: a place that is none of theirs is an error now.

        Raises:
            PassError: such a place, or something that `after` and `before` did not make.
        """
        self.waiting = list(placed or ())
        for one in self.waiting:
            if not isinstance(one, Placed):
                raise PassError(
                    f"passes= takes what passes.after and passes.before make, not {one!r}: say where it goes"
                )
            for make in one.passes:
                class_of(make)
            if known is not None and not _has(known, one.place):
                raise _unknown(known, one)

    def into(self, pipeline: Iterable[Make]) -> tuple[Make, ...]:
        """`pipeline` with those that have a place in it. What they require and ensure is checked."""
        passes = tuple(pipeline)
        for one in [one for one in self.waiting if _has(passes, one.place)]:
            self.waiting.remove(one)
            passes = _inserted(
                passes, Placed(one.side, one.place, tuple(partial(_checked, make) for make in one.passes))
            )
        return passes

    def check_placed(self) -> None:
        """Raises PassError if one of them had no place in any of the pipelines that ran."""
        if self.waiting:
            raise PassError(f"{', '.join(map(str, self.waiting))}: no pipeline of this run had that place")


def class_of(make: Make) -> type:
    """The class of the pass that `make`, a class or a partial of one, makes.

    Raises:
        PassError: it is neither.
    """
    while isinstance(make, partial):
        make = make.args[0] if make.func is _checked else make.func
    if not isinstance(make, type):
        raise PassError(f"{make!r} is no pass: give a subclass of passes.Pass, or a functools.partial of one")
    return make


def stage_of(made: type) -> str:
    """The stage of a class of passes: the folder of `passes` that it is in; "own" for one of somebody else."""
    package, *folders = made.__module__.split(".")
    return folders[0] if package == "passes" and len(folders) > 1 else OWN


def _checked(make: Make) -> Any:
    made = make()
    made.is_checked = True
    return made


def _positions(passes: Sequence[Make], place: Place) -> Iterator[int]:
    for index, make in enumerate(passes):
        made = class_of(make)
        if made is place or (isinstance(place, str) and place in (made.__name__, stage_of(made))):
            yield index


def _has(passes: Sequence[Make], place: Place) -> bool:
    return next(_positions(passes, place), None) is not None


def _inserted(passes: Sequence[Make], placed: Placed) -> Pipeline:
    found = list(_positions(passes, placed.place))
    if not found:
        raise _unknown(passes, placed)
    index = found[0] if placed.side == "before" else found[-1] + 1
    while placed.side == "after" and index < len(passes) and stage_of(class_of(passes[index])) == OWN:
        index += 1  # behind those that were put there before
    return Pipeline(*passes[:index], *placed.passes, *passes[index:])


def _unknown(passes: Sequence[Make], placed: Placed) -> PassError:
    classes = [class_of(make) for make in passes]
    stages, names = (dict.fromkeys(found) for found in (map(stage_of, classes), (made.__name__ for made in classes)))
    return PassError(f"{placed}: no such place here; stages: {', '.join(stages)}; passes: {', '.join(names)}")
