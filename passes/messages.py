"""Wording that errors and notices share, and values of files that may hold anything, as messages show them."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

__all__ = ["cut", "some", "value", "visible"]

LONGEST_VALUE = 120
LONGEST_MESSAGE = 4_000


class _Short(reprlib.Repr):
    """`repr` that looks at a few parts of a few levels: aliases of YAML make a tree of a billion parts in 400 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 8, 8, 8
        self.maxstring = self.maxother = self.maxlong = LONGEST_VALUE

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 1_000:  # Python writes none of more than 4,300 digits
            return f"a number of {x.bit_length()} bits"
        return super().repr_int(x, level)

    def repr_dict(self, x: dict[object, object], level: int) -> str:
        """In the order of the file: `reprlib` sorts."""
        if level <= 0:
            return "{...}"
        shown = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in list(x.items())[: self.maxdict]]
        return f"{{{', '.join([*shown, *(['...'] if len(x) > self.maxdict else [])])}}}"


_SHORT = _Short()


def value(found: object) -> str:
    """What a file or a caller holds, as `repr` has it, cut to one readable length."""
    return cut(_SHORT.repr(found))


def cut(text: str, longest: int = LONGEST_VALUE) -> str:
    """`text`, with its middle left out where it is too long."""
    if len(text) <= longest:
        return text
    end = longest // 4
    return f"{text[: longest - end - 3]}...{text[-end:]}"


def visible(text: str) -> str:
    """`text` with control characters as escapes: names in files may hold what terminals obey. Lines stay lines."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def some(names: Sequence[object]) -> str:
    """The first few of `names`, and how many more there are."""
    shown = ", ".join(cut(str(name), 200) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
