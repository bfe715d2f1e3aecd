"""The reader of the format looks at what was written before it is moved in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qcompile.checkpoint.files.directory import write_configs
from qcompile.checkpoint.formats.modelopt import ModelOpt
from qcompile.checkpoint.read.store import HeaderStore
from qcompile.checkpoint.write import save as writing
from qcompile.checkpoint.write.save import save_checkpoint
from qcompile.errors import CheckpointError
from tests.qcompile.checkpoint.models import tiny

Tensors = dict[str, torch.Tensor]


def lose(name: str, tensors: Tensors) -> None:
    tensors.pop(f"{name}.weight_scale_2")


def widen(name: str, tensors: Tensors) -> None:
    tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"].repeat(1, 2)


def retype(name: str, tensors: Tensors) -> None:
    tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"].float()


def zero(name: str, tensors: Tensors) -> None:
    tensors[f"{name}.weight_scale_2"] = torch.zeros(())


def add(name: str, tensors: Tensors) -> None:
    tensors[f"{name}.weight_extra"] = torch.ones(3)


WRONG: list[tuple[Callable[[str, Tensors], None], str]] = [
    (lose, r"q_proj.weight_scale_2 is missing"),
    (widen, r"q_proj.weight_scale has the shape \[128, 16\], expected \[128, 8\]"),
    (retype, r"q_proj.weight_scale has dtype float32, expected float8_e4m3fn"),
    (zero, r"q_proj.weight_scale_2 is 0.0; a scale has to be positive"),
    (add, r"LlamaForCausalLM has no place for .*q_proj.weight_extra"),
]


def write(directory: Path, model: Any = None) -> Any:
    model = model or tiny("llama", num_hidden_layers=1)
    return save_checkpoint(model, directory, format="modelopt", recipe="nvfp4_weight_only", progress=False)


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[case[0].__name__ for case in WRONG])
def test_wrong_tensors_are_one_error_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[str, Tensors], None], message: str
) -> None:
    real = ModelOpt.tensors

    def tensors(self: ModelOpt, name: str, weight: Any) -> Tensors:
        made = real(self, name, weight)
        if name.endswith("q_proj") and not weight.codes.is_meta:
            change(name, made)
        return made

    monkeypatch.setattr(ModelOpt, "tensors", tensors)
    with pytest.raises(CheckpointError, match=f"^what was written could not be read back, .*{message}"):
        write(tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization_config"]["ignore"].append("model.layers.0.mlp*"), r"says floating point"),
        (lambda c: c.update(num_hidden_layers=2), r"lacks model.layers.1"),
        (
            lambda c: c.update(intermediate_size=512),
            r"down_proj.weight has the shape \[128, 128\], expected \[128, 256\]",
        ),
        (
            lambda c: c.update(vocab_size=95),
            r"is \[96, 128\], and the model that config.json describes has \[95, 128\]",
        ),
        (lambda c: c.update(model_type="no-such"), r"config.json: transformers cannot use it"),
    ],
)
def test_wrong_configurations_are_one_error_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    def configs(target: Path, *args: Any) -> None:
        write_configs(target, *args)
        content = json.loads((target / "config.json").read_text())
        change(content)
        (target / "config.json").write_text(json.dumps(content))

    monkeypatch.setattr(writing, "write_configs", configs)
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_no_weight_is_read_for_it(tmp_path: Path) -> None:
    write(tmp_path / "out")
    store = HeaderStore(tmp_path / "out")
    for name in list(store):
        assert store.get(name).is_meta == (store[name].shape != ())
    assert not store.left


class Own(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Remote code, so to speak."""


def test_a_class_that_transformers_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Own(tiny("llama", num_hidden_layers=1).config)
    assert any("test_save_written.Own is no class of transformers" in n for n in write(tmp_path / "out", model).notices)
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["Own"]
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"^extra: Own, as its configuration describes it, has no extra.weight"):
        write(tmp_path / "again", model)
