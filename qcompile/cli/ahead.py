"""What `qcompile export` refuses before it loads a model, and then before it works on it for minutes."""

from __future__ import annotations

import importlib.util
from collections.abc import Container
from pathlib import Path
from typing import get_args

from qcompile.ahead import check_model_target, check_recipe_target, formats_of
from qcompile.checkpoint.load import is_quantized_checkpoint
from qcompile.cli.options import HOW_TO_CALIBRATE, RANDOM_DATA, UsageError, require_profile
from qcompile.cli.wanted import Wanted
from qcompile.engine.backend import find_backend
from qcompile.engine.profiles import checked_profiles
from qcompile.engine.report import check_keys
from qcompile.errors import CalibrationError, EngineError
from qcompile.frontends.quantized import is_quantized
from qcompile.onnx.export import OPSETS
from qcompile.onnx.export import Target as OnnxTarget
from qcompile.onnx.fp4 import FP4_OPSET
from qcompile.outputs import check_room
from qcompile.recipe import Recipe
from qcompile.recipe.asked import asked_formats, calibrates
from qcompile.remedy import with_remedy
from qcompile.sizes import least_bytes
from qcompile.source import Data, Source, open_calibration, parse_dynamic


def check_before_loading(wanted: Wanted) -> Data | None:
    """Raise what the options alone tell: nothing of the model is read but its small files. Returns calibration data."""
    if wanted.opset is not None and wanted.opset not in OPSETS:
        raise UsageError(f"--opset {wanted.opset}: FP8 needs 19 or later, and torch.onnx writes up to {OPSETS[-1]}")
    check_keys(wanted.expect or {})
    for text in wanted.dynamic:
        parse_dynamic(text)
    _target(wanted)
    if wanted.compare and importlib.util.find_spec("onnxruntime") is None:
        raise UsageError(
            "the file is compared with the program in ONNX Runtime, which is not installed: leave the comparison out"
            " with --no-compare, or pip install 'qcompile[onnxruntime]'"
        )
    is_directory = (Path(wanted.source) / "config.json").is_file()
    if is_directory and importlib.util.find_spec("transformers") is None:
        raise UsageError("reading a Hugging Face directory needs transformers: pip install 'qcompile[transformers]'")
    if is_directory and is_quantized_checkpoint(wanted.source):
        _refuse_recipe(wanted)
    elif is_directory or wanted.given:
        _check_recipe(wanted)
        if is_directory:
            _check_calibration(wanted)
    if wanted.calibration is None:
        return None
    return open_calibration(wanted.calibration, wanted.source, wanted.samples, wanted.preparation)


def check_before_quantizing(wanted: Wanted, source: Source) -> bool:
    """Raise what the model tells without being run. Returns whether it is quantized already."""
    if wanted.builds and wanted.cache is None:
        require_profile(source.dims, wanted.profiles)
        checked_profiles(wanted.profiles, source.dims)
    finished = is_quantized(source.model)
    if finished:
        _refuse_recipe(wanted)
        if wanted.cache is not None:
            raise UsageError(f"{source.name} is quantized already, and a cache is made where a model is quantized")
        if target := _target(wanted):
            check_model_target(source.model, target)
        _check_opset(wanted, {format for _, format in formats_of(source.model)})
    else:
        _check_recipe(wanted)
        _check_calibration(wanted)
    size = least_bytes(source.model, None if finished else wanted.recipe, wanted.dtype)
    check_room(dict.fromkeys(wanted.outputs, size))
    return finished


def _target(wanted: Wanted) -> int | None:
    """Compute capability of the GPU that an engine is built for; None where none is built."""
    if not wanted.builds:
        return None
    try:
        return find_backend(wanted.target).target
    except EngineError as error:
        if wanted.target in get_args(OnnxTarget):
            raise EngineError(f"{error}; what the file is for is --onnx-target {wanted.target}") from error
        if wanted.target is not None:
            raise
        raise EngineError(f"{error}\nOn the command line: --target sm89") from error


def _refuse_recipe(wanted: Wanted) -> None:
    if wanted.given:
        raise UsageError(f"{wanted.source} is quantized already: leave out --recipe and --set")


def _check_recipe(wanted: Wanted) -> None:
    if wanted.recipe is None:
        return
    if target := _target(wanted):
        check_recipe_target(wanted.recipe, target, wanted.dtype)
    _check_opset(wanted, asked_formats(wanted.recipe))
    if wanted.block_fp8 != "k_split" and not any(rule.block_shape for rule in wanted.recipe.rules):
        name = wanted.recipe.metadata.name
        raise UsageError(f"--block-fp8 is for weights in blocks of 128 x 128, and the recipe {name} asks for none")


def _check_calibration(wanted: Wanted) -> None:
    if wanted.calibration is None and wanted.recipe is not None and not wanted.dry_run:
        check_needs_no_data(wanted.recipe)


def check_needs_no_data(recipe: Recipe) -> None:
    """Raise CalibrationError for a recipe that calibrates linear layers."""
    if calibrates(recipe):
        problem = CalibrationError(
            f"the recipe {recipe.metadata.name} needs calibration data for the ranges of activations:"
            f" {HOW_TO_CALIBRATE}"
        )
        raise with_remedy(problem, RANDOM_DATA)


def _check_opset(wanted: Wanted, formats: Container[str]) -> None:
    if wanted.opset is not None and wanted.opset < FP4_OPSET and "nvfp4" in formats:
        raise UsageError(f"--opset {wanted.opset} has no FP4: leave it out, or give {FP4_OPSET}")
