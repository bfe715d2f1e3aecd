"""What `cache=` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qcompile.errors import CaptureError

Kind = Literal["dynamic", "static"]
Logits = Literal["all", "last"]


@dataclass(frozen=True)
class Cache:
    """How a decoder keeps keys and values.

    Attributes:
        kind: `dynamic`: what is new is appended to what is given (`past`), as transformers' DynamicCache does.
            `static`: it is written at its positions into a buffer of `length`, which is given and given back.
        length: of a static cache, in tokens.
        logits: of `all` new tokens, or of the `last` one alone, which is all that generation reads.
    """

    kind: Kind = "dynamic"
    length: int | None = None
    logits: Logits = "all"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise CaptureError(f"unknown kind of cache {self.kind!r}; known: {', '.join(get_args(Kind))}")
        if self.logits not in get_args(Logits):
            raise CaptureError(f"unknown logits {self.logits!r}; known: {', '.join(get_args(Logits))}")
        if self.length is not None and (isinstance(self.length, bool) or not isinstance(self.length, int)):
            raise CaptureError(f"the length of a cache is a number of tokens, not {self.length!r}")
        if (self.kind == "static") != (self.length is not None):
            raise CaptureError(
                "a static cache has a length: Cache('static', length=2048)"
                if self.kind == "static"
                else "a dynamic cache has no length: it is as long as what was appended"
            )
        if self.length is not None and self.length < 2:
            raise CaptureError(f"a cache of length {self.length} holds no past: it is 2 tokens or more")


def as_cache(cache: Kind | Cache | str) -> Cache:
    """`cache` as options. Raises CaptureError for what is none."""
    if isinstance(cache, Cache):
        return cache
    if not isinstance(cache, str):
        raise CaptureError(f'cache is "dynamic", "static" or a qcompile.Cache, not {cache!r}')
    return Cache(cache)  # type: ignore[arg-type]
