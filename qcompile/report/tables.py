"""Reports as tables: what was quantized, what was left and why, the checks, and the engine's kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompile.messages import visible
from qcompile.report.ranges import RangeGrowth, RangeStep

_ROWS = 20
_SHIPPED = "qcompile/recipe/builtin/"


def table(title: str, *columns: str, numbers: Iterable[str] = ()) -> Table:
    """An empty table; the columns in `numbers` are set flush right."""
    shown = plain(title, "bold") if title else None
    result = Table(title=shown, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        result.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return result


def plain(text: object, style: str = "") -> Text:
    """Text as it is: names of modules and files may hold what rich takes for markup, and what terminals obey."""
    return Text(visible(str(text)), style)


def add(to: Table, *cells: object) -> None:
    """A row of plain text."""
    to.add_row(*(cell if isinstance(cell, Text) else plain(cell) for cell in cells))


def show_rows(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table of at most `_ROWS` rows, nothing if there are none."""
    if not rows:
        return
    found = table(f"{title} ({len(rows)})", *columns)
    for row in rows[:_ROWS]:
        add(found, *row)
    if len(rows) > _ROWS:
        add(found, f"... and {len(rows) - _ROWS} more", *("" for _ in columns[1:]))
    console.print(found)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def verdict(passed: bool) -> Text:
    return Text("passed", style="green") if passed else Text("FAILED", style="bold red")


def show_coverage(console: Console, report: Mapping[str, Any]) -> None:
    """How many layers are quantized, in which formats, and which are not."""
    coverage = table("Coverage", "", "modules", numbers=("modules",))
    for kind, (count, total) in report["coverage"].items():
        add(coverage, f"{kind}, quantized", f"{count} of {total}")
    for form, count in Counter(report["quantized"].values()).most_common():
        add(coverage, f"in {form}", count)
    console.print(coverage)
    left = [(path, kind, report.get("reasons", {}).get(path, "")) for path, kind in report["unquantized"].items()]
    show_rows(console, "Not quantized", ("module", "what", "why"), left)


def show_model(console: Console, report: Mapping[str, Any]) -> None:
    """What the reports of programs and of files have in common."""
    show_coverage(console, report)
    show_declines(console, report["declined"])
    show_notices(console, report["notices"])
    show_headroom(console, report["headroom"])
    show_ranges(console, report.get("ranges"))
    show_convolutions(console, report["convolutions"])
    show_low_rank(console, report["low_rank"])


def show_export(console: Console, report: Mapping[str, Any]) -> None:
    """The report of `qcompile.export_onnx`, as `Report.to_json` writes it."""
    head = ", ".join(f"{key} {report[key]}" for key in ("recipe", "target", "opset") if report[key])
    console.print(plain(f"ONNX file: {size(report['bytes'])}; {head}", "bold"))
    show_model(console, report)
    show_checks(console, report["checks"])
    if report["comparison"]:
        show_comparison(console, report["comparison"])


def show_steps(console: Console, report: Mapping[str, Any]) -> None:
    """How a decoder's file generates beside its program, as `StepsReport.to_json` writes it."""
    columns = ("prefill", "steps", "largest error", "other tokens")
    found = table(f"Token by token (errors up to {report['limit']:.2g} are rounding)", *columns, numbers=columns)
    runs: list[list[Mapping[str, Any]]] = []
    for step in report["steps"]:
        runs += [[]] if not step["past"] or not runs else []
        runs[-1].append(step)
    for run in runs:
        worst = max(float(step["error"]) for step in run)
        add(found, run[0]["new"], len(run) - 1, f"{worst:.2g}", sum(step["other_tokens"] for step in run))
    console.print(found)
    if not report["depends"]:
        console.print(Text("the second step does not depend on the first", style="bold red"))


def show_program(console: Console, report: Mapping[str, Any]) -> None:
    """What `quantize` made, as `ProgramReport.to_json` writes it."""
    calibrated = report["calibration"] and f"calibrated on {report['calibration']}"
    dynamic = ", ".join(report["dimensions"]) and f"dynamic: {', '.join(report['dimensions'])}"
    recipe = report["recipe"] and f"recipe {report['recipe']}"
    head = "; ".join(filter(None, (size(report["bytes"]), recipe, calibrated, dynamic)))
    console.print(plain(f"Program: {head}", "bold"))
    show_model(console, report)


def show_headroom(console: Console, headroom: Sequence[Mapping[str, Any]], shown: int = 5) -> None:
    """The tensors that came nearest to the end of the compute dtype in calibration."""
    if not headroom:
        return
    found = table(
        f"Headroom in calibration: least {min(shown, len(headroom))} of {len(headroom)} tensors",
        *("module", "tensor", "largest", "dtype holds"),
        numbers=("largest", "dtype holds"),
    )
    for entry in headroom[:shown]:
        add(found, entry["module"], entry["tensor"], f"{entry['amax']:.3g}", f"{entry['factor']:.3g} x")
    console.print(found)


