"""How one quantizer quantizes: its format in the IR, what it is multiplied with, and what cannot run yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from passes.capabilities import inputs_of, products_in_words
from passes.formats import Format, get_format
from qcompile.schemes.words import BLOCK_FORMATS, Granularity, find_word, is_known


@dataclass(frozen=True)
class QuantizerConfig:
    """How one quantizer quantizes. Two configs are equal if they do the same, whichever rule they came from.

    Attributes:
        format: "fp8", "int8", "int4", "nvfp4" or "mxfp8".
        granularity: what shares one scale.
        block_shape: rows and columns of a block, only with `per_block`.
        dynamic: scales are computed at run time; for nvfp4 those of the blocks, under a constant global scale that is
            calibrated.
        rotate: a Hadamard rotation comes first, on both operands of the linear.
        constant_amax: the largest magnitude that the constant scale is for, where the recipe says it.
        source: file:line of the rule that gave the format, and of the one that switched it on again.
    """

    format: str
    granularity: Granularity = "per_tensor"
    block_shape: tuple[int, int] | None = None
    dynamic: bool = False
    rotate: bool = False
    constant_amax: float | None = None
    source: str = field(default="", compare=False)

    @property
    def layout(self) -> str:
        """The format as messages call it: nvfp4, fp8 per_tensor, fp8 per_block [128, 128]."""
        if self.format in BLOCK_FORMATS:
            return self.format
        block = f" {list(self.block_shape)}" if self.block_shape else ""
        return f"{self.format} {self.granularity}{block}"


def format_of(config: QuantizerConfig) -> Format:
    """The format that the IR carries `config` out with."""
    word = find_word(config.format, config.granularity, config.block_shape)
    return get_format(config.format) if word is None else word.ir


def unsupported(config: QuantizerConfig) -> str | None:
    """What this version cannot run although the recipe schema carries it, as one sentence, or None."""
    word = find_word(config.format, config.granularity, config.block_shape)
    if not is_known(config.format):
        reason = f"format {config.format}: no back end multiplies it; use fp8 or nvfp4"
    elif config.granularity == "per_block" and (word is None or config.dynamic not in word.dynamic):
        reason = f"per_block {config.format} with block_shape {list(config.block_shape or ())}"
    elif config.dynamic and config.granularity == "per_tensor":
        reason = f"dynamic {config.granularity} scales; use `granularity: per_token` or leave out `dynamic`"
    else:
        return None
    return f"{config.source or 'recipe'}: not supported yet: {reason}"


def mismatch(weight: QuantizerConfig, activation: QuantizerConfig) -> str | None:
    """Why no target multiplies a weight and an input that are quantized so, or None.

    TensorRT computes such products in half precision, crashes, or miscompiles them (an FP8 weight in blocks with an
    input that has one scale). What cannot run at all is left to `unsupported`.
    """
    if _is_multiplied(weight, activation):
        return None
    return (
        f"no target multiplies a weight in {weight.layout} with an input in {activation.layout}"
        f" (weight: {weight.source}; input: {activation.source}). There are, weight x input: {products_in_words()}; and"
        " each weight with an input that is not quantized"
    )


def attention_mismatch(left: tuple[str, QuantizerConfig], right: tuple[str, QuantizerConfig]) -> str | None:
    """Why no target multiplies two operands of an attention, each with its name, that are quantized so, or None."""
    (name, config), (other, second) = left, right
    if _is_multiplied(second, config):
        return None
    return (
        f"no target multiplies {name} in {config.layout} with {other} in {second.layout} ({name}: {config.source};"
        f" {other}: {second.source}): give both one format"
    )


def _is_multiplied(weight: QuantizerConfig, activation: QuantizerConfig) -> bool:
    """Whether some target multiplies the two, or whether one of them cannot run at all, which is said elsewhere."""
    if unsupported(weight) or unsupported(activation):
        return True
    return format_of(activation) in inputs_of(format_of(weight))
