"""The ways to run one model: bf16, torchao, and qcompile with its recipes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import check
from benchmarks.gpu.cases import Inputs
from benchmarks.gpu.chips import Machine
from benchmarks.gpu.compiler import Compiler, Unavailable
from benchmarks.gpu.operands import ROWS
from benchmarks.gpu.reference import Reference
from benchmarks.gpu.timing import Recorded, record


@dataclass(frozen=True)
class Variant:
    """One way to run a model.

    Attributes:
        name: as `--variants` takes it.
        prepare: model, inputs, compiler -> what is called with the inputs.
        judge: outputs, reference -> verdict.
        graph: run as a CUDA graph.
        capability: least compute capability that has the numbers in its matrix units.
    """

    name: str
    prepare: Callable[[nn.Module, Inputs, Compiler], Callable[..., Any]]
    judge: Callable[[Sequence[torch.Tensor], Reference], check.Verdict]
    graph: bool = True
    capability: tuple[int, int] | None = None


def _judge_exact(found: Sequence[torch.Tensor], reference: Reference) -> check.Verdict:
    return check.against_exact(found, reference.exact, reference.eager)


def _torchao_row(model: nn.Module, inputs: Inputs, compiler: Compiler) -> Callable[..., Any]:
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise Unavailable(f"torchao: {error}") from None
    # the same compiler settings for everyone: its own would stay for those that come after it
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    try:
        quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and not _is_excluded(name))
    except AssertionError as error:  # what it says of devices
        raise Unavailable(f"torchao: {error}") from None
    return compiler.plain(model)


def _is_excluded(name: str) -> bool:
    """What qcompile's recipes leave out of these models."""
    return name == "head" or name.endswith("_modulation")


def _judge_torchao(found: Sequence[torch.Tensor], reference: Reference) -> check.Verdict:
    x = reference.exact[0].flatten(0, -2)
    noise = check.snr([ROWS.input(x).dequantized()], [x])
    return check.against_bound(found, reference.exact, (noise, noise), reference.case.linears)


def _qcompile(name: str, recipe: str, *, static: bool = False, capability: tuple[int, int] = (8, 9)) -> Variant:
    def prepare(model: nn.Module, inputs: Inputs, compiler: Compiler) -> Callable[..., Any]:
        import qcompile

        if not static:
            return compiler.quantized(model, recipe=recipe)
        state = qcompile.calibrate(model, inputs, recipe=recipe, calibration=[inputs])
        return compiler.quantized(model, recipe=recipe, calibration=state)

    def judge(found: Sequence[torch.Tensor], reference: Reference) -> check.Verdict:
        return check.against_program(found, reference.program(recipe), reference.exact)

    return Variant(f"qcompile-{name}", prepare, judge, capability=capability)


BASELINE = "bf16-compile"
VARIANTS = (
    Variant(BASELINE, lambda model, _, compiler: compiler.plain(model), _judge_exact),
    _qcompile("row", "fp8_per_channel_per_token"),
    _qcompile("tensor", "fp8_gemm", static=True),
    Variant("torchao-row", _torchao_row, _judge_torchao, capability=(8, 9)),
    _qcompile("block", "fp8_block"),
    Variant("bf16-eager", lambda model, *_: model, _judge_exact, graph=False),
    _qcompile("nvfp4", "nvfp4_fast", static=True, capability=(10, 0)),
)


@dataclass
class Ready:
    """A variant that was compiled and found right or wrong.

    Attributes:
        peak_bytes: most that was allocated at once for it while the model ran outside of a graph, weights and
            activations; None on a CPU.
        kept_bytes: what stays allocated between runs: its weights in every form that it holds on to.
        seconds: from the float model to the first result.
    """

    recorded: Recorded
    verdict: check.Verdict
    peak_bytes: int | None
    kept_bytes: int | None
    seconds: float


def make_ready(variant: Variant, reference: Reference, compiler: Compiler) -> Ready:
    """Build, compile, measure the memory, record, and check. Raises what the variant raises."""
    machine, inputs = reference.machine, reference.inputs
    if machine.capability and variant.capability and machine.capability < variant.capability:
        raise Unavailable(f"needs compute capability {variant.capability[0]}.{variant.capability[1]}")
    before, start = _allocated(machine), time.perf_counter()
    call = variant.prepare(reference.model(), inputs, compiler)
    for _ in range(2):
        call(*inputs)
    seconds = time.perf_counter() - start
    kept, peak = _memory(machine, lambda: call(*inputs))
    recorded = record(lambda: call(*inputs), machine, graph=variant.graph)
    verdict = variant.judge(recorded.fresh_outputs(), reference)
    is_gpu = machine.device.type == "cuda"
    return Ready(recorded, verdict, peak - before if is_gpu else None, kept - before if is_gpu else None, seconds)


def _allocated(machine: Machine) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if machine.device.type == "cuda" else 0


def _memory(machine: Machine, run: Callable[[], object]) -> tuple[int, int]:
    """Bytes allocated between runs, and at most during one."""
    kept = _allocated(machine)
    if machine.device.type != "cuda":
        return 0, 0
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return kept, torch.cuda.max_memory_allocated()
