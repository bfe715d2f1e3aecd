"""What multiplies which formats, from which device on: recipes, lowerings, prechecks and reports ask here.

What no row lists is multiplied by nothing: a format is never taken for one that is similar. Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from passes.formats import (
    FP8,
    FP8_1X128,
    FP8_128X128,
    FP8_PER_TOKEN,
    INT4_COLUMNS,
    INT4_GROUPS,
    INT8,
    INT8_PER_TOKEN,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
)

__all__ = [
    "CONVOLUTIONS",
    "FUSED_ATTENTION",
    "HOPPER",
    "PRODUCTS",
    "UNITS",
    "WEIGHT_ONLY",
    "Capability",
    "Convolutions",
    "FusedAttention",
    "Product",
    "Units",
    "converts",
    "inputs_of",
    "is_plain_depthwise",
    "multiplies",
    "products_in_words",
]

Capability = tuple[int, int]
"""Compute capability of a CUDA device: (9, 0) for Hopper."""


@dataclass(frozen=True)
class Units:
    """What has arithmetic for the codes of a family of formats, or for a dtype.

    Attributes:
        name: in a sentence.
        tensorrt: the least target that TensorRT builds it for, as in sm89; 0 for all, None for none.
        targets: some of them, in words.
        cuda: the first capability whose matrix units torch's operators use for it; None where no operator does.
        triton: the first on which Triton, and so Inductor, converts the codes and what their scales are stored in.
        onnxruntime: some provider of ONNX Runtime has kernels for it.
    """

    name: str
    tensorrt: int | None
    targets: str
    cuda: Capability | None
    triton: Capability
    onnxruntime: bool

    def on(self, capability: Capability | None) -> bool:
        """Whether torch's operators use it on a CUDA device of that capability; None is another kind of device."""
        return None not in (capability, self.cuda) and capability >= self.cuda  # type: ignore[operator]


# TensorRT-RTX 1.7.1: one tensor of a type that a target lacks, a weight that is only dequantized included, and the
# builder says "Cannot compile for target(s) ...". INT8 builds for every target; below 8.0 it is not known to be fast.
UNITS: Mapping[str, Units] = {
    "nvfp4": Units("FP4", 100, "sm120 or sm121", (10, 0), (8, 9), onnxruntime=False),
    "fp8": Units("FP8", 89, "sm89 or sm120", (8, 9), (8, 9), onnxruntime=True),
    "int8": Units("INT8", 0, "any", (8, 0), (0, 0), onnxruntime=True),
    "mxfp8": Units("MXFP8", None, "none", None, (8, 9), onnxruntime=False),
    "mxfp4": Units("MXFP4", None, "none", None, (0, 0), onnxruntime=False),
    "int4": Units("INT4", 0, "any", None, (0, 0), onnxruntime=True),
    "bfloat16": Units("bfloat16", 80, "sm86 or newer", (8, 0), (8, 0), onnxruntime=True),
    "float16": Units("float16", 0, "any", (0, 0), (0, 0), onnxruntime=True),
    "float32": Units("float32", 0, "any", (0, 0), (0, 0), onnxruntime=True),
}
"""Family of formats, or dtype -> what has it."""


@dataclass(frozen=True)
class Product:
    """A weight and an input that some target multiplies as codes.

    TensorRT does it wherever it has the family: scales of tokens become constants first, and products in blocks a sum.

    Attributes:
        cuda: the capabilities, from and below, on which an operator of torch does; None: wherever the units are.
    """

    weight: Format
    input: Format
    cuda: tuple[Capability, Capability] | None = None

    def on(self, capability: Capability | None) -> bool:
        """Whether an operator of torch takes both as codes on a CUDA device; None is another kind of device."""
        if capability is None:
            return False
        if self.cuda is not None:
            return self.cuda[0] <= capability < self.cuda[1]
        return UNITS[self.weight.family].on(capability)


HOPPER: tuple[Capability, Capability] = ((9, 0), (10, 0))
"""What has cuBLAS's products in blocks of 128, and torch's grouped ones."""

PRODUCTS = (
    Product(FP8, FP8),
    Product(FP8, FP8_PER_TOKEN),
    Product(FP8_128X128, FP8_1X128, cuda=HOPPER),
    Product(INT8, INT8),
    Product(INT8, INT8_PER_TOKEN),
    Product(NVFP4, NVFP4),
    Product(MXFP8, MXFP8),
    Product(MXFP4, MXFP4),
)
"""Every pair that is multiplied, those of MXFP8 and MXFP4 by servers of checkpoints alone. Another one TensorRT
computes in half precision, crashes at, or miscompiles."""

WEIGHT_ONLY = (*INT4_GROUPS.values(), *INT4_COLUMNS.values())
"""Weights that are multiplied with inputs in floating point alone: one kernel of TensorRT unpacks and multiplies."""


def inputs_of(weight: Format) -> tuple[Format, ...]:
    """The formats of inputs that some target multiplies `weight` with; none for a format that is not listed."""
    return tuple(product.input for product in PRODUCTS if product.weight == weight)


