"""450 damaged `.pt2` files: refused with a clear error, or opened; as it was where it was only damaged on the way."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile.source.load import load_source
from tests.damage.support import judge, mutated_bytes, mutated_tree
from tests.qcompile.source.pt2.support import GRAPH, INPUTS, WEIGHTS, records, save_net, write

CONSTANTS = "data/constants/model_constants_config.json"


@pytest.mark.slow
def test_150_archives_with_other_bytes(tmp_path: Path) -> None:
    draw = random.Random(162)
    net, x = save_net(tmp_path / "good.pt2"), torch.rand(4, 8)
    with torch.no_grad():
        expected = net(x, {"the mask": x}, scale=3.0)
    data = (tmp_path / "good.pt2").read_bytes()
    cases = [tmp_path / f"{number}.pt2" for number in range(150)]
    for case in cases:
        case.write_bytes(mutated_bytes(data, draw))

    def as_it_was(path: Path) -> None:
        model: Any = load_source(str(path)).model
        torch.testing.assert_close(model.module()(x, {"the mask": x}, scale=3.0), expected)

    outcomes = judge(cases, as_it_was)
    assert outcomes["refused"] > 75


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [(GRAPH, 150), (WEIGHTS, 50), (CONSTANTS, 50), (INPUTS, 50)])
def test_300_archives_with_a_part_of_a_stranger(name: str, count: int, tmp_path: Path) -> None:
    draw = random.Random(f"163 {name}")
    save_net(tmp_path / "good.pt2")
    parts = records(tmp_path / "good.pt2")
    cases = [tmp_path / f"{number}.pt2" for number in range(count)]
    for case in cases:
        part = parts[name]
        changed = mutated_bytes(part, draw) if name == INPUTS else _changed(part, draw)
        write(case, {**parts, name: changed})

    def opens(path: Path) -> None:
        model: Any = load_source(str(path)).model
        assert isinstance(model.module(), torch.nn.Module)

    outcomes = judge(cases, opens)
    assert outcomes["refused"] > count // 5


def _changed(part: bytes, draw: random.Random) -> bytes:
    return json.dumps(mutated_tree(json.loads(part), draw)).encode()
