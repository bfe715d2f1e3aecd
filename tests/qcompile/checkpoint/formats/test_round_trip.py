"""What a format writes it reads again: the same scheme, codes and scales, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.formats import FP8_128X128
from qcompile.checkpoint.formats import FORMATS, Contents
from qcompile.schemes.scheme import FP8_BLOCK, FP8_TENSOR, NVFP4_W4A4, Scheme
from tests.qcompile.checkpoint.formats.support import (
    HELD,
    INT4,
    PAIRS,
    assert_same_bits,
    quantized,
    reader_for,
    through_file,
)

NAME = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(("name", "scheme"), PAIRS)
@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 300), k=st.integers(1, 20), ragged=st.integers(0, 15), seed=st.integers(0, 99))
def test_codes_and_scales_come_back(name: str, scheme: Scheme, n: int, k: int, ragged: int, seed: int) -> None:
    k = k * scheme.weight.sizes[-1] if scheme.weight.whole_blocks else k * 16 + ragged
    n += n % 2 if scheme in INT4 else 0  # Model Optimizer has two rows in a byte
    if name.startswith("modelopt") and scheme.weight == FP8_128X128:
        n, k = n // 128 * 128 + 128, k // 128 * 128 + 128
    fmt = FORMATS[name]
    contents = Contents({NAME: scheme}, ["lm_head", "model.embed_tokens"])
    fmt.check(contents, {NAME: (n, k)})
    weight = quantized(scheme, torch.randn(n, k, generator=torch.Generator().manual_seed(seed)))

    tensors = through_file(fmt.tensors(NAME, weight))
    reader = reader_for(fmt, contents)
    assert reader.scheme(NAME) == scheme

    back = reader.weight(NAME, scheme, tensors.__getitem__, (n, k))
    assert back.scheme == scheme
    assert_same_bits(back.codes, weight.codes)
    assert_same_bits(back.scale, weight.scale)
    for ours, theirs in ((back.global_scale, weight.global_scale), (back.input_scale, weight.input_scale)):
        if name == "compressed-tensors" and scheme.weight.scale is not None and ours is not None:
            assert theirs is not None
            torch.testing.assert_close(ours, theirs, rtol=2**-23, atol=0)  # stored as 1 / g
        else:
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize("name", ["modelopt", "compressed-tensors"])
def test_key_value_cache(name: str) -> None:
    fmt = FORMATS[name]
    k, v = torch.tensor(0.01), torch.tensor(0.02)
    tensors = through_file(fmt.kv_tensors("model.layers.0.self_attn", k, v))
    with_cache = reader_for(fmt, Contents({NAME: FP8_TENSOR}, kv_cache=True))
    assert with_cache.kv_cache
    assert with_cache.kv_scales("model.layers.0.self_attn", tensors.__getitem__) == (k, v)
    assert with_cache.kv_scales("model.layers.1.self_attn", tensors.__getitem__) is None
    without = reader_for(fmt, Contents({NAME: FP8_TENSOR}))
    assert not without.kv_cache
    assert without.kv_scales("model.layers.0.self_attn", tensors.__getitem__) is None


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_own_their_storage(name: str) -> None:
    for scheme in HELD[name]:
        weight = quantized(scheme, torch.randn(128, 128))
        given_ones = {t.data_ptr() for t in vars(weight).values() if isinstance(t, torch.Tensor)}
        for tensor in FORMATS[name].tensors(NAME, weight).values():
            assert tensor.is_contiguous()
            assert tensor.data_ptr() not in given_ones
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_mixtures_tell_layers_apart() -> None:
    layers = range(12)
    schemes: dict[str, Scheme] = {}
    for i in layers:
        schemes |= {f"model.layers.{i}.self_attn.{p}_proj": FP8_BLOCK for p in "qkvo"}
        for e in range(2):
            for p in ("gate", "up", "down"):
                schemes[f"model.layers.{i}.mlp.experts.{e}.{p}_proj"] = NVFP4_W4A4
    # one layer is different, and its number is the beginning of another's
    schemes |= {f"model.layers.1.self_attn.{p}_proj": FP8_TENSOR for p in "qkvo"}
    skipped = ["lm_head", "model.embed_tokens", *(f"model.layers.{i}.mlp.gate" for i in layers)]
    contents = Contents(schemes, skipped, tied={"lm_head": "model.embed_tokens"})
    fmt = FORMATS["compressed-tensors"]
    fmt.check(contents, dict.fromkeys(schemes, (64, 64)))
    reader = reader_for(fmt, contents)
    for name, scheme in schemes.items():
        assert reader.scheme(name) == scheme, name
    assert all(reader.scheme(name) is None for name in skipped)
    groups = fmt.files(contents)["config.json"]["quantization_config"]["config_groups"].values()
    # what is the same in every layer is one pattern, what is not is named
    assert sorted(len(group["targets"]) for group in groups) == [3, 4, 44]

    mixable = {n: FP8_TENSOR if s == FP8_BLOCK else s for n, s in schemes.items()}
    fmt, contents = FORMATS["modelopt"], Contents(mixable, skipped)
    fmt.check(contents, dict.fromkeys(schemes, (64, 64)))
    reader = reader_for(fmt, contents)
    assert {name: reader.scheme(name) for name in mixable} == mixable
    assert all(reader.scheme(name) is None for name in skipped)
