"""One row a variant, and the bars that rows are held against."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "wrong", "failed", "unavailable", "skipped"]
MODEL_BAR, GEMM_BAR = 1.35, 0.9


@dataclass
class Row:
    """One variant of one case. Times are medians in milliseconds; a row that is not "ok" has none.

    Attributes:
        status: "wrong" for numbers that do not pass the check, "unavailable" for what this machine or installation
            does not have, "skipped" for want of time; `detail` says more.
        q1, q3: quartiles of `samples` samples.
        interleaved: the samples were taken in turn with the other variants, so they are comparable.
        speedup: of bf16 under torch.compile over this, the median over rounds.
        check: numbers of the check, in dB (cosine: plain).
        facts: what only rows of models or of products have: memory, rates, shares of the roofline.
    """

    case: str
    variant: str
    status: Status
    detail: str = ""
    ms: float | None = None
    q1: float | None = None
    q3: float | None = None
    samples: int = 0
    interleaved: bool = False
    speedup: float | None = None
    check: dict[str, float | None] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"))

    def cells(self) -> dict[str, Any]:
        spread = f"{self.q1:.4g} .. {self.q3:.4g}" if self.q1 is not None and self.q3 is not None else None
        return {
            "case": self.case,
            "variant": self.variant,
            "ms": self.ms,
            "quartiles": spread,
            "x bf16": self.speedup,
            "ms a layer": self.facts.get("ms_per_layer"),
            "peak MB": self.facts.get("peak_mb"),
            "kept MB": self.facts.get("kept_mb"),
            "TFLOP/s": self.facts.get("tflops"),
            "of roofline": self.facts.get("of_roofline"),
            "SNR dB": self.check.get("to fp32"),
            "status": self.status if not self.detail else f"{self.status}: {self.detail[:70]}",
        }


def bars(rows: Sequence[Row], chip: str | None) -> list[tuple[str, bool]]:
    """Each bar that these rows can be held against, in words, and whether it is reached."""
    times = {(row.case, row.variant): row for row in rows if row.status == "ok" and row.ms}
    judged: list[tuple[str, bool]] = []
    if chip is None:
        return judged  # a CPU shows nothing but that everything runs
    for case in dict.fromkeys(row.case for row in rows):
        here = {variant: row for (name, variant), row in times.items() if name == case}
        ours = [row for variant, row in here.items() if variant.startswith("qcompile-")]
        if case.startswith("gemm/"):
            judged += _gemm_bar(case, here)
        elif ours:
            best = max(ours, key=lambda row: row.speedup or 0)
            is_hopper = chip is not None and any(name in chip for name in ("H100", "H200"))
            if is_hopper and case in ("vit-large/64", "llama-8b/prefill-4096") and best.speedup:
                text = f"{case}: {best.variant} is {best.speedup:.2f} x as fast as compiled bf16 (at least {MODEL_BAR})"
                judged.append((text, best.speedup >= MODEL_BAR))
            torchao = here.get("torchao-row")
            if torchao and torchao.ms and chip:
                fastest = min(ours, key=lambda row: row.ms or math.inf)
                text = f"{case}: {fastest.variant} {fastest.ms:.4g} ms, torchao {torchao.ms:.4g} ms"
                judged.append((text, fastest.ms is not None and fastest.ms < torchao.ms))
    return judged


def _gemm_bar(case: str, here: Mapping[str, Row]) -> list[tuple[str, bool]]:
    def best(is_candidate: Callable[[str], bool]) -> Row | None:
        found = [row for variant, row in here.items() if is_candidate(variant) and row.facts.get("kind") == "fp8"]
        return max(found, key=lambda row: row.facts["tflops"], default=None)

    ours = best(lambda name: name.startswith("qcompile-") and name.endswith("-bare"))
    theirs = best(lambda name: name.startswith("scaled_mm-"))
    if ours is None or theirs is None:
        return []
    share = ours.facts["tflops"] / theirs.facts["tflops"]
    return [
        (
            f"{case}: {ours.variant} has {share:.2f} of the rate of {theirs.variant} (at least {GEMM_BAR})",
            share >= GEMM_BAR,
        )
    ]
