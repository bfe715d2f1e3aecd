"""The record of a program: its reports are the same after it was saved and loaded, and whatever else became of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

import qcompile
from passes.base import Decline
from passes.graph import aten, is_call
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.program import lift, unlift
from qcompile.cli import main
from qcompile.report.program import ProgramReport
from qcompile.report.record import UNREACHED, VERSION, QuantizeRecord, record, record_of
from qcompile.source.pt2.load import load_program
from tests.qcompile.checkpoint.models import program as program_of

X = torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)


class Gated(nn.Module):
    """An attention that no pass finds."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).sigmoid() @ v


class Everything(nn.Module):
    """Each kind of layer that a report counts; `never` sees zeros only, `narrow` fits no block of NVFP4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.gated = nn.Conv1d(3, 3, 1), nn.LayerNorm(32), Gated()
        self.q, self.k, self.v, self.o, self.never = (nn.Linear(32, 32) for _ in range(5))
        self.up, self.down, self.experts = nn.Linear(32, 64), nn.Linear(64, 32), nn.Parameter(torch.randn(2, 32, 32))
        self.narrow, self.recurrent, self.lm_head = (
            nn.Linear(24, 32),
            nn.LSTM(32, 32, batch_first=True),
            nn.Linear(32, 8),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.stem(x) * 100)
        q, k, v = (f(x).unflatten(-1, (2, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.gated(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.down(F.gelu(self.up(self.norm(x)))) + self.never(x * 0) + self.narrow(x[..., :24])
        x = x + torch.bmm(x.flatten(0, 1).expand(2, -1, -1), self.experts).sum(0).view(x.shape)
        best, index = self.lm_head(self.recurrent(x)[0]).topk(2)
        return best, index


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(24, 32), nn.Linear(32, 4)  # NVFP4 does not fit the first

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.narrow(x))


@pytest.fixture(scope="module")
def made() -> ExportedProgram:
    torch.manual_seed(0)
    model = Two().eval()
    x = torch.randn(3, 24)
    batch = {0: Dim("batch", max=64)}
    halves = [x[:1], x[1:]]
    return qcompile.quantize(model, (x,), recipe="nvfp4", calibration=halves, dynamic_shapes=(batch,), progress=False)


def loaded(program: ExportedProgram, folder: Path) -> ExportedProgram:
    torch.export.save(program, folder / "m.pt2")
    return torch.export.load(folder / "m.pt2")


def report(program: ExportedProgram, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qcompile.export_onnx(program, folder / "m.onnx").to_json())
    return found


def test_the_report_after_a_save(made: ExportedProgram, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = loaded(made, tmp_path)
    assert report(again, tmp_path) == report(made, tmp_path)
    found = ProgramReport.of(again)
    assert found == ProgramReport.of(made) and (found.coverage, found.dimensions) == ({"linear": (1, 2)}, ["batch"])
    assert found.ranges is not None and found.ranges.samples == 3
    assert main(["inspect", str(tmp_path / "m.pt2")]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("recipe nvfp4; calibrated on 3 samples; dynamic: batch", "1 of 2", "narrow"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", qcompile.list_recipes())
def test_every_recipe_gives_the_same_report_after_a_save(recipe: str, tmp_path: Path) -> None:
    shapes = ({0: Dim("batch", max=64)},)
    program = qcompile.quantize(
        Everything().eval(), (X,), recipe=recipe, calibration=[X], dynamic_shapes=shapes, progress=False
    )
    again = loaded(program, tmp_path)
    assert record_of(again) == record_of(program)
    before, after = (report(p, tmp_path) for p in (program, again))
    assert after == before
    left = {"gated": "attention", "recurrent": "recurrent", "lm_head": "linear"}
    assert before["recipe"] == recipe and before["unquantized"].items() >= left.items()
    assert before["headroom"] and before["declined"] and before["notices"] and before["fired"]
    assert before["coverage"]["attention"][1] == 2 and before["coverage"]["experts"][1] == 1
    assert record_of(again).calibration == "3 samples" and [*record_of(again).dimensions.values()] == ["batch"]


@pytest.mark.slow
def test_a_checkpoint_says_the_same(tmp_path: Path) -> None:
    model, program = program_of("llama", "fp8")
    noted = record_of(program)
    record(program, replace(noted, declined=[Decline(UNREACHED, "not seen", "lm_head", ()), *noted.declined]))
    torch.export.save(program, tmp_path / "m.pt2")
    said = []
    for index, each in enumerate((program, load_program(tmp_path / "m.pt2"))):
        written = qcompile.save_checkpoint(each, tmp_path / str(index), format="modelopt", source=model, progress=False)
        said.append((written.recipe, written.quantized, written.unquantized, written.notices))
    assert said[0] == said[1] and said[0][0] == "fp8" and "lm_head: not seen" in said[0][3]


def through(edit: Callable[[GraphModule], None]) -> Callable[[ExportedProgram], ExportedProgram]:
    """A pass of the user's own."""

    def change(program: ExportedProgram) -> ExportedProgram:
        gm = unlift(program)
        edit(gm)
        gm.graph.eliminate_dead_code()
        return lift(gm, program)

    return change


def without_casts(gm: GraphModule) -> None:
    """Takes what starts and ends the graph away."""
    for node in gm.graph.find_nodes(op="call_function", target=aten._to_copy.default):
        node.replace_all_uses_with(node.args[0])


def without_quantizers(gm: GraphModule) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=DEQUANTIZE):
        if is_call(node.args[0], QUANTIZE):
            node.replace_all_uses_with(node.args[0].args[0])


