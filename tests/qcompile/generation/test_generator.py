"""Generation in ONNX Runtime against transformers' `generate` of the float model, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import qcompile
from qcompile.errors import GenerationError

PROMPTS = ["The quick brown fox", "Hi"]


def tokens(prompt: str, generator: qcompile.Generator) -> list[int]:
    return list(generator.tokenizer(prompt)["input_ids"])


@pytest.mark.parametrize(
    ("dtype", "logits"),
    [(torch.float32, "all"), pytest.param(torch.float16, "last", marks=pytest.mark.slow)],
)
def test_greedy_is_that_of_transformers_in_a_padded_batch(
    made: Callable[..., Any], model: Any, dtype: torch.dtype, logits: str
) -> None:
    generator = qcompile.Generator(made(None, dtype, logits)[0])
    ids = [tokens(prompt, generator) for prompt in PROMPTS]
    expected = [
        model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), max_new_tokens=24, do_sample=False)
        for row in ids
    ]
    found = generator.generate(PROMPTS, max_new_tokens=24)
    for row, text, prompt, wanted in zip(found.tokens, found.texts, ids, expected, strict=True):
        assert row == wanted[0, len(prompt) :].tolist()
        assert text == generator.tokenizer.decode(row, skip_special_tokens=True)
    assert found.prompt_tokens == sum(map(len, ids))
    assert found.tokens_per_second > 0 and found.prompt_tokens_per_second > 0


def test_text_comes_in_pieces_and_ends_where_the_model_ends_it(made: Callable[..., Any], model: Any) -> None:
    generator = qcompile.Generator(made(None)[0])
    pieces: list[str] = []
    found = generator.generate("Hi", max_new_tokens=12, on_text=pieces.append)
    assert "".join(pieces) == found.texts[0] and len(pieces) > 1
    last = found.tokens[0][5]
    object.__setattr__(generator.settings, "ends", frozenset([last]))
    ended = generator.generate("Hi", max_new_tokens=12).tokens[0]
    assert ended == found.tokens[0][: found.tokens[0].index(last) + 1]
    assert generator.generate("Hi", max_new_tokens=12, stop_at_end=False).tokens == found.tokens


def test_a_seed_draws_the_same_again(made: Callable[..., Any]) -> None:
    generator = qcompile.Generator(made(None)[0])
    draws = [generator.generate("Hi", max_new_tokens=12, temperature=2.0, seed=seed).tokens for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.slow
def test_the_cache_holds_codes_and_a_quarter_of_the_bytes(made: Callable[..., Any]) -> None:
    half, codes = (qcompile.Generator(made(recipe)[0]).file for recipe in (None, "fp8+fp8_kv"))
    assert half.cache_bytes == 4 * codes.cache_bytes == 4 * 2 * 16
    assert {tensor.elem_type for tensor in codes.caches} == {onnx.TensorProto.FLOAT8E4M3FN}


def test_steps_are_refused_that_do_not_fit(made: Callable[..., Any]) -> None:
    run = qcompile.Generator(made(None)[0]).run(rows=2)
    first = np.ones((2, 4), np.int64)
    with pytest.raises(GenerationError, match=r"the mask is \[2, 3\], and there are 0 tokens of past and 4 new ones"):
        run.step(first, np.ones((2, 3), np.int64))
    run.step(first, np.array([[0, 1, 1, 1], [1, 1, 1, 1]]))
    with pytest.raises(GenerationError, match=r"the mask is \[2, 4\].* it has to be \[2, 5\]"):
        run.step(first[:, :1], np.ones((2, 4), np.int64))
    with pytest.raises(GenerationError, match=r"tokens are \[2, new\], one or more, and these are \[2, 0\]"):
        run.step(first[:, :0])
    with pytest.raises(GenerationError, match="a token is 0 to 257, and these are 1 to 300"):
        run.step(np.array([[1], [300]]))
    with pytest.raises(GenerationError, match="4 tokens of past and 93 new ones are 97, and the model has 96"):
        run.step(np.ones((2, 93), np.int64))
    assert run.state.length == 4 and run.step(first, np.ones((2, 8), np.int64)).shape == (2, 4, 258)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("x" * 97, {"max_new_tokens": 1}, "prompt of 97 tokens and 1 new ones are more than the 96 .*shorter prompt"),
        ("x" * 90, {}, "more than the 96 positions that there are: ask for 7 new ones at most"),
        ("", {}, "prompt 0 has no tokens"),
        ([], {}, "there is no prompt"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens of 0"),
        ("x", {"temperature": -1.0}, "a temperature of -1.0"),
        ("x", {"top_k": 3}, "give a temperature above 0"),
        ("x", {"temperature": 1.0, "top_p": 0.0}, "top_p of 0.0"),
        ("x", {"chat": True}, "no chat template"),
        (["x", "y"], {"on_text": print}, "on_text is for a single prompt"),
    ],
)
def test_what_is_asked_for_is_refused(
    made: Callable[..., Any], prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        qcompile.Generator(made(None)[0]).generate(prompt, **options)


def test_tokens_need_no_tokenizer_and_text_does(made: Callable[..., Any], llama: Path, tmp_path: Path) -> None:
    shutil.copy(made(None)[0] / "model.onnx", tmp_path / "other.onnx")
    generator = qcompile.Generator(tmp_path)
    found = generator.generate([1, 2, 3], max_new_tokens=4)
    assert len(found.tokens[0]) == 4 and not found.texts
    with pytest.raises(GenerationError, match=r"has no tokenizer .*or give tokens in the place of text"):
        generator.generate("Hi")
    assert qcompile.Generator(tmp_path, tokenizer=llama).generate("Hi", max_new_tokens=2).texts


def test_files_of_another_layout_are_refused(made: Callable[..., Any], tmp_path: Path) -> None:
    good = onnx.load(made(None)[0] / "model.onnx")

    def refused(change: Callable[[Any], object]) -> str:
        model = onnx.ModelProto()
        model.CopyFrom(good)
        change(model.graph)
        onnx.save(model, tmp_path / "m.onnx")
        with pytest.raises(GenerationError) as caught:
            qcompile.Generator(tmp_path / "m.onnx")
        return str(caught.value)

    def shape(graph: Any, name: str) -> Any:
        return next(v for v in (*graph.input, *graph.output) if v.name == name).type.tensor_type

    def drop(graph: Any, name: str) -> None:
        graph.output.remove(next(value for value in graph.output if value.name == name))

    past = "past_key_values.0.key"
    assert "lacks the outputs present.0.value" in refused(lambda graph: drop(graph, "present.0.value"))
    assert "is of another type" in refused(lambda g: setattr(shape(g, past), "elem_type", onnx.TensorProto.INT8))
    assert "a cache is [batch, heads, tokens, width]" in refused(lambda g: shape(g, past).shape.dim.pop())
    assert "heads and width of a size" in refused(lambda g: setattr(shape(g, past).shape.dim[1], "dim_param", "h"))
    with pytest.raises(GenerationError, match="there is nothing at"):
        qcompile.Generator(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GenerationError, match=r"has no model.onnx, and none in its place"):
        qcompile.Generator(tmp_path / "empty")