def show_ranges(console: Console, ranges: Mapping[str, Any] | None) -> None:
    """How many ranges would be too small with a part of the samples."""
    if not ranges or not ranges["steps"]:
        return
    growth = RangeGrowth(ranges["ranges"], ranges["samples"], tuple(RangeStep(**step) for step in ranges["steps"]))
    console.print(plain(f"Ranges: {growth}", "bold"), soft_wrap=True)
    columns = ("after samples", "grew by more than 5%", "most", "quantizer")
    found = table("", *columns, numbers=columns[:3])
    for step in ranges["steps"]:
        add(found, step["samples"], step["larger"], f"{step['factor']:.3g} x", step["quantizer"])
    console.print(found)


def show_low_rank(console: Console, costs: Sequence[Mapping[str, Any]]) -> None:
    """What the low-rank parts beside quantized weights take."""
    rows = [
        (", ".join(c["modules"]), c["rank"], size(c["bytes"]), f"{c['bytes'] / c['weight_bytes']:.1%}") for c in costs
    ]
    show_rows(console, "Low-rank parts", ("modules", "rank", "bytes", "of the weights unquantized"), rows)


def show_convolutions(console: Console, convolutions: Sequence[Mapping[str, Any]]) -> None:
    """What codes gain by the roofline, those that gain most first."""
    if not convolutions:
        return
    numbers = ("operations", "for each byte", "bytes", "on codes", "gain", "per channel")
    found = table(f"Convolutions, by the roofline ({len(convolutions)})", "module", "in", *numbers, numbers=numbers)
    for entry in sorted(convolutions, key=lambda one: -float(one["gain"]))[:_ROWS]:
        counts = f"{entry['operations']:.3g}", f"{entry['intensity']:.3g}"
        sizes = size(entry["bytes"]), size(entry["bytes_on_codes"])
        gains = f"{entry['gain']:.2f} x", f"{entry['gain_per_channel']:.2f} x"
        add(found, entry["module"], entry["format"] or "float", *counts, *sizes, *gains)
    if len(convolutions) > _ROWS:
        add(found, f"... and {len(convolutions) - _ROWS} more", *("" for _ in range(len(numbers) + 1)))
    console.print(found)


def show_checkpoint(console: Console, report: Mapping[str, Any], directory: object = "") -> None:
    """The report of `qcompile.save_checkpoint`, as `CheckpointReport.to_json` writes it."""
    head = f"Checkpoint {directory}".rstrip() + f": {size(report['bytes'])}"
    head += f" in {len(report['files'])} files" if report["files"] else ", about"
    recipe = f", recipe {report['recipe']}" if report["recipe"] else ""
    seconds = f", {report['seconds']:.1f} s" if report["seconds"] else ""
    console.print(plain(f"{head}; format {report['format']}{recipe}{seconds}", "bold"))
    coverage = table("Layers", "", "layers", numbers=("layers",))
    for kind, (count, total) in report["coverage"].items():
        add(coverage, f"{kind}, quantized", f"{count} of {total}")
    for scheme, count in Counter(report["quantized"].values()).most_common():
        add(coverage, scheme, count)
    if report["kv_cache"]:
        add(coverage, "key/value cache in FP8", "")
    add(coverage, "not quantized", len(report["unquantized"]))
    console.print(coverage)
    show_rows(console, "Not quantized", ("layer", "what"), list(report["unquantized"].items()))
    show_declines(console, report["declined"])
    show_notices(console, report["notices"])


def show_declines(console: Console, declined: Sequence[Mapping[str, Any]]) -> None:
    """What passes left as it was, one row for each reason."""
    places: dict[tuple[str, str], list[str]] = {}
    for decline in declined:
        places.setdefault((decline["pass_name"], decline["reason"]), []).append(decline["module"])
    rows = [(name, reason, len(found), _some(found)) for (name, reason), found in places.items()]
    show_rows(console, "Declined", ("pass", "reason", "places", "modules"), rows)


def _some(modules: Sequence[str], shown: int = 2) -> str:
    names = list(dict.fromkeys(module or "the root" for module in modules))
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


_IDLE = ("matches nothing in this model", "is wholly overridden by")


