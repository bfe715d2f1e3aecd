"""What pydantic found wrong with data that somebody else may have made, in a line."""

from __future__ import annotations

from pydantic import ValidationError

from qcompile.messages import cut


def reason(error: ValidationError) -> str:
    """The first thing that is wrong, with its place in the data, and how many more there are."""
    first, *more = error.errors(include_url=False, include_context=False, include_input=False)
    place = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    told = f"{place}: {message}" if place else message
    return cut(told, 300) + (f", and {len(more)} more" if more else "")
