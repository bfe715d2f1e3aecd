"""Private names of torch that passes use. What stands here is looked up when it is asked for, and has a probe.

Used without a detour are `torch.utils._pytree`, `torch._ops.OpOverload` and `HigherOrderOperator` with their `_schema`,
and operators whose names begin so, such as `aten._to_copy`: every graph of torch.export is made of these, and saved
programs name them, so that torch cannot take them back without a word. They are probed all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from passes.private import Private, lazily

if TYPE_CHECKING:
    import torch
    from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
    from torch._guards import detect_fake_mode as detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode

    is_composite: Callable[[Any], bool]
    is_kept: Callable[[Any], bool]

_FAKE = "torch._subclasses.fake_tensor"
_UTILS = "torch._export.utils"
_VALUES = "every pass, which gives values to new nodes,"

_COMPOSITE = "to leave a program alone where it is functional,"

_NAMES = {
    "FakeTensor": Private(_FAKE, "FakeTensor", _VALUES),
    "FakeTensorMode": Private(_FAKE, "FakeTensorMode", _VALUES, lambda mode: bool(_is_fake(mode))),
    "detect_fake_mode": Private("torch._guards", "detect_fake_mode", _VALUES, lambda detect: detect([]) is None),
    "LazyGraphModule": Private(
        "torch.fx._lazy_graph_module", "_LazyGraphModule", "every pass, which changes graphs", lambda c: _is_lazy(c)
    ),
    "enable_python_dispatcher": Private("torch._dispatch.python", "enable_python_dispatcher", _VALUES),
    "is_composite": Private("torch._export.utils", "_is_cia_op", _COMPOSITE, lambda found: _tells(found, False)),
    "is_kept": Private(
        "torch._export.utils", "_check_valid_to_preserve", _COMPOSITE, lambda found: _tells(found, True)
    ),
}
__getattr__, __dir__ = lazily(__name__, _NAMES)


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN."""
    import torch

    return bool(torch._C._has_mkldnn)


def cpu_has_vnni() -> bool:
    """Whether this CPU adds up four products of bytes at once, and oneDNN has them."""
    import torch

    return has_onednn() and bool(torch.cpu._is_vnni_supported())


def cpu_has_float16() -> bool:
    """Whether this CPU multiplies float16, and oneDNN has that."""
    import torch

    return has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def storage_id(tensor: torch.Tensor) -> int:
    """Equal for two tensors in one memory, fake ones, too, whose addresses are all 0."""
    return int(tensor.untyped_storage()._cdata)


def fake_like(
    mode: FakeTensorMode, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
) -> FakeTensor:
    """A fake tensor in a memory of its own, as `torch.empty_strided` makes it in `mode`, without a dispatch."""
    import torch

    fake_class = _NAMES["FakeTensor"].get()
    with torch._C._DisableTorchDispatch():
        elem = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        made: FakeTensor = fake_class(mode, elem, device)
    return made


