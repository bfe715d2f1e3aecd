"""The JSON of a saved program: torch makes calls and Python code of what it names, so each name is looked at."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from qcompile.source.pt2.expressions import check_guard, check_size

# of torch.nn.Module, which takes any name without a dot for a part; torch puts them between quotes
_PATH = re.compile(r"[^'\"\\\x00-\x1f\x7f-\x9f\u2028\u2029]*")
_OPERATOR = re.compile(r"torch\.ops\.[A-Za-z]\w*\.[A-Za-z_]\w*(\.\w+)?")
_OPERATORS = (torch._ops.OpOverload, torch._ops.HigherOrderOperator)
_ARITHMETIC = {
    *("eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv", "mod", "pow", "truediv"),
    *("and_", "or_", "not_", "lshift", "rshift", "getitem", "abs"),
}
_FUNCTION = re.compile(r"math\.[a-z][a-z0-9]*|torch\.(_?sym_[a-z]+|_functorch\.predispatch\._[a-z_]+)")
_OF_FILES = re.compile(r"file|path")  # text arguments of operators that read or make them
# names of values to what is known of them: a value may be called as a field is
_BY_NAME = ("tensor_values", "sym_int_values", "sym_float_values", "sym_bool_values", "custom_obj_values")
_MAPS = {
    *_BY_NAME,
    "as_string_to_argument",
    "range_constraints",
    "opset_version",
    "metadata",
    "treespec_namedtuple_fields",
}
_PLAIN_FACTORIES = ("bool", "dict", "float", "int", "list", "set", "str", "tuple")  # of collections.defaultdict


def check_graph(program: Any) -> None:
    """Refuse a program that is more than operators, names and sizes. Raises ValueError with the part, and why.

    Args:
        program: content of `models/model.json`.
    """
    if not isinstance(program, dict):
        raise ValueError("no program")
    ranges = program.get("range_constraints", {})
    if not isinstance(ranges, dict):
        raise ValueError(f"the sizes {str(ranges)[:80]!r}")
    for size in ranges:
        _CHECKS["expr_str"](size)
    for key, value in _strings(program):
        if (check := _CHECKS.get(key)) is not None:
            check(value)


def check_paths(paths: Mapping[str, Any]) -> None:
    """Refuse names of weights that are none. Raises ValueError."""
    for path in paths:
        _check_path(path)


def _strings(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, or with each value of its list."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "metadata" and isinstance(value, dict) and "custom" in value:
                yield "custom", value["custom"]
            if key in _MAPS and isinstance(value, dict):
                yield from _strings(list(value.values()))
                continue
            if isinstance(value, list) and key in _CHECKS:
                yield from ((key, part) for part in value)
            elif not isinstance(value, dict) or key in _CHECKS:
                yield key, value
            yield from _strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value)


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} {str(value)[:80]!r}")
    return value


def _check_name(name: Any) -> None:
    """Of a value: a variable of the code that torch makes. Positional arguments have an empty one."""
    if name is not None and name != "" and not _text("the name", name).isidentifier():
        raise ValueError(f"the name {name[:80]!r}")


def _check_path(path: Any) -> None:
    if not _PATH.fullmatch(_text("the name", path)):
        raise ValueError(f"the name {path[:80]!r}")


def _check_operator(target: Any) -> None:
    text = _text("the operator", target)
    if _FUNCTION.fullmatch(text) or (text.startswith("_operator.") and text[10:] in _ARITHMETIC):
        return
    if not _OPERATOR.fullmatch(text):
        raise ValueError(f"a call of {text[:80]!r}")
    found: Any = torch.ops
    for part in text.split(".")[2:]:
        if (found := getattr(found, part, None)) is None:
            return  # not registered here: torch says so
    if not isinstance(found, _OPERATORS) or _reads_files(text, found):
        raise ValueError(f"a call of {text[:80]!r}")


def _reads_files(text: str, operator: Any) -> bool:
    arguments = operator._schema.arguments if isinstance(operator, torch._ops.OpOverload) else ()
    named = [argument.name for argument in arguments if str(argument.type) in ("str", "Optional[str]")]
    return text.startswith("torch.ops.debugprims.") or any(map(_OF_FILES.search, named))


def _checked(check: Callable[[str], None], what: str) -> Callable[[Any], None]:
    def run(text: Any) -> None:
        try:
            check(_text(what, text))
        except ValueError as error:
            raise ValueError(f"{what} {str(error)!r}") from None

    return run


def _check_tree(text: Any) -> None:
    """Of arguments or results: nested containers that are known here, with keys."""
    version, tree = _list_of_two(_json(text))
    if version != 1:
        raise ValueError(f"a structure of version {str(version)[:80]!r}")
    _check_node(tree)


def _check_arguments(text: Any) -> None:
    _check_tree(text)
    _, keywords = _list_of_two(_json(text)[1]["children_spec"])
    for name in _json(keywords.get("context")) or ():
        _check_name(_text("the keyword", name))


def _check_notes(text: Any) -> None:
    """Of a node, which passes add theirs to: text of a JSON object."""
    try:
        notes = json.loads(_text("the notes", text))
    except (ValueError, RecursionError):
        notes = None
    if not isinstance(notes, dict):
        raise ValueError(f"the notes {str(text)[:80]!r}")


def _json(text: Any) -> Any:
    try:
        return json.loads(_text("the structure", text))
    except ValueError:
        raise ValueError(f"the structure {str(text)[:80]!r}") from None


def _list_of_two(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"the structure {str(value)[:80]!r}")
    return value[0], value[1]


def _check_node(node: Any) -> None:
    if not isinstance(node, dict) or not isinstance(node.get("children_spec"), list):
        raise ValueError(f"the structure {str(node)[:80]!r}")
    context = node.get("context")
    parts = [context, _json(context) if isinstance(context, str) and context.strip()[:1] in ("[", "{") else None]
    if any(_has_enum(part) for part in parts):
        raise ValueError("a member of an enum, which would be imported")
    if node.get("type") == "collections.defaultdict":
        factory = context if isinstance(context, dict) else {}
        name = factory.get("default_factory_name")
        if factory.get("default_factory_module") != "builtins" or name not in _PLAIN_FACTORIES:
            raise ValueError(f"a defaultdict of {str(name)[:80]!r}, which would be imported")
    for child in node["children_spec"]:
        _check_node(child)


def _has_enum(tree: Any) -> bool:
    if isinstance(tree, dict):
        return "__enum__" in tree or any(map(_has_enum, tree.values()))
    return isinstance(tree, list) and any(map(_has_enum, tree))


def _check_no_object(value: Any) -> None:
    raise ValueError("an object, which is no tensor")


_CHECKS: dict[str, Callable[[Any], None]] = {
    "expr_str": _checked(check_size, "the size"),
    "guards_code": _checked(check_guard, "the guard"),
    "target": _check_operator,
    "as_operator": _check_operator,
    "custom": _check_notes,
    "in_spec": _check_arguments,
    "out_spec": _check_tree,
    "as_custom_obj": _check_no_object,
    "custom_obj": _check_no_object,
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), _check_name),
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "user_input_name", "fqn"), _check_path),
}
