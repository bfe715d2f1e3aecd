"""Saved programs of strangers: what torch would run is refused before it opens them, what it saves is opened."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.errors import SourceError
from qcompile.source.load import load_source
from tests.qcompile.source.pt2.support import GRAPH, INPUTS, WEIGHTS, changed, records, save_net, write

MARK = "was-run"  # what a part would make in the current directory if it were run


class Derived(torch.nn.Module):
    """Its inputs are called as fields of the file are."""

    def forward(self, target: torch.Tensor, name: torch.Tensor) -> torch.Tensor:
        return target[1:] + name


class Branches(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = x.shape
        pooled = torch.nn.functional.interpolate(x[None, None], scale_factor=1.5).sum()
        y: torch.Tensor = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, (x,))
        return y.flatten()[: rows * columns // 3] + pooled + max(rows, columns) + rows % 5 + int(columns * 0.5)


def programs() -> dict[str, Callable[[], torch.export.ExportedProgram]]:
    size, auto = torch.export.Dim("size", min=3, max=100), torch.export.Dim.AUTO
    a, x = torch.rand(5, 3), torch.rand(2, 8)
    linear = torch.nn.Sequential(torch.nn.Linear(8, 8))
    return {
        "derived": lambda: torch.export.export(Derived(), (a, a[1:]), dynamic_shapes=({0: size}, {0: size - 1})),
        "sizes": lambda: torch.export.export(Branches(), (a,), dynamic_shapes=({0: auto, 1: auto},)),
        "lowered": lambda: torch.export.export(linear, (x,)).run_decompositions(),
        "ours": lambda: qcompile.quantize(linear, (x,), calibration=[(x,)]),
    }


@pytest.mark.parametrize("name", programs())
def test_what_torch_saves_is_opened(name: str, tmp_path: Path) -> None:
    program, path = programs()[name](), tmp_path / "m.pt2"
    torch.export.save(program, path, extra_files={"note.txt": "text"})
    source = load_source(str(path))
    torch.testing.assert_close(source.model.module()(*source.args), program.module()(*source.args))  # type: ignore[operator, union-attr]


def test_a_program_with_buffers_constants_and_nested_inputs_is_opened(tmp_path: Path) -> None:
    net, x = save_net(tmp_path / "m.pt2"), torch.rand(7, 8)
    opened: Any = load_source(str(tmp_path / "m.pt2")).model
    more = {"the mask": x}
    torch.testing.assert_close(opened.module()(x, more, scale=3.0), net(x, more, scale=3.0))


class Marks:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (MARK, "w")


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def sized(expression: str) -> Callable[[Any], None]:
    def change(program: Any) -> None:
        values = program["graph_module"]["graph"]["tensor_values"].values()
        size = next(size for value in values for size in value["sizes"] if "as_expr" in size)
        size["as_expr"]["expr_str"] = expression

    return change


def structured(context: object) -> Callable[[Any], None]:
    kind = "collections.defaultdict" if isinstance(context, dict) else "builtins.dict"

    def change(program: Any) -> None:
        tree = torch.utils._pytree.json.dumps([1, {"type": kind, "context": context, "children_spec": []}])
        program["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = tree

    return change


def called(change: Callable[[list[Any]], object]) -> Callable[[Any], None]:
    return lambda program: change(program["graph_module"]["module_call_graph"])


def node(**fields: Any) -> Callable[[Any], None]:
    return lambda program: program["graph_module"]["graph"]["nodes"][0].update(fields)


def top(key: str, value: Any) -> Callable[[Any], None]:
    return lambda program: program.update({key: value})


def weight(**fields: Any) -> Callable[[Any], None]:
    return lambda listed: next(iter(listed["config"].values())).update(fields)


def tensor(**fields: Any) -> Callable[[Any], None]:
    return lambda listed: next(iter(listed["config"].values()))["tensor_meta"].update(fields)


RUN = f"open('{MARK}', 'w')"
CHANGED: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "size": (GRAPH, sized(RUN), rf"the size .*open\('{MARK}', 'w'\)"),
    "attribute of a size": (GRAPH, sized("Integer(1).func"), "the size"),
    "enormous size": (GRAPH, sized("Pow(Integer(9), Pow(Integer(9), Integer(9)))"), "the size"),
    "powers of powers": (GRAPH, sized("Pow(" * 5 + "Integer(9)" + ", Integer(64))" * 5), "the size"),
    "endless symbols": (GRAPH, top("range_constraints", {"u9999999999": {"min_val": 0, "max_val": 9}}), "the size"),
    "guard": (GRAPH, top("guards_code", [RUN]), "the guard"),
    "guard with a comment": (GRAPH, top("guards_code", ["L['x'].size()[0] == 4 #"]), "the guard"),
    "name": (GRAPH, node(name=f"x = {RUN}"), "the name"),
    "operator": (GRAPH, node(target="torch.os.mkdir"), r"a call of 'torch\.os\.mkdir'"),
    "operator of files": (GRAPH, node(target="torch.ops.aten.from_file.default"), "a call of"),
    "object by its record": (WEIGHTS, weight(path_name="custom_obj_0"), "a broken entry for"),
    "no operator": (GRAPH, node(target="torch.ops.aten.add"), "a call of"),
    "enum": (GRAPH, structured('{"__enum__": true, "fqn": "made_here:Kind", "name": "A"}'), "an enum"),
    "factory": (
        GRAPH,
        structured({"default_factory_module": "made_here", "default_factory_name": "Kind", "dict_context": []}),
        "a defaultdict of 'Kind'",
    ),
    "notes": (GRAPH, node(metadata={"custom": "5"}), "the notes .5."),
    "no signature": (GRAPH, called(lambda calls: calls.clear()), "it does not say how it is called"),
    "other results": (GRAPH, structured("[]"), "its inputs or results are not those of its graph"),
    "pickled weight": (WEIGHTS, weight(use_pickle=True, path_name="weight_9"), r"an object of '_?io\.open'"),
    "expanded weight": (
        WEIGHTS,
        tensor(sizes=[{"as_int": 1 << 40}], strides=[{"as_int": 0}]),
        "with 1099511627776 elements in",
    ),
}
ADDED = {
    "example inputs": (INPUTS, pickled(((Marks(),), {})), r"an object of '_?io\.open' in its example inputs"),
    "expanded example": (
        INPUTS,
        pickled(((torch.zeros(1).expand(1 << 40),), {})),
        "a tensor of 1099511627776 elements",
    ),
    "no values": ("data/weights/weight_0", b"", "without its values"),
    "compiled code": ("data/aotinductor/model/code.so", b"", "no part of a program"),
    "object": ("data/constants/opaque_obj_0", b"", "no part of a program"),
    "old weights": ("data/weights/model.pt", pickled({}), "no part of a program"),
    "other program": ("models/other.json", b"{}", "no part of a program"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "m.pt2"
    save_net(path)
    return path


@pytest.mark.parametrize("kind", [*CHANGED, *ADDED])
def test_what_is_no_plain_data_is_refused_and_not_run(
    kind: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "made_here.py").write_text(f"import enum\nopen('{MARK}', 'w')\nKind = enum.Enum('Kind', 'A')\n")
    if kind in CHANGED:
        name, change, words = CHANGED[kind]
        parts = {**changed(good, name, change), "data/weights/weight_9": pickled(Marks())}
    else:
        name, data, words = ADDED[kind]
        parts = {**records(good), name: data}
    write(tmp_path / "m.pt2", parts)
    with pytest.raises(SourceError, match=words):
        load_source(str(tmp_path / "m.pt2")).model.module()  # type: ignore[operator]
    assert not (tmp_path / MARK).exists()


def test_compressed_parts_are_refused(good: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records(good).items():
            archive.writestr(f"m/{name}", data)
        archive.writestr("m/.data/version", "6\n")
    with pytest.raises(SourceError, match="compressed parts"):
        load_source(str(tmp_path / "m.pt2"))


def test_a_part_that_was_damaged_on_the_way_is_named(good: Path, tmp_path: Path) -> None:
    data, weights = bytearray(good.read_bytes()), records(good)["data/weights/weight_0"]
    data[data.index(weights)] ^= 1
    (tmp_path / "m.pt2").write_bytes(data)
    with pytest.raises(SourceError, match=r"'m/data/weights/weight_0' with another checksum"):
        load_source(str(tmp_path / "m.pt2"))
