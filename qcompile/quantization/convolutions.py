"""Which convolutions a recipe can have quantized: what no target runs is left, with the reason and what would help."""

from __future__ import annotations

from collections.abc import Mapping

from passes.capabilities import CONVOLUTIONS
from passes.legalize.unfit_convolutions import unfit_convolution
from passes.quantize.sites import Site
from passes.roofline import LEAST_GAIN, Roofline
from qcompile.schemes.config import QuantizerConfig, format_of

__all__ = ["idle", "unfit"]


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
        which: `all`, `where_it_pays` or `none`.
    """
    convolutions = {site: config for site, config in configs.items() if site.operator.kind == "convolution"}
    if which == "none":
        return dict.fromkeys(convolutions, "the recipe has `convolutions: none`")
    found: dict[Site, str] = {}
    for site, config in convolutions.items() if which == "where_it_pays" else ():
        if site.operand != "weight":
            continue
        roofline, per_channel = Roofline.of(site.consumer), config.granularity == "per_channel"
        if roofline.gain(per_channel) < LEAST_GAIN:
            found[site] = (
                f"it would not pay: {2 * roofline.products:.3g} operations, {roofline.intensity:.3g} for each byte, by"
                f" the roofline {roofline.gain(per_channel):.2f} times as fast as in half precision, with the kernel"
                " that quantizes its input; `convolutions: all` has it quantized"
            )
    return found
