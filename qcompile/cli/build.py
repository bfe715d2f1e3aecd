"""`qcompile build`: a TensorRT engine from an ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from qcompile.cli.console import interactive, out, write_report
from qcompile.cli.options import UsageError, parse_expect, parse_profiles, require_profile
from qcompile.cli.parameters import SEVERAL, check_sizes
from qcompile.engine.limits import GenerationProfiles
from qcompile.engine.profiles import Profile
from qcompile.outputs import check_distinct, check_writable
from qcompile.report.tables import show_engine

if TYPE_CHECKING:
    from qcompile.engine.report import EngineReport


def build(
    model: Path,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    target: str | None = None,
    profile: Annotated[list[str], SEVERAL] = [],  # noqa: B006  # cyclopts shows the default, and nobody changes it
    profiles: Literal["generate"] | None = None,
    context: int | None = None,
    prompt: int | None = None,
    batch: int | None = None,
    expect: Annotated[list[str], SEVERAL] = [],  # noqa: B006
    report: Path | None = None,
) -> int:
    """Build a TensorRT engine from an ONNX file, and count its kernels.

    No GPU is needed: tensorrt_rtx builds ahead of time for the target. The report tells which attentions and GEMMs run
    in low precision and, for each one that does not, its module path and the reason.

    ```
    qcompile build vit.onnx -o vit.engine --target sm89 --expect attention_fp8=12 kernels=149
    qcompile build bert.onnx --target sm120 --profile batch=1,8,32 sequence=32,128,512
    qcompile build llama.onnx -o llama.engine --target sm120 --profiles generate --context 4096 --batch 8
    ```

    Parameters
    ----------
    model:
        ONNX file; external data is found beside it.
    output:
        Where to write the engine. Without it the engine is built and judged, and not kept.
    target:
        GPU to build for: sm89 (Ada), sm120 (Blackwell RTX), ... Default: the GPU of this machine.
    profile:
        For each dynamic dimension, by its name in the file, its least, usual and largest size, as
        dimension=min,opt,max; or for an input its shapes: input_ids=1x32,8x128,32x512. FP8 attention needs a least
        sequence of 32 or more to be fused. For several profiles give what differs several times: past=0,0,0
        past=1,128,512.
    profiles:
        `generate`: the two profiles of a decoder with a cache, one for prompts of 32 tokens and more, and one for
        single tokens. One range for both would lose every fused attention.
    context:
        With `--profiles generate`: tokens of the longest sequence, prompt and answer. Default: the model's positions,
        as genai_config.json beside the file says, or the length of a static cache.
    prompt:
        With `--profiles generate`: tokens that are taken at once at most. Default: the context.
    batch:
        With `--profiles generate`: sequences at once, at most. Default: 1.
    expect:
        Fail with exit code 1, and write no engine, if it falls short: attention_fp8, attention_int8, attention,
        gemm_fp8, gemm_fp4, gemm_int8, gemm_int4 (weights in INT4), convolution_fp8 and convolution_int8 are least
        counts, kernels is a largest one. Every profile has to reach them; decode.attention_fp8=12 is of one.
    report:
        Write the engine's report to this JSON file.
    """
    check_writable(output, report)
    check_distinct({"--output": output, "--report": report}, [("the ONNX file", model)])
    given = _profiles(profile, profiles, {"context": context, "prompt": prompt, "batch": batch})
    result = build_and_show(model, output, target, given, parse_expect(expect))
    if report is not None:
        write_report(report, result)
    return 0


def _profiles(
    profile: Sequence[str], profiles: str | None, limits: dict[str, int | None]
) -> Sequence[Profile] | GenerationProfiles:
    """What the options say of profiles. Raises UsageError for options that do not go together."""
    given = {name: size for name, size in limits.items() if size is not None}
    check_sizes({f"--{name}": size for name, size in given.items()})
    if profiles is None:
        if given:
            raise UsageError(f"{', '.join(f'--{name}' for name in given)}: a limit of --profiles generate")
        return parse_profiles(profile)
    if profile:
        raise UsageError("--profile or --profiles generate, not both: the latter makes its own")
    return GenerationProfiles(**given)


def build_and_show(
    model: Path,
    output: Path | None,
    target: str | None,
    profiles: Sequence[Profile] | GenerationProfiles,
    expect: dict[str, int] | None,
) -> EngineReport:
    """Build, print the report, and return it."""
    from qcompile.engine import build_engine
    from qcompile.engine.graph import OnnxGraph

    if not isinstance(profiles, GenerationProfiles):
        inputs = OnnxGraph.load(model).model.graph.input
        require_profile(
            {v.name: [d.dim_param or int(d.dim_value) for d in v.type.tensor_type.shape.dim] for v in inputs}, profiles
        )
    built = build_engine(model, output, target=target, profiles=profiles, expect=expect, progress=interactive())
    show_engine(out(), built.data())
    return built
