"""The command that would have worked, made of the one that did not and what its error knows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from qcompile.errors import QCompileError
from qcompile.remedy import Remedy, remedy_of

_FILE = re.compile(r"\.ya?ml$")


def better_command(tokens: Sequence[str], error: QCompileError) -> str | None:
    """`tokens` are the arguments that were given. None where the error names no way out."""
    remedy = remedy_of(error)
    changed = _corrected(tokens, remedy)
    for option, values in remedy.options.items():
        changed = _with_option(changed, option, values)
    first = [remedy.first] if remedy.first else [*_corrections(tokens, remedy)]
    if not first and changed == list(tokens):
        return None
    return " && ".join([*first, shlex.join(["qcompile", *changed])])


def _corrected(tokens: Sequence[str], remedy: Remedy) -> list[str]:
    result = list(tokens)
    for wrong, right in remedy.typos.items():
        result = [re.sub(rf"(?<!\w){re.escape(wrong)}(?!\w)", right, token) for token in result]
    return result


def _corrections(tokens: Sequence[str], remedy: Remedy) -> list[str]:
    """A command for each word that stands in a recipe's file and not among the arguments."""
    files = [token for token in tokens if _FILE.search(token)]
    words = [(wrong, right) for wrong, right in remedy.typos.items() if _corrected(tokens, remedy) == list(tokens)]
    return [f"sed -i 's/\\b{wrong}\\b/{right}/' {shlex.quote(files[0])}" for wrong, right in words if files]


def _with_option(tokens: Sequence[str], option: str, values: Sequence[str]) -> list[str]:
    """`tokens` with the option at its place, or at the end; what it had for values is taken out."""
    result: list[str] = []
    place, inside = None, False
    for token in tokens:
        if token == option or token.startswith(f"{option}="):
            place, inside = len(result) if place is None else place, token == option
        elif not inside or token.startswith("-"):
            inside = False
            result.append(token)
    place = len(result) if place is None else place
    return [*result[:place], option, *values, *result[place:]]
