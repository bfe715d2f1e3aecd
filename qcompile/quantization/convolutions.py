"""Which convolutions a recipe can have quantized: what no target runs is left, with the reason and what would help."""

from __future__ import annotations

from collections.abc import Mapping

from passes.capabilities import CONVOLUTIONS
from passes.legalize.unfit_convolutions import unfit_convolution
from passes.operators import added_convolution
from passes.quantize.sites import Site
from qcompile.quantization.paying import unpaid
from qcompile.schemes.config import QuantizerConfig, format_of

__all__ = ["idle", "unadded", "unfit"]


def unfit(site: Site, config: QuantizerConfig) -> str | None:
    """Why no target runs the convolution of `site` with `config`; None for one that some does, and for others."""
    if site.operator.gemm or "weight" not in site.operator.operands:
        return None
    fmt = format_of(config)
    where = f" ({config.source})" if config.source else ""
    if fmt.name not in CONVOLUTIONS:
        known = " or ".join(CONVOLUTIONS)
        return (
            f"no target convolves {config.layout}{where}: give convolutions {known} with one scale for the input, and"
            " one, or one for each channel, for the weight"
        )
    if config.rotate:
        return f"`rotate`{where} is for linear layers: give convolutions a rule without it"
    return unfit_convolution(site.consumer, fmt)


def idle(configs: Mapping[Site, QuantizerConfig], which: str) -> dict[Site, str]:
    """The quantizers of convolutions that `convolutions: {which}` of a recipe leaves out -> why.

    Args:
        configs: of what could be quantized. which: `all`, `where_it_pays` or `none`.
    """
    convolutions = {site: config for site, config in configs.items() if site.operator.kind == "convolution"}
    if which == "none":
        return dict.fromkeys(convolutions, "the recipe has `convolutions: none`")
    return unpaid(convolutions) if which == "where_it_pays" else {}


def unadded(site: Site, kept: Mapping[Site, QuantizerConfig], config: QuantizerConfig) -> str | None:
    """Why quantizing the skip branch at `site` would save nothing; None where it does, and for other operands.

    A convolution on INT8 with a scale for each channel has a pointwise kernel behind it, which adds, quantizes for the
    next convolution, and writes the sum in half precision once more for the next add: less where that reads the codes.
    ResNet-18 has 40 kernels for 41. With one scale, or in FP8, the convolution itself adds what is in half precision,
    and codes are dequantized in front of it: 44 for 41. (TensorRT-RTX 1.7.1, SM89 and SM120.)

    Args:
        kept: the quantizers of layers that are not left out. config: of the skip branch.
    """
    if site.operand != "residual" or site.index is None:
        return None
    convolution = added_convolution(site.consumer.args[1 - site.index])
    own = {s.operand: c for s, c in kept.items() if s.consumer is convolution}
    if {operand for operand, c in own.items() if c.format == config.format} < {"input", "weight"}:
        return f"the convolution whose result it is added to is not quantized to {config.format}"
    if config.format != "int8" or own["weight"].granularity != "per_channel":
        return "only a convolution on INT8 with a scale for each channel is added in a kernel that takes codes"
    same = (s for s, c in kept.items() if s.operand == "input" and s.tensor is site.tensor)
    if all(kept[s].layout != config.layout for s in same):
        return "no convolution reads it on codes, so that these would be one more tensor"
    return None
