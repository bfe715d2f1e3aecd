"""What an ONNX file of a decoder takes and gives, read off its inputs and outputs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from qcompile.errors import GenerationError
from qcompile.messages import some
from qcompile.onnxfile.read import read_onnx

__all__ = ["CACHE_POSITION", "MASK", "POSITIONS", "TOKENS", "CacheTensor", "DecoderFile"]

TOKENS, MASK, POSITIONS, CACHE_POSITION = "input_ids", "attention_mask", "position_ids", "cache_position"
LOGITS = "logits"
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_TOKEN_INPUTS = (TOKENS, MASK, POSITIONS, CACHE_POSITION)
_INTEGERS: dict[int, str] = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.INT32: "int32"}
_CACHE_TYPES = ("FLOAT", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "INT8")
_CODES = (onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.INT8)
Dims = list[int | str]


@dataclass(frozen=True)
class CacheTensor:
    """The keys or the values of one layer: an input `past` and an output `present`, `[batch, heads, tokens, width]`.

    Attributes:
        elem_type: of ONNX. length: of a cache that is written to at its positions; None where it is appended to.
    """

    past: str
    present: str
    heads: int
    width: int
    elem_type: int
    length: int | None

    @property
    def element_bytes(self) -> int:
        """Of one element."""
        return int(onnx.helper.tensor_dtype_to_np_dtype(self.elem_type).itemsize)


@dataclass(frozen=True)
class DecoderFile:
    """A file that generation can run.

    Attributes:
        path: of the file. inputs: token inputs that it has, and their types. caches: by layers, keys first.
        vocabulary: width of the logits. formats: of what its QuantizeLinear make, as ONNX calls the types.
        dequantizes: it has weights or activations in codes.
    """

    path: Path
    inputs: Mapping[str, str]
    caches: tuple[CacheTensor, ...]
    vocabulary: int
    formats: frozenset[str] = field(default_factory=frozenset)
    dequantizes: bool = False

    @property
    def layers(self) -> int:
        """How many of them keep something."""
        return len(self.caches) // 2

    @property
    def length(self) -> int | None:
        """Tokens that a cache of fixed length holds."""
        return self.caches[0].length

    @property
    def cache_bytes(self) -> int:
        """Of one token, in all layers."""
        return sum(tensor.heads * tensor.width * tensor.element_bytes for tensor in self.caches)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> DecoderFile:
        """The file at `path`. Raises GenerationError for one that has another interface than that of decoders."""
        model = read_onnx(path, error=GenerationError).model
        constants = {tensor.name for tensor in model.graph.initializer}
        given = {value.name: value for value in model.graph.input if value.name not in constants}
        results = {value.name: value for value in model.graph.output}
        pasts = sorted(filter(_PAST.fullmatch, given), key=_place)
        _check_names(os.fspath(path), given, results, pasts)
        tokens = {name: _integer(given[name], path) for name in _TOKEN_INPUTS if name in given}
        caches = tuple(_cache_tensor(given[name], results[_present(name)], path) for name in pasts)
        if len({tensor.length for tensor in caches}) > 1:
            raise GenerationError(f"{path}: some caches have a fixed length and others have not, or another one")
        vocabulary = _dims(results[LOGITS])[-1:]
        if not vocabulary or not isinstance(vocabulary[0], int):
            raise GenerationError(
                f"{path}: {LOGITS} is {_dims(results[LOGITS])}, and its last axis has to be of a size"
            )
        operators = {node.op_type for node in model.graph.node}
        types = {initializer.name: initializer.data_type for initializer in model.graph.initializer}
        formats = {
            onnx.TensorProto.DataType.Name(types[node.input[2]])
            for node in model.graph.node
            if node.op_type == "QuantizeLinear" and len(node.input) > 2 and node.input[2] in types
        }
        return cls(Path(path), tokens, caches, vocabulary[0], frozenset(formats), "DequantizeLinear" in operators)


def _place(name: str) -> tuple[int, str]:
    match = _PAST.fullmatch(name)
    assert match is not None
    return int(match[1]), match[2]


def _present(past: str) -> str:
    return past.replace("past_key_values", "present", 1)


def _check_names(path: str, given: Mapping[str, object], results: Mapping[str, object], pasts: list[str]) -> None:
    """Raise GenerationError for what a decoder with a cache cannot lack, and for inputs that nobody would feed."""
    if TOKENS not in given or not pasts:
        lacks = f"no input {TOKENS}" if TOKENS not in given else "no inputs past_key_values.0.key, ..."
        raise GenerationError(
            f"{path} is no decoder with a cache, as it has {lacks}; it takes {some(list(given))}: export the model with"
            " --cache"
        )
    whole = [f"past_key_values.{layer}.{kind}" for layer in range(len(pasts) // 2) for kind in ("key", "value")]
    if pasts != whole:
        raise GenerationError(f"{path}: a cache is keys and values of layers 0, 1, ..., and this is {some(pasts)}")
    if missing := [name for name in (LOGITS, *map(_present, pasts)) if name not in results]:
        raise GenerationError(f"{path} lacks the outputs {some(missing)}, which a decoder with a cache gives back")
    if others := [name for name in given if name not in (*_TOKEN_INPUTS, *pasts)]:
        raise GenerationError(f"{path} takes {some(others)}, too, which generation has no values for")


def _cache_tensor(past: onnx.ValueInfoProto, present: onnx.ValueInfoProto, path: str | os.PathLike[str]) -> CacheTensor:
    """Of an input and an output. Raises GenerationError where the one cannot be given for the other."""
    kind = past.type.tensor_type.elem_type
    dims, others = _dims(past), _dims(present)
    if kind != present.type.tensor_type.elem_type:
        raise GenerationError(f"{path}: {present.name} is of another type than {past.name}, which it is given for")
    if onnx.TensorProto.DataType.Name(kind) not in _CACHE_TYPES:
        raise GenerationError(f"{path}: a cache of {onnx.TensorProto.DataType.Name(kind)} is not known")
    if (
        len(dims) != 4
        or len(others) != 4
        or dims[1::2] != others[1::2]
        or not all(isinstance(d, int) for d in dims[1::2])
    ):
        raise GenerationError(
            f"{path}: {past.name} is {dims} and {present.name} {others}; a cache is [batch, heads, tokens, width], with"
            " heads and width of a size"
        )
    fixed = dims[2] if isinstance(dims[2], int) else None
    return CacheTensor(past.name, present.name, int(dims[1]), int(dims[3]), kind, fixed)


def _dims(value: onnx.ValueInfoProto) -> Dims:
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.type.tensor_type.shape.dim]


def _integer(value: onnx.ValueInfoProto, path: str | os.PathLike[str]) -> str:
    kind = value.type.tensor_type.elem_type
    if kind not in _INTEGERS:
        raise GenerationError(
            f"{path}: {value.name} is {onnx.TensorProto.DataType.Name(kind)}, and not of whole numbers"
        )
    return _INTEGERS[kind]
