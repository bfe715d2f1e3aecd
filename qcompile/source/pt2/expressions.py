"""The expressions in a saved program: sizes, which sympy evaluates, and guards, which become Python code.

Both are written in Python's syntax. Here they are only parsed, and everything but names, numbers, operators and known
functions is refused.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator

_SYMBOL = re.compile(r"[A-Za-z_]{1,40}\d{0,6}")
_NAMES = {"oo", "int_oo", "true", "false", "True", "False"}
_NUMBER = re.compile(r"[-+]?[0-9.]{1,40}(e[-+]?\d{1,3})?|[-+]?inf|nan")
_KEY = re.compile(r"[^'\"\\]*")
_LONGEST = 20_000  # characters; of the largest size in models of the hub with all axes dynamic about 600
_LARGEST = 4096  # bits of a number that an expression can come to
_HIGHEST = 64  # exponent
_MOST_POWERS = 3  # in a guard

_SYMPY = {
    *("Add", "Mul", "Max", "Min", "Mod", "Abs", "floor", "ceiling", "sign", "sqrt", "Piecewise", "ExprCondPair", "ITE"),
    *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "And", "Or", "Not"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Tuple"),
}
_TORCH = {
    *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "RShift"),
    *("FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt"),
    *("RoundDecimal", "ToFloat", "Identity", "BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or"),
}
_POWERS = {"Pow", "PowByNatural", "FloatPow", "LShift"}
_OPAQUE = re.compile(r"OpaqueUnaryFn_[a-z0-9]+")
_BUILTINS = {"abs", "bool", "float", "int", "max", "min", "round"}
_SIZES_OF = {"size", "stride", "storage_offset", "numel", "dim"}
_FUNCTIONS = re.compile(r"math\.[a-z][a-z0-9]*|torch\.sym_[a-z]+|torch\._sym_[a-z]+")
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.BitAnd, ast.BitOr, ast.RShift)
_COMPARED = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def check_size(text: str) -> None:
    """Refuse what is no expression of sizes as `sympy.srepr` writes it. Raises ValueError with the part."""
    _bits(_parsed(text))


def check_guard(text: str) -> None:
    """Refuse what is no condition on the sizes of inputs, `L['x'].size()[0] <= 512`. Raises ValueError."""
    powers = [
        node.right for node in _guarded(_parsed(text)) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)
    ]
    if len(powers) > _MOST_POWERS:  # one of the other comes to numbers of any length
        raise ValueError(text[:80])
    for power in powers:
        _exponent(power)


def _parsed(text: str) -> ast.expr:
    if len(text) > _LONGEST or not text.isprintable() or not text.isascii() or "#" in text:
        raise ValueError(text[:80])
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(text[:80]) from None


def _refused(node: ast.AST) -> ValueError:
    return ValueError(ast.unparse(node)[:80])


def _bits(node: ast.expr) -> int:
    """About how many bits the value has, if symbols have 64: sympy computes with numbers of any length."""
    match node:
        case ast.Constant(value=bool()):
            bits = 1
        case ast.Constant(value=int(value)):
            bits = value.bit_length()
        case ast.Constant(value=float()):
            bits = 64
        case ast.Name(id=name) if _SYMBOL.fullmatch(name) and (name in _NAMES or name[-1].isdigit()):
            bits = 64
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert(), operand=operand):
            bits = _bits(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            bits = _bits(left) * _exponent(right)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _ARITHMETIC):
            bits = _bits(left) + _bits(right)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(isinstance(op, _COMPARED) for op in ops):
            bits = max(map(_bits, (left, *others)))
        case ast.Tuple(elts=parts) if parts:
            bits = max(map(_bits, parts))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            bits = _called(node, name, args, keywords)
        case _:
            raise _refused(node)
    if bits > _LARGEST:
        raise _refused(node)
    return bits


def _called(node: ast.expr, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> int:
    constants = [part.value for part in args if isinstance(part, ast.Constant)]
    if name == "Symbol" and len(constants) == len(args) == 1 and isinstance(constants[0], str):
        plain = all(isinstance(word.value, ast.Constant) and isinstance(word.value.value, bool) for word in keywords)
        if plain and _SYMBOL.fullmatch(constants[0]):
            return 64
    elif name == "Float" and len(constants) == len(args) == 1 and _NUMBER.fullmatch(str(constants[0])):
        digits = [word.value.value for word in keywords if isinstance(word.value, ast.Constant)]
        if len(digits) == len(keywords) and all(isinstance(count, int) and count < 1000 for count in digits):
            return 64
    elif not args or keywords:
        pass
    elif name in _POWERS and len(args) == 2:
        factor = _exponent(args[1])
        return _bits(args[0]) + factor if name == "LShift" else _bits(args[0]) * factor
    elif name in _SYMPY or name in _TORCH or name in ("Integer", "Rational") or _OPAQUE.fullmatch(name):
        parts = list(map(_bits, args))
        return sum(parts) if name in ("Mul", "Rational") else max(parts) + len(parts).bit_length()
    raise _refused(node)


def _exponent(node: ast.expr) -> int:
    """Its magnitude, rounded up; a number is wanted, as a power of a size can have any length."""
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _exponent(operand)
        case ast.Call(func=ast.Name(id="Integer" | "Float"), args=[number]):
            return _exponent(number)
        case ast.Call(func=ast.Name(id="Rational"), args=[number, _]):
            return _exponent(number)
        case ast.Constant(value=value) if isinstance(value, int | float | str):
            magnitude = abs(float(value)) if _NUMBER.fullmatch(str(value)) else math.inf
            if magnitude <= _HIGHEST:
                return max(1, math.ceil(magnitude))
    raise _refused(node)


def _guarded(node: ast.expr) -> Iterator[ast.expr]:
    """Every part of a guard. Raises ValueError at one that has no place in it."""
    yield node
    match node:
        case ast.Constant(value=value) if isinstance(value, bool | int | float):
            parts: tuple[ast.expr, ...] = ()
        case ast.BoolOp(values=values):
            parts = tuple(values)
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            parts = (operand,)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _ARITHMETIC):
            parts = (left, right)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(isinstance(op, _COMPARED) for op in ops):
            parts = (left, *others)
        case ast.IfExp(test=test, body=body, orelse=other):
            parts = (test, body, other)
        case ast.Call(func=ast.Attribute(value=value, attr=attr), args=args, keywords=[]) if attr in _SIZES_OF:
            _check_input(value)
            parts = tuple(args)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _BUILTINS | _SYMPY | _TORCH:
            parts = tuple(args)
        case ast.Call(func=func, args=args, keywords=[]) if _FUNCTIONS.fullmatch(ast.unparse(func)):
            parts = tuple(args)
        case ast.Subscript(value=ast.Call() as value, slice=index):
            parts = (value, index)
        case ast.Subscript():
            _check_input(node)
            parts = ()
        case _:
            raise _refused(node)
    for part in parts:
        yield from _guarded(part)


def _check_input(node: ast.expr) -> None:
    """An input, or a part of one: `L['x'][0]['key'].attribute`."""
    match node:
        case ast.Name(id="L"):
            return
        case ast.Subscript(value=value, slice=ast.Constant(value=str(key))) if _KEY.fullmatch(key):
            _check_input(value)
        case ast.Subscript(value=value, slice=ast.Constant(value=int())):
            _check_input(value)
        case ast.Attribute(value=value, attr=attr) if not attr.startswith("_"):
            _check_input(value)
        case _:
            raise _refused(node)
