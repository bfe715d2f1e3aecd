"""The pipelines: each reads from top to bottom, and there is no other order.

capture -> NORMALIZE -> [sites, recipe] -> place_pipeline -> rotate_pipeline
        -> [calibration: algorithms, each with a pipeline of its own] -> quantize_pipeline -> a quantized program
of another tool's: capture -> CANONICALIZE -> place_pipeline -> [calibration] -> quantize_pipeline -> the same
        -> tensorrt_pipeline | portable_pipeline -> lowering
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch.fx import Node

from passes.canonicalize.attention_operands import MoveQuantizersToAttention
from passes.canonicalize.batch_norm import FoldBatchNormIntoScales
from passes.canonicalize.max_pool import QuantizeBehindMaxPool
from passes.canonicalize.modelopt import ModeloptToQdq
from passes.canonicalize.padding import PadBeforeQuantizers
from passes.canonicalize.pt2e import Pt2eToQdq
from passes.canonicalize.share import ShareQuantizers
from passes.canonicalize.zero_points import MoveZeroPoints
from passes.fold.constants import FoldConstants
from passes.fold.expands import ExpandsLast
from passes.fold.fixed import FoldFixed
from passes.fold.masks import FoldMasks
from passes.fold.weights import FoldWeights
from passes.formats import FP8
from passes.fuse.attention_qdq import FuseAttentionQdq
from passes.fuse.caches import StoreCaches
from passes.legalize.attention import DecomposeAttention
from passes.legalize.attention_operator import has_operator
from passes.legalize.block_activations import SpellOutBlockActivations
from passes.legalize.block_scales import SpellOutBlockScales
from passes.legalize.block_to_channel import BlocksToPerChannel
from passes.legalize.boundary import ConvertBoundary
from passes.legalize.cached_codes import AppendInFloat
from passes.legalize.choose_written import ChooseWritten
from passes.legalize.col2im import FoldToConvolution
from passes.legalize.compute_dtype import ConvertComputeDtype
from passes.legalize.flat_rows import FlattenRows
from passes.legalize.group_norm import SpellOutGroupNorm
from passes.legalize.group_queries import GroupQueries
from passes.legalize.k_split import SplitK
from passes.legalize.masked_rows import ZeroMaskedRows
from passes.legalize.measured_scales import MeasuredToConstant
from passes.legalize.picked_rows import PickedRowsToAll
from passes.legalize.scales import RoundScales
from passes.legalize.scatter_written import ScatterWritten
from passes.legalize.unfit_convolutions import LeaveUnfitConvolutions
from passes.legalize.unfused_attention import LeaveUnfusedAttention
from passes.legalize.value_width import PadHeadWidths
from passes.legalize.weight_layout import StoreWeightsTransposed
from passes.legalize.wide_sums import WideIndexedSums
from passes.lower.cpu.pipeline import cpu_pipeline
from passes.lower.cuda.pipeline import cuda_pipeline
from passes.lower.device import Device
from passes.normalize.attention import NormalizeAttention
from passes.normalize.attention_axes import AttentionToFourAxes
from passes.normalize.autocast import MaterializeAutocast
from passes.normalize.batch_norm import FoldBatchNorm
from passes.normalize.complex import ComplexToReal
from passes.normalize.computed_weights import ComputedWeightsToConstants
from passes.normalize.convolution import NormalizeConvolution
from passes.normalize.einsum import NormalizeEinsum
from passes.normalize.experts import NormalizeExperts
from passes.normalize.flags import BitsToLogic
from passes.normalize.flex_attention import SpellOutFlexAttention
from passes.normalize.gqa import UnexpandGroupedQuery
from passes.normalize.linear import NormalizeLinear
from passes.normalize.mask import NormalizeAttentionMask
from passes.normalize.masked_writes import MaskedWritesToWhere
from passes.normalize.noops import RemoveNoOps
from passes.normalize.patch_embedding import PatchEmbeddingToLinear
from passes.normalize.promotion import WriteOutPromotion
from passes.normalize.rejoin import RejoinLinears
from passes.normalize.rms_norm import NormalizeRmsNorm
from passes.normalize.routed_experts import RoutedExpertsToDense
from passes.normalize.slice_scatter import ScattersToConcat
from passes.normalize.softmax import NormalizeSoftmax
from passes.normalize.spellings import PlainSpellings
from passes.normalize.subgraphs import LeaveSubgraphs
from passes.normalize.temperature import TemperatureToQuery
from passes.normalize.views import ViewsToReshape
from passes.place.attention_scale import PlaceAttentionScale
from passes.place.head_bias import BiasPackedHeads
from passes.place.head_norms import JoinHeadNorms
from passes.place.merge_linears import MergeParallelLinears
from passes.place.packed_heads import SplitPackedHeads
from passes.place.pad_reduction import PadReduction
from passes.place.rotate import RotateLinears
from passes.place.smooth import Smoothing, SmoothLinears
from passes.places import Pipeline
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import Site

NORMALIZE = Pipeline(
    ViewsToReshape,
    RemoveNoOps,
    ComplexToReal,
    PlainSpellings,
    BitsToLogic,
    MaskedWritesToWhere,
    ScattersToConcat,
    NormalizeConvolution,
    ComputedWeightsToConstants,
    NormalizeEinsum,
    RoutedExpertsToDense,
    NormalizeExperts,
    NormalizeLinear,
    FoldBatchNorm,
    PatchEmbeddingToLinear,
    NormalizeRmsNorm,
    NormalizeSoftmax,
    SpellOutFlexAttention,
    TemperatureToQuery,
    NormalizeAttention,
    AttentionToFourAxes,
    NormalizeAttentionMask,
    UnexpandGroupedQuery,
    WriteOutPromotion,
    LeaveSubgraphs,
)
"""What models write in many ways gets one form."""

DYNAMO = Pipeline(MaterializeAutocast)
"""In front of the others for graphs that Dynamo captured."""

RESTORE = Pipeline(RejoinLinears)
"""In front of what reads a quantized program, which a user may have decomposed since: as passes wrote it."""

CANONICALIZE = Pipeline(
    ModeloptToQdq,
    Pt2eToQdq,
    *RESTORE,
    NormalizeConvolution,
    FoldBatchNormIntoScales,
    *NORMALIZE,
    PadBeforeQuantizers,
    QuantizeBehindMaxPool,
    MoveZeroPoints,
    MoveQuantizersToAttention,
    ShareQuantizers,
)
"""`NORMALIZE` for graphs that other tools have quantized: their operators become the IR, in the places of our own."""


def place_pipeline(queries: Collection[Node], blocks: Mapping[Node, int]) -> Pipeline:
    """In front of the quantizers that come: attention scales of `queries`, and of queries that are quantized already,
    where these see them, and reduction axes filled up to whole `blocks`."""
    return Pipeline(
        partial(PlaceAttentionScale, queries),
        *((partial(PadReduction, blocks),) if blocks else ()),
    )


def rotate_pipeline(linears: Collection[Node]) -> Pipeline:
    """Behind it, as only what fits then will be quantized: the linear layers that a recipe rotates."""
    return Pipeline(partial(RotateLinears, linears))


def smooth_pipeline(smoothings: Sequence[Smoothing], left: Mapping[Node, str], told: str = "") -> Pipeline:
    """Of a step of calibration: inputs of linear layers multiplied by factors that move into what is around them; the
    layers in `left` stay, with the reason. `told` is a notice for the user."""
    return Pipeline(partial(SmoothLinears, smoothings, left, told))


def quantize_pipeline(
    quantizers: Mapping[Site, Quantizer],
    softmax: Mapping[Node, torch.Tensor] | None,
    source: torch.dtype,
    target: torch.dtype,
    fully_masked: Collection[Node] = (),
) -> Pipeline:
    """Q/DQ at `quantizers`, attention fused where `softmax` has a scale (everywhere if it is None), computing in
    `target`, weights as codes; zeros for queries that see no key in the attentions of `fully_masked`."""
    return Pipeline(
        partial(ZeroMaskedRows, fully_masked),
        partial(InsertQdq, quantizers),
        partial(FuseAttentionQdq, softmax),
        *((partial(ConvertComputeDtype, source, target),) if source != target else ()),
        partial(StoreCaches, shared=softmax is None),
        FoldMasks,
        RoundScales,
        FoldWeights,
        FoldConstants,
    )


BLOCKS_TO_CHANNELS = Pipeline(BlocksToPerChannel)
"""On request in front of either of the following: no FP8 in blocks."""

TENSORRT_KERNELS = Pipeline(
    *RESTORE,
    AppendInFloat,
    ChooseWritten,
    LeaveUnfusedAttention,
    LeaveUnfitConvolutions,
    partial(FoldBatchNorm, again=True),
)
"""In front of all others for TensorRT: what it has no kernel for stays in floating point, and takes the norm behind."""

TENSORRT = Pipeline(
    partial(BlocksToPerChannel, everywhere=False),
    ComplexToReal,
    WriteOutPromotion,
    PickedRowsToAll,
    SplitPackedHeads,
    MergeParallelLinears,
    BiasPackedHeads,
    JoinHeadNorms,
    MeasuredToConstant,
    SplitK,
    SpellOutBlockActivations,
    FlattenRows,
    PadHeadWidths,
    SpellOutGroupNorm,
    FoldToConvolution,
    GroupQueries,
    partial(DecomposeAttention, unless=has_operator),
    StoreWeightsTransposed,
    FoldConstants,
    ExpandsLast,
    FoldFixed,
)
"""The forms that TensorRT fuses into the fewest kernels."""

PORTABLE = Pipeline(
    partial(AppendInFloat, [FP8.name]),
    ScatterWritten,
    partial(BlocksToPerChannel, everywhere=False),
    ComplexToReal,
    WriteOutPromotion,
    WideIndexedSums,
    MeasuredToConstant,
    SplitK,
    SpellOutBlockActivations,
    SpellOutBlockScales,
    DecomposeAttention,
    StoreWeightsTransposed,
    FoldConstants,
    ExpandsLast,
    FoldFixed,
)
"""Standard operators only, in the shape of the model."""


def boundary(io_dtype: torch.dtype | None) -> Pipeline:
    """Behind either of them: inputs and outputs in `io_dtype`; as the program has them if it is None."""
    return Pipeline() if io_dtype is None else Pipeline(partial(ConvertBoundary, io_dtype))


def torch_pipeline(device: Device, *, fast_accumulation: bool = True) -> Pipeline:
    """The IR as operators that torch runs on `device`, for Inductor to compile.

    What is left of the IR is for its references in plain ATen. `fast_accumulation` is that of `cuda_pipeline`.
    """
    on_cuda = partial(cuda_pipeline, fast_accumulation=fast_accumulation)
    return Pipeline(*(cpu_pipeline(device) if device.type == "cpu" else on_cuda(device)))


Route = Literal["quantize", "import", "tensorrt", "portable", "compile"]


def route(name: Route) -> Pipeline:
    """All passes that a run can have, in their order, without what a model gives them: for names of places."""
    quantizing = quantize_pipeline({}, None, torch.float32, torch.float16)
    edge = boundary(torch.float16)
    if name in ("quantize", "import"):
        first = NORMALIZE if name == "quantize" else CANONICALIZE
        placing = (PlaceAttentionScale, partial(PadReduction, {}), partial(RotateLinears, ()), SmoothLinears)
        return Pipeline(*first, *placing, *quantizing)
    if name == "compile":
        lowerings = (torch_pipeline(Device("cpu")), torch_pipeline(Device("cuda", (9, 0))))
        return Pipeline(*DYNAMO, *route("quantize"), *route("import"), *lowerings[0], *lowerings[1])
    kernels, target = (TENSORRT_KERNELS, TENSORRT) if name == "tensorrt" else (RESTORE, PORTABLE)
    return Pipeline(*kernels, *BLOCKS_TO_CHANNELS, *target, *edge)
