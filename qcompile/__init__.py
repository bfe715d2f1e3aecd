"""qcompile: quantized PyTorch programs for TensorRT, ONNX Runtime and Hugging Face servers, with proof of what fused.

>>> program = qcompile.quantize(model, args, recipe="fp8", calibration=batches)
>>> report = qcompile.export_onnx(program, "model.onnx", target="tensorrt")
>>> engine = qcompile.build_engine("model.onnx", "model.engine", target="sm89")

>>> program = qcompile.quantize(decoder, recipe="fp8+fp8_kv", calibration=batches, cache="dynamic")
>>> qcompile.Generator("out/").generate("The capital of France is").texts

>>> compiled = torch.compile(model, backend="qcompile", options={"recipe": "fp8_per_channel_per_token"})

>>> qcompile.save_checkpoint("./llama", "./llama-fp8", format="fp8")
>>> program = qcompile.import_quantized(qcompile.load_checkpoint("./llama-fp8"), kwargs=inputs)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from passes.lazy import public

if TYPE_CHECKING:
    from passes.observe import trace
    from qcompile.api import build_engine
    from qcompile.checkpoint.load import load_checkpoint
    from qcompile.checkpoint.write.report import CheckpointReport
    from qcompile.checkpoint.write.save import save_checkpoint
    from qcompile.decoders.options import Cache
    from qcompile.dynamo.explain import CompileReport, Explanation, explain
    from qcompile.dynamo.registry import refresh
    from qcompile.engine.limits import GenerationProfiles
    from qcompile.engine.report import EngineReport
    from qcompile.errors import QCompileError
    from qcompile.generation.generator import Generator
    from qcompile.onnx.export import export_onnx
    from qcompile.onnx.repair import RepairReport, repair_onnx
    from qcompile.onnx.session import onnx_session
    from qcompile.quantization.calibrate import calibrate
    from qcompile.quantization.importing import import_quantized
    from qcompile.quantization.quantize import quantize
    from qcompile.quantization.shards import merge_states
    from qcompile.recipe import Recipe, list_recipes, load_recipe
    from qcompile.report import Report
    from qcompile.reports import read_report
    from qcompile.source.public import calibration_data
    from qcompile.version import __version__

__all__ = [
    "Cache",
    "CheckpointReport",
    "CompileReport",
    "EngineReport",
    "Explanation",
    "GenerationProfiles",
    "Generator",
    "QCompileError",
    "Recipe",
    "RepairReport",
    "Report",
    "__version__",
    "build_engine",
    "calibrate",
    "calibration_data",
    "explain",
    "export_onnx",
    "import_quantized",
    "list_recipes",
    "load_checkpoint",
    "load_recipe",
    "merge_states",
    "onnx_session",
    "quantize",
    "read_report",
    "refresh",
    "repair_onnx",
    "save_checkpoint",
    "trace",
]

_PLACES = {
    "Cache": "qcompile.decoders.options",
    "CheckpointReport": "qcompile.checkpoint.write.report",
    "CompileReport": "qcompile.dynamo.explain",
    "EngineReport": "qcompile.engine.report",
    "Explanation": "qcompile.dynamo.explain",
    "GenerationProfiles": "qcompile.engine.limits",
    "Generator": "qcompile.generation.generator",
    "QCompileError": "qcompile.errors",
    "Recipe": "qcompile.recipe",
    "RepairReport": "qcompile.onnx.repair",
    "Report": "qcompile.report.export",
    "__version__": "qcompile.version",
    "build_engine": "qcompile.api",
    "calibrate": "qcompile.quantization.calibrate",
    "calibration_data": "qcompile.source.public",
    "explain": "qcompile.dynamo.explain",
    "export_onnx": "qcompile.onnx.export",
    "import_quantized": "qcompile.quantization.importing",
    "list_recipes": "qcompile.recipe",
    "load_checkpoint": "qcompile.checkpoint.load",
    "load_recipe": "qcompile.recipe",
    "merge_states": "qcompile.quantization.shards",
    "onnx_session": "qcompile.onnx.session",
    "quantize": "qcompile.quantization.quantize",
    "read_report": "qcompile.reports",
    "refresh": "qcompile.dynamo.registry",
    "repair_onnx": "qcompile.onnx.repair",
    "save_checkpoint": "qcompile.checkpoint.write.save",
    "trace": "passes.observe",
}

__getattr__, __dir__ = public(__name__, _PLACES)