def show_notices(console: Console, notices: Sequence[str]) -> None:
    """One line each; but a shipped recipe names the heads of many models, and most of them are not in this one."""
    idle = [n for n in notices if n.startswith(_SHIPPED) and any(reason in n for reason in _IDLE)]
    for notice in notices:
        if notice not in idle:
            console.print(plain(f"notice: {notice}", "yellow"), soft_wrap=True)
    if idle:
        console.print(plain(f"{len(idle)} rules of the shipped recipe have no effect on this model", "dim"))


def show_checks(console: Console, checks: Sequence[Mapping[str, Any]]) -> None:
    found = table("Checks of the file", "check", "", "detail")
    for check in checks:
        add(found, check["name"], verdict(check["passed"]), check["detail"])
    console.print(found)


def show_comparison(console: Console, comparison: Sequence[Mapping[str, Any]], shown: int = 5) -> None:
    """The layers of the file that are furthest from the program, each run on the program's own values."""

    def badness(entry: Mapping[str, Any]) -> float:
        bad = entry["problem"] or entry["nonfinite_unequal"]
        return float("inf") if bad else float(entry["relative_l2"])

    worst = sorted(comparison, key=badness, reverse=True)[:shown]
    found = table(
        f"File against the program, layer by layer: worst {len(worst)} of {len(comparison)}",
        *("module", "tensor", "relative error", "largest error", "codes that differ", "problem"),
        numbers=("relative error", "largest error", "codes that differ"),
    )
    for entry in worst:
        codes = "" if entry["unequal"] is None else f"{entry['unequal']:.2%}"
        problem = entry["problem"] or (f"{entry['nonfinite_unequal']} not finite" if entry["nonfinite_unequal"] else "")
        errors = f"{float(entry['relative_l2']):.2e}", f"{float(entry['max_abs']):.2e}"
        add(found, entry["module"], entry["name"], *errors, codes, problem)
    console.print(found)


def show_engine(console: Console, report: Mapping[str, Any]) -> None:
    """The report of `qcompile.build_engine`, as `EngineReport.to_json` writes it."""
    attention = report["attention"]
    found = table(f"Engine for {report['target']} ({report['builder']})", "", "")
    add(found, "size, build time", f"{size(report['bytes'])}, {report['seconds']:.1f} s")
    add(found, "kernels", report["kernels"])
    add(found, "attentions", f"{attention['total']}: {attention['fused']} fused, {attention['fp8']} of them in FP8")
    for kind in ("gemms", "convolutions"):
        counts = ", ".join(f"{count} {precision}" for precision, count in report[kind].items() if count)
        add(found, kind, counts or "none")
    if report["low_rank"]:
        add(found, "of low-rank parts", f"{report['low_rank']} gemms")
    console.print(found)
    several = report["profiles"] if len(report["profiles"]) > 1 else []
    show_rows(
        console,
        "Profiles",
        ("profile", "kernels", "attentions", "gemms"),
        [_profile(index, counts) for index, counts in enumerate(several)],
    )
    parts = [(path, report["precisions"].get(path, ""), n) for path, n in report["convolution_kernels"].items()]
    show_rows(console, "Convolutions", ("module", "runs in", "kernels"), parts)
    show_rows(
        console, "Not in low precision", ("kind", "module", "why"), [tuple(gap) for gap in report["not_low_precision"]]
    )
    show_notices(console, report["notices"])


def _profile(index: int, counts: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """A profile's line."""
    attention = counts["attention"]
    fused = f"{attention['total']}: {attention['fused']} fused, {attention['fp8']} in FP8"
    gemms = ", ".join(f"{count} {precision}" for precision, count in counts["gemms"].items() if count)
    return counts.get("name") or str(index), str(counts["kernels"]), fused, gemms or "none"


def show_explanation(console: Console, report: Mapping[str, Any]) -> None:
    """What `qcompile.explain` tells, as `Explanation.to_json` writes it."""
    for index, graph in enumerate(report["graphs"]):
        show_graph(console, graph, f"Graph {index}: ")
    show_rows(console, "In no graph, unquantized", ("module", "why"), list(report["left"].items()))


def show_graph(console: Console, graph: Mapping[str, Any], name: str = "") -> None:
    """One graph that was compiled, as `CompileReport.to_json` writes it."""
    recipe = graph["recipe"] and f"recipe {graph['recipe']}"
    head = ", ".join(filter(None, (recipe, f"target {graph['target']}", graph["device"])))
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in graph["seconds"].items())
    console.print(plain(f"{name}{head}; weights {size(graph['weight_bytes'])}; {times}", "bold"))
    show_coverage(console, graph)
    show_rows(console, "Kernels", ("runs as", "layers"), Counter(graph["kernels"].values()).most_common())
    show_rows(console, "In the model's own precision", ("module", "why"), list(graph["dropped"].items()))
    show_declines(console, graph["declined"])
    show_notices(console, graph["notices"])
