"""Every report goes through JSON and back to an equal one, and is shown by its kind."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import qcompile
from passes.base import Decline
from qcompile.cli import main
from qcompile.cli.report import CommandReport
from qcompile.engine.report import AttentionCount, EngineReport
from qcompile.errors import ReportError
from qcompile.report.base import ReportBase
from qcompile.report.check import Check
from qcompile.report.comparison import Comparison, Difference
from qcompile.report.export import Report
from qcompile.reports import KINDS, read_report, report_class

PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(max_size=5),
    int: st.integers(),
    bool: st.booleans(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    type(None): st.none(),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type that fields of reports have."""
    arguments = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Literal:
            return st.sampled_from(arguments)
        case types.UnionType:
            return st.one_of(*map(values, arguments))
        case builtin if builtin is dict:
            return st.dictionaries(*map(values, arguments), max_size=2)
        case builtin if builtin is list or (builtin is tuple and arguments[-1] is ...):
            return st.lists(values(arguments[0]), max_size=2).map(builtin)
        case builtin if builtin is tuple:
            return st.tuples(*map(values, arguments))
    if hint in PLAIN:
        return PLAIN[hint]
    if issubclass(hint, BaseModel):
        fields = {name: field.annotation for name, field in hint.model_fields.items()}
        fields.pop("version", None)
    else:
        assert dataclasses.is_dataclass(hint) or issubclass(hint, tuple)
        fields = typing.get_type_hints(hint)
    return st.builds(hint, **{name: values(annotation) for name, annotation in fields.items()})


@pytest.mark.everyday(4)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_json_reads_back_to_an_equal_report(kind: str, data: st.DataObject) -> None:
    found = report_class(kind)
    report = data.draw(values(found))
    text = report.to_json()
    assert found.from_json(text) == report and found.from_json(text).to_json() == text
    assert list(json.loads(text))[:2] == ["kind", "version"] and json.loads(text)["kind"] == kind == report.kind


def test_each_kind_is_listed_once_and_is_a_report() -> None:
    assert all(issubclass(report_class(kind), ReportBase) for kind in KINDS)
    assert [report_class(kind).model_fields["kind"].default for kind in KINDS] == list(KINDS)
    assert {name for name in qcompile.__all__ if name.endswith("Report")} <= {
        c.__name__ for c in map(report_class, KINDS)
    }


def export(**fields: Any) -> Report:
    given = {"target": "portable", "opset": 21, "ops": {}, "fired": {}, "checks": [], "bytes": 3}
    return Report(**{**given, **fields})


def test_what_json_has_no_numbers_for_reads_back() -> None:
    difference = Difference("a", 1, math.inf, -math.inf, math.nan, problem="not in the candidate")
    again = Report.from_json(export(comparison=Comparison((difference,))).to_json())
    assert again.comparison is not None
    (found,) = again.comparison.differences
    assert (found.max_abs, found.relative_l2) == (math.inf, -math.inf) and math.isnan(found.cosine)


@pytest.mark.everyday(2)
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_inspect_shows_any_report(kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    report = data.draw(values(report_class(kind)))
    file = tmp_path_factory.getbasetemp() / "report.json"
    file.write_text(report.to_json())
    assert read_report(file) == report
    assert main(["inspect", str(file)]) == (0 if report.passed else 1)


def test_names_of_files_and_modules_may_be_no_text() -> None:
    strange = "a\udcff"
    decline, check = Decline("Pass", strange, strange, (strange,)), Check("opsets", True, strange)
    part = export(declined=[decline], checks=[check], quantized={strange: "fp8"})
    report = CommandReport(source=strange, new=[strange], export=part)
    assert CommandReport.from_json(report.to_json()) == report and report.source == r"a\udcff"
    assert part.after([strange]).after(["first"]).data()["notices"] == ["first", r"a\udcff"]
    assert part.declined[0].nodes == (r"a\udcff",) and part.quantized == {r"a\udcff": "fp8"}


def test_coverage_has_one_shape() -> None:
    kernels: dict[str, Any] = {"gemms": {"fp8": 2, "int4": 1, "half": 3}, "convolutions": {}, "not_low_precision": []}
    attention = AttentionCount(total=3, fused=2, fp8=1, int8=1)
    built: dict[str, Any] = {"target": "sm89", "builder": "b", "kernels": 3, "bytes": 1, "seconds": 1.0, "layers": []}
    engine = EngineReport(attention=attention, **kernels, **built)
    assert engine.coverage == {"attention": (2, 3), "gemm": (3, 6)}
    assert export(coverage={"linear": [2, 3]}).coverage == {"linear": (2, 3)}


def test_a_report_of_before_they_had_a_version_is_one_of_the_first(tmp_path: Path) -> None:
    report = export(checks=[Check("opsets", False, "opset 3")])
    data = report.data()
    del data["version"]
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert read_report(tmp_path / "old.json") == report and not report.passed


def test_what_failed_in_a_part_failed_in_the_whole() -> None:
    bad = export(checks=[Check("opsets", False, "opset 3")])
    assert CommandReport(source="x", export=export()).passed
    assert not CommandReport(source="x", export=bad).passed and not CommandReport(source="x", failed="no room").passed


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    for text in ("{", "[" * 100_000, "5"):
        with pytest.raises(ReportError):
            Report.from_json(text)
    with pytest.raises(ReportError, match=r"missing\.json cannot be read: No such file"):
        qcompile.read_report(tmp_path / "missing.json")
    with pytest.raises(ReportError, match="kind: Input should be 'export'"):
        Report.from_data(export().data() | {"kind": "repair"})


@given(st.sampled_from([*KINDS, "other"]), st.data())
def test_strange_reports_are_refused_in_a_sentence(kind: str, data: st.DataObject) -> None:
    """Each field in turn with data of another type."""
    found = report_class(kind) if kind in KINDS else ReportBase
    report = data.draw(values(found)).data()
    field = data.draw(st.sampled_from(list(report)))
    strange = data.draw(st.sampled_from([None, {"a": 1}, [[[]]], "x", 10**400, [{"kind": "export"}]]))
    try:
        found.from_data(report | {field: strange})
    except ReportError as error:
        assert "\n" not in str(error) and (field in str(error) or field == "version")
