"""Public functions that join back ends, which do not import each other."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch.export import ExportedProgram

from qcompile.ahead import check_model_target
from qcompile.engine.backend import find_backend
from qcompile.engine.build import Profiles, build_network, checked
from qcompile.engine.build import build_engine as build_engine_from_file
from qcompile.engine.limits import GenerationProfiles
from qcompile.engine.report import EngineReport, check_keys
from qcompile.errors import EngineError
from qcompile.onnx.export import BlockFp8, export_onnx
from qcompile.outputs import check_room, check_writable
from qcompile.sizes import program_bytes
from qcompile.torch_tensorrt import ProgramNetwork


def build_engine(
    model: str | os.PathLike[str] | ExportedProgram,
    output: str | os.PathLike[str] | None = None,
    *,
    target: str | None = None,
    profiles: Profiles = None,
    route: Literal["onnx", "torch_tensorrt"] = "onnx",
    block_fp8: BlockFp8 = "k_split",
    io_dtype: torch.dtype | None = None,
    expect: Mapping[str, int] | None = None,
    progress: bool = True,
) -> EngineReport:
    """Build a TensorRT engine from an ONNX file or a program, and say which kernels it runs.

    Args:
        model: path of an ONNX file, or a program, which is exported to a temporary one first.
        output: where to write the engine; None builds and reports only.
        target: compute capability, such as "sm89" or "sm120"; None is the GPU of this machine.
        profiles: for dynamic shapes, {dimension: (min, opt, max)} by the names that the file has, or {input: (min, opt,
            max)} with whole shapes, or several of those. "generate", for a decoder with a cache: one for prompts and
            one for single tokens, of the sizes that fuse; `qcompile.GenerationProfiles(context=2048)` has limits.
        route: "onnx", or "torch_tensorrt" for a program whose network Torch-TensorRT's converters make, with no ONNX
            file; it has to be installed, and needs a GPU to load.
        block_fp8, io_dtype: of a program, as in `export_onnx`.
        expect: what the engine must reach, such as {"attention_fp8": 12, "gemm_fp8": 49, "kernels": 149}: counts of
            attentions and GEMMs are least counts, `kernels` is a largest one. "decode.attention_fp8" is of one profile.
        progress: show a bar on stderr.

    Raises:
        EngineError: the file, target or profile cannot be built. ExpectationError: the engine falls short.
    """
    if route not in ("onnx", "torch_tensorrt"):
        raise EngineError(f"unknown route {route!r}; known: onnx, torch_tensorrt")
    if not isinstance(model, (str, os.PathLike, ExportedProgram)):
        raise EngineError(f"a {type(model).__name__} is neither a path nor a program: give what quantize returns")
    given = checked(profiles)
    if isinstance(model, ExportedProgram):
        _check_before(model, output, target, expect)
    if route == "torch_tensorrt":
        if not isinstance(model, ExportedProgram):
            raise EngineError("route='torch_tensorrt' starts from a program, not from an ONNX file: use route='onnx'")
        if isinstance(given, GenerationProfiles):
            raise EngineError("the profiles of generation are for route='onnx': give those of this route by name")
        network = ProgramNetwork(model, block_fp8, io_dtype)
        return build_network(network, output, target=target, profiles=given, expect=expect, progress=progress)
    if not isinstance(model, ExportedProgram):
        return build_engine_from_file(model, output, target=target, profiles=profiles, expect=expect, progress=progress)
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        path = Path(folder) / "model.onnx"
        check_room({path: program_bytes(model)}, EngineError)
        export_onnx(model, path, target="tensorrt", block_fp8=block_fp8, io_dtype=io_dtype)
        return build_engine_from_file(path, output, target=target, profiles=profiles, expect=expect, progress=progress)


def _check_before(
    program: ExportedProgram,
    output: str | os.PathLike[str] | None,
    target: str | None,
    expect: Mapping[str, int] | None,
) -> None:
    """What the builder would say after the program has been lowered, which takes minutes for a large one."""
    check_keys(expect or {})
    backend = find_backend(target)
    check_model_target(program, backend.target)
    if output is not None:
        check_writable(Path(output), error=EngineError)
        check_room({Path(output): program_bytes(program)}, EngineError)
