"""How many kernels convolutions on codes add to those of half precision: theirs depend on what is before and behind.

The kernel that writes the codes of an input is one more, unless the kernel before it is pointwise anyway: a norm, SiLU,
or that behind a convolution with a scale for each channel, which writes float32 and leaves scale, bias, ReLU and the
residual add to a pointwise kernel. With one scale there is such a kernel where something is added, as long as no other
convolution, in half precision, adds it. That kernel, too, is one more, unless it is a part of the norm or mean behind
it, and two convolutions whose results are added share theirs. So a chain of n convolutions with a scale for each
channel, between others in half precision, adds n + 1 kernels, and a lone one two. (TensorRT-RTX 1.7.1, SM89 and SM120:
what its layer lists of ResNets say to the kernel.) What is not known to be pointwise is counted as a kernel more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch.fx import Node

from passes.graph import aten, is_call, only_user
from passes.operators import added_convolution

__all__ = ["AddedKernels", "OnCodes"]

# Kernels of their own in half precision, too, which take in scales before them and quantizers behind.
_POINTWISE = (
    aten.silu.default,
    aten.gelu.default,
    aten.hardswish.default,
    aten.mul.Tensor,
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
)
_EPILOGUE = (aten.relu.default,)  # of the convolution before it


@dataclass(frozen=True)
class OnCodes:
    """How one convolution would be quantized.

    Attributes:
        format: of its input and weight. per_channel: the weight has a scale for each channel.
    """

    format: str
    per_channel: bool

    def is_followed(self, adds: bool) -> bool:
        """Whether a pointwise kernel is behind it. adds: its result is added to something."""
        return self.per_channel or adds


@dataclass(frozen=True)
class AddedKernels:
    """Kernels that a set of convolutions adds.

    Attributes:
        chosen: convolutions -> how each is quantized.
    """

    chosen: Mapping[Node, OnCodes]

    def before(self, call: Node) -> set[tuple[str, Node]]:
        """The kernel that quantizes the input of `call`, by what it makes; shared with others that read it."""
        x = call.args[0]
        assert isinstance(x, Node)
        return set() if self._pointwise(x) else {(self.chosen[call].format, x)}

    def behind(self, call: Node) -> set[Node]:
        """The pointwise kernel that takes what `call` writes, by the last thing that it works out."""
        node, user = call, only_user(call)
        other = _other(user, call)
        if not self.chosen[call].is_followed(adds=other is not None):
            return set()
        if user is not None and other is not None:
            convolution = added_convolution(other)
            if convolution is not None and not self._followed(convolution):
                return {call} if self.chosen[call].per_channel else set()  # the other one adds what this has written
            node = user
        last = only_user(node)
        if last is not None and is_call(last, *_EPILOGUE):
            last = only_user(last)
        return set() if is_call(last, *_POINTWISE, aten.mean.dim) else {node}

    def of(self, calls: Iterable[Node]) -> set[object]:
        """Those of some of the convolutions, in the neighborhood of all that are chosen."""
        return {kernel for call in calls for kernel in (*self.before(call), *self.behind(call))}

    def touched(self, call: Node) -> set[object]:
        """The kernels of `call`, itself, and the convolutions that make its input: those it has neighbors by."""
        return {*self._sources(call.args[0]), call, *self.of([call])}

    def runs(self) -> list[list[Node]]:
        """Convolutions that have part in each other's kernels: they share one, or one reads what another makes."""
        found: list[tuple[list[Node], set[object]]] = []
        for call in self.chosen:
            touched = self.touched(call)
            near = [run for run in found if not touched.isdisjoint(run[1])]
            if near:
                found = [run for run in found if all(run is not other for other in near)]
            calls = [one for run in near for one in run[0]]
            found.append(([*calls, call], touched.union(*(run[1] for run in near))))
        return [calls for calls, _ in found]

    def excess(self, run: Collection[Node]) -> int:
        """How many kernels more `run` adds than one for each."""
        return len(self.of(run)) - len(run)

    def _followed(self, call: Node) -> bool:
        return call in self.chosen and self.chosen[call].is_followed(adds=True)

    def _pointwise(self, node: object) -> bool:
        """Whether a pointwise kernel makes it, be the chosen ones on codes."""
        if is_call(node, *_POINTWISE):
            return True
        sources = self._sources(node)
        return bool(sources) and all(self._is_source(source, node) for source in sources)

    def _is_source(self, call: Node, of: object) -> bool:
        return call in self.chosen and self.chosen[call].is_followed(adds=call is not _unwrapped(of))

    def _sources(self, node: object) -> list[Node]:
        """The convolutions in whose kernel, or behind which, `node` is made."""
        node = _unwrapped(node)
        if is_call(node, aten.convolution.default):
            return [node] if isinstance(node, Node) else []
        if isinstance(node, Node) and is_call(node, aten.add.Tensor):
            return [found for arg in node.args[:2] if (found := added_convolution(arg)) is not None]
        return []


def _unwrapped(node: object) -> object:
    """What the epilogue of a convolution makes `node` of."""
    while isinstance(node, Node) and is_call(node, *_EPILOGUE):
        node = node.args[0]
    return node


def _other(user: Node | None, call: Node) -> object:
    """What the add `user` adds to the result of `call`; None if it is no add of two tensors."""
    if user is None or not is_call(user, aten.add.Tensor):
        return None
    others = [arg for arg in user.args[:2] if arg is not call]
    return others[0] if others and isinstance(others[0], Node) else None
