"""What a format of quantized checkpoints is: how layers, scales and schemes are spelled in files, in both directions.

Names are those of the hub everywhere: `model.layers.0.self_attn.q_proj`, per expert
`model.layers.0.mlp.experts.3.gate_proj`. Codes and scales are taken exactly as they are; nothing is quantized here.
`FORMATS`, `format_called` and `reader_of` are in the package (`qcompile.checkpoint.formats`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qcompile.schemes.layer import QuantizedWeight
from qcompile.schemes.scheme import Scheme

Get = Callable[[str], torch.Tensor]
"""The stored tensor of that full name. Raises `KeyError` for one that no file holds."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, in hub names.

    Attributes:
        schemes: quantized linear layer -> its scheme.
        unquantized: linear layers (and lm_head, routers, embeddings) that stay in floating point.
        kv_cache: FP8 scales of the key/value cache are there.
        tied: dropped name -> the name that holds its weight (lm_head -> model.embed_tokens).
    """

    schemes: Mapping[str, Scheme]
    unquantized: Sequence[str] = ()
    kv_cache: bool = False
    tied: Mapping[str, str] = field(default_factory=dict)


class CheckpointFormat(ABC):
    """One way to spell quantized layers in a directory of the hub."""

    name: str

    @abstractmethod
    def check(self, contents: Contents, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse what the format, or the servers that read it, cannot say.

        Args:
            shapes: `(N, K)` of the weight of each quantized layer.

        Raises:
            CheckpointError: names the modules, and what to use instead.
        """

    def notices(self, contents: Contents, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """What the reader of the report should know of servers that read it; the arguments are those of `check`."""
        return []

    @abstractmethod
    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The tensors that stand for the weight of the linear layer called `name`.

        Args:
            weight: of one expert where the layer has several, so its codes have two axes.

        Returns:
            Full hub name -> tensor, contiguous and with storage of its own.
        """

    @abstractmethod
    def kv_tensors(self, attention: str, k_scale: torch.Tensor, v_scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scales (amax / 448) of the FP8 key/value cache of an attention (`model.layers.0.self_attn`)."""

    @abstractmethod
    def files(self, contents: Contents) -> dict[str, dict[str, Any]]:
        """File name -> what is to be merged into it: `{"config.json": {"quantization_config": {...}}, ...}`."""

    @abstractmethod
    def reader(self, quantization_config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> SchemeReader:
        """A reader of checkpoints of this format.

        Args:
            quantization_config: that section of config.json; empty where only `files` say it.
            files: JSON file of the directory -> its content.

        Raises:
            CheckpointError: the configuration asks for what is not known here; names it and what is known.
        """


class SchemeReader(ABC):
    """Finds the scheme and the tensors of each linear layer of one checkpoint.

    Attributes:
        kv_cache: the checkpoint says that the key/value cache is FP8.
    """

    kv_cache: bool = False

    @abstractmethod
    def scheme(self, name: str) -> Scheme | None:
        """How the linear layer that the hub calls `name` is quantized; None for floating point.

        Raises:
            CheckpointError: it is quantized in a way that has no `Scheme`.
        """

    @abstractmethod
    def weight(self, name: str, scheme: Scheme, get: Get, shape: tuple[int, int]) -> QuantizedWeight:
        """Codes and scales of the layer `[N, K] = shape`, checked.

        Raises:
            CheckpointError: names the tensor that is missing, has the wrong dtype or shape, or holds a NaN or a scale
                that is not finite and positive.
        """

    @abstractmethod
    def kv_scales(self, attention: str, get: Get) -> tuple[torch.Tensor, torch.Tensor] | None:
        """fp32 scalars `(k_scale, v_scale)` of the FP8 key/value cache of an attention; None where there are none."""


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy with storage of its own: safetensors writes no two tensors that share theirs."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)
