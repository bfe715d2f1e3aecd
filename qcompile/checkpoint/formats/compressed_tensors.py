"""The compressed-tensors format of llm-compressor and vLLM: groups of layers, each with a scheme in full words.

    X.weight                            float8_e4m3fn or int8 [N, K]
    X.weight_scale                      float32 (1,), (N, 1) or [ceil(N / 128), ceil(K / 128)]
    X.input_scale                       float32 (1,), where activations have a constant scale
    X.weight_packed                     NVFP4: uint8 [N, K / 2], with X.weight_scale float8_e4m3fn [N, K / 16]
                                        INT4: int32 [N, K / 8], with X.weight_scale [N, K / group] in the dtype that
                                        the model computes in, and X.weight_shape int64 (2,)
                                        MXFP4: uint8 [N, K / 2], with X.weight_scale as of MXFP8, which has X.weight:
                                        uint8 [N, K / 32], the exponents of powers of two
    X.weight_global_scale, X.input_global_scale   NVFP4: float32 (1,), these DIVIDE
    A.k_scale, A.v_scale                float32 (1,) of an FP8 key/value cache

Scales are float32, though llm-compressor writes the dtype of the model: it also computes its codes with the scale it
rounded to that dtype. Here the codes come from float32 scales, and rounding those to bfloat16 afterwards would move
each weight by up to 2^-9. vLLM and SGLang load scales into float32 parameters whatever the file has, and transformers
with `dequantize=True` multiplies in the dtype of the file: all have the right values. (Without it, transformers rounds
the scales to the dtype of the model, and with two groups of dense layers `dequantize=True` fails: its limits.)
Those of INT4 are the exception: its codes are chosen with scales in the dtype of the model, which its kernels read.
1 / (1 / g) in float32 can be the float beside g: a global scale comes back within 1 ulp, everything else bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from passes.formats import INT4_GROUPS
from qcompile.checkpoint.formats.base import CheckpointFormat, Contents, SchemeReader, owned
from qcompile.checkpoint.formats.compressed_tensors_reader import MIXED, CompressedTensorsReader
from qcompile.checkpoint.formats.int4 import as_words
from qcompile.checkpoint.formats.merged import check_contents, describe
from qcompile.checkpoint.formats.scheme_args import KV_CACHE, WEIGHTS, group_of, inputs_with
from qcompile.checkpoint.formats.skip import skipped_names
from qcompile.checkpoint.formats.stored import as_exponents
from qcompile.schemes.layer import QuantizedWeight
from qcompile.schemes.scheme import Scheme


class CompressedTensors(CheckpointFormat):
    """FP8, INT8, INT4 and NVFP4, in any mixture."""

    name = "compressed-tensors"

    def check(self, contents: Contents, shapes: Mapping[str, tuple[int, int]]) -> None:
        check_contents(self.name, contents, shapes, _refusal)

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Scales are float32 whatever the dtype of the model, but of INT4, see above."""
        if weight.scheme.weight in INT4_GROUPS.values():
            rows, columns = weight.codes.shape[0], weight.codes.shape[1] * 2
            shape = torch.tensor([rows, columns])
            result = {"weight_packed": as_words(weight.codes), "weight_scale": weight.scale, "weight_shape": shape}
        elif weight.global_scale is not None:
            result = {
                "weight_packed": weight.codes,
                "weight_scale": weight.scale,
                "weight_global_scale": 1 / weight.global_scale.float().reshape(1),
            }
            if weight.input_scale is not None:
                result["input_global_scale"] = 1 / weight.input_scale.float().reshape(1)
        elif weight.scheme.weight.powers:
            name_of_codes = "weight_packed" if weight.scheme.weight.packed else "weight"
            result = {name_of_codes: weight.codes, "weight_scale": as_exponents(weight.scale)}
        else:
            scale = weight.scale.float()
            result = {"weight": weight.codes, "weight_scale": scale if scale.ndim else scale.reshape(1)}
            if weight.input_scale is not None:
                result["input_scale"] = weight.input_scale.float().reshape(1)
        return {f"{name}.{key}": owned(tensor) for key, tensor in result.items()}

    def kv_tensors(self, attention: str, k_scale: torch.Tensor, v_scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            f"{attention}.k_scale": owned(k_scale.float().reshape(1)),
            f"{attention}.v_scale": owned(v_scale.float().reshape(1)),
        }

    def files(self, contents: Contents) -> dict[str, dict[str, Any]]:
        ignore = skipped_names(contents)
        members: dict[Scheme, list[str]] = {}
        for name, scheme in contents.schemes.items():
            members.setdefault(scheme, []).append(name)
        groups = {}
        for i, (scheme, names) in enumerate(members.items()):
            others = [name for name in [*contents.schemes, *ignore] if contents.schemes.get(name) != scheme]
            # alone, it is every linear layer that is not ignored, which is what llm-compressor writes
            groups[f"group_{i}"] = group_of(scheme, ["Linear"] if len(members) == 1 else _targets(names, others))
        formats = {group["format"] for group in groups.values()}
        section = {
            "quant_method": self.name,
            "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "config_groups": groups,
            "ignore": ignore,
            "kv_cache_scheme": KV_CACHE if contents.kv_cache else None,
        }
        return {"config.json": {"quantization_config": section}}

    def reader(self, quantization_config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> SchemeReader:
        return CompressedTensorsReader(quantization_config)


def _refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    if scheme.low_rank:
        return f"{describe(scheme)}: the format has no words for a low-rank part; leave out svdquant, or use modelopt"
    if scheme.input in inputs_with(scheme.weight):
        return None
    known = ", ".join(
        f"{weight.name} with {' or '.join(x.name if x else 'no' for x in inputs_with(weight))} input"
        for weight in WEIGHTS
    )
    return f"{describe(scheme)}: no server runs it; change the recipe to one of: {known}"


def _targets(names: Sequence[str], others: Iterable[str]) -> list[str]:
    """The shortest list of targets that has all of `names` and none of `others`.

    A regular expression over layers and experts where it holds, first without what is before `layers` (servers put
    language models into other modules), else the name itself.
    """
    others = list(others)
    fits: dict[str, bool] = {}
    targets: dict[str, None] = {}  # in order, each once
    for name in names:
        for pattern in _patterns(name):
            if pattern not in fits:
                fits[pattern] = not any(re.match(pattern, other) for other in others)
            if fits[pattern]:
                targets[f"re:{pattern}"] = None
                break
        else:
            targets[name] = None
    return list(targets)


def _patterns(name: str) -> list[str]:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    if not numbers:
        return []
    general = [r"\d+" if part.isdecimal() else re.escape(part) for part in parts]
    from_list = max(numbers[0] - 1, 0)
    return [r"(.*\.)?" + r"\.".join(general[from_list:]) + "$", r"\.".join(general) + "$"]
