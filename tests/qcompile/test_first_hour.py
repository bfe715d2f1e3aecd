"""The commonest mistakes: what the message ends with is a command, or a line of Python, that works."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.cli import main
from qcompile.cli.command import better_command
from qcompile.errors import QCompileError
from qcompile.remedy import Remedy, with_remedy

MODELS = """
import torch
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)
    def forward(self, x, mask):
        return self.linear(x) * mask[..., None]
def make(): return Model(), (torch.randn(1, 8, 32), torch.ones(1, 8))
def data(): return [(torch.randn(1, 8, 32), torch.ones(1, 8))]
"""
RECIPE = """
metadata: {name: mine, description: all linears}
rules:
  - {quantizer: "*.weight_quantizer", format: fp8, granularty: per_tensor}
"""
EXPORT = "export models:make -o m.onnx --no-compare"
DATA = "--calibration models:data"
RENAMED = (
    "python -c 'import numpy as np; d = dict(np.load('\"'\"'names.npz'\"'\"')); d['\"'\"'x'\"'\"'] ="
    " d.pop('\"'\"'images'\"'\"'); np.savez('\"'\"'names-renamed.npz'\"'\"', **d)' && "
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    x, mask = np.ones((4, 8, 32), np.float32), np.ones((4, 8), np.float32)
    np.savez(tmp_path / "names.npz", images=x, mask=mask)
    np.savez(tmp_path / "short.npz", x=x[:, :5], mask=mask[:, :5])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    return tmp_path


MISTAKES = [
    (EXPORT, f"{EXPORT} --calibration random"),
    (f"{EXPORT} {DATA} --recipe int88", f"{EXPORT} {DATA} --recipe int8"),
    (f"{EXPORT} {DATA} --set rules[0].formt=fp8", f"{EXPORT} {DATA} --set 'rules[0].format=fp8'"),
    (
        f"{EXPORT} --recipe mine.yaml {DATA}",
        r"sed -i 's/\bgranularty\b/granularity/' mine.yaml && " + f"{EXPORT} --recipe mine.yaml {DATA}",
    ),
    (f"{EXPORT} --calibration names.npz", f"{RENAMED}{EXPORT} --calibration names-renamed.npz"),
    (
        f"{EXPORT} --calibration short.npz",
        f"{EXPORT} --calibration short.npz --dynamic x:1=size_0 mask:1=size_0",
    ),
    (f"{EXPORT} {DATA} --dynamic msk:1=n x:1=n", f"{EXPORT} {DATA} --dynamic mask:1=n x:1=n"),
    (
        f"{EXPORT} {DATA} --target sm89 --dynamic x:1=n mask:1=n --profile nn=32,64,128",
        f"{EXPORT} {DATA} --target sm89 --dynamic x:1=n mask:1=n --profile n=32,64,128",
    ),
    (
        f"{EXPORT} {DATA} --target sm89 --dynamic x:1=n mask:1=n",
        f"{EXPORT} {DATA} --target sm89 --dynamic x:1=n mask:1=n --profile n=32,128,512",
    ),
]


def told(mistake: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The command at the end of the message."""
    assert main(shlex.split(mistake)) == 2
    message, _, command = capsys.readouterr().err.partition("\nThis works:\n  ")
    assert "error: " in message and command.endswith("\n")
    return command[:-1]


@pytest.mark.everyday(5)
@pytest.mark.parametrize(("mistake", "works"), MISTAKES)
def test_mistakes_end_with_the_command_that_works(
    here: Path, capsys: pytest.CaptureFixture[str], mistake: str, works: str
) -> None:
    first, _, rest = works.rpartition("&& ")
    assert told(mistake, capsys) == f"{first}{'&& ' if first else ''}qcompile {rest}"


@pytest.mark.slow
@pytest.mark.parametrize(("mistake", "works"), MISTAKES)
def test_the_commands_work(here: Path, capsys: pytest.CaptureFixture[str], mistake: str, works: str) -> None:
    first, _, rest = told(mistake, capsys).rpartition("qcompile export ")
    if first:
        subprocess.run(first.removesuffix("&& ").replace("python ", f"{sys.executable} "), shell=True, check=True)
    assert main(["export", *shlex.split(rest)]) == 0


def test_options_are_put_in_their_place() -> None:
    error = with_remedy(QCompileError(""), Remedy(options={"--sequence": ("24",)}))
    for given, better in {
        "export a -o b": "export a -o b --sequence 24",
        "export a --sequence 16 -o b": "export a --sequence 24 -o b",
        "export a --sequence=16 -o b": "export a --sequence 24 -o b",
    }.items():
        assert better_command(given.split(), error) == f"qcompile {better}"
    assert better_command(["export"], QCompileError("")) is None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x) * mask[..., None]


X, MASK = torch.ones(1, 8, 32), torch.ones(1, 8)
BY_NAME = {"x": X, "mask": MASK}


@pytest.mark.everyday(4)
@pytest.mark.parametrize(
    ("captured", "batch", "line"),
    [
        ((X, MASK), None, "calibration=[args]"),
        (BY_NAME, None, "calibration=[kwargs]"),
        (BY_NAME, {"images": X, "mask": MASK}, "{'x': batch['images'], 'mask': batch['mask']}"),
        (BY_NAME, {**BY_NAME, "labels": MASK}, "{'x': batch['x'], 'mask': batch['mask']}"),
        (BY_NAME, (X, MASK), "dict(zip(['x', 'mask'], batch))"),
        ((X, MASK), BY_NAME, "(batch['x'], batch['mask'],)"),
        ((X, MASK), (X, MASK, MASK), "batch[:2]"),
        (
            (X, MASK),
            (X[:, :5], MASK[:, :5]),
            "dynamic_shapes={'x': {1: torch.export.Dim.DYNAMIC}, 'mask': {1: torch.export.Dim.DYNAMIC}}",
        ),
    ],
)
def test_in_python_mistakes_end_with_the_line_that_works(captured: Any, batch: Any, line: str) -> None:
    options: dict[str, Any] = {"progress": False}
    args, kwargs = (captured, {}) if isinstance(captured, tuple) else ((), captured)
    calibration = None if batch is None else [batch]
    with pytest.raises(QCompileError) as caught:
        qcompile.quantize(Model(), args, kwargs, calibration=calibration, **options)
    assert str(caught.value).rpartition("\n  ")[2] == line
    names = {"torch": torch, "args": args, "kwargs": kwargs, "batch": batch}
    if line.startswith(("calibration=", "dynamic_shapes=")):
        options |= eval(f"dict({line})", names)
        options.setdefault("calibration", calibration)
    else:
        options["calibration"] = [eval(line, names)]
    qcompile.quantize(Model(), args, kwargs, **options)
