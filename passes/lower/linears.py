"""What the passes that turn quantized linear layers into matrix products of torch have in common."""

from __future__ import annotations

from abc import abstractmethod

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import aten, calls
from passes.lower.device import Device
from passes.lower.kernels import is_noted, note_kernel
from passes.lower.operands import constants_read, forget_unread
from passes.reading import QuantizedLayer

_PRODUCTS = (
    aten._scaled_mm.default,
    aten._scaled_grouped_mm.default,
    aten._int_mm.default,
)


class LinearLowering(Pass):
    """Replaces each quantized linear layer that it takes, and notes which kernel it became.

    A subclass says which it looks at (`takes`), why it leaves one (`reason`) and what it makes of the others (`lower`).
    """

    target = aten.linear.default

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    @abstractmethod
    def takes(self, linear: QuantizedLayer) -> bool:
        """Whether `linear` is in the formats of this pass."""

    @abstractmethod
    def reason(self, linear: QuantizedLayer) -> str | None:
        """Why `linear` has to stay, or None."""

    @abstractmethod
    def lower(self, gm: GraphModule, linear: QuantizedLayer) -> tuple[Node, str]:
        """What computes the same as `linear`, and what to call its kernel."""

    def rewrite(self, gm: GraphModule) -> None:
        before, fired = constants_read(gm), self.log.fired[self.name]
        for node in calls(gm.graph, self.target):
            linear = QuantizedLayer.of_codes(node)
            if linear is None or is_noted(node) or not self.takes(linear):
                continue
            reason = self.reason(linear)
            if reason is not None:
                self.decline(reason, node)
                continue
            layer = linear.name
            result, kernel = self.lower(gm, linear)
            product = _product(result, node)
            note_kernel(product, kernel, layer)
            node.replace_all_uses_with(result)
            self.fire()
        if self.log.fired[self.name] > fired:
            forget_unread(gm, before)


def _product(result: Node, node: Node) -> Node:
    """The matrix product that `result`, which stands in front of `node`, is made of."""
    while result.target not in _PRODUCTS:
        result = result.all_input_nodes[0]
        assert result < node
    return result
