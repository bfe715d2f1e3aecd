"""What a progress bar tells of the batches: samples or images, and the tokens that a mask shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.program import unlift
from qcompile.capture import capture
from qcompile.capture.batch_notices import BatchLog
from qcompile.progress import progress_bar


class Text(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return input_ids if attention_mask is None else input_ids * attention_mask


class Images(nn.Module):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return pixel_values * 2


def counted(model: nn.Module, *inputs: Tensor) -> str:
    program = capture(model, inputs)
    placeholders = [node for node in unlift(program).graph.nodes if node.op == "placeholder"]
    log = BatchLog(program, placeholders)
    for index in range(2):
        log.add(inputs, f"batch {index}")
    return log.counted()


def test_units() -> None:
    ids, mask = torch.ones(3, 1000, dtype=torch.int64), torch.ones(3, 1000, dtype=torch.int64).tril()
    assert counted(Text(), ids) == "6 samples, 6,000 tokens"
    assert counted(Text(), ids, mask) == "6 samples, 12 tokens"
    assert counted(Images(), torch.ones(2, 3, 4, 4)) == "4 images"


def test_the_bar_shows_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take a pipe for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("calibrating", 4, True) as bar:
        bar.advance(told="8 samples, 64 [tokens]")
    shown = capsys.readouterr().err
    assert "calibrating" in shown and "1/4" in shown and "8 samples, 64 [tokens]" in shown