def data_dependent() -> tuple[type[Exception], ...]:
    """What torch raises where fake values do not decide what numbers of run time do."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode


def in_forward_mode() -> bool:
    """Whether a derivative is taken in forward mode."""
    from torch.autograd import forward_ad

    return forward_ad._current_level >= 0


def below_autograd(keys: Any) -> Any:
    """The dispatch keys among `keys` that come after those of autograd."""
    import torch

    return keys & torch._C._after_autograd_keyset


def probes() -> Iterator[Private]:
    """Every private name of torch that this package uses."""
    yield from _NAMES.values()
    yield Private("torch.cpu", "_is_vnni_supported", "INT8 on a CPU", lambda asks: isinstance(asks(), bool))
    yield Private("torch", "UntypedStorage._cdata", "the merge of heads that lie side by side", _tells_memory)
    yield Private("torch._C", "_DisableTorchDispatch", _VALUES, lambda _: _makes_alike())
    yield Private("torch.autograd", "forward_ad._current_level", "the refusal of gradients", lambda level: level == -1)
    yield Private("torch._C", "_after_autograd_keyset", "the refusal of gradients", _knows_cpu)
    yield Private("torch.utils._pytree", "tree_map_only", "every pass", lambda tree: tree(int, str, [1]) == ["1"])
    yield Private("torch._ops", "HigherOrderOperator", "passes in graphs with branches")
    for name in ("DataDependentOutputException", "DynamicOutputShapeException"):
        yield Private(_FAKE, name, "checks of passes")
    yield Private("torch.fx.experimental.symbolic_shapes", "GuardOnDataDependentSymNode", "checks of passes")
    for name, arguments in _OPERATORS.items():
        yield Private("torch", f"ops.{name}.default", "a lowering of products", _takes(arguments))
    yield Private("torch._C", "_has_mkldnn", "products on a CPU", lambda flag: isinstance(flag, bool))
    if has_onednn():
        for name, arguments in _ONEDNN.items():
            yield Private("torch", f"ops.mkldnn.{name}", "products on a CPU", _takes(arguments))
        for name, arguments in _ONEDNN_CODES.items():
            yield Private("torch", f"ops.onednn.{name}", "INT8 convolutions on a CPU", _takes(arguments))


_OPERATORS = {
    "aten._int_mm": ("self", "mat2"),
    "aten._scaled_mm": ("self", "mat2", "scale_a", "scale_b", "bias", "scale_result", "out_dtype", "use_fast_accum"),
    "aten._scaled_grouped_mm": ("self", "mat2", "scale_a", "scale_b", "offs"),
    "aten._to_copy": ("self", "dtype"),
    "aten._safe_softmax": ("self", "dim", "dtype"),
    "aten._unsafe_view": ("self", "size"),
}
"""Operator -> the arguments that it begins with."""

_ONEDNN = {"_is_mkldnn_fp16_supported": (), "_linear_pointwise": ("X", "W", "B", "attr", "scalars", "algorithm")}

_POINTWISE = ("qx", "x_scale", "x_zero_point", "qw", "w_scale", "w_zero_point", "bias", "stride", "padding", "dilation")
_ONEDNN_CODES = {
    "qconv_prepack": ("weight", "w_scales", "x_scale", "x_zp", "stride", "padding", "dilation", "groups"),
    "qconv2d_pointwise": _POINTWISE,
    "qconv3d_pointwise": _POINTWISE,
}


def _makes_alike() -> bool:
    import torch

    mode = _NAMES["FakeTensorMode"].get()()
    with mode:
        value = torch.empty(2, 3).t()
    made: Any = fake_like(mode, value.shape, value.stride(), value.dtype, value.device)
    return made.fake_mode is mode and made.stride() == (1, 3) and made.device == value.device


def _takes(arguments: tuple[str, ...]) -> Callable[[Any], bool]:
    def check(operator: Any) -> bool:
        overload = getattr(operator, "default", operator)
        return tuple(a.name for a in overload._schema.arguments[: len(arguments)]) == arguments

    return check


def _tells(found: Any, addition: bool) -> bool:
    """Of operators that are made of others, and of functional ones: `reshape` is one of these only, `add` of those."""
    import torch

    aten = torch.ops.aten
    return bool(found(aten.add.Tensor)) is addition and bool(found(aten.reshape.default)) is not addition


def _is_fake(mode_class: Any) -> bool:
    """Whether a product of fake tensors is fake, and of the right shape."""
    import torch

    with mode_class():
        product = torch.empty(2, 3) @ torch.empty(3, 5)
    return type(product).__name__ == "FakeTensor" and product.shape == (2, 5)


def _is_lazy(module_class: Any) -> bool:
    """Whether a module with a graph runs it, though its code was not written when it was made."""
    import torch

    graph = torch.fx.Graph()
    graph.output(graph.placeholder("x"))
    module = module_class({}, graph)
    return "_code" not in vars(module) and module(3) == 3


def _tells_memory(_: Any) -> bool:
    import torch

    one, other = torch.empty(4), torch.empty(4)
    return storage_id(one) == storage_id(one[1:]) != storage_id(other)


def _knows_cpu(keys: Any) -> bool:
    import torch

    return bool(keys.has(torch._C.DispatchKey.CPU)) and not keys.has(torch._C.DispatchKey.AutogradCPU)
