"""What a limit of a server is, and the layers of a checkpoint that limits are about; `servers.py` has the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from passes.formats import NVFP4
from passes.groups import expert_container, served_with
from qcompile.checkpoint.formats.base import Contents
from qcompile.messages import some
from qcompile.schemes.scheme import Scheme

Layers = Callable[[Contents], list[str]]
"""The layers of a checkpoint that a limit is about, none if it does not apply."""


@dataclass(frozen=True)
class Limit:
    """One thing that a server does not load.

    Attributes:
        server: with the version that it was seen with.
        formats: of checkpoints.
        what: is not loaded, in words.
        effect: what the server does instead.
        instead: what to write for it.
        layers: those of a checkpoint that this is about, none if it does not apply.
    """

    server: str
    formats: tuple[str, ...]
    what: str
    effect: str
    instead: str
    layers: Layers

    def notice(self, names: list[str]) -> str:
        """What a report says of the layers called `names`."""
        return f"{some(names)}: {self.server} {self.effect} ({self.what}); {self.instead}"


def of_scheme(*schemes: Scheme) -> Layers:
    """The layers that have one of `schemes`."""
    return lambda contents: [name for name, scheme in contents.schemes.items() if scheme in schemes]


def nvfp4(contents: Contents) -> list[str]:
    return [name for name, scheme in contents.schemes.items() if scheme.weight == NVFP4]


def not_nvfp4(contents: Contents) -> list[str]:
    """FP8 and INT8: INT4, MXFP8 and MXFP4 were tried with no server that these limits are of."""
    return [name for name, scheme in contents.schemes.items() if scheme.weight.family in ("fp8", "int8")]


def experts(layers: Layers) -> Layers:
    """Those of `layers` that are experts of a mixture."""
    return lambda contents: [name for name in layers(contents) if expert_container(name)]


def no_experts(layers: Layers) -> Layers:
    """Those of `layers` that are not experts of a mixture."""
    return lambda contents: [name for name in layers(contents) if not expert_container(name)]


def floating(contents: Contents) -> list[str]:
    return list(contents.unquantized)


def nvfp4_or_floating(contents: Contents) -> list[str]:
    return [*nvfp4(contents), *floating(contents)]


def dense(contents: Contents) -> list[str]:
    """All quantized layers of a model without experts."""
    return [] if any(map(expert_container, contents.schemes)) else list(contents.schemes)


def mixed_dense(contents: Contents) -> list[str]:
    """The layers of a model without experts, if those that servers merge do not all have one scheme."""
    loose = any(map(served_with, contents.unquantized))
    return dense(contents) if loose or len(set(contents.schemes.values())) > 1 else []


def without_nvfp4(contents: Contents) -> list[str]:
    """All quantized layers, if none is in NVFP4."""
    return [] if nvfp4(contents) else list(contents.schemes)


def several(layers: Layers) -> Layers:
    """`layers` of a checkpoint with several schemes."""
    return lambda contents: layers(contents) if len(set(contents.schemes.values())) > 1 else []


def mostly(layers: Layers, *, fp4: bool) -> Layers:
    """`layers` of a checkpoint whose most frequent scheme is NVFP4 or, without `fp4`, is not.

    As the formats modelopt list them: the experts of a layer are one entry, and the first of equally many wins.
    """

    def found(contents: Contents) -> list[str]:
        entries = {expert_container(name) or name: scheme for name, scheme in contents.schemes.items()}
        most = [scheme.weight == NVFP4 for scheme, _ in Counter(entries.values()).most_common(1)]
        return layers(contents) if most == [fp4] else []

    return found
