"""What Dynamo calls: a compiled graph that is right for the weights as they are now.

Dynamo hands parameters over with every call, and other modules of the class, or other weights of the same one, come
through the same code. Whatever passes made of weights is kept for the weights that it was made of, and made again for
others: identity, version counter and address of each are compared at every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from operator import attrgetter
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from qcompile.compat.torch import is_one_gone, without_autocast
from qcompile.dynamo.calls import current_call
from qcompile.dynamo.gradients import without_backward
from qcompile.dynamo.packed import inner_tensors
from qcompile.errors import CompileError
from qcompile.process import alone

_version = attrgetter("_version")
KEPT = 64  # Python numbers that a graph is kept for

_Numbers = tuple[str, ...]


@dataclass(frozen=True)
class State:
    """What changes when a weight does.

    Attributes:
        versions: counters of changes in place.
        pointers: addresses.
        storages: an address is free for other numbers once the storage that had it is gone.
        handles: of `storages`, for the check that each call makes.
    """

    versions: list[int]
    pointers: list[int]
    storages: list[StorageWeakRef]
    handles: list[int]

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor]) -> State:
        storages = [StorageWeakRef(w.untyped_storage()) for w in weights]  # type: ignore[no-untyped-call]
        return cls(_versions(weights), _pointers(weights), storages, [storage.cdata for storage in storages])

    def is_of(self, weights: Sequence[torch.Tensor]) -> bool:
        return (
            self.versions == _versions(weights)
            and self.pointers == _pointers(weights)
            and not is_one_gone(self.handles)
        )


@dataclass(frozen=True)
class Binding:
    """A function of the back end with the tensors that it reads beside the user's inputs.

    Attributes:
        function: called with the user's inputs, then `constants`.
        constants: for each either a tensor that passes made, or the position of a weight among Dynamo's arguments.
        layers: (kind, path) of each layer in it -> whether it is quantized.
    """

    function: Callable[..., Any]
    constants: Sequence[torch.Tensor | int]
    layers: Mapping[tuple[str, str], bool]


@dataclass(frozen=True)
class Bound:
    """A binding, and the state of the weights that it was made of."""

    binding: Binding
    state: State
    serial: int = field(default_factory=count().__next__)


@dataclass(frozen=True)
class BoundWeights:
    """What was made of one set of weights, for each set of numbers, until one of the weights dies."""

    weights: Sequence[weakref.ref[torch.Tensor]]
    by_numbers: dict[_Numbers, Bound]


class CompiledGraph:
    """A graph that Dynamo captured, compiled.

    Args:
        bind: makes the function and the constants for the weights and numbers among these arguments.
        weights, inputs, scalars: positions among the arguments, as in `Traced`.
        packed: positions of weights that are compared by the tensors inside of them.
        wanted: for each result, whether autograd would give it a gradient.
    """

    def __init__(
        self,
        bind: Callable[[Sequence[Any]], Binding],
        weights: Sequence[int],
        packed: Sequence[int],
        inputs: Sequence[int],
        scalars: Sequence[int],
        wanted: Sequence[bool],
    ) -> None:
        self._bind, self._weights, self._inputs, self._scalars = bind, weights, inputs, scalars
        self._packed, self._wanted = packed, wanted
        self._bound: dict[tuple[int, ...], BoundWeights] = {}

    def __call__(self, *arguments: Any) -> Any:
        weights = self._weights_of(arguments)
        with without_autocast():  # the graph has the casts that autocast makes
            bound = self._current(arguments, weights)
            if (call := current_call()) is not None:
                call.ran[bound.serial] = bound.binding.layers, weights
            inputs = [arguments[i] for i in self._inputs]
            constants = [arguments[c] if isinstance(c, int) else c for c in bound.binding.constants]
            with torch.no_grad():
                results = bound.binding.function(*inputs, *constants)
        if torch.is_grad_enabled() and any(self._wanted):
            return without_backward(results, self._wanted, [*inputs, *weights])
        return results

    def prepare(self, arguments: Sequence[Any]) -> None:
        """Compile for the weights among `arguments` now, while Dynamo waits, not at the first call."""
        self._current(arguments, self._weights_of(arguments))

    def is_used(self) -> bool:
        """Whether there is a model that can call it: Dynamo may keep graphs longer than models."""
        return bool(self._bound) or not (self._weights or self._packed)

    def forget(self) -> None:
        """Make what depends on weights again at the next call."""
        for bound in self._bound.values():
            bound.by_numbers.clear()

    def weights(self) -> Iterator[torch.Tensor]:
        """The weights that it was called with and that are still there."""
        for bound in list(self._bound.values()):
            yield from filter(lambda weight: weight is not None, (ref() for ref in bound.weights))

    def _weights_of(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        weights = [arguments[i] for i in self._weights]
        for i in self._packed:
            weights += inner_tensors(arguments[i])
        return weights

    def _current(self, arguments: Sequence[Any], weights: list[torch.Tensor]) -> Bound:
        known = self._bound.get(tuple(map(id, weights)))
        numbers = tuple(repr(arguments[i].item()) for i in self._scalars)  # -0.0 is 0.0 and NaN no NaN otherwise
        bound = known and known.by_numbers.get(numbers)
        if bound and bound.state.is_of(weights):
            return bound
        return self._make(numbers, arguments, weights)

    def _make(self, numbers: _Numbers, arguments: Sequence[Any], weights: list[torch.Tensor]) -> Bound:
        for weight in weights:
            if weight.is_inference():
                raise CompileError(
                    f"a weight of shape {tuple(weight.shape)} was made in inference mode, where torch does not count"
                    " changes: make or load the model outside of torch.inference_mode()"
                )
        state = State.of(weights)
        # Dynamo holds its lock only where it compiles itself
        with alone(keep_sources=True), torch.inference_mode(False), torch.no_grad():
            binding = self._bind(arguments)
        kept = self._kept(weights)
        kept.pop(numbers, None)
        keep(kept, numbers, bound := Bound(binding, state))
        return bound

    def _kept(self, weights: Sequence[torch.Tensor]) -> dict[_Numbers, Bound]:
        """Where functions for these weights are kept. An id is free for another tensor once the weight is gone."""
        key = tuple(map(id, weights))
        if key not in self._bound:
            forget = partial(_forget, weakref.ref(self), key)
            self._bound[key] = BoundWeights([weakref.ref(weight, forget) for weight in weights], {})
        return self._bound[key].by_numbers


def keep(kept: dict[Any, Any], key: object, value: object) -> None:
    """Add to what is kept for each set of Python numbers, of which the oldest goes out first."""
    if len(kept) >= KEPT:
        del kept[next(iter(kept))]
    kept[key] = value


def _forget(graph: weakref.ref[CompiledGraph], key: tuple[int, ...], weight: object) -> None:
    if (alive := graph()) is not None:
        alive._bound.pop(key, None)


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    return list(map(_version, tensors))


def _pointers(tensors: Sequence[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))
