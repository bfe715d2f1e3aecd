"""Where a factor for each channel of a tensor can go: into the norm that makes the tensor, or the linear layer before.

What reads the tensor then gets it multiplied without an operator more.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch.fx import Node

from passes.constants import is_constant_expression
from passes.graph import TRANSPARENT, aten, dtype, is_call, shape, val
from passes.operators import NORMS
from passes.sdpa import SDPA, Attention

__all__ = ["Absorber", "find_absorber", "norm_operands"]

_NEXT = "it is read by something else, too"


@dataclass(frozen=True)
class Absorber:
    """What can multiply the channels of a tensor at no cost.

    Attributes:
        node: a norm, or a linear layer.
        repeats: with grouped queries, how many heads have the channels of one key/value head, and so their factors.
        width: channels of a head, where there are such.
    """

    node: Node
    repeats: int = 1
    width: int = 0

    @property
    def is_norm(self) -> bool:
        return is_call(self.node, *NORMS)


def find_absorber(x: Node, readers: Collection[Node]) -> Absorber | str:
    """What can multiply `x` `[..., K]`, channel by channel, for all of `readers`; or why nothing can.

    From `x` up to it nothing else may read what would be multiplied, and only what hands a positive factor on may stand
    in between: reshapes, casts, ReLU, the other factor of a product, and an attention whose values they are.
    """
    if not set(x.users) <= set(readers):
        return _NEXT
    return _above(x)


def norm_operands(node: Node) -> list[int]:
    """Which arguments of a norm scale with what it makes: the weight, and the bias where it has one."""
    weight = 2
    places = (weight, weight + 1) if is_call(node, aten.layer_norm.default) else (weight,)
    return [index for index in places if len(node.args) > index and isinstance(node.args[index], Node)]


def _above(x: Node) -> Absorber | str:
    """`find_absorber` for an `x` whose readers are known."""
    while True:
        if is_call(x, *NORMS):
            return _norm(x)
        if is_call(x, aten.linear.default):
            fixed = is_constant_expression(x.args[1])
            return Absorber(x) if fixed else "the layer before it has a weight that is computed"
        if is_call(x, aten.mul.Tensor):
            return _product(x)
        if is_call(x, aten.reshape.default):
            source = x.args[0]
            assert isinstance(source, Node)
            if shape(source)[-1] != shape(x)[-1]:
                return _values(x)
        elif not (is_call(x, *TRANSPARENT, aten.relu.default) or _is_cast(x)):
            return f"{_called(x)} makes it"
        source = x.args[0]
        assert isinstance(source, Node)
        if len(source.users) > 1:
            return _NEXT
        x = source


def _norm(x: Node) -> Absorber | str:
    operands = norm_operands(x)
    if len(x.args[1]) != 1 or operands[:1] != [2]:  # type: ignore[arg-type]
        return "the norm that makes it has no weight for each channel"
    if not all(is_constant_expression(x.args[index]) for index in operands):
        return "the norm that makes it has a weight that is computed"
    return Absorber(x)


def _product(x: Node) -> Absorber | str:
    """Of a gated layer the factor goes to the side that is a linear layer."""
    sides = [side for side in x.args if isinstance(side, Node)]
    if len(sides) == 2 and sides[0] is sides[1]:
        return "a square makes it"
    for side in sides:
        if len(side.users) == 1 and shape(side)[-1] == shape(x)[-1] and not isinstance(found := _above(side), str):
            return found
    return f"{_called(x)} makes it"


def _values(x: Node) -> Absorber | str:
    """The projection whose values an attention sums up, where `x` `[B,S,H*D]` has its heads."""
    told = f"{_called(x)} makes it"
    heads = _only(x.args[0])
    attended = _only(heads.args[0]) if heads is not None and _swaps(heads) else None
    if attended is None or not is_call(attended, SDPA) or len(shape(attended)) != 4:
        return told
    _, count, _, width = shape(attended)
    if shape(x)[-1] != count * width:
        return told
    attention = Attention.of(attended)
    value = attention.v
    if len({id(n) for n in (attention.q, attention.k, value)}) < 3 or _only(value) is None or not _swaps(value):
        return told
    split = _only(value.args[0])
    if split is None or not is_call(split, aten.reshape.default) or len(shape(split)) != 4:
        return told
    source = _only(split.args[0])
    kept = shape(split)[2]
    if source is None or not is_call(source, aten.linear.default) or shape(source)[-1] != kept * width:
        return told
    found = _above(source)
    return found if isinstance(found, str) else Absorber(found.node, int(count // kept), int(width))


def _swaps(x: Node) -> bool:
    """Whether `x` is `transpose(_, 1, 2)` of four axes."""
    return is_call(x, aten.transpose.int) and len(shape(x)) == 4 and {int(a) % 4 for a in x.args[1:]} == {1, 2}  # type: ignore[arg-type]


def _only(x: object) -> Node | None:
    """`x`, read by one node, behind what hands it on."""
    while isinstance(x, Node) and len(x.users) == 1 and is_call(x, *TRANSPARENT):
        x = x.args[0]
    return x if isinstance(x, Node) and len(x.users) == 1 else None


def _is_cast(x: Node) -> bool:
    """Whether `x` is a float tensor in another float dtype."""
    source = x.args[0] if is_call(x, aten._to_copy.default) else None
    return isinstance(source, Node) and dtype(source).is_floating_point and val(x).dtype.is_floating_point


def _called(x: Node) -> str:
    """What messages call the operator of `x`."""
    return str(x.target).removeprefix("aten.").partition(".")[0] if x.op == "call_function" else f"an {x.op}"
