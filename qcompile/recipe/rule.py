"""One rule of a recipe: which quantizers, and either a format or a switch; what fits together is checked here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from qcompile.messages import value
from qcompile.recipe.globs import (
    ATTENTION,
    CACHES,
    INPUT,
    LONGEST_GLOB,
    SOFTMAX,
    WEIGHT,
    GlobError,
    alternatives,
    possible_kinds,
)
from qcompile.schemes.strict import Strict
from qcompile.schemes.words import BLOCK_FORMATS, GROUP_SIZES, WEIGHT_FORMATS, FormatName, Granularity, block_of

SHIPPED = "qcompile/recipe/builtin/"
"""What the shipped files are called in messages begins with this."""


@dataclass(frozen=True)
class Location:
    """Where a rule was written. All locations compare equal, so a recipe's value does not depend on its file."""

    file: str = field(default="recipe", compare=False)
    line: int | None = field(default=None, compare=False)
    note: str = field(default="", compare=False)
    """What changed the rule since, such as a `--set`."""

    @property
    def shipped(self) -> bool:
        """Whether this is a file of ours, not of the user's."""
        return self.file.startswith(SHIPPED)

    def foreign_to(self, other: Location) -> bool:
        """Whether this is another file than `other`; what is written in Python, or with `--set`, has no line."""
        if self.shipped:
            return not other.shipped
        return None not in (self.line, other.line) and self.file != other.file

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place} ({self.note})" if self.note else place


