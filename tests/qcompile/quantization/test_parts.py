"""A step that may keep few bytes at once solves weights in parts, to the same codes; and what it does without data."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qcompile
from qcompile.algorithms import second_moment
from qcompile.errors import CalibrationError
from qcompile.report.record import record_of
from tests.qcompile.algorithms.test_gptq import inputs, quantized, recipe
from tests.qcompile.algorithms.test_hessian_mse import Tied
from tests.qcompile.algorithms.test_sequential import Blocks
from tests.qcompile.checkpoint.models import save, tiny


def same(first: Any, second: Any) -> bool:
    a, b = first.state_dict, second.state_dict
    return a.keys() == b.keys() and all(torch.equal(a[name].float(), b[name].float()) for name in a)


@pytest.mark.everyday(1)
@pytest.mark.parametrize("sequential", ["false", "true"])
def test_parts_have_the_codes_of_one_walk(sequential: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, kept, most, made = inputs(120, 32) / 4, weakref.WeakSet[Any](), [0], {}
    add = second_moment.SecondMoment.add
    gc.freeze()  # what stands now is not walked by the collections below

    def watched(self: Any, *args: Any) -> None:
        add(self, *args)
        gc.collect()
        kept.add(self)
        most[0] = max(most[0], sum(2 * one.sum.high.nbytes for one in kept))

    monkeypatch.setattr(second_moment.SecondMoment, "add", watched)
    peaks = {}
    for memory in (4e9, 16 * (48 * 48 + 32 * 32), 1):
        chosen = recipe("nvfp4", algorithm="gptq", memory=memory, sequential=sequential)
        most[0] = 0
        made[memory] = qcompile.quantize(
            Blocks().eval(),
            (x[:8],),
            recipe=chosen,
            calibration=iter([x[:50], x[50:]]),
            dtype=torch.float16,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            progress=False,
        )
        peaks[memory] = most[0]
    one, two, each = made.values()
    assert same(one, two) and same(one, each)
    whole, half, least = peaks.values()
    assert whole >= half and least <= 16 * 48 * 48
    if sequential == "false":
        assert whole == 2 * 16 * (32 * 32 + 48 * 48) and half <= whole / 2
        told = [[n for n in record_of(p).notices if "with a walk" in n] for p in made.values()]
        assert not told[0] and "in 2 parts" in told[1][0] and "in 4 parts" in told[2][0]  # up and gate are one


def test_a_weight_of_two_layers_is_in_one_part() -> None:
    found = [
        quantized(Tied(), [inputs(80, 32)], recipe("nvfp4_weight_only", algorithm="gptq", memory=m), torch.float32)
        for m in (4e9, 1)
    ]
    assert same(*found)


@pytest.mark.everyday(1)
@pytest.mark.parametrize("name", ["nvfp4", "int8"])
def test_a_shipped_recipe_does_without_data(name: str) -> None:
    """As its oracle by hand: scales of `mse` and ranges of `max`, or no factors at all."""
    model, x = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16)).eval(), inputs(columns=32)
    chosen = qcompile.load_recipe(name)
    state = qcompile.calibrate(model, (x,), recipe=chosen, calibration=[x], progress=False)
    program = qcompile.quantize(model, (x,), recipe=chosen, calibration=state, dtype=torch.float32)
    plain = recipe(name, algorithm="mse", smallest_range=1) if name == "nvfp4" else qcompile.load_recipe("int8_fast")
    assert same(program, qcompile.quantize(model, (x,), recipe=plain, calibration=state, dtype=torch.float32))
    told = "rounded to the nearest with scales of mse" if name == "nvfp4" else "smoothquant is left out"
    assert sum(told in notice for notice in record_of(program).notices) == 1
    strict = qcompile.load_recipe(name, ["calibration.without_data=error"])
    with pytest.raises(CalibrationError, match="needs calibration data: batches of inputs"):
        qcompile.quantize(model, (x,), recipe=strict, calibration=state)


@pytest.mark.everyday(1)
def test_a_directory_without_data(tmp_path: Path) -> None:
    source, made = save(tiny("llama"), tmp_path / "source"), []
    for name, algorithm in (("gptq", "gptq, without_data: mse"), ("mse", "mse"), ("hessian", "hessian_mse")):
        chosen = qcompile.load_recipe("nvfp4_weight_only", [f"calibration={{algorithm: {algorithm}}}"])
        report = qcompile.save_checkpoint(source, tmp_path / name, format="modelopt", recipe=chosen, progress=False)
        made.append((tmp_path / name / "model.safetensors").read_bytes())
        assert sum("no calibration data for weights" in notice for notice in report.notices) == (name != "mse")
    assert made[0] == made[1] == made[2]
