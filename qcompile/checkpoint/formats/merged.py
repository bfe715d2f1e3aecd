"""What servers load as one layer has to be quantized in one way: q, k and v; gate and up; the experts of a mixture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from passes.groups import expert_container, parent_of, served_with
from qcompile.checkpoint.formats.base import Contents
from qcompile.errors import CheckpointError
from qcompile.messages import some
from qcompile.schemes.scheme import Scheme


def describe(scheme: Scheme | None) -> str:
    """`fp8 weight per channel, fp8_per_token input`."""
    if scheme is None:
        return "floating point"
    per = " per channel" if scheme.per_channel else ""
    beside = " beside a low-rank part" if scheme.low_rank else ""
    return (
        f"{scheme.weight.name} weight{per}{beside}, {f'{scheme.input.name} input' if scheme.input else 'weight-only'}"
    )


def check_contents(
    format_name: str,
    contents: Contents,
    shapes: Mapping[str, tuple[int, int]],
    refusal: Callable[[Scheme, tuple[int, int]], str | None],
) -> None:
    """Everything that a format refuses, in one error.

    Args:
        refusal: of one layer; says why and what to use instead.

    Raises:
        CheckpointError: with each reason once, and the layers it holds for.
    """
    if not contents.schemes:
        raise CheckpointError(f"format {format_name}: no linear layer of the model is quantized, nothing to write")
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, scheme in contents.schemes.items():
        if reason := refusal(scheme, shapes[name]) or _packed(scheme, shapes[name]):
            reasons[reason].append(name)
    problems = [f"{some(names)}: {reason}" for reason, names in reasons.items()]
    problems += _unequal(contents) + _tied(contents)
    if problems:
        raise CheckpointError(f"format {format_name} cannot hold this model:\n  " + "\n  ".join(problems))


def _packed(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    block = scheme.weight.sizes[-1] if scheme.weight.whole_blocks else 1
    if shape[1] % block:
        return f"{scheme.weight.name} needs K divisible by {block}, it is {shape[1]}; leave the layer out of the recipe"
    return None


def _unequal(contents: Contents) -> list[str]:
    """Groups that servers merge, but whose members are quantized in different ways."""
    groups: dict[str, dict[str, Scheme | None]] = defaultdict(dict)
    schemes: Iterable[tuple[str, Scheme | None]] = contents.schemes.items()
    for name, scheme in [*((name, None) for name in contents.unquantized), *schemes]:
        if container := expert_container(name):
            groups[container][name] = scheme
        elif together := served_with(name):
            groups[f"{parent_of(name)}.{'/'.join(together)}"][name] = scheme
    problems = []
    for group, members in groups.items():
        found: dict[Scheme | None, list[str]] = defaultdict(list)
        for name, scheme in members.items():
            found[scheme].append(name)
        if len(found) > 1:
            ways = "; ".join(f"{some(names)}: {describe(scheme)}" for scheme, names in found.items())
            problems.append(
                f"{group}: servers run these layers as one, so all need the same scheme, but there is {ways}; "
                "give them one rule in the recipe"
            )
    return problems


def _tied(contents: Contents) -> list[str]:
    return [
        f"{dropped}: it shares the weight of {kept}, but one is {describe(contents.schemes.get(dropped))} and the "
        f"other {describe(contents.schemes.get(kept))}; leave {dropped} out of the recipe"
        for dropped, kept in contents.tied.items()
        if contents.schemes.get(dropped) != contents.schemes.get(kept)
    ]
