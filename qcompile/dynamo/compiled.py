"""What Dynamo calls: a compiled graph that is right for the weights as they are now.

Dynamo hands parameters over with every call, and other modules of the class, or other weights of the same one, come
through the same code. Whatever passes made of weights is kept for the weights that it was made of, and made again for
others: identity, version counter and address of each are compared at every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from qcompile.errors import CompileError

_version = attrgetter("_version")
_KEPT = 64  # sets of weights; layers of one class that are compiled one by one share their code


@dataclass(frozen=True)
class Bound:
    """A function of the back end with the tensors that it reads beside the user's inputs.

    Attributes:
        function: called with the user's inputs, then `constants`.
        constants: for each either a tensor that passes made, or the position of a weight among Dynamo's arguments.
        versions, pointers: of the weights that those were made of.
    """

    function: Callable[..., Any]
    constants: Sequence[torch.Tensor | int]
    versions: list[int]
    pointers: list[int]


class CompiledGraph:
    """A graph that Dynamo captured, compiled.

    Args:
        bind: makes the function and the constants for the weights and numbers among these arguments.
        weights, inputs, scalars: positions among the arguments, as in `Traced`.
    """

    def __init__(
        self,
        bind: Callable[[Sequence[Any]], tuple[Callable[..., Any], Sequence[torch.Tensor | int]]],
        weights: Sequence[int],
        inputs: Sequence[int],
        scalars: Sequence[int],
    ) -> None:
        self._bind, self._weights, self._inputs, self._scalars = bind, weights, inputs, scalars
        self._bound: dict[tuple[Any, ...], Bound] = {}

    def __call__(self, *arguments: Any) -> Any:
        weights = [arguments[i] for i in self._weights]
        with torch._C._DisableAutocast():  # the graph has the casts that autocast makes
            bound = self._current(arguments, weights)
            inputs = [arguments[i] for i in self._inputs]
            constants = [arguments[c] if isinstance(c, int) else c for c in bound.constants]
            with torch.no_grad():
                results = bound.function(*inputs, *constants)
        if torch.is_grad_enabled():
            return _without_backward(results, [*inputs, *weights])
        return results

    def prepare(self, arguments: Sequence[Any]) -> None:
        """Compile for the weights among `arguments` now, while Dynamo waits, not at the first call."""
        self._current(arguments, [arguments[i] for i in self._weights])

    def _current(self, arguments: Sequence[Any], weights: list[torch.Tensor]) -> Bound:
        key = (*map(id, weights), *(arguments[i].item() for i in self._scalars))
        bound = self._bound.get(key)
        # in this order: address and version of what was not changed are compared at each call
        if bound is not None and bound.versions == _versions(weights) and bound.pointers == _pointers(weights):
            return bound
        return self._make(key, arguments, weights)

    def _make(self, key: tuple[Any, ...], arguments: Sequence[Any], weights: list[torch.Tensor]) -> Bound:
        for weight in weights:
            if weight.is_inference():
                raise CompileError(
                    f"a weight of shape {tuple(weight.shape)} was made in inference mode, where torch does not count"
                    " changes: make or load the model outside of torch.inference_mode()"
                )
        versions, pointers = _versions(weights), _pointers(weights)
        with torch.inference_mode(False), torch.no_grad():
            function, constants = self._bind(arguments)
        self._bound.pop(key, None)
        if len(self._bound) >= _KEPT:
            del self._bound[next(iter(self._bound))]
        self._bound[key] = Bound(function, constants, versions, pointers)
        for weight in weights:  # an id is free for another tensor once the weight is gone
            weakref.finalize(weight, self._bound.pop, key, None)
        return self._bound[key]


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    return list(map(_version, tensors))


def _pointers(tensors: Sequence[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))


def _without_backward(results: Any, sources: Sequence[Any]) -> Any:
    """`results`, whose gradients raise an error if any of `sources` wants one."""
    wanting = [s for s in sources if isinstance(s, torch.Tensor) and s.requires_grad]
    if not wanting:
        return results
    tensors = [r for r in results if isinstance(r, torch.Tensor) and r.is_floating_point()]
    marked = iter(_ForInference.apply(wanting[0], *tensors))  # type: ignore[no-untyped-call]
    return tuple(next(marked) if isinstance(r, torch.Tensor) and r.is_floating_point() else r for r in results)


class _ForInference(torch.autograd.Function):
    """Hands tensors on, and says so when a gradient is asked for."""

    @staticmethod
    def forward(ctx: FunctionCtx, wanting: torch.Tensor, *tensors: torch.Tensor) -> Any:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise CompileError(
            "qcompile compiles for inference, and a rounded weight has no gradient: train the model as it is, or with"
            " the quantization-aware training of another tool, and compile the result"
        )
