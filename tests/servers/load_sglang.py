"""Run with a Python that has SGLang (0.5.23): its models and its weight loaders, on a CPU that says it is a B200."""

# ruff: noqa: E402 - what stands in for kernels comes before what imports them
from __future__ import annotations

import tvm_ffi  # noqa: F401  before packages that it would ask for are stood in for
import xgrammar  # noqa: F401
from common import lost, report, without_kernels

without_kernels(
    *("triton", "sgl_kernel", "flashinfer", "deep_gemm", "cuda", "cutlass", "quack", "tilelang", "torchvision"),
    *("torchaudio", "torchcodec", "decord", "av", "soundfile", "outlines", "interegular", "IPython", "uvicorn"),
    *("torch_memory_saver", "modelscope"),
)

import torch

torch.cuda.get_device_capability = lambda *args: (10, 0)  # type: ignore[assignment]

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.model_loader import loader
from sglang.srt.runtime_context import SpawnRanks, get_platform, publish
from sglang.srt.server_args import ServerArgs

get_platform()._install(is_blackwell=True, is_sm100=True)
_started: list[bool] = []


def load(directory: str) -> torch.nn.Module:
    args = ServerArgs(model_path=directory, device="cpu", dtype="bfloat16", skip_tokenizer_init=True)
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0))
    if not _started:
        method = "tcp://127.0.0.1:29777"
        init_distributed_environment(1, 0, distributed_init_method=method, local_rank=0, backend="gloo")
        initialize_model_parallel()
        _started.append(True)
    model_config, load_config = ModelConfig.from_server_args(args), LoadConfig()
    quantization = loader._get_quantization_config(model_config, load_config)
    with loader.set_default_torch_dtype(torch.bfloat16):
        model: torch.nn.Module = loader._initialize_model(model_config, load_config, quantization)
    weights = loader.DefaultModelLoader(load_config)._get_all_weights(model_config, model)
    model.load_weights(weights)  # type: ignore[operator]
    return model


report(lambda directory: lost(directory, load(directory).parameters()))
