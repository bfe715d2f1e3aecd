"""Run with a Python that has vLLM (0.33): its models and its weight loaders, on a CPU that says it is a B200."""

# ruff: noqa: E402 - what stands in for kernels comes before what imports them
from __future__ import annotations

from typing import Any

import torch
import torch.library
from common import Anything, lost, report, without_kernels

without_kernels("vllm.vllm_flash_attn", "vllm._C", "vllm._moe_C")

import vllm.platforms
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum


class Pretended(Platform):
    _enum = PlatformEnum.CUDA
    device_name, device_type, dispatch_key, dist_backend = "cuda", "cpu", "CPU", "gloo"
    device_control_env_var = "CUDA_VISIBLE_DEVICES"

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> Any:
        return DeviceCapability(10, 0)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA B200"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 1 << 37

    @classmethod
    def get_attn_backend_cls(cls, *args: Any, **kwargs: Any) -> str:
        return "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None: ...

    @classmethod
    def supports_fp8(cls) -> bool:
        return True

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return 132


vllm.platforms._current_platform = Pretended()

# its compiled operators are asked what the GPU can, and get shapes of results at import
_namespace: Any = torch._ops._OpNamespace
_found, _register_fake = _namespace.__getattr__, torch.library.register_fake
_OWN = ("_C", "_moe_C", "_qutlass", "vllm")


def _operator(self: Any, name: str) -> Any:
    try:
        return _found(self, name)
    except AttributeError:
        if self.name.startswith(_OWN) and not name.startswith("__"):
            return lambda *args, **kwargs: True
        raise


def _fake(op: Any, *args: Any, **kwargs: Any) -> Any:
    return Anything() if str(op).startswith(_OWN[:3]) else _register_fake(op, *args, **kwargs)


_namespace.__getattr__ = _operator
torch.library.register_fake = _fake  # type: ignore[assignment]
torch.set_default_dtype(torch.bfloat16)

from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model

_started: list[bool] = []


def load(directory: str) -> torch.nn.Module:
    model_config = ModelConfig(
        model=directory, tokenizer=directory, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True
    )
    config = VllmConfig(model_config=model_config, load_config=LoadConfig(), device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(config):
        if not _started:
            method = "tcp://127.0.0.1:29555"
            init_distributed_environment(1, 0, distributed_init_method=method, local_rank=0, backend="gloo")
            initialize_model_parallel(1, 1)
            _started.append(True)
        model: torch.nn.Module = initialize_model(config)
        model.load_weights(DefaultModelLoader(config.load_config).get_all_weights(model_config, model))  # type: ignore[operator]
        return model


report(lambda directory: lost(directory, load(directory).parameters()))
