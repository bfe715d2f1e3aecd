"""Claims: NVFP4 weights bit-equal to what nvidia-modelopt writes, and equal activation codes from both forms of file.

`codes.py` runs this. Judges: modelopt's quantizer and its own export of the same model on a CPU, for codes, block
scales and global scales; `onnx.reference` for what quantizes activations in a file, on what the FX program quantizes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.utils
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import passes
import qcompile
from benchmarks.stored import module_of, parts_of
from passes.ir import DYNAMIC_QUANTIZE


class Weight(NamedTuple):
    """Bytes of the codes `[N, K / 2]` and of the e4m3 block scales `[N, K / 16]`, and the fp32 global scale."""

    codes: np.ndarray
    block_scales: np.ndarray
    global_scale: np.ndarray

    def unequal(self, other: Weight) -> int:
        """Number of bytes that differ; the global scale counts as 4."""
        return sum(int((_bytes(a) != _bytes(b)).sum()) for a, b in zip(self, other, strict=True))

    def rows(self, rows: slice) -> Weight:
        return self._replace(codes=self.codes[rows], block_scales=self.block_scales[rows])

    @property
    def size(self) -> int:
        return sum(_bytes(part).size for part in self)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def stored_weights(model: onnx.ModelProto) -> Iterator[tuple[str, Weight]]:
    """Module path and weight of each linear in a file; `path` is `a.q+k+v` where several were merged.

    In the file: DequantizeLinear(codes, DequantizeLinear(block scales, global scale)).
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        codes = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.data_type != onnx.TensorProto.FLOAT4E2M1:
            continue
        block_scales, global_scale = (numpy_helper.to_array(constants[n]) for n in producers[node.input[1]].input[:2])
        packed = np.frombuffer(codes.raw_data, np.uint8).reshape(*codes.dims[:-1], codes.dims[-1] // 2)
        yield module_of(node), Weight(packed, block_scales, global_scale)


def quantized_by_modelopt(weight: torch.Tensor, siblings: list[torch.Tensor]) -> Weight:
    """`weight` `[N, K]` by modelopt's quantizer in fp32, under the largest of the global scales of its `siblings`."""
    with _silent():
        from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
    shared = torch.stack([NVFP4QTensor.get_weights_scaling_factor_2(sibling.float()) for sibling in siblings]).max()
    quantized, block_scales, _ = NVFP4QTensor.quantize(weight.float(), 16, None, shared)
    return _weight(quantized._quantized_data, block_scales, shared)


def exported_by_modelopt(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint that modelopt makes of `model`, which it changes, calibrated on `batch`."""
    with _silent(), tempfile.TemporaryDirectory() as folder:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
        from safetensors.torch import load_file

        quantized = mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda module: module(**batch))
        export_hf_checkpoint(quantized, dtype=next(quantized.parameters()).dtype, export_dir=folder)
        return load_file(Path(folder) / "model.safetensors")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _weight(codes: torch.Tensor, block_scales: torch.Tensor, global_scale: torch.Tensor) -> Weight:
    return Weight(codes.numpy(), block_scales.view(torch.uint8).numpy(), global_scale.float().numpy())


def unequal_weights(
    model: onnx.ModelProto, weights: Mapping[str, torch.Tensor], checkpoint: Mapping[str, torch.Tensor]
) -> tuple[int, int, int, int]:
    """Bytes that differ from modelopt's quantizer and from its checkpoint, of how many, in how many linears.

    Args:
        weights: state dict of the model that was quantized, in its own dtype.
    """
    by_quantizer = by_export = total = count = 0
    for module, stored in stored_weights(model):
        paths = parts_of(module)
        linears = [weights[f"{path}.weight"] for path in paths]
        ends = np.cumsum([len(weight) for weight in linears])
        for path, weight, end in zip(paths, linears, ends, strict=True):
            own = stored.rows(slice(end - len(weight), end))
            names = ("weight", "weight_scale", "weight_scale_2")
            by_quantizer += own.unequal(quantized_by_modelopt(weight, siblings=linears))
            by_export += own.unequal(_weight(*(checkpoint[f"{path}.{name}"] for name in names)))
            total, count = total + own.size, count + 1
    return by_quantizer, by_export, total, count


def unequal_activations(
    program: torch.export.ExportedProgram, path: Path, batch: Mapping[str, torch.Tensor]
) -> tuple[int, int, int]:
    """Codes and block scales of the file at `path` that differ from the program's, of how many, from how many tensors.

    What quantizes a tensor in the file, function body or standard operators, gets what the program quantizes there.
    """
    model = onnx.load(path)
    recorder = _Recorder(passes.unlift(program))
    with torch.no_grad():
        recorder.run(*(batch[node.name] for node in recorder.module.graph.find_nodes(op="placeholder")))  # type: ignore[operator,union-attr]
    extractor = onnx.utils.Extractor(model)
    wrong = total = 0
    sites = list(_sites(model))
    for site, recorded in zip(sites, recorder.found, strict=True):
        part = extractor.extract_model([site.x], [site.codes, site.block_scales])
        x = recorded.x.reshape(-1, recorded.x.shape[-1]) if site.is_flat else recorded.x
        codes, block_scales = map(_bytes, ReferenceEvaluator(part).run(None, {site.x: x}))
        # the code of -0.0 is that of 0 in the program, as modelopt has it, and keeps its sign in ONNX: the same number
        expected = _bytes(recorded.codes)
        is_zero = (x.reshape(-1) == 0) & ((codes | expected) & 7 == 0)
        wrong += int(((codes != expected) & ~is_zero).sum())
        wrong += int((block_scales != _bytes(recorded.block_scales)).sum())
        total += codes.size + block_scales.size
    return wrong, total, len(sites)


class _Recorded(NamedTuple):
    """A tensor that was quantized, its codes one in a byte, and its block scales as bytes."""

    x: np.ndarray
    codes: np.ndarray
    block_scales: np.ndarray


class _Recorder(torch.fx.Interpreter):
    """Runs a graph and keeps what its dynamic quantizes read and make, in order."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: list[_Recorded] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is DYNAMIC_QUANTIZE:
            x, _ = self.fetch_args_kwargs_from_env(n)[0]
            packed, block_scales = result
            codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
            self.found.append(_Recorded(x.numpy(), codes.numpy(), block_scales.view(torch.uint8).numpy()))
        return result


class _Site(NamedTuple):
    """Names of a tensor that a file quantizes to NVFP4, of its codes, and of its block scales."""

    x: str
    codes: str
    block_scales: str
    is_flat: bool


def _sites(model: onnx.ModelProto) -> Iterator[_Site]:
    """Where a file quantizes activations, by TensorRT's operator or by standard ones, in order."""
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == "TRT_FP4DynamicQuantize":
            yield _Site(node.input[0], *node.output, is_flat=True)
        elif node.op_type == "QuantizeLinear" and node.input[1] in producers:  # its scales are measured
            source = producers[node.input[0]]
            x = source.input[0] if source.op_type == "Cast" else node.input[0]  # half precision is widened for it
            yield _Site(x, node.output[0], producers[node.input[1]].input[0], is_flat=False)


def measure(model: torch.nn.Module, batch: dict[str, torch.Tensor], path: Path) -> Iterator[tuple[str, int, int]]:
    """What was compared, how much of it differs, and of how much. Changes `model`."""
    for dtype in (torch.float32, torch.bfloat16):
        source = copy.deepcopy(model).to(dtype)
        weights = dict(source.state_dict())
        program = quantize(source, batch, dtype)
        qcompile.export_onnx(program, path)
        checkpoint = exported_by_modelopt(source, batch)
        wrong, wrong_export, total, count = unequal_weights(onnx.load(path), weights, checkpoint)
        what = f"NVFP4 bytes (codes, block and global scales) of {count} {_name(dtype)} weights, against modelopt's"
        yield f"{what} quantizer in fp32", wrong, total
        yield f"{what} export on CPU", wrong_export, total
    for dtype in (torch.float32, torch.float16):
        program = quantize(model, batch, dtype)
        for target in ("tensorrt", "portable"):
            qcompile.export_onnx(program, path, target=target)
            wrong, total, count = unequal_activations(program, path, batch)
            form = "TRT_FP4DynamicQuantize's body" if target == "tensorrt" else "the portable form"
            yield (
                f"NVFP4 codes and block scales of {count} activations, {_name(dtype)}, {form} against FX",
                wrong,
                total,
            )


def quantize(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], dtype: torch.dtype
) -> torch.export.ExportedProgram:
    return qcompile.quantize(model, (), batch, recipe="nvfp4_fast", calibration=[batch], dtype=dtype, progress=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
