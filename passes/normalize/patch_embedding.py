"""A convolution that cuts an image into patches becomes a matrix product."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.capabilities import CONVOLUTIONS
from passes.constants import add_constant, constant, is_constant_expression
from passes.formats import FP8
from passes.graph import Emitter, argument, aten, calls, is_call, only_user, shape, swaps_last_two
from passes.ir import DEQUANTIZE, QUANTIZE


class PatchEmbeddingToLinear(Pass):
    """Rewrite a convolution whose windows do not overlap as reshape, transpose and `aten.linear`.

    Before:
        y = convolution(x, w[N,C,p,q], bias, [p, q], ...)                 # [B,N,H/p,W/q]
        z = transpose(view(y, [B,N,L]), 1, 2)                             # as vision transformers go on
    After:
        patches = view(permute(view(x, [B,C,H/p,p,W/q,q]), [0,2,4,1,3,5]), [B,L,C*p*q])
        z = linear(patches, view(w, [N,C*p*q]), bias)                     # [B,L,N]
        y = view(transpose(z, 1, 2), [B,N,H/p,W/q])                       # for other users only

    Requires: weights as `get_attr`, or behind a quantizer with a scale for all or each channel; `ViewsToReshape` and
        `NormalizeConvolution` ran.
    Ensures: the same sums of products, in another order. Quantizers of one scale move behind the rearrangement.
    Declines when: the image is not a whole number of patches, or its height or width is dynamic. Convolutions whose
        windows overlap, those of single pixels, and those of small patches that nothing reads as tokens, are not
        looked at: they belong to convolutional networks.
    Why: TensorRT runs a convolution of three channels in half precision and this form as an FP8 GEMM (the shape of the
        patch embedding makes it the first of a ViT's 49), and no convolution of more than 32 pixels in FP8 at all. In
        ConvNeXt, which goes on with the image, its patches of 4 x 4 and 2 x 2 are better as convolutions: 122 kernels
        for 130 in FP8 on SM120.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.convolution.default):
            x, weight = argument(node, "input"), argument(node, "weight")
            if not is_constant_expression(_quantized_from(weight)) or not is_patchwise(node, weight):
                continue
            if shape(weight)[2:].numel() <= CONVOLUTIONS[FP8.name].most_taps and not any(_tokens(node)):
                continue
            height, width = shape(x)[-2:]
            kernel = shape(weight)[-2:]
            if not (isinstance(height, int) and isinstance(width, int)):
                self.decline("the image's height or width is dynamic, so the patches cannot be counted", node)
            elif height % kernel[0] or width % kernel[1]:
                self.decline(
                    f"an image of {height}x{width} is not a whole number of {kernel[0]}x{kernel[1]} patches", node
                )
            else:
                self._rewrite(gm, node, x, weight)
                self.fire()

    def _rewrite(self, gm: GraphModule, node: Node, x: Node, weight: Node) -> None:
        emit = Emitter(node)
        batch, channels = emit.sizes(x)[:2]
        features, _, p, q = shape(weight)
        rows, columns = shape(x)[-2] // p, shape(x)[-1] // q
        pixels = _quantized_from(x) if _is_per_tensor(x) else x
        split = emit(aten.reshape.default, pixels, [batch, channels, rows, p, columns, q])
        ordered = emit(aten.permute.default, split, [0, 2, 4, 1, 3, 5])
        patches = emit(aten.reshape.default, ordered, [batch, rows * columns, shape(weight)[1:].numel()])
        if pixels is not x:
            patches = _quantized_like(gm, x, patches, emit)
        matrix = emit(aten.reshape.default, _quantized_from(weight), [features, shape(weight)[1:].numel()])
        if is_call(weight, DEQUANTIZE):
            matrix = _quantized_like(gm, weight, matrix, emit)
        tokens = emit(aten.linear.default, patches, matrix, argument(node, "bias"))
        for flat, transpose in _tokens(node):
            transpose.replace_all_uses_with(tokens)
            transpose.graph.erase_node(transpose)
            flat.graph.erase_node(flat)
        if node.users:
            image = emit(aten.transpose.int, tokens, 1, 2)
            node.replace_all_uses_with(emit(aten.reshape.default, image, [batch, features, rows, columns]))


def _quantized_from(node: Node) -> Node:
    """What `node` is the dequantized form of: a float tensor, or codes that are stored; `node` itself if of nothing."""
    if not is_call(node, DEQUANTIZE):
        return node
    codes = node.args[0]
    source = codes.args[0] if is_call(codes, QUANTIZE) else codes  # type: ignore[union-attr]
    assert isinstance(source, Node)
    return source


def _is_per_tensor(node: Node) -> bool:
    return is_call(node, DEQUANTIZE) and is_call(node.args[0], QUANTIZE) and not shape(node.args[1])  # type: ignore[arg-type]


def _quantized_like(gm: GraphModule, pair: Node, source: Node, emit: Emitter) -> Node:
    """`source`, rearranged from what `pair` quantizes, quantized as there; scales of channels are `[N, 1]` now."""
    codes, scale_node = pair.args
    assert isinstance(codes, Node) and isinstance(scale_node, Node)
    scale = constant(gm, scale_node)
    assert scale is not None
    if scale.ndim:
        scale_node = add_constant(gm, str(scale_node.target), scale.reshape(-1, 1), emit.before)
    if is_call(codes, QUANTIZE):
        source = emit(QUANTIZE, source, scale_node, **codes.kwargs)
    return emit(DEQUANTIZE, source, scale_node, **pair.kwargs)


def is_patchwise(node: Node, weight: Node) -> bool:
    """Whether the windows of the convolution lie side by side."""
    kernel = list(shape(weight)[2:])
    return (
        len(kernel) == 2
        and list(argument(node, "stride")) == kernel != [1, 1]
        and not any(argument(node, "padding"))
        and all(d == 1 for d in argument(node, "dilation"))
        and argument(node, "groups") == 1
        and not argument(node, "transposed")
    )


def _tokens(image: Node) -> list[tuple[Node, Node]]:
    """(reshape, transpose) of each reader that takes the image as tokens: [B,N,H,W] -> [B,N,H*W] -> [B,H*W,N]."""
    found = [(flat, only_user(flat)) for flat in image.users if _flattens(flat, image)]
    return [(flat, user) for flat, user in found if user is not None and swaps_last_two(user)]


def _flattens(flat: Node, image: Node) -> bool:
    """Whether `flat` is `image` with height and width joined: [B,N,H,W] -> [B,N,H*W]."""
    return is_call(flat, aten.reshape.default) and len(shape(flat)) == 3 and shape(flat)[:2] == shape(image)[:2]
