"""Wrappers of torch: taken off where that is exact; models without values are refused with the way out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import qcompile
from qcompile.capture import capture
from qcompile.errors import CaptureError

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    wrapped = torch.compile(model, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


def compiled_part(model: nn.Module) -> nn.Module:
    model.up = compiled(model.up)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "a compiled part": compiled_part,
    "data parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "both": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
}


@pytest.mark.everyday(3)
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_is_taken_off(name: str, group: None, caplog: pytest.LogCaptureFixture) -> None:
    model = Net().eval()
    expected, wrapped = model(X), WRAPPERS[name](model)
    parts = dict(wrapped.named_modules())
    with caplog.at_level(logging.INFO, "qcompile"):
        program = capture(wrapped, (X,))
    assert set(program.state_dict) == {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert "is taken out of its" in caplog.text
    torch.testing.assert_close(program.module()(X), expected, rtol=0, atol=0)
    assert dict(wrapped.named_modules()) == parts


def test_a_wrapper_with_hooks_is_refused() -> None:
    wrapped = compiled(Net())
    wrapped.register_forward_hook(lambda module, args, result: 2 * result)
    with pytest.raises(CaptureError, match="OptimizedModule, which has hooks"):
        capture(wrapped, (X,))


def test_sharded_parameters_say_how_to_gather_them(group: None) -> None:
    model = fully_shard(Net())
    with pytest.raises(CaptureError, match=r"up\.weight.*sharded.*full_state_dict") as caught:
        qcompile.quantize(model, (X,), recipe="fp8_per_channel_per_token")
    assert "\n" not in str(caught.value)


def partly_on_meta() -> nn.Module:
    model = Net()
    model.down.to("meta")
    return model


NO_MODEL = {
    "meta": (lambda: Net().to("meta"), r"up\.weight.*meta.*load the weights"),
    "partly meta": (partly_on_meta, r"^down\.weight, down\.bias: .*meta"),
    "script": (lambda: torch.jit.trace(Net(), X), "ScriptModule.*nn.Module that it was made"),
    "weights": (lambda: Net().state_dict(), "OrderedDict of weights.*load_state_dict"),
    "function": (lambda: Net().forward, "the model is a method.*a module's forward"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NO_MODEL)
def test_what_cannot_be_captured_is_refused_with_the_way_out(name: str) -> None:
    make, message = NO_MODEL[name]
    with pytest.raises(CaptureError, match=message):
        qcompile.quantize(make(), (X,), recipe="fp8_per_channel_per_token")  # type: ignore[no-untyped-call]
