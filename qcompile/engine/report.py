"""What an engine does: kernels, fused attentions, GEMMs by type, and what did not run in low precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

from qcompile.engine.layers import LOW_PRECISION, Layer
from qcompile.errors import EngineError, ExpectationError, ReportError
from qcompile.report.base import ReportBase


class AttentionCount(BaseModel):
    """Attentions of the file: `total`; `fused` into one kernel in any type; `fp8`, `int8`: with q, k and v in that."""

    model_config = ConfigDict(frozen=True)

    total: int = 0
    fused: int = 0
    fp8: int = 0
    int8: int = 0

    @property
    def low_precision(self) -> int:
        return self.fp8 + self.int8


class NotLowPrecision(NamedTuple):
    """An attention, GEMM or convolution that did not run in FP8, FP4 or INT8, by module path, and why."""

    kind: str
    module: str
    reason: str


class ProfileCounts(BaseModel):
    """What one profile runs. The builder compiles, and lists, every kernel once for each profile.

    Attributes:
        name: what the profile is for, `prefill` or `decode`; empty for profiles that were given without one.
        attentions: module path of each attention of the file -> the type that its kernel reads keys and values in, or
            `unfused`.
    """

    model_config = ConfigDict(frozen=True)

    name: str = ""
    kernels: int
    attention: AttentionCount
    gemms: dict[str, int]
    convolutions: dict[str, int]
    not_low_precision: list[NotLowPrecision]
    low_rank: int = 0
    attentions: dict[str, str] = Field(default_factory=dict)


class EngineReport(ReportBase):
    """The result of `build_engine`.

    Attributes:
        target: what it was built for, such as "sm89".
        builder: package and version that built it.
        kernels: kernels of one run: layers other than signals, waits, shape calls and sizes handed to the GPU.
        attention: attentions of the file, and how many were fused.
        gemms: GEMM kernels by the type that they multiply in (fp8, fp4, int8, half, float), or int4 for those that
            read a weight in INT4 and multiply in half or float. Parallel GEMMs that the builder merged are one; the two
            GEMMs of an attention that was not fused belong to it and are not counted.
        convolutions: convolution kernels, by the same types.
        precisions: module path of each GEMM and convolution -> the type that it multiplies in; several GEMMs of one
            module that differ are joined, as in "fp4+half". Low-rank parts are not among them.
        convolution_kernels: module path of each convolution -> how many kernels quantize its input, convolve, and
            rescale the result. One that works for several convolutions counts for each, and one may do more besides.
        not_low_precision: each attention, GEMM and convolution of the file that ran in half or float.
        low_rank: how many of the GEMM kernels multiply low-rank parts of quantized weights.
        notices: what a reader should know, such as a profile that rules out fused FP8 attention.
        bytes: size of the engine. seconds: wall-clock time of parsing and building.
        layers: the builder's list, all profiles. With several profiles the counts are those of the worst one. An entry
            that could not be read is of type "other", and there is a notice of it.
        profiles: the counts of each profile; one entry for an engine without profiles.
    """

    kind: Literal["engine"] = "engine"
    target: str
    builder: str
    kernels: int
    attention: AttentionCount
    gemms: dict[str, int]
    convolutions: dict[str, int]
    not_low_precision: list[NotLowPrecision]
    bytes: int
    seconds: float
    layers: list[Layer]
    precisions: dict[str, str] = Field(default_factory=dict)
    convolution_kernels: dict[str, int] = Field(default_factory=dict)
    low_rank: int = 0
    profiles: list[ProfileCounts] = Field(default_factory=list)

    @property
    def coverage(self) -> dict[str, tuple[int, int]]:
        """Kind -> (how many run in FP8, FP4 or INT8, or read INT4; how many there are), for the kinds that it has."""
        counts = {"attention": (self.attention.low_precision, self.attention.total)}
        for kind, kernels in (("gemm", self.gemms), ("convolution", self.convolutions)):
            counts[kind] = sum(kernels.get(low, 0) for low in LOW_PRECISION), sum(kernels.values())
        return {kind: count for kind, count in counts.items() if count[1]}

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises EngineError when the text is something else."""
        try:
            return super().from_json(text)
        except ReportError as error:
            raise EngineError(f"this is not an engine report: {error}") from error

    def check(self, expect: Mapping[str, int]) -> None:
        """Compare with what was expected.

        Args:
            expect: `attention_fp8`, `attention_int8`, `attention` (fused, in any type), `gemm_fp8`, `gemm_fp4`,
                `gemm_int8`, `gemm_int4`, `convolution_fp8`, `convolution_int8`: at least so many; `kernels`: at most so
                many. Every profile has to reach them, or with `decode.` in front, as in `decode.attention_fp8`, the one
                of that name or number.

        Raises:
            EngineError: an unknown key, or a value that is no count.
            ExpectationError: names every shortfall and the module paths behind it.
        """
        check_keys(expect)
        found: list[ProfileCounts | EngineReport] = [*self.profiles] if len(self.profiles) > 1 else [self]
        names = [getattr(counts, "name", "") or str(index) for index, counts in enumerate(found)]
        shortfalls = []
        for given, wanted in expect.items():
            profile, _, key = given.rpartition(".")
            if profile and profile not in names:
                raise EngineError(f"expect: there is no profile {profile!r}, but {', '.join(names)}")
            for name, counts in zip(names, found, strict=True):
                where = f" (profile {name})" if len(found) > 1 else ""
                if profile in ("", name):
                    shortfalls += _shortfall(counts, key, wanted, where)
        if shortfalls:
            raise ExpectationError(
                f"the engine for {self.target} falls short of what was expected:\n" + "\n".join(shortfalls)
            )


def _shortfall(counts: ProfileCounts | EngineReport, key: str, wanted: int, where: str) -> list[str]:
    if key == "kernels":
        met, bound, found, kind = counts.kernels <= wanted, "at most", counts.kernels, ""
    else:
        kind, _, precision = key.partition("_")
        kernels = {"gemm": counts.gemms, "convolution": counts.convolutions}.get(kind)
        found = getattr(counts.attention, precision or "fused") if kernels is None else kernels.get(precision, 0)
        met, bound = found >= wanted, "at least"
    behind = [f"    {n.kind} {n.module}: {n.reason}" for n in counts.not_low_precision if kind.startswith(n.kind)]
    return [] if met else [f"  {key}{where}: {bound} {wanted} wanted, {found} found", *behind]


EXPECTATIONS = (
    "attention_fp8",
    "attention_int8",
    "attention",
    "gemm_fp8",
    "gemm_fp4",
    "gemm_int8",
    "gemm_int4",
    "convolution_fp8",
    "convolution_int8",
    "kernels",
)


def check_keys(expect: Mapping[str, int]) -> None:
    """Refuse an expectation that cannot be checked. Raises EngineError."""
    for key, value in expect.items():
        if key.rpartition(".")[2] not in EXPECTATIONS:
            raise EngineError(f"expect: unknown key {key!r}; known are {', '.join(EXPECTATIONS)}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise EngineError(f"expect: {key} must be a count, not {value!r}")
