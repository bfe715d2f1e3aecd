"""Which convolutions a recipe can have quantized: what no target runs is left, with the reason and what would help."""

from __future__ import annotations

from passes.capabilities import CONVOLUTIONS
from passes.legalize.unfit_convolutions import unfit_convolution
from passes.quantize.sites import Site
from qcompile.schemes.config import QuantizerConfig, format_of

__all__ = ["unfit"]


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
