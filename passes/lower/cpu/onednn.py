"""`qcompile::onednn_linear`: a linear layer in float32 that oneDNN computes, whatever BLAS torch was built with."""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("qcompile", "FRAGMENT")
_LIBRARY.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`aten.linear` in oneDNN: x `[..., K]`, weight `[N, K]`, bias `[N]`, all float32.

    An operator of its own, as Inductor takes `mkldnn._linear_pointwise` only with a weight that is a constant of the
    compiled code, and ours comes from codes at each call.
    """
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return result


@torch.library.register_fake("qcompile::onednn_linear", lib=_LIBRARY)
def _onednn_linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LIBRARY.impl("onednn_linear", onednn_linear, "CPU")
ONEDNN_LINEAR = torch.ops.qcompile.onednn_linear.default
