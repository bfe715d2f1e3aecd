"""One entry of the builder's layer list: its operands, what it computes and in which precision.

That list is the judge of an export. A kernel's operand types say in which precision it computes, and its metadata
names the ONNX nodes that it carries out.
"""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict

OTHER = "other"
"""The type of an entry that could not be read; its name is the whole of its text."""

# What the stream scheduler and the shape interpreter do is no work on the GPU, nor is handing over sizes to it.
_NOT_KERNELS = frozenset({"signal", "wait", "shape_call", "ShapeHostToDevice"})
_ATTENTION = re.compile(r"^_+(?:\w*_)?f?mha_v?\d")

_PRECISION = {"FP4E2M1": "fp4", "FP8": "fp8", "Int8": "int8", "Half": "half", "BFloat16": "half", "Float": "float"}
LOW_PRECISION = ("fp4", "fp8", "int8", "int4")


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
        """Whether it runs on the GPU. What could not be read may be a kernel, and is taken for one."""
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
        """The precision in which a GEMM, convolution or attention multiplies: fp4, fp8, int8, half or float.

        A GEMM that unpacks the INT4 codes of its weight itself is int4, whatever it multiplies in. An attention of one
        query is what it reads keys and values in, as these are what it spends its time on: the query may be half.
        """
        if self.is_gemm and any(t.datatype == "Int4" for t in self.constants):
            return "int4"
        operands = [_PRECISION.get(t.datatype, "") for t in (*self.inputs, *self.constants)]
        needed = 3 if self.is_attention and "gemv" not in (self.tactic or self.name) else 2
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