class Rule(Strict):
    """One rule: which quantizers, and either a format or a switch. Later rules win."""

    quantizer: Annotated[str, Field(min_length=1)]
    """Case-sensitive glob over the quantizer's full name (`*`, `?`, `[qk]`, `{mlp,ffn}`); `*` also matches dots, and a
    leading `*.` also matches at the start, so `*.head.*` finds `head.weight_quantizer` and `a.head.weight_quantizer`.

    A name is the path of a module and one of `input_quantizer`, `weight_quantizer` (linear layers, experts
    and convolutions), `output_quantizer` (these and norms), `residual_quantizer` (what is added to the result of a
    convolution), `q_bmm_quantizer`, `k_bmm_quantizer`, `v_bmm_quantizer` and `softmax_bmm_quantizer` (attention). The
    key/value cache of a checkpoint is what k_bmm and v_bmm are: FP8 if `*.[kv]_bmm_quantizer` is.

    A number with a minus counts from the end of its stack of blocks, as a model's names have it: `*layers.-1.*` is the
    last block of each stack called layers, `decoder.layers.-1.*` that of one, `*layers.-[1-4].*` the last four.
    """
    unless: Annotated[str, Field(min_length=1)] | None = None
    """Glob of the same kind: what it matches is left to the other rules although `quantizer` matches it, too. A head
    called fc, and not one inside a block: `{quantizer: "*.fc.*", unless: "*.layers.*", enable: false}`."""
    module_class: Annotated[str, Field(min_length=1)] | None = None
    """Glob over the owning module's class: its qualified name or the last component (`Embedding`, `*Router`)."""
    operator: Literal["linear", "experts", "convolution", "attention", "norm", "residual", "cache"] | None = None
    """What the quantizer belongs to, by what it is in the graph: a convolution that cuts an image into patches is
    rewritten as a `linear` there, whatever its class."""
    enable: bool | None = None
    """`false` switches off; `true` switches on again with the format that an earlier rule gave."""
    format: FormatName | None = None
    """Number format of the codes."""
    granularity: Granularity | None = None
    """What shares one scale. Default: `per_tensor`, for int4, nvfp4 and mxfp8 the blocks of the format."""
    block_shape: Annotated[tuple[int, int], Field(strict=False)] | None = None
    """[rows, columns] of a block; only with `per_block`. nvfp4 has [1, 16] and mxfp8 [1, 32] without saying so."""
    group_size: int | None = None
    """How many elements of a row of an int4 weight share a scale: 32, 64 or 128, which is the default."""
    dynamic: bool | None = None
    """Scales of activations are computed at run time. Default: false, for nvfp4 and mxfp8 activations true. For nvfp4
    these are the scales of the blocks; the global scale above them is constant and needs calibration data."""
    constant_amax: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)] | None = None
    """The largest magnitude of an activation, where it is to be this number and not what calibration sees: 448 is the
    scale 1 in fp8, 2688 the global scale 1 in nvfp4. What is larger saturates."""
    rotate: bool = False
    """Rotate by a Hadamard matrix first, the weight and the activation of a linear both. A rule for weights alone
    rotates the activation too, without quantizing it."""
    why: Annotated[str, Field(min_length=1)] | None = None
    """The reason, for the report: it is shown with what the rule decided."""

    _where: Location = PrivateAttr(default_factory=Location)

    @property
    def where(self) -> Location:
        """File and line of this rule."""
        return self._where

    def located(self, place: Location) -> Rule:
        """The same rule, which says that it was written at `place`."""
        copy = self.model_copy()
        copy._where = place
        return copy

    @model_validator(mode="after")
    def _consistent(self) -> Rule:
        for key, pattern in (("quantizer", self.quantizer), ("unless", self.unless or "")):
            try:
                globs = alternatives(pattern)
            except GlobError as error:
                raise wrong(key, str(error)) from error
            if any(brace in glob for glob in globs for brace in "{}"):
                raise wrong(key, f"the braces of {value(pattern)} do not pair up")
        if len(self.module_class or "") > LONGEST_GLOB:
            raise wrong("module_class", f"a glob has at most {LONGEST_GLOB} characters")
        if self.format is None:
            self._check_switch()
        else:
            if self.enable is not None:
                raise wrong("enable", "a rule has `enable` or `format`, not both; a format switches on by itself")
            self._check_layout()
            self._check_kinds(possible_kinds(self.quantizer))
        return self

    def _check_switch(self) -> None:
        if self.enable is None:
            raise wrong("quantizer", "a rule needs either `enable` or `format`")
        for key in ("granularity", "block_shape", "group_size", "dynamic", "constant_amax", "rotate"):
            if getattr(self, key):
                raise wrong(key, f"`{key}` belongs to a rule with `format`; this one only has `enable`")

    def _check_layout(self) -> None:
        """Granularity, block shape and `dynamic` must fit each other and the format."""
        sizes = GROUP_SIZES.get(self.format or "", ())
        if self.group_size is not None and self.group_size not in sizes:
            known = ", ".join(map(str, sizes)) if sizes else f"there for {', '.join(GROUP_SIZES)} alone"
            raise wrong("group_size", f"the `group_size` of {self.format} is {known}, not {self.group_size}")
        fixed = block_of(self.format or "", self.group_size)
        if fixed is not None:
            if self.granularity not in (None, "per_block"):
                raise wrong("granularity", f"{self.format} is always per_block, not {self.granularity}")
            if self.block_shape not in (None, fixed):
                raise wrong("block_shape", f"{self.format} has blocks of {list(fixed)}, not {list(self.block_shape)}")
        elif self.granularity == "per_block":
            if self.block_shape is None:
                raise wrong("granularity", f"per_block {self.format} needs `block_shape`, such as [128, 128]")
            if min(self.block_shape) < 1:
                raise wrong("block_shape", f"block sides must be at least 1, not {list(self.block_shape)}")
        elif self.block_shape is not None:
            raise wrong("block_shape", "`block_shape` needs `granularity: per_block`")
        if self.constant_amax is not None and self.granularity in ("per_token", "per_block"):
            raise wrong("constant_amax", f"`constant_amax` is one number, and {self.granularity} has many scales")
        if self.constant_amax is not None and self.dynamic:
            raise wrong("constant_amax", "`constant_amax` is known before, and `dynamic: true` measures at run time")
        if self.granularity == "per_token" and not self.dynamic:
            raise wrong("granularity", "per_token scales exist only at run time: add `dynamic: true`")

    def _check_kinds(self, kinds: Sequence[str]) -> None:
        """The glob must not reach quantizers that the rule's layout makes no sense for."""
        for kind in kinds:
            key, reason = self._layout_misfit(kind)
            if reason:
                raise wrong(key, f"{reason}, but the glob {value(self.quantizer)} also reaches {kind}")
        reasons = [self.misfit(kind) for kind in kinds]
        if reasons and all(reasons):
            raise wrong("format", str(reasons[0]))

    def _layout_misfit(self, kind: str) -> tuple[str, str]:
        """(key, reason) why the granularity or `dynamic`, as written, does not fit this kind; ("", "") if it does."""
        if self.granularity == "per_channel" and kind != WEIGHT:
            return "granularity", "per_channel is for weights (end the glob with weight_quantizer)"
        if self.granularity == "per_token" and kind not in ("input_quantizer", "output_quantizer"):
            return "granularity", "per_token is for activations (end the glob with input_quantizer)"
        if self.block_shape is not None and self.block_shape[0] != 1 and kind != WEIGHT:
            rows = self.block_shape[0]
            return "block_shape", f"blocks of {rows} rows are for weights, those of activations are [1, n]"
        if self.dynamic and kind == WEIGHT:
            return "dynamic", "`dynamic: true` is for activations, a weight's scale is constant"
        if self.constant_amax is not None and kind in (WEIGHT, SOFTMAX):
            return "constant_amax", f"`constant_amax` is for activations whose range is not known, not for {kind}"
        if self.dynamic and kind == SOFTMAX:
            return "dynamic", "`dynamic: true` is not for the softmax, whose range is known to be 0 to 1"
        return "", ""

    def misfit(self, kind: str) -> str | None:
        """Why this rule cannot configure a quantizer of that kind, or None; matching asks it of every one."""
        reason = self._layout_misfit(kind)[1]
        if reason:
            return reason
        if kind in CACHES and (self.format in BLOCK_FORMATS or self.granularity == "per_block" or self.dynamic):
            return f"a cache has one constant scale, so {kind} cannot be {self.format} in blocks or dynamic"
        if kind in ATTENTION and (self.format in BLOCK_FORMATS or self.granularity == "per_block"):
            return f"attention operands have one scale per tensor, so {kind} cannot be {self.format} in blocks"
        if kind not in (WEIGHT, INPUT) and self.rotate:
            return f"`rotate` is for the weight and input of a linear, not for {kind}"
        if self.format in WEIGHT_FORMATS and kind != WEIGHT:
            return f"{self.format} is for weights alone, not for {kind}"
        if self.format in BLOCK_FORMATS and kind != WEIGHT and self.dynamic is False:
            return f"{self.format} activations always have scales from run time: leave out `dynamic: false`"
        return None


def wrong(key: str | tuple[str | int, ...], message: str) -> PydanticCustomError:
    """A validation error that names the key it is about, so that the loader can give its line."""
    path = (key,) if isinstance(key, str) else key
    return PydanticCustomError("recipe", "{message}", {"message": message, "path": path})
