"""What torch.export says becomes one error of a few lines, with the way out of the commonest."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import qcompile
from qcompile.capture import capture
from qcompile.errors import CaptureError

X = torch.linspace(-1, 1, 64).reshape(4, 16)


class Net(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(16, 16), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear, x)


CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Any, str]] = {
    "branch": (lambda f, x: f(x) if x.sum() > 0 else x, None, r"data-dependent.*test_reasons\.py:\d+.*torch\.where"),
    "item": (lambda f, x: f(x)[: int(x.abs().sum().item())], None, r"data-dependent.*torch\.where"),
    "fixed size": (lambda f, x: f(x).view(2, 2, 16), ({0: Dim("b")},), "b = 4"),
    "range": (lambda f, x: f(x) + torch.zeros(8, 1)[: x.shape[0]], ({0: Dim("b")},), r"b = Dim\('b', max=8\)"),
    "shapes": (lambda f, x: f(x.t()), None, "same reduction dim"),
    "numpy": (lambda f, x: f(torch.from_numpy(x.numpy())), None, "leave NumPy out"),
    "code": (lambda f, x: f.nothing(x), None, "no attribute 'nothing'"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_failed_capture_is_a_few_lines(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    function, shapes, message = CASES[name]
    with pytest.raises(CaptureError, match=f"(?s)torch.export could not capture Net: .*{message}") as caught:
        capture(Net(function), (X,), dynamic_shapes=shapes)
    text = str(caught.value)
    assert len(text) < 900 and text.count("\n") < 5
    assert not any(word in text for word in ("TORCH_LOGS", "docs.google", "draft_export", "def forward"))
    assert "def forward" not in capfd.readouterr().err  # torch prints the graph up to where it stopped
    assert caught.value.__cause__ is not None


@pytest.mark.everyday(1)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("length", [Dim.DYNAMIC, Dim("t")])
def test_a_recurrent_layer_of_dynamic_length_is_named(kind: Any, length: Any) -> None:
    """torch.export refuses it, too: its operators have the length of the example in their graph."""
    model = nn.Sequential(nn.Linear(16, 16), kind(16, 16))
    with pytest.raises(
        CaptureError, match=r"captures 1 \((LSTM|GRU|RNN)\) for the length .* leave that axis out"
    ) as caught:
        capture(model, (X[None].expand(3, -1, -1),), dynamic_shapes=({0: length},))
    assert "\n" not in str(caught.value)
    with pytest.raises(torch._dynamo.exc.UserError, match="specialized"):
        torch.export.export(model, (X[None].expand(3, -1, -1),), dynamic_shapes=({0: length},))


def caches() -> dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=50,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (2, 8))

    class Static(nn.Module):
        def __init__(self, *, buffers: bool) -> None:
            super().__init__()
            self.model, self.cache = llama, transformers.StaticCache(config=config, max_cache_len=16)
            self.cache.early_initialization(2, 1, 8, torch.float32, torch.device("cpu"))
            if buffers:
                self.register_buffer("keys", self.cache.layers[0].keys)
                self.register_buffer("values", self.cache.layers[0].values)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.model(ids, past_key_values=self.cache, use_cache=True).logits
            return logits

    dynamic = transformers.DynamicCache(config=config)
    with torch.no_grad():
        llama(ids, past_key_values=dynamic, use_cache=True)
    return {
        "static": (Static(buffers=False), (ids,), {}),
        "static, as buffers": (Static(buffers=True), (ids,), {}),
        "dynamic": (llama, (), {"input_ids": ids[:, :1], "past_key_values": dynamic}),
    }


def test_a_key_value_cache_is_named() -> None:
    for name, (model, args, kwargs) in caches().items():
        try:
            program = qcompile.quantize(model, args, kwargs, recipe="fp8_per_channel_per_token")
        except CaptureError as error:
            assert re.search(r"key/value cache.*use_cache=False", str(error)) and str(error).count("\n") < 3, name
        else:  # it comes as tensors that go in
            assert name == "dynamic"
            with torch.no_grad():
                want = model(**copy.deepcopy(kwargs)).logits
                halves = copy.deepcopy(kwargs)  # the cache is kept in the type that is computed in
                for layer in halves["past_key_values"].layers:
                    layer.keys, layer.values = layer.keys.half(), layer.values.half()
                found = program.module()(**halves)["logits"]
            assert float((found - want).norm() / want.norm()) < 0.1


def test_what_a_model_writes_to_stderr_is_still_written(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    def speaks(linear: nn.Module, x: Tensor) -> Tensor:
        print("captured now", file=sys.stderr)
        result: Tensor = linear(x)
        return result

    capture(Net(speaks), (X,))
    assert "captured now" in capsys.readouterr().err
