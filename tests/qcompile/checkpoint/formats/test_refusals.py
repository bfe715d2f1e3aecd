"""What a format cannot say is refused in one error that names the layers and what to use instead."""

from __future__ import annotations

import re

import pytest
import torch

from passes.formats import FP8, FP8_128X128, INT8, NVFP4
from qcompile.checkpoint.formats import FORMATS, Contents, format_called
from qcompile.errors import CheckpointError
from qcompile.schemes.scheme import FP8_BLOCK, FP8_CHANNEL_TOKEN, FP8_TENSOR, INT8_CHANNEL_TOKEN, NVFP4_W4A4, Scheme
from tests.qcompile.checkpoint.formats.support import BLOCK_WEIGHT_ONLY

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
O_PROJ = "model.layers.0.self_attn.o_proj"


def refused(name: str, contents: Contents, *words: str, shape: tuple[int, int] = (128, 128)) -> None:
    with pytest.raises(CheckpointError) as error:
        FORMATS[name].check(contents, dict.fromkeys(contents.schemes, shape))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "scheme", "instead"),
    [
        ("fp8", FP8_TENSOR, "use the format modelopt or compressed-tensors"),
        ("fp8", NVFP4_W4A4, "use the format compressed-tensors"),
        ("fp8", BLOCK_WEIGHT_ONLY, "use the format compressed-tensors"),
        ("modelopt", FP8_BLOCK, "use the format fp8 or compressed-tensors"),
        ("modelopt", INT8_CHANNEL_TOKEN, "use the format compressed-tensors"),
        ("modelopt", Scheme(FP8), "use the format compressed-tensors"),
        ("compressed-tensors", Scheme(INT8), "int8 with int8 or int8_per_token input"),
        ("compressed-tensors", Scheme(NVFP4, FP8), "nvfp4 with no or nvfp4 input"),
        ("compressed-tensors", Scheme(FP8_128X128, FP8), "fp8_128x128 with no or fp8_1x128 input"),
    ],
)
def test_scheme(name: str, scheme: Scheme, instead: str) -> None:
    refused(name, Contents({DOWN: scheme}), DOWN, instead)


def test_every_reason_is_in_one_error() -> None:
    contents = Contents({DOWN: FP8_BLOCK, O_PROJ: INT8_CHANNEL_TOKEN})
    refused("modelopt", contents, DOWN, O_PROJ, "fp8_128x128", "int8")


EXPERT = "model.layers.0.mlp.experts.3.down_proj"


def test_modelopt_mixes_all_but_experts_per_channel() -> None:
    """What vLLM 0.33 reads of MIXED_PRECISION."""
    modelopt = FORMATS["modelopt"]
    for other in (FP8_CHANNEL_TOKEN, BLOCK_WEIGHT_ONLY, FP8_TENSOR, Scheme(NVFP4)):
        contents, shapes = Contents({DOWN: NVFP4_W4A4, O_PROJ: other}), {DOWN: (128, 128), O_PROJ: (96, 128)}
        modelopt.check(contents, shapes)
        notices = " ".join(modelopt.notices(contents, shapes))
        assert ("from 0.33 on" in notices) == (other in (FP8_CHANNEL_TOKEN, BLOCK_WEIGHT_ONLY))
        assert ("runs it with activations quantized to FP8" in notices) == (other == BLOCK_WEIGHT_ONLY)
        assert ("128 does not divide their rows" in notices) == (other == BLOCK_WEIGHT_ONLY)
    refused("modelopt", Contents({O_PROJ: NVFP4_W4A4, EXPERT: FP8_CHANNEL_TOKEN}), EXPERT, "compressed-tensors")
    modelopt.check(Contents({O_PROJ: FP8_CHANNEL_TOKEN, EXPERT: BLOCK_WEIGHT_ONLY}), {O_PROJ: (8, 8), EXPERT: (8, 128)})
    modelopt.check(Contents({EXPERT: FP8_CHANNEL_TOKEN}), {EXPERT: (8, 8)})
    refused("modelopt_mixed", Contents({EXPERT: FP8_CHANNEL_TOKEN}), EXPERT, "compressed-tensors")


def test_block_fp8_with_nvfp4_is_compressed_tensors() -> None:
    contents = Contents({DOWN: NVFP4_W4A4, O_PROJ: FP8_BLOCK})
    refused("modelopt", contents, O_PROJ, "compressed-tensors")
    refused("fp8", contents, DOWN, "compressed-tensors")
    FORMATS["compressed-tensors"].check(contents, {DOWN: (128, 128), O_PROJ: (128, 128)})


def test_a_ragged_reduction_axis_in_modelopt() -> None:
    refused("modelopt", Contents({DOWN: BLOCK_WEIGHT_ONLY}), DOWN, "[128, 96]", shape=(128, 96))


@pytest.mark.parametrize("name", ["modelopt", "compressed-tensors"])
def test_nvfp4_needs_whole_blocks(name: str) -> None:
    refused(name, Contents({DOWN: NVFP4_W4A4}), DOWN, "divisible by 16", shape=(64, 40))


def test_fp8_has_no_key_value_cache() -> None:
    refused("fp8", Contents({DOWN: FP8_BLOCK}, kv_cache=True), "key/value cache", "compressed-tensors")
    with pytest.raises(CheckpointError, match="self_attn"):
        FORMATS["fp8"].kv_tensors("model.layers.0.self_attn", torch.ones(()), torch.ones(()))


def test_nothing_quantized() -> None:
    refused("modelopt", Contents({}, [DOWN]), "no linear layer")


@pytest.mark.parametrize(
    "members",
    [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.7.w2"],
        ["attention.self.query", "attention.self.value"],
    ],
)
@pytest.mark.parametrize("name", ["modelopt", "compressed-tensors"])
def test_merged_layers_need_one_scheme(name: str, members: list[str]) -> None:
    first, *rest = [f"model.layers.3.{member}" for member in members]
    mixed = {**dict.fromkeys(rest, NVFP4_W4A4), first: FP8_TENSOR}
    refused(name, Contents(mixed), first, rest[-1], "the same scheme")
    refused(name, Contents(dict.fromkeys(rest, NVFP4_W4A4), [first]), first, "floating point")
    FORMATS[name].check(Contents(dict.fromkeys([first, *rest], FP8_TENSOR)), dict.fromkeys([first, *rest], (64, 64)))
    # the same layers of another block are another group
    elsewhere = {first.replace("layers.3", "layers.4"): FP8_TENSOR, **dict.fromkeys(rest, NVFP4_W4A4)}
    if "experts" not in first:
        FORMATS[name].check(Contents(elsewhere), dict.fromkeys(elsewhere, (64, 64)))


def test_tied_layers_need_one_scheme() -> None:
    contents = Contents({DOWN: FP8_TENSOR, "lm_head": FP8_TENSOR}, tied={"lm_head": "model.embed_tokens"})
    refused("modelopt", contents, "lm_head", "model.embed_tokens")


def test_unknown_format() -> None:
    with pytest.raises(
        CheckpointError, match=re.escape("'gguf'; known: fp8, modelopt, modelopt_mixed, compressed-tensors")
    ):
        format_called("gguf")
