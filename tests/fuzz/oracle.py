"""What a quantized network computes, in plain torch and ml_dtypes: nothing of passes, none of the operators of the IR.

The layers of the generator multiply through `project` and `attend`. Without an oracle these are torch's own functions;
under one they first record the largest magnitude of each operand, as calibration does, and then compute with the
operands that a report says are quantized.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import nvfp4

Rounding = Callable[[Tensor, Tensor], Tensor]


def fp8(x: Tensor, amax: Tensor) -> Tensor:
    """`x` after a round trip through e4m3 with scale amax / 448; `amax` broadcasts."""
    scale = _scale(amax, 448)
    codes = (x.float() / scale).clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(codes.astype(np.float32)) * scale


def int8(x: Tensor, amax: Tensor) -> Tensor:
    """`x` after a round trip through INT8 with scale amax / 127."""
    scale = _scale(amax, 127)
    return (x.float() / scale).round().clamp(-128, 127) * scale


def fp4(x: Tensor, amax: Tensor) -> Tensor:
    """`x` after a round trip through NVFP4 with the global scale amax / 2688."""
    return torch.from_numpy(nvfp4.rounded(x.numpy(), (amax.float() / 2688).numpy()))


def _scale(amax: Tensor, largest: float) -> Tensor:
    return torch.where(amax > 0, amax, torch.ones_like(amax)).float() / largest


def _whole(x: Tensor) -> Tensor:
    return x.float().abs().amax() if x.numel() else torch.zeros(())


def _rows(x: Tensor) -> Tensor:
    return x.float().abs().amax(-1, keepdim=True)


def _blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """The largest magnitude of each element's block of rows x columns."""
    result = torch.empty(x.shape)
    for i in range(0, x.shape[-2], rows):
        for j in range(0, x.shape[-1], columns):
            block = x[..., i : i + rows, j : j + columns]
            result[..., i : i + rows, j : j + columns] = block.abs().amax((-1, -2), keepdim=True)
    return result


# Format in the report, granularity of the recipe -> (weight, input); static ones get the amax of calibration.
_DYNAMIC: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "fp8_per_channel_per_token": (
        lambda w: fp8(w, _rows(w)),
        lambda x: fp8(x, _rows(x).clamp_min(2.0**-100)),
    ),
    "int8_per_channel_per_token": (
        lambda w: int8(w, _rows(w)),
        lambda x: int8(x, _rows(x).clamp_min(2.0**-100)),
    ),
    "fp8_block": (
        lambda w: fp8(w, _blocks(w, 128, 128)),
        lambda x: fp8(x, _blocks(x.reshape(-1, x.shape[-1]), 1, 128).reshape(x.shape)),
    ),
}
_STATIC: dict[str, Rounding] = {"fp8": fp8, "int8": int8, "nvfp4": fp4}


class Oracle:
    """Records ranges in a first run, computes with quantized operands in a second.

    Args:
        recipe: name of the shipped recipe.
        quantized: module path -> format, as a report has it; a layer that is not there is computed in float.
    """

    def __init__(self, recipe: str, quantized: Mapping[str, str]) -> None:
        self.recipe, self.quantized = recipe, quantized
        self.used: set[str] = set()
        self.recording = True
        self._amax: dict[tuple[str, int, str], Tensor] = {}
        self._siblings: list[tuple[str, Tensor, str, list[tuple[str, int, str]]]] = []
        self._calls: dict[str, int] = defaultdict(int)

    @contextlib.contextmanager
    def active(self, *, recording: bool) -> Iterator[None]:
        global _current
        self.recording, self._calls = recording, defaultdict(int)
        _current = self
        try:
            yield
        finally:
            _current = None
            if recording:
                self._share()

    def project(self, path: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        call = self._count(path)
        form = self.quantized.get(path, "")
        if self.recording:
            self._record(path, call, x, weight)
            return F.linear(x, weight, bias)
        self.used.add(path)
        kind = form.removesuffix("_weight_only")
        if not form:
            return F.linear(x, weight, bias)
        if self.recipe in _DYNAMIC:
            w, x = _DYNAMIC[self.recipe][0](weight), _DYNAMIC[self.recipe][1](x)
            return F.linear(x, w, bias)
        rounding = _STATIC[kind]
        w = rounding(weight, _rows(weight) if kind == "int8" else self._amax[path, call, "weight"])
        if kind == form:
            x = rounding(x, self._amax[path, call, "input"])
        return F.linear(x, w, bias)

    def attend(self, path: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        call = self._count(path)
        form = self.quantized.get(path)
        q = q * (1 / math.sqrt(q.shape[-1]))
        groups = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)
        if self.recording:
            for name, tensor in (("q", q), ("k", k), ("v", v)):
                self._amax[path, call, name] = _whole(tensor)
        elif form:
            q, k, v = (fp8(t, self._amax[path, call, n]) for n, t in (("q", q), ("k", k), ("v", v)))
        self.used.add(path)
        scores = q @ k.transpose(-1, -2)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        p = scores.softmax(-1)
        return (fp8(p, torch.ones(())) if form and not self.recording else p) @ v

    def _count(self, path: str) -> int:
        self._calls[path] += 1
        return self._calls[path]

    def _record(self, path: str, call: int, x: Tensor, weight: Tensor) -> None:
        self._amax[path, call, "input"] = _whole(x)
        self._amax[path, call, "weight"] = _whole(weight)
        parent = path.rpartition(".")[0]
        form = self.quantized.get(path, "")
        for known, source, fmt, members in self._siblings:
            if known == parent and source is x and fmt == form:
                members.append((path, call, "weight"))
                return
        self._siblings.append((parent, x, form, [(path, call, "weight")]))

    def _share(self) -> None:
        """Layers of one module that read one tensor share the scale of their weights (q, k, v; gate, up)."""
        for _, _, _, members in self._siblings:
            largest = torch.stack([self._amax[key] for key in members]).amax()
            self._amax.update(dict.fromkeys(members, largest))


_current: Oracle | None = None


def project(path: str, x: Tensor, weight: Tensor, bias: Tensor | None, form: Callable[..., Tensor]) -> Tensor:
    """`form(x, weight, bias)`, a linear layer in one of the ways to write it, or what the oracle says it computes."""
    return form(x, weight, bias) if _current is None else _current.project(path, x, weight, bias)


def attend(
    path: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, form: Callable[..., Tensor]
) -> Tensor:
    """`form(q, k, v, mask, causal)`, an attention in one of the ways to write it, or what the oracle computes."""
    return form(q, k, v, mask, causal) if _current is None else _current.attend(path, q, k, v, mask, causal)


def expected(
    model: Any, inputs: tuple[Tensor, ...], recipe: str, quantized: Mapping[str, str]
) -> tuple[list[Tensor], set[str]]:
    """The outputs of `model` with what `quantized` names quantized, and the paths of the layers that it ran."""
    oracle = Oracle(recipe, quantized)
    with torch.no_grad():
        with oracle.active(recording=True):
            model(*inputs)
        with oracle.active(recording=False):
            results = model(*inputs)
    return [r for r in torch.utils._pytree.tree_leaves(results) if isinstance(r, Tensor)], oracle.used
