"""The tensors of one layer as they come out of files: found under the names that tools use, checked, in one form.

Tensors on the meta device are checked for names, dtypes and shapes alone. Codes and scales are not computed with. The
one exception is a block (or row) whose scale is 0: it stands for zeros whatever its codes are, but scales have to be
positive, so it is read as codes 0 under the scale 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from passes.formats import Format
from qcompile.checkpoint.files.tensors import FLOATS
from qcompile.checkpoint.formats.base import Get
from qcompile.errors import CheckpointError
from qcompile.schemes.layer import QuantizedWeight
from qcompile.schemes.scheme import Scheme

# Tools store scales in float32 or in the dtype of the model; e8m0 holds powers of two, so float32 has all of them.
_SCALE_DTYPES = (*FLOATS, torch.float8_e8m0fnu)


class StoredLayer:
    """The tensors of the linear layer called `name`, `[N, K] = shape`.

    Each method takes the last parts of the names that tools give to one tensor, and the first that is there counts.
    Every method raises `CheckpointError` with the full name of the tensor that is missing or wrong.
    """

    def __init__(self, name: str, get: Get, shape: tuple[int, int]) -> None:
        self._name, self._get, self._shape = name, get, shape

    def weight(
        self,
        scheme: Scheme,
        *,
        codes: tuple[str, ...],
        scale: tuple[str, ...],
        global_scale: tuple[str, ...] = (),
        input_scale: tuple[str, ...] = (),
        divides: bool = False,
    ) -> QuantizedWeight:
        """All of them.

        Args:
            divides: the global scales are those that a value is divided by.
        """
        two_levels = scheme.weight.scale is not None
        stored_codes = self._codes(codes, scheme.weight)
        stored_scale = self._scale(scale, scheme)
        if stored_scale.ndim:
            stored_codes, stored_scale = _without_zero_scales(stored_codes, stored_scale, scheme.weight)
        if not two_levels and not scheme.weight.block:
            # what is there says it better than the configuration
            scheme = replace(scheme, per_channel=stored_scale.ndim > 0)
        return QuantizedWeight(
            scheme,
            stored_codes,
            stored_scale,
            self.scalar(*global_scale, divides=divides) if two_levels else None,
            self.scalar(*input_scale, divides=divides and two_levels) if scheme.has_input_scale else None,
        )

    def scalar(self, *suffixes: str, divides: bool = False) -> torch.Tensor:
        """A float32 scalar, positive and finite; `(1,)` is as good as `()`."""
        name, tensor = self._find(suffixes)
        if tensor.dtype not in _SCALE_DTYPES:
            raise self._wrong(name, f"has dtype {_dtype_name(tensor.dtype)}, expected float32")
        if tensor.numel() != 1:
            raise self._wrong(name, f"has the shape {list(tensor.shape)}, expected one number")
        value = tensor.reshape(()).float()
        value = 1 / value if divides else value
        if not (torch.isfinite(value) and value > 0):
            raise self._wrong(name, f"is {tensor.reshape(()).item()}; a scale has to be positive and finite")
        return value

    def low_rank(self, down: tuple[str, ...], up: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors `[R, K]` and `[N, R]` of the low-rank part, each under one of some names."""
        first, second = self._find(down), self._find(up)
        rank = first[1].shape[0] if first[1].ndim else 0
        wanted = ([rank, self._shape[1]], [self._shape[0], rank])
        for (name, tensor), expected in zip((first, second), wanted, strict=True):
            if tensor.dtype not in FLOATS:
                raise self._wrong(name, f"has dtype {_dtype_name(tensor.dtype)}, expected a float")
            if list(tensor.shape) != expected:
                raise self._wrong(name, f"has the shape {list(tensor.shape)}, expected {expected}")
            if not tensor.is_meta and not bool(tensor.isfinite().all()):
                raise self._wrong(name, "holds NaN or infinity")
        return first[1], second[1]

    def ones(self, suffix: str) -> None:
        """A factor of the input that the format wants. Raises CheckpointError for one that is not 1 everywhere."""
        name, tensor = self._find((suffix,))
        if list(tensor.shape) != [self._shape[1]]:
            raise self._wrong(name, f"has the shape {list(tensor.shape)}, expected {[self._shape[1]]}")
        if not tensor.is_meta and not bool((tensor == 1).all()):
            raise self._wrong(name, "is not 1 everywhere: inputs that are smoothed beside a low-rank part are not read")

    def _codes(self, suffixes: tuple[str, ...], fmt: Format) -> torch.Tensor:
        name, tensor = self._find(suffixes)
        if tensor.dtype != fmt.storage:
            hint = (
                "; the configuration says that the layer is quantized, its skip list may lack it"
                if tensor.dtype in FLOATS
                else ""
            )
            raise self._wrong(name, f"has dtype {_dtype_name(tensor.dtype)}, expected {_dtype_name(fmt.storage)}{hint}")
        n, k = self._shape
        expected = [n, k // 2 if fmt.packed else k]
        if list(tensor.shape) != expected:
            raise self._wrong(name, f"has the shape {list(tensor.shape)}, expected {expected}")
        if fmt.storage == torch.float8_e4m3fn and _has_nan(tensor):
            raise self._wrong(name, "holds NaN")
        return tensor

    def _scale(self, suffixes: tuple[str, ...], scheme: Scheme) -> torch.Tensor:
        fmt = scheme.weight
        name, tensor = self._find(suffixes)
        if fmt.powers and tensor.dtype == torch.uint8:
            tensor = tensor.view(torch.float8_e8m0fnu)
        if tensor.dtype not in ((fmt.scale.storage,) if fmt.scale else _SCALE_DTYPES):
            expected = _dtype_name(fmt.scale.storage) if fmt.scale else "float32"
            raise self._wrong(name, f"has dtype {_dtype_name(tensor.dtype)}, expected {expected}")
        shape = self._scale_shape(name, tensor, scheme)
        if tensor.is_meta:
            return tensor.reshape(shape) if fmt.scale else tensor.float().reshape(shape)
        values = tensor.float()
        if not torch.isfinite(values).all():
            raise self._wrong(name, "holds NaN or infinity")
        if (values < 0).any() or (not shape and values == 0):
            raise self._wrong(name, f"holds {values.min().item()}; a scale has to be positive")
        return (tensor if fmt.scale else values).reshape(shape)

    def _scale_shape(self, name: str, tensor: torch.Tensor, scheme: Scheme) -> list[int]:
        """The shape that `QuantizedWeight` gives the scale; tools have other axes of length 1 beside."""
        fmt, (n, k) = scheme.weight, self._shape
        spellings: dict[tuple[int, ...], list[int]]
        if len(fmt.sizes) == 2:
            rows, columns = fmt.blocks([n, k])
            spellings = {(rows, columns): [rows, columns], (rows, 1, columns, 1): [rows, columns]}
            if rows == columns == 1:  # as Model Optimizer squeezes it
                spellings |= {(): [1, 1], (1,): [1, 1]}
        elif fmt.sizes:
            spellings = {(n, k // fmt.sizes[0]): [n, k // fmt.sizes[0]]}
        else:
            each_row: dict[tuple[int, ...], list[int]] = {(n, 1): [n, 1], (n,): [n, 1]}
            one: dict[tuple[int, ...], list[int]] = {(): [], (1,): [], (1, 1): []}
            spellings = one | each_row if scheme.per_channel else each_row | one
        if tuple(tensor.shape) in spellings:
            return spellings[tuple(tensor.shape)]
        expected = " or ".join(str(list(shape)) for shape in spellings)
        raise self._wrong(name, f"has the shape {list(tensor.shape)}, expected {expected} for a weight [{n}, {k}]")

    def _find(self, suffixes: tuple[str, ...]) -> tuple[str, torch.Tensor]:
        for suffix in suffixes:
            try:
                return f"{self._name}.{suffix}", self._get(f"{self._name}.{suffix}")
            except KeyError:
                continue
        others = f" (nor {', '.join(suffixes[1:])})" if suffixes[1:] else ""
        raise CheckpointError(
            f"{self._name}.{suffixes[0]} is missing{others}: the configuration says that the layer is quantized, so a "
            "file of the checkpoint is missing or broken, or the skip list lacks the layer"
        )

    def _wrong(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{name} {what}")


def as_exponents(scale: torch.Tensor) -> torch.Tensor:
    """Powers of two as files hold them: their exponents above -127, in bytes."""
    return scale.to(torch.float8_e8m0fnu).view(torch.uint8)


def kv_scales(attention: str, get: Get) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The scales of an FP8 key/value cache under any of the names that tools give them; None where there are none.

    Raises:
        CheckpointError: only one is there, or a scale is not positive and finite.
    """
    layer = StoredLayer(attention, get, (0, 0))
    found = []
    for kind in ("k", "v"):
        names = (f"{kind}_proj.{kind}_scale", f"{kind}_scale", f"{kind}_proj.output_scale")
        present = [name for name in names if _is_there(get, f"{attention}.{name}")]
        found.append(layer.scalar(present[0]) if present else None)
    key, value = found
    if key is None and value is None:
        return None
    if key is None or value is None:
        missing = "k_scale" if key is None else "v_scale"
        raise CheckpointError(f"{attention}.{missing} is missing, but the other scale of the key/value cache is there")
    return key, value


def _is_there(get: Get, name: str) -> bool:
    try:
        get(name)
    except KeyError:
        return False
    return True


def _has_nan(codes: torch.Tensor) -> bool:
    return not codes.is_meta and bool(((codes.view(torch.uint8) & 0x7F) == 0x7F).any())


def _without_zero_scales(codes: torch.Tensor, scale: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    if scale.is_meta:
        return codes, scale
    zero = scale.float() == 0
    if not zero.any():
        return codes, scale
    bytes_of = codes.view(torch.uint8)
    if fmt.packed:
        per_code = zero.repeat_interleave(fmt.sizes[-1] // 2, -1)
    else:
        per_code = fmt.per_element(zero, codes.shape) if fmt.sizes else zero
    codes = bytes_of.masked_fill(per_code, 0).view(codes.dtype)
    return codes, torch.where(zero, 1.0, scale.float()).to(scale.dtype)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