def with_other_ends(gm: GraphModule) -> None:
    """Puts new nodes in the place of the first and the last call."""
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    for node in (calls[0], calls[-1]):
        with gm.graph.inserting_after(node):
            new = gm.graph.call_function(node.target, node.args, node.kwargs)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)


CHANGES: dict[str, Callable[[ExportedProgram], ExportedProgram]] = {
    "copied": copy.deepcopy,
    "decomposed": lambda program: program.run_decompositions(),
    "lowered and lifted": lambda program: lift(unlift(program), program),
    "exported again": lambda program: torch.export.export(program.module(), (torch.randn(3, 24),)),
    "without casts": through(without_casts),
    "without quantizers": through(without_quantizers),
    "with other ends": through(with_other_ends),
}


@pytest.mark.everyday(3)
@pytest.mark.parametrize("change", CHANGES)
def test_it_survives_what_becomes_of_the_program(change: str, made: ExportedProgram, tmp_path: Path) -> None:
    expected = record_of(made)
    assert expected.recipe == "nvfp4" and expected.declined[0].module == "narrow" and expected.fired["InsertQdq"] == 2
    assert record_of(CHANGES[change](copy.deepcopy(made))) == expected
    changed = CHANGES[change](loaded(made, tmp_path))
    assert record_of(changed) == expected
    assert record_of(loaded(changed, tmp_path)) == expected


def test_a_program_of_another_has_none() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    for model in (nn.Linear(4, 4), Same()):
        assert record_of(torch.export.export(model, (torch.randn(2, 4),))) == QuantizeRecord()


def test_a_second_record_takes_the_place_of_the_first(made: ExportedProgram, tmp_path: Path) -> None:
    program = loaded(made, tmp_path)
    record(program, QuantizeRecord("another"))
    assert record_of(loaded(program, tmp_path)) == QuantizeRecord("another")


def with_record(program: ExportedProgram, folder: Path, change: Callable[[dict[str, Any]], Any]) -> ExportedProgram:
    """`program` after a save, with each copy of its record changed."""
    program = loaded(program, folder)
    for node in program.graph.nodes:
        if "qcompile" in node.meta.get("custom", {}):
            node.meta["custom"]["qcompile"] = change(node.meta["custom"]["qcompile"])
    return loaded(program, folder)


def test_a_record_without_a_version_is_of_the_first_releases(made: ExportedProgram, tmp_path: Path) -> None:
    old = with_record(made, tmp_path, lambda data: {key: value for key, value in data.items() if key != "version"})
    assert record_of(old) == record_of(made)


STRANGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda data: {**data, "version": VERSION + 1, "more": 1}, "newer qcompile"),
    "version": (lambda data: {**data, "version": "1"}, "no version"),
    "no fields": (lambda data: 5, "no version"),
    "list": (lambda data: [], "no version"),
    "name": (lambda data: {**data, "recipe": 5}, "recipe: Input should be a valid string"),
    "more fields": (lambda data: {**data, "more": 5}, "more: "),
    "headroom": (lambda data: {**data, "headroom": [{"module": "a"}]}, "headroom.0.tensor: Field required"),
    "not finite": (
        lambda data: {**data, "headroom": [{"module": "", "tensor": "", "amax": float("nan"), "factor": 1.0}]},
        "headroom.0.amax: Input should be a finite number",
    ),
    "decline": (lambda data: {**data, "declined": [[]]}, "declined.0"),
    "dimension": (lambda data: {**data, "dimensions": {"s0": "batch size\n"}}, r"is no name of a dimension"),
}


@pytest.mark.everyday(4)
@pytest.mark.parametrize("strange", STRANGE)
def test_a_strange_record_is_told(strange: str, made: ExportedProgram, tmp_path: Path) -> None:
    """The graph was read, so the program is of use; its report says that what was noted on it is not known."""
    change, told = STRANGE[strange]
    program = with_record(made, tmp_path, change)
    (notice,) = record_of(program).notices
    assert told in notice and "declined" in notice
    assert record_of(program) == QuantizeRecord(notices=[notice])


def test_one_whole_copy_is_enough(made: ExportedProgram, tmp_path: Path) -> None:
    count = iter(range(9))
    program = with_record(made, tmp_path, lambda data: data if next(count) else 5)
    assert record_of(program) == record_of(made) and next(count) > 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("version", *(field.name for field in fields(QuantizeRecord)))


@pytest.fixture(scope="module")
def plain() -> ExportedProgram:
    return torch.export.export(Two(), (torch.randn(3, 24),))


@given(st.dictionaries(st.sampled_from(FIELDS), JSON) | JSON)
def test_what_is_read_of_strange_notes_is_a_record(plain: ExportedProgram, data: Any) -> None:
    plain.graph_module.meta.pop("qcompile", None)
    for node in plain.graph.nodes:
        node.meta["custom"] = {"qcompile": data}
    found = record_of(plain)
    record(plain, found)
    saved = [json.loads(json.dumps(node.meta["custom"])) for node in plain.graph.nodes if node.meta["custom"]]
    assert saved and saved[0]["qcompile"]["notices"] == found.notices


@pytest.mark.parametrize("custom", [5, None, "qcompile", ["qcompile"]])
def test_other_notes_of_nodes_are_no_record(plain: ExportedProgram, custom: Any) -> None:
    plain.graph_module.meta.pop("qcompile", None)
    for node in plain.graph.nodes:
        node.meta["custom"] = custom
    assert record_of(plain) == QuantizeRecord()