def products_in_words() -> str:
    """`fp8 x fp8 or fp8_per_token; ...`, weight x input."""
    weights = dict.fromkeys(product.weight for product in PRODUCTS)
    return "; ".join(f"{weight.name} x {' or '.join(x.name for x in inputs_of(weight))}" for weight in weights)


def multiplies(capability: Capability | None, fmt: Format) -> bool:
    """Whether some matrix product of torch takes codes of `fmt` on a CUDA device of that capability."""
    return any(fmt in (product.weight, product.input) and product.on(capability) for product in PRODUCTS)


def converts(capability: Capability | None, fmt: Format) -> bool:
    """Whether Triton converts codes and scales of `fmt` on a CUDA device of that capability."""
    units = UNITS.get(fmt.family)
    return units is not None and capability is not None and capability >= units.triton


@dataclass(frozen=True)
class FusedAttention:
    """What TensorRT's fused attention takes in one format.

    An attention that is quantized beyond that runs as two products and a softmax with quantizers between them: more
    kernels than in half precision, where one kernel does it all. With one query that kernel reads half precision in any
    case. Observed with the builder of TensorRT-RTX 1.7.1, alike for SM89 and SM120, with a scale for each of q, k, v
    and the probabilities.

    Attributes:
        name: of the format, in a sentence.
        least_queries, least_keys, most_keys: the lengths.
        widths: of a head; other keys and values than these it does not take.
        reader: the dtypes of the program in which the next reader of the output has to be a quantizer of this format.
    """

    name: str
    least_queries: int
    least_keys: int
    most_keys: float
    widths: Collection[int]
    reader: Collection[str]

    def unfit_width(self, width: int | None) -> str | None:
        """Why heads of `width` have no kernel; None for one that has, or that is not known."""
        if width is None or width in self.widths:
            return None
        known = f"at most {max(self.widths)}" if isinstance(self.widths, range) else ", ".join(map(str, self.widths))
        return f"head dimension {width}, and fused {self.name} attention takes {known}"

    def unfit_length(self, queries: float | None, keys: float | None) -> str | None:
        """Why `queries` and `keys` of that number have no kernel; None if they have, or are not known."""
        fused = f"fused {self.name} attention"
        if keys is not None and keys < self.least_keys:
            return f"its key sequence can be as short as {keys}, and {fused} needs at least {self.least_keys}"
        if keys is not None and keys > self.most_keys:
            longest = f"as long as {keys}" if keys < math.inf else "of any length"
            return f"its key sequence can be {longest}, and {fused} takes at most {self.most_keys}"
        if queries is not None and queries < self.least_queries:
            return f"it can have {queries} query, and {fused} needs at least {self.least_queries}"
        return None


FUSED_ATTENTION: Mapping[str, FusedAttention] = {
    "fp8": FusedAttention("FP8", 2, 32, math.inf, range(1, 257), ("float32",)),
    "int8": FusedAttention("INT8", 2, 1, 512, (16, 32, 64), ("float16", "bfloat16", "float32")),
}
"""Format -> what is fused in it; others are not."""


@dataclass(frozen=True)
class Convolutions:
    """Which convolutions TensorRT computes on codes of one format.

    Others it runs in half precision, and keeps the quantizers round them: more kernels than without. Observed with the
    builder of TensorRT-RTX 1.7.1, for one to three dimensions, strided, dilated and grouped alike, with one scale for
    the input and one, or one for each channel, for the weight. None is transposed.

    Attributes:
        name: of the format, in a sentence.
        most_taps: the largest kernel, in elements of one channel.
        depthwise: a larger kernel that is taken, and the least target that does (as in sm120), where each channel has
            one of its own and strides and dilations are 1.
    """

    name: str
    most_taps: float
    depthwise: tuple[tuple[int, ...], int] | None = None

    def unfit(self, kernel: Sequence[int], plain_depthwise: bool, target: int | None = None) -> str | None:
        """Why a convolution with a `kernel` of that size has none on `target`, or on any; None for one that has."""
        taps, where = math.prod(kernel), ""
        if taps <= self.most_taps:
            return None
        if plain_depthwise and self.depthwise is not None and self.depthwise[0] == tuple(kernel):
            least = self.depthwise[1]
            if target is None or target >= least:
                return None
            where = f", but for this one on sm{least} or newer"
        others = " or ".join(other.name for other in CONVOLUTIONS.values() if taps <= other.most_taps)
        size = "x".join(map(str, kernel))
        return (
            f"{self.name} convolutions have kernels of at most {self.most_taps} elements{where}, and this one has"
            f" {size}: give it {others}"
        )


def is_plain_depthwise(weight: Sequence[int], groups: int, steps: Iterable[int]) -> bool:
    """Whether each channel has a kernel of its own, by the shape `[O, C / groups, ...]` of the weight, and `steps`, the
    strides and dilations, are 1."""
    return weight[1] == 1 and groups == weight[0] and set(steps) <= {1}


CONVOLUTIONS: Mapping[str, Convolutions] = {
    "fp8": Convolutions("FP8", 32, ((7, 7), 120)),
    "int8": Convolutions("INT8", math.inf),
}
"""Format -> what convolves it; others do not, with scales of blocks or tokens neither."""
