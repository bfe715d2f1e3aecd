"""Names of quantizers and the globs over them."""

from __future__ import annotations

from fnmatch import fnmatchcase

WEIGHT = "weight_quantizer"
SOFTMAX = "softmax_bmm_quantizer"
ATTENTION = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer", SOFTMAX)
KINDS = ("input_quantizer", WEIGHT, "output_quantizer", *ATTENTION)
"""The last component of every quantizer's name."""


def glob_matches(name: str, pattern: str) -> bool:
    """Case-sensitive `fnmatch` of the full name, where a leading `*.` also matches at the start of the name."""
    return fnmatchcase(name, pattern) or (pattern.startswith("*.") and fnmatchcase(name, pattern[2:]))


def possible_kinds(pattern: str) -> tuple[str, ...]:
    """The kinds of quantizer that a name matching the glob can end in; empty if it can match no quantizer at all."""
    last = pattern.rpartition("*")[2]
    tail = last.rpartition(".")[2]
    if "." in last or "*" not in pattern:
        return tuple(kind for kind in KINDS if fnmatchcase(kind, tail))
    return tuple(kind for kind in KINDS if fnmatchcase(f"path.{kind}", f"*{tail}"))
