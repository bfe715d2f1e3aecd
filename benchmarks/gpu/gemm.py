"""Matrix products on their own: torch's against qcompile's, and both against what the chip can do.

Each candidate works through several copies of its operands, so that none finds them in the L2 cache; a time is that of
one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu import check
from benchmarks.gpu.chips import BYTES, Gemm, Machine
from benchmarks.gpu.compiler import Compiler, Unavailable
from benchmarks.gpu.operands import SCHEMES, Operand, Scheme, dequantize, scaled_mm
from benchmarks.gpu.reference import DTYPE

Tensors = Sequence[torch.Tensor]
Call = Callable[[], Any]
MARGIN = 6.0  # dB: the codes are the same on both sides, only the order and width of the sums differ


@dataclass(frozen=True)
class GemmVariant:
    """One way to multiply.

    Attributes:
        name: as `--variants` takes it.
        prepare: operands, compiler -> what computes the products of all copies.
        scheme: of the operands; None for bf16.
        is_rival: torch's own; one that has no kernel here is unavailable, where one of ours has failed.
        bare: the quantizing of the input is not in the time.
    """

    name: str
    prepare: Callable[[Problem, Compiler], Call]
    scheme: Scheme | None = None
    is_rival: bool = True
    bare: bool = True

    @property
    def kind(self) -> str:
        return self.scheme.kind if self.scheme else "bf16"


class Problem:
    """Operands of one shape, as many copies as do not fit into the L2 cache, and what their product is."""

    def __init__(self, gemm: Gemm, machine: Machine) -> None:
        self.gemm, self.machine = gemm, machine
        self.copies = _copies(gemm, machine)
        generator = torch.Generator(machine.device).manual_seed(2)
        draw = partial(torch.randn, generator=generator, device=machine.device)
        self.inputs = [draw(gemm.m, gemm.k).to(DTYPE) for _ in range(self.copies)]
        self.weights = [(draw(gemm.n, gemm.k) * gemm.k**-0.5).to(DTYPE) for _ in range(self.copies)]
        self.exact = self.inputs[0].float() @ self.weights[0].float().t()

    def operands(self, scheme: Scheme) -> list[tuple[Operand, Operand]]:
        pairs = zip(self.inputs, self.weights, strict=True)
        return [(scheme.input(x), scheme.weight(weight)) for x, weight in pairs]

    def judge(self, found: torch.Tensor, scheme: Scheme | None) -> check.Verdict:
        """Of the product of the first copy."""
        if scheme is None:
            return check.against_exact([found], [self.exact], [self.exact.to(DTYPE)])
        a, b = scheme.input(self.inputs[0]), scheme.weight(self.weights[0])
        product = a.dequantized() @ b.dequantized().t()
        return check.against_program([found], [product], [self.exact], MARGIN)


def _copies(gemm: Gemm, machine: Machine) -> int:
    if not machine.l2_bytes:
        return 1
    operands = (gemm.m + gemm.n) * gemm.k * min(BYTES.values())
    return min(32, max(4, -(-2 * machine.l2_bytes // int(operands))))


def _each(calls: Sequence[Call]) -> Call:
    return lambda: [call() for call in calls]


def _mm(problem: Problem, _: Compiler) -> Call:
    pairs = zip(problem.inputs, problem.weights, strict=True)
    return _each([partial(torch.mm, x, weight.t()) for x, weight in pairs])


def _rival(scheme: Scheme, fast: bool, problem: Problem, _: Compiler) -> Call:
    return _each([scaled_mm(scheme, a, b, fast=fast) for a, b in problem.operands(scheme)])


class _Linears(nn.Module):
    """One linear layer for each copy, with inputs of their own."""

    def __init__(self, weights: Tensors) -> None:
        super().__init__()
        rows, columns = weights[0].shape
        self.linears = nn.ModuleList(nn.Linear(columns, rows, bias=False, device="meta") for _ in weights)
        for linear, weight in zip(self.linears, weights, strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [linear(x) for linear, x in zip(self.linears, inputs, strict=True)]


def _linear(scheme: Scheme, problem: Problem, compiler: Compiler) -> Call:
    """qcompile's linear layer: quantize and multiply."""
    import qcompile

    model, inputs = _Linears(problem.weights), tuple(problem.inputs)
    options: dict[str, Any] = {"recipe": scheme.recipe}
    if scheme.static:
        options["calibration"] = qcompile.calibrate(model, inputs, recipe=scheme.recipe, calibration=[inputs])
    return partial(compiler.quantized(model, **options), *inputs)


class _Products(nn.Module):
    """The same with inputs that are codes and scales already, in the operators of a quantized program."""

    def __init__(self, pairs: Sequence[tuple[Operand, Operand]]) -> None:
        super().__init__()
        self.input_format, self.weight_format = pairs[0][0].format, pairs[0][1].format
        self.has_global = pairs[0][0].global_scale is not None
        for index, (a, b) in enumerate(pairs):
            for prefix, operand in (("input", a), ("weight", b)):
                if prefix == "weight":
                    self.register_buffer(f"codes_{index}", operand.codes)
                    self.register_buffer(f"scale_{index}", operand.scale)
                if operand.global_scale is not None:
                    self.register_buffer(f"{prefix}_global_{index}", operand.global_scale)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        products = []
        for index in range(len(inputs) // 2):
            globals = [getattr(self, f"{p}_global_{index}") if self.has_global else None for p in ("input", "weight")]
            x = dequantize(inputs[2 * index], inputs[2 * index + 1], globals[0], self.input_format, DTYPE)
            codes, scale = getattr(self, f"codes_{index}"), getattr(self, f"scale_{index}")
            products.append(F.linear(x, dequantize(codes, scale, globals[1], self.weight_format, DTYPE)))
        return products


def _bare(scheme: Scheme, problem: Problem, compiler: Compiler) -> Call:
    """qcompile's product of codes that are there, scales in the type and layout that a kernel before it would write."""
    pairs = problem.operands(scheme)
    inputs = [tensor for a, _ in pairs for tensor in (a.codes, a.laid_out_scale())]
    return partial(compiler.quantized(_Products(pairs)), *inputs)


def _variants() -> Iterator[GemmVariant]:
    yield GemmVariant("mm-bf16", _mm)
    for scheme in SCHEMES:
        yield GemmVariant(f"scaled_mm-{scheme.name}", partial(_rival, scheme, False), scheme)
        if scheme.name in ("tensor", "row"):
            yield GemmVariant(f"scaled_mm-{scheme.name}-fast", partial(_rival, scheme, True), scheme)
        yield GemmVariant(f"qcompile-{scheme.name}-bare", partial(_bare, scheme), scheme, is_rival=False)
        yield GemmVariant(f"qcompile-{scheme.name}", partial(_linear, scheme), scheme, is_rival=False, bare=False)


BASELINE = "mm-bf16"
VARIANTS = tuple(_variants())


def prepare(variant: GemmVariant, problem: Problem, compiler: Compiler) -> Call:
    """What `variant` computes all products by. Raises `Unavailable` where this device has no such kernel."""
    capability, scheme = problem.machine.capability, variant.scheme
    if capability and scheme and capability < scheme.capability:
        raise Unavailable(f"needs compute capability {scheme.capability[0]}.{scheme.capability[1]}")
    call = variant.prepare(problem, compiler)
    try:
        call()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if variant.is_rival:
            raise Unavailable(str(error).partition("\n")[0]) from error
        raise
    return call
