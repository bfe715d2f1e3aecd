"""Parses the builder's layer list: the `Layers:` block at the end of a VERBOSE log, one line per kernel.

That list is the judge of an export. A kernel's operand types say in which precision it computes, and its metadata
names the ONNX nodes that it carries out.
"""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict

from qcompile.errors import EngineError

# Names come from the user's graph and may hold any punctuation, so each field is found by the label that follows it.
_TENSORS = r"\[((?: \{ .*? \})?)\]"
_LINE = re.compile(
    r"^Name: (?P<name>.*), LayerType: (?P<type>[^,]*), "
    rf"Inputs: {_TENSORS}, (?:Constants: {_TENSORS}, )?Outputs: {_TENSORS}, "
    r"TacticName: (?P<tactic>[^,]*), StreamId: .*?Metadata: (?P<metadata>.*)$"
)
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[-\d, ]*)\].*?Datatype: (?P<type>[^,}]+)")
_GROUP = re.compile(r"_myl(\d+)_\d+$")

# What the stream scheduler and the shape interpreter do is no work on the GPU.
_NOT_KERNELS = frozenset({"signal", "wait", "shape_call"})
_ATTENTION = re.compile(r"^_+(?:\w*_)?f?mha_v?\d")

_PRECISION = {"FP4E2M1": "fp4", "FP8": "fp8", "Int8": "int8", "Half": "half", "BFloat16": "half", "Float": "float"}
LOW_PRECISION = ("fp4", "fp8", "int8")


class Tensor(BaseModel):
    """One operand of a kernel: its name, the builder's word for its type (`FP8`, `Half`, ...), shape (-1: dynamic)."""

    model_config = ConfigDict(frozen=True)

    name: str
    datatype: str
    shape: tuple[int, ...]


class Layer(BaseModel):
    """One entry of the layer list. `onnx_nodes`: the nodes that it carries out; `profile`: the one it was built for."""

    model_config = ConfigDict(frozen=True)

    name: str
    type: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tactic: str
    onnx_nodes: tuple[str, ...]
    profile: int = 0

    @property
    def is_kernel(self) -> bool:
        return self.type not in _NOT_KERNELS

    @property
    def is_attention(self) -> bool:
        """`_gemm_mha_v2` and `_gemv_mha_v1` (one query): a whole attention in one kernel."""
        return bool(_ATTENTION.match(self.tactic or self.name))

    @property
    def is_gemm(self) -> bool:
        return self.type == "gemm" or "Fc" in self._fused_steps()

    @property
    def is_convolution(self) -> bool:
        return self.type == "correlation" or "convolution" in self.type.lower() or "Corr" in self._fused_steps()

    @property
    def precision(self) -> str:
        """The precision in which a GEMM, convolution or attention multiplies: fp4, fp8, int8, half or float."""
        operands = [_PRECISION.get(t.datatype, "") for t in (*self.inputs, *self.constants)]
        needed = 3 if self.is_attention else 2
        if not self._casts_operands():
            for low in LOW_PRECISION:
                # An FP8 weight beside a half activation is stored in FP8, but multiplied in half.
                if operands.count(low) >= needed and any(_PRECISION.get(t.datatype) == low for t in self.inputs):
                    return low
        wide = [_PRECISION.get(t.datatype, "") for t in (*self.inputs, *self.outputs)]
        return "half" if "half" in wide else "float"

    def _fused_steps(self) -> list[str]:
        """`__myl_CastMulFcAdd_myl0_1` -> Cast, Mul, Fc, Add: a fused kernel's name lists what it does, in order."""
        match = re.match(r"__myl_([A-Za-z]+)_", self.name)
        return re.findall(r"[A-Z][a-z]*", match[1]) if match else []

    def _casts_operands(self) -> bool:
        """Whether low-precision operands are dequantized in the kernel, before its GEMM."""
        steps = self._fused_steps()
        return "Fc" in steps and "Cast" in steps[: steps.index("Fc")]


def parse_layers(text: str, profiles: int = 1) -> list[Layer]:
    """Read a `Layers:` block.

    Args:
        text: the block, from `Layers:` on; what follows the list (I/O tensors, metadata) is ignored.
        profiles: number of optimization profiles; the builder lists all kernels once for each of them.

    Raises:
        EngineError: there is no layer list, or a line of it has another form than the one known here.
    """
    _, found, body = text.partition("Layers:\n")
    if not found:
        raise EngineError("the builder printed no layer list, so nothing is known about the engine's kernels")
    layers = [_layer(line) for line in body.split("\n\n", 1)[0].splitlines() if line.startswith("Name: ")]
    return _with_profiles(layers, profiles)


def _layer(line: str) -> Layer:
    match = _LINE.match(line)
    if match is None:
        raise EngineError(f"cannot read this line of the builder's layer list, its format has changed: {line[:200]}")
    inputs, constants, outputs = match.group(3, 4, 5)
    return Layer(
        name=match["name"],
        type=match["type"],
        inputs=_tensors(inputs),
        constants=_tensors(constants or ""),
        outputs=_tensors(outputs),
        tactic=match["tactic"],
        onnx_nodes=_onnx_nodes(match["metadata"]),
    )


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name=m["name"], datatype=m["type"].strip(), shape=tuple(map(int, re.findall(r"-?\d+", m["shape"]))))
        for m in _TENSOR.finditer(text)
    )


def _onnx_nodes(metadata: str) -> tuple[str, ...]:
    """`[ONNX Layer: a]<US>[ONNX Layer: b]` -> (a, b); the entries are held apart by the ASCII unit separator."""
    entries = re.split(r"\x1f|(?<=\])(?=\[ONNX Layer: )", metadata.strip())
    return tuple(e[len("[ONNX Layer: ") : -1] for e in entries if e.startswith("[ONNX Layer: ") and e.endswith("]"))


def _with_profiles(layers: list[Layer], profiles: int) -> list[Layer]:
    """Number the layers by profile: each compiled subgraph is one `_mylN_` group, listed profile after profile."""
    if profiles == 1:
        return layers
    group = [int(m[1]) if (m := _GROUP.search(layer.name)) else 0 for layer in layers]
    ranks = {number: rank for rank, number in enumerate(sorted(set(group)))}
    return [
        layer.model_copy(update={"profile": ranks[number] * profiles // len(ranks)})
        for layer, number in zip(layers, group, strict=True)
    ]
