"""Private names of nvidia-modelopt, which is imported only where a model of it is captured."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from passes.private import Private

_QUANTIZER = "modelopt.torch.quantization.nn.modules.tensor_quantizer"
_FUNCTIONS = "modelopt.torch.quantization.tensor_quant"
_UTILS = "modelopt.torch.quantization.utils"
_CAPTURE = "the capture of a model of nvidia-modelopt"


def is_quantizer(module: object) -> bool:
    """Told by the name of its class, so that modelopt is not imported for it."""
    return any(base.__module__ == _QUANTIZER and base.__name__ == "TensorQuantizer" for base in type(module).__mro__)


def is_off(quantizer: Any) -> bool:
    return bool(getattr(quantizer, "_disabled", False))


def is_calibrating(quantizer: Any) -> bool:
    """Whether it looks at values for a scale that it has not yet."""
    return bool(getattr(quantizer, "_if_calib", False)) and not getattr(quantizer, "_dynamic", False)


def is_compressed(quantizer: Any) -> bool:
    """Whether the weight is stored as codes, by `mtq.compress`."""
    return not getattr(quantizer, "_fake_quant", True)


def quantizer_module() -> ModuleType:
    """Whose `fake_tensor_quant` quantizers call for integers."""
    return importlib.import_module(_QUANTIZER)


def export_mode() -> Any:
    """A context in which quantizers are operators."""
    return importlib.import_module(_UTILS).export_torch_mode()


def integer_function() -> Any:
    """What integer quantizers compute, if modelopt is imported: it branches on values."""
    return getattr(sys.modules.get(_FUNCTIONS), "_tensor_quant", None)


def probes() -> Iterator[Private]:
    """Every private name that this module knows."""
    yield Private(_QUANTIZER, "TensorQuantizer", _CAPTURE, _has_state)
    yield Private(_QUANTIZER, "fake_tensor_quant", _CAPTURE, callable)
    yield Private(_UTILS, "export_torch_mode", _CAPTURE, callable)
    yield Private(_FUNCTIONS, "_tensor_quant", 'torch.compile(backend="qcompile") of a model of nvidia-modelopt')


def _has_state(quantizer_class: Any) -> bool:
    quantizer = quantizer_class()
    has_all = all(hasattr(quantizer, name) for name in ("_disabled", "_if_calib", "_dynamic", "_fake_quant"))
    return has_all and is_quantizer(quantizer) and not is_compressed(quantizer) and not is_off(quantizer)
