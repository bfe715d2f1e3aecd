"""Which kernel each layer became, noted on the node that runs it, for the report."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from passes.graph import module_path

KERNEL = "kernel"  # keys in `meta["custom"]`, which survives tracing
LAYER = "layer"
DROPPED = "dropped"


@dataclass(frozen=True)
class Kernel:
    """What one layer became.

    Attributes:
        layer: path of the layer.
        kernel: what computes it: "scaled_mm, one scale", "mm, weight dequantized before it".
        node: name of the FX node.
        dropped: what was quantized in the program and is not here, as no kernel gains from it; empty if nothing.
    """

    layer: str
    kernel: str
    node: str
    dropped: str = ""


def note_kernel(node: Node, kernel: str, layer: str, dropped: str = "") -> None:
    """Note that `node` computes `layer` by `kernel`, without the quantizers of `dropped`."""
    node.meta["custom"] = {**node.meta.get("custom", {}), KERNEL: kernel, LAYER: layer, DROPPED: dropped}


def is_noted(node: Node) -> bool:
    """Whether a lowering has decided already what computes `node`."""
    return KERNEL in node.meta.get("custom", {})


def kernels(gm: GraphModule) -> list[Kernel]:
    """What each lowered layer of `gm` became, in the order of the graph."""
    noted = ((node, node.meta.get("custom", {})) for node in gm.graph.nodes)
    return [
        Kernel(custom.get(LAYER) or module_path(node), custom[KERNEL], node.name, custom.get(DROPPED, ""))
        for node, custom in noted
        if KERNEL in custom
    ]
