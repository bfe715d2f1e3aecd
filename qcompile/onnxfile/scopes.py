"""The module path that torch's exporter leaves on a node: a list literal from the outermost module to the FX node."""

from __future__ import annotations

import ast
import re

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
_LONGEST = 20_000
_STRING = r"""(?:'(?:[^'\\]|\\['"\\xuU])*+'|"(?:[^"\\]|\\['"\\xuU])*+")"""
_LIST = re.compile(rf"\[\s*+(?:{_STRING}\s*+(?:,\s*+{_STRING}\s*+)*+)?\]")


def read_scopes(text: str) -> list[str] | None:
    """The names in the exporter's list of scopes, None for what is no flat list of strings that can be shown.

    Anyone may have written the text, and Python's own reader of literals warns of, or dies of, some that match less.
    """
    if len(text) > _LONGEST or not text.isprintable() or not _LIST.fullmatch(text):
        return None
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # an escape that is none
        return None
    return names if all(name.isprintable() for name in names) else None
