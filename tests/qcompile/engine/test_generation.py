"""The two profiles of a decoder that generates: what they are made of, what they refuse, and what an engine has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from qcompile.engine import GenerationProfiles, build_engine
from qcompile.engine.generation import generation_profiles
from qcompile.engine.graph import OnnxGraph
from qcompile.errors import EngineError, ExpectationError

IDS: tuple[int | str, ...] = ("batch", "sequence")


def graph_with(ids: Any = IDS, past: int | str | None = "past", **others: Any) -> OnnxGraph:
    """A file with these inputs that computes nothing."""
    cache = {} if past is None else {f"past_key_values.0.{kind}": [ids[0], 2, past, 8] for kind in ("key", "value")}
    shapes = {"input_ids": ids, **others, **cache}
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, dims) for name, dims in shapes.items()]
    return OnnxGraph(helper.make_model(helper.make_graph([], "g", inputs, [])))


def shapes(profile: Any, name: str) -> Any:
    return tuple(map(tuple, profile[name]))


def test_a_dynamic_cache() -> None:
    graph = graph_with(attention_mask=["batch", "past + sequence"], position_ids=IDS)
    found = generation_profiles(graph, GenerationProfiles(context=256, prompt=128, batch=4))
    assert list(found) == ["prefill", "decode"]
    assert shapes(found["prefill"], "input_ids") == ((1, 32), (4, 64), (4, 128))
    assert shapes(found["decode"], "position_ids") == ((1, 1), (4, 1), (4, 1))
    assert shapes(found["decode"], "past_key_values.0.key") == ((1, 2, 0, 8), (4, 2, 128, 8), (4, 2, 255, 8))
    assert shapes(found["prefill"], "attention_mask") == ((1, 32), (4, 64), (4, 352))  # parts of a prompt have a past
    assert shapes(found["decode"], "attention_mask") == ((1, 1), (4, 129), (4, 256))
    unmasked = generation_profiles(graph_with(), GenerationProfiles(context=256))["decode"]
    assert shapes(unmasked, "past_key_values.0.key")[0] == (1, 2, 31, 8)


def test_the_names_of_other_exporters() -> None:
    mask = ["batch_size", "total"]
    graph = graph_with(("batch_size", "sequence_length"), "past_sequence_length", attention_mask=mask)
    found = generation_profiles(graph, GenerationProfiles(context=64))
    assert shapes(found["decode"], "attention_mask") == ((1, 1), (1, 33), (1, 64))


def test_a_static_cache_is_its_context() -> None:
    graph = graph_with(past=96, attention_mask=["batch", 96], cache_position=[1])
    found = generation_profiles(graph, GenerationProfiles(batch=2))
    assert shapes(found["prefill"], "input_ids") == ((1, 32), (2, 48), (2, 96))
    assert shapes(found["decode"], "past_key_values.0.value") == ((1, 2, 96, 8), (2, 2, 96, 8), (2, 2, 96, 8))
    assert "cache_position" not in found["decode"]
    with pytest.raises(EngineError, match="cache holds 96 tokens, which its context is, not 128"):
        generation_profiles(graph, GenerationProfiles(context=128))


def test_the_positions_beside_the_file_are_its_context(tmp_path: Path) -> None:
    graph, config = graph_with(), tmp_path / "genai_config.json"
    graph.path = tmp_path / "model.onnx"
    config.write_text(json.dumps({"model": {"context_length": 48}}))
    assert shapes(generation_profiles(graph, GenerationProfiles())["decode"], "past_key_values.0.key")[2][2] == 47
    with pytest.raises(EngineError, match="context of 64 tokens is longer than the model's 48 positions"):
        generation_profiles(graph, GenerationProfiles(context=64))
    config.write_text("{}")
    with pytest.raises(EngineError, match="has no model"):
        generation_profiles(graph, GenerationProfiles())


@pytest.mark.parametrize(
    ("inputs", "limits", "message"),
    [
        ({"past": None}, {}, "no inputs input_ids and past_key_values.0.key, but input_ids: export it with a cache"),
        ({}, {}, r"how long a sequence can get is not known: say it \(--context 2048"),
        ({}, {"context": 64, "prompt": 16}, "prompt of at most 16 tokens has no fused attention"),
        ({"ids": ("batch", 1)}, {"context": 64}, "takes 1 new tokens at every call"),
        ({"ids": (2, "sequence")}, {"context": 64, "batch": 3}, "takes 2 sequences at once, not 3"),
        ({"encoder": ["batch", "frames"]}, {"context": 64}, "input encoder has a dimension 'frames'"),
    ],
)
def test_refused(inputs: dict[str, Any], limits: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        generation_profiles(graph_with(**inputs), GenerationProfiles(**limits))


@pytest.mark.parametrize("limits", [{"context": 0}, {"batch": True}, {"prompt": "9"}, {"context": 64, "prompt": 65}])
def test_limits_that_are_none(limits: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="profiles: "):
        GenerationProfiles(**limits)


def test_the_one_word(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="profiles 'decode': the one word for them is 'generate'"):
        build_engine(tmp_path / "none.onnx", target="sm89", profiles="decode", progress=False)  # type: ignore[arg-type]


@pytest.mark.everyday(4)
def test_each_profile_is_judged_by_itself(new_file: Callable[..., Any], tmp_path: Path) -> None:
    """An attention over keys and values that are appended and quantized."""
    pytest.importorskip("tensorrt_rtx")
    file = new_file()
    q = file.input("inputs_embeds", ["batch", "sequence", 128])
    split = file.op("Reshape", q, file.constant(np.array([0, 0, 2, 64])))
    heads = file.op("Transpose", split, perm=[0, 2, 1, 3])
    stored = []
    for kind in ("key", "value"):
        past = file.input(f"past_key_values.0.{kind}", ["batch", 2, "past", 64])
        file.inputs[-1].type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN
        scale, zero = file.real(0.0625), file.zero("fp8")
        whole = file.op("Concat", file.op("DequantizeLinear", past, scale, zero), heads, axis=2)
        codes = file.op("QuantizeLinear", whole, scale, zero)
        file.output(codes, ["batch", 2, "past + sequence", 64])
        file.outputs[-1].type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN
        stored.append(file.op("DequantizeLinear", codes, scale, zero))
    scores = file.op("MatMul", file.qdq(heads), file.op("Transpose", stored[0], perm=[0, 1, 3, 2]), scope="attn")
    weights = file.qdq(file.op("Softmax", scores, axis=-1, scope="attn"), 1 / 448)
    file.output(file.op("MatMul", weights, stored[1], scope="attn"), ["batch", 2, "sequence", 64])
    path = file.save(tmp_path / "decoder.onnx")
    options: dict[str, Any] = {"target": "sm89", "progress": False}
    report = build_engine(path, profiles=GenerationProfiles(context=256), expect={"decode.attention_fp8": 1}, **options)
    assert [counts.name for counts in report.profiles] == ["prefill", "decode"]
    assert [counts.attentions for counts in report.profiles] == [{"attn": "fp8"}, {"attn": "fp8"}]
    with pytest.raises(ExpectationError, match=r"kernels \(profile decode\): at most 0 wanted"):
        report.check({"decode.kernels": 0, "attention_fp8": 1})
    with pytest.raises(EngineError, match="no profile 'chunk', but prefill, decode"):
        report.check({"chunk.attention_fp8": 1})
