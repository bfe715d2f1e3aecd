"""Names of quantizers and the globs over them."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase, translate
from functools import lru_cache

from qcompile.errors import RecipeError
from qcompile.messages import value

WEIGHT = "weight_quantizer"
INPUT = "input_quantizer"
OUTPUT = "output_quantizer"
RESIDUAL = "residual_quantizer"
SOFTMAX = "softmax_bmm_quantizer"
ATTENTION = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer", SOFTMAX)
CACHES = ("k_cache_quantizer", "v_cache_quantizer")
MULTIPLIED_IN_ATTENTION = ((ATTENTION[0], ATTENTION[1]), (SOFTMAX, ATTENTION[2]))
"""The two products of an attention: of its queries and keys, and of its probabilities and values."""
MEANING = {
    INPUT: "input of a linear layer, of the experts that are one weight, or of a convolution",
    WEIGHT: "weight of a linear layer, of all experts, or of a convolution",
    OUTPUT: "result of a linear layer, of a convolution or of a norm",
    RESIDUAL: "what is added to the result of a convolution: the skip branch",
    ATTENTION[0]: "query of an attention",
    ATTENTION[1]: "keys of an attention; with the values, the key/value cache of a checkpoint",
    ATTENTION[2]: "values of an attention; with the keys, the key/value cache of a checkpoint",
    SOFTMAX: "softmax of an attention",
    CACHES[0]: "cache of the keys of an attention that generates: what it takes, appends to and gives back",
    CACHES[1]: "cache of the values",
}
"""The last component of every quantizer's name, and what that quantizes."""
KINDS = tuple(MEANING)

_BRACES = re.compile(r"\{([^{}]*)\}")


LONGEST_GLOB = 1_000
MOST_ALTERNATIVES, MOST_CHARACTERS = 256, 20_000  # of one glob; the shipped recipes have up to 12 and 900


@lru_cache(maxsize=4096)
def alternatives(pattern: str) -> tuple[str, ...]:
    """The globs that a pattern with braces stands for: `a.{b,c}.*` -> `a.b.*`, `a.c.*`.

    Raises:
        GlobError: they are too many, or the pattern is too long.
    """
    if len(pattern) > LONGEST_GLOB:
        raise GlobError(f"the glob {value(pattern)} has {len(pattern)} characters; at most {LONGEST_GLOB} are allowed")
    found: dict[str, None] = {}
    seen, left = {pattern}, [pattern]
    while left:
        glob = left.pop()
        braces = _BRACES.search(glob)  # the innermost pair, so that nested ones unfold, too
        if braces is None:
            found[glob] = None
        else:
            head, tail = glob[: braces.start()], glob[braces.end() :]
            unfolded = dict.fromkeys(head + option + tail for option in braces[1].split(","))
            left += [one for one in reversed(unfolded) if one not in seen]
            seen.update(unfolded)
        if len(left) + len(found) > MOST_ALTERNATIVES or sum(map(len, (*left, *found))) > MOST_CHARACTERS:
            most = f"{MOST_ALTERNATIVES} globs or {MOST_CHARACTERS} characters"
            raise GlobError(f"the braces of {value(pattern)} unfold to more than {most}")
    return tuple(found)


class GlobError(RecipeError):
    """A glob that unfolds to more than anybody wrote it for."""


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    """All alternatives in one: `fnmatch` keeps 256 patterns, and a recipe has more."""
    globs = alternatives(pattern)
    globs += tuple(glob[2:] for glob in globs if glob.startswith("*."))
    return re.compile("|".join(map(translate, globs)))


def glob_matches(name: str, pattern: str) -> bool:
    """Case-sensitive `fnmatch` of the full name, with `{a,b}` for either; a leading `*.` also matches at the start."""
    return _compiled(pattern).match(name) is not None


@lru_cache(maxsize=4096)
def possible_kinds(pattern: str) -> tuple[str, ...]:
    """The kinds of quantizer that a name matching the glob can end in; empty if it can match no quantizer at all."""
    reached = {kind for glob in alternatives(pattern) for kind in _kinds(glob)}
    return tuple(kind for kind in KINDS if kind in reached)


def _kinds(glob: str) -> list[str]:
    last = glob.rpartition("*")[2]
    tail = last.rpartition(".")[2]
    if "." in last or "*" not in glob:
        return [kind for kind in KINDS if fnmatchcase(kind, tail)]
    return [kind for kind in KINDS if fnmatchcase(f"path.{kind}", f"*{tail}")]
